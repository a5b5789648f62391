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

GAP = 1e-6
TIME = {"none": 0.75, "standard": 0.85}
MOST = 0.75


@dataclass(frozen=True)
class Target:
    """Something that is asked of a mode in every cell, or in a share of them.

    Attributes:
        name: What is asked.
        judge: From an answer to whether the target is met in its cell (None if that is
            not known) and the numbers.
        share: The share of the cells in which it has to be met.
        modes: The modes that it is asked of.
    """

    name: str
    judge: Callable[[Answer], tuple[bool | None, str]]
    share: float = 1.0
    modes: tuple[str, ...] = tuple(answer.MODES)


@dataclass(frozen=True)
class Finding:
    """A mode held against a target.

    Attributes:
        target: The target.
        mode: Name of the method.
        cells: By heading of a cell, whether the target is met there, and the numbers.
    """

    target: Target
    mode: str
    cells: dict[str, tuple[bool | None, str]]

    @property
    def met(self) -> bool | None:
        """Whether the target is met over the cells that are known; None without any."""
        known, good = self._counts
        return good >= math.ceil(self.target.share * known) if known else None

    @property
    def text(self) -> str:
        """The finding in a cell of a table."""
        known, good = self._counts
        if not known:
            return NOT_RUN
        missing = len(self.cells) - known
        text = f"{'met' if self.met else 'missed'}: in {good} of {known} cells"
        return text + (f", {missing} {NOT_RUN}" if missing else "")

    @property
    def exceptions(self) -> str:
        """The cells in which it is not met, with the numbers."""
        return "; ".join(
            f"{heading}: {numbers}"
            for heading, (met, numbers) in self.cells.items()
            if met is False
        )

    @property
    def _counts(self) -> tuple[int, int]:
        """Number of cells that are known, and of those in which the target is met."""
        known = [met for met, _ in self.cells.values() if met is not None]
        return len(known), sum(known)


def _no_worse(found: Answer) -> tuple[bool | None, str]:
    if found.error is None:
        return None, ""
    return found.word != answer.WORSE, f"{points(found.error.value)} points"


def _lower(found: Answer) -> tuple[bool | None, str]:
    if found.error is None:
        return None, ""
    return found.lower, f"{points(found.error.value)} points"


def _lower_nll(found: Answer) -> tuple[bool | None, str]:
    if found.nll is None:
        return None, ""
    return found.lower_nll, f"{found.nll.value:+.2g}"


def _small_gap(found: Answer) -> tuple[bool | None, str]:
    if found.gap is None:
        return None, ""
    return found.gap <= GAP, f"{found.gap:.1e}"


def _fast(found: Answer) -> tuple[bool | None, str]:
    if found.time is None:
        return None, ""
    limit = TIME.get(found.augmentation, max(TIME.values()))
    return found.time.value <= limit, f"{found.time.value:.2f}"


_THREE_QUARTERS = "in three quarters of the cells"
TARGETS = (
    Target(
        "test error above that of the best base of equal time by no more than the "
        "margin, in every cell",
        _no_worse,
    ),
    Target(f"test error below it, {_THREE_QUARTERS}", _lower, share=MOST),
    Target(
        "NLL below that of the best base, the temperature-scaled one included, "
        f"{_THREE_QUARTERS}",
        _lower_nll,
        share=MOST,
    ),
    Target(f"certified gap of at most {GAP:.0e}, in every cell", _small_gap),
    Target(
        f"at most {TIME['none']:g} of the base's time without augmentation, and "
        f"{TIME['standard']:g} with it, in every cell",
        _fast,
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
        Finding(
            target,
            mode,
            {
                results.heading(each.dataset, each.augmentation): target.judge(each)
                for each in found
            },
        )
        for mode in answer.modes(results)
        for found in [answer.answers(results, mode)]
        for target in TARGETS
        if mode in target.modes
    ]


def table(results: Results) -> Table:
    """The targets, whether they are met, and where they are not."""
    return Table(
        "Targets",
        ("method", "target", "verdict", "not in these cells"),
        tuple(
            (
                results.params.label(each.mode),
                each.target.name,
                each.text,
                each.exceptions,
            )
            for each in verdict(results)
        ),
    )
