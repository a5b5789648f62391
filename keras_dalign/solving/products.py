"""Products with the gated features `Phi` and their transpose, never forming `Phi`.

    (Phi theta)_ic = sum_k G_ick (v_i . q_ck) + b_c,  G_ick = w_ck s(slope r_ck . v_i)

for trained parameters `theta = (q, b)`. Each takes `2 n d C m` flop, a block of rows at
a time: `P = V Q` for the block, then a sum over `k` with the gates, and the other way
round. Between the two lies the loss, so that value and gradient take one pass.
`NumpyProducts` computes in float64, or in float32; `DeviceProducts` does the same in
float32, compiled by Keras's backend, on accelerators and on several devices.

Gates are kept where they take little memory (`n m` numbers where outputs share them),
and computed again for every block where they do not.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import scipy.special
from keras import ops

from keras_dalign.numerics import device, threads
from keras_dalign.numerics.gram import gate_activations
from keras_dalign.numerics.replicas import Replicas

if TYPE_CHECKING:
    from keras_dalign.numerics.losses import ConvexLoss
    from keras_dalign.solving.feature_rows import Array, FeatureRows

logger = logging.getLogger("keras_dalign")

Result = TypeVar("Result")

# A block of rows, with what is computed from it, fits into the caches.
_BLOCK_BYTES = 2**22
_DEVICE_BLOCK_BYTES = 2**24
_ACCELERATOR_BLOCK_BYTES = 2**28
_LEAST_BLOCK_BYTES = 2**18

# From so many multiply-adds on, a product is worth several threads.
_THREADED = 2**21

# What is kept of the gates at most.
_KEPT_GATES_BYTES = 2**29


@dataclasses.dataclass(frozen=True, eq=False)
class SampleLoss:
    """What makes a loss of the products with all samples.

    Attributes:
        loss: The loss.
        offset: What is added to the products, `(n, C)`, float64.
        targets: From `ConvexLoss.targets`, `(n, C)`, float64.
        shares: Weights over the normaliser, `(n,)`, float64.
    """

    loss: ConvexLoss
    offset: Array
    targets: Array
    shares: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Gates:
    """The gates of a head.

    Attributes:
        r: Shape `(d, G, m)`, float64: `G` is 1 where outputs share their gates, else
            the number of outputs.
        w: Output weights, shape `(G, m)`, float64.
        slope: Slope of the sigmoid.
        kept: Their values `G`, shape `(n, G, m)`, where they cannot be computed from
            the features at hand; None where they can.
    """

    r: Array
    w: Array
    slope: float
    kept: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Number of gated units per output."""
        return int(self.w.shape[1])

    @property
    def groups(self) -> int:
        """Number of outputs with gates of their own, or 1."""
        return len(self.w)

    def of_output(self, output: int) -> tuple[Array, Array]:
        """Gates `(d, m)` and weights `(m,)` of one output."""
        group = output % self.groups
        return self.r[:, group], self.w[group]

    def values(self, v: np.ndarray) -> np.ndarray:
        """The gates' values times output weights.

        Args:
            v: Rows of `v`, shape `(rows, d)`; in float32 the values are, too.

        Returns:
            Shape `(rows, G, m)`.
        """
        r = self.r.reshape(len(self.r), -1)
        if v.dtype == np.float32:
            values = scipy.special.expit(np.float32(self.slope) * (v @ r.astype("f4")))
        else:
            values = gate_activations(v, r, self.slope)
        values = values.reshape(len(v), self.groups, self.width)
        values *= self.w.astype(v.dtype)
        return values

    def all_values(self, rows: FeatureRows, dtype: npt.DTypeLike) -> np.ndarray:
        """The values for all samples, shape `(n, G, m)`."""
        if self.kept is not None:
            return self.kept.astype(dtype, copy=False)
        out = np.empty((rows.n, self.groups, self.width), dtype)
        row_bytes = 8 * (rows.d + 2 * self.groups * self.width)

        def compute(part: slice) -> None:
            for block in rows.blocks(row_bytes, _BLOCK_BYTES, part):
                out[block] = self.values(rows.block(block, dtype))

        split = rows.n * self.r.size >= _THREADED
        threads.over_rows(compute, rows.n, split=split)
        return out

    def nbytes(self, n: int, dtype: npt.DTypeLike) -> int:
        """Bytes of the values for `n` samples."""
        return n * self.groups * self.width * np.dtype(dtype).itemsize


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
        """Values of the gates, `(n, G, m)`; None where blocks compute their own."""
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
        """Calls a function for parts of the rows, in threads if there is much to do."""
        # Computed here, not by each thread.
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
        """`Phi^T u` of its sums over parts of the rows, shape `(size,)`, float64."""
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


class DeviceProducts(Products):
    """Products in float32, compiled by Keras's backend.

    On an accelerator the features are kept there if they fit; elsewhere blocks are
    handed over from the host's memory, or from a memory map. A device that runs out
    of memory gets smaller blocks, unless there are other processes: these would not
    know, so that its error is raised.

    Of every block each replica has a share of the rows, and computes logits and a part
    of `Phi^T u` with them. The backend gathers the former, block by block, and sums up
    the latter.

    Args:
        rows: The features.
        gates: The gates.
        units: Number of outputs.
        replicas: The devices and processes; None for one device.
    """

    dtype = np.dtype("float32")

    def __init__(
        self,
        rows: FeatureRows,
        gates: Gates,
        units: int,
        replicas: Replicas | None = None,
    ) -> None:
        super().__init__(rows, gates, units)
        self._replicas = replicas or Replicas()
        # Elsewhere the host's memory is that of the device.
        self._holds = device.has_accelerator()
        self._block_bytes = (
            _ACCELERATOR_BLOCK_BYTES if self._holds else _DEVICE_BLOCK_BYTES
        )
        self._held: dict[int, Any] = {}
        self._held_samples: tuple[SampleLoss | None, dict[int, Any]] = (None, {})
        self._forward = self._replicas.compiled(self._block_forward)
        self._backward = self._replicas.compiled(self._block_backward)
        self._steps: dict[ConvexLoss, Callable[..., Any]] = {}
        if rows.normalisation is not None:
            self._mean = rows.normalisation.mean.astype(np.float32)

    def product(self, theta: Array) -> Array:
        """See `Products`."""
        return self._retried(lambda: self._product(theta))

    def transposed_product(self, u: Array) -> Array:
        """See `Products`."""
        return self._retried(lambda: self._transposed_product(u))

    def loss_and_gradient(
        self, theta: Array, samples: SampleLoss
    ) -> tuple[Array, float, Array]:
        """See `Products`."""
        return self._retried(lambda: self._loss_and_gradient(theta, samples))

    def _product(self, theta: Array) -> Array:
        out = np.empty((self.rows.n, self.units))
        parameters = self._put_parameters(theta)
        for part, rows in self._blocks():
            out[part] = self._gathered(part, self._forward(rows, parameters))
        return out

    def _transposed_product(self, u: Array) -> Array:
        totals = self._zeros()
        for part, rows in self._blocks():
            totals = self._backward(rows, self._put(part, u[part]), totals)
        return self._gradient(totals)

    def _loss_and_gradient(
        self, theta: Array, samples: SampleLoss
    ) -> tuple[Array, float, Array]:
        logits, loss = np.empty((self.rows.n, self.units)), 0.0
        parameters, totals = self._put_parameters(theta), self._zeros()
        step = self._step(samples.loss)
        for part, rows in self._blocks():
            labels = self._labels(part, samples)
            found, values, totals = step(rows, labels, parameters, totals)
            logits[part] = self._gathered(part, found)
            loss += float(samples.shares[part] @ self._gathered(part, values))
        return logits, loss, self._gradient(totals)

    def _step(self, loss: ConvexLoss) -> Callable[..., Any]:
        """The compiled function for one block of a loss and its gradient."""
        if loss not in self._steps:
            self._steps[loss] = self._replicas.compiled(
                functools.partial(self._block_step, loss)
            )
        return self._steps[loss]

    def _put_parameters(self, theta: Array) -> tuple[Any, ...]:
        """Coefficients of the features and of the constant, if any, and the bias."""
        q, constant = self.rows.fold(theta[: -self.units].reshape(self.rows.d, -1))
        parts = [q, theta[-self.units :]]
        if constant is not None:
            parts.append(constant.reshape(self.units, -1))
        return tuple(self._replicas.put(part) for part in parts)

    def _zeros(self) -> tuple[Any, ...]:
        return self._put_parameters(np.zeros(self.size))

    def _gradient(self, totals: tuple[Any, ...]) -> Array:
        """`Phi^T u` of its sums over rows, shape `(size,)`, float64."""
        q, bias, *rest = (
            self._replicas.summed(total).astype(np.float64) for total in totals
        )
        constant = rest[0].ravel() if rest else np.zeros(0)
        return np.concatenate([self.rows.unfold(q, constant).ravel(), bias])

    def _put(self, part: slice, values: np.ndarray) -> Any:
        """The values of a block's rows, each with the replica that has the row."""
        return self._replicas.put_rows(
            part,
            values.shape[1:],
            lambda rows: values[rows.start - part.start : rows.stop - part.start],
        )

    def _gathered(self, part: slice, values: Any) -> Array:
        found = self._replicas.gathered(values, part.stop - part.start)
        return found.astype(np.float64)

    def _labels(self, part: slice, samples: SampleLoss) -> tuple[Any, ...]:
        """Offset, targets and shares of a block on the devices."""
        if self._held_samples[0] is not samples:
            self._held_samples = samples, {}
        labels: tuple[Any, ...] | None = self._held_samples[1].get(part.start)
        if labels is None:
            arrays = samples.offset, samples.targets, samples.shares
            labels = tuple(self._put(part, array[part]) for array in arrays)
            self._held_samples[1][part.start] = labels
        return labels

    def _retried(self, compute: Callable[[], Result]) -> Result:
        """Computes, with less on the device as long as it runs out of memory."""
        while True:
            try:
                return compute()
            except Exception as error:
                alone = self._replicas.processes == 1
                full = alone and device.is_out_of_memory(error)
                if not full or not self._reduce():
                    raise

    def _reduce(self) -> bool:
        """Takes less memory of the device from here on; False if that is too little."""
        if self._holds:
            self._holds = False
            remedy = "features are handed over for every product"
        elif self._block_bytes // 4 >= _LEAST_BLOCK_BYTES:
            self._block_bytes //= 4
            remedy = f"with blocks of {self._block_bytes / 2**20:.3g} MiB"
        else:
            return False
        self._held.clear()
        self._held_samples = None, {}
        logger.warning("The device ran out of memory. Going on: %s.", remedy)
        return True

    def _blocks(self) -> Iterator[tuple[slice, tuple[Any, ...]]]:
        """Slices of rows, with features, gates and scales, if any, on the devices."""
        columns = self.rows.d + 3 * self.units * self.gates.width
        block_bytes = self._block_bytes * self._replicas.count
        for part in self.rows.blocks(4 * columns, block_bytes):
            held = self._held.get(part.start)
            if held is None:
                raw, gates = self.rows.raw, (self.gates.groups, self.gates.width)
                put = self._replicas.put_rows
                held = (
                    put(part, raw.shape[1:], lambda rows: self.rows.raw[rows]),
                    put(part, gates, self._gates_of),
                )
                if self.rows.scales is not None:
                    held += (self._put(part, self.rows.scales[part]),)
                if self._holds:
                    self._held[part.start] = held
            yield part, held

    def _opened(self, rows: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        """Centred features, gates times scales, and gates, of a block."""
        raw, gates, *scales = rows
        if not scales:
            return raw, gates, gates
        mean = ops.convert_to_tensor(self._mean)
        return raw - mean, gates * ops.reshape(scales[0], (-1, 1, 1)), gates

    def _block_forward(self, rows: tuple[Any, ...], parameters: tuple[Any, ...]) -> Any:
        """`Phi theta` of a block, `(rows, C)`."""
        u, scaled, gates = self._opened(rows)
        q, bias, *constant = parameters
        shape = (-1, self.units, self.gates.width)
        projections = ops.reshape(ops.matmul(u, q), shape)
        logits = ops.sum(projections * scaled, axis=-1) + bias
        if not constant:
            return logits
        if self.gates.groups == 1:
            return logits + ops.matmul(gates[:, 0], ops.transpose(constant[0]))
        return logits + ops.sum(gates * constant[0], axis=-1)

    def _block_backward(
        self, rows: tuple[Any, ...], slopes: Any, totals: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Sums for `Phi^T u` with those of a block added to them."""
        u, scaled, gates = self._opened(rows)
        q, bias, *constant = totals
        slopes_k = ops.expand_dims(slopes, -1)
        size = self.units * self.gates.width
        weighted = ops.reshape(scaled * slopes_k, (-1, size))
        q = q + ops.matmul(ops.transpose(u), weighted)
        bias = bias + ops.sum(slopes, axis=0)
        if not constant:
            return q, bias
        if self.gates.groups == 1:
            added = ops.matmul(ops.transpose(slopes), gates[:, 0])
        else:
            added = ops.sum(gates * slopes_k, axis=0)
        return q, bias, constant[0] + added

    def _block_step(
        self,
        loss: ConvexLoss,
        rows: tuple[Any, ...],
        labels: tuple[Any, ...],
        parameters: tuple[Any, ...],
        totals: tuple[Any, ...],
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        """Logits and losses of a block, and sums with those of its gradient added."""
        offset, targets, shares = labels
        logits = offset + self._block_forward(rows, parameters)
        values, slopes = loss.value_and_gradient_on_device(logits, targets)
        slopes = slopes * ops.expand_dims(shares, -1)
        return logits, values, self._block_backward(rows, slopes, totals)
