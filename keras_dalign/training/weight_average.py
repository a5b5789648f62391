"""A running average of the weights that exploration trains.

Training that stops at a high learning rate leaves noisy weights; their average over the
last steps has less noise. The compiled training step also updates the average, which
has no effect on the training. The window is a share of the steps so far, so exploration
may end after any step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops


class WeightAverage:
    """The polynomial-decay average of some variables (Shamir & Zhang, ICML 2013).

    After step `t` the average moves to the weights by `(g + 1) / (t + g)` of their
    difference, with `g = 1 / share - 1`: the weights of the last `share * t` steps
    count most, and those before fade as a power of `t`.

    Args:
        variables: The variables to average.
        share: Float in (0, 1], the window as a share of the steps so far.
        add_variable: Makes a variable of the shape of another one, given that one and a
            name, as `keras.optimizers.Optimizer.add_variable_from_reference`.
        steps: A scalar variable, the number of steps averaged so far.
    """

    def __init__(
        self,
        variables: list[keras.Variable],
        share: float,
        add_variable: Callable[..., keras.Variable],
        steps: keras.Variable,
    ) -> None:
        self.averaged = list(variables)
        self.share = share
        self.steps = steps
        self.averages = [add_variable(v, name="average") for v in variables]

    @property
    def variables(self) -> list[keras.Variable]:
        """The state: the number of steps, and the averages."""
        return [self.steps, *self.averages]

    def update(self, values: list[Any] | None = None) -> None:
        """Adds the weights after a step to the average.

        Args:
            values: Values of the weights. Default: the current ones.
        """
        self.steps.assign_add(1)
        fade = 1.0 / self.share - 1.0
        rate = (fade + 1.0) / (ops.cast(self.steps.value, "float32") + fade)
        values = [v.value for v in self.averaged] if values is None else values
        for average, value in zip(self.averages, values, strict=True):
            change = ops.cast(rate, average.dtype) * (value - average.value)
            average.assign(average.value + change)

    def apply(self) -> bool:
        """Sets the variables to their average; False if no step was averaged yet."""
        if not int(ops.convert_to_numpy(self.steps)):
            return False
        for variable, average in zip(self.averaged, self.averages, strict=True):
            variable.assign(ops.convert_to_numpy(average))
        return True
