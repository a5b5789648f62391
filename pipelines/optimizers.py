"""Optimizers, as recipes describe them."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from pipelines.params import Recipe, pick


@keras.saving.register_keras_serializable(package="pipelines")
class Cosine(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that falls to zero along half a cosine.

    Args:
        rate: The first learning rate.
        steps: Steps until zero.
        start: The step to begin at.
    """

    def __init__(self, rate: float, steps: int, start: int = 0) -> None:
        super().__init__()
        self.rate, self.steps, self.start = rate, steps, start

    def __call__(self, step: Any) -> Any:
        """The learning rate at a step."""
        share = (ops.cast(step, "float32") + self.start) / self.steps
        angle = math.pi * ops.clip(share, 0.0, 1.0)
        return 0.5 * self.rate * (1.0 + ops.cos(angle))

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {"rate": self.rate, "steps": self.steps, "start": self.start}


def optimizer(
    recipe: Recipe, steps: int, epochs: int, *, start: int = 0
) -> keras.optimizers.Optimizer:
    """The optimizer of a recipe.

    Args:
        recipe: The recipe.
        steps: Steps of an epoch.
        epochs: Epochs of the whole training.
        start: The number of epochs that another optimizer has trained before.

    Returns:
        An optimizer that was not used yet.
    """
    rate: Any = recipe.learning_rate
    schedules = {
        "constant": rate,
        "cosine": Cosine(rate, steps * epochs, steps * start),
    }
    rate = pick("schedule", schedules, recipe.schedule)
    optimizers = {
        "adam": lambda: keras.optimizers.Adam(rate),
        "sgd": lambda: keras.optimizers.SGD(
            rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
        ),
    }
    return pick("optimizer", optimizers, recipe.optimizer)()
