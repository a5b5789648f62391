"""The rounding of float64, and bounds that stay bounds when they are printed."""

from __future__ import annotations

import decimal

import numpy as np

# Distance from 1 to the next number.
EPS = float(np.finfo(np.float64).eps)


def rounded(value: float, *, up: bool) -> str:
    """Three digits, rounded to the safe side.

    Args:
        value: A bound.
        up: Whether it is an upper one.

    Returns:
        The number in words: never below an upper bound, never above a lower one.
    """
    rounding = decimal.ROUND_CEILING if up else decimal.ROUND_FLOOR
    context = decimal.Context(prec=3, rounding=rounding)
    return f"{float(context.create_decimal(value)):.3g}"
