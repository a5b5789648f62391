"""Records of a training: losses, seconds, test errors."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from pipelines import files

if TYPE_CHECKING:
    from pipelines.averaging import RunningAverage


class Recorder(keras.callbacks.Callback):
    """Records losses, seconds and test errors by epoch, and continues from a backup.

    The seconds exclude those of measuring the test error. Those of averaging the
    weights are recorded separately.

    Args:
        x_test: Test images.
        y_test: Their labels.
        test_epochs: The numbers of epochs after which the test error is measured.
        backup: Where to write a copy after every epoch; none by default.
        average: The running average during the training; none by default.

    Attributes:
        epochs: One entry for each epoch: `epoch` (from 1), `train_loss` (the mean over
            its steps), `phase`, `seconds`, `average_seconds` (of the average, not
            included in `seconds`), and `test_error_rate` where it was measured.
        own_seconds: Seconds spent measuring.
    """

    def __init__(
        self,
        x_test: np.ndarray,
        y_test: np.ndarray,
        test_epochs: Collection[int],
        backup: Path | None = None,
        average: RunningAverage | None = None,
    ) -> None:
        super().__init__()
        self._x_test, self._y_test = x_test, y_test
        self._test_epochs = set(test_epochs)
        self._backup = backup
        self._average = average
        self.epochs: list[dict[str, float]] = []
        self.own_seconds = 0.0
        self._begin = 0.0

    def resume(self, epochs: int) -> None:
        """Takes over the records of a killed run's first epochs."""
        if epochs and self._backup is not None and self._backup.exists():
            kept = files.read_json(self._backup, "epochs")["epochs"]
            self.epochs = [entry for entry in kept if entry["epoch"] <= epochs]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        if not self.epochs:
            self.resume(epoch)
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keras's hook."""
        end = time.perf_counter()
        logs = logs or {}
        averaging = 0.0 if self._average is None else self._average.take_seconds()
        entry = {
            "epoch": epoch + 1,
            "train_loss": float(logs["loss"]),
            "phase": int(logs.get("phase", 0)),
            "seconds": end - self._begin - averaging,
            "average_seconds": averaging,
        }
        if epoch + 1 in self._test_epochs:
            logits = self.model.predict(self._x_test, batch_size=256, verbose=0)
            entry["test_error_rate"] = float(
                np.mean(logits.argmax(axis=1) != self._y_test)
            )
        self.epochs.append(entry)
        if self._backup is not None:
            files.write_json(self._backup, {"epochs": self.epochs})
        self.own_seconds += time.perf_counter() - end


def curves(epochs: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """The curves for the figures, to six digits.

    Args:
        epochs: The entries of a `Recorder`.

    Returns:
        `epoch`, `train_loss` and `phase` by epoch; `test_epoch` and `test_error_rate`
        where the test error was measured.
    """
    tested = [entry for entry in epochs if "test_error_rate" in entry]
    return {
        "epoch": [entry["epoch"] for entry in epochs],
        "train_loss": [float(f"{entry['train_loss']:.6g}") for entry in epochs],
        "phase": [entry["phase"] for entry in epochs],
        "test_epoch": [entry["epoch"] for entry in tested],
        "test_error_rate": [float(f"{e['test_error_rate']:.6g}") for e in tested],
    }
