"""A linear probe's path of 45 L2 weights: warm starts against scikit-learn's fits.

DINOv2's protocol for a linear probe: 45 values of `C` from 1e-6 to 1e5, a tenth of the
samples held out, the best `C` by held-out accuracy, and a fit with it on all samples.
scikit-learn's L-BFGS fits each weight from zero. Our solver goes from strong to weak
weights. Each starts at the minimum of the weight before, and ends when its certified
gap is at most that of scikit-learn at this weight.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import common, trunk_features
from benchmarks.common import Target
from benchmarks.peer_worker import Peers
from benchmarks.peers import LINEAR, Case, gap_at
from benchmarks.trunk_features import GRID, POOLED, Features
from keras_dalign.solving.minimum import minimize

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.solving.problem import ConvexProblem

WEIGHTS = 45
STRONGEST, WEAKEST = -6.0, 5.0
HELD_OUT = 0.1
# scikit-learn's default, and DINOv2's number of iterations.
PEER_TOL = 1e-4
ITERATIONS = 1000
SHOWN = 4
RATIO = 0.2
SIDES = ("theirs", "ours")

ABOUT = (
    "Softmax regression of ten classes on features of {features}; {n:,} samples, a "
    f"tenth held out; {WEIGHTS} values of C from 1e-6 to 1e5, `l2 = 1 / (C n)`; the "
    "constant's weights are penalised by both. scikit-learn: lbfgs, "
    f"tol {PEER_TOL:g} (its default), at most {ITERATIONS} iterations. The gap is the "
    "lesser of `(||gradient|| + rounding)^2 / (2 l2)` and the objective itself, in "
    "float64: for the weakest weights it certifies neither. Each weight is fitted by "
    "both, one after the other; every fourth one is shown."
)

Measured = dict[str, Any]


def split(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the samples to train on, and of those held out."""
    order = np.random.default_rng(seed).permutation(n)
    held_out = round(HELD_OUT * n)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


class Ours:
    """Our solver's path: a problem, and the parameters after the last weight."""

    def __init__(self, problem: ConvexProblem) -> None:
        self.problem = problem
        self.theta = np.zeros(problem.size)

    def fit(self, l2: float, gap: float) -> Measured:
        """Minimises with another weight until the gap is at most `gap`."""
        begin = time.perf_counter()
        last = minimize(
            self.problem,
            self.theta,
            method="lbfgs",
            tol=gap,
            l2=l2,
            max_iterations=ITERATIONS,
        )
        self.theta = last.theta
        return {
            "seconds": time.perf_counter() - begin,
            "iterations": last.iteration,
            "gap": last.gap,
            "value": last.value,
        }


def theirs(case: Case, problem: ConvexProblem, peers: Peers, l2: float) -> Any:
    """A cold fit of scikit-learn, and its parameters."""
    fit = peers.fit("lbfgs", l2, PEER_TOL, None, max_iter=ITERATIONS)
    if fit is None:
        raise RuntimeError("A fit without a limit was cut off.")
    theta = case.theta(fit.coefficients)
    gap, value = gap_at(problem, theta, l2)
    found = {
        "seconds": fit.seconds,
        "iterations": fit.iterations,
        "gap": gap,
        "value": value,
    }
    return found, theta


def accuracy(problem: ConvexProblem, theta: Array) -> float:
    """The fraction of a problem's samples that is classified correctly."""
    right = problem.logits(theta).argmax(axis=1) == problem.targets.argmax(axis=1)
    return float(right.mean())


def measure(features: Features, kind: str, n: int) -> Measured:
    """Measures both paths on one kind of features.

    Args:
        features: The features.
        kind: `POOLED` or `GRID`.
        n: Number of samples.

    Returns:
        The numbers of both solvers for each weight, and for the fits on all samples.
    """
    case = Case(LINEAR, kind, features.rows(kind, n), features.labels[:n], 0.0)
    trained, held_out = split(n)
    begin = time.perf_counter()
    whole = case.problem()
    ours = Ours(whole.subset(trained))
    set_up = time.perf_counter() - begin
    judges = whole.subset(held_out)
    columns = case.columns()
    weights = []
    best: dict[str, tuple[float, float, Array]] = {}
    with Peers(columns[trained], case.labels[trained]) as peers:
        # Imports and reading are not part of a fit.
        peers.fit("lbfgs", 1.0, PEER_TOL, None)
        for C in np.logspace(STRONGEST, WEAKEST, WEIGHTS):
            l2 = 1.0 / (C * len(trained))
            cold, theta = theirs(case, ours.problem, peers, l2)
            warm = ours.fit(l2, cold["gap"])
            sides = {"theirs": (cold, theta), "ours": (warm, ours.theta)}
            for name, (found, at) in sides.items():
                found["accuracy"] = accuracy(judges, at)
                if name not in best or found["accuracy"] > best[name][0]:
                    best[name] = found["accuracy"], C, at
            weights.append({"C": C, "l2": l2, "theirs": cold, "ours": warm})
    with Peers(columns, case.labels) as peers:
        l2 = 1.0 / (best["theirs"][1] * n)
        cold, _ = theirs(case, whole, peers, l2)
    last = Ours(whole)
    last.theta = best["ours"][2]
    warm = last.fit(1.0 / (best["ours"][1] * n), cold["gap"])
    return {
        "features": kind,
        "n": n,
        "d": case.rows.d,
        "weights": weights,
        "best C": {name: C for name, (_, C, _) in best.items()},
        "refit": {"theirs": cold, "ours": warm},
        "set up": set_up,
    }


def total(measured: Measured, side: str) -> float:
    """Seconds of one solver's path and last fit, set-up included."""
    fits = [*measured["weights"], measured["refit"]]
    seconds = sum(fit[side]["seconds"] for fit in fits)
    return float(seconds + (measured["set up"] if side == "ours" else 0.0))


def worst_gap(measured: Measured) -> float:
    """The largest ratio of our gap to scikit-learn's gap at the same weight."""
    ratios = [fit["ours"]["gap"] / fit["theirs"]["gap"] for fit in measured["weights"]]
    return max(ratios, default=math.nan)


def _rows(measured: Measured) -> Iterator[list[str]]:
    for fit in measured["weights"][::SHOWN]:
        yield [f"{fit['C']:.2g}", f"{fit['l2']:.1e}", *_cells(fit)]
    yield ["all", "", *_cells({side: _sums(measured, side) for side in SIDES})]
    chosen = measured["best C"]
    best = f"{chosen['theirs']:.2g}, {chosen['ours']:.2g}"
    yield [best, "on all samples", *_cells(measured["refit"])]


def _sums(measured: Measured, side: str) -> Measured:
    fits = [fit[side] for fit in measured["weights"]]
    return {key: sum(fit[key] for fit in fits) for key in ("seconds", "iterations")}


def _cells(fit: Measured) -> list[str]:
    cells = []
    for key, form in (
        ("iterations", "d"),
        ("gap", ".1e"),
        ("accuracy", ".4f"),
        ("seconds", ".3g"),
    ):
        cells += [f"{fit[s][key]:{form}}" if key in fit[s] else "" for s in SIDES]
    return cells


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, default=trunk_features.DATA, help="CIFAR-10 or MNIST"
    )
    parser.add_argument("--n", type=int, default=10_000, help="number of samples")
    parser.add_argument("--features", nargs="+", default=[POOLED, GRID])


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, more=_options)
    features = trunk_features.read(options.data, options.n)
    common.warm_up()
    measured = []
    for kind in options.features:
        measured.append(measure(features, kind, options.n))
        print(
            kind,
            f"{total(measured[-1], 'ours') / total(measured[-1], 'theirs'):.3f}",
            flush=True,
        )
    header = ["C", "l2"] + [
        f"{what}: {side}"
        for what in ("iterations", "gap", "held-out accuracy", "seconds")
        for side in ("scikit-learn", "ours")
    ]
    body = [ABOUT.format(features=features.name, n=options.n)]
    targets = []
    for each in measured:
        what = f"d = {each['d']:,}"
        body += [f"{what}:", common.table(header, _rows(each))]
        targets += [
            Target(
                f"{what}: seconds of our path over scikit-learn's",
                total(each, "ours") / total(each, "theirs"),
                RATIO,
            ),
            Target(
                f"{what}: the largest of our gaps over scikit-learn's at that weight",
                worst_gap(each),
                1.0,
            ),
        ]
    common.write(
        options.out,
        "path",
        title="A path of L2 weights",
        body=body,
        targets=targets,
        settings={
            "n": options.n,
            "weights": WEIGHTS,
            "held_out": HELD_OUT,
            "peer_tol": PEER_TOL,
            "iterations": ITERATIONS,
            "features": features.name,
        },
        measurements=measured,
    )


if __name__ == "__main__":
    main()
