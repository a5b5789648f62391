"""The callbacks of a training run, which see its loops as one `fit`."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

import keras

from keras_dalign.head.alignment_head import EXPLOITING, PHASES

if TYPE_CHECKING:
    from keras_dalign.training.aligned_model import AlignedModel

# Logs that only epochs of the solver have.
SOLVER_LOGS = ("objective", "gap")


class RunCallbacks(keras.callbacks.CallbackList):
    """Callbacks that see one training run, however many `fit` loops it takes.

    The begin and end of a loop are ignored. `begin` and `end` report those of the run.

    Args:
        model: The model.
        callbacks: As in `keras.Model.fit`.
        **params: The entries of `keras.callbacks.Callback.params`.
    """

    def __init__(self, model: AlignedModel, callbacks: Any, **params: Any) -> None:
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = callbacks.callbacks
        callbacks = list(keras.tree.flatten(callbacks)) if callbacks else []
        if params["verbose"] and not any(
            isinstance(known, keras.callbacks.ProgbarLogger) for known in callbacks
        ):
            callbacks.append(RunProgressBar())
        super().__init__(callbacks, add_history=True, model=model, **params)
        self._aligned_model = model
        self._last_logs: dict[str, Any] | None = None

    @property
    def resumes(self) -> bool:
        """Whether one of them continues from a backup, if there is one."""
        kind = keras.callbacks.BackupAndRestore
        return any(isinstance(callback, kind) for callback in self.callbacks)

    def begin(self) -> None:
        """Reports that the run begins."""
        super().on_train_begin()

    def end(self) -> None:
        """Reports that the run ends."""
        super().on_train_end(self._last_logs)

    def on_train_begin(self, logs: Any = None) -> None:
        """Ignores that a loop begins."""

    def on_train_end(self, logs: Any = None) -> None:
        """Ignores that a loop ends."""

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Reports that an epoch ends, and adds the phase to its logs."""
        model = self._aligned_model
        model.optimizer.finished_epochs = epoch + 1
        self._last_logs = {**(logs or {}), "phase": PHASES.index(model.phase)}
        if model.optimizer.solves:
            # Loggers take their columns from the first epoch: it must have all logs.
            for name in SOLVER_LOGS:
                self._last_logs.setdefault(name, math.nan)
        super().on_epoch_end(epoch, self._last_logs)


class RunProgressBar(keras.callbacks.ProgbarLogger):
    """Keras's progress bar, with one line for each iteration of the solver.

    It leaves out the phase, and while exploring the logs that only the solver has.
    """

    # As in Keras's progress bar: training steps need not wait for it.
    async_safe = True

    def __init__(self) -> None:
        super().__init__()
        self._solver_begin: float | None = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts a bar, or the clock of an iteration of the solver."""
        model = self.model
        if model.phase == EXPLOITING and model.optimizer.solves:
            self._solver_begin = time.perf_counter()
        else:
            super().on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Ends the bar, or prints the line of an iteration."""
        shown = {key: value for key, value in (logs or {}).items() if key != "phase"}
        if self._solver_begin is None:
            for name in SOLVER_LOGS:
                shown.pop(name, None)
            super().on_epoch_end(epoch, shown)
            return
        seconds = time.perf_counter() - self._solver_begin
        numbers = "".join(f" - {key}: {value:.4g}" for key, value in shown.items())
        if keras.config.is_interactive_logging_enabled():
            sys.stdout.write(f"Epoch {epoch + 1} (solve) - {seconds:.2f}s{numbers}\n")
