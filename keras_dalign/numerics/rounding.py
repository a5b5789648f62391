"""Machine precision of float64, and printed bounds rounded to the safe side."""

from __future__ import annotations

import decimal

import numpy as np

# Distance from 1 to the next larger float64.
EPS = float(np.finfo(np.float64).eps)


def rounded(value: float, *, up: bool) -> str:
    """A bound with three digits, rounded to the safe side.

    Args:
        value: A bound.
        up: Whether it is an upper bound.

    Returns:
        The number as text: not below an upper bound, not above a lower one.
    """
    rounding = decimal.ROUND_CEILING if up else decimal.ROUND_FLOOR
    context = decimal.Context(prec=3, rounding=rounding)
    return f"{float(context.create_decimal(value)):.3g}"
