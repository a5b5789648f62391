"""A million samples: `fit` with features in a file, within 2 GiB of resident memory.

A network that ends in 127 features and 10 outputs is trained on a stream of synthetic
inputs: one epoch of exploration, then the solver with an L2 term and 16 gates. The
features go to a temporary file (`cache_features="disk"`). The run has a separate
process. The peak of its resident memory includes Keras, the backend and the pages of
the file.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import Target

INPUTS, FEATURES, CLASSES = 64, 127, 10
L2 = 1e-3
WIDTH = 16
BATCH_SIZE = 1024
ABOUT = (
    f"Batch size {BATCH_SIZE}, L2 weight {L2:g}. The losses are those of the epoch of "
    "exploration and of the final model."
)
GIB = 2.0


class Samples(keras.utils.PyDataset):
    """Random inputs, labelled by a random network with a fifth of the labels random.

    Batches are computed each time they are read.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        rng = np.random.default_rng(0)
        self.hidden = rng.standard_normal((INPUTS, 32)) / INPUTS**0.5
        self.top = rng.standard_normal((32, CLASSES))

    def __len__(self) -> int:
        return math.ceil(self.n / BATCH_SIZE)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(index)
        rows = min(BATCH_SIZE, self.n - index * BATCH_SIZE)
        x = rng.standard_normal((rows, INPUTS), dtype="float32")
        y = (np.maximum(x @ self.hidden, 0) @ self.top).argmax(axis=1)
        noisy = rng.random(rows) < 0.2
        return x, np.where(noisy, rng.integers(0, CLASSES, rows), y)


def run(n: int) -> dict[str, Any]:
    """Explores, switches and solves; seconds, gap and peak memory in GiB."""
    keras.utils.set_random_seed(0)
    base = keras.Sequential(
        [
            keras.Input((INPUTS,)),
            keras.layers.Dense(FEATURES, activation="relu"),
            keras.layers.Dense(CLASSES),
        ]
    )
    model = kd.align(base, n_samples=n, width=WIDTH)
    model.compile(
        kd.DAlign(
            keras.optimizers.Adam(3e-3),
            explore=1,
            exploit_optimizer="solve",
            solve_options={"l2": L2},
            cache_features="disk",
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    before = _peak()
    begin = time.perf_counter()
    history = model.fit(Samples(n), epochs=2, verbose=0).history
    return {
        "n": n,
        "d": FEATURES + 1,
        "width": model.head.width,
        "seconds": time.perf_counter() - begin,
        "explored loss": history["loss"][0],
        "loss": history["loss"][-1],
        "gradients": len(history["loss"]) - 1,
        "gap": history["gap"][-1],
        "peak GiB before fit": before,
        "peak GiB": _peak(),
    }


def _peak() -> float:
    """Peak of this process's resident memory, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=1_000_000, help="number of samples")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, more=_options)
    if options.run:
        print(json.dumps(run(options.n)))
        return
    command = [sys.executable, "-m", "benchmarks.million", "--run"]
    command += ["--n", str(options.n)]
    of_process = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    found = json.loads(of_process.splitlines()[-1])
    rows = [[name, _number(value)] for name, value in found.items()]
    common.write(
        options.out,
        "million",
        title="A million samples",
        body=[ABOUT, common.table(["", "measured"], rows)],
        targets=[
            Target("peak of the resident memory, GiB", found["peak GiB"], GIB),
            Target("certified gap with the L2 term", found["gap"], 1e-6),
        ],
        settings={"l2": L2, "batch size": BATCH_SIZE},
        measurements=found,
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    main()
