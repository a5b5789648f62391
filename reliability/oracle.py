"""Certificates of small convex problems against optima computed with 60 digits.

Random problems of a head: 3 to 40 samples with repeated inputs, conflicting labels,
dependent features and weights of zero; every loss of the package, with every reduction;
the L2 term centred at zero (`origin`), at a base model's function (`base`) or at
learned gates (`gates`), and no L2 term. The package minimises each of them to several
tolerances, so that most of its iterates are far from the optimum. Some problems are
solved as Keras models, too, through `solve` and `certify`.

The oracle shares no code with the package. It writes out the gated features, the losses
and their conjugates with mpmath. Newton's method with a line search in float64 comes
near the optimum; further Newton steps, their gradients computed with 60 digits, reach
it. A dual point then proves how near: the true optimum lies between the dual and the
primal value. Without an L2 term the gated features are orthonormalised first, a linear
program finds which labels can be fitted with any margin, and the dual point is
projected onto what the constraints allow.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import mpmath
import numpy as np
import scipy.optimize
from mpmath import mpf

import keras_dalign as kd
from benchmarks.common import Target, table
from keras_dalign.head.features import FeaturePass
from keras_dalign.numerics.losses import (
    BinaryCrossEntropy,
    ConvexLoss,
    SoftmaxCrossEntropy,
    SquaredError,
)
from keras_dalign.solving.minimum import minimize
from keras_dalign.solving.problem import ConvexProblem
from reliability.report import Report

Array = np.ndarray[Any, np.dtype[np.float64]]
Vector = list[mpf]

DIGITS = 60
# The oracle's own gap, as a part of the size of the loss.
PROOF_L2, PROOF_PLAIN = 1e-40, 1e-20
# The largest share of problems whose optimum the oracle may fail to prove.
_LEFT_OUT = 0.02
TOLERANCES = (1e-1, 1e-2, 1e-4, 1e-6, 1e-9)
CENTRES = ("origin", "base", "gates")
LOSSES: dict[str, ConvexLoss] = {
    "softmax": SoftmaxCrossEntropy(),
    "softmax, smoothed": SoftmaxCrossEntropy(sparse=False, label_smoothing=0.1),
    "softmax, soft labels": SoftmaxCrossEntropy(sparse=False),
    "binary": BinaryCrossEntropy(),
    "binary, smoothed": BinaryCrossEntropy(label_smoothing=0.2),
    "squared error": SquaredError(),
}
REDUCTIONS = ("sum_over_batch_size", "mean_with_sample_weight", "sum")

# An iterate is at the optimum to rounding if its value is above it by no more than this
# part of its size.
AT_OPTIMUM = 1e-12
# What rounding may do to a value or a lower bound, in units of 2^-52 of its size.
ULPS = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """The data of a convex problem, as both sides are given them.

    Attributes:
        name: The loss, a key of `LOSSES`.
        loss: The loss.
        features: Normalised features, `(n, d)`, last column 1.
        gates: `(d, G, m)`, with `G` the number of outputs or 1.
        output_weights: `(G, m)`.
        slope: Slope of the gates.
        offset: Logits that are not trained, `(n, C)`.
        targets: `(n, C)`.
        weights: `(n,)`, or None.
        groups: Number of each sample's input, `(n,)`.
        centre: One of `CENTRES`.
        center: Where the L2 term is zero, `(d C m + C,)`.
        l2: Weight of the L2 term, at least 0.
    """

    name: str
    loss: ConvexLoss
    features: Array
    gates: Array
    output_weights: Array
    slope: float
    offset: Array
    targets: Array
    weights: Array | None
    groups: np.ndarray[Any, np.dtype[np.intp]]
    centre: str
    center: Array
    l2: float

    def convex(self) -> ConvexProblem:
        """What the package makes of it."""
        return ConvexProblem(
            self.features,
            self.gates,
            self.output_weights,
            self.slope,
            self.offset,
            self.targets,
            self.weights,
            self.loss,
            self.center,
        )

    def lower_bound(self) -> float:
        """What the package says that no function of the inputs can go below."""
        problem = self.convex()
        bounds = self.loss.lower_bound(
            self.targets, problem.weights, self.groups, int(self.groups.max()) + 1
        )
        return float(bounds.sum()) / problem.normalizer


def random_problem(seed: int) -> Problem:
    """A problem for each seed; losses, centres and L2 take turns."""
    rng = np.random.default_rng([5, seed])
    names = list(LOSSES)
    name = names[seed % len(names)]
    centre = CENTRES[seed // len(names) % len(CENTRES)]
    regularised = rng.random() < 0.7
    n = int(rng.integers(3, 41))
    outputs = int(rng.integers(2 if name.startswith("softmax") else 1, 5))
    p, width = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    loss = dataclasses.replace(LOSSES[name], reduction=str(rng.choice(REDUCTIONS)))
    u = rng.standard_normal((n, p))
    if p > 2 and rng.random() < 0.3:
        u[:, 1] = u[:, 0]
    groups = np.arange(n)
    if rng.random() < 0.6:
        repeats = int(rng.integers(1, n))
        groups[n - repeats :] = rng.integers(0, n - repeats, repeats)
    u = u[groups]
    u *= np.sqrt(p) / np.linalg.norm(u, axis=1, keepdims=True)
    features = np.concatenate([u, np.ones((n, 1))], axis=1)
    shared = 1 if rng.random() < 0.5 and centre != "gates" else outputs
    gates = rng.standard_normal((p + 1, shared, width)) / np.sqrt(p + 1)
    signs = rng.choice([-1.0, 1.0], (shared, width)) / np.sqrt(width)
    offset = np.zeros((n, outputs))
    if centre != "origin":
        offset = rng.standard_normal((n, outputs))[groups]
    center = np.zeros((p + 1) * outputs * width + outputs)
    if centre == "gates":
        center[:-outputs] = gates.ravel()
    weights = None
    if rng.random() < 0.5:
        weights = 3.0 * rng.random(n)
        weights[1 : 1 + n // 5] = 0.0
    return Problem(
        name=name,
        loss=loss,
        features=features,
        gates=gates,
        output_weights=signs,
        slope=float(rng.choice([4.0, 20.0])),
        offset=offset,
        targets=loss.targets(_labels(name, rng, n, outputs), outputs),
        weights=weights,
        groups=groups,
        centre=centre,
        center=center,
        l2=float(10.0 ** rng.uniform(-5, 0)) if regularised else 0.0,
    )


def _labels(name: str, rng: np.random.Generator, n: int, outputs: int) -> Any:
    if name == "softmax":
        return rng.integers(0, outputs, n)
    if name == "softmax, smoothed":
        return np.eye(outputs)[rng.integers(0, outputs, n)]
    if name == "softmax, soft labels":
        return rng.dirichlet(np.full(outputs, 0.3), n)
    if name == "squared error":
        return rng.standard_normal((n, outputs))
    return rng.integers(0, 2, (n, outputs)).astype(np.float64)


# The losses with many digits: value, gradient and conjugate of one sample ------------


def _softmax(z: Vector, t: Vector) -> tuple[mpf, Vector]:
    top = max(z)
    shares = [mpmath.exp(value - top) for value in z]
    total, mass = mpmath.fsum(shares), mpmath.fsum(t)
    value = mass * (top + mpmath.log(total)) - mpmath.fdot(t, z)
    return value, [mass * e / total - a for e, a in zip(shares, t, strict=True)]


def _softmax_conjugate(g: Vector, t: Vector) -> mpf:
    mass = mpmath.fsum(t)
    shares = [(a + b) / mass for a, b in zip(g, t, strict=True)]
    return mass * mpmath.fsum(_xlogx(share) for share in shares)


def _binary(z: Vector, t: Vector) -> tuple[mpf, Vector]:
    exponentials = [mpmath.exp(value) for value in z]
    terms = [
        mpmath.log1p(e) - a * v for e, a, v in zip(exponentials, t, z, strict=True)
    ]
    slopes = [(e / (1 + e) - a) / len(z) for e, a in zip(exponentials, t, strict=True)]
    return mpmath.fsum(terms) / len(z), slopes


def _binary_conjugate(g: Vector, t: Vector) -> mpf:
    shares = [len(g) * a + b for a, b in zip(g, t, strict=True)]
    return mpmath.fsum(_xlogx(q) + _xlogx(1 - q) for q in shares) / len(g)


def _squared(z: Vector, t: Vector) -> tuple[mpf, Vector]:
    away = [a - b for a, b in zip(z, t, strict=True)]
    return mpmath.fdot(away, away) / len(z), [2 * a / len(z) for a in away]


def _squared_conjugate(g: Vector, t: Vector) -> mpf:
    return mpmath.fdot(g, t) + mpf(len(g)) / 4 * mpmath.fdot(g, g)


def _xlogx(x: mpf) -> mpf:
    """`x log x`; beyond the domain infinity, but for what 60 digits leave of a zero."""
    if x > 0:
        return x * mpmath.log(x)
    return mpf(0) if x > -(mpf(10) ** (10 - DIGITS)) else mpmath.inf


_MANY_DIGITS: dict[type, tuple[Callable[..., Any], Callable[..., mpf]]] = {
    SoftmaxCrossEntropy: (_softmax, _softmax_conjugate),
    BinaryCrossEntropy: (_binary, _binary_conjugate),
    SquaredError: (_squared, _squared_conjugate),
}


class Oracle:
    """A problem with 60 digits, and its optimum.

    Args:
        problem: The problem. Samples of weight 0 are left out.
    """

    def __init__(self, problem: Problem) -> None:
        n = len(problem.features)
        weights = np.ones(n) if problem.weights is None else problem.weights
        divisor = {"sum": mpf(1), "sum_over_batch_size": mpf(n)}.get(
            problem.loss.reduction, mpmath.fsum(map(float, weights))
        )
        counted = np.flatnonzero(weights)
        self.problem = problem
        self.rows = counted
        self.units = problem.offset.shape[1]
        self.l2 = mpf(problem.l2)
        self.shares = [mpf(float(weights[i])) / divisor for i in counted]
        self.targets = [_exact(problem.targets[i]) for i in counted]
        self.offset = [_exact(problem.offset[i]) for i in counted]
        self.center = _exact(problem.center)
        self._value, self._conjugate = _MANY_DIGITS[type(problem.loss)]
        self.columns = self._columns()
        # The same in float64, for the Newton steps; the matrix is (n C, parameters).
        self.matrix = np.zeros((len(counted) * self.units, len(self.center)))
        for row, (places, values) in enumerate(self.columns):
            self.matrix[row, places] = [float(value) for value in values]

    def _columns(self) -> list[tuple[list[int], Vector]]:
        """The rows of the matrix of the problem: where they are not 0, and values."""
        problem, units = self.problem, self.units
        d, groups, m = problem.gates.shape
        rows = []
        for i in self.rows:
            v = _exact(problem.features[i])
            for c in range(units):
                group = c % groups
                places, values = [], []
                for k in range(m):
                    product = mpmath.fdot(v, _exact(problem.gates[:, group, k]))
                    gate = 1 / (1 + mpmath.exp(-mpf(problem.slope) * product))
                    gate *= mpf(float(problem.output_weights[group, k]))
                    places += [(a * units + c) * m + k for a in range(d)]
                    values += [gate * value for value in v]
                places.append(d * units * m + c)
                values.append(mpf(1))
                rows.append((places, values))
        return rows

    def logits(self, theta: Vector) -> list[Vector]:
        """Logits of each sample."""
        found = []
        for i, offset in enumerate(self.offset):
            rows = self.columns[i * self.units : (i + 1) * self.units]
            found.append(
                [
                    start + mpmath.fdot([theta[j] for j in places], values)
                    for start, (places, values) in zip(offset, rows, strict=True)
                ]
            )
        return found

    def adjoint(self, cotangents: list[Vector]) -> Vector:
        """The transposed matrix times one cotangent per logit."""
        sums = [mpf(0)] * len(self.center)
        flat = [value for row in cotangents for value in row]
        for cotangent, (places, values) in zip(flat, self.columns, strict=True):
            for place, value in zip(places, values, strict=True):
                sums[place] += cotangent * value
        return sums

    def evaluate(self, theta: Vector) -> tuple[mpf, Vector, list[Vector]]:
        """Value, gradient, and the slopes of each sample's loss."""
        total, slopes = mpf(0), []
        for share, z, t in zip(
            self.shares, self.logits(theta), self.targets, strict=True
        ):
            value, slope = self._value(z, t)
            total += share * value
            slopes.append(slope)
        gradient = self.adjoint(self._scaled(slopes))
        if self.l2:
            change = [a - b for a, b in zip(theta, self.center, strict=True)]
            total += self.l2 / 2 * mpmath.fdot(change, change)
            gradient = [a + self.l2 * b for a, b in zip(gradient, change, strict=True)]
        return total, gradient, slopes

    def value(self, theta: Array) -> mpf:
        """The value at a point of the package."""
        return self.evaluate(_exact(theta))[0]

    def dual_value(self, slopes: list[Vector]) -> mpf:
        """A proven lower bound: the dual function at the samples' slopes.

        Args:
            slopes: Without an L2 term orthogonal to the columns of the matrix.

        Returns:
            The bound.
        """
        scaled = self._scaled(slopes)
        total = mpf(0)
        for share, g, t in zip(self.shares, slopes, self.targets, strict=True):
            total -= share * self._conjugate(g, t)
        start = self.offset
        if self.l2:
            start = self.logits(self.center)
            across = self.adjoint(scaled)
            total -= mpmath.fdot(across, across) / (2 * self.l2)
        for u, z in zip(scaled, start, strict=True):
            total += mpmath.fdot(u, z)
        return total

    def _scaled(self, slopes: list[Vector]) -> list[Vector]:
        return [
            [share * value for value in row]
            for share, row in zip(self.shares, slopes, strict=True)
        ]

    def optimum(self) -> tuple[mpf, mpf] | None:
        """Bounds on the true optimum, lower and upper, or None if it is not proven."""
        size = 1 + abs(self.evaluate(_exact(self.problem.center))[0])
        search = self if self.l2 else self._orthonormal()
        dual = search.dual_value if self.l2 else search.projected_dual
        proof = size * mpf(PROOF_L2 if self.l2 else PROOF_PLAIN)
        theta = _exact(search.near())
        lower, upper = -mpmath.inf, mpmath.inf
        for _ in range(40):
            value, gradient, slopes = search.evaluate(theta)
            upper, lower = min(upper, value), max(lower, dual(slopes))
            if upper - lower <= proof:
                return lower, upper
            hessian = search.hessian(np.array([float(t) for t in theta]))
            largest = max(map(abs, gradient)) or mpf(1)
            scaled = np.array([float(g / largest) for g in gradient])
            move = np.linalg.lstsq(hessian, scaled, rcond=None)[0]
            theta = [
                t - largest * mpf(float(s)) for t, s in zip(theta, move, strict=True)
            ]
        return None

    def _orthonormal(self) -> Oracle:
        """The same problem without L2 term in an orthonormal basis of all logits.

        Returns:
            The problem, whose infimum is the same; its parameters are others.
        """
        columns = [[mpf(0)] * len(self.matrix) for _ in self.center]
        for row, (places, values) in enumerate(self.columns):
            for place, value in zip(places, values, strict=True):
                columns[place][row] = value
        basis = self._basis(columns, [True] * len(self.matrix))
        other = copy.copy(self)
        every = list(range(len(basis)))
        other.columns = [
            (every, [column[row] for column in basis])
            for row in range(len(self.matrix))
        ]
        other.matrix = np.array([[float(v) for v in column] for column in basis]).T
        other.center = [mpf(0)] * len(basis)
        return other

    def _basis(self, columns: list[Vector], active: list[bool]) -> list[Vector]:
        """An orthonormal basis of columns, in the logits that are active.

        For a softmax, what moves all active logits of a sample is taken off first: the
        loss does not see it.

        Returns:
            The basis.
        """
        basis: list[Vector] = []
        for column in columns:
            rest = [v if a else mpf(0) for v, a in zip(column, active, strict=True)]
            if isinstance(self.problem.loss, SoftmaxCrossEntropy):
                for start in range(0, len(rest), self.units):
                    own = [k for k in range(start, start + self.units) if active[k]]
                    mean = mpmath.fsum(rest[k] for k in own) / max(len(own), 1)
                    for k in own:
                        rest[k] -= mean
            for _ in range(2):
                for other in basis:
                    part = mpmath.fdot(other, rest)
                    rest = [a - part * b for a, b in zip(rest, other, strict=True)]
            norm = mpmath.sqrt(mpmath.fdot(rest, rest))
            if norm > mpf(10) ** -30:
                basis.append([value / norm for value in rest])
        return basis

    def near(self) -> Array:
        """Newton's method with a line search, in float64."""
        theta = np.array([float(c) for c in self.center])
        if not self.l2:
            theta = self._far()
        value, gradient = self._float64(theta)
        for _ in range(200):
            hessian = self.hessian(theta)
            move = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
            slope, length = float(gradient @ move), 1.0
            while length > 1e-12:
                tried = self._float64(theta - length * move)
                if tried[0] <= value - 1e-4 * length * slope:
                    break
                length /= 2
            else:
                break
            theta = theta - length * move
            value, gradient = tried
            if slope < 1e-28 * max(abs(value), 1.0):
                break
        return theta

    def _far(self) -> Array:
        """A direction in which no loss rises, so long that all that fall vanish.

        Labels that are certain can be fitted with any margin in some directions. A
        linear program finds one that does so for as many of them as possible.

        Returns:
            The direction, of margins of 300 and more, `(parameters,)`.
        """
        if isinstance(self.problem.loss, SquaredError):
            return np.zeros(len(self.center))
        t = self.problem.targets[self.rows]
        blocks = self.matrix.reshape(*t.shape, -1)
        if isinstance(self.problem.loss, SoftmaxCrossEntropy):
            own = np.take_along_axis(blocks, t.argmax(axis=1)[:, None, None], axis=1)
            margins = (own - blocks)[(t == 0) & (t.max(axis=1, keepdims=True) == 1)]
        else:
            signs = np.where(t == 1, 1.0, -1.0)[:, :, None]
            margins = (signs * blocks)[(t == 0) | (t == 1)]
        lengths = np.linalg.norm(margins, axis=1)
        margins = margins[lengths > 0] / lengths[lengths > 0, None]
        rows, columns = margins.shape
        if not rows:
            return np.zeros(len(self.center))
        found = scipy.optimize.linprog(
            np.concatenate([np.zeros(columns), -np.ones(rows)]),
            A_ub=np.concatenate([-margins, np.eye(rows)], axis=1),
            b_ub=np.zeros(rows),
            bounds=[(-1e3, 1e3)] * columns + [(0, 1)] * rows,
        )
        direction: Array = found.x[:columns]
        reached = margins @ direction > 1e-6
        if not reached.all():
            # What the linear program leaves of a zero would be large, too.
            rest = margins[~reached]
            direction = direction - np.linalg.pinv(rest) @ (rest @ direction)
        lengths = lengths[lengths > 0][reached]
        least = float((lengths * (margins[reached] @ direction)).min(initial=1e3))
        if least <= 0 or not reached.any():
            return np.zeros(len(self.center))
        return direction * (300.0 / least)

    def _float64(self, theta: Array) -> tuple[float, Array]:
        """Value and gradient in float64."""
        z, t, shares = self._arrays(theta)
        if isinstance(self.problem.loss, SoftmaxCrossEntropy):
            shifted = z - z.max(axis=1, keepdims=True)
            total = np.exp(shifted).sum(axis=1, keepdims=True)
            mass = t.sum(axis=1, keepdims=True)
            values = (t * (np.log(total) - shifted)).sum(axis=1)
            slopes = mass * np.exp(shifted) / total - t
        elif isinstance(self.problem.loss, BinaryCrossEntropy):
            values = (np.logaddexp(0.0, z) - t * z).mean(axis=1)
            slopes = (0.5 + 0.5 * np.tanh(z / 2) - t) / self.units
        else:
            values = np.square(z - t).mean(axis=1)
            slopes = 2.0 * (z - t) / self.units
        value = float(shares @ values)
        gradient = self.matrix.T @ (shares[:, None] * slopes).ravel()
        if self.l2:
            change = theta - self.problem.center
            value += self.problem.l2 / 2 * float(change @ change)
            gradient += self.problem.l2 * change
        return value, gradient

    def hessian(self, theta: Array) -> Array:
        """The Hessian in float64, `(parameters, parameters)`."""
        z, t, shares = self._arrays(theta)
        n, units = z.shape
        curvature = np.zeros((n, units, units))
        diagonal = np.arange(units)
        if isinstance(self.problem.loss, SoftmaxCrossEntropy):
            p = np.exp(z - z.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            curvature[:, diagonal, diagonal] = p
            curvature -= p[:, :, None] * p[:, None, :]
            curvature *= t.sum(axis=1)[:, None, None]
        elif isinstance(self.problem.loss, BinaryCrossEntropy):
            bend = 0.25 / np.cosh(np.clip(z / 2, -300, 300)) ** 2
            curvature[:, diagonal, diagonal] = bend / units
        else:
            curvature[:, diagonal, diagonal] = 2.0 / units
        curvature *= shares[:, None, None]
        blocks = self.matrix.reshape(n, units, -1)
        bent = np.einsum("nab,nbp->nap", curvature, blocks)
        hessian: Array = self.matrix.T @ bent.reshape(n * units, -1)
        return hessian + self.problem.l2 * np.eye(len(theta))

    def _arrays(self, theta: Array) -> tuple[Array, Array, Array]:
        offset = self.problem.offset[self.rows]
        z = offset + (self.matrix @ theta).reshape(offset.shape)
        shares = np.array([float(share) for share in self.shares])
        return z, self.problem.targets[self.rows], shares

    def projected_dual(self, slopes: list[Vector]) -> mpf:
        """The dual function at the nearest slopes that are orthogonal to the matrix.

        Slopes that vanish, of labels that are fitted with any margin, stay 0.

        Args:
            slopes: Of each sample's loss.

        Returns:
            A lower bound on the infimum without L2 term.
        """
        flat = [value for row in self._scaled(slopes) for value in row]
        active = [abs(value) > mpf(10) ** -60 for value in flat]
        flat = [v if a else mpf(0) for v, a in zip(flat, active, strict=True)]
        columns = [list(column) for column in zip(*self._dense(), strict=True)]
        for column in self._basis(columns, active):
            part = mpmath.fdot(column, flat)
            flat = [a - part * b for a, b in zip(flat, column, strict=True)]
        rows = [flat[i : i + self.units] for i in range(0, len(flat), self.units)]
        return self.dual_value(
            [
                [value / share for value in row]
                for share, row in zip(self.shares, rows, strict=True)
            ]
        )

    def _dense(self) -> list[Vector]:
        return [values for _, values in self.columns]


def _exact(values: Array) -> Vector:
    return [mpf(float(value)) for value in values]


# The package's side ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the package says at a point.

    Attributes:
        where: Which minimisation, and at which tolerance.
        value: The value.
        gap: The gap.
        theta: The point.
    """

    where: str
    value: float
    gap: float
    theta: Array


def claims(problem: Problem) -> Iterator[Claim]:
    """Iterates of the package, from the start and by each method, at each tolerance."""
    convex, bound = problem.convex(), problem.lower_bound()
    rng = np.random.default_rng(len(problem.center))
    start = rng.standard_normal(convex.size)
    first = convex.value_and_gradient(start, problem.l2)[0]
    squared = isinstance(problem.loss, SquaredError)
    for method in ("lbfgs", "direct") if squared else ("lbfgs",):
        for tolerance in TOLERANCES if method == "lbfgs" else TOLERANCES[-1:]:
            found = minimize(
                convex,
                start,
                method=method,
                tol=max(tolerance * first, 8 * np.finfo(float).eps * bound),
                lower_bound=bound,
                l2=problem.l2,
                max_iterations=3000,
            )
            yield Claim(
                f"{method} to {tolerance:.0e}", found.value, found.gap, found.theta
            )


def model_claims(seed: int) -> tuple[Problem, list[Claim], float]:
    """A problem as a Keras model: the certificates after `solve`.

    Args:
        seed: Seed; losses and centres take turns.

    Returns:
        The problem as the head has it, what `certify` says at each tolerance, and the
        lower bound of the last `solve`, by the model's own outputs.

    Raises:
        RuntimeError: If a certificate has no L2 term.
    """
    drawn = random_problem(seed)
    while not np.ptp(drawn.features.astype(np.float32), axis=0).any():
        # A trunk whose features are constant is refused.
        seed += len(LOSSES) * len(CENTRES)
        drawn = random_problem(seed)
    n, outputs = drawn.offset.shape
    x = drawn.features[:, :-1].astype(np.float32)
    l2 = drawn.l2 or 1e-2
    keras.utils.set_random_seed(seed)
    base = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Dense(outputs)])
    learned = drawn.centre == "gates"
    model = kd.align(
        base,
        n_samples=n,
        width=drawn.gates.shape[2],
        gates="learned" if learned else "random",
        seed=seed,
    )
    # The targets hold the smoothing already.
    loss: ConvexLoss = drawn.loss
    if isinstance(loss, SoftmaxCrossEntropy):
        loss = SoftmaxCrossEntropy(sparse=False, reduction=loss.reduction)
    elif isinstance(loss, BinaryCrossEntropy):
        loss = BinaryCrossEntropy(reduction=loss.reduction)
    found = []
    result = None
    for tolerance in (1e-1, 1e-3, 1e-6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            result = kd.solve(
                model,
                x,
                drawn.targets,
                loss=loss,
                sample_weight=drawn.weights,
                l2=l2,
                tol=tolerance,
                method="lbfgs",
                center="origin" if drawn.centre == "origin" else "base",
                verbose=0,
            )
        certificate = kd.certify(
            model, x, drawn.targets, loss=loss, sample_weight=drawn.weights, l2=l2
        )
        if certificate.l2_loss is None or certificate.l2_gap is None:
            raise RuntimeError("A certificate lacks its L2 term.")
        head = model.head
        theta = np.concatenate([_numpy(head.q).ravel(), _numpy(head.bias)])
        found.append(
            Claim(
                f"certify after solve to {tolerance:.0e}",
                certificate.l2_loss,
                certificate.l2_gap,
                theta,
            )
        )
    kept = FeaturePass(model, keep=True).run(x).feature_set()
    gates, signs = model.head.gates_in_use()
    if result is None:
        raise RuntimeError("Nothing was solved.")
    center = np.zeros_like(found[-1].theta)
    if learned:
        center[:-outputs] = np.asarray(gates, dtype=np.float64).ravel()
    problem = dataclasses.replace(
        drawn,
        loss=loss,
        l2=l2,
        features=np.asarray(model.head.normalize_exactly(kept.z), dtype=np.float64),
        gates=np.asarray(gates, dtype=np.float64),
        output_weights=np.asarray(signs, dtype=np.float64),
        slope=float(model.head.slope),
        offset=np.asarray(model.head.linear_part(kept.z), dtype=np.float64),
        center=center,
    )
    return problem, found, result.value - result.gap


def _numpy(variable: Any) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(variable), dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One problem.

    Attributes:
        seed: Its seed.
        kind: Loss and centre, or "none" where there is no L2 term.
        n: Number of samples.
        l2: Weight of the L2 term.
        proven: Whether the oracle proved its optimum.
        width: The oracle's own gap.
        outside: Claims whose interval does not hold the optimum.
        strict: The same, with no room for rounding.
        ulps: How far outside an optimum is at most, in `2^-52` of the value's size.
        ratios: Certified gap over true gap, of the iterates that are not at the
            optimum to rounding, with an L2 term.
    """

    seed: int
    kind: str
    n: int
    l2: float
    proven: bool
    width: float = math.nan
    outside: tuple[str, ...] = ()
    strict: tuple[str, ...] = ()
    ulps: float = 0.0
    ratios: tuple[float, ...] = ()


def check(seed: int, *, as_model: bool = False) -> Outcome:
    """Compares the package with the oracle on one problem."""
    solved = None
    if as_model:
        problem, found, solved = model_claims(seed)
    else:
        problem = random_problem(seed)
        found = list(claims(problem))
    outcome = Outcome(
        seed=seed,
        kind=f"{problem.name}; {problem.centre if problem.l2 else 'none'}",
        n=len(problem.features),
        l2=problem.l2,
        proven=False,
    )
    with mpmath.workdps(DIGITS):
        oracle = Oracle(problem)
        bounds = oracle.optimum()
        if bounds is None:
            return outcome
        lower, upper = bounds
        outside, strict, ratios, ulps = [], [], [], 0.0
        for claim in found:
            size = max(abs(claim.value), float(abs(upper)), 1e-300)
            low = mpf(claim.value) - mpf(claim.gap) - lower
            high = upper - mpf(claim.value)
            excess = float(max(low, high) / size) / np.finfo(np.float64).eps
            # How far the oracle knows the optimum counts for neither side.
            excess -= float((upper - lower) / size) / np.finfo(np.float64).eps
            if excess > 0:
                strict.append(claim.where)
                ulps = max(ulps, excess)
            if excess > ULPS:
                outside.append(claim.where)
            true = oracle.value(claim.theta) - upper
            if problem.l2 and true > AT_OPTIMUM * size:
                ratios.append(float(mpf(claim.gap) / true))
        if solved is not None and mpf(solved) > upper + AT_OPTIMUM:
            outside.append("solve")
    return dataclasses.replace(
        outcome,
        proven=True,
        width=float(upper - lower),
        outside=tuple(outside),
        strict=tuple(strict),
        ulps=ulps,
        ratios=tuple(ratios),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the number of problems."""
    parser.add_argument("--problems", type=int, default=200, help="number of problems")
    parser.add_argument(
        "--models", type=int, default=36, help="how many of them as Keras models, too"
    )


def measure(options: argparse.Namespace) -> Report:
    """Compares certificates with true optima."""
    everything = [*_checked(options.problems), *_checked(options.models, True)]
    proven = [outcome for outcome in everything if outcome.proven]
    outcomes, models = proven[: options.problems], proven[options.problems :]
    inside = sum(not outcome.outside for outcome in outcomes)
    models_inside = sum(not outcome.outside for outcome in models)
    ratios = [ratio for outcome in outcomes for ratio in outcome.ratios]
    targets = [
        Target(
            f"true optima inside [value - gap, value], of {len(outcomes)} problems",
            inside,
            len(outcomes),
            at_least=True,
        ),
        Target(
            f"the same of {len(models)} Keras models after `solve`",
            models_inside,
            len(models),
            at_least=True,
        ),
        Target(
            "share of the problems that were left out, as the oracle does not prove "
            "their optimum",
            1.0 - len(proven) / len(everything),
            _LEFT_OUT,
        ),
        Target(
            f"median of certified over true gap with an L2 term, {len(ratios)} "
            "iterates off the optimum",
            statistics.median(ratios) if ratios else math.nan,
            10.0,
        ),
    ]
    failures = [
        f"- seed {outcome.seed} ({outcome.kind}): {', '.join(outcome.outside)}"
        for outcome in proven
        if outcome.outside
    ]
    left_out = [
        f"- seed {outcome.seed} ({outcome.kind})"
        for outcome in everything
        if not outcome.proven
    ]
    widest = [outcome.width for outcome in proven if outcome.l2]
    plain = [outcome.width for outcome in proven if not outcome.l2]
    rounded = [outcome for outcome in everything if outcome.strict]
    described = (
        f"Random convex problems of a head, {len(outcomes)} as arrays and "
        f"{len(models)} as Keras models, against optima computed with {DIGITS} digits. "
        f"The oracle's own duality gap is at most {max(widest, default=0.0):.1g} with "
        f"an L2 term, and {max(plain, default=0.0):.1g} without."
    )
    chosen = (
        "The package minimised each problem from random parameters by L-BFGS, to "
        f"{', '.join(f'{t:.0e}' for t in TOLERANCES)} of the first value, and squared "
        "error in closed form, too. The ratio of gaps is of the iterates whose value, "
        f"computed with {DIGITS} digits, is above the optimum by more than "
        f"{AT_OPTIMUM:.0e} of its size."
    )
    rounding = (
        "An optimum counts as inside if it is outside by at most "
        f"{ULPS} units of 2^-52 of the value, which rounding of the value itself "
        f"explains. {len(rounded)} problems have an optimum that is outside by so "
        f"little, by {max((o.ulps for o in rounded), default=0.0):.2g} units at most."
    )
    body = [
        described,
        chosen,
        rounding,
        "By loss, and centre of the L2 term:",
        _by_kind(outcomes),
        "By weight of the L2 term:",
        _by_weight(outcomes),
        "Failures:" if failures else "Failures: none.",
        *(["\n".join(failures)] if failures else []),
        *(["Left out, as not proven:", "\n".join(left_out)] if left_out else []),
    ]
    return Report(
        title="Certificates against an independent oracle",
        body=body,
        targets=targets,
        settings={"problems": options.problems, "models": options.models},
        measurements=[dataclasses.asdict(outcome) for outcome in everything],
    )


def _checked(number: int, as_model: bool = False) -> Iterator[Outcome]:
    """Outcomes in the order of the seeds, until so many optima are proven."""
    proven = 0
    for seed in itertools.count():
        if proven == number:
            return
        yield (outcome := check(seed, as_model=as_model))
        proven += outcome.proven


def _by_kind(outcomes: list[Outcome]) -> str:
    rows = []
    for kind in sorted({outcome.kind for outcome in outcomes}):
        those = [outcome for outcome in outcomes if outcome.kind == kind]
        rows.append([kind, *_row(those)])
    return table(["loss; centre", "problems", "inside", "median", "largest"], rows)


def _by_weight(outcomes: list[Outcome]) -> str:
    rows = []
    for power in range(-5, 0):
        low, high = 10.0**power, 10.0 ** (power + 1)
        those = [outcome for outcome in outcomes if low <= outcome.l2 < high]
        rows.append([f"{low:.0e} to {high:.0e}", *_row(those)])
    return table(["L2 weight", "problems", "inside", "median", "largest"], rows)


def _row(outcomes: list[Outcome]) -> list[str]:
    ratios = [ratio for outcome in outcomes for ratio in outcome.ratios]
    inside = sum(outcome.proven and not outcome.outside for outcome in outcomes)
    return [
        str(len(outcomes)),
        str(inside),
        f"{statistics.median(ratios):.3g}" if ratios else "-",
        f"{max(ratios):.3g}" if ratios else "-",
    ]
