"""A million samples: `fit` with features in a file, within 2 GiB of resident memory.

Synthetic inputs in a file, a network that ends in 127 features and 10 outputs, one
epoch of exploration, then the solver with an L2 term. The features go to a temporary
file, too (`cache_features="disk"`). The peak of the resident memory is that of a
process of its own, with Keras, its backend and the pages of the files.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import Target

INPUTS, FEATURES, CLASSES = 64, 127, 10
L2 = 1e-3
BATCH_SIZE = 1024
GIB = 2.0


def write(folder: Path, n: int) -> None:
    """Inputs and labels of a random network, a fifth of the labels at random."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((INPUTS, 32)) / INPUTS**0.5
    top = rng.standard_normal((32, CLASSES))
    x = np.lib.format.open_memmap(
        folder / "x.npy", mode="w+", dtype="float32", shape=(n, INPUTS)
    )
    y = np.empty(n, "int64")
    for start in range(0, n, 2**16):
        rows = slice(start, min(start + 2**16, n))
        x[rows] = rng.standard_normal((rows.stop - rows.start, INPUTS))
        y[rows] = (np.maximum(x[rows] @ hidden, 0) @ top).argmax(axis=1)
    noisy = rng.random(n) < 0.2
    y[noisy] = rng.integers(0, CLASSES, noisy.sum())
    x.flush()
    np.save(folder / "y.npy", y)


def run(folder: Path) -> dict[str, Any]:
    """Explores, switches and solves; seconds, gap and peak memory in GiB."""
    x = np.load(folder / "x.npy", mmap_mode="r")
    y = np.load(folder / "y.npy")
    keras.utils.set_random_seed(0)
    base = keras.Sequential(
        [
            keras.Input((INPUTS,)),
            keras.layers.Dense(FEATURES, activation="relu"),
            keras.layers.Dense(CLASSES),
        ]
    )
    model = kd.align(base, n_samples=len(x))
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
    history = model.fit(x, y, batch_size=BATCH_SIZE, epochs=2, verbose=0).history
    return {
        "n": len(x),
        "d": FEATURES + 1,
        "width": model.head.width,
        "seconds": time.perf_counter() - begin,
        "loss": history["loss"],
        "gap": history["gap"][-1],
        "peak GiB before fit": before,
        "peak GiB": _peak(),
    }


def _peak() -> float:
    """Peak of this process's resident memory, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30


def _in_process(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.million", *arguments]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=1_000_000, help="number of samples")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, more=_options)
    if options.write:
        write(options.write, options.n)
        return
    if options.run:
        print(json.dumps(run(options.run)))
        return
    with tempfile.TemporaryDirectory() as folder:
        _in_process("--write", folder, "--n", str(options.n))
        found = json.loads(_in_process("--run", folder).splitlines()[-1])
    rows = [[name, _number(value)] for name, value in found.items()]
    common.write(
        options.out,
        "million",
        title="A million samples",
        body=[
            f"Batch size {BATCH_SIZE}, L2 weight {L2:g}. Losses: of the epoch of "
            "exploration, and of the model at the end.",
            common.table(["", "measured"], rows),
        ],
        targets=[
            Target("peak of the resident memory, GiB", found["peak GiB"], GIB),
            Target("certified gap with the L2 term", found["gap"], 1e-6),
        ],
        settings={"l2": L2, "batch size": BATCH_SIZE},
        measurements=found,
    )


def _number(value: Any) -> str:
    """A number, or several, for a table."""
    if isinstance(value, list):
        return ", ".join(_number(each) for each in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    main()
