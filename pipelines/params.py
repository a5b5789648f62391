"""The grid and its hyper-parameters, as params.yaml states them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipelines import files
from pipelines.method_settings import check_method, is_share
from pipelines.mistakes import Mistakes, unknown
from pipelines.sections import build_fields, is_integer

# Names the base training that methods share, in place of a method.
EXPLORATION = "exploration"

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
        """All runs, those of a seed one after another so that times are comparable."""
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
            kept, for methods to start from.
        augment: The standard augmentation: `crop`, the pixels of padding before a
            random crop, and `flip`, whether images are mirrored at random.
        short: By augmentation, the share of the epochs with which the base model takes
            as long as our default.
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
            if not is_share(share):
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
        if not is_share(self.validation) or self.validation == 1:
            raise ValueError(
                "`tune.validation` must be a share of the training samples, above 0 "
                f"and below 1. Received: {files.shown(self.validation)}"
            )
        if self.samples is not None and not (
            is_integer(self.samples) and self.samples > 0
        ):
            raise ValueError(
                "`tune.samples` must be a positive number of samples, or null for all. "
                f"Received: {files.shown(self.samples)}"
            )

    def run(self, dataset: str, augmentation: str, recipe: str) -> Run:
        """The run of a recipe."""
        return Run(dataset, augmentation, f"tune-{recipe}", self.seed)


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
        """Checks that the sections fit together.

        Raises:
            ValueError: If they do not, with all mistakes.
        """
        mistakes = Mistakes(f"The profile {self.profile!r}")
        _check_names(vars(self), mistakes)
        mistakes.raise_if_any()

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
        The parameters.

    Raises:
        ValueError: If keys, types, values or names are wrong. The message has all
            mistakes, each with the nearest right name.
    """
    path = path or (HERE if HERE.is_file() else FILE)
    raw = files.read_yaml(path)
    mistakes = Mistakes(path.name)
    fields = build_fields(Params, "", raw, mistakes)
    _check_names(fields, mistakes)
    mistakes.raise_if_any()
    return Params(**fields)


def pick(noun: str, choices: Mapping[str, _T], name: str) -> _T:
    """The choice of that name.

    Args:
        noun: What it is, for the error's text.
        choices: The choices by name.
        name: The name.

    Returns:
        `choices[name]`.

    Raises:
        ValueError: If there is no such name; the message lists all names.
    """
    if name not in choices:
        raise ValueError(unknown(noun, choices, name))
    return choices[name]


def parser(description: str | None, *names: str) -> argparse.ArgumentParser:
    """A command line with the names that a stage takes, as `--dataset`.

    Args:
        description: The program's description.
        *names: `"dataset"`, `"augmentation"`, `"method"`, `"recipe"`, `"seed"`.

    Returns:
        A parser, which also has `--root` and `--params`.
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


def _check_names(fields: Mapping[str, Any], mistakes: Mistakes) -> None:
    """Checks that names in one section are there in another, and methods' settings.

    Args:
        fields: Fields of `Params`, as far as they could be read.
        mistakes: Gets what is wrong.
    """

    def names(section: Any, name: str) -> Collection[str]:
        """A collection of names in a section, empty if it could not be read."""
        if isinstance(section, Mapping):
            found = section.get(name)
        else:
            found = getattr(section, name, None)
        return found if isinstance(found, (Mapping, tuple)) else ()

    def check(noun: str, chosen: Iterable[Any], choices: Collection[str]) -> None:
        for name in chosen:
            if isinstance(name, str):
                mistakes.check_choice(noun, choices, name)

    grid = fields.get("grid")
    for section in ("prepare", "train"):
        noun = f"data set (under `{section}`)"
        check(noun, names(grid, "datasets"), names(fields, section))
    check("method", names(grid, "methods"), names(fields, "methods"))
    recipes = names(fields, "recipes")
    check("recipe (for `tune.recipes`)", names(fields.get("tune"), "recipes"), recipes)
    for dataset, train in _items(fields, "train"):
        own = getattr(train, "recipes", None)
        if isinstance(own, Mapping):
            check(f"recipe (for `train.{dataset}.recipes`)", own.values(), recipes)
            if dataset in names(grid, "datasets"):
                noun = f"augmentation (under `train.{dataset}.recipes`)"
                check(noun, names(grid, "augmentations"), own)
    for method, settings in _items(fields, "methods"):
        if isinstance(settings, Mapping):
            check_method(method, settings, mistakes)


def _items(fields: Mapping[str, Any], section: str) -> Iterable[tuple[str, Any]]:
    """The entries of a section, none if it could not be read."""
    found = fields.get(section)
    return found.items() if isinstance(found, Mapping) else ()
