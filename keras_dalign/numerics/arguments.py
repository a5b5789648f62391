"""Checks of arguments that many functions share, and how errors show a value.

An error names the argument, shows the value received and says what to do. The value is
shown in short: data by type and shape, never by its numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

# Characters of a value that an error shows.
_MOST_SHOWN = 80


def shown(value: Any) -> str:
    """A value in short, for an error.

    Args:
        value: Anything.

    Returns:
        Type and shape of an array, type and name of a layer, type and length of a long
        container, and for anything else its `repr`, cut to 80 characters.
    """
    kind = type(value).__name__
    if isinstance(value, keras.Layer):
        return f"{kind} '{value.name}'"
    shape = getattr(value, "shape", None)
    if shape is not None and not isinstance(value, (np.generic, type)):
        return f"{kind} of shape {tuple(shape)}"
    if isinstance(value, (list, tuple, dict, set)) and len(value) > 8:
        return f"{kind} of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


@contextmanager
def rebuilding(what: str, *more: type[Exception]) -> Iterator[None]:
    """Says so where a saved configuration, or what was saved with it, is damaged.

    Args:
        what: Name of what is rebuilt within the block.
        *more: Other errors that damage leads to there.

    Yields:
        Nothing.

    Raises:
        ValueError: If an entry is missing or has a wrong type. Of unknown classes and
            arguments Keras tells by a `TypeError`, which stays.
    """
    damage: tuple[type[Exception], ...] = (
        KeyError,
        AttributeError,
        IndexError,
        ArithmeticError,
        *more,
    )
    try:
        yield
    except damage as error:
        raise ValueError(
            f"{what} cannot be rebuilt from this file, which is damaged or of a later "
            f"version. Received: {type(error).__name__}: {error}"
        ) from error


def keras_model(model: Any, name: str = "model") -> keras.Model:
    """Checks a model.

    Args:
        model: The value of the argument.
        name: Name of the argument.

    Returns:
        The model.

    Raises:
        ValueError: If it is not a `keras.Model`.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`{name}` must be a keras.Model. Received: {name}={shown(model)} (of type "
            f"{type(model).__name__})"
        )
    return model


def integer(name: str, value: Any, least: int = 1, advice: str = "") -> int:
    """Checks an int.

    Args:
        name: Name of the argument.
        value: Its value.
        least: The smallest value allowed.
        advice: A sentence for the error on what to pass.

    Returns:
        The value, as a Python int.

    Raises:
        ValueError: If it is not an int (a bool does not count as one), or too small.
    """
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int or value < least:
        kinds = {0: "a non-negative int", 1: "a positive int"}
        wanted = kinds.get(least, f"an int of at least {least}")
        raise ValueError(
            f"`{name}` must be {wanted}. Received: {name}={shown(value)}"
            f"{advice and f'. {advice}'}"
        )
    return int(value)


def is_number(value: Any) -> bool:
    """Whether a value is a Python or NumPy number, and not a bool."""
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    return is_number and not isinstance(value, (bool, np.bool_))


def number(name: str, value: Any, wanted: str, holds: Callable[[float], bool]) -> float:
    """Checks a finite number.

    Args:
        name: Name of the argument.
        value: Its value.
        wanted: The requirement in words, for the error: "a positive number".
        holds: Whether a finite number meets the requirement.

    Returns:
        The value, as a Python float.

    Raises:
        ValueError: If it is not a finite number, or does not meet the requirement.
    """
    if not (is_number(value) and math.isfinite(value) and holds(value)):
        raise ValueError(f"`{name}` must be {wanted}. Received: {name}={shown(value)}")
    return float(value)


def choice(
    name: str, value: Any, choices: Sequence[str], wanted: str | None = None
) -> str:
    """Checks that a value is one of several words.

    Args:
        name: Name of the argument.
        value: Its value.
        choices: The words.
        wanted: The requirement in words, for the error; a list of the words by default.

    Returns:
        The value.

    Raises:
        ValueError: If it is not one of the words.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{name}` must be {wanted or f'one of {tuple(choices)}'}. Received: "
            f"{name}={shown(value)}"
        )
    return value


def flag(name: str, value: Any) -> bool:
    """Checks a bool.

    Args:
        name: Name of the argument.
        value: Its value.

    Returns:
        The value.

    Raises:
        ValueError: If it is not a bool.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(
            f"`{name}` must be True or False. Received: {name}={shown(value)}"
        )
    return bool(value)


def seed_or_peeked(seed: Any) -> int:
    """Checks a seed, or takes one from Python's global generator.

    Args:
        seed: A non-negative int, or None.

    Returns:
        The seed. The global generator is left as it was.

    Raises:
        ValueError: If the seed is not a non-negative int.
    """
    if seed is not None:
        return integer("seed", seed, 0)
    # Keras shuffles some data with Python's global generator. A change of its state
    # would make exploration differ from the base model's own run.
    state = random.getstate()
    peeked = random.randint(0, 2**31 - 1)  # noqa: S311  (no secret)
    random.setstate(state)
    return peeked
