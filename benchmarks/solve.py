"""Full-batch solve: time with different products, and time and memory on MNIST.

Digits, with true, partly random and random labels: from the explored model to a gap of
1e-10 by SciPy's L-BFGS-B. It uses explicit features, structured products in float64, or
structured products in float32 until float64 is needed, as `solve` does for large
problems. MNIST: the features of a trained ResNet-8, to a gap of 1e-6, with the peak of
the memory. `benchmarks.peers` compares with other solvers.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import RANDOM, Target
from keras_dalign.certification.solver import solve
from keras_dalign.head.features import FeaturePass
from keras_dalign.numerics.gram import explicit_features
from keras_dalign.numerics.losses import SoftmaxCrossEntropy
from keras_dalign.solving.minimum import minimize
from keras_dalign.solving.problem import ConvexProblem
from keras_dalign.solving.products import NumpyProducts, Products, SampleLoss

if TYPE_CHECKING:
    from keras_dalign.numerics import Array

DIGITS_GAP = 1e-10
MNIST_GAP = 1e-6
RANDOM_PARTS = (0.0, 0.2, 1.0)
EPOCHS_EXPLORED = 24
SOLVE = "float32, then float64"
STRUCTURED = "float64"
EXPLICIT = "float64, explicit features"
MNIST_EPOCHS = 5
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def relabelled(y: np.ndarray, part: float, seed: int) -> np.ndarray:
    """Labels with a fraction `part` replaced by random ones."""
    rng = np.random.default_rng([seed, 7])
    chosen = rng.random(len(y)) < part
    return np.where(chosen, rng.integers(0, 10, len(y)), y)


def explored(part: float, seed: int) -> tuple[ConvexProblem, Array]:
    """The problem of a digits model at its switch, and its starting point."""
    data = common.digits()
    y = relabelled(data.y, part, seed)
    model = common.compiled(RANDOM, common.mlp(seed), len(data.x), seed)
    model.optimizer.explore = EPOCHS_EXPLORED
    keras.utils.set_random_seed(seed)
    model.fit(data.x, y, batch_size=64, epochs=EPOCHS_EXPLORED, verbose=0)
    # With this tolerance, `solve` switches and takes no step.
    solve(model, data.x, y, tol=1e6, l2=0, verbose=0)
    features = FeaturePass(model, keep=True).run(data.x, y).feature_set()
    problem = ConvexProblem.from_head(model.head, features, SoftmaxCrossEntropy())
    return problem, problem.theta_of(model.head)


class ExplicitFeatures(Products):
    """Products with the explicit features of every class, `n x m d` each.

    Args:
        problem: The problem.
    """

    dtype = np.dtype("float64")

    def __init__(self, problem: ConvexProblem) -> None:
        super().__init__(problem.rows, problem.gates, problem.units)
        features = problem.features
        self.phis = [
            explicit_features(features, *problem.gates.of_output(c), problem.slope)
            for c in range(problem.units)
        ]

    def product(self, theta: Array) -> Array:
        """See `Products`."""
        q = theta[: -self.units].reshape(self.rows.d, self.units, -1)
        by_class = q.transpose(1, 2, 0).reshape(self.units, -1)
        products = [phi @ q_c for phi, q_c in zip(self.phis, by_class, strict=True)]
        return np.stack(products, axis=1) + theta[-self.units :]

    def transposed_product(self, u: Array) -> Array:
        """See `Products`."""
        gradient = [phi.T @ u[:, c] for c, phi in enumerate(self.phis)]
        by_class = np.stack(gradient).reshape(self.units, -1, self.rows.d)
        q = by_class.transpose(2, 0, 1).ravel()
        return np.concatenate([q, u.sum(axis=0)])

    def loss_and_gradient(
        self, theta: Array, samples: SampleLoss
    ) -> tuple[Array, float, Array]:
        """See `Products`."""
        logits = samples.offset + self.product(theta)
        values, slopes = samples.loss.value_and_gradient(logits, samples.targets)
        slopes *= samples.shares[:, None]
        loss = float(samples.shares @ values)
        return logits, loss, self.transposed_product(slopes)


def with_products(problem: ConvexProblem, fast: Products) -> ConvexProblem:
    """A copy of the problem with other products for the iterations."""
    other = copy.copy(problem)
    vars(other)["fast"] = fast
    if fast.dtype == np.float64:
        vars(other)["exact"] = fast
    return other


def run(problem: ConvexProblem, start: Array) -> dict[str, Any]:
    """Iterations, gradients, gap and seconds of one minimisation."""
    begin = time.perf_counter()
    last = minimize(problem, start, method="lbfgs", tol=DIGITS_GAP)
    return {
        "iterations": last.iteration,
        "gradients": last.evaluations,
        "gap": last.gap,
        "seconds": time.perf_counter() - begin,
    }


def measure_digits(part: float, seed: int, repeats: int) -> dict[str, Any]:
    """Measures the three kinds of products on one set of labels."""
    problem, start = explored(part, seed)
    rough = NumpyProducts(problem.rows, problem.gates, problem.units, np.float32)
    kinds = {
        SOLVE: with_products(problem, rough),
        STRUCTURED: with_products(problem, problem.exact),
        EXPLICIT: with_products(problem, ExplicitFeatures(problem)),
    }
    ways: dict[str, Callable[[], Any]] = {
        name: functools.partial(run, kind, start) for name, kind in kinds.items()
    }
    found = in_turn(ways, repeats)
    return {"data": "digits", "random labels": part, "seed": seed, "ways": found}


def in_turn(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Runs the ways in turns, several times, and takes the median times."""
    runs = [{name: way() for name, way in ways.items()} for _ in range(repeats)]
    return {
        name: {**runs[0][name], "seconds": median(run[name]["seconds"] for run in runs)}
        for name in ways
    }


def trained_resnet(path: Path, cache: Path) -> tuple[keras.Model, common.Data]:
    """The first 10,000 training images of MNIST and a ResNet-8 trained on them."""
    with np.load(path) as arrays:
        x, y = arrays["x_train"][:10_000], arrays["y_train"][:10_000]
        x_test, y_test = arrays["x_test"], arrays["y_test"]
    data = common.Data(
        (x / 255).astype("float32"),
        y.astype("int64"),
        (x_test / 255).astype("float32"),
        y_test.astype("int64"),
    )
    file = cache / f"keras_dalign-mnist-resnet8-{MNIST_EPOCHS}.keras"
    if file.exists():
        return keras.models.load_model(file), data
    keras.utils.set_random_seed(0)
    base = kd.models.resnet(8, (28, 28, 1), 10)
    base.compile(keras.optimizers.Adam(1e-3), loss=LOSS, metrics=["accuracy"])
    base.fit(data.x, data.y, batch_size=64, epochs=MNIST_EPOCHS, verbose=0)
    base.save(file)
    return base, data


def test_error(model: keras.Model, data: common.Data) -> float:
    """Test error in percent."""
    logits = np.asarray(model.predict(data.x_test, batch_size=256, verbose=0))
    return 100.0 * float(np.mean(logits.argmax(axis=1) != data.y_test))


def measure_mnist(path: Path, cache: Path, features: str | None) -> dict[str, Any]:
    """Time, memory and test error of a solve on 10,000 images."""
    base, data = trained_resnet(path, cache)
    runs = []
    for traced in (False, True):
        model = kd.align(
            base, n_samples=len(data.x), features=features, seed=0, copy=True
        )
        if traced:
            tracemalloc.start()
        result = solve(model, data.x, data.y, tol=MNIST_GAP, l2=0, verbose=0)
        peak = tracemalloc.get_traced_memory()[1] if traced else 0
        tracemalloc.stop()
        runs.append((result, peak))
    result, peak = runs[0][0], runs[1][1]
    n, c, m = len(data.x), model.head.units, model.head.width
    error_of_base = test_error(base, data)
    kd.reestimate_batch_norm(base, data.x)
    return {
        "data": "MNIST",
        "features": features,
        "n": n,
        "outputs": c,
        "width": m,
        "d": model.head.q.shape[0],
        "iterations": result.iterations,
        "gap": result.gap,
        "certified gap": result.certificate.gap,
        "seconds": result.seconds,
        "peak bytes": peak,
        "peak / (n m C floats)": peak / (8 * n * m * c),
        "test error": test_error(model, data),
        "test error of the base": error_of_base,
        "test error of the base, re-estimated": test_error(base, data),
    }


def _mnist_row(run: dict[str, Any]) -> list[str]:
    mib, floats = run["peak bytes"] / 2**20, run["peak / (n m C floats)"]
    return [
        f"{run['d'] - 1:,}",
        str(run["width"]),
        str(run["iterations"]),
        f"{run['gap']:.1e}",
        f"{run['certified gap']:.1e}",
        f"{run['seconds']:.0f}",
        f"{mib:.0f} MiB ({floats:.2f})",
        f"{run['test error']:.2f}",
    ]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--data",
        type=Path,
        default=common.DATA / "mnist.npz",
        help="MNIST as .npz",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder for the trained network",
    )


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, seeds=1, more=_options)
    common.warm_up()
    digits = [
        measure_digits(part, seed, options.repeats)
        for part in RANDOM_PARTS
        for seed in range(options.seeds)
    ]
    rows = []
    for run in digits:
        for name, way in run["ways"].items():
            rows.append(
                [
                    f"{100 * run['random labels']:.0f} %",
                    name,
                    str(way["iterations"]),
                    f"{way['gap']:.1e}",
                    f"{way['seconds']:.2f}",
                    f"{way['seconds'] / run['ways'][SOLVE]['seconds']:.1f}",
                ]
            )
    about = (
        "Digits, 1,200 images, MLP 64-64 after 24 epochs, random gates that the 10 "
        f"outputs share: iterations and seconds to a gap of {DIGITS_GAP:g} by L-BFGS "
        f"with three kinds of products; medians of {options.repeats} runs in turns. "
        "The first kind is that of `solve` for large problems: it continues in float64 "
        "when float32 makes no further progress."
    )
    header = ["random labels", "products", "iterations", "gap", "seconds", "/ first's"]
    body = [about, common.table(header, rows)]
    targets = []
    for run in digits:
        part, ways = run["random labels"], run["ways"]
        targets += [
            Target(f"{part:.0%} random labels: gap", ways[SOLVE]["gap"], DIGITS_GAP),
            Target(
                f"{part:.0%} random labels: seconds over those with explicit features",
                ways[SOLVE]["seconds"] / ways[EXPLICIT]["seconds"],
                1.0,
            ),
        ]
    runs: list[dict[str, Any]] = [*digits]
    if options.data.exists():
        mnist = [
            measure_mnist(options.data, options.cache, features)
            for features in (None, "auto")
        ]
        runs += mnist
        about_mnist = (
            f"MNIST, 10,000 images, ResNet-8 trained for {MNIST_EPOCHS} epochs (test "
            f"error {mnist[0]['test error of the base']:.2f} %, and "
            f"{mnist[0]['test error of the base, re-estimated']:.2f} % with "
            "re-estimated batch-norm statistics), gated units on its 64 features, and "
            "on its last feature map in a grid, as by default. Seconds with all passes "
            "over the data; peak memory also in n m C floats:"
        )
        header = ["features", "m", "iterations", "gap", "certified gap", "seconds"]
        header += ["peak memory", "test error, %"]
        body += [about_mnist, common.table(header, [_mnist_row(run) for run in mnist])]
        targets += [
            Target(
                "MNIST: certified gap",
                max(run["certified gap"] for run in mnist),
                MNIST_GAP,
            ),
            *(
                Target(
                    f"MNIST, {run['d'] - 1} features: peak memory, in n m C floats",
                    run["peak / (n m C floats)"],
                    3.0,
                )
                for run in mnist
            ),
        ]
    common.write(
        options.out,
        "solve",
        title="Solve",
        body=body,
        targets=targets,
        settings={
            "repeats": options.repeats,
            "epochs_explored": EPOCHS_EXPLORED,
            "mnist_epochs": MNIST_EPOCHS,
        },
        measurements=runs,
    )


if __name__ == "__main__":
    main()
