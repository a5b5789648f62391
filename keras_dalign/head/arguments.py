"""Checks of arguments that several layers take."""

from __future__ import annotations

import random
from typing import Any

import numpy as np


def positive_int(name: str, value: Any) -> int:
    """Checks an argument that counts something.

    Args:
        name: Its name, for the error.
        value: Its value.

    Returns:
        The value.

    Raises:
        ValueError: If it is no positive int.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"`{name}` must be a positive int. Received: {name}={value}")
    if value <= 0:
        raise ValueError(f"`{name}` must be a positive int. Received: {name}={value}")
    return int(value)


def is_finite(value: Any) -> bool:
    """Whether something is a finite number."""
    is_number = isinstance(value, (int, float, np.number))
    return is_number and not isinstance(value, bool) and bool(np.isfinite(value))


def seed_or_peeked(seed: Any) -> int:
    """The seed that was given, or one that follows Python's global generator.

    Args:
        seed: A non-negative int, or None.

    Returns:
        The seed. The global generator is left as it was.

    Raises:
        ValueError: If the seed is no non-negative int.
    """
    if seed is None:
        # Keras shuffles some data with Python's global generator: moving it would make
        # the exploration differ from the base model's own run.
        state = random.getstate()
        peeked = random.randint(0, 2**31 - 1)  # noqa: S311  (no secret)
        random.setstate(state)
        return peeked
    is_int = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    if not is_int or seed < 0:
        raise ValueError(f"`seed` must be a non-negative int. Received: seed={seed}")
    return int(seed)
