"""Alignment of ResNet-8 on MNIST: against a dense reference, and at full size.

All parameters of ResNet-8, at initialisation and after some epochs of Adam, on the
first MNIST images, in float64. (1) On 200 images (2,000 rows), residual and rank of the
report are compared with a dense reference: a Jacobian computed row by row with the
backend's derivatives, and its singular value decomposition. (2) On 10,000 images
(100,000 rows), LSQR on products: the residual after a number of steps, with time and
memory. No matrix of that side is stored.
"""

from __future__ import annotations

import argparse
import logging
import resource
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import keras
import numpy as np
import scipy.linalg

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import Target
from keras_dalign.diagnostics.alignment import check_alignment
from keras_dalign.diagnostics.precision import float64_context, in_float64

if TYPE_CHECKING:
    from keras_dalign.diagnostics.alignment_report import AlignmentReport

DATA = common.ROOT.parent / "shared" / "data" / "mnist.npz"
N_DENSE = 200
N_LARGE = 10_000
N_TRAIN = 5000
EPOCHS = 3
STEPS = 10
STATES = ("initial", "trained")

Run = dict[str, Any]


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the first MNIST images.

    Args:
        path: A file with `x_train` and `y_train`; pixels 0..255.

    Returns:
        Images of shape `(10000, 28, 28, 1)` in [0, 1], and their labels.

    Raises:
        SystemExit: If there is no such file.
    """
    if not path.is_file():
        raise SystemExit(
            f"There is no file {path}. Pass --data FILE, an .npz file with the arrays "
            "x_train (uint8, of shape (n, 28, 28) or (n, 28, 28, 1)) and y_train."
        )
    with np.load(path) as arrays:
        x, y = arrays["x_train"][:N_LARGE], arrays["y_train"][:N_LARGE]
    return (x.reshape(-1, 28, 28, 1) / 255).astype("float32"), y.astype("int64")


def resnet(x: np.ndarray, y: np.ndarray, epochs: int) -> keras.Model:
    """ResNet-8 after some epochs, with batch-norm statistics of the training data.

    Args:
        x: Training images.
        y: Their labels.
        epochs: Number of epochs, may be 0.

    Returns:
        The model, compiled.
    """
    keras.utils.set_random_seed(0)
    model = kd.models.resnet(8, input_shape=(28, 28, 1), classes=10)
    model.compile(
        optimizer=keras.optimizers.Adam(common.LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    if epochs:
        size = common.BATCH_SIZE
        model.fit(x[:N_TRAIN], y[:N_TRAIN], batch_size=size, epochs=epochs, verbose=0)
    kd.reestimate_batch_norm(model, x[:N_TRAIN])
    return model


def dense_jacobian(model: keras.Model, x: np.ndarray) -> np.ndarray:
    """All rows of the Jacobian, by reverse mode on one output of one sample at a time.

    Args:
        model: The model.
        x: Inputs, shape `(n, ...)`.

    Returns:
        Shape `(n * C, P)`, float64.

    Raises:
        SystemExit: On a backend other than TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise SystemExit("The dense reference is written for TensorFlow.")
    import tensorflow as tf  # noqa: PLC0415

    copy = in_float64(model)
    variables = [v.value for v in copy.trainable_variables]

    @tf.function
    def row(sample: Any, output: Any) -> Any:
        with tf.GradientTape() as tape:
            value = copy(sample, training=False)[0, output]
        gradients = tape.gradient(value, variables)
        return tf.concat([tf.reshape(g, [-1]) for g in gradients], axis=0)

    with float64_context():
        units = copy.output_shape[-1]
        rows = [
            row(tf.constant(x[i : i + 1], tf.float64), tf.constant(c)).numpy()
            for i in range(len(x))
            for c in range(units)
        ]
    return np.stack(rows)


def dense_answer(J: np.ndarray, y: np.ndarray) -> tuple[float, int]:
    """Residual and rank by a full singular value decomposition.

    Args:
        J: The Jacobian, shape `(n * C, P)`.
        y: Class indices, shape `(n,)`.

    Returns:
        The share of the modified targets outside the left singular vectors, and the
        number of singular values above `max(J.shape) * eps * sigma_max`.
    """
    units = len(J) // len(y)
    targets = np.where(np.arange(units) == y[:, None], 1.0, -1.0).ravel()
    left, values, _ = scipy.linalg.svd(
        J, full_matrices=False, overwrite_a=True, check_finite=False
    )
    rank = int(np.sum(values > max(J.shape) * np.finfo(float).eps * values[0]))
    outside = targets - left[:, :rank] @ (left[:, :rank].T @ targets)
    return float(np.linalg.norm(outside) / np.linalg.norm(targets)), rank


class PeakMemory:
    """Peak of the process's memory within a `with` block, above that at its start.

    Attributes:
        gib: The peak in GiB, after the block.
    """

    def __enter__(self) -> Self:
        self.gib = 0.0
        self._before = _resident_gib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.gib = max(self.gib, _resident_gib() - self._before)


def _resident_gib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**30


def measure(
    state: str, report: AlignmentReport, memory: PeakMemory, **more: Any
) -> Run:
    """One line of the results.

    Args:
        state: One of `STATES`.
        report: The report.
        memory: The memory used for it.
        **more: Further measurements.

    Returns:
        The run.
    """
    print(f"{state}: {report}", flush=True)
    return {
        "state": state,
        **report.to_dict(),
        "peak_gib": memory.gib,
        "sentence": str(report),
        **more,
    }


def small(model: keras.Model, state: str, x: np.ndarray, y: np.ndarray) -> list[Run]:
    """The routes on 2,000 rows, against the dense reference.

    Args:
        model: The model.
        state: One of `STATES`.
        x: Images.
        y: Labels.

    Returns:
        A run for each route.
    """
    x, y = x[:N_DENSE], y[:N_DENSE]
    residual, rank = dense_answer(dense_jacobian(model, x), y)
    print(f"{state}: dense answer {residual:.9g}, rank {rank}", flush=True)
    runs = []
    for method in ("auto", "gram"):
        with PeakMemory() as memory:
            report = check_alignment(model, x, y, parameters="all", method=method)
        dense = {"dense_residual": residual, "dense_rank": rank, "method": method}
        runs.append(measure(state, report, memory, **dense))
    return runs


def large(
    model: keras.Model, state: str, x: np.ndarray, y: np.ndarray, steps: int
) -> list[Run]:
    """LSQR on 100,000 rows, and the last layer alone.

    Args:
        model: The model.
        state: One of `STATES`.
        x: Images.
        y: Labels.
        steps: Steps of LSQR.

    Returns:
        A run for the last layer, and one for all parameters.
    """
    runs = []
    for parameters in ("last", "all"):
        begin = time.perf_counter()
        with PeakMemory() as memory:
            report = check_alignment(
                model, x, y, parameters=parameters, max_iterations=steps
            )
        seconds = time.perf_counter() - begin
        runs.append(measure(state, report, memory, wall_seconds=seconds))
    return runs


def main() -> None:
    """Measures, and writes the results."""
    options = common.arguments(__doc__, more=_options)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", force=True
    )
    x, y = read(options.data)
    dense, big = [], []
    for state in STATES:
        model = resnet(x, y, EPOCHS if state == "trained" else 0)
        dense += small(model, state, x, y)
        if state == "trained":
            big += large(model, state, x, y, options.steps)
    side = 8 * (10 * N_LARGE) ** 2 / 2**30
    heading = (
        f"100,000 rows ({N_LARGE} images), trained; a matrix of that side would take "
        f"{side:.0f} GiB:"
    )
    note = (
        "The residual by LSQR is an upper bound, and was still falling. A step takes "
        "two passes over the data, so the time limits the number of steps."
    )
    common.write(
        options.out,
        "alignment",
        title="Alignment of ResNet-8 on MNIST, in all parameters",
        body=[
            f"2,000 rows ({N_DENSE} images), against the dense answer:",
            common.table(
                (
                    "state",
                    "route",
                    "residual",
                    "dense residual",
                    "rank",
                    "dense rank",
                    "sigma_min",
                    "sigma_max",
                    "seconds",
                    "peak memory, GiB",
                ),
                (_dense_row(run) for run in dense),
            ),
            heading,
            common.table(
                (
                    "parameters",
                    "route",
                    "residual, at most",
                    "optimality",
                    "steps",
                    "converged",
                    "seconds",
                    "peak memory, GiB",
                ),
                (_large_row(run) for run in big),
            ),
            note,
        ],
        targets=_targets(dense, big),
        settings={
            "n_dense": N_DENSE,
            "n_large": N_LARGE,
            "n_train": N_TRAIN,
            "epochs": EPOCHS,
            "steps": options.steps,
        },
        measurements=[*dense, *big],
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=DATA, help="MNIST as .npz")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of LSQR")


def _targets(dense: list[Run], big: list[Run]) -> list[Target]:
    exact = [run for run in dense if run["route"] == "dense"]
    off = max(abs(run["residual"] - run["dense_residual"]) for run in exact)
    ranks = max(abs(run["rank"] - run["dense_rank"]) for run in exact)
    side = 8 * (10 * N_LARGE) ** 2 / 2**30
    return [
        Target("2,000 rows: residual less the dense float64 answer", off, 1e-6),
        Target("2,000 rows: rank less that of the dense answer", ranks, 0),
        Target(
            "100,000 rows: peak memory over that of a matrix of that side",
            max(run["peak_gib"] for run in big) / side,
            0.1,
        ),
    ]


def _dense_row(run: Run) -> list[str]:
    return [
        run["state"],
        run["route"],
        f"{run['residual']:.3g}",
        f"{run['dense_residual']:.3g}",
        f"{run['rank']}",
        f"{run['dense_rank']}",
        f"{run['sigma_min']:.3g}",
        f"{run['sigma_max']:.3g}",
        f"{run['seconds']:.1f}",
        f"{run['peak_gib']:.2f}",
    ]


def _large_row(run: Run) -> list[str]:
    return [
        run["parameters"],
        run["route"],
        f"{run['residual']:.4f}",
        f"{run['optimality']:.2g}",
        f"{run['iterations']}",
        "yes" if run["converged"] else "no",
        f"{run['seconds']:.0f}",
        f"{run['peak_gib']:.2f}",
    ]


if __name__ == "__main__":
    main()
