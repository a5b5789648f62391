"""The grid and its hyper-parameters, as params.yaml states them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipelines import files

# The base training that methods share, where the name of a method stands otherwise.
EXPLORATION = "exploration"
# The epochs of a base that takes as long as our default; see `TrainParams.short`.
SHORT = "short"
# How the solver is called among the ways to exploit.
SOLVE = "solve"

HERE = Path("params.yaml")
FILE = Path(__file__).resolve().parent.parent / "params.yaml"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Run:
    """One training run of the grid.

    Attributes:
        dataset: Name of the data set.
        augmentation: `"none"` or `"standard"`.
        method: Name of the method.
        seed: Seed of initial weights, shuffles and augmentation.
    """

    dataset: str
    augmentation: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """The run's name in files and stages."""
        return f"{self.dataset}-{self.augmentation}-{self.method}-{self.seed}"

    @property
    def exploration(self) -> Run:
        """The base training of the same seed, which methods may share."""
        return dataclasses.replace(self, method=EXPLORATION)


@dataclass(frozen=True)
class Grid:
    """What is run: every combination.

    Attributes:
        datasets: Names of data sets.
        augmentations: `"none"`, `"standard"` or both.
        methods: Names of methods; the base, with which the others are compared, first.
        seeds: Seeds.
    """

    datasets: tuple[str, ...]
    augmentations: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]

    def runs(self) -> list[Run]:
        """All runs. The methods of a seed follow each other, as their times compare."""
        return [
            Run(dataset, augmentation, method, seed)
            for dataset in self.datasets
            for augmentation in self.augmentations
            for seed in self.seeds
            for method in self.methods
        ]


@dataclass(frozen=True)
class DataParams:
    """What a prepared data set must be.

    Attributes:
        n_train: Number of training samples. Fewer than the data set has are drawn by
            class, and the data are then called partial.
        n_test: Number of test samples, likewise.
        split_seed: Seed of the draw, and of the split of data that come without one.
        source: The data set that it is, where its name is another: several can share
            one source, with a base model each.
        note: What tables add to the title, such as the base model's kind.
    """

    n_train: int
    n_test: int
    split_seed: int = 0
    source: str | None = None
    note: str = ""


@dataclass(frozen=True)
class TrainParams:
    """Base model and base training on a data set, the same for all methods.

    Attributes:
        model: `name` of a builder in `base_models`, and its settings.
        epochs: Number of epochs.
        batch_size: Samples per step.
        recipes: By augmentation, the name of an entry of `recipes`: the best for the
            base model of those that `tune` compares, and the same for all methods.
        checkpoints: Shares of the epochs after which the base model's weights are
            kept, for methods to go on from.
        augment: The standard augmentation: `crop`, the pixels of padding before a
            random crop, and `flip`, whether images are mirrored at random.
        short: By augmentation, the share of the epochs that takes the base model as
            long as our default takes.
    """

    model: Mapping[str, Any]
    epochs: int
    batch_size: int
    recipes: Mapping[str, str]
    checkpoints: tuple[float, ...] = (1.0,)
    augment: Mapping[str, Any] = field(default_factory=dict)
    short: Mapping[str, float] = field(
        default_factory=lambda: {"none": 0.75, "standard": 0.75}
    )

    def __post_init__(self) -> None:
        for augmentation, share in self.short.items():
            if not _is_share(share):
                raise ValueError(
                    "`short` must be a share of the epochs, above 0 and at most 1, by "
                    f"augmentation. Received: {files.shown(share)} for {augmentation!r}"
                )


@dataclass(frozen=True)
class Recipe:
    """What the optimizer does.

    Attributes:
        learning_rate: The first learning rate.
        schedule: `"constant"`, or `"cosine"`: to zero over all epochs.
        optimizer: `"adam"`, or `"sgd"` with Nesterov's momentum of 0.9.
        weight_decay: Of SGD alone, decoupled.
    """

    learning_rate: float
    schedule: str = "constant"
    optimizer: str = "adam"
    weight_decay: float | None = None


@dataclass(frozen=True)
class Tuning:
    """The search for the base model's best recipe.

    Attributes:
        datasets: Data sets to search on, with every augmentation.
        recipes: The recipes to try.
        validation: Share of the training samples that the recipes are judged on.
        seed: Seed of that split and of the runs.
        samples: The most training samples to search on; None for all.
    """

    datasets: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    validation: float = 0.2
    seed: int = 0
    samples: int | None = None

    def __post_init__(self) -> None:
        if not _is_share(self.validation) or self.validation == 1:
            raise ValueError(
                "`tune.validation` must be a share of the training samples, above 0 "
                f"and below 1. Received: {files.shown(self.validation)}"
            )
        if self.samples is not None and not (
            _is_number(self.samples) and self.samples == int(self.samples) > 0
        ):
            raise ValueError(
                "`tune.samples` must be a positive number of samples, or null for all. "
                f"Received: {files.shown(self.samples)}"
            )


@dataclass(frozen=True)
class Frontier:
    """Error and time against the share of epochs that is explored.

    Attributes:
        datasets: Data sets to draw it for.
        method: The method, of kind `two_phase` with random gates.
        explore: Shares of the epochs; 1 is post hoc.
    """

    datasets: tuple[str, ...] = ()
    method: str = ""
    explore: tuple[float, ...] = ()


@dataclass(frozen=True)
class Params:
    """All parameters.

    Attributes:
        profile: Name of the profile, such as `quick` or `cpu`.
        code: From the folder of the parameters to that of the code.
        grid: What is run.
        prepare: Data sets by name.
        train: Base models and training by data set.
        recipes: What the optimizer does, by name.
        methods: `kind` of `methods.KINDS`, and its settings, by method.
        labels: Names of methods for readers, where they differ.
        tune: The search for the base model's best recipe.
        frontier: Error and time against the share that is explored.
    """

    profile: str
    code: str
    grid: Grid
    prepare: Mapping[str, DataParams]
    train: Mapping[str, TrainParams]
    recipes: Mapping[str, Recipe]
    methods: Mapping[str, Mapping[str, Any]]
    labels: Mapping[str, str] = field(default_factory=dict)
    tune: Tuning = field(default_factory=Tuning)
    frontier: Frontier = field(default_factory=Frontier)

    def __post_init__(self) -> None:
        for dataset in self.grid.datasets:
            pick("data set (under `prepare`)", self.prepare, dataset)
            train = pick("data set (under `train`)", self.train, dataset)
            for augmentation in self.grid.augmentations:
                pick(
                    "recipe",
                    self.recipes,
                    pick(
                        f"augmentation (under `train.{dataset}.recipes`)",
                        train.recipes,
                        augmentation,
                    ),
                )
        for method in self.grid.methods:
            pick("method", self.methods, method)
        for method, settings in self.methods.items():
            _check_method(method, settings)
        for recipe in self.tune.recipes:
            pick("recipe", self.recipes, recipe)

    def recipe(self, dataset: str, augmentation: str) -> Recipe:
        """The recipe of a data set, the same for all methods."""
        return self.recipes[self.train[dataset].recipes[augmentation]]

    def label(self, method: str) -> str:
        """What the report calls a method."""
        return self.labels.get(method, method.replace("_", " "))


def load(path: Path | None = None) -> Params:
    """Reads a params.yaml.

    Args:
        path: The file; by default that of the folder one is in, or, where there is
            none, the repository's.

    Returns:
        What it says.

    Raises:
        ValueError: If a section lacks a key or has one too many, or a value has a
            wrong type.
    """
    path = path or (HERE if HERE.is_file() else FILE)
    raw = files.read_yaml(path)
    try:
        return _params(raw, path.name)
    except files.WRONG_TYPES as error:
        raise ValueError(
            f"A value in {path.name} has a wrong type. Received: {error}"
        ) from error


def _params(raw: Mapping[str, Any], file: str) -> Params:
    """Makes the parameters of what a file holds."""
    known = {each.name for each in dataclasses.fields(Params)}
    sections: dict[str, Any] = {name: raw[name] for name in raw if name in known}
    if "grid" in sections:
        sections["grid"] = _section(Grid, "grid", _tuples(sections["grid"]))
    one: dict[str, type[Any]] = {"tune": Tuning, "frontier": Frontier}
    for name, kind in one.items():
        if name in sections:
            sections[name] = _section(kind, name, _tuples(sections[name]))
    many: dict[str, type[Any]] = {
        "prepare": DataParams,
        "train": TrainParams,
        "recipes": Recipe,
    }
    for name, kind in many.items():
        sections[name] = {
            dataset: _section(kind, f"{name}.{dataset}", _tuples(values))
            for dataset, values in sections.get(name, {}).items()
        }
    return _section(Params, file, sections)


def pick(noun: str, choices: Mapping[str, _T], name: str) -> _T:
    """The choice of that name.

    Args:
        noun: What it is, for the error's text.
        choices: The choices by name.
        name: The name.

    Returns:
        `choices[name]`.

    Raises:
        ValueError: If there is no such name; the message lists those there are.
    """
    if name not in choices:
        raise ValueError(
            f"There is no such {noun}. Received: {name!r}; there are "
            f"{', '.join(sorted(choices))}"
        )
    return choices[name]


def parser(description: str | None, *names: str) -> argparse.ArgumentParser:
    """A command line with the names that a stage takes, as `--dataset`.

    Args:
        description: The program's description.
        *names: `"dataset"`, `"augmentation"`, `"method"`, `"recipe"`, `"seed"`.

    Returns:
        A parser, which knows `--root` and `--params`, too.
    """
    line = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    for name in names:
        kind = int if name == "seed" else str
        line.add_argument(f"--{name}", type=kind, required=True)
    line.add_argument(
        "--root", type=Path, default=Path(), help="folder of data, runs and results"
    )
    line.add_argument(
        "--params", type=Path, help="params.yaml to use; by default the folder's"
    )
    return line


def _check_method(name: str, settings: Mapping[str, Any]) -> None:
    """Refuses settings out of their ranges, before anything is trained.

    Raises:
        ValueError: If there are some.
    """
    ranges: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "average": ("true or false", lambda value: isinstance(value, bool)),
        "reestimate": ("true or false", lambda value: isinstance(value, bool)),
        "temperature": (
            "the share of the training samples to fit it on, above 0 and below 1",
            lambda value: _is_share(value) and value < 1,
        ),
        "epochs": (
            f"a positive multiple of the epochs, or {SHORT!r}",
            lambda value: value == SHORT or (_is_number(value) and value > 0),
        ),
        "explore": ("a share of the epochs, above 0 and at most 1", _is_share),
        "exploit": (f"'copy' or {SOLVE!r}", lambda value: value in ("copy", SOLVE)),
    }
    for key, (wanted, fits) in ranges.items():
        if key in settings and not fits(settings[key]):
            raise ValueError(
                f"`methods.{name}.{key}` must be {wanted}. Received: "
                f"{files.shown(settings[key])}"
            )
    if settings.get("average") and settings.get("gates") == "learned":
        raise ValueError(
            "The shared exploration keeps an average of the weights, and learned gates "
            f"explore by themselves. Received: `average` in `methods.{name}`. Leave it "
            "out, or take random gates."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def _tuples(values: Any) -> Any:
    """The same mapping, with tuples for lists."""
    if not isinstance(values, dict):
        return values
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _section(kind: type[_T], name: str, values: Any) -> _T:
    """Makes a dataclass from a mapping, with an error that names the keys."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    wanted = {
        each.name
        for each in fields
        if each.default is dataclasses.MISSING
        and each.default_factory is dataclasses.MISSING
    }
    given = set(values) if isinstance(values, dict) else set()
    if wanted - given or given - {each.name for each in fields}:
        optional = {each.name for each in fields} - wanted
        raise ValueError(
            f"`{name}` must have the keys {', '.join(sorted(wanted))} and may have "
            f"{', '.join(sorted(optional)) or 'no others'}. Received: "
            f"{files.shown(values)}"
        )
    return kind(**values)
