"""The targets of the default and of *better*, and whether they are met."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.reporting import answer
from pipelines.reporting.comparison import points
from pipelines.reporting.results import DEFAULT, NOT_RUN, Results
from pipelines.reporting.table import Table

if TYPE_CHECKING:
    from pipelines.reporting.answer import Answer
    from pipelines.reporting.comparison import Estimate

GAP = 1e-6
TIME = {"none": 0.75, "standard": 0.85}
_MOST = "in three quarters of the cells"


@dataclass(frozen=True)
class Target:
    """A target for a mode, in every cell or in a share of them.

    Attributes:
        name: Its name.
        value: What an answer found; None if it is not known.
        limit: What it may be at most.
        form: How the value is written.
        share: The share of the cells in which it has to be met.
        modes: The modes that it is for.
    """

    name: str
    value: Callable[[Answer], float | None]
    limit: Callable[[Answer], float]
    form: Callable[[float], str]
    share: float = 1.0
    modes: tuple[str, ...] = tuple(answer.MODES)


@dataclass(frozen=True)
class Finding:
    """A mode held against a target.

    Attributes:
        target: The target.
        mode: Name of the method.
        met: Whether it is met over the cells that are known; None without any.
        text: In how many cells it is met.
        exceptions: The cells in which it is not, with the numbers.
    """

    target: Target
    mode: str
    met: bool | None
    text: str
    exceptions: str


def limit_of_time(augmentation: str) -> float:
    """The most time that the default may take, over that of the base."""
    return TIME.get(augmentation, max(TIME.values()))


def _value(found: Estimate | None) -> float | None:
    return None if found is None else found.value


TARGETS = (
    Target(
        "test error at most the margin above that of the best base of equal time, in "
        "every cell",
        lambda each: _value(each.error),
        lambda each: each.margin + answer.ROUNDING,
        lambda value: f"{points(value)} points",
    ),
    Target(
        f"test error below that of the best base of equal time, {_MOST}",
        lambda each: _value(each.error),
        lambda _: -answer.ROUNDING,
        lambda value: f"{points(value)} points",
        share=0.75,
    ),
    Target(
        f"NLL below that of every such base and the temperature-scaled one, {_MOST}",
        lambda each: _value(each.nll),
        lambda _: -answer.ROUNDING,
        "{:+.2g}".format,
        share=0.75,
    ),
    Target(
        f"certified gap of at most {GAP:.0e}, in every cell",
        lambda each: each.gap,
        lambda _: GAP,
        "{:.1e}".format,
    ),
    Target(
        f"at most {TIME['none']:g} of the base's time without augmentation, and "
        f"{TIME['standard']:g} with it, in every cell",
        lambda each: _value(each.time),
        lambda each: limit_of_time(each.cell[1]),
        "{:.3f}".format,
        modes=(DEFAULT,),
    ),
)


def verdict(results: Results) -> list[Finding]:
    """Holds the modes of the grid against the targets.

    Args:
        results: The results.

    Returns:
        By mode and target what was found.
    """
    return [
        _finding(results, target, mode, found)
        for mode in answer.modes(results)
        for found in [answer.answers(results, mode)]
        for target in TARGETS
        if mode in target.modes
    ]


def _finding(
    results: Results, target: Target, mode: str, found: list[Answer]
) -> Finding:
    values = [(each, target.value(each)) for each in found]
    known = [(each, value) for each, value in values if value is not None]
    missed = [(each, value) for each, value in known if value > target.limit(each)]
    n, good = len(known), len(known) - len(missed)
    met = good >= math.ceil(target.share * n) if known else None
    text = f"{'met' if met else 'missed'}: in {good} of {n} cells" if n else NOT_RUN
    if n and n < len(found):
        text += f", {len(found) - n} {NOT_RUN}"
    exceptions = "; ".join(
        f"{results.heading(*each.cell)}: {target.form(value)}" for each, value in missed
    )
    return Finding(target, mode, met, text, exceptions)


def table(results: Results) -> Table:
    """The targets, whether they are met, and where they are not."""
    label = results.params.label
    return Table(
        "Targets",
        ("method", "target", "verdict", "not in these cells"),
        tuple(
            (label(each.mode), each.target.name, each.text, each.exceptions)
            for each in verdict(results)
        ),
    )
