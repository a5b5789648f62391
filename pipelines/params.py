"""The grid and its hyper-parameters, as params.yaml states them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

FILE = Path(__file__).resolve().parent.parent / "params.yaml"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Run:
    """One training run of the grid.

    Attributes:
        dataset: Name of the data set.
        method: Name of the method.
        seed: Seed of initial weights and shuffles.
    """

    dataset: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """The run's name in files and stages."""
        return f"{self.dataset}-{self.method}-{self.seed}"


@dataclass(frozen=True)
class Grid:
    """What is run: every combination.

    Attributes:
        datasets: Names of data sets.
        methods: Names of methods.
        seeds: Seeds.
    """

    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]

    def runs(self) -> list[Run]:
        """All runs. The methods of a seed follow each other, as their times compare."""
        return [
            Run(dataset, method, seed)
            for dataset in self.datasets
            for seed in self.seeds
            for method in self.methods
        ]


@dataclass(frozen=True)
class DataParams:
    """What a prepared data set must be.

    Attributes:
        n_train: Number of training samples.
        n_test: Number of test samples.
        split_seed: Seed of the split, for data sets that come without one.
    """

    n_train: int
    n_test: int
    split_seed: int = 0


@dataclass(frozen=True)
class TrainParams:
    """Base model and base training on a data set, the same for all methods.

    Attributes:
        model: `name` of a builder in `base_models`, and its settings.
        epochs: Number of epochs.
        batch_size: Samples per step.
        learning_rate: Learning rate of Adam.
    """

    model: Mapping[str, Any]
    epochs: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Params:
    """All parameters.

    Attributes:
        grid: What is run.
        prepare: Data sets by name.
        train: Base models and training by data set.
        methods: `kind` of `methods.KINDS`, and its settings, by method.
        labels: Names of methods for readers, where they differ.
        studies: Settings of the studies of the mechanism, by name.
    """

    grid: Grid
    prepare: Mapping[str, DataParams]
    train: Mapping[str, TrainParams]
    methods: Mapping[str, Mapping[str, Any]]
    labels: Mapping[str, str] = field(default_factory=dict)
    studies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for dataset in self.grid.datasets:
            pick("data set (under `prepare`)", self.prepare, dataset)
            pick("data set (under `train`)", self.train, dataset)
        for method in self.grid.methods:
            pick("method", self.methods, method)

    def label(self, method: str) -> str:
        """What the report calls a method."""
        return self.labels.get(method, method.replace("_", " "))


def load(path: Path = FILE) -> Params:
    """Reads a params.yaml.

    Args:
        path: The file; by default the repository's.

    Returns:
        What it says.

    Raises:
        ValueError: If a section lacks a key or has one too many.
    """
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError(f"{path.name} must be a mapping. Received: {raw!r}")
    known = {each.name for each in dataclasses.fields(Params)}
    sections = {name: raw[name] for name in raw if name in known}
    if "grid" in sections:
        grid = _section(Grid, "grid", sections["grid"])
        sections["grid"] = Grid(*map(tuple, dataclasses.astuple(grid)))
    for name, kind in (("prepare", DataParams), ("train", TrainParams)):
        sections[name] = {
            dataset: _section(kind, f"{name}.{dataset}", values)
            for dataset, values in sections.get(name, {}).items()
        }
    return _section(Params, path.name, sections)


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
    """A command line with some of `--dataset`, `--method` and `--seed`.

    Args:
        description: The program's description.
        *names: `"dataset"`, `"method"`, `"seed"`.

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
        "--params", type=Path, default=FILE, help="params.yaml to use instead"
    )
    return line


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
            f"{', '.join(sorted(optional)) or 'no others'}. Received: {values!r}"
        )
    return kind(**values)
