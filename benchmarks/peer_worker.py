"""A process that fits the softmax regressions of scikit-learn and Cyanure.

Peers run in a separate process, so that a fit that takes too long can be stopped, and
the solvers do not share threads. The process reads a line of JSON for each request from
its standard input, and answers with a line of JSON. This file does not import Keras.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

CYANURE = "Cyanure"


@dataclass(frozen=True, eq=False)
class Fit:
    """A fit of a peer.

    Attributes:
        coefficients: Shape `(C, columns)`, float64.
        iterations: Number of iterations, as the peer counts them.
        seconds: Wall time of its `fit`.
        warnings: The first lines of its warnings.
    """

    coefficients: np.ndarray
    iterations: int
    seconds: float
    warnings: tuple[str, ...]


class Peers:
    """Fits of `mean cross-entropy + l2 / 2 ||coefficients||^2`, without an intercept.

    Args:
        x: Columns, shape `(n, columns)`, float64. They are written to a file.
        labels: Class indices, shape `(n,)`.
    """

    def __init__(self, x: np.ndarray, labels: np.ndarray) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name)
        np.save(self._path / "x.npy", x)
        np.save(self._path / "labels.npy", labels)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        self._folder.cleanup()

    def fit(
        self,
        solver: str,
        l2: float,
        tol: float,
        limit: float | None,
        *,
        max_iter: int = 10_000,
    ) -> Fit | None:
        """Fits once.

        Args:
            solver: One of scikit-learn's `LogisticRegression`, or `CYANURE`.
            l2: Weight of the L2 term.
            tol: The peer's own tolerance.
            limit: Time limit in seconds; None for no limit.
            max_iter: Largest number of iterations.

        Returns:
            The fit; None if it took longer than the limit.

        Raises:
            MemoryError: If the peer needs more memory than there is.
            RuntimeError: If the process failed.
        """
        request = {
            "solver": solver,
            "l2": l2,
            "tol": tol,
            "max_iter": max_iter,
        }
        process = self._running()
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("The process of the peers has no pipes.")
        # Reading the file is not part of the fit.
        self._ask(process, {"prepare": True}, None)
        reply = self._ask(process, request, limit)
        if reply is None:
            self._end()
            return None
        if "too large" in reply:
            raise MemoryError(reply["too large"])
        return Fit(
            np.load(self._path / "coefficients.npy"),
            reply["iterations"],
            reply["seconds"],
            tuple(reply["warnings"]),
        )

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peer_worker", str(self._path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._process

    @staticmethod
    def _ask(
        process: subprocess.Popen[str], request: dict[str, Any], limit: float | None
    ) -> Any:
        """The answer to a request; None after `limit` seconds."""
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("The process of the peers has no pipes.")
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], limit)[0]:
            return None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"The process of the peers ended with {process.wait()}. "
                f"Received: {request}"
            )
        return json.loads(line)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def has_cyanure() -> bool:
    """Whether Cyanure is installed."""
    try:
        import cyanure  # noqa: F401, PLC0415  (an optional peer)
    except ImportError:
        return False
    return True


def _fit(x: np.ndarray, labels: np.ndarray, request: dict[str, Any]) -> Any:
    """Coefficients `(C, columns)`, iterations and seconds of one fit."""
    if request["solver"] == CYANURE:
        from cyanure.estimators import Classifier  # noqa: PLC0415

        model = Classifier(
            loss="multiclass-logistic",
            penalty="l2",
            lambda_1=request["l2"],
            fit_intercept=False,
            tol=request["tol"],
            max_iter=request["max_iter"],
            verbose=False,
        )
    else:
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

        model = LogisticRegression(
            C=1.0 / (request["l2"] * len(x)),
            tol=request["tol"],
            solver=request["solver"],
            fit_intercept=False,
            max_iter=request["max_iter"],
        )
    begin = time.perf_counter()
    model.fit(x, labels)
    seconds = time.perf_counter() - begin
    if request["solver"] == CYANURE:
        return model.get_weights().T, int(np.max(model.n_iter_)), seconds
    return model.coef_, int(np.max(model.n_iter_)), seconds


def _serve(folder: Path) -> None:
    # Output of libraries goes to standard error, apart from the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    labels = np.load(folder / "labels.npy")
    columns = np.load(folder / "x.npy")
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            answers.write("{}\n")
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found, iterations, seconds = _fit(columns, labels, request)
            except MemoryError as error:
                answers.write(json.dumps({"too large": str(error)}) + "\n")
                continue
        np.save(folder / "coefficients.npy", np.asarray(found, dtype=np.float64))
        lines = [str(each.message).partition("\n")[0] for each in caught]
        reply = {"iterations": iterations, "seconds": seconds, "warnings": lines}
        answers.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
