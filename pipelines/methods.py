"""Methods: what is made of a base model, compiled and ready to be fitted.

A kind of method is a function in `KINDS`; params.yaml names methods and gives each a
kind and its settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras

import keras_dalign as kd
from pipelines.params import TrainParams, pick


def plain(base: keras.Model, train: TrainParams, **_: Any) -> keras.Model:
    """The base model with the base optimizer."""
    base.compile(optimizer=_optimizer(train), **_objective())
    return base


def two_phase(
    base: keras.Model,
    train: TrainParams,
    *,
    n_samples: int,
    seed: int,
    gates: str,
    explore: float,
) -> keras.Model:
    """The base model with an alignment head: explore, switch, exploit.

    Args:
        base: The base model; its weights are shared.
        train: Base training.
        n_samples: Number of training samples.
        seed: Seed of the gates.
        gates: `"random"` or `"learned"`.
        explore: Fraction or number of epochs that are spent in exploration.

    Returns:
        The compiled model.
    """
    model = kd.align(base, n_samples=n_samples, gates=gates, seed=seed)
    optimizer = kd.DAlign(_optimizer(train), explore=explore)
    model.compile(optimizer=optimizer, **_objective())
    return model


KINDS: dict[str, Callable[..., keras.Model]] = {"plain": plain, "two_phase": two_phase}


def compiled(
    base: keras.Model,
    settings: Mapping[str, Any],
    train: TrainParams,
    *,
    n_samples: int,
    seed: int,
) -> keras.Model:
    """Applies a method to a base model.

    Args:
        base: The base model.
        settings: `kind` of the method, and what else it takes.
        train: Base training.
        n_samples: Number of training samples.
        seed: Seed of what the method draws.

    Returns:
        The compiled model.
    """
    kind = pick("kind of method", KINDS, str(settings.get("kind")))
    rest = {key: value for key, value in settings.items() if key != "kind"}
    return kind(base, train, n_samples=n_samples, seed=seed, **rest)


def _optimizer(train: TrainParams) -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(train.learning_rate)


def _objective() -> dict[str, Any]:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return {"loss": loss, "metrics": ["accuracy"]}
