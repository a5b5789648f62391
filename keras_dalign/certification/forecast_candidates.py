"""Parameters `theta*` that a forecast compares gradient descent with.

Each candidate is a loss and a squared distance to the start. Some come from the spectra
of the outputs' Gram matrices, where these can be decomposed, others from the path of a
solver. Upper bounds on the Lipschitz constant of the gradient are here, too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg
import scipy.optimize

from keras_dalign.numerics.losses import SquaredError
from keras_dalign.numerics.ridge import GramFactor
from keras_dalign.numerics.rounding import EPS
from keras_dalign.numerics.target_logits import target_logits

if TYPE_CHECKING:
    from keras_dalign.numerics import Array, Indices
    from keras_dalign.solving.problem import ConvexProblem

# Ridge penalties, relative to the largest eigenvalue of the Gram matrix.
_PENALTIES = 10.0 ** np.arange(-13, 2)
# Multiples of the direction of the target logits, and of their finite part: next to a
# direction, and without one.
_PSIS = np.concatenate([[0.0], np.geomspace(0.02, 60.0, 30)])
_SCALES = np.array([0.0, 0.25, 0.5, 0.75, 0.9, 1.0])
_SCALES_ALONE = np.concatenate([[0.0], np.geomspace(0.02, 1.0, 30)])

# Factors by which the change that L-BFGS found is extended.
_EXTENSIONS = np.geomspace(1.25, 40.0, 16)


@dataclasses.dataclass(frozen=True, eq=False)
class Modes:
    """The modes of a quadratic loss under gradient descent.

    Attributes:
        curvatures: Eigenvalues of the Hessian, rounded down, shape `(k,)`.
        parts: The share of each mode in the initial loss, shape `(k,)`.
    """

    curvatures: Array
    parts: Array

    def after(self, steps: Array, step_size: float) -> Array:
        """The loss after the numbers of steps `(s,)`, rounded up, shape `(s,)`."""
        rates = np.clip(1.0 - step_size * self.curvatures, 0.0, 1.0)
        logs = np.log(rates, out=np.full_like(rates, -np.inf), where=rates > 0)
        rounding = len(self.parts) * EPS * float(self.parts.sum())
        # One number of steps at a time, to save memory: there may be many modes.
        found = [float(np.exp(2.0 * t * logs) @ self.parts) for t in steps]
        return np.array(found) * (1.0 + 1e-12) + rounding


@dataclasses.dataclass(frozen=True, eq=False)
class Spectra:
    """Quantities from the eigendecompositions of the outputs' Gram matrices.

    Attributes:
        candidates: Losses, and squared distances to the start of gradient descent.
        smoothness: The Lipschitz constant of the gradient, rounded up.
        rank: The least rank of a Gram matrix of the samples with nonzero weight.
        distance: Coefficients `(a, b, c)` of the squared distance
            `a psi^2 + b psi + c` to parameters that reach the logits `psi * Y_l`.
        curvature: The least eigenvalue of the Hessian for squared error, rounded down.
        modes: For squared error; None for other losses.
    """

    candidates: list[tuple[float, float]]
    smoothness: float
    rank: int
    distance: tuple[float, float, float]
    curvature: float
    modes: Modes | None

    def contraction(self, step_size: float) -> float | None:
        """Factor of `L - inf L` in a step of a strongly convex quadratic, or None."""
        if self.modes is None or self.curvature <= 0:
            return None
        return (1.0 - step_size * self.curvature) ** 2


def spectra_of(problem: ConvexProblem, theta: Array, groups: Indices) -> Spectra:
    """Computes spectra, and candidates by ridge regression on each Gram matrix.

    Args:
        problem: The problem.
        theta: Where gradient descent starts, shape `(size,)`.
        groups: Number of each sample's input, shape `(n,)`.

    Returns:
        The spectra.
    """
    logits = problem.logits(theta)
    family = target_logits(problem.loss, problem.targets, problem.weights, groups)
    rhs = np.stack([family.finite, family.direction, -logits])
    seen = np.flatnonzero(problem.weights > 0)
    roots = np.sqrt(problem.weights[seen])[:, None]
    # For each penalty: coefficients, and the logits of the parameters Phi^T alpha.
    alphas = np.zeros((len(_PENALTIES), *rhs.shape))
    attained = np.zeros_like(alphas)
    scale = problem.loss.max_curvature(problem.units) / problem.normalizer
    top, rank, lowest = 0.0, problem.n, math.inf
    curvatures, parts = [], []
    residuals = logits - problem.targets
    for c in range(problem.units):
        gram = problem.gram(c)[np.ix_(seen, seen)] * (roots * roots.T)
        factor = GramFactor.of_gram(gram)
        top = max(top, factor.largest)
        rank = min(rank, factor.rank())
        rounding = len(seen) * EPS * factor.largest
        safe = np.maximum(factor.values - rounding, 0.0)
        lowest = min(lowest, float(safe.min()))
        curvatures.append(scale * safe)
        residual = factor.vectors.T @ (roots[:, 0] * residuals[seen, c])
        parts.append(residual**2 / (problem.units * problem.normalizer))
        for k, penalty in enumerate(_PENALTIES):
            solution, reached = factor.solve(
                roots * rhs[:, seen, c].T, penalty * factor.largest
            )
            alphas[k][:, seen, c] = (roots * solution).T
            attained[k][:, seen, c] = (reached / roots).T
    smoothness = scale * top * (1.0 + problem.n * EPS)
    # Inner products of the parameters.
    grams = np.einsum("kinc,kjnc->kij", alphas, attained)
    chosen = []
    for alpha, reached, gram in zip(alphas, attained, grams, strict=True):
        for mix in _mixes(family.finite, family.direction):
            loss = problem.loss_of(logits + np.tensordot(mix, reached, 1))
            chosen.append((loss, float(mix @ gram @ mix), alpha, mix))
    candidates = []
    for index in envelope([(loss, distance) for loss, distance, *_ in chosen]):
        # Loss and distance evaluated at the parameters themselves, in float64.
        _, _, alpha, mix = chosen[index]
        change = problem.transposed_product(np.tensordot(mix, alpha, 1))
        loss = problem.loss_of(logits + problem.product(change))
        candidates.append((loss, float(change @ change)))
    least = grams[0]
    squared = isinstance(problem.loss, SquaredError)
    return Spectra(
        candidates,
        smoothness,
        rank,
        (
            float(least[1, 1]),
            float(2.0 * (least[0, 1] + least[1, 2])),
            float(least[0, 0] + 2.0 * least[0, 2] + least[2, 2]),
        ),
        scale * lowest,
        Modes(np.concatenate(curvatures), np.concatenate(parts)) if squared else None,
    )


def _mixes(finite: Array, direction: Array) -> Iterator[Array]:
    """Coefficients of the finite target, the direction and minus the current logits."""
    psis = _PSIS if direction.any() else np.zeros(1)
    scales = np.ones(1)
    if finite.any():
        scales = _SCALES if direction.any() else _SCALES_ALONE
    return (np.array([scale, psi, 1.0]) for scale in scales for psi in psis)


def envelope(points: list[tuple[float, float]]) -> list[int]:
    """Finds the points that give the smallest bound for some number of steps.

    Args:
        points: Losses and squared distances.

    Returns:
        Their indices: the lower left convex hull, by rising distance.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0]))
    hull: list[int] = []
    for i in order:
        loss, distance = points[i]
        if hull and loss >= points[hull[-1]][0]:
            continue
        while len(hull) > 1:
            (loss0, distance0), (loss1, distance1) = (points[j] for j in hull[-2:])
            if (loss1 - loss0) * (distance - distance0) < (loss - loss0) * (
                distance1 - distance0
            ):
                break
            hull.pop()
        hull.append(i)
    return hull


def path_candidates(
    problem: ConvexProblem, theta: Array, smoothness: float, iterations: int
) -> list[tuple[float, float]]:
    """Minimises the loss plus `||theta - theta_0||^2 / (2 eta t)` for several `t`.

    That objective is the right side of the bound. Every iterate of L-BFGS is a
    candidate, and the minimum for a `t` would be the best one.

    Args:
        problem: The problem.
        theta: Where gradient descent starts, shape `(size,)`.
        smoothness: The Lipschitz constant of the gradient.
        iterations: The most iterations of L-BFGS, for all `t` together.

    Returns:
        Losses and squared distances.
    """
    candidates: list[tuple[float, float]] = []
    penalty = 0.0

    def right_side(point: Array) -> tuple[float, Array]:
        loss, gradient = problem.value_and_gradient(point)
        change = point - theta
        distance = float(change @ change)
        candidates.append((loss, distance))
        return loss + 0.5 * penalty * distance, gradient + penalty * change

    point = theta
    powers = range(2, 9, 2)
    for power in powers:
        penalty = smoothness * 10.0**-power
        point = scipy.optimize.minimize(
            right_side,
            point,
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": -(-iterations // len(powers)),
                "maxcor": 10,
                "ftol": 0.0,
                "gtol": 0.0,
            },
        ).x
    # If all samples are classified correctly, extending the change lowers a
    # cross-entropy further.
    logits, change = problem.logits(theta), problem.product(point - theta)
    distance = float((point - theta) @ (point - theta))
    candidates += [
        (problem.loss_of(logits + factor * change), factor**2 * distance)
        for factor in _EXTENSIONS
    ]
    return candidates


def rounding_allowances(
    problem: ConvexProblem, theta: Array, squared_distances: Array
) -> Array:
    """Bounds what rounding in float64 can add to the square root of a loss.

    A logit is the sum of its offset, its bias and `d m` products of gated features and
    parameters, summed over `d` first and over `m` then. Rounding changes it by at most
    `(d + m) eps` times the sum of the absolute values. By Cauchy-Schwarz that sum is at
    most `|F0| + ||phi|| ||theta||`. A row of the features has
    `||phi||^2 <= ||v||^2 ||w||^2 + 1`, since gates are at most 1. Gradient descent does
    not move away from `theta*` while its loss is above that of `theta*`, hence
    `||theta_t|| <= ||theta_0|| + 2 ||theta_0 - theta*||`.

    A sample's loss is at least 0, and its curvature in the logits is at most `h`, so
    its squared slope is at most `2 h` times the loss. Logits that are off by `delta`,
    in root mean square over the samples, thus raise a loss `L` to at most

        L + sqrt(2 h L) delta + h / 2 delta^2 = (sqrt(L) + sqrt(h / 2) delta)^2.

    The rounding of the steps themselves is not derived here. On random problems, both
    together were measured below one `eps` in 20,000 steps; this allows `d + m`.

    Args:
        problem: The problem.
        theta: Where gradient descent starts, shape `(size,)`.
        squared_distances: From the start to each `theta*`, shape `(k,)`.

    Returns:
        `sqrt(h / 2) delta` for each, shape `(k,)`.
    """
    shares = problem.weights / problem.normalizer
    offset = float(shares @ (problem.offset**2).sum(axis=1))
    rows = float(shares @ (problem.features**2).sum(axis=1))
    rows = rows * float((problem.gates.w**2).sum(axis=1).max()) + float(shares.sum())
    radii = np.linalg.norm(theta) + 2.0 * np.sqrt(squared_distances)
    delta = (
        (problem.d + problem.width) * EPS * (np.sqrt(offset) + np.sqrt(rows) * radii)
    )
    allowances: Array = np.sqrt(0.5 * problem.loss.max_curvature(problem.units)) * delta
    return allowances


def smoothness_bound(problem: ConvexProblem) -> float:
    """Bounds the Lipschitz constant of the gradient without any `n x n` matrix.

    The Gram matrix of an output is the entrywise product of two positive semi-definite
    ones, plus 1 for the bias. The largest eigenvalue of such a product is at most that
    of one factor, if the other has a diagonal of ones (Schur). So one factor is scaled
    to a diagonal of ones, and the other by the inverse.

    Args:
        problem: The problem.

    Returns:
        The bound.
    """
    features = problem.features
    roots = np.sqrt(problem.weights)[:, None]
    lengths = np.linalg.norm(features, axis=1)[:, None]
    largest = 0.0
    for gates in np.moveaxis(problem.gates.values(features), 1, 0):
        opening = np.linalg.norm(gates, axis=1)[:, None]
        by_features = _largest_eigenvalue(roots * opening * features)
        by_gates = _largest_eigenvalue(roots * lengths * gates)
        largest = max(largest, min(by_features, by_gates))
    largest += float(problem.weights.sum())
    scale = problem.loss.max_curvature(problem.units) / problem.normalizer
    return scale * largest * (1.0 + 1e-10)


def _largest_eigenvalue(matrix: Array) -> float:
    """The largest eigenvalue of `matrix.T @ matrix`, computed on the smaller side."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    gram = matrix.T @ matrix
    last = len(gram) - 1
    values = scipy.linalg.eigvalsh(gram, subset_by_index=(last, last))
    return float(values[0])
