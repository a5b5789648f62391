"""The optimizer that explores with one optimizer and exploits with another.

A Keras optimizer is one class, so this file is long: it passes every method on to the
optimizer of the current phase.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dalign import compat
from keras_dalign.head.alignment_head import EXPLOITING, EXPLORING
from keras_dalign.head.features import DISK
from keras_dalign.numerics.arguments import choice, number, rebuilding, shown
from keras_dalign.training.dalign_arguments import (
    check_exploitation,
    checked_explore,
    checked_optimizer,
)
from keras_dalign.training.inner_optimizers import (
    ContinuedSchedule,
    fresh_copy,
    loss_scaled,
    unwrapped,
)
from keras_dalign.training.no_steps import NoSteps
from keras_dalign.training.weight_average import WeightAverage

# Values of `exploit_optimizer`: the solver, and the solver wherever the features can be
# kept.
SOLVE = "solve"
AUTO = "auto"

_ON_THE_INNER_OPTIMIZER = (
    "learning_rate",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


@keras.saving.register_keras_serializable(package="keras_dalign")
class DAlign(keras.optimizers.Optimizer):
    """Turns any Keras optimizer into two-phase training to a global minimum.

    Compile an `AlignedModel` with it, and one `fit` runs both phases. The first epochs
    train the whole model with `inner_optimizer` (exploration). Then the convex problem
    of the head is minimised to a certified gap (exploitation), by default full batch
    and with an L2 term that the data choose. Each phase has its optimizer, with its own
    state, learning rate, schedule, weight decay, clipping, EMA and loss scaling.

    There are two ways to use it. *Faster*, the default: a part of the epochs explores.
    *Better*, `explore=1.0`: all epochs explore, and the solver runs afterwards.

    Args:
        inner_optimizer: The `keras.optimizers.Optimizer` (or its name) that
            trains the base model.
        exploit_optimizer: What trains the head in the second phase. `"solve"`
            minimises the convex problem full batch, as `keras_dalign.solve` does. Each
            iteration is an epoch for callbacks and `History`, whose logs also hold
            `objective`, the value that is minimised, and its `gap`. It ends at the gap
            `tol` or after `max_iterations`, whatever `epochs` is. It keeps the features
            of streams, too. `"auto"` (the default) is `"solve"` where the features can
            be kept, else None, with a warning. None trains the remaining epochs with a
            new copy of `inner_optimizer`; its learning-rate schedule, if any, continues
            from the last step of exploration. A Keras optimizer (or its name) trains
            the remaining epochs, too; its schedule starts at step 0.
        explore: Float in (0, 1], fraction of the epochs spent in exploration; or a
            non-negative int, their number (0: exploit from the first epoch; 1: one
            epoch). 1.0 leaves no epoch to a Keras optimizer, so it needs the solver.
        noise: Non-negative float, standard deviation of the Gaussian noise added
            to learned gates at the switch, in units of the weights' root mean
            square. It has no effect on random gates.
        cache_features: `"auto"`, `True`, `"disk"` or `False`. Whether exploitation
            computes the trunk's features once and keeps them. `"auto"` does so for
            arrays, `True` also for streams (one pass is stored, so random augmentation
            stops). They are kept in memory if they fit, else in a temporary file, which
            is deleted after the run. `"disk"` always uses the file. `False` never keeps
            features. The file is in the folder that the environment variable `TMPDIR`
            names; a folder in memory (tmpfs) saves no memory.
        name: Name of the optimizer.
        solve_options: Dict with any of `tol`, `method`, `l2` and `max_iterations`, as
            in `keras_dalign.solve`, and `judge`: which samples choose the L2 weight and
            the width, `"training"` (a fifth of the training samples) or
            `"validation"` (those of `validation_split` or `validation_data`).
            `{"l2": 0}` minimises the plain loss.
        average_weights: Float in [0, 1). At the switch the weights are set to their
            average over about this share of the steps of exploration. Exploration
            itself is not changed. 0 uses the last weights. Where `inner_optimizer` has
            `use_ema`, its average is used instead.

    Raises:
        ValueError: If an argument is out of its range, or at the first step if
            the model has no alignment head.

    Example:

    ```python
    model = keras_dalign.align(base, n_samples=len(x))
    model.compile(
        optimizer=keras_dalign.DAlign(keras.optimizers.Adam()),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(x, y, epochs=30)
    ```

    Reference:
        - Kawaguchi, Zhang & Deng, Neural Computation 34(4), 2022.
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str,
        exploit_optimizer: keras.optimizers.Optimizer | str | None = AUTO,
        explore: float = 0.6,
        noise: float = 1e-3,
        cache_features: bool | str = "auto",
        name: str | None = None,
        solve_options: dict[str, Any] | None = None,
        average_weights: float = 0.1,
        **kwargs: Any,
    ) -> None:
        for key, value in kwargs.items():
            if key in _ON_THE_INNER_OPTIMIZER:
                raise ValueError(
                    f"DAlign does not take `{key}`: set it on `inner_optimizer` (and "
                    f"on `exploit_optimizer`). Received: {key}={shown(value)}"
                )
            raise TypeError(f"DAlign got an unexpected argument. Received: {key}=...")
        # A callable, as a number would become a variable of the training step.
        super().__init__(learning_rate=_no_learning_rate, name=name)
        for key, value in {
            "inner_optimizer": inner_optimizer,
            "exploit_optimizer": exploit_optimizer,
        }.items():
            if isinstance(value, DAlign):
                raise ValueError(f"DAlign cannot wrap DAlign. Received: {key}={value}")
        self.explore = checked_explore(explore)
        self.noise = number("noise", noise, "a non-negative number", lambda v: v >= 0)
        if not isinstance(cache_features, bool):
            wanted = "True, False, 'disk' or 'auto'"
            choice("cache_features", cache_features, (AUTO, DISK), wanted)
        self.cache_features = cache_features
        self.inner_optimizer = checked_optimizer("inner_optimizer", inner_optimizer)
        if (
            isinstance(exploit_optimizer, str)
            and exploit_optimizer == AUTO
            and cache_features is False
        ):
            exploit_optimizer = None
        # `"auto"`, `"solve"`, None for a copy of `inner_optimizer`, or an optimizer.
        self._exploit_by = exploit_optimizer
        check_exploitation(
            exploit_optimizer,
            solves=self.solves,
            explore=self.explore,
            cache_features=cache_features,
            solve_options=solve_options,
        )
        self.solve_options = dict(solve_options or {})
        if self.solves:
            exploit_optimizer = NoSteps(name=SOLVE)
        elif exploit_optimizer is None:
            exploit_optimizer = fresh_copy(self.inner_optimizer)
        self.exploit_optimizer = checked_optimizer(
            "exploit_optimizer", exploit_optimizer
        )
        if self.exploit_optimizer is self.inner_optimizer:
            raise ValueError(
                "One optimizer cannot serve both phases: each holds state for its own "
                "variables. Received: exploit_optimizer is inner_optimizer. Pass a "
                "second optimizer, or None for a fresh copy."
            )
        self.average_weights = number(
            "average_weights",
            average_weights,
            "a number from 0 (no average) to below 1",
            lambda v: 0 <= v < 1,
        )
        self.weight_average: WeightAverage | None = None
        # Of the current run of `fit`; kept in files, beside the weights they belong to.
        self.finished_epochs = 0
        self._phase = EXPLORING
        # Called before the state of the optimizers is loaded: the optimizer of
        # exploitation must be built for the units of the loaded head first.
        self.before_loading: Callable[[], None] | None = None

    def active_optimizer(self) -> keras.optimizers.Optimizer:
        """Returns the optimizer of the current phase."""
        # A method, since Keras saves every optimizer that is an attribute.
        if self._phase == EXPLOITING:
            return self.exploit_optimizer
        return self.inner_optimizer

    @property
    def phase(self) -> str:
        """`"exploring"` or `"exploiting"`."""
        return self._phase

    @property
    def solves(self) -> bool:
        """Whether exploitation is a full-batch solve instead of training steps."""
        return isinstance(self._exploit_by, str) and self._exploit_by in (AUTO, SOLVE)

    @property
    def may_fall_back(self) -> bool:
        """Whether training steps may replace the solver."""
        return isinstance(self._exploit_by, str) and self._exploit_by == AUTO

    def fall_back(self) -> None:
        """Replaces the solver by a new copy of `inner_optimizer`."""
        self._exploit_by = None
        self.solve_options = {}
        self.exploit_optimizer = fresh_copy(self.inner_optimizer)

    def exploration_epochs(self, epochs: int) -> int:
        """Number of exploration epochs in a run of `epochs`.

        Args:
            epochs: Int, epochs of the whole run.

        Returns:
            The number. For a fractional `explore` below 1 and at least two epochs, both
            phases get one.

        Raises:
            ValueError: If an integer `explore` is larger than `epochs`.
        """
        if isinstance(self.explore, float):
            if self.explore == 1.0:
                return epochs
            return min(max(round(self.explore * epochs), 1), max(epochs - 1, 1))
        if self.explore > epochs:
            raise ValueError(
                "`explore` is beyond the epochs of this run. Received: "
                f"explore={self.explore}, epochs={epochs}. Train for more epochs, or "
                "give `explore` as a fraction."
            )
        return self.explore

    def enter(self, phase: str) -> None:
        """Makes `phase` the current phase, whose optimizer takes the next step."""
        self._phase = phase
        if phase == EXPLOITING and self._exploit_by is None:
            schedule = unwrapped(self.exploit_optimizer)._learning_rate
            if isinstance(schedule, ContinuedSchedule):
                explored = unwrapped(self.inner_optimizer)._iterations
                schedule.start = int(ops.convert_to_numpy(explored))

    def scale_losses(self) -> None:
        """Wraps both optimizers for float16 training, if they are not wrapped yet."""
        if not self.built:
            self.inner_optimizer = loss_scaled(self.inner_optimizer)
            self.exploit_optimizer = loss_scaled(self.exploit_optimizer)

    def build_exploration(self, variables: list[keras.Variable]) -> None:
        """Builds the optimizer of exploration on the variables that it trains.

        Raises:
            ValueError: If it was built on other variables already.
        """
        if self.built:
            known = unwrapped(self.inner_optimizer)._trainable_variables
            if [id(v) for v in known] != [id(v) for v in variables]:
                raise ValueError(
                    "DAlign was built for another model already. Received: a model "
                    f"with {len(variables)} trainable variables that are not those it "
                    "knows. Pass a fresh DAlign to `compile`."
                )
            return
        self.inner_optimizer.build(variables)
        if self.average_weights and not unwrapped(self.inner_optimizer).use_ema:
            steps = self.add_variable(
                (), initializer="zeros", dtype="int", name="averaged_steps"
            )
            self.weight_average = WeightAverage(
                variables, self.average_weights, self.add_variable_from_reference, steps
            )
        self.built: bool = True

    def build_exploitation(self, variables: list[keras.Variable]) -> None:
        """Builds the optimizer of exploitation on the units, if there are any.

        A change of the width creates new units. A new optimizer replaces the old one
        then.
        """
        optimizer = unwrapped(self.exploit_optimizer)
        if self.exploit_optimizer.built:
            known = optimizer._trainable_variables
            if [id(v) for v in known] == [id(v) for v in variables]:
                return
            config = keras.saving.serialize_keras_object(self.exploit_optimizer)
            self.exploit_optimizer = keras.saving.deserialize_keras_object(config)
        if variables:
            self.exploit_optimizer.build(variables)

    def build(self, variables: list[keras.Variable]) -> None:
        """Refuses models without an alignment head; others were built by `compile`.

        Raises:
            ValueError: If the model is not an `AlignedModel`.
        """
        if not self.built:
            raise ValueError(
                "DAlign trains models with an alignment head. Received: a model "
                f"with {len(variables)} trainable variables that is no AlignedModel. "
                "Call `keras_dalign.align(model, n_samples=...)` first, and compile "
                "and fit what it returns (or build AlignedModel(trunk, head) yourself)."
            )

    @property
    def variables(self) -> list[keras.Variable]:
        """Own variables and those of the optimizer of the current phase.

        They are the state of a training step. The optimizer of the other phase is
        saved, too.
        """
        return self._step_variables + self.active_optimizer().variables

    @property
    def _step_variables(self) -> list[keras.Variable]:
        """Own variables that a step of the current phase changes."""
        return self._variables if self._phase == EXPLORING else [self._iterations]

    @property
    def all_variables(self) -> list[keras.Variable]:
        """Own variables and those of both optimizers."""
        optimizers = (self.inner_optimizer, self.exploit_optimizer)
        return self._variables + [v for o in optimizers for v in o.variables]

    def apply(
        self, grads: list[Any], trainable_variables: list[Any] | None = None
    ) -> None:
        """Takes one step with the optimizer of the current phase."""
        if not self.built:
            self.build(trainable_variables or [])
        self.active_optimizer().apply(grads, trainable_variables)
        self._iterations.assign_add(1)
        if self._phase == EXPLORING and self.weight_average is not None:
            self.weight_average.update()

    def stateless_apply(
        self,
        optimizer_variables: list[Any],
        grads: list[Any],
        trainable_variables: list[Any],
    ) -> tuple[list[Any], list[Any]]:
        """Pure version of `apply`: returns new trainable and optimizer variables."""
        if not self.built:
            self.build(trainable_variables)
        # Loss scaling updates its state inside a `cond`, where assignments would leak,
        # so the `stateless_apply` of the active optimizer is called.
        own = self._step_variables
        given = optimizer_variables[: len(own)]
        trained, active = self.active_optimizer().stateless_apply(
            optimizer_variables[len(own) :], grads, trainable_variables
        )
        mapping = list(zip(own, given, strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self._iterations.assign_add(1)
            if self._phase == EXPLORING and self.weight_average is not None:
                self.weight_average.update(trained)
        values = [scope.get_current_value(v) for v in own]
        return trained, values + active

    def scale_loss(self, loss: Any) -> Any:
        """Scales the loss as the optimizer of the current phase does."""
        return self.active_optimizer().scale_loss(loss)

    @property
    def loss_scale_factor(self) -> float | None:
        """The loss scale of the optimizer of the current phase."""
        if not hasattr(self, "exploit_optimizer"):
            return None
        return self.active_optimizer().loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: float | None) -> None:
        # Keras's constructor sets it before there is an inner optimizer.
        if hasattr(self, "exploit_optimizer"):
            self.active_optimizer().loss_scale_factor = value

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the optimizer of the current phase."""
        return self.active_optimizer().learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.active_optimizer().learning_rate = value

    @property
    def iterations(self) -> keras.Variable:
        """Steps taken in both phases together."""
        return self._iterations

    def finalize_variable_values(self, var_list: list[keras.Variable]) -> None:
        """Ends the training of a phase, for instance by setting averaged weights."""
        self.active_optimizer().finalize_variable_values(var_list)
        if (
            keras.backend.backend() == "jax"
            and unwrapped(self.active_optimizer()).use_ema
        ):
            # Average and weight share one buffer here. The next training step would
            # donate it twice, which fails.
            for variable in var_list:
                variable.assign(ops.copy(variable.value))

    def set_weights(self, weights: list[Any]) -> None:
        """Sets the values of `variables`, in their order."""
        variables = self.variables
        if len(weights) != len(variables):
            raise ValueError(
                "`weights` must match the optimizer's variables one to one. Received: "
                f"{len(weights)} values for {len(variables)} variables."
            )
        for variable, value in zip(variables, weights, strict=True):
            variable.assign(value)

    def save_own_variables(self, store: Any) -> None:
        """Saves own variables; Keras saves those of both optimizers."""
        for index, variable in enumerate(self._variables):
            store[str(index)] = variable.numpy()
        store["finished_epochs"] = np.asarray(self.finished_epochs)

    def load_own_variables(self, store: Any) -> None:
        """Loads own variables; Keras loads those of both optimizers."""
        if self.before_loading is not None:
            self.before_loading()
        known = store.keys()
        for index, variable in enumerate(self._variables):
            # Files of version 0.2.0 have no average; it starts with the next step.
            if str(index) in known:
                variable.assign(store[str(index)])
        if "finished_epochs" in known:
            self.finished_epochs = int(np.asarray(store["finished_epochs"]))

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild this optimizer (without its state)."""
        serialize = keras.saving.serialize_keras_object
        return {
            "inner_optimizer": serialize(self.inner_optimizer),
            "exploit_optimizer": self._exploit_config(),
            "explore": self.explore,
            "noise": self.noise,
            "cache_features": self.cache_features,
            "solve_options": dict(self.solve_options) if self.solves else None,
            "average_weights": self.average_weights,
            "name": self.name,
        }

    def _exploit_config(self) -> Any:
        if self.solves or self._exploit_by is None:
            return self._exploit_by
        return keras.saving.serialize_keras_object(self.exploit_optimizer)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> DAlign:
        """Rebuilds an optimizer from `get_config`."""
        config = compat.of_any_backend(config)
        with rebuilding(cls.__name__):
            for key in ("inner_optimizer", "exploit_optimizer"):
                if isinstance(config[key], str):
                    continue
                config[key] = keras.saving.deserialize_keras_object(
                    config[key], custom_objects=custom_objects
                )
            return cls(**config)


def _no_learning_rate() -> float:
    """The learning rate of DAlign itself, which is never used."""
    return 0.0
