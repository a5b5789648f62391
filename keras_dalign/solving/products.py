"""Products with the gated features `Phi` and their transpose, without forming `Phi`.

    (Phi theta)_ic = sum_k G_ick (v_i . q_ck) + b_c,  G_ick = w_ck s(slope r_ck . v_i)

for trained parameters `theta = (q, b)`. Each product takes `2 n d C m` flop, a block of
rows at a time: `P = V Q` for the block, then a sum over `k` with the gates. The
transpose takes the same steps in reverse. The loss of a block is computed between the
two, so value and gradient take one pass over the features. `NumpyProducts` computes in
float64 or float32. `DeviceProducts` computes in float32, compiled by Keras's backend,
on accelerators and on several devices.

The values of the gates are stored if they need little memory (`n m` numbers if outputs
share them). Otherwise they are computed again for every block.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from keras_dalign.numerics import threads

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.numerics.losses import ConvexLoss
    from keras_dalign.solving.feature_rows import FeatureRows
    from keras_dalign.solving.gates import Gates

Result = TypeVar("Result")

# A block of rows and what is computed from it fit into the CPU's caches.
_BLOCK_BYTES = 2**22

# Above this number of multiply-adds, several threads compute a product.
_THREADED = 2**22

# Gate values are stored up to this size.
_KEPT_GATES_BYTES = 2**29


@dataclasses.dataclass(frozen=True, eq=False)
class SampleLoss:
    """The loss of all samples as a function of the products `Phi theta`.

    Attributes:
        loss: The loss.
        offset: Added to the products to give the logits, `(n, C)`, float64.
        targets: From `ConvexLoss.targets`, `(n, C)`, float64.
        shares: Sample weights divided by the normaliser, `(n,)`, float64.
    """

    loss: ConvexLoss
    offset: Array
    targets: Array
    shares: Array


class Products(abc.ABC):
    """Products with `Phi` for all samples.

    Args:
        rows: The features.
        gates: The gates.
        units: Number of outputs, `C`.
    """

    dtype: np.dtype[Any]

    def __init__(self, rows: FeatureRows, gates: Gates, units: int) -> None:
        self.rows = rows
        self.gates = gates
        self.units = units

    @property
    def size(self) -> int:
        """Number of parameters, `d * C * m + C`."""
        return self.rows.d * self.units * self.gates.width + self.units

    @functools.cached_property
    def kept_gates(self) -> np.ndarray | None:
        """Values of the gates, `(n, G, m)`; None if each block computes its own."""
        if self.gates.kept is None and (
            self.gates.nbytes(self.rows.n, self.dtype) > _KEPT_GATES_BYTES
        ):
            return None
        return self.gates.all_values(self.rows, self.dtype)

    def _gates_of(self, rows: slice) -> np.ndarray:
        """Values of the gates for some rows, `(rows, G, m)`."""
        if self.kept_gates is not None:
            return self.kept_gates[rows]
        return self.gates.values(self.rows.block(rows, self.dtype))

    @abc.abstractmethod
    def product(self, theta: Array) -> Array:
        """`Phi theta`.

        Args:
            theta: Shape `(size,)`.

        Returns:
            Shape `(n, C)`, float64.
        """

    @abc.abstractmethod
    def transposed_product(self, u: Array) -> Array:
        """`Phi^T u`.

        Args:
            u: Shape `(n, C)`.

        Returns:
            Shape `(size,)`, float64.
        """

    @abc.abstractmethod
    def loss_and_gradient(
        self, theta: Array, samples: SampleLoss
    ) -> tuple[Array, float, Array]:
        """The loss at a point, in one pass over the features.

        Args:
            theta: Shape `(size,)`.
            samples: The loss.

        Returns:
            The logits `(n, C)`, the loss, and its gradient `(size,)`, in float64.
        """


class NumpyProducts(Products):
    """Products in NumPy.

    Args:
        rows: The features.
        gates: The gates.
        units: Number of outputs.
        dtype: float64, or float32.
    """

    def __init__(
        self,
        rows: FeatureRows,
        gates: Gates,
        units: int,
        dtype: npt.DTypeLike = np.float64,
    ) -> None:
        super().__init__(rows, gates, units)
        self.dtype = np.dtype(dtype)

    def product(self, theta: Array) -> Array:
        """See `Products`."""
        out = np.empty((self.rows.n, self.units))
        q, constant, bias = self._parts(theta)

        def compute(rows: slice) -> None:
            for part in self._blocks(rows):
                out[part] = self._forward(self._opened(part), q, constant)

        self._over_rows(compute)
        out += bias
        return out

    def transposed_product(self, u: Array) -> Array:
        """See `Products`."""

        def compute(rows: slice) -> _Sums:
            sums = _Sums(self)
            for part in self._blocks(rows):
                sums.add(self._opened(part), u[part])
            return sums

        return self._gradient(self._over_rows(compute))

    def loss_and_gradient(
        self, theta: Array, samples: SampleLoss
    ) -> tuple[Array, float, Array]:
        """See `Products`."""
        q, constant, bias = self._parts(theta)
        logits = np.empty((self.rows.n, self.units))

        def compute(rows: slice) -> _Sums:
            sums = _Sums(self)
            for part in self._blocks(rows):
                block = self._opened(part)
                found = self._forward(block, q, constant)
                np.add(samples.offset[part], found + bias, out=logits[part])
                values, slopes = samples.loss.value_and_gradient(
                    logits[part], samples.targets[part]
                )
                sums.loss += float(samples.shares[part] @ values)
                slopes *= samples.shares[part, None]
                sums.add(block, slopes)
            return sums

        sums = self._over_rows(compute)
        return logits, sum(part.loss for part in sums), self._gradient(sums)

    def _over_rows(self, function: Callable[[slice], Result]) -> list[Result]:
        """Calls a function for parts of the rows, in threads if the work is large."""
        # Computed once, before the threads start.
        _ = self.kept_gates, self.rows.scales
        n = self.rows.n
        return threads.over_rows(function, n, split=n * self.size >= _THREADED)

    def _parts(self, theta: Array) -> tuple[np.ndarray, np.ndarray | None, Array]:
        """Coefficients of the features `(p, C m)`, of the constant, and the bias."""
        q, constant = self.rows.fold(theta[: -self.units].reshape(self.rows.d, -1))
        if constant is not None:
            constant = constant.astype(self.dtype).reshape(self.units, -1)
        return q.astype(self.dtype), constant, theta[-self.units :]

    def _blocks(self, rows: slice) -> Iterator[slice]:
        columns = self.rows.d + 2 * self.units * self.gates.width
        row_bytes = self.dtype.itemsize * columns
        return self.rows.blocks(row_bytes, _BLOCK_BYTES, rows)

    def _opened(self, part: slice) -> _Block:
        """Centred features, gates times scales, and gates, of a block."""
        gates = self._gates_of(part)
        scaled = gates
        if self.rows.scales is not None:
            scaled = gates * self.rows.scales[part, None, None].astype(self.dtype)
        return _Block(self.rows.centred(part, self.dtype), scaled, gates)

    def _forward(
        self, block: _Block, q: np.ndarray, constant: np.ndarray | None
    ) -> np.ndarray:
        """Logits `(rows, C)` without bias."""
        shape = len(block.u), self.units, self.gates.width
        projections = (block.u @ q).reshape(shape)
        if self.gates.groups == 1:
            logits = (projections @ block.scaled[:, 0, :, None])[:, :, 0]
            if constant is not None:
                logits += block.gates[:, 0] @ constant.T
            return logits
        logits = np.einsum("icm,icm->ic", projections, block.scaled)
        if constant is not None:
            logits += np.einsum("icm,cm->ic", block.gates, constant)
        return logits

    def _gradient(self, sums: list[_Sums]) -> Array:
        """`Phi^T u` from sums over parts of the rows, shape `(size,)`, float64."""
        features, constant, bias = (
            functools.reduce(np.add, arrays)
            for arrays in zip(
                *((part.features, part.constant, part.bias) for part in sums),
                strict=True,
            )
        )
        q = self.rows.unfold(features.astype(np.float64, copy=False), constant.ravel())
        return np.concatenate([q.ravel(), bias])


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """A block of rows: centred features, gates times scales, and gates."""

    u: np.ndarray
    scaled: np.ndarray
    gates: np.ndarray


class _Sums:
    """Sums over rows: of the loss, and for `Phi^T u`."""

    def __init__(self, products: NumpyProducts) -> None:
        units, width = products.units, products.gates.width
        rows, dtype = products.rows, products.dtype
        self.shared = products.gates.groups == 1
        self.loss = 0.0
        self.features = np.zeros((rows.raw.shape[1], units * width), dtype)
        self.constant = np.zeros((units, width))
        self.bias = np.zeros(units)

    def add(self, block: _Block, slopes: Array) -> None:
        """Adds a block with `u` of shape `(rows, C)`."""
        self.bias += slopes.sum(axis=0)
        slopes = slopes.astype(block.u.dtype, copy=False)
        if self.shared:
            weighted = np.einsum("ic,im->icm", slopes, block.scaled[:, 0])
            self.constant += slopes.T @ block.gates[:, 0]
        else:
            weighted = slopes[:, :, None] * block.scaled
            self.constant += np.einsum("ic,icm->cm", slopes, block.gates)
        self.features += block.u.T @ weighted.reshape(len(slopes), -1)
