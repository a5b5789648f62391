"""Products with the gated features, against the machine's matrix multiplications.

For several shapes, the loss and its gradient (`Phi theta`, softmax, `Phi^T u`) are
timed in NumPy float64, in NumPy float32 and in float32 on the device of Keras's
backend. They are compared with two plain matrix multiplications of the same shapes in
NumPy float32. `solve` uses NumPy float32 on CPUs, and the device on accelerators. The
kinds take turns, each with a few calls in a row, and each number is the median over the
rounds. Run it once for each backend.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import Target
from keras_dalign.numerics.losses import SoftmaxCrossEntropy
from keras_dalign.solving.device_products import DeviceProducts
from keras_dalign.solving.feature_rows import FeatureRows, Normalisation
from keras_dalign.solving.gates import Gates
from keras_dalign.solving.products import NumpyProducts, SampleLoss

# Samples, features without the constant, outputs and width, by description.
SHAPES = {
    "grid of a ResNet-8, narrow": (20_000, 1024, 10, 8),
    "grid of a ResNet-8, wide": (20_000, 1024, 10, 64),
    "100 outputs": (5_000, 1024, 100, 16),
    "pooled features": (50_000, 64, 10, 32),
    "128 features": (50_000, 128, 10, 16),
}
IN_A_ROW = 3


def problem(n: int, p: int, width: int) -> tuple[FeatureRows, Gates]:
    """Random features that are normalised block by block, and shared gates."""
    rng = np.random.default_rng(0)
    raw = rng.random((n, p), dtype="float32")
    moments = raw.mean(axis=0, dtype=float), 1.0 / raw.std(axis=0, dtype=float)
    r = rng.standard_normal((p + 1, 1, width)) / np.sqrt(p + 1)
    return (
        FeatureRows(raw, Normalisation(*moments)),
        Gates(r, np.full((1, width), width**-0.5), 20.0),
    )


def measure(shape: tuple[int, int, int, int], rounds: int) -> dict[str, float]:
    """Rates in Gflop/s, of the multiplications and of the products."""
    n, p, units, width = shape
    rows, gates = problem(n, p, width)
    rng = np.random.default_rng(1)
    theta = rng.standard_normal((p + 1) * units * width + units)
    q = theta[: p * units * width].reshape(p, -1).astype("float32")

    def gemm() -> None:
        rows.raw.T @ (rows.raw @ q)

    targets = SoftmaxCrossEntropy().targets(rng.integers(0, units, n), units)
    samples = SampleLoss(
        SoftmaxCrossEntropy(), np.zeros((n, units)), targets, np.full(n, 1 / n)
    )

    def sweep(products: Any) -> Callable[[], Any]:
        return lambda: products.loss_and_gradient(theta, samples)

    kinds = {
        "sgemm": gemm,
        "numpy float64": sweep(NumpyProducts(rows, gates, units)),
        "numpy float32": sweep(NumpyProducts(rows, gates, units, np.float32)),
        "device float32": sweep(DeviceProducts(rows, gates, units)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for round_ in range(rounds + 1):
        for name, run in kinds.items():
            # Wait until threads of the kind before are no longer busy waiting.
            time.sleep(0.2)
            # Several calls in a row, as in a solve: the features may stay in a cache.
            run()
            begin = time.perf_counter()
            for _ in range(IN_A_ROW):
                run()
            if round_:  # The first one compiles.
                seconds[name].append((time.perf_counter() - begin) / IN_A_ROW)
    flop = 4.0 * n * p * units * width
    return {name: flop / median(times) / 1e9 for name, times in seconds.items()}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=9)


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, more=_options)
    backend = keras.backend.backend()
    found = {name: measure(shape, options.rounds) for name, shape in SHAPES.items()}
    shares = {
        name: max(r["numpy float32"], r["device float32"]) / r["sgemm"]
        for name, r in found.items()
    }
    against = {
        name: r["device float32"] / r["numpy float32"] for name, r in found.items()
    }
    targets = [
        Target(
            "the better one's least share of sgemm", min(shares.values()), 0.6, True
        ),
        Target("device over NumPy float32, least", min(against.values()), 1.0, True),
    ]
    rows = [
        [
            name,
            " x ".join(f"{size:,}" for size in SHAPES[name]),
            *(f"{rates[kind]:.0f}" for kind in rates),
            f"{shares[name]:.2f}",
        ]
        for name, rates in found.items()
    ]
    header = ["shape", "n x p x C x m", *next(iter(found.values())), "better / sgemm"]
    common.write(
        options.out,
        f"products_{backend}",
        title=f"Products with the gated features, {backend}",
        body=[
            f"Gflop/s of a loss and its gradient, medians of {options.rounds} rounds.",
            common.table(header, rows),
        ],
        targets=targets,
        settings={"shapes": SHAPES, "rounds": options.rounds},
        measurements=found,
    )


if __name__ == "__main__":
    main()
