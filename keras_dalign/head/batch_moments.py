"""Batch normalisation by the batch's mean and variance, in few passes over memory.

Mean, variance and normalisation take three passes over an activation; inference takes
one. On CPUs, TensorFlow has one kernel for all three. PyTorch takes two passes if the
centred values are normalised in place. XLA fuses the plain formula. All of them
subtract the mean before they square: `E[x^2] - E[x]^2` cancels in single precision, and
has no correct digit where the mean is 1,000 standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops
from keras.layers import BatchNormalization

Moments = tuple[Any, Any, Any]

_BLOCK_ROWS = 4096


def moments_and_normalized(
    layer: BatchNormalization, x: Any, mask: Any
) -> tuple[Moments, Any]:
    """The output of `BatchNormalization` in training, and the moments that it uses.

    Args:
        layer: The layer, for its axis, epsilon, scale and offset.
        x: Its input, float32 or float64.
        mask: True where samples and steps count, of the shape of `x` without its last
            axis; or None.

    Returns:
        Count `()`, mean and population variance `(channels,)`, and `x` normalised by
        them. Mean and variance are arbitrary where the count is 0.
    """
    axes = [axis for axis in range(len(x.shape)) if axis != layer.axis % len(x.shape)]
    count = math.prod(ops.shape(x)[axis] for axis in axes)
    kernel = _kernel(layer, x, mask)
    if kernel is not None:
        mean, variance, normalized = kernel(layer, x, count)
        return (ops.cast(count, x.dtype), mean, variance), normalized
    shape = [1] * len(x.shape)
    shape[layer.axis] = -1
    if mask is None:
        # Not ops.moments: on PyTorch it is E[x^2] - E[x]^2.
        mean = ops.mean(x, axis=axes)
        variance = ops.mean(ops.square(x - ops.reshape(mean, shape)), axis=axes)
        count = ops.cast(count, x.dtype)
    else:
        weights = ops.expand_dims(ops.cast(mask, x.dtype), -1)
        weights = ops.broadcast_to(weights, ops.shape(x))
        counts = ops.sum(weights, axis=axes)
        divisor = ops.maximum(counts, 1.0)
        mean = ops.sum(weights * x, axis=axes) / divisor
        centred = ops.square(x - ops.reshape(mean, shape))
        variance = ops.sum(weights * centred, axis=axes) / divisor
        count = counts[0]
    return (count, mean, variance), normalize(layer, x, mean, variance)


def normalize(layer: BatchNormalization, x: Any, mean: Any, variance: Any) -> Any:
    """`x` normalised by given moments, then scaled and shifted as the layer does."""
    return ops.batch_normalization(
        x,
        mean=ops.cast(mean, x.dtype),
        variance=ops.cast(variance, x.dtype),
        axis=layer.axis,
        offset=None if layer.beta is None else ops.cast(layer.beta, x.dtype),
        scale=None if layer.gamma is None else ops.cast(layer.gamma, x.dtype),
        epsilon=layer.epsilon,
    )


def has_tensorflow_kernel() -> bool:
    """Whether TensorFlow's kernel is used, which its XLA must then not compile."""
    # XLA compiles it to `E[x^2] - E[x]^2`. The formula of cuDNN is not documented, so
    # on accelerators XLA fuses the plain formula instead.
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf  # noqa: PLC0415  (only where it is the backend)

    devices = tf.config.list_logical_devices()
    return all(device.device_type == "CPU" for device in devices)


def _kernel(
    layer: BatchNormalization, x: Any, mask: Any
) -> Callable[..., tuple[Any, Any, Any]] | None:
    if mask is not None or layer.axis % len(x.shape) != len(x.shape) - 1:
        return None
    if keras.backend.backend() == "torch":
        return _torch_kernel
    if has_tensorflow_kernel() and x.dtype == "float32":
        return _tensorflow_kernel
    return None


def _tensorflow_kernel(
    layer: BatchNormalization, x: Any, count: Any
) -> tuple[Any, Any, Any]:
    import tensorflow as tf  # noqa: PLC0415  (only where it is the backend)

    channels = x.shape[-1]
    is_map = len(x.shape) == 4
    normalized, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x if is_map else tf.reshape(x, (-1, 1, 1, channels)),
        scale=tf.ones(channels) if layer.gamma is None else layer.gamma.value,
        offset=tf.zeros(channels) if layer.beta is None else layer.beta.value,
        mean=[],
        variance=[],
        epsilon=layer.epsilon,
        is_training=True,
    )
    # Its divisor is count - 1, or 1.
    if isinstance(count, int):
        variance *= max(count - 1, 1) / max(count, 1)
    else:
        count = tf.cast(count, x.dtype)
        variance *= tf.maximum(count - 1.0, 1.0) / tf.maximum(count, 1.0)
    return mean, variance, normalized if is_map else tf.reshape(normalized, tf.shape(x))


def _torch_kernel(
    layer: BatchNormalization, x: Any, count: int
) -> tuple[Any, Any, Any]:
    import torch  # noqa: PLC0415  (only where it is the backend)

    # Not torch.nn.functional.batch_norm, whose sums in single precision lose a mean
    # that is far from 0, nor torch.var_mean, which takes three times as long.
    channels = x.shape[-1]
    centred = x.reshape(-1, channels)
    mean = centred.mean(dim=0)
    centred = centred - mean
    # Norms do not sum pairwise either, so they are summed over blocks of rows.
    whole = count - count % _BLOCK_ROWS
    blocks = centred[:whole].reshape(-1, _BLOCK_ROWS, channels)
    squares = torch.linalg.vector_norm(blocks, dim=1).square().sum(dim=0)
    squares += torch.linalg.vector_norm(centred[whole:], dim=0).square()
    variance = squares / count
    factor = torch.rsqrt(variance + layer.epsilon)
    if layer.gamma is not None:
        factor = factor * ops.cast(layer.gamma, x.dtype)
    normalized = centred.mul_(factor)
    if layer.beta is not None:
        normalized = normalized.add_(ops.cast(layer.beta, x.dtype))
    return mean, variance, normalized.reshape(x.shape)
