"""Claims of a study: numbers with a range that was fixed before they were measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

SEEN, NOT_SEEN, UNDECIDED = "seen", "not seen", "undecided"

# Of the intervals for the means.
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Claim:
    """A statement about a number, and the number's values.

    Attributes:
        name: A key for the metrics, such as `"slope_mup"`.
        statement: One plain sentence that says what is expected of which number.
        values: The number, one for each seed.
        low: The least value that the statement allows; None if there is none.
        high: The largest one.
    """

    name: str
    statement: str
    values: Sequence[float]
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: If there are none, or one is not finite.
        """
        if not len(self.values) or not np.isfinite(self.values).all():
            raise ValueError(
                "A claim needs finite values, one for each seed. Received: "
                f"{list(self.values)} for the claim {self.name!r}"
            )

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Student's t for the mean; of one seed, the value."""
        mean, n = float(np.mean(self.values)), len(self.values)
        if n == 1:
            return mean, mean
        half = float(np.std(self.values, ddof=1)) / math.sqrt(n)
        half *= float(stats.t.ppf(0.5 + _CONFIDENCE / 2, n - 1))
        return mean - half, mean + half

    def verdict(self) -> str:
        """Whether the claim was seen.

        Returns:
            `"seen"` if the interval lies within the range, `"not seen"` if it lies
            outside, `"undecided"` if it does neither.
        """
        (least, largest), low, high = self.interval(), self.low, self.high
        low = -math.inf if low is None else low
        high = math.inf if high is None else high
        if low <= least and largest <= high:
            return SEEN
        return NOT_SEEN if largest < low or high < least else UNDECIDED

    def metrics(self) -> dict[str, Any]:
        """The same as plain values, for DVC's metrics."""
        least, largest = self.interval()
        return {
            "statement": self.statement,
            "mean": float(np.mean(self.values)),
            "interval": [least, largest],
            "seeds": len(self.values),
            "verdict": self.verdict(),
        }


def table(claims: Iterable[dict[str, Any]]) -> str:
    """A table in Markdown.

    Args:
        claims: The claims' `metrics`.

    Returns:
        A line for each claim: what is expected, what was measured, and the verdict.
    """
    lines = ["| claim | measured | seeds | |", "|---|---|---|---|"]
    for each in claims:
        least, largest = each["interval"]
        measured = _number(each["mean"])
        if each["seeds"] > 1:
            measured += f" ({_number(least)} to {_number(largest)})"
        verdict = each["verdict"]
        shown = verdict if verdict == SEEN else f"**{verdict}**"
        lines.append(
            f"| {each['statement']} | {measured} | {each['seeds']} | {shown} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:.3g}"
