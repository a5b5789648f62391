"""The convex problem that exploitation solves, on kept features, in NumPy and float64.

For features `zh` (`n x d`, normalised) the logits of a head that exploits are

    F = F0 + Phi theta,   F_ic = F0_ic + sum_k G_ick (zh_i . q_ck) + b_c,

with gate values times output weights `G` (`n x C x m`), trained `theta = (q, b)` and
everything that exploitation does not train in `F0`. The loss is convex in `F`, hence in
`theta`:

    L(theta) = sum_i w_i loss(F_i, y_i) / N + l2 / 2 * ||theta - center||^2.

Solvers, forecasts, certificates and reports of the head all look at this one object.
Products with `Phi` and its transpose take `2 n d C m` multiply-adds each and never form
`Phi` (`n x m d` per class). Memory is that of `G`, `n C m` floats, and of a few rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from keras import ops

from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.head.objective import sample_weights
from keras_dalign.numerics.gram import Array, gate_activations, gram_matrix
from keras_dalign.numerics.memory import free_gib

if TYPE_CHECKING:
    from keras_dalign.head.features import FeatureSet
    from keras_dalign.numerics.losses import ConvexLoss

# Rows are worked on in blocks whose products fit into the processor's cache.
_BLOCK_BYTES = 2**22
_MIN_BLOCK_ROWS = 64

# From so many on, products in single precision take less time, casts included.
_MANY_FEATURES = 256


class ConvexProblem:
    """Loss, gradient and curvature of a head's exploitation, for all samples at once.

    Parameters are one vector `theta`, float64, of length `size = d * C * m + C`: `q` in
    the layout of the head's variable `(d, C, m)`, flattened, then the bias `b`.

    Args:
        features: Normalised features `zh`, shape `(n, d)`, last column 1.
        gates: Gates `r`, shape `(d, C, m)`.
        output_weights: Weights `w` of the gated units, shape `(C, m)`.
        slope: Slope of the gates' sigmoid.
        offset: `F0`, the part of the logits that is not trained, shape `(n, C)`.
        targets: From `ConvexLoss.targets`, shape `(n, C)`.
        weights: Sample weights, shape `(n,)`; None for ones.
        loss: The loss.
        center: Where the L2 term is zero, shape `(size,)`; None for the origin.

    Raises:
        ValueError: If the weights are of another shape, negative, not finite, or all 0.
    """

    def __init__(
        self,
        features: Array,
        gates: Array,
        output_weights: Array,
        slope: float,
        offset: Array,
        targets: Array,
        weights: Array | None,
        loss: ConvexLoss,
        center: Array | None = None,
    ) -> None:
        self.features = np.ascontiguousarray(features, dtype=np.float64)
        self.r = np.asarray(gates, dtype=np.float64)
        self.w = np.asarray(output_weights, dtype=np.float64)
        self.slope = float(slope)
        self.offset = np.asarray(offset, dtype=np.float64)
        self.targets = targets
        self.loss = loss
        self.n, self.d = self.features.shape
        _, self.units, self.width = self.r.shape
        self.size = self.d * self.units * self.width + self.units
        self.weights = _checked_weights(weights, self.n)
        self.normalizer = loss.normalizer(self.n, float(self.weights.sum()))
        self.center = np.zeros(self.size) if center is None else center
        self._gates = np.empty((self.n, self.units * self.width))
        for rows in self._blocks():
            for c in range(self.units):
                columns = slice(c * self.width, (c + 1) * self.width)
                self._gates[rows, columns] = self.w[c] * gate_activations(
                    self.features[rows], self.r[:, c], self.slope
                )

    @classmethod
    def of_head(
        cls, head: AlignmentHead, features: FeatureSet, loss: ConvexLoss
    ) -> ConvexProblem:
        """The problem of a head that exploits, on features that were kept.

        The L2 term is centred at the gates for learned gates, which is where `q` was
        frozen, and at 0 for random ones; in the bias always at 0.

        Args:
            head: The head; its current `q` and `b` do not matter.
            features: Features, targets and weights.
            loss: The loss.

        Returns:
            The problem.

        Raises:
            ValueError: If the head still explores, if the targets or the weights are
                missing or do not fit, or if the gates do not fit into memory.
        """
        if head.phase != EXPLOITING:
            raise ValueError(
                "The head's gates are not set yet, so there is no convex problem. "
                f"Received: a head in the phase '{head.phase}'. Explore and switch "
                "first (`fit` with DAlign, or `solve`)."
            )
        if features.y is None:
            raise ValueError(
                "Targets are needed: pass `y`, or a stream of (x, y) batches. "
                "Received: y=None"
            )
        _check_memory(len(features.y), head.units, head.width)
        z = features.z
        linear, gated = z if isinstance(z, (list, tuple)) else (z, z)
        r, w = (_float64(variable) for variable in (head.r, head.w))
        offset = np.zeros((len(gated), head.units))
        if head.dense is not None:
            offset += np.asarray(linear, dtype=np.float64) @ _float64(head.dense.kernel)
            if head.dense.bias is not None:
                offset += _float64(head.dense.bias)
        origin = np.zeros(head.units)
        center = r.ravel() if head.gates == "learned" else np.zeros(r.size)
        weights = features.sample_weight
        return cls(
            head.normalize_exactly(gated),
            r,
            w,
            head.slope,
            offset,
            loss.targets(np.asarray(features.y), head.units),
            None if weights is None else np.asarray(weights),
            loss,
            np.concatenate([center, origin]),
        )

    @property
    def memory(self) -> int:
        """Bytes held: the gates and the features."""
        return self._gates.nbytes + self.features.nbytes + self.offset.nbytes

    @property
    def rough_dtype(self) -> np.dtype[Any]:
        """In what products are computed that need not be exact.

        Single precision where it takes less time: features and gates are cast block by
        block, which only many features make up for.
        """
        return np.dtype("float32" if self.d >= _MANY_FEATURES else "float64")

    def product(self, theta: Array, dtype: npt.DTypeLike = np.float64) -> Array:
        """`Phi theta`, shape `(n, C)`, float64, computed in a dtype."""
        out = np.empty((self.n, self.units))
        theta = theta.astype(dtype, copy=False)
        for rows in self._blocks():
            out[rows] = self._block_product(rows, theta)
        return out

    def transposed_product(
        self, cotangents: Array, dtype: npt.DTypeLike = np.float64
    ) -> Array:
        """`Phi^T u` for `u` of shape `(n, C)`; `(size,)`, float64, from a dtype."""
        q = np.zeros((self.d, self.units * self.width), dtype)
        cast = cotangents.astype(dtype, copy=False)
        for rows in self._blocks():
            self._add_block_transposed(rows, cast[rows], q)
        return np.concatenate([q.ravel(), cotangents.sum(axis=0)])

    def logits(self, theta: Array) -> Array:
        """`F0 + Phi theta`, shape `(n, C)`."""
        return self.offset + self.product(theta)

    def loss_of(self, logits: Array) -> float:
        """The loss of given logits `(n, C)`, without the L2 term."""
        return self._mean(self.loss.value(logits, self.targets))

    def loss_gradient(self, logits: Array) -> Array:
        """Gradient of the loss in the logits, shape `(n, C)`."""
        weights = self.weights[:, None] / self.normalizer
        gradient: Array = weights * self.loss.gradient(logits, self.targets)
        return gradient

    def loss_curvature(self, logits: Array, directions: Array) -> Array:
        """The loss's Hessian in the logits, times a direction of shape `(n, C)`.

        Args:
            logits: Where, shape `(n, C)`.
            directions: Shape `(n, C)`.

        Returns:
            Shape `(n, C)`.
        """
        weights = self.weights[:, None] / self.normalizer
        product: Array = weights * self.loss.curvature(logits, self.targets, directions)
        return product

    def value_and_gradient(self, theta: Array, l2: float = 0.0) -> tuple[float, Array]:
        """The loss with its L2 term, and the gradient in `theta`, in one pass.

        Args:
            theta: Shape `(size,)`.
            l2: Weight of the L2 term, at least 0.

        Returns:
            The value and the gradient `(size,)`.
        """
        value = 0.0
        q = np.zeros((self.d, self.units * self.width))
        b = np.zeros(self.units)
        for rows in self._blocks():
            logits = self.offset[rows] + self._block_product(rows, theta)
            targets, weights = self.targets[rows], self.weights[rows]
            value += float(weights @ self.loss.value(logits, targets))
            cotangents = weights[:, None] * self.loss.gradient(logits, targets)
            b += cotangents.sum(axis=0)
            self._add_block_transposed(rows, cotangents, q)
        gradient = np.concatenate([q.ravel(), b]) / self.normalizer
        value /= self.normalizer
        if l2:
            change = theta - self.center
            value += 0.5 * l2 * float(change @ change)
            gradient += l2 * change
        return value, gradient

    def hessian_product(self, logits: Array, vector: Array, l2: float = 0.0) -> Array:
        """The Hessian at given logits, times a vector.

        Args:
            logits: Where, shape `(n, C)`: `logits(theta)`.
            vector: Shape `(size,)`.
            l2: Weight of the L2 term.

        Returns:
            Shape `(size,)`. The logits being linear in `theta`, the Gauss-Newton matrix
            and the Hessian are one and the same.
        """
        q = np.zeros((self.d, self.units * self.width))
        b = np.zeros(self.units)
        for rows in self._blocks():
            cotangents = self.weights[rows, None] * self.loss.curvature(
                logits[rows], self.targets[rows], self._block_product(rows, vector)
            )
            b += cotangents.sum(axis=0)
            self._add_block_transposed(rows, cotangents, q)
        product: Array = np.concatenate([q.ravel(), b]) / self.normalizer
        return product + l2 * vector if l2 else product

    def gram(self, output: int) -> Array:
        """`K_c + 1`: the Gram matrix of one output, bias included, `(n, n)`."""
        r, w = self.r[:, output], self.w[output]
        return gram_matrix(self.features, r, w, self.slope) + 1.0

    def subset(self, rows: npt.NDArray[np.intp]) -> ConvexProblem:
        """The same problem on some of the samples."""
        return ConvexProblem(
            self.features[rows],
            self.r,
            self.w,
            self.slope,
            self.offset[rows],
            self.targets[rows],
            self.weights[rows],
            self.loss,
            self.center,
        )

    def restricted(self, basis: Array) -> ConvexProblem:
        """The problem of changes from the center that lie in a subspace.

        Gates stay what they are, and are shared; what they gate are the features'
        coordinates in the subspace. Good for products and the loss; there are no gates
        `r` in those coordinates.

        Args:
            basis: Orthonormal columns, shape `(d, k)`.

        Returns:
            The problem, of `k` features, centred at the origin.
        """
        other = copy.copy(self)
        other.offset = self.logits(self.center)
        other.features = self.features @ basis
        other.d = basis.shape[1]
        other.size = other.d * self.units * self.width + self.units
        other.center = np.zeros(other.size)
        del other.r, other.w
        return other

    def unrestricted(self, basis: Array, theta: Array) -> Array:
        """Parameters `(size,)` for those of `restricted(basis)`."""
        changes = basis @ theta[: -self.units].reshape(basis.shape[1], -1)
        return self.center + np.concatenate([changes.ravel(), theta[-self.units :]])

    def reweighted(self, factors: Array) -> ConvexProblem:
        """The same samples with other weights; features and gates are shared.

        Args:
            factors: What the weights are multiplied by, at least 0, shape `(n,)`. A
                sample of factor 0 does not count, in the divisor of a mean either.

        Returns:
            The problem.
        """
        other = copy.copy(self)
        other.weights = _checked_weights(self.weights * factors, self.n)
        counted = int(np.count_nonzero(factors))
        other.normalizer = self.loss.normalizer(counted, float(other.weights.sum()))
        return other

    def theta_of(self, head: AlignmentHead) -> Array:
        """A head's current `q` and `b` as one vector `(size,)`."""
        return np.concatenate([_float64(head.q).ravel(), _float64(head.bias)])

    def assign(self, head: AlignmentHead, theta: Array) -> None:
        """Sets a head's `q` and `b`, in the dtype of its variables."""
        q = theta[: -self.units].reshape(self.d, self.units, self.width)
        head.q.assign(q)
        head.bias.assign(theta[-self.units :])

    def _mean(self, values: Array) -> float:
        return float(self.weights @ values) / self.normalizer

    def _blocks(self) -> Iterator[slice]:
        wanted = _BLOCK_BYTES // (8 * self.units * self.width)
        step = max(wanted, _MIN_BLOCK_ROWS)
        return (slice(start, start + step) for start in range(0, self.n, step))

    def _block_product(self, rows: slice, theta: Array) -> Array:
        q = theta[: -self.units].reshape(self.d, self.units * self.width)
        shape = (-1, self.units, self.width)
        features = self.features[rows].astype(q.dtype, copy=False)
        projections = (features @ q).reshape(shape)
        gates = self._gates[rows].astype(q.dtype, copy=False).reshape(shape)
        summed: Array = np.einsum("icm,icm->ic", gates, projections)
        return summed + theta[-self.units :]

    def _add_block_transposed(self, rows: slice, cotangents: Array, q: Array) -> None:
        gates = self._gates[rows].astype(q.dtype, copy=False)
        gates = gates.reshape(-1, self.units, self.width)
        weighted = (gates * cotangents[:, :, None]).reshape(len(gates), -1)
        q += self.features[rows].astype(q.dtype, copy=False).T @ weighted


def _check_memory(n: int, units: int, width: int) -> None:
    needed = 8 * n * units * width / 2**30
    free = free_gib()
    if free is not None and needed > free:
        raise ValueError(
            f"The gates of all samples would take {needed:.3g} GiB, of {free:.3g} GiB "
            f"that are free: n * C * m = {n} * {units} * {width} floats. Take fewer "
            "samples, or feed the head more features (`align(features=...)`), which "
            "need a smaller width; or exploit in batches, with a Keras optimizer for "
            "`exploit_optimizer`."
        )


def _checked_weights(weights: Array | None, n: int) -> Array:
    checked = sample_weights(weights, n)
    if not checked.any():
        raise ValueError(
            "All sample weights are 0: there is nothing to minimise. Received: "
            f"{n} samples of weight 0"
        )
    return checked


def _float64(variable: Any) -> Array:
    values: Array = np.asarray(ops.convert_to_numpy(variable)).astype(np.float64)
    return values
