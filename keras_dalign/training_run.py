"""One training run of two phases, which callbacks see as one `fit`."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras.src.trainers.data_adapters.array_slicing import train_validation_split

from keras_dalign import data
from keras_dalign.alignment_head import EXPLOITING, PHASES
from keras_dalign.features import FeaturePass, as_inputs, plan_cache
from keras_dalign.losses import convex_loss
from keras_dalign.switch import switch

if TYPE_CHECKING:
    from keras_dalign.aligned_model import AlignedModel

logger = logging.getLogger("keras_dalign")

# Labels become one row of floats per class while they are checked.
_CHECKED_AT_ONCE = 8192


class TrainingRun:
    """Explores, switches and exploits with two of Keras's own `fit` loops.

    Each phase trains other variables on other inputs, so each has a loop, a
    compiled step and an optimizer of its own; what joins them is one list of
    callbacks, one history and one count of epochs.

    Args:
        model: The `AlignedModel`, compiled with `DAlign`.
        keras_fit: `keras.Model.fit`, bound to the model.
        x, y, sample_weight: Training data, as in Keras.
        validation_split: Float, as in Keras.
        validation_data: As in Keras.
        callbacks: As in Keras.
        epochs: Int, last epoch of the whole run.
        initial_epoch: Int, epoch to start at.
        **arguments: What else both loops are given.
    """

    def __init__(
        self,
        model: AlignedModel,
        keras_fit: Callable[..., Any],
        x: Any,
        y: Any,
        sample_weight: Any,
        *,
        validation_split: float,
        validation_data: Any,
        callbacks: Any,
        epochs: int,
        initial_epoch: int,
        **arguments: Any,
    ) -> None:
        self.model = model
        self.keras_fit = keras_fit
        self.epochs = epochs
        self.initial_epoch = initial_epoch
        self.arguments = arguments
        self.steps = arguments["steps_per_epoch"]
        self.batch_size = arguments["batch_size"] or 32
        self.loss = convex_loss(model.loss)
        self.switch_epoch = self._switch_epoch()
        self.is_array = data.is_arrays(x)
        if validation_split and validation_data is None:
            x, y, sample_weight, validation_data = self._split(
                x, y, sample_weight, validation_split
            )
        self.x, self.y, self.sample_weight = x, y, sample_weight
        self.validation_data = validation_data
        self.n_samples = self._checked_size()
        self.callbacks = _OneRun(
            model,
            callbacks,
            verbose=arguments["verbose"],
            epochs=epochs,
            steps=self._steps_per_epoch(),
        )

    def train(self) -> keras.callbacks.History:
        """Runs what is left of the run and returns the history."""
        model = self.model
        self.callbacks.begin()
        # A callback such as BackupAndRestore may have resumed a run, in any phase.
        epoch = model._initial_epoch or self.initial_epoch
        model._initial_epoch = None
        if model.phase != EXPLOITING:
            stopped = epoch < self.switch_epoch and self._explore(epoch)
            epoch = max(epoch, self.switch_epoch)
        else:
            stopped = False
        if epoch < self.epochs and not stopped:
            self._exploit(epoch)
        self.callbacks.end()
        return model.history

    def _explore(self, epoch: int) -> bool:
        """Trains the whole model; True if a callback stopped the training."""
        self.keras_fit(
            self.x,
            self.y,
            sample_weight=self.sample_weight,
            validation_data=self.validation_data,
            callbacks=self.callbacks,
            epochs=self.switch_epoch,
            initial_epoch=epoch,
            **self.arguments,
        )
        return bool(self.model.stop_training)

    def _exploit(self, epoch: int) -> None:
        model = self.model
        plan = plan_cache(
            model.head,
            self.n_samples,
            model.optimizer.cache_features,
            self.is_array,
        )
        self._say(plan.reason)
        features = None
        # Inference holds two or three activations where training holds all, so a
        # batch four times as large fits, and its statistics are more exact.
        passes: dict[str, Any] = {
            "batch_size": 4 * self.batch_size,
            "steps": None if self.is_array else self.steps,
        }
        if model.phase != EXPLOITING:
            report, features = switch(
                model,
                self.x,
                self.y,
                self.sample_weight,
                noise=model.optimizer.noise,
                keep_features=plan.keep,
                **passes,
            )
            self._say(str(report))
            self._warn_if_too_many(report.n_samples)
        elif plan.keep:
            everything = FeaturePass(model, keep=True)
            features = everything.run(
                self.x, self.y, self.sample_weight, **passes
            ).feature_set()
        arguments = dict(self.arguments)
        if features is None:
            x, y, weight = self.x, self.y, self.sample_weight
            validation_data = self.validation_data
        else:
            x, y = as_inputs(features.z), features.y
            weight = features.sample_weight
            validation_data = self._validation_features()
            if not self.is_array:
                # Steps of the size that the stream took in exploration.
                arguments["batch_size"] = features.batch_size
        self.keras_fit(
            x,
            y,
            sample_weight=weight,
            validation_data=validation_data,
            callbacks=self.callbacks,
            epochs=self.epochs,
            initial_epoch=epoch,
            **arguments,
        )

    def _switch_epoch(self) -> int:
        if self.model.phase == EXPLOITING:
            return 0
        optimizer = self.model.optimizer
        epoch = optimizer.exploration_epochs(self.epochs)
        if isinstance(optimizer.explore, float) and epoch == self.epochs:
            warnings.warn(
                "One epoch leaves none for exploitation: the model only explores. "
                f"Received: epochs={self.epochs}, explore={optimizer.explore}",
                stacklevel=4,
            )
        return int(epoch)

    def _split(self, x: Any, y: Any, sample_weight: Any, fraction: float) -> Any:
        if not self.is_array:
            raise ValueError(
                "`validation_split` needs arrays. Received: validation_split="
                f"{fraction} with x of type {type(x).__name__}. Pass validation_data."
            )
        (x, y, sample_weight), validation_data = train_validation_split(
            (x, y, sample_weight), validation_split=fraction
        )
        return x, y, sample_weight, validation_data

    def _checked_size(self) -> int | None:
        """Number of training samples where it is known; bad arrays are refused."""
        if not self.is_array:
            return None
        n = data.n_samples(self.x)
        head = self.model.head
        if head.n_samples is not None and n > head.n_samples:
            raise ValueError(
                "The alignment head was made for fewer samples than `fit` was given. "
                f"Received: {n} samples, n_samples={head.n_samples}. Call "
                f"keras_dalign.align(model, n_samples={n})."
            )
        for leaf in keras.tree.flatten(self.x):
            values = keras.ops.convert_to_numpy(leaf)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise ValueError(
                    "The inputs must be finite. Received: x with NaN or infinity in "
                    f"{int((~np.isfinite(values)).sum())} of {values.size} entries"
                )
        if self.y is None:
            raise ValueError("Training needs targets. Received: y=None")
        y = keras.ops.convert_to_numpy(self.y)
        for start in range(0, n, _CHECKED_AT_ONCE):
            self.loss.targets(y[start : start + _CHECKED_AT_ONCE], head.units)
        return n

    def _steps_per_epoch(self) -> int | None:
        if self.steps is not None:
            return self.steps
        if self.n_samples is not None:
            return math.ceil(self.n_samples / self.batch_size)
        try:
            return len(self.x)
        except TypeError:
            return None

    def _validation_features(self) -> Any:
        """Validation data with features for inputs, where they are arrays."""
        validation = self.validation_data
        if not isinstance(validation, (list, tuple)):
            return validation
        x, y, weight = keras.utils.unpack_x_y_sample_weight(tuple(validation))
        if not data.is_arrays(x):
            return validation
        everything = FeaturePass(self.model, keep=True)
        kept = everything.run(x, y, weight, batch_size=4 * self.batch_size)
        features = kept.feature_set()
        return keras.utils.pack_x_y_sample_weight(
            as_inputs(features.z), features.y, features.sample_weight
        )

    def _warn_if_too_many(self, n: int) -> None:
        wanted = self.model.head.n_samples
        if wanted is not None and n > wanted:
            warnings.warn(
                "The alignment head was made for fewer samples than the stream held. "
                f"Received: {n} samples, n_samples={wanted}. Its width of "
                f"{self.model.head.width} may be too small: align with n_samples={n}.",
                stacklevel=2,
            )

    def _say(self, text: str) -> None:
        logger.info("%s", text)
        verbose = self.arguments["verbose"]
        if verbose and keras.config.is_interactive_logging_enabled():
            sys.stdout.write(f"{text}\n")


class _OneRun(keras.callbacks.CallbackList):
    """Callbacks that see one run however many loops it takes.

    The loops' own begin and end are swallowed; `begin` and `end` stand for them.
    """

    def __init__(self, model: AlignedModel, callbacks: Any, **params: Any) -> None:
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = callbacks.callbacks
        callbacks = list(keras.tree.flatten(callbacks)) if callbacks else []
        if params["verbose"] and not any(
            isinstance(known, keras.callbacks.ProgbarLogger) for known in callbacks
        ):
            callbacks.append(_ProgressBar())
        super().__init__(callbacks, add_history=True, model=model, **params)
        self._aligned_model = model
        self._last_logs: dict[str, Any] | None = None

    def begin(self) -> None:
        """The run begins."""
        super().on_train_begin()

    def end(self) -> None:
        """The run ends."""
        super().on_train_end(self._last_logs)

    def on_train_begin(self, logs: Any = None) -> None:
        """A loop begins."""

    def on_train_end(self, logs: Any = None) -> None:
        """A loop ends."""

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """An epoch ends: its logs say in which phase."""
        phase = PHASES.index(self._aligned_model.phase)
        self._last_logs = {**(logs or {}), "phase": phase}
        super().on_epoch_end(epoch, self._last_logs)


class _ProgressBar(keras.callbacks.ProgbarLogger):
    """Keras's own, without the phase, which the lines between the phases tell."""

    # As Keras's own, which it adds itself: steps need not wait for it.
    async_safe = True

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """An epoch ends."""
        shown = {key: value for key, value in (logs or {}).items() if key != "phase"}
        super().on_epoch_end(epoch, shown)
