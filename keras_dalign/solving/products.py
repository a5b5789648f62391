"""Products with the gated features `Phi` and their transpose, never forming `Phi`.

    (Phi theta)_ic = sum_k G_ick (v_i . q_ck) + b_c,  G_ick = w_ck s(slope r_ck . v_i)

for trained parameters `theta = (q, b)`. Each takes `2 n d C m` flop, a block of rows at
a time: `P = V Q` for the block, then a sum over `k` with the gates, and the other way
round. `NumpyProducts` is the reference, in float64; `DeviceProducts` computes the same
in float32, compiled by Keras's backend, where the model runs.

Gates are kept where they take little memory (`n m` numbers where outputs share them),
and computed again for every block where they do not.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.special
from keras import ops

from keras_dalign.numerics import device
from keras_dalign.numerics.gram import gate_activations
from keras_dalign.numerics.replicas import Replicas
from keras_dalign.solving.feature_rows import LEAST_SQUARE, Array, FeatureRows

logger = logging.getLogger("keras_dalign")

# A block of rows, with what is computed from it, fits into the processor's cache.
_BLOCK_BYTES = 2**22
_DEVICE_BLOCK_BYTES = 2**24
_ACCELERATOR_BLOCK_BYTES = 2**28
_LEAST_BLOCK_BYTES = 2**18

# What is kept of the gates at most.
_KEPT_GATES_BYTES = 2**29

# Gives the cotangents `(rows, C)` for the logits `(rows, C)` of a slice of rows.
Cotangents = Callable[[slice, Array], Array]


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
        for part in rows.blocks(row_bytes, _BLOCK_BYTES):
            out[part] = self.values(rows.block(part, dtype))
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

    @abc.abstractmethod
    def product(self, theta: Array) -> Array:
        """`Phi theta`.

        Args:
            theta: Shape `(size,)`.

        Returns:
            Shape `(n, C)`, float64.
        """

    @abc.abstractmethod
    def sweep(self, theta: Array, cotangents: Cotangents) -> Array:
        """`Phi^T u`, where `u` depends on `Phi theta`, in one pass over the features.

        Args:
            theta: Shape `(size,)`.
            cotangents: Gives `u` for each block of `Phi theta`.

        Returns:
            Shape `(size,)`, float64.
        """

    def transposed_product(self, u: Array) -> Array:
        """`Phi^T u` for `u` of shape `(n, C)`; shape `(size,)`, float64."""
        return self.sweep(np.zeros(self.size), lambda rows, _: u[rows])


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
        for part in self._blocks():
            u = self.rows.centred(part, self.dtype)
            out[part] = self._forward(u, part, q, constant)[0]
        out += bias
        return out

    def sweep(self, theta: Array, cotangents: Cotangents) -> Array:
        """See `Products`."""
        q, constant, bias = self._parts(theta)
        gradient = np.zeros(q.shape, self.dtype)
        gradient_constant = np.zeros(q.shape[1])
        gradient_b = np.zeros(self.units)
        for part in self._blocks():
            u = self.rows.centred(part, self.dtype)
            logits, gates = self._forward(u, part, q, constant)
            slopes = cotangents(part, logits + bias)
            gradient_b += slopes.sum(axis=0)
            weighted = gates * slopes.astype(self.dtype)[:, :, None]
            weighted = weighted.reshape(len(u), -1)
            if self.rows.scales is not None:
                gradient_constant += weighted.sum(axis=0)
                weighted *= self.rows.scales[part, None].astype(self.dtype)
            gradient += u.T @ weighted
        found = self.rows.unfold(gradient.astype(np.float64), gradient_constant)
        return np.concatenate([found.ravel(), gradient_b])

    def _parts(self, theta: Array) -> tuple[np.ndarray, np.ndarray | None, Array]:
        """Coefficients of the features `(p, C m)`, of the constant, and the bias."""
        q, constant = self.rows.fold(theta[: -self.units].reshape(self.rows.d, -1))
        if constant is not None:
            constant = constant.astype(self.dtype)
        return q.astype(self.dtype), constant, theta[-self.units :]

    def _blocks(self) -> Iterator[slice]:
        columns = self.rows.d + 2 * self.units * self.gates.width
        return self.rows.blocks(self.dtype.itemsize * columns, _BLOCK_BYTES)

    def _forward(
        self, u: np.ndarray, part: slice, q: np.ndarray, constant: np.ndarray | None
    ) -> tuple[Array, np.ndarray]:
        """Logits `(rows, C)` without bias, and the gates `(rows, G, m)`."""
        if self.kept_gates is not None:
            gates = self.kept_gates[part]
        else:
            gates = self.gates.values(self.rows.block(part, self.dtype))
        projections = u @ q
        if self.rows.scales is not None:
            projections *= self.rows.scales[part, None].astype(self.dtype)
            projections += constant
        projections = projections.reshape(len(u), self.units, -1)
        if self.gates.groups == 1:
            logits = np.einsum("icm,im->ic", projections, gates[:, 0])
        else:
            logits = np.einsum("icm,icm->ic", projections, gates)
        return logits.astype(np.float64), gates


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
        self._forward = self._replicas.compiled(self._block_forward)
        self._backward = self._replicas.compiled(self._block_backward)
        self._constants: tuple[Any, ...] = ()
        if rows.normalisation is not None:
            moments = (rows.normalisation.mean, rows.normalisation.inverse)
            self._constants += tuple(self._replicas.put(moment) for moment in moments)

    def product(self, theta: Array) -> Array:
        """See `Products`."""
        return self._retried(lambda: self._product(theta))

    def sweep(self, theta: Array, cotangents: Cotangents) -> Array:
        """See `Products`."""
        return self._retried(lambda: self._sweep(theta, cotangents))

    def _product(self, theta: Array) -> Array:
        out = np.empty((self.rows.n, self.units))
        q = self._put_q(theta)
        for part, raw, gates in self._blocks():
            out[part] = self._logits(part, self._forward(raw, gates, q)[0])
        out += theta[-self.units :]
        return out

    def _sweep(self, theta: Array, cotangents: Cotangents) -> Array:
        q = self._put_q(theta)
        bias = theta[-self.units :]
        gradient = self._put_q(np.zeros(self.size))
        gradient_b = np.zeros(self.units)
        for part, raw, gates in self._blocks():
            logits, v, values = self._forward(raw, gates, q)
            u = cotangents(part, self._logits(part, logits) + bias)
            gradient_b += u.sum(axis=0)
            gradient = self._backward(v, values, self._put(part, u), gradient)
        found = self._replicas.summed(gradient).ravel()
        return np.concatenate([found, gradient_b], dtype=np.float64)

    def _put_q(self, theta: Array) -> Any:
        return self._replicas.put(theta[: -self.units].reshape(self.rows.d, -1))

    def _put(self, part: slice, values: np.ndarray) -> Any:
        """The values of a block's rows, each with the replica that has the row."""
        return self._replicas.put_rows(
            part,
            values.shape[1:],
            lambda rows: values[rows.start - part.start : rows.stop - part.start],
        )

    def _logits(self, part: slice, logits: Any) -> Array:
        found = self._replicas.gathered(logits, part.stop - part.start)
        return found.astype(np.float64)

    def _retried(self, compute: Callable[[], Array]) -> Array:
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
        logger.warning("The device ran out of memory. Going on: %s.", remedy)
        return True

    def _blocks(self) -> Iterator[tuple[slice, Any, Any]]:
        """Slices of rows, with features and gates on the devices."""
        columns = self.rows.d + 3 * self.units * self.gates.width
        block_bytes = self._block_bytes * self._replicas.count
        for part in self.rows.blocks(4 * columns, block_bytes):
            held = self._held.get(part.start)
            if held is None:
                raw, gates = self.rows.raw, (self.gates.groups, self.gates.width)
                held = (
                    self._replicas.put_rows(
                        part, raw.shape[1:], lambda rows: self.rows.raw[rows]
                    ),
                    self._replicas.put_rows(part, gates, self._gates_of),
                )
                if self._holds:
                    self._held[part.start] = held
            yield part, *held

    def _gates_of(self, rows: slice) -> np.ndarray:
        if self.kept_gates is not None:
            return self.kept_gates[rows]
        return self.gates.values(self.rows.block(rows, self.dtype))

    def _block_forward(self, raw: Any, gates: Any, q: Any) -> tuple[Any, Any, Any]:
        """Logits without bias, the rows of `v`, and the gates as they were given."""
        v = raw
        if self._constants:
            mean, inverse = self._constants
            v = (v - mean) * inverse
            square = ops.sum(ops.square(v), axis=-1, keepdims=True)
            v = v * ops.sqrt(v.shape[1] / ops.maximum(square, LEAST_SQUARE))
            v = ops.concatenate([v, ops.ones_like(v[:, :1])], axis=-1)
        projections = ops.reshape(ops.matmul(v, q), (-1, self.units, self.gates.width))
        return ops.sum(projections * gates, axis=-1), v, gates

    def _block_backward(self, v: Any, gates: Any, u: Any, total: Any) -> Any:
        """`total` with `Phi^T u` of a block added to it, shape `(d, C m)`."""
        weighted = gates * ops.expand_dims(u, -1)
        size = self.units * self.gates.width
        weighted = ops.reshape(weighted, (-1, size))
        return total + ops.matmul(ops.transpose(v), weighted)
