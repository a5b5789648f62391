"""The convex problem that exploitation solves, on kept features.

For features `v` (`n x d`, normalised) the logits of a head that exploits are

    F = F0 + Phi theta,   F_ic = F0_ic + sum_k G_ick (v_i . q_ck) + b_c,

with the gate values times output weights `G`, the trained parameters `theta = (q, b)`,
and the part `F0` of the logits that exploitation does not train. The loss is convex in
`F`, hence in `theta`:

    L(theta) = sum_i w_i loss(F_i, y_i) / N + l2 / 2 * ||theta - center||^2.

Solvers, forecasts, certificates and reports of the head all use this class. Large
problems are solved with products in float32. Certified numbers are computed in float64.

The file is longer than others because every way to derive one problem from another
copies the same attributes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from keras import ops

from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.head.objective import check_targets, sample_weights
from keras_dalign.numerics.device import has_accelerator
from keras_dalign.numerics.gram import gram_matrix
from keras_dalign.numerics.replicas import Replicas, replicas_of
from keras_dalign.numerics.rounding import EPS
from keras_dalign.solving.device_products import DeviceProducts
from keras_dalign.solving.feature_rows import FeatureRows
from keras_dalign.solving.gates import Gates
from keras_dalign.solving.gradient_rounding import GradientRounding
from keras_dalign.solving.products import NumpyProducts, Products, SampleLoss

if TYPE_CHECKING:
    from keras_dalign.head.features import FeatureSet
    from keras_dalign.numerics import Array
    from keras_dalign.numerics.losses import ConvexLoss

# Above this number of multiply-adds, float32 halves the time of a product. Smaller
# problems are solved in float64 throughout.
_LARGE = 2e7

# Cached properties.
_CACHED = ("exact", "fast", "samples", "_rounding")


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """The objective at a point.

    Attributes:
        theta: The point, shape `(size,)`.
        logits: `(n, C)`.
        loss: The loss, without the L2 term.
        value: The loss with the L2 term.
        gradient: Of the value, shape `(size,)`.
    """

    theta: Array
    logits: Array
    loss: float
    value: float
    gradient: Array


class ConvexProblem:
    """Loss and gradient of a head's exploitation, for all samples at once.

    Parameters are one vector `theta`, float64, of length `size = d * C * m + C`: `q` in
    the layout of the head's variable `(d, C, m)`, flattened, then the bias `b`.

    Args:
        features: Normalised features `v`: an array `(n, d)`, last column 1, or
            `FeatureRows`.
        gates: Gates `r`, shape `(d, C, m)`, or `(d, 1, m)` if outputs share them.
        output_weights: Weights `w` of the gated units, shape `(C, m)` or `(1, m)`.
        slope: Slope of the gates' sigmoid.
        offset: `F0`, the part of the logits that is not trained, shape `(n, C)`.
        targets: From `ConvexLoss.targets`, shape `(n, C)`.
        weights: Sample weights, shape `(n,)`; None for ones.
        loss: The loss.
        center: Where the L2 term is zero, shape `(size,)`; None for the origin.
        replicas: The devices and processes that share the work of large products; None
            for one device.

    Raises:
        ValueError: If the weights are of another shape, negative, not finite, or all 0.
    """

    def __init__(
        self,
        features: Array | FeatureRows,
        gates: Array,
        output_weights: Array,
        slope: float,
        offset: Array,
        targets: Array,
        weights: Array | None,
        loss: ConvexLoss,
        center: Array | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        self.replicas = replicas or Replicas()
        if not isinstance(features, FeatureRows):
            features = FeatureRows(np.ascontiguousarray(features, dtype=np.float64))
        self.rows = features
        self.gates = Gates(
            np.asarray(gates, dtype=np.float64),
            np.asarray(output_weights, dtype=np.float64),
            float(slope),
        )
        self.offset = np.asarray(offset, dtype=np.float64)
        self.targets = targets
        self.loss = loss
        self.units = self.offset.shape[1]
        self.weights = _checked_weights(weights, self.n)
        self.normalizer = loss.normalizer(self.n, float(self.weights.sum()))
        self.center = np.zeros(self.size) if center is None else center

    @classmethod
    def from_head(
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
            The problem; the features are not copied.

        Raises:
            ValueError: If the head still explores, or if the targets or the weights are
                missing or do not fit.
        """
        if head.phase != EXPLOITING:
            raise ValueError(
                "The head's gates are not set yet, so there is no convex problem. "
                f"Received: a head in the phase '{head.phase}'. Explore and switch "
                "first (`fit` with DAlign, or `solve`)."
            )
        check_targets(features.y)
        z = features.z
        linear, gated = z if isinstance(z, (list, tuple)) else (z, z)
        r, w = head.gates_in_use()
        origin = np.zeros(head.units)
        learned = head.gates == "learned"
        q = r.ravel() if learned else np.zeros(head.dim * head.units * w.shape[1])
        weights = features.sample_weight
        return cls(
            FeatureRows.from_head(head, gated),
            r,
            w,
            head.slope,
            head.linear_part(linear),
            loss.targets(np.asarray(features.y), head.units),
            None if weights is None else np.asarray(weights),
            loss,
            np.concatenate([q, origin]),
            replicas_of(head),
        )

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.rows.n

    @property
    def d(self) -> int:
        """Number of features, the constant included."""
        return self.rows.d

    @property
    def width(self) -> int:
        """Number of gated units per output, `m`."""
        return self.gates.width

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.d * self.units * self.width + self.units

    @property
    def features(self) -> Array:
        """Normalised features in float64, shape `(n, d)`, computed at each access."""
        return self.rows.dense()

    @property
    def slope(self) -> float:
        """Slope of the gates' sigmoid."""
        return self.gates.slope

    @functools.cached_property
    def samples(self) -> SampleLoss:
        """The loss of all samples as a function of the products."""
        shares = self.weights / self.normalizer
        return SampleLoss(self.loss, self.offset, self.targets, shares)

    @functools.cached_property
    def exact(self) -> Products:
        """Products in float64."""
        return NumpyProducts(self.rows, self.gates, self.units)

    @functools.cached_property
    def fast(self) -> Products:
        """Products for the iterations: in float32 if the problem is large.

        They are computed by the accelerator or by several devices if there are any, and
        by NumPy otherwise. For small problems they are `exact`.
        """
        if self.n * (self.size - self.units) < _LARGE:
            return self.exact
        if self.replicas.count == 1 and not has_accelerator():
            return NumpyProducts(self.rows, self.gates, self.units, np.float32)
        return DeviceProducts(self.rows, self.gates, self.units, self.replicas)

    def product(self, theta: Array) -> Array:
        """`Phi theta` in float64, shape `(n, C)`."""
        return self.exact.product(theta)

    def transposed_product(self, cotangents: Array) -> Array:
        """`Phi^T u` for `u` of shape `(n, C)`, in float64; shape `(size,)`."""
        return self.exact.transposed_product(cotangents)

    def logits(self, theta: Array) -> Array:
        """`F0 + Phi theta` in float64, shape `(n, C)`."""
        return self.offset + self.product(theta)

    def loss_of(self, logits: Array) -> float:
        """The loss of given logits `(n, C)`, without the L2 term."""
        total = 0.0
        for part in self.rows.blocks(64 * self.units, 2**22):
            losses = self.loss.value(logits[part], self.targets[part])
            total += float(self.weights[part] @ losses)
        return total / self.normalizer

    def loss_gradient(self, logits: Array) -> Array:
        """Gradient of the loss in the logits, shape `(n, C)`."""
        gradient: Array = self.loss.gradient(logits, self.targets)
        gradient *= self.samples.shares[:, None]
        return gradient

    def evaluate(
        self, theta: Array, l2: float = 0.0, products: Products | None = None
    ) -> Evaluation:
        """Logits, loss, value and gradient at a point, in one pass over the features.

        Args:
            theta: Shape `(size,)`.
            l2: Weight of the L2 term, at least 0.
            products: `exact` (the default) or `fast`.

        Returns:
            The evaluation. Sums over samples are in float64.
        """
        products = products or self.exact
        logits, loss, gradient = products.loss_and_gradient(theta, self.samples)
        if self.replicas.processes > 1:
            # CPUs may differ in the last bit, which would change the next steps.
            own = np.concatenate([theta, gradient, [loss]])
            theta, gradient, (loss,) = np.split(
                self.replicas.from_first(own), [self.size, 2 * self.size]
            )
            loss = float(loss)
        value = loss
        if l2:
            change = theta - self.center
            value += 0.5 * l2 * float(change @ change)
            gradient = gradient + l2 * change
        return Evaluation(theta, logits, loss, value, gradient)

    def value_and_gradient(self, theta: Array, l2: float = 0.0) -> tuple[float, Array]:
        """The loss with its L2 term, and its gradient `(size,)`, in float64."""
        found = self.evaluate(theta, l2)
        return found.value, found.gradient

    def row_lengths(self) -> Array:
        """Bounds on `||phi_i||`, the bias included, shape `(n,)`."""
        # Normalised rows have length sqrt(d).
        if self.rows.normalisation is None:
            squares = np.einsum("ij,ij->i", self.features, self.features)
        else:
            squares = np.full(self.n, float(self.d))
        lengths: Array = np.sqrt(squares * (self.gates.w**2).sum(axis=1).max() + 1.0)
        return lengths

    def gradient_rounding(self, at: Evaluation, l2: float = 0.0) -> float:
        """Bound on the norm of the rounding error of a gradient computed in float64.

        Args:
            at: The evaluation.
            l2: Weight of the L2 term.

        Returns:
            The bound, to first order in the unit roundoff.
        """
        size = float(np.linalg.norm(at.theta))
        bound = self._rounding.bound(size)
        if l2:
            change = at.theta - self.center
            bound += 4 * EPS * l2 * (size + float(np.linalg.norm(change)))
        return bound

    @functools.cached_property
    def _rounding(self) -> GradientRounding:
        return GradientRounding.of_problem(self)

    def gram(self, output: int) -> Array:
        """`K_c + 1`: the Gram matrix of one output, bias included, `(n, n)`."""
        r, w = self.gates.of_output(output)
        return gram_matrix(self.features, r, w, self.slope) + 1.0

    def subset(self, rows: npt.NDArray[np.intp]) -> ConvexProblem:
        """The same problem on some of the samples; copies their features."""
        other = self._with_rows(self.rows.take(rows))
        for name in ("offset", "targets", "weights"):
            setattr(other, name, getattr(self, name)[rows])
        if self.gates.kept is not None:
            kept = self.gates.kept[rows]
            other.gates = dataclasses.replace(self.gates, kept=kept)
        total = float(other.weights.sum())
        other.normalizer = self.loss.normalizer(other.n, total)
        return other

    def single_output(self, output: int) -> ConvexProblem:
        """The gated features of one output as a problem, for products and Gram matrix.

        Args:
            output: The output.

        Returns:
            A problem whose offset and targets are 0.
        """
        r, w = self.gates.of_output(output)
        zeros = np.zeros((self.n, 1))
        return ConvexProblem(
            self.rows, r[:, None], w[None], self.slope, zeros, zeros, None, self.loss
        )

    def with_gates(self, r: Array, w: Array) -> ConvexProblem:
        """The same samples with other gates; the L2 term is centred at the origin.

        Args:
            r: Shape `(d, C, m)` or `(d, 1, m)`.
            w: Shape `(C, m)` or `(1, m)`.

        Returns:
            The problem; features are shared.
        """
        other = self._copy("samples")
        other.gates = Gates(r, w, self.slope)
        other.center = np.zeros(other.size)
        return other

    def coordinates(self, basis: Array) -> FeatureRows:
        """The features' coordinates in a subspace, for `restricted`.

        Args:
            basis: Orthonormal columns, shape `(d, k)`.

        Returns:
            Shape `(n, k)`, in the dtype of `fast`.
        """
        dtype = self.fast.dtype
        found = np.empty((self.n, basis.shape[1]), dtype)
        for part in self.rows.blocks(8 * self.d, 2**24):
            found[part] = self.rows.block(part, dtype) @ basis.astype(dtype)
        return FeatureRows(found)

    def restricted(self, coordinates: FeatureRows) -> ConvexProblem:
        """The problem restricted to changes from the center in a subspace.

        The values of the gates stay the same. They are stored, since the coordinates do
        not suffice to compute them.

        Args:
            coordinates: From `coordinates`, for the same samples and any gates.

        Returns:
            The problem, of `k` features, centred at the origin.
        """
        other = self._with_rows(coordinates)
        kept = self.gates.all_values(self.rows, coordinates.raw.dtype)
        other.gates = dataclasses.replace(self.gates, kept=kept)
        if self.center.any():
            other.offset = self.logits(self.center)
        other.center = np.zeros(other.size)
        return other

    def unrestricted(self, basis: Array, theta: Array) -> Array:
        """Parameters `(size,)` for parameters of the restricted problem."""
        changes = basis @ theta[: -self.units].reshape(basis.shape[1], -1)
        return self.center + np.concatenate([changes.ravel(), theta[-self.units :]])

    def reweighted(self, factors: Array) -> ConvexProblem:
        """The same samples with other weights; features and gates are shared.

        Args:
            factors: Factors of the weights, at least 0, shape `(n,)`. A sample of
                factor 0 does not count in the divisor of a mean.

        Returns:
            The problem.
        """
        other = self._copy("exact", "fast")
        other.weights = _checked_weights(self.weights * factors, self.n)
        counted = int(np.count_nonzero(factors))
        other.normalizer = self.loss.normalizer(counted, float(other.weights.sum()))
        return other

    def centred(self, center: Array) -> ConvexProblem:
        """The same problem with the L2 term centred at `center`, shape `(size,)`."""
        other = self._copy(*_CACHED)
        other.center = center
        return other

    def theta_of(self, head: AlignmentHead) -> Array:
        """A head's current `q` and `b` as one vector `(size,)`."""
        return np.concatenate([_float64(head.q).ravel(), _float64(head.bias)])

    def assign(self, head: AlignmentHead, theta: Array) -> None:
        """Sets a head's `q` and `b`, in the dtype of its variables."""
        q = theta[: -self.units].reshape(self.d, self.units, self.width)
        head.q.assign(q)
        head.bias.assign(theta[-self.units :])

    def _with_rows(self, rows: FeatureRows) -> ConvexProblem:
        other = self._copy()
        other.rows = rows
        return other

    def _copy(self, *kept: str) -> ConvexProblem:
        """A copy that keeps only the cached properties named."""
        other = copy.copy(self)
        for name in set(_CACHED) - set(kept):
            other.__dict__.pop(name, None)
        return other


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
