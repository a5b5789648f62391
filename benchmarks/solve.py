"""Full-batch solve: time to a gap, beside general optimizers, and memory.

Digits, with true, partly random and random labels: from the explored model to a gap of
1e-10, by `solve`'s method and by SciPy's L-BFGS-B on the explicit features; and with an
L2 term, one set of gates for all classes, beside scikit-learn. MNIST: the features of a
trained ResNet-8, to a gap of 1e-6, with the peak of the memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import keras
import numpy as np
import scipy.optimize
from keras_dalign.solving.descent import choose_method, descend
from sklearn.linear_model import LogisticRegression

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import RANDOM, Target
from keras_dalign.head.features import FeaturePass
from keras_dalign.numerics.gram import Array, explicit_features
from keras_dalign.numerics.losses import SoftmaxCrossEntropy
from keras_dalign.promises.solver import solve
from keras_dalign.solving.problem import ConvexProblem

DIGITS_GAP = 1e-10
MNIST_GAP = 1e-6
RANDOM_PARTS = (0.0, 0.2, 1.0)
EPOCHS_EXPLORED = 24
L2 = 1e-5
MNIST_EPOCHS = 5
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def relabelled(y: np.ndarray, part: float, seed: int) -> np.ndarray:
    """Labels of which a part is replaced by random ones."""
    rng = np.random.default_rng([seed, 7])
    chosen = rng.random(len(y)) < part
    return np.where(chosen, rng.integers(0, 10, len(y)), y)


def explored(part: float, seed: int) -> tuple[ConvexProblem, Array]:
    """The problem of a digits model at its switch, and where it starts."""
    data = common.digits()
    y = relabelled(data.y, part, seed)
    model = common.compiled(RANDOM, common.mlp(seed), len(data.x), seed)
    model.optimizer.explore = EPOCHS_EXPLORED
    keras.utils.set_random_seed(seed)
    model.fit(data.x, y, batch_size=64, epochs=EPOCHS_EXPLORED, verbose=0)
    # To the switch and no further.
    solve(model, data.x, y, tol=1e6, verbose=0)
    features = FeaturePass(model, keep=True).run(data.x, y).feature_set()
    problem = ConvexProblem.of_head(model.head, features, SoftmaxCrossEntropy())
    return problem, problem.theta_of(model.head)


def ours(problem: ConvexProblem, start: Array, tol: float, l2: float = 0.0) -> Any:
    """Iterations, seconds and the gap by the method that `solve` picks."""
    begin = time.perf_counter()
    method, _ = choose_method(problem, "auto", l2)
    *_, last = descend(problem, start, method=method, tol=tol, l2=l2)
    return {
        "iterations": last.iteration,
        "gradients": last.evaluations,
        "gap": last.gap,
        "value": last.value,
        "seconds": time.perf_counter() - begin,
    }


def by_scipy(
    value_and_gradient: Callable[[Array], tuple[float, Array]],
    start: Array,
    tol: float,
    pairs: int,
) -> Any:
    """SciPy's L-BFGS-B until the loss is at most `tol`."""
    evaluations = 0
    last = np.inf

    def counted(theta: Array) -> tuple[float, Array]:
        nonlocal evaluations
        evaluations += 1
        return value_and_gradient(theta)

    def stop(intermediate_result: Any) -> None:
        nonlocal last
        last = intermediate_result.fun
        if last <= tol:
            raise StopIteration

    begin = time.perf_counter()
    found = scipy.optimize.minimize(
        counted,
        start,
        jac=True,
        method="L-BFGS-B",
        callback=stop,
        options={
            "maxcor": pairs,
            "ftol": 0,
            "gtol": 0,
            "maxiter": 10_000,
            "maxfun": 100_000,
        },
    )
    return {
        "iterations": found.nit,
        "gradients": evaluations,
        "gap": last,
        "seconds": time.perf_counter() - begin,
    }


class ExplicitFeatures:
    """The same loss on the explicit features of every class, `n x m d` each."""

    def __init__(self, problem: ConvexProblem) -> None:
        self.problem = problem
        self.phis = [
            explicit_features(
                problem.features, problem.r[:, c], problem.w[c], problem.slope
            )
            for c in range(problem.units)
        ]

    def value_and_gradient(self, theta: Array) -> tuple[float, Array]:
        """As `ConvexProblem.value_and_gradient`; `theta` class by class."""
        problem = self.problem
        q = theta[: -problem.units].reshape(problem.units, -1)
        products = [phi @ q_c for phi, q_c in zip(self.phis, q, strict=True)]
        logits = problem.offset + np.stack(products, axis=1) + theta[-problem.units :]
        slopes = problem.loss_gradient(logits)
        gradient = [phi.T @ slopes[:, c] for c, phi in enumerate(self.phis)]
        gradient.append(slopes.sum(axis=0))
        return problem.loss_of(logits), np.concatenate(gradient)


def measure_digits(part: float, seed: int, repeats: int) -> dict[str, Any]:
    """One set of labels: the four ways, in turn, medians of the times."""
    problem, start = explored(part, seed)
    explicit = ExplicitFeatures(problem)
    ways: dict[str, Callable[[], Any]] = {
        "solve": lambda: ours(problem, start, DIGITS_GAP),
        "L-BFGS-B, structured": lambda: by_scipy(
            problem.value_and_gradient, start, DIGITS_GAP, 30
        ),
        "L-BFGS-B, explicit, 30 pairs": lambda: by_scipy(
            explicit.value_and_gradient, start, DIGITS_GAP, 30
        ),
        "L-BFGS-B, explicit, 10 pairs": lambda: by_scipy(
            explicit.value_and_gradient, start, DIGITS_GAP, 10
        ),
    }
    found = in_turn(ways, repeats)
    return {"data": "digits", "random labels": part, "seed": seed, "ways": found}


def in_turn(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Runs the ways one after the other, several times, and takes median times."""
    runs = [{name: way() for name, way in ways.items()} for _ in range(repeats)]
    return {
        name: {**runs[0][name], "seconds": median(run[name]["seconds"] for run in runs)}
        for name in ways
    }


def measure_peers(seed: int, repeats: int) -> dict[str, Any]:
    """One set of gates for all classes and an L2 term, beside scikit-learn."""
    problem, _ = explored(0.2, seed)
    r = np.repeat(problem.r[:, :1], problem.units, axis=1)
    w = np.repeat(problem.w[:1], problem.units, axis=0)
    shared = ConvexProblem(
        problem.features,
        r,
        w,
        problem.slope,
        np.zeros_like(problem.offset),
        problem.targets,
        None,
        problem.loss,
    )
    phi = explicit_features(shared.features, r[:, 0], w[0], shared.slope)
    # The bias has its L2 term, too.
    phi = np.concatenate([phi, np.ones((shared.n, 1))], axis=1)
    labels = shared.targets.argmax(axis=1)
    start = np.zeros(shared.size)
    best = ours(shared, start, 1e-13, L2)["value"]

    def peer(solver: str, tol: float) -> Any:
        model = LogisticRegression(
            C=1 / (L2 * shared.n),
            tol=tol,
            solver=solver,
            fit_intercept=False,
            max_iter=10_000,
        )
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(phi, labels)
        seconds = time.perf_counter() - begin
        logits = phi @ model.coef_.T
        value = shared.loss_of(logits) + L2 / 2 * np.sum(model.coef_**2)
        iterations = int(np.max(model.n_iter_))
        return {"iterations": iterations, "gap": value - best, "seconds": seconds}

    ways: dict[str, Callable[[], Any]] = {
        "solve": lambda: ours(shared, start, 1e-9, L2),
        "scikit-learn newton-cg": lambda: peer("newton-cg", 1e-6),
        "scikit-learn lbfgs": lambda: peer("lbfgs", 1e-6),
    }
    found = in_turn(ways, repeats)
    found["solve"]["gap"] = max(found["solve"]["value"] - best, 0.0)
    return {"data": "digits, shared gates", "seed": seed, "ways": found}


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
        result = solve(model, data.x, data.y, tol=MNIST_GAP, verbose=0)
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
        default=common.ROOT.parent / "shared/data/mnist.npz",
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
    peers = measure_peers(0, options.repeats)
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
                    f"{way['seconds'] / run['ways']['solve']['seconds']:.1f}",
                ]
            )
    peer_rows = [
        [name, str(way["iterations"]), f"{way['gap']:.1e}", f"{way['seconds']:.2f}"]
        for name, way in peers["ways"].items()
    ]
    about = (
        "Digits, 1,200 images, MLP 64-64 after 24 epochs, random gates (10 outputs): "
        f"iterations and seconds to a gap of {DIGITS_GAP:g}; medians of "
        f"{options.repeats} runs in turn."
    )
    about_peers = (
        "The same features, 20 % random labels, one set of gates for all classes, L2 "
        f"weight {L2:g}; the gap is that to the optimum:"
    )
    header = ["random labels", "method", "iterations", "gap", "seconds", "/ solve's"]
    body = [
        about,
        common.table(header, rows),
        about_peers,
        common.table(["method", "iterations", "gap", "seconds"], peer_rows),
    ]
    targets = []
    for run in digits:
        part, ways = run["random labels"], run["ways"]
        slower = min(way["seconds"] for name, way in ways.items() if "explicit" in name)
        targets += [
            Target(f"{part:.0%} random labels: gap", ways["solve"]["gap"], DIGITS_GAP),
            Target(
                f"{part:.0%} random labels: seconds over L-BFGS-B's, explicit features",
                ways["solve"]["seconds"] / slower,
                1.0,
            ),
        ]
    runs: list[dict[str, Any]] = [*digits, peers]
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
            "l2_of_peers": L2,
            "mnist_epochs": MNIST_EPOCHS,
        },
        measurements=runs,
    )


if __name__ == "__main__":
    main()
