"""The default number of gated units: enough to separate all training samples."""

from __future__ import annotations

import math

import scipy.special

# A gate below 1e-3 counts as closed: `s(t) = 1e-3` at `t = -log(999)`.
_LOGIT_OF_CLOSED = math.log(999.0)


def closed_share(slope: float) -> float:
    """The probability that a random gate is closed for a sample.

    A gate `s(slope * r . v)` with `r ~ N(0, I / d)` and `||v||^2 = d` has
    `r . v ~ N(0, 1)`. It counts as closed below 1e-3, so with probability
    `Phi(-log(999) / slope)`: 0.365 for a slope of 20.

    Args:
        slope: Slope of the gates' sigmoid, positive.

    Returns:
        The probability, in (0, 1/2).
    """
    return math.exp(_log_closed_share(slope))


def least_gates(n_samples: int, slope: float) -> int:
    """The number of random gates so that, very likely, every sample has an open one.

    With `m` gates, all gates of a sample are closed with probability
    `closed_share(slope)^m`. The number returned makes the expected number of such
    samples among `n_samples` at most 0.01.

    Args:
        n_samples: Number of training samples, at least 1.
        slope: Slope of the gates' sigmoid, positive.

    Returns:
        `ceil(log(100 n_samples) / -log(closed_share(slope)))`: 12 for 1,000 samples
        and a slope of 20.
    """
    needed = math.log(100 * n_samples) / -_log_closed_share(slope)
    return max(1, math.ceil(needed))


def _log_closed_share(slope: float) -> float:
    return float(scipy.special.log_ndtr(-_LOGIT_OF_CLOSED / slope))


def default_width(n_samples: int, rank: int, slope: float) -> int:
    """The number of gated units that separates `n_samples`, with a margin.

    It is the larger of two numbers:

    - `ceil(2 * n_samples / rank)`, twice the least width with `m * rank >= n`. The
      factor 2 makes up for features that become constant or dependent while the trunk
      trains, and it keeps the Gram matrix well conditioned.
    - `least_gates(n_samples, slope)`, which is larger where there are about as many
      features as samples: a sample for which every gate is closed cannot be fitted.

    Args:
        n_samples: Number of training samples.
        rank: Rank of their normalised features, constant column included.
        slope: Slope of the gates' sigmoid, positive.

    Returns:
        The width `m`, at least 1.

    Raises:
        ValueError: If a number is out of its range.
    """
    if n_samples < 1:
        raise ValueError(
            f"`n_samples` must be at least 1. Received: n_samples={n_samples}"
        )
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1. Received: rank={rank}")
    if not (math.isfinite(slope) and slope > 0):
        raise ValueError(
            f"`slope` must be positive and finite. Received: slope={slope}"
        )
    # In integers: a float quotient can round a whole number upwards.
    by_rank = -(-2 * int(n_samples) // int(rank))
    return max(by_rank, least_gates(n_samples, slope))
