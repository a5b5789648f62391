"""The effect of solving to the minimum on loss and test error.

Training loss, gap and test error against iterations, on digits, MNIST and CIFAR-10, for
each start (random gates from the trained base model, learned gates from the explored
model), slope of the gates and L2 weight. The defaults of `solve` are chosen by these
results.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import matplotlib as mpl
import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import Data, Target
from keras_dalign.head.features import FeaturePass
from keras_dalign.numerics.losses import SoftmaxCrossEntropy
from keras_dalign.solving.head_solver import HeadSolver, first_width
from keras_dalign.solving.options import SolveOptions
from keras_dalign.solving.problem import ConvexProblem
from keras_dalign.training.switch import switch

if TYPE_CHECKING:
    from keras_dalign.solving.minimum import Iterate

mpl.use("Agg")
from matplotlib import pyplot as plt

DIGITS, MNIST, CIFAR = "digits", "MNIST 5k", "CIFAR-10 5k"
FILES = {MNIST: "mnist.npz", CIFAR: "cifar10.npz"}
SHAPES = {MNIST: (28, 28, 1), CIFAR: (32, 32, 3)}
L2_WEIGHTS: tuple[float | str, ...] = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, "auto")
SLOPES = (4.0, 20.0, 100.0)
DEFAULT_SLOPE = 20.0
EPOCHS = {DIGITS: 40, MNIST: 6, CIFAR: 15}
# First learning rates of cosine schedules. A constant rate would make solving look
# better than it is.
COSINE = {CIFAR: 0.003}
TOLERANCE = {0.0: 1e-8}
DEFAULT_TOLERANCE = 1e-6
MAX_ITERATIONS = 150
# The mean increase of test error over the base's that a default may have, in points.
ALLOWED = 0.3

ABOUT = (
    "From the trained base model (random gates) and from the explored model (learned "
    "gates); batch-norm statistics re-estimated, so that the error before is the "
    "base's at its best. Digits: MLP 64-64; MNIST and CIFAR-10: ResNet-8, 5,000 "
    "training and 5,000 test images, one seed; on CIFAR-10 15 epochs with a cosine "
    "schedule from 3e-3. The gap is that of the objective with its L2 term; m is the "
    "width that `solve` chooses. The curves do not include the trials of widths and L2 "
    "weights."
)

Run = dict[str, Any]


def read(name: str, folder: Path) -> Data:
    """Digits, or the first 5,000 training and test images of another data set."""
    if name == DIGITS:
        return common.digits()
    with np.load(folder / FILES[name]) as arrays:
        parts = [
            arrays[key][:5000] for key in ("x_train", "y_train", "x_test", "y_test")
        ]
    x, y, x_test, y_test = parts
    return Data(
        (x.reshape(-1, *SHAPES[name]) / 255).astype("float32"),
        y.astype("int64"),
        (x_test.reshape(-1, *SHAPES[name]) / 255).astype("float32"),
        y_test.astype("int64"),
    )


def fresh(name: str, seed: int) -> keras.Model:
    """The base model, untrained."""
    if name == DIGITS:
        return common.mlp(seed)
    keras.utils.set_random_seed(seed)
    return kd.models.resnet(8, SHAPES[name], 10)


def trained(
    name: str, data: Data, gates: str, slope: float, seed: int, cache: Path
) -> keras.Model:
    """An aligned model before its switch, from the cache if it is there."""
    # Random gates: on the fully trained base model. Learned gates: explored for the
    # usual share of the epochs, with the head that is solved.
    key = f"{name}-{gates}-{seed}" + (f"-{slope:g}" if gates == "learned" else "")
    file = cache / f"keras_dalign-tradeoff-{key.replace(' ', '_')}.weights.h5"
    base = fresh(name, seed)
    n = len(data.x)
    model = kd.align(base, n_samples=n, gates=gates, slope=slope, seed=seed)
    inner = base if gates == "random" else model
    if file.exists():
        inner.load_weights(file)
        return model
    epochs = EPOCHS[name]
    if gates == "learned":
        epochs = round(common.EXPLORE * epochs)
    rate: Any = common.LEARNING_RATE
    if name in COSINE:
        steps = EPOCHS[name] * -(-len(data.x) // common.BATCH_SIZE)
        rate = keras.optimizers.schedules.CosineDecay(COSINE[name], steps)
    inner.compile(
        keras.optimizers.Adam(rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    keras.utils.set_random_seed(seed)
    inner.fit(data.x, data.y, batch_size=common.BATCH_SIZE, epochs=epochs, verbose=0)
    inner.save_weights(file)
    return model


def measure(
    name: str,
    data: Data,
    gates: str,
    slope: float,
    seed: int,
    weights: Sequence[float | str],
    cache: Path,
) -> Iterator[Run]:
    """Solves with each L2 weight from one start, and measures every iterate.

    Yields:
        A run for each weight.

    Raises:
        RuntimeError: If the switch kept no features.
    """
    model = trained(name, data, gates, slope, seed, cache)
    _, features = switch(model, data.x, data.y, keep_features=True, digest=True)
    if features is None:
        raise RuntimeError("The switch kept no features.")
    restore = model.snapshot()
    loss = SoftmaxCrossEntropy()
    tested = FeaturePass(model, keep=True).run(data.x_test, data.y_test).feature_set()
    test = ConvexProblem.from_head(model.head, tested, loss)
    at_start = test.logits(test.theta_of(model.head))
    for l2 in weights:
        options = SolveOptions(
            l2=l2,
            tol=TOLERANCE.get(l2, DEFAULT_TOLERANCE) if l2 != "auto" else 1e-6,
            max_iterations=MAX_ITERATIONS,
        )
        restore()
        width = first_width(model.head, options)
        if width is not None:
            model.set_width(width)
        solver = HeadSolver(
            model.head,
            features,
            loss,
            options,
            set_width=None if width is None else model.set_width,
        )
        path: list[Iterate] = []
        solution = solver.solve(path.append)
        last = solution.last
        test = ConvexProblem.from_head(model.head, tested, loss)
        logits = [test.logits(iterate.theta) for iterate in (*path, last)]
        errors = [
            100 * float(np.mean(each.argmax(axis=1) != data.y_test)) for each in logits
        ]
        yield {
            "data": name,
            "gates": gates,
            "slope": slope,
            "l2": l2,
            "chosen l2": solution.l2,
            "width": solver.problem.width,
            "seed": seed,
            "method": solver.method,
            "iterations": last.iteration,
            "gradients": last.evaluations,
            "reason": last.reason,
            "loss": last.loss,
            "gap": last.gap,
            "start error": 100 * float(np.mean(at_start.argmax(1) != data.y_test)),
            "test error": errors[-1],
            "start test loss": test.loss_of(at_start),
            "test loss": test.loss_of(logits[-1]),
            "curve": [
                [iterate.loss, iterate.gap, error]
                for iterate, error in zip((*path, last), errors, strict=True)
            ],
        }


def draw(runs: list[Run], file: Path) -> None:
    """Draws loss, test error and gap against iterations, for the first seed."""
    names = list(dict.fromkeys(run["data"] for run in runs))
    first = [run for run in runs if run["seed"] == 0]
    figure, axes = plt.subplots(
        2 * len(names), 3, figsize=(13, 6.4 * len(names)), squeeze=False
    )
    labels = ("training loss", "test error, %", "gap")
    for row, name in enumerate(names):
        here = [run for run in first if run["data"] == name]
        by_weight = [
            (f"l2 = {run['l2']}", run)
            for run in here
            if run["gates"] == "random" and run["slope"] == DEFAULT_SLOPE
        ]
        by_start = [
            (f"{run['gates']} gates, slope {run['slope']:g}", run)
            for run in here
            if run["l2"] == 0
        ]
        for offset, lines in enumerate((by_weight, by_start)):
            for column, (index, label) in enumerate(
                zip((0, 2, 1), labels, strict=True)
            ):
                axis = axes[2 * row + offset, column]
                for text, run in lines:
                    values = [point[index] for point in run["curve"]]
                    axis.plot(range(len(values)), values, label=text, linewidth=1.2)
                if index != 2:
                    axis.set_yscale("log")
                axis.set_xlabel("iterations")
                axis.set_ylabel(label)
                axis.set_title(name)
            axes[2 * row + offset, 0].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def summary(runs: list[Run]) -> list[list[str]]:
    """A row of means over the seeds for each start, slope and weight."""
    rows = []
    keys = dict.fromkeys(
        (run["data"], run["gates"], run["slope"], run["l2"]) for run in runs
    )
    for name, gates, slope, l2 in keys:
        of_key = [
            run
            for run in runs
            if (run["data"], run["gates"], run["slope"], run["l2"])
            == (name, gates, slope, l2)
        ]
        chosen = sorted({run["chosen l2"] for run in of_key})
        auto = "auto: " + ", ".join(f"{weight:.0e}" for weight in chosen)
        rows.append(
            [
                name,
                gates,
                f"{slope:g}",
                auto if l2 == "auto" else f"{l2:g}",
                ", ".join(str(m) for m in sorted({run["width"] for run in of_key})),
                f"{common.mean(of_key, 'iterations'):.0f}",
                f"{common.mean(of_key, 'loss'):.3g}",
                f"{max(run['gap'] for run in of_key):.1e}",
                f"{common.mean(of_key, 'start error'):.2f}",
                common.plus_minus(of_key, "test error"),
                f"{common.mean(of_key, 'start test loss'):.3g}",
                f"{common.mean(of_key, 'test loss'):.3g}",
            ]
        )
    return rows


def excess(runs: list[Run], **wanted: Any) -> float:
    """Mean increase of test error from the start, in points, of the selected runs."""
    found = [
        run["test error"] - run["start error"]
        for run in runs
        if all(run[key] == value for key, value in wanted.items())
    ]
    return float(np.mean(found)) if found else math.nan


def _weight(text: str) -> float | str:
    return text if text == "auto" else float(text)


def latest(runs: list[Run]) -> list[Run]:
    """The last run of each setting, in the order of first appearance."""
    keys = ("data", "seed", "gates", "slope", "l2")
    return list({tuple(run[key] for key in keys): run for run in runs}.values())


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", nargs="*", default=[DIGITS, MNIST, CIFAR])
    parser.add_argument("--slopes", nargs="+", type=float, default=SLOPES)
    parser.add_argument("--l2", nargs="+", type=_weight, default=L2_WEIGHTS)
    parser.add_argument(
        "--earlier",
        nargs="*",
        type=Path,
        default=[],
        help="results files of earlier runs, shown as well; later ones replace them",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder of mnist.npz and cifar10.npz",
        default=common.ROOT.parent / "shared" / "data",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder for the trained networks",
    )


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, seeds=3, more=_options)
    runs: list[Run] = []
    for file in options.earlier:
        runs += json.loads(file.read_text())["measurements"]
    for name in options.data:
        data = read(name, options.folder)
        seeds = options.seeds if name == DIGITS else 1
        for seed in range(seeds):
            for gates in ("random", "learned"):
                for slope in options.slopes:
                    if name != DIGITS and gates == "learned" and slope != DEFAULT_SLOPE:
                        continue
                    runs += measure(
                        name, data, gates, slope, seed, options.l2, options.cache
                    )
                    print(name, seed, gates, slope, flush=True)
    runs = latest(runs)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(runs, options.out / "solve_tradeoff.png")
    header = [
        "data",
        "gates",
        "slope",
        "l2",
        "m",
        "iterations",
        "training loss",
        "largest gap",
        "test error before, %",
        "test error, %",
        "test loss before",
        "test loss",
    ]
    common.write(
        options.out,
        "solve_tradeoff",
        title="What solving costs and gains",
        body=[
            ABOUT,
            "![Curves](solve_tradeoff.png)",
            common.table(header, summary(runs)),
        ],
        targets=[
            Target(
                f"{name}, random gates, slope {DEFAULT_SLOPE:g}, l2 {l2}: mean test "
                "error above that before, points",
                excess(runs, data=name, gates="random", slope=DEFAULT_SLOPE, l2=l2),
                ALLOWED,
            )
            for name in dict.fromkeys(run["data"] for run in runs)
            for l2 in (0.0, "auto")
        ],
        settings={"epochs": EPOCHS, "max_iterations": MAX_ITERATIONS},
        measurements=runs,
    )


if __name__ == "__main__":
    main()
