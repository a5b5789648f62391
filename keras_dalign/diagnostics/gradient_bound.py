"""Bounds the distance of a loss to its infimum by the size of its gradient.

The loss is convex in the logits. With `f` the logits, `J` their Jacobian in any set of
parameters and `g` the gradient of the loss in the logits, any logits
`F* = f + J delta + e` have

    L(f) - L(F*) <= <g, f - F*>                           (convexity in the logits)
                  = -<J^T g, delta> - <g, e>
                 <= ||J^T g|| ||delta|| + ||g|| ||e||     (Cauchy-Schwarz),

where `J^T g` is the gradient in the parameters. This holds for any model and for all
`delta` and `F*`. They are chosen to make the right side small.

If `F* - f` lies in the column space of `J`, `e` can be 0, and a small gradient alone
proves a small distance to the infimum. For a model with the common model structure
`f = J theta_S` (Kawaguchi, Zhang & Deng 2022), this holds if the labels are aligned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.optimize
import scipy.sparse.linalg

from keras_dalign.numerics.losses import SoftmaxCrossEntropy
from keras_dalign.numerics.ridge import GramFactor
from keras_dalign.numerics.rounding import rounded
from keras_dalign.numerics.target_logits import TargetLogits, target_logits

if TYPE_CHECKING:
    from keras_dalign.diagnostics.jacobian import Jacobian
    from keras_dalign.numerics import Array, Indices
    from keras_dalign.numerics.losses import ConvexLoss

# The most rows of a Gram matrix to decompose (a second or two), and the most entries of
# a Jacobian without structure to form.
_EXACT_ROWS = 1500
_DENSE_ENTRIES = 2**25

# Ridge penalties, relative to the largest eigenvalue of the Gram matrix.
_PENALTIES = 10.0 ** np.arange(-13, 4, 2)

_MAX_PSI = 700.0


@dataclasses.dataclass(frozen=True)
class GradientBound:
    """An upper bound on the distance of a loss to its infimum, with its parts.

    `gap = gradient_norm * distance + output_gradient_norm * residual + target_loss -
    lower_bound`. It holds for every Keras model and any set of its parameters, because
    the loss is convex in the outputs. With `F* = f + J delta + e` the target outputs,
    `f` the outputs, `J` their Jacobian and `g` the gradient in them,

        L(f) - L(F*) <= <g, f - F*> = -<J^T g, delta> - <g, e>
                     <= ||J^T g|| ||delta|| + ||g|| ||e||.

    Attributes:
        gap: The bound on `loss - lower_bound`.
        loss: The loss of the outputs.
        gradient_norm: `||J^T g||`, the norm of the gradient in the parameters.
        distance: `||delta||`, the norm of the change of the parameters.
        output_gradient_norm: `||g||`, the norm of the gradient in the outputs.
        residual: `||e||`, the norm of the part of `F* - f` that `J delta` leaves.
        scale: Factor of the best finite outputs in `F*`: 1 for squared error, unless
            the loss is far from its minimum.
        psi: Factor of the modified targets `Y_l` in `F*`.
        target_loss: `L(F*)`.
        lower_bound: Loss that no function of the inputs can go below.
        structure_error: `||f - J theta|| / ||f||`, with the constant part of the
            outputs subtracted where it is known. It is 0 to rounding for a model with
            the common model structure. The bound does not depend on it.
        parameters: The parameters `S`, in words.
        n_parameters: Their number.
        solver: How `delta` was found: `"eigendecomposition"` or `"lsmr"`.
        dtype: The dtype in which outputs and Jacobian were computed.
    """

    gap: float
    loss: float
    gradient_norm: float
    distance: float
    output_gradient_norm: float
    residual: float
    scale: float
    psi: float
    target_loss: float
    lower_bound: float
    structure_error: float
    parameters: str
    n_parameters: int
    solver: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """The bound as a dict that `json.dumps` accepts."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        target = max(self.target_loss - self.lower_bound, 0.0)
        return (
            f"By its gradient, it is at most {rounded(self.gap, up=True)} above what "
            f"any function of the inputs can reach: norm {self.gradient_norm:.3g} in "
            f"the {self.n_parameters} parameters ({self.parameters}) times distance "
            f"{self.distance:.3g}, plus norm {self.output_gradient_norm:.3g} in the "
            f"outputs times residual {self.residual:.3g}, plus {target:.3g} for target "
            f"outputs with psi = {self.psi:.3g}; computed in {self.dtype}."
        )


def gradient_bound(
    jacobian: Jacobian,
    loss: ConvexLoss,
    targets: Array,
    weights: Array,
    groups: Indices,
    lower_bound: float,
    *,
    parameters: str,
    iterations: int = 50,
) -> GradientBound:
    """Bounds the distance of a loss to its infimum, for any model and parameters.

    The inequality is that of `GradientBound`, with `F* = f + J delta + e`. Here
    `F* = scale * F + psi * Y_l`, with `F` the best outputs where they are finite, and
    `delta` is a ridge regression of `F* - f` on `J`. The `scale`, `psi` and penalty are
    those with the smallest bound.

    Args:
        jacobian: The Jacobian of the outputs in the parameters.
        loss: The loss.
        targets: From `ConvexLoss.targets`, shape `(n, C)`.
        weights: Sample weights, at least 0, shape `(n,)`.
        groups: Number of each sample's input, shape `(n,)`.
        lower_bound: Loss that no function of the inputs can go below.
        parameters: The parameters in words.
        iterations: The most iterations of LSMR for each of three right-hand sides, used
            if the Jacobian is too large for a decomposition.

    Returns:
        The bound.

    Raises:
        ValueError: If something is not finite.
    """
    outputs = jacobian.outputs()
    _check_finite(outputs)
    normalizer = loss.normalizer(len(outputs), float(weights.sum()))
    shares = weights / normalizer
    cotangents = shares[:, None] * loss.gradient(outputs, targets)
    gradient = jacobian.rmatvec(cotangents.ravel())
    # Only samples with weight: the target outputs of the others are arbitrary.
    rows = np.flatnonzero(weights > 0)
    family = target_logits(loss, targets, weights, groups)
    bound = _Bound(
        loss,
        targets[rows],
        shares[rows],
        outputs[rows],
        TargetLogits(family.finite[rows], family.direction[rows]),
        float(np.linalg.norm(gradient)),
        float(np.linalg.norm(cotangents)),
    )
    regressions = _ByEigenvectors.of(jacobian, rows) or _ByIteration(
        jacobian, rows, iterations
    )
    solutions, mix = _sharpest(bound, regressions.solutions(bound.right_hand_sides()))
    # Norms evaluated in float64 from the change and residual themselves, not from the
    # inner products that chose them.
    change = solutions.change(mix) if solutions else np.zeros(jacobian.shape[1])
    attained = jacobian.matvec(change).reshape(outputs.shape)[rows]
    logits = bound.family.at(mix[0], mix[1])
    distance = float(np.linalg.norm(change))
    residual = float(np.linalg.norm(bound.centred(logits - outputs[rows] - attained)))
    target_loss = float(bound.shares @ loss.value(logits, bound.targets))
    gap = bound.gradient_norm * distance + bound.output_gradient_norm * residual
    gap += max(target_loss - lower_bound, 0.0)
    if not np.isfinite(gap):
        raise ValueError(
            "The gradient bound overflows float64: outputs, targets or gradients are "
            f"too large. Received: gradient norm {bound.gradient_norm}, distance "
            f"{distance}, residual {residual}"
        )
    return GradientBound(
        gap=gap,
        loss=float(shares @ loss.value(outputs, targets)),
        gradient_norm=bound.gradient_norm,
        distance=distance,
        output_gradient_norm=bound.output_gradient_norm,
        residual=residual,
        scale=float(mix[0]),
        psi=float(mix[1]),
        target_loss=target_loss,
        lower_bound=lower_bound,
        structure_error=_structure_error(jacobian, outputs),
        parameters=parameters,
        n_parameters=jacobian.shape[1],
        solver=regressions.solver,
        dtype=jacobian.dtype,
    )


def _sharpest(
    bound: _Bound, found: Iterator[_Solutions]
) -> tuple[_Solutions | None, Array]:
    """The solutions with the smallest bound, or None if no change has a smaller one."""
    shape = (3, *bound.outputs.shape)
    no_change = _Solutions(np.zeros(shape), np.zeros((3, 3)), np.zeros_like)
    value, mix = bound.sharpest_mix(no_change)
    best: _Solutions | None = None
    for solutions in found:
        candidate, shares = bound.sharpest_mix(solutions)
        if candidate < value:
            value, mix, best = candidate, shares, solutions
    return best, mix


def _check_finite(outputs: Array) -> None:
    if not np.isfinite(outputs).all():
        raise ValueError(
            "The model's outputs must be finite: it has probably diverged. Received: "
            "NaN or infinite outputs"
        )


def _structure_error(jacobian: Jacobian, outputs: Array) -> float:
    """Relative error of `f = J theta`, at the cost of one product."""
    reached = outputs - jacobian.offset()
    linear = jacobian.matvec(jacobian.theta()).reshape(outputs.shape)
    size = float(np.linalg.norm(outputs))
    distance = float(np.linalg.norm(reached - linear))
    return distance / size if size else distance


@dataclasses.dataclass(frozen=True, eq=False)
class _Solutions:
    """Ridge regressions on the three right-hand sides that `F* - f` is a mixture of.

    Attributes:
        attained: `J delta` for each, shape `(3, rows, C)`.
        inner: Inner products of the `delta`, shape `(3, 3)`.
        change: Function that gives `delta`, shape `(P,)`, for a mixture of the three.
    """

    attained: Array
    inner: Array
    change: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True, eq=False)
class _Bound:
    """The right side of the inequality, as a function of the target outputs.

    `F* - f` is a mixture of three parts: the best finite outputs, the modified targets
    `Y_l`, and minus the current outputs with a factor of 1.
    """

    loss: ConvexLoss
    targets: Array
    shares: Array
    outputs: Array
    family: TargetLogits
    gradient_norm: float
    output_gradient_norm: float

    def centred(self, logits: Array) -> Array:
        """For a softmax, the logits minus each sample's mean, which it ignores."""
        if isinstance(self.loss, SoftmaxCrossEntropy):
            return logits - logits.mean(axis=-1, keepdims=True)
        return logits

    def right_hand_sides(self) -> Array:
        """The three parts, shape `(3, rows, C)`."""
        parts = [self.family.finite, self.family.direction, -self.outputs]
        return self.centred(np.stack(parts))

    def sharpest_mix(self, solutions: _Solutions) -> tuple[float, Array]:
        """Minimises the right side over all mixtures; it is convex in them.

        Returns:
            The value and the factors `(3,)`.
        """
        rests = self.right_hand_sides() - self.centred(solutions.attained)
        flat = rests.reshape(3, -1)
        residuals = flat @ flat.T

        def value(free: Array) -> tuple[float, Array]:
            mix = np.array([*free, 1.0])
            logits = self.family.at(*free)
            slopes = self.shares[:, None] * self.loss.gradient(logits, self.targets)
            total = float(self.shares @ self.loss.value(logits, self.targets))
            gradient = np.array(
                [
                    np.sum(slopes * self.family.finite),
                    np.sum(slopes * self.family.direction),
                ]
            )
            for factor, matrix in (
                (self.gradient_norm, solutions.inner),
                (self.output_gradient_norm, residuals),
            ):
                norm = np.sqrt(max(float(mix @ matrix @ mix), 0.0))
                total += factor * norm
                if norm > 0:
                    gradient += factor / norm * (matrix @ mix)[:2]
            return total, gradient

        result = scipy.optimize.minimize(
            value,
            np.array([1.0, 5.0]),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0.0, 1.0), (0.0, _MAX_PSI)],
            options={"maxiter": 60},
        )
        return float(result.fun), np.array([*result.x, 1.0])


class _ByEigenvectors:
    """Regressions in dual form, by decompositions of Gram matrices.

    Args:
        jacobian: The Jacobian.
        rows: The samples with weight.
        factors: Decompositions, each with the outputs that it is for.
        merged: Whether one decomposition is for all samples and outputs as one vector.
    """

    solver = "eigendecomposition"

    def __init__(
        self,
        jacobian: Jacobian,
        rows: Indices,
        factors: list[tuple[GramFactor, slice]],
        merged: bool,
    ) -> None:
        self._jacobian = jacobian
        self._rows = rows
        self._factors = factors
        self._merged = merged
        self._largest = max(factor.largest for factor, _ in factors) or 1.0

    @classmethod
    def of(cls, jacobian: Jacobian, rows: Indices) -> _ByEigenvectors | None:
        """The regressions, or None if the Gram matrix is too large to decompose."""
        units = jacobian.units
        everything = slice(None)
        structured: Any = jacobian
        if jacobian.kind == "last":
            factor = GramFactor.of_features(structured.features[rows])
            return cls(jacobian, rows, [(factor, everything)], merged=False)
        if jacobian.kind == "head":
            if len(rows) > _EXACT_ROWS:
                return None
            block = np.ix_(rows, rows)
            factors = [
                (GramFactor.of_gram(structured.problem.gram(c)[block]), slice(c, c + 1))
                for c in range(units)
            ]
            return cls(jacobian, rows, factors, merged=False)
        n_rows, n_columns = jacobian.shape
        if len(rows) * units > _EXACT_ROWS or n_rows * n_columns > _DENSE_ENTRIES:
            return None
        dense = jacobian.dense().reshape(jacobian.n, units, n_columns)[rows]
        factor = GramFactor.of_features(dense.reshape(-1, n_columns))
        return cls(jacobian, rows, [(factor, everything)], merged=True)

    def solutions(self, rhs: Array) -> Iterator[_Solutions]:
        """Solutions for right-hand sides `(3, rows, C)`, one for each penalty."""
        for penalty in _PENALTIES:
            alpha, attained = self._solve(rhs, penalty * self._largest)
            inner = np.einsum("inc,jnc->ij", alpha, attained)
            yield _Solutions(attained, inner, self._change_of(alpha))

    def _change_of(self, alpha: Array) -> Callable[[Array], Array]:
        def change(mix: Array) -> Array:
            full = np.zeros((self._jacobian.n, self._jacobian.units))
            full[self._rows] = np.tensordot(mix, alpha, 1)
            return self._jacobian.rmatvec(full.ravel())

        return change

    def _solve(self, rhs: Array, penalty: float) -> tuple[Array, Array]:
        work = rhs.reshape(len(rhs), -1, 1) if self._merged else rhs
        alpha, attained = np.empty_like(work), np.empty_like(work)
        for factor, part in self._factors:
            block = work[:, :, part].transpose(1, 0, 2)
            found = factor.solve(block.reshape(len(block), -1), penalty)
            for target, values in zip((alpha, attained), found, strict=True):
                target[:, :, part] = values.reshape(block.shape).transpose(1, 0, 2)
        return alpha.reshape(rhs.shape), attained.reshape(rhs.shape)


class _ByIteration:
    """Regressions by LSMR, on products with the Jacobian alone.

    Stopping early regularises like a penalty: directions with small singular values are
    fitted last.
    """

    solver = "lsmr"

    def __init__(self, jacobian: Jacobian, rows: Indices, iterations: int) -> None:
        self._jacobian = jacobian
        self._rows = rows
        self._iterations = iterations

    def solutions(self, rhs: Array) -> Iterator[_Solutions]:
        """A solution for right-hand sides `(3, rows, C)`."""
        deltas = np.stack([self._solve(part) for part in rhs])
        attained = np.stack(
            [self._product(delta).reshape(rhs[0].shape) for delta in deltas]
        )
        yield _Solutions(attained, deltas @ deltas.T, lambda mix: mix @ deltas)

    def _solve(self, rhs: Array) -> Array:
        if not rhs.any():
            return np.zeros(self._jacobian.shape[1])
        operator = scipy.sparse.linalg.LinearOperator(
            (rhs.size, self._jacobian.shape[1]),
            matvec=self._product,
            rmatvec=self._transposed_product,
            dtype=np.float64,
        )
        return scipy.sparse.linalg.lsmr(
            operator, rhs.ravel(), atol=1e-12, btol=1e-12, maxiter=self._iterations
        )[0]

    def _product(self, vector: Array) -> Array:
        product = self._jacobian.matvec(vector.ravel())
        return product.reshape(self._jacobian.n, -1)[self._rows].ravel()

    def _transposed_product(self, vector: Array) -> Array:
        full = np.zeros((self._jacobian.n, self._jacobian.units))
        full[self._rows] = vector.reshape(len(self._rows), -1)
        return self._jacobian.rmatvec(full.ravel())
