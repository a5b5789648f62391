"""scikit-learn and Cyanure on the same convex problem, to the same certified gap.

The problem is softmax cross-entropy with an L2 term on features of a trained ResNet-8:
a linear head, and gated units, whose features are written out for the peers. Each peer
runs with the loosest tolerance that reaches the gap, and only that run counts. The gap
of every result is computed by the same float64 certificate.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import common, trunk_features
from benchmarks.common import Target
from benchmarks.peer_worker import CYANURE, Fit, Peers, has_cyanure
from benchmarks.trunk_features import CLASSES, GRID, POOLED, Features
from keras_dalign.numerics.gram import explicit_features
from keras_dalign.numerics.losses import SoftmaxCrossEntropy
from keras_dalign.solving.minimum import choose_method, minimize
from keras_dalign.solving.problem import ConvexProblem

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.solving.feature_rows import FeatureRows

GAP = 1e-6
OURS = "keras_dalign"
LINEAR, GATED = "linear", "gated"
WIDTH = 8
SLOPE = 20.0
SIZES = (5_000, 50_000)
# A peer's tolerance is divided by this factor until its gap is small enough, and at
# most this many times.
_STEP = 10**0.5
_STEPS = 10
# Runs that take longer than this are not repeated.
_SLOW_SECONDS = 10.0
# Our time over the best peer's.
TARGETS = {LINEAR: 1.0, GATED: 0.5}

ABOUT = (
    "Mean softmax cross-entropy of ten classes plus `l2 / 2` times the squared norm of "
    "all weights, the constant's included: one objective for all. Features: {features}."
    " Linear head: gates that are constantly 1, so that the same code solves it. Gated "
    "units: {width} random gates that classes share; the peers get their features "
    "written out, and writing them is not counted. Certified gap: `(||gradient|| + "
    "rounding)^2 / (2 l2)` in float64, at most {gap:g}. A peer's tolerance is "
    "tightened by steps of sqrt(10) until its result is that good; only this last run "
    "counts. Ours counts from the features to the certified result, gates and "
    "compilation included. Runs in turns, medians of {repeats} (one where a run takes "
    "more than {slow:g} s).{missing}"
)

Measured = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A solver of scikit-learn or Cyanure.

    Attributes:
        name: Its name in the tables.
        solver: Its name for `Peers.fit`.
        first_tol: The first tolerance tried: for the gradient's largest entry, or for
            the relative duality gap of Cyanure.
    """

    name: str
    solver: str
    first_tol: float


def peers_at(l2: float, gap: float) -> list[Peer]:
    """The peers, each with a first tolerance that is probably too loose."""
    # The norm of the gradient at this gap, an upper bound of its largest entry.
    norm = math.sqrt(2.0 * l2 * gap)
    found = [
        Peer(f"scikit-learn {solver}", solver, norm / _STEP)
        for solver in ("lbfgs", "newton-cg", "newton-cholesky")
    ]
    if has_cyanure():
        found.append(Peer(CYANURE, CYANURE, 30.0 * gap))
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A problem.

    Attributes:
        head: `LINEAR` or `GATED`.
        features: `POOLED` or `GRID`.
        rows: The features, `(n, d)`.
        labels: `(n,)`.
        l2: Weight of the L2 term.
    """

    head: str
    features: str
    rows: FeatureRows
    labels: np.ndarray
    l2: float

    @property
    def width(self) -> int:
        """Number of gates."""
        return 1 if self.head == LINEAR else WIDTH

    def gates(self) -> tuple[Array, Array]:
        """Gates `(d, 1, m)` and output weights `(1, m)`, shared by all classes."""
        d = self.rows.d
        if self.head == LINEAR:
            # s(0) = 1/2, and twice that is 1.
            return np.zeros((d, 1, 1)), np.full((1, 1), 2.0)
        rng = np.random.default_rng(0)
        r = rng.standard_normal((d, 1, WIDTH)) / math.sqrt(d)
        w = rng.choice([-1.0, 1.0], (1, WIDTH)) / math.sqrt(WIDTH)
        return r, w

    def problem(self) -> ConvexProblem:
        """The problem for our solver."""
        loss = SoftmaxCrossEntropy()
        targets = loss.targets(self.labels, CLASSES)
        r, w = self.gates()
        offset = np.zeros_like(targets)
        # A copy, so that no run reuses cached results of an earlier one.
        rows = dataclasses.replace(self.rows)
        return ConvexProblem(rows, r, w, SLOPE, offset, targets, None, loss)

    def columns(self) -> Array:
        """All columns of `Phi` for one class, the bias's last: `(n, m d + 1)`."""
        r, w = self.gates()
        out = np.ones((self.rows.n, self.width * self.rows.d + 1))
        for part in self.rows.blocks(16 * out.shape[1], 2**26):
            v = self.rows.block(part)
            out[part, :-1] = explicit_features(v, r[:, 0], w[0], SLOPE)
        return out

    def theta(self, coefficients: Array) -> Array:
        """A peer's coefficients, `(C, m d + 1)`, as a vector of our parameters."""
        d = self.rows.d
        q = coefficients[:, :-1].reshape(CLASSES, self.width, d)
        return np.concatenate([q.transpose(2, 0, 1).ravel(), coefficients[:, -1]])


def gap_at(problem: ConvexProblem, theta: Array, l2: float) -> tuple[float, float]:
    """Upper bound on the distance to the minimum, and the objective, in float64."""
    at = problem.evaluate(theta, l2)
    norm = float(np.linalg.norm(at.gradient)) + problem.gradient_rounding(at, l2)
    return min(at.value, norm**2 / (2.0 * l2)), at.value


def ours(case: Case, gap: float) -> Measured:
    """One run of our solver, starting with the features."""
    begin = time.perf_counter()
    problem = case.problem()
    method, _ = choose_method(problem, "auto")
    start = np.zeros(problem.size)
    last = minimize(problem, start, method=method, tol=gap, l2=case.l2)
    seconds = time.perf_counter() - begin
    return {
        "name": OURS,
        "iterations": last.iteration,
        "gap": last.gap,
        "seconds": seconds,
        "note": "" if last.gap <= gap else f"ended by '{last.reason}'",
    }


def of_peer(
    case: Case, problem: ConvexProblem, peer: Peer, fit: Fit, tol: float
) -> Measured:
    """One run of a peer."""
    fell_back = any("lbfgs" in line for line in fit.warnings)
    return {
        "name": peer.name,
        "iterations": fit.iterations,
        "gap": gap_at(problem, case.theta(fit.coefficients), case.l2)[0],
        "seconds": fit.seconds,
        "tol": tol,
        "note": "fell back to lbfgs" if fell_back else "",
    }


def loosest(
    case: Case,
    problem: ConvexProblem,
    peers: Peers,
    peer: Peer,
    gap: float,
    limit: float,
) -> Measured:
    """The first run of a peer that reaches the gap, as its tolerance is tightened."""
    tol, best = peer.first_tol, math.inf
    for _ in range(_STEPS):
        try:
            fit = peers.fit(peer.solver, case.l2, tol, limit)
        except MemoryError as error:
            return _without(peer, best, str(error))
        if fit is None:
            return _without(peer, best, f"not finished in {limit:g} s")
        found = of_peer(case, problem, peer, fit, tol)
        if found["gap"] <= gap:
            return found
        best = min(best, found["gap"])
        tol /= _STEP
    return _without(peer, best, f"does not reach the gap: {best:.1e}")


def _without(peer: Peer, gap: float, note: str) -> Measured:
    return {
        "name": peer.name,
        "iterations": None,
        "gap": None if math.isinf(gap) else gap,
        "seconds": math.inf,
        "note": note,
    }


def measure(case: Case, gap: float, limit: float, repeats: int) -> Measured:
    """Runs all solvers on one problem.

    Args:
        case: The problem.
        gap: The gap to reach.
        limit: Time limit in seconds for a run of a peer.
        repeats: Number of runs of each solver.

    Returns:
        The description of the problem, and the median run of each solver.
    """
    problem = case.problem()
    runs: dict[str, list[Measured]] = {OURS: [ours(case, gap)]}
    tried = peers_at(case.l2, gap)
    with Peers(case.columns(), case.labels) as peers:
        for peer in tried:
            runs[peer.name] = [loosest(case, problem, peers, peer, gap, limit)]
            print(runs[peer.name][0], flush=True)
        # The runs before were for warm-up. From here on the solvers take turns.
        runs[OURS] = []
        firsts = {name: of_name[0] for name, of_name in runs.items() if of_name}
        repeated = [p for p in tried if firsts[p.name]["seconds"] < _SLOW_SECONDS]
        for peer in repeated:
            runs[peer.name] = []
        for _ in range(repeats):
            runs[OURS].append(ours(case, gap))
            for peer in repeated:
                tol = firsts[peer.name]["tol"]
                fit = peers.fit(peer.solver, case.l2, tol, None)
                if fit is not None:
                    runs[peer.name].append(of_peer(case, problem, peer, fit, tol))
    print(runs[OURS][0], flush=True)
    return {
        "head": case.head,
        "n": case.rows.n,
        "d": case.rows.d,
        "width": case.width,
        "l2": case.l2,
        "solvers": {name: _median(of_name) for name, of_name in runs.items()},
    }


def _median(runs: list[Measured]) -> Measured:
    seconds = [run["seconds"] for run in runs]
    return {**runs[-1], "seconds": median(seconds), "all seconds": seconds}


def best_peer(measured: Measured) -> Measured:
    """The fastest peer that reached the gap."""
    peers = [run for name, run in measured["solvers"].items() if name != OURS]
    return min(peers, key=lambda run: run["seconds"])


def ratio(measured: Measured) -> float:
    """Our time over the best peer's; NaN, which meets no target, if no peer ended."""
    ours_run = measured["solvers"][OURS]
    if ours_run["note"]:
        return math.inf
    theirs = best_peer(measured)["seconds"]
    return math.nan if math.isinf(theirs) else ours_run["seconds"] / theirs


def _title(measured: Measured) -> str:
    gates = "" if measured["head"] == LINEAR else f", {measured['width']} gates"
    return f"{measured['head']}, n = {measured['n']:,}, d = {measured['d']:,}{gates}"


def _rows(measured: Measured) -> Iterator[list[str]]:
    own = measured["solvers"][OURS]["seconds"]
    for run in measured["solvers"].values():
        done = math.isfinite(run["seconds"])
        yield [
            _title(measured),
            run["name"],
            str(run["iterations"]) if done else "",
            f"{run['gap']:.1e}" if done else "",
            f"{run['seconds']:.3g}" if done else "",
            f"{own / run['seconds']:.2f}" if done else "",
            run["note"],
        ]


def cases(
    features: Features,
    sizes: list[int],
    l2: float,
    memory: float,
) -> Iterator[Case]:
    """The problems: heads, features and sizes, as far as columns fit into memory."""
    for head in (LINEAR, GATED):
        for kind in (POOLED, GRID):
            for n in sizes:
                rows = features.rows(kind, n)
                case = Case(head, kind, rows, features.labels[:n], l2)
                gib = 8 * n * (case.width * rows.d + 1) / 2**30
                if gib > memory:
                    print(f"{head}, {kind}, n = {n}: columns of {gib:.1f} GiB")
                else:
                    yield case


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, default=trunk_features.DATA, help="CIFAR-10 or MNIST"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--l2", type=float, default=1e-3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--limit", type=float, default=30.0, help="seconds for a run of a peer"
    )
    parser.add_argument(
        "--memory", type=float, default=2.0, help="GiB for the peers' columns"
    )


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, more=_options)
    features = trunk_features.read(options.data, max(options.sizes))
    common.warm_up()
    measured = []
    for case in cases(features, options.sizes, options.l2, options.memory):
        measured.append(measure(case, GAP, options.limit, options.repeats))
        print(_title(measured[-1]), f"{ratio(measured[-1]):.2f}", flush=True)
    about = ABOUT.format(
        features=features.name,
        width=WIDTH,
        gap=GAP,
        repeats=options.repeats,
        slow=_SLOW_SECONDS,
        missing="" if has_cyanure() else f" {CYANURE} was not installed: left out.",
    )
    header = ["problem", "solver", "iterations", "gap", "seconds", "ours / it", ""]
    rows = [row for each in measured for row in _rows(each)]
    common.write(
        options.out,
        "peers",
        title="Peers on the same convex problem",
        body=[about, common.table(header, rows)],
        targets=[
            Target(
                f"{_title(each)}: our seconds over the best peer's "
                f"({best_peer(each)['name']})",
                ratio(each),
                TARGETS[each["head"]],
            )
            for each in measured
        ],
        settings={
            "l2": options.l2,
            "gap": GAP,
            "repeats": options.repeats,
            "limit": options.limit,
            "features": features.name,
        },
        measurements=measured,
    )


if __name__ == "__main__":
    main()
