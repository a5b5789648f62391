"""Numbers over seeds: their spread, and methods compared seed by seed.

Methods of one seed share initial weights, shuffles and often a whole exploration, so
differences are taken within a seed: what seeds have in common drops out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and spread over seeds.

    Attributes:
        n: Number of seeds.
        mean: The mean.
        std: The sample standard deviation, or None for one seed.
    """

    n: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class Estimate:
    """A comparison over seeds, and how well it is known.

    Attributes:
        n: Number of seeds.
        value: The mean difference, or the geometric mean of the ratios.
        standard_error: Of the difference, or of the logarithm of the ratio; None for
            one seed, as are the limits.
        low: Lower limit of the 95 % confidence interval by Student's t.
        high: Its upper limit.
    """

    n: int
    value: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation.

    Args:
        values: One number a seed, at least one.

    Returns:
        The spread.
    """
    return Spread(
        n=len(values),
        mean=fmean(values),
        std=stdev(values) if len(values) > 1 else None,
    )


def difference(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Mean of `values - reference`, paired by seed.

    Args:
        values: One number a seed, at least one.
        reference: What they are compared with, seeds in the same order.

    Returns:
        The mean difference, with its standard error and confidence interval.

    Raises:
        ValueError: If the two differ in length or are empty.
    """
    _check(values, reference)
    return _estimate([a - b for a, b in zip(values, reference, strict=True)])


def ratio(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Geometric mean of `values / reference`, paired by seed.

    The geometric mean, because the ratio of a method to the base and that of the base
    to the method are then inverse to each other.

    Args:
        values: One positive number a seed, at least one.
        reference: What they are compared with, seeds in the same order.

    Returns:
        The ratio, with a confidence interval; the standard error is that of its
        logarithm.

    Raises:
        ValueError: If the two differ in length or are empty, or not all are positive.
    """
    _check(values, reference)
    if min(*values, *reference) <= 0:
        raise ValueError(
            "Ratios need positive numbers. Received: "
            f"values={list(values)}, reference={list(reference)}"
        )
    logs = _estimate([math.log(a / b) for a, b in zip(values, reference, strict=True)])
    return Estimate(
        n=logs.n,
        value=math.exp(logs.value),
        standard_error=logs.standard_error,
        low=None if logs.low is None else math.exp(logs.low),
        high=None if logs.high is None else math.exp(logs.high),
    )


def expected(values: Sequence[float], n: int) -> tuple[float, float] | None:
    """Where the mean over other seeds is expected, with 95 % confidence.

    It is the prediction interval by Student's t, wider than the confidence interval of
    the mean: the other seeds have a spread as well.

    Args:
        values: One number a seed, at least one.
        n: Number of the other seeds.

    Returns:
        The lower and the upper limit, or None for one number, which has no spread.
    """
    found = spread(values)
    if found.std is None:
        return None
    quantile = float(t.ppf(0.5 + CONFIDENCE / 2, found.n - 1))
    half = quantile * found.std * math.sqrt(1 / found.n + 1 / n)
    return found.mean - half, found.mean + half


def points(value: float) -> str:
    """A difference of shares in points, with its sign; zero has none."""
    text = f"{100 * value:+.2f}"
    return "0.00" if text in {"+0.00", "-0.00"} else text


def interval(found: Estimate) -> str:
    """A difference of shares in points, with its confidence interval if it has one."""
    text = points(found.value)
    if found.low is not None and found.high is not None:
        text += f" [{points(found.low)}, {points(found.high)}]"
    return text


def error(found: Estimate) -> str:
    """The standard error of a difference of shares in points, in words."""
    if found.standard_error is None:
        return "one seed"
    return f"s.e. {100 * found.standard_error:.2f}"


def _estimate(differences: Sequence[float]) -> Estimate:
    found = spread(differences)
    if found.std is None:
        return Estimate(found.n, found.mean)
    error = found.std / math.sqrt(found.n)
    half = float(t.ppf(0.5 + CONFIDENCE / 2, found.n - 1)) * error
    return Estimate(found.n, found.mean, error, found.mean - half, found.mean + half)


def _check(values: Sequence[float], reference: Sequence[float]) -> None:
    if not values or len(values) != len(reference):
        raise ValueError(
            "A paired comparison needs one number of each method for each seed. "
            f"Received: {len(values)} and {len(reference)} numbers"
        )
