"""`solve(l2="auto")` without the trunk: growth with the samples, and memory.

On the features of the networks of `benchmarks.whole`: the seconds that the L2 path, the
widths and the minimum take for 1,000 to 50,000 samples, and the exponent of a power
fitted to them; the seconds for all of MNIST, also relative to ten epochs of training;
and the peak of NumPy's memory beyond the features.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from statistics import median
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import Data, Target
from benchmarks.whole import add_options, read, trained, training_seconds
from keras_dalign.head.features import FeatureSet
from keras_dalign.numerics.losses import SoftmaxCrossEntropy
from keras_dalign.solving.head_solver import HeadSolver, first_width
from keras_dalign.solving.options import SolveOptions
from keras_dalign.training.switch import switch

SIZES = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000)


def features_of(base: Any, data: Data) -> tuple[Any, FeatureSet]:
    """An aligned model after its switch, and its features of all samples."""
    model = kd.align(base, n_samples=len(data.x), seed=0, copy=True)
    width = first_width(model.head, SolveOptions(l2="auto"))
    _, features = switch(
        model,
        data.x,
        data.y,
        width=width,
        replace_dense=True,
        rank_matters=False,
        keep_features=True,
        digest=True,
    )
    return model, features


def part_of(features: FeatureSet, rows: np.ndarray) -> FeatureSet:
    """Some of the samples."""
    z = keras.tree.map_structure(lambda leaf: leaf[rows], features.z)
    digests = [features.digests[row] for row in rows]
    return FeatureSet(z, features.y[rows], None, features.batch_size, digests)


def solve_features(model: Any, features: FeatureSet) -> dict[str, Any]:
    """Times the L2 path, the widths and the minimum, without the trunk."""
    model.set_width(8)
    begin = time.perf_counter()
    solver = HeadSolver(
        model.head,
        features,
        SoftmaxCrossEntropy(),
        SolveOptions(l2="auto"),
        set_width=model.set_width,
    )
    solution = solver.solve()
    return {
        "n": len(features.y),
        "seconds": time.perf_counter() - begin,
        "width": model.head.width,
        "gap": solution.gap,
        "gradients": solution.last.evaluations,
    }


def growth(model: Any, features: FeatureSet, repeats: int) -> dict[str, Any]:
    """Seconds for larger and larger parts of the samples, and the fitted exponent."""
    order = np.random.default_rng(0).permutation(len(features.y))
    runs = []
    for size in SIZES:
        part = part_of(features, np.sort(order[:size]))
        found = [
            solve_features(model, part) for _ in range(repeats if size < 20_000 else 1)
        ]
        seconds = median(run["seconds"] for run in found)
        runs.append({**found[-1], "seconds": seconds})
    logs = np.log([[run["n"], run["seconds"]] for run in runs])
    exponent = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
    return {"runs": runs, "exponent": exponent}


def memory(model: Any, features: FeatureSet) -> dict[str, float]:
    """Peak of NumPy's memory beyond the features, in units of `n m` float64 numbers."""
    tracemalloc.start()
    found = solve_features(model, features)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    numbers = found["n"] * found["width"]
    return {"peak bytes": peak, "width": found["width"], "floats": peak / 8 / numbers}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All runs on one data set."""
    data = read(options.data, name)
    base = trained(name, data, 0, options.cache)
    model, features = features_of(base, data)
    found = {
        "all": solve_features(model, features),
        **growth(model, features, options.repeats),
        "memory": memory(model, features),
    }
    if name == "mnist":
        found["base seconds"] = training_seconds(name, data, 0)
    print(json.dumps(found), flush=True)
    return found


def targets_of(found: dict[str, Any]) -> list[Target]:
    """The figures that must be shown."""
    targets = [
        Target(f"{name}: exponent of the growth", runs["exponent"], 1.1)
        for name, runs in found.items()
    ]
    if "cifar10" in found:
        floats = found["cifar10"]["memory"]["floats"]
        targets.append(Target("CIFAR-10: memory beyond features, n m", floats, 1.5))
    if "mnist" in found:
        seconds = found["mnist"]["all"]["seconds"]
        part = seconds / found["mnist"]["base seconds"]
        targets.append(Target("MNIST: path and solve, seconds", seconds, 15.0))
        targets.append(Target("MNIST: path and solve / training", part, 0.05))
    return targets


def _options(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=3)


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, more=_options)
    common.warm_up()
    found = {name: measure(name, options) for name in options.sets}
    rows = [
        [
            name,
            f"{run['n']:,}",
            f"{run['width']}",
            f"{run['gradients']}",
            f"{run['gap']:.1e}",
            f"{run['seconds']:.2f}",
        ]
        for name, runs in found.items()
        for run in [*runs["runs"], runs["all"]]
    ]
    header = ["data", "n", "width", "gradients, last", "gap", "seconds"]
    common.write(
        options.out,
        "growth",
        title="Growth with the samples, and memory",
        body=[common.table(header, rows)],
        targets=targets_of(found),
        settings={"repeats": options.repeats},
        measurements=found,
    )


if __name__ == "__main__":
    main()
