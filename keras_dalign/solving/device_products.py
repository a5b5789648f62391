"""Products with the gated features, compiled by Keras's backend."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from keras import ops

from keras_dalign.numerics import device
from keras_dalign.numerics.replicas import Replicas
from keras_dalign.solving.products import Products, SampleLoss

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.numerics.losses import ConvexLoss
    from keras_dalign.solving.feature_rows import FeatureRows
    from keras_dalign.solving.gates import Gates

logger = logging.getLogger("keras_dalign")

Result = TypeVar("Result")

_BLOCK_BYTES = 2**24
_ACCELERATOR_BLOCK_BYTES = 2**28
_LEAST_BLOCK_BYTES = 2**18


class DeviceProducts(Products):
    """Products in float32, compiled by Keras's backend.

    An accelerator keeps the features in its memory if they fit. Otherwise blocks are
    copied for every product from the host's memory, or from a memory map. If the device
    runs out of memory, it gets smaller blocks. With several processes its error is
    raised instead, because the other processes would not change their blocks.

    Each replica has a share of the rows of every block. With it, it computes logits and
    a part of `Phi^T u`. The backend gathers the logits block by block, and sums up the
    parts of `Phi^T u`.

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
        # Without an accelerator, the host's memory is the device's memory.
        self._holds = device.has_accelerator()
        self._block_bytes = _ACCELERATOR_BLOCK_BYTES if self._holds else _BLOCK_BYTES
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
        """Coefficients of the features, the bias, and those of the constant, if any."""
        q, constant = self.rows.fold(theta[: -self.units].reshape(self.rows.d, -1))
        parts = [q, theta[-self.units :]]
        if constant is not None:
            parts.append(constant.reshape(self.units, -1))
        return tuple(self._replicas.put(part) for part in parts)

    def _zeros(self) -> tuple[Any, ...]:
        return self._put_parameters(np.zeros(self.size))

    def _gradient(self, totals: tuple[Any, ...]) -> Array:
        """`Phi^T u` from its sums over rows, shape `(size,)`, float64."""
        q, bias, *rest = (
            self._replicas.summed(total).astype(np.float64) for total in totals
        )
        constant = rest[0].ravel() if rest else np.zeros(0)
        return np.concatenate([self.rows.unfold(q, constant).ravel(), bias])

    def _put(self, part: slice, values: np.ndarray) -> Any:
        """The values of a block's rows, on the replicas that have these rows."""
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
        """Computes, and retries with less data on the device if its memory is full."""
        while True:
            try:
                return compute()
            except Exception as error:
                alone = self._replicas.processes == 1
                full = alone and device.is_out_of_memory(error)
                if not full or not self._reduce():
                    raise

    def _reduce(self) -> bool:
        """Uses less memory of the device from here on; False if it is at its least."""
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
        """Slices of rows; their features, gates and scales (if any) on the devices."""
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
        """The sums for `Phi^T u` so far, with those of a block added."""
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
        """Logits and losses of a block, and the sums with its gradient added."""
        offset, targets, shares = labels
        logits = offset + self._block_forward(rows, parameters)
        values, slopes = loss.value_and_gradient_on_device(logits, targets)
        slopes = slopes * ops.expand_dims(shares, -1)
        return logits, values, self._block_backward(rows, slopes, totals)
