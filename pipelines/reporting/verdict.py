"""What the method is held against, and whether it keeps it: in numbers and words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipelines.reporting.comparison import points
from pipelines.reporting.results import (
    AUGMENTATIONS,
    BASES,
    Results,
)

GAP = 1e-6
TIME = {"none": 0.75, "standard": 0.9}
# Means of error rates differ by whole samples: this is rounding, nothing else.
_ROUNDING = 1e-12

NOT_RUN = "not run"


@dataclass(frozen=True)
class Finding:
    """A method held against a target on a data set.

    Attributes:
        target: Name of the target.
        method: Name of the method.
        dataset: Name of the data set.
        augmentation: Name of the augmentation.
        met: Whether the target is met; None if that was not run.
        numbers: What was found and what was asked for.
    """

    target: str
    method: str
    dataset: str
    augmentation: str
    met: bool | None
    numbers: str = ""

    @property
    def text(self) -> str:
        """The finding in a cell of a table."""
        return _word(self.met) + (f": {self.numbers}" if self.numbers else "")


@dataclass(frozen=True)
class Overall:
    """A method held against a target on all data sets of an augmentation.

    Attributes:
        target: Name of the target.
        method: Name of the method.
        augmentation: Name of the augmentation.
        met: Whether the target is met; None if it was run on no data set.
        findings: By data set.
        text: The finding in a cell of a table.
    """

    target: str
    method: str
    augmentation: str
    met: bool | None
    findings: tuple[Finding, ...]
    text: str


@dataclass(frozen=True)
class Target:
    """Something that is asked of every two-phase method.

    Attributes:
        name: Its name.
        asks: What is asked, as a sentence's end.
        judge: From results, data set, augmentation and method to whether it is met
            (None if not run) and the numbers.
        applies: Whether it is asked of a method with these settings under this
            augmentation.
        half: Asked of at least half of the data sets, instead of every one.
    """

    name: str
    asks: str
    judge: Callable[[Results, str, str, str], tuple[bool | None, str]]
    applies: Callable[[Mapping[str, Any], str], bool] = lambda _settings, _name: True
    half: bool = False


def ends_in_solve(settings: Mapping[str, Any]) -> bool:
    """Whether a method with these settings exploits by the full-batch solver."""
    return any(
        str(value) == "solve" or str(value).endswith("_solve")
        for value in settings.values()
    )


def _no_worse(
    results: Results, dataset: str, augmentation: str, method: str
) -> tuple[bool | None, str]:
    found = results.difference(dataset, augmentation, method)
    if found is None:
        return None, ""
    allowed = found.standard_error or 0.0
    text = f"{points(found.value)} points, at most {100 * allowed:.2f} allowed"
    if found.standard_error is None:
        text += " (one seed)"
    return found.value <= allowed + _ROUNDING, text


def _better(
    results: Results, dataset: str, augmentation: str, method: str
) -> tuple[bool | None, str]:
    found = results.difference(dataset, augmentation, method)
    if found is None:
        return None, ""
    return found.value < -_ROUNDING, f"{points(found.value)} points"


def _lower_loss(
    results: Results, dataset: str, augmentation: str, method: str
) -> tuple[bool | None, str]:
    ours = results.of(dataset, augmentation, method)
    base = results.of(dataset, augmentation, results.reference)
    if not (ours and base):
        return None, ""
    loss, reference = (
        fmean(result.number("train_loss") for result in each) for each in (ours, base)
    )
    return loss < reference, f"{loss:.1e} against {reference:.1e}"


def _small_gap(
    results: Results, dataset: str, augmentation: str, method: str
) -> tuple[bool | None, str]:
    ours = results.of(dataset, augmentation, method)
    if not ours:
        return None, ""
    # A run with an L2 term minimises the regularised loss: that is what it ends at.
    regularised = all(each.metrics.get("l2_gap") is not None for each in ours)
    gap = max(each.number("l2_gap" if regularised else "gap") for each in ours)
    loss = "of the regularised loss, " if regularised else ""
    return gap <= GAP, f"{gap:.1e}, {loss}at most {GAP:.0e} allowed"


def _in_time(
    results: Results, dataset: str, augmentation: str, method: str
) -> tuple[bool | None, str]:
    found = results.time_ratio(dataset, augmentation, method)
    if found is None:
        return None, ""
    limit = TIME.get(augmentation, max(TIME.values()))
    text = f"{found.value:.2f} of the base's, at most {limit:g} allowed"
    return found.value <= limit, text


TARGETS = (
    Target(
        "test error no worse",
        "mean test error at most the base's plus one standard error of the paired "
        "difference",
        _no_worse,
    ),
    Target(
        "test error lower",
        "mean test error below the base's on at least half of the data sets",
        _better,
        half=True,
    ),
    Target(
        "training loss lower",
        "mean training loss below the base's on every data set without augmentation",
        _lower_loss,
        applies=lambda _, augmentation: augmentation == "none",
    ),
    Target(
        "certified gap",
        f"certified gap of at most {GAP:.0e} for every run that ends in `solve`",
        _small_gap,
        applies=lambda settings, _: ends_in_solve(settings),
    ),
    Target(
        "wall time",
        f"wall time of at most {TIME['none']:g} of the base's without augmentation, "
        f"and {TIME['standard']:g} with it",
        _in_time,
    ),
)


def judged(results: Results) -> list[str]:
    """The methods of the grid that are held against the targets."""
    return [method for method in results.params.grid.methods if method not in BASES]


def verdict(results: Results) -> list[Overall]:
    """Holds every method against every target, on each data set.

    Args:
        results: The results.

    Returns:
        By augmentation, method and target what was found.
    """
    return [
        _overall(results, target, method, augmentation)
        for augmentation in results.params.grid.augmentations
        for method in judged(results)
        for target in TARGETS
        if target.applies(results.params.methods[method], augmentation)
    ]


def sentences(results: Results) -> list[str]:
    """The verdict in words, as a list in Markdown.

    Args:
        results: The results.

    Returns:
        For each method how many targets it meets, and below that every one that it
        misses, with the numbers.
    """
    found = verdict(results)
    lines = []
    for method in judged(results):
        of_method = [each for each in found if each.method == method]
        lines += [f"- **{results.params.label(method)}**: {count(of_method)}."]
        lines += [f"  - {miss}." for miss in misses(results, of_method)]
    return lines


def count(found: Sequence[Overall]) -> str:
    """How many targets of a method are met, missed and not run."""
    known = [each for each in found if each.met is not None]
    if not known:
        return NOT_RUN
    good = sum(bool(each.met) for each in known)
    text = f"{good} of {len(known)} targets met"
    missing = len(found) - len(known)
    return text + (f", {missing} more {NOT_RUN}" if missing else "")


def misses(results: Results, found: Sequence[Overall]) -> list[str]:
    """Every target that is missed, where, and by how much."""
    return [
        f"Missed: {each.target}, "
        f"{AUGMENTATIONS.get(each.augmentation, each.augmentation)}, on "
        + "; ".join(
            f"{results.title(finding.dataset)}: {finding.numbers}"
            for finding in each.findings
            if finding.met is False
        )
        for each in found
        if each.met is False
    ]


def _overall(
    results: Results, target: Target, method: str, augmentation: str
) -> Overall:
    findings = tuple(
        Finding(
            target.name,
            method,
            dataset,
            augmentation,
            *target.judge(results, dataset, augmentation, method),
        )
        for dataset in results.params.grid.datasets
    )
    kept = [each.met for each in findings if each.met is not None]
    n, good = len(kept), sum(kept)
    if not kept:
        met, text = None, NOT_RUN
    elif target.half:
        met = 2 * good >= n
        text = f"{_word(met)}: lower on {good} of {n}"
    else:
        met = good == n
        text = f"met on {n} of {n}" if met else f"missed on {n - good} of {n}"
    if kept and n < len(findings):
        text += f", {len(findings) - n} {NOT_RUN}"
    return Overall(target.name, method, augmentation, met, findings, text)


def _word(met: bool | None) -> str:
    return NOT_RUN if met is None else "met" if met else "missed"
