"""The optimizer that DAlign holds where the solver exploits."""

from __future__ import annotations

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="keras_dalign")
class NoSteps(keras.optimizers.Optimizer):
    """The optimizer of exploitation by the solver: it takes no steps.

    It has a learning rate, which callbacks can read in exploitation.

    Args:
        learning_rate: Float, of no effect.
        name: Name of the optimizer.
        **kwargs: What else Keras's optimizers take, of no effect.
    """

    def __init__(
        self, learning_rate: float = 0.0, name: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)

    def update_step(self, *_: Any) -> None:
        """Refuses the step.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "With exploit_optimizer='solve' there are no training steps in "
            "exploitation. Received: a step of one batch. Call `fit`, or "
            "`keras_dalign.solve`."
        )
