"""The results of the runs that the parameters name, checked and by run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines import files, origins
from pipelines.params import Params, Run
from pipelines.reporting import comparison

if TYPE_CHECKING:
    from pipelines.layout import Layout
    from pipelines.origins import Origins
    from pipelines.reporting.comparison import Estimate

# The method that the others are compared with: the base with re-estimated batch-norm
# statistics, and its best recipe. Without them the comparison would be biased.
COMPARISON = "base_bn"
# Wall times are compared with the base as Keras trains it, which is the faster one.
TIME_REFERENCE = "base"
# Base training in all its forms.
BASES = (
    "base",
    "base_bn",
    "base_swa",
    "base_temperature",
    "base_short",
    "base_long",
)
# The methods that the answer is about: `DAlign(Adam())`, and with `explore=1.0`.
DEFAULT, BETTER = "dalign", "dalign_better"

NOT_RUN = "not run"
NOT_RECORDED = "not recorded"

# What the origins call the runs of the grid.
RUNS = "runs"
PHASES = ("explore", "switch", "exploit")
NUMBERS = ("error_rate", "train_loss", "train_error_rate", "lower_bound", "gap")
# On test data. Older results lack them.
CALIBRATION = ("nll", "ece", "brier", "temperature")
AUGMENTATIONS = {
    "none": "no augmentation",
    "standard": "standard augmentation",
}


@dataclass(frozen=True)
class Result:
    """What came out of one run.

    Attributes:
        run: Which run.
        metrics: What `evaluate` wrote.
        timing: Wall times, by phase too, and the commit; empty if not recorded.
    """

    run: Run
    metrics: Mapping[str, Any]
    timing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """With what the run was made."""
        return self.metrics["provenance"]

    @property
    def seconds(self) -> float | None:
        """Wall time, or None if it was not recorded."""
        return self.known("seconds")

    def phase(self, name: str) -> float | None:
        """Wall time of a phase; None if not recorded, 0 if the run has none such."""
        if "phases" not in self.timing:
            return None
        return float(self.timing["phases"].get(name, 0.0))

    def number(self, name: str) -> float:
        """A metric that every run has."""
        return float(self.metrics[name])

    def known(self, name: str) -> float | None:
        """A metric or the `seconds`, or None if it was not recorded."""
        value = (self.timing if name == "seconds" else self.metrics).get(name)
        return None if value is None else float(value)


@dataclass(frozen=True)
class Results:
    """The results of a grid.

    Attributes:
        params: The parameters, with the grid.
        by_run: The runs that were made.
        tuning: By data set, what each recipe reached; without what was not run.
        frontier: By data set, error and time against the share that is explored.
        origins: The code that all of it was made with; None if it was not noted.
    """

    params: Params
    by_run: Mapping[Run, Result]
    tuning: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    frontier: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    origins: Origins | None = None

    def of(self, dataset: str, augmentation: str, method: str) -> list[Result]:
        """The results for all seeds, in their order, or none if a seed was not run."""
        runs = self._runs(dataset, augmentation, method)
        if any(run not in self.by_run for run in runs):
            return []
        return [self.by_run[run] for run in runs]

    def done(self, dataset: str, augmentation: str, method: str) -> int:
        """Number of seeds that were run."""
        runs = self._runs(dataset, augmentation, method)
        return sum(run in self.by_run for run in runs)

    def finished(self, dataset: str, augmentation: str) -> dict[str, list[Result]]:
        """By method, in the grid's order, the results for all seeds where complete."""
        methods = self.params.grid.methods
        found = {each: self.of(dataset, augmentation, each) for each in methods}
        return {method: results for method, results in found.items() if results}

    def groups(self) -> list[tuple[str, str]]:
        """All pairs of data set and augmentation of the grid."""
        grid = self.params.grid
        return [(each, other) for each in grid.datasets for other in grid.augmentations]

    def of_dataset(self, dataset: str) -> list[Result]:
        """All results on a data set."""
        return [each for run, each in self.by_run.items() if run.dataset == dataset]

    def title(self, dataset: str) -> str:
        """The title of the data; that of partial data says so."""
        made = [each.provenance for each in self.of_dataset(dataset)]
        made += [
            found[dataset]["provenance"]
            for found in (self.tuning, self.frontier)
            if dataset in found
        ]
        if not made:
            return dataset
        title = str(made[0].get("title", dataset))
        marked = not made[0].get("partial", True) or "(" in title
        return title if marked else f"{title} (partial)"

    def heading(self, dataset: str, augmentation: str) -> str:
        """The title of what belongs to a data set and an augmentation."""
        words = AUGMENTATIONS.get(augmentation, augmentation)
        return f"{self.title(dataset)}, {words}"

    @property
    def reference(self) -> str:
        """What the others are compared with; the base where none is re-estimated."""
        known = COMPARISON in self.params.grid.methods
        return COMPARISON if known else TIME_REFERENCE

    def numbers(
        self, dataset: str, augmentation: str, method: str, name: str
    ) -> list[float]:
        """A metric or the `seconds` of all seeds; empty if one was not recorded."""
        found = [each.known(name) for each in self.of(dataset, augmentation, method)]
        known = [each for each in found if each is not None]
        return known if len(known) == len(found) else []

    def difference(
        self,
        dataset: str,
        augmentation: str,
        method: str,
        reference: str,
        name: str = "error_rate",
    ) -> Estimate | None:
        """A metric of a method less that of another, or None if one lacks it."""
        values = self.numbers(dataset, augmentation, method, name)
        others = self.numbers(dataset, augmentation, reference, name)
        return comparison.difference(values, others) if values and others else None

    def time_ratio(
        self,
        dataset: str,
        augmentation: str,
        method: str,
        reference: str = TIME_REFERENCE,
    ) -> Estimate | None:
        """Wall time over that of another method, or None if one was not recorded."""
        values = self.numbers(dataset, augmentation, method, "seconds")
        others = self.numbers(dataset, augmentation, reference, "seconds")
        return comparison.ratio(values, others) if values and others else None

    def _runs(self, dataset: str, augmentation: str, method: str) -> list[Run]:
        seeds = self.params.grid.seeds
        return [Run(dataset, augmentation, method, seed) for seed in seeds]


def read(params: Params, layout: Layout) -> Results:
    """Reads the results of all runs of the grid that there are.

    Args:
        params: The parameters. Only runs that they name are looked at, whatever files
            there are.
        layout: Where the files are.

    Returns:
        The results. Runs without metrics are not in them.

    Raises:
        ValueError: If something was made with synthetic data, or the results of a data
            set with different data.
    """
    by_run: dict[Run, Result] = {}
    for run in params.grid.runs():
        if not layout.metrics(run).is_file():
            continue
        metrics = files.read_json(layout.metrics(run), *NUMBERS, "curves", "provenance")
        timing = layout.timing(run)
        by_run[run] = Result(
            run,
            metrics,
            files.read_json(timing, "seconds") if timing.is_file() else {},
        )
    tuning = {
        name: found
        for name in params.tune.datasets
        if (found := read_tuning(params, layout, name))
    }
    frontier = {
        name: found
        for name in params.frontier.datasets
        if (found := read_frontier(params, layout, name))
    }
    made = [(run.dataset, run.name, each.provenance) for run, each in by_run.items()]
    for noun, found in (("tuning", tuning), ("frontier", frontier)):
        made += [(key, f"{noun} of {key}", found[key]["provenance"]) for key in found]
    _check(made)
    return Results(
        params, by_run, tuning, frontier, origins.read(layout.code, stages(params))
    )


def stages(params: Params) -> list[list[str]]:
    """The words of the commands whose results a report shows."""
    names = ["prepare", "explore", "train", "evaluate"]
    names += ["tune"] * bool(params.tune.datasets)
    names += ["frontier"] * bool(params.frontier.datasets)
    return [[name] for name in names]


def read_tuning(params: Params, layout: Layout, dataset: str) -> dict[str, Any]:
    """Reads what the recipes reached on a data set.

    Args:
        params: The parameters. Only recipes that they name are looked at.
        layout: Where the files are.
        dataset: Name of the data set.

    Returns:
        `augmentations`, the errors by augmentation and recipe; `best`, by augmentation
        the recipe of the least error, where all were tried; and what the files have in
        common. Empty if none was tried.
    """
    errors: dict[str, dict[str, Any]] = {}
    common: dict[str, Any] = {}
    for augmentation in params.grid.augmentations:
        for recipe in params.tune.recipes:
            path = layout.tuning(dataset, augmentation, recipe)
            if path.is_file():
                common = files.read_json(path, "errors", "provenance")
                errors.setdefault(augmentation, {})[recipe] = common.pop("errors")
    if not errors:
        return {}
    best = {
        augmentation: min(found, key=lambda name: found[name][COMPARISON])
        for augmentation, found in errors.items()
        if len(found) == len(params.tune.recipes)
    }
    return {**common, "augmentations": errors, "best": best}


def read_frontier(params: Params, layout: Layout, dataset: str) -> dict[str, Any]:
    """Reads the frontier of a data set, if all seeds were run.

    Args:
        params: The parameters.
        layout: Where the files are.
        dataset: Name of the data set.

    Returns:
        The points of all seeds, those of the bases by name, and `provenance`. Empty if
        one was not run.
    """
    paths = [layout.frontier(dataset, seed) for seed in params.grid.seeds]
    if not all(path.is_file() for path in paths):
        return {}
    parts = [files.read_json(path, "points", "provenance") for path in paths]
    lists = [name for name in parts[0] if name != "provenance"]
    joined: dict[str, Any] = {
        name: [point for part in parts for point in part[name]] for name in lists
    }
    return {**joined, "provenance": parts[0]["provenance"]}


def _check(made: Iterable[tuple[str, str, Mapping[str, Any]]]) -> None:
    """Refuses synthetic data, and different data under one name."""
    hashes: dict[str, dict[str, str]] = {}
    for dataset, name, provenance in made:
        # Data without a mark count as synthetic.
        if provenance.get("synthetic", True):
            raise ValueError(
                "Synthetic data do not belong into results. Received: metrics of "
                f"{name}. Delete them, and prepare the data set anew."
            )
        found = provenance.get("data_sha256")
        if not found:
            raise ValueError(
                "Results must say which data they were made with. Received: metrics of "
                f"{name} without `data_sha256`. Run its stages again."
            )
        hashes.setdefault(dataset, {}).setdefault(str(found), name)
    for dataset, found_in in hashes.items():
        if len(found_in) > 1:
            versions = ", ".join(
                f"{found[:12]} ({name})" for found, name in sorted(found_in.items())
            )
            raise ValueError(
                "Results can be compared on the same data only. Received: results on "
                f"{dataset} that were made with {len(found_in)} versions of it: "
                f"{versions}. Run them again."
            )
