"""Checks of the arguments of DAlign."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_dalign.numerics.arguments import shown
from keras_dalign.solving.options import SolveOptions


def checked_explore(explore: Any) -> float:
    """Checks the part of the epochs that is explored.

    Args:
        explore: See `DAlign`.

    Returns:
        An int for a number of epochs, a float for a fraction.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(explore, (int, np.integer)) and not isinstance(explore, bool):
        if explore >= 0:
            return int(explore)
    elif isinstance(explore, (float, np.floating)) and 0.0 < explore <= 1.0:
        return float(explore)
    raise ValueError(
        "`explore` must be a fraction of the epochs (a float above 0, at most 1.0) or "
        f"a number of epochs (a non-negative int). Received: explore={shown(explore)}"
    )


def checked_optimizer(name: str, optimizer: Any) -> keras.optimizers.Optimizer:
    """Checks one of the optimizers inside of DAlign.

    Args:
        name: Name of the argument.
        optimizer: Its value: an optimizer or the name of one.

    Returns:
        The optimizer.

    Raises:
        ValueError: If it is none, or was built already.
    """
    if isinstance(optimizer, str):
        try:
            optimizer = keras.optimizers.get(optimizer)
        except ValueError as error:
            raise ValueError(
                f"`{name}` must be a Keras optimizer or the name of one. Received: "
                f"{name}='{optimizer}'"
            ) from error
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            f"`{name}` must be a Keras optimizer or the name of one. Received: "
            f"{name}={shown(optimizer)} (of type {type(optimizer).__name__})"
        )
    if optimizer.built:
        raise ValueError(
            f"`{name}` was built for other variables already. Received: an optimizer "
            f"with {len(optimizer.variables)} variables. Pass a fresh one."
        )
    return optimizer


def check_exploitation(
    exploit_by: Any,
    *,
    solves: bool,
    explore: float,
    cache_features: bool | str,
    solve_options: Any,
) -> None:
    """Refuses combinations of arguments that the way to exploit does not allow.

    Args:
        exploit_by: `exploit_optimizer`, see `DAlign`.
        solves: Whether this is the solver.
        explore: See `DAlign`.
        cache_features: See `DAlign`.
        solve_options: See `DAlign`.

    Raises:
        ValueError: If there is one.
    """
    received = f"exploit_optimizer={exploit_by!r}"
    if not solves:
        if solve_options is not None:
            raise ValueError(
                "`solve_options` belong to the solver, which exploits if features "
                "are kept. Received: solve_options="
                f"{solve_options} with {received} and "
                f"cache_features={cache_features}"
            )
        if isinstance(explore, float) and explore == 1.0:
            raise ValueError(
                "explore=1.0 leaves no epochs to a Keras optimizer in "
                f"exploitation. Received: {received} with "
                f"cache_features={cache_features}. Leave both out for the "
                "solver, which needs none, or explore a smaller part."
            )
        return
    if cache_features is False:
        raise ValueError(
            "The solver goes over the features many times, so they must be kept. "
            f"Received: cache_features=False with {received}."
        )
    if not isinstance(solve_options, (dict, type(None))):
        raise ValueError(
            "`solve_options` must be a dict. Received: "
            f"solve_options={shown(solve_options)}"
        )
    SolveOptions.from_dict(solve_options or {})
