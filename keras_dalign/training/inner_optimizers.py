"""The optimizers inside of DAlign: copies, loss scaling and continued schedules."""

from __future__ import annotations

from typing import Any

import keras

from keras_dalign.numerics.arguments import rebuilding


@keras.saving.register_keras_serializable(package="keras_dalign")
class ContinuedSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning-rate schedule that starts at a later step of another schedule.

    Args:
        schedule: The schedule to continue.
        start: Int, the step of `schedule` that is this one's step 0.
    """

    def __init__(
        self,
        schedule: keras.optimizers.schedules.LearningRateSchedule,
        start: int = 0,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.start = start

    def __call__(self, step: Any) -> Any:
        """The learning rate at `step` steps after `start`."""
        return self.schedule(step + self.start)

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild this schedule."""
        return {
            "schedule": keras.optimizers.schedules.serialize(self.schedule),
            "start": self.start,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ContinuedSchedule:
        """Rebuilds a schedule from `get_config`."""
        with rebuilding(cls.__name__):
            schedule = keras.optimizers.schedules.deserialize(config["schedule"])
            return cls(schedule, config["start"])


def fresh_copy(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """An unbuilt copy of an optimizer, whose schedule can go on from a later step.

    Args:
        optimizer: The optimizer.

    Returns:
        The copy. Its learning-rate schedule, if any, is a `ContinuedSchedule`.
    """
    config = keras.saving.serialize_keras_object(optimizer)
    copy = keras.saving.deserialize_keras_object(config)
    innermost = unwrapped(copy)
    schedule = innermost._learning_rate
    if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        innermost.learning_rate = ContinuedSchedule(schedule)
    return copy


def loss_scaled(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer with loss scaling for float16.

    Args:
        optimizer: The optimizer.

    Returns:
        The optimizer itself if it scales losses already, else a wrapper around it.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer, name=optimizer.name)


def unwrapped(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer inside of wrappers for loss scaling.

    Args:
        optimizer: The optimizer.

    Returns:
        The innermost one.
    """
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer
