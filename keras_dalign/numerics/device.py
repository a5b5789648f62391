"""The device of Keras's backend: compiled functions, transfers, memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops


@functools.cache
def has_accelerator() -> bool:
    """Whether the backend computes on another device than the CPU."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf  # noqa: PLC0415  (only where it is the backend)

        return bool(tf.config.list_logical_devices("GPU"))
    if backend == "jax":
        import jax  # noqa: PLC0415

        return jax.default_backend() != "cpu"
    if backend == "torch":
        return str(ops.zeros(()).device) != "cpu"
    return False


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors, compiled by the backend, without gradients.

    Args:
        function: Takes and returns tensors; uses `keras.ops`.

    Returns:
        A function that computes the same.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf  # noqa: PLC0415

        return tf.function(function, jit_compile=has_accelerator())
    if backend == "jax":
        import jax  # noqa: PLC0415

        return jax.jit(function)
    if backend == "torch":
        import torch  # noqa: PLC0415

        return torch.no_grad()(function)
    return function


def put(array: np.ndarray, dtype: str = "float32") -> Any:
    """An array as a tensor on the device; its memory may be shared."""
    array = np.ascontiguousarray(array, dtype=dtype)
    # PyTorch shares memory, and warns about read-only arrays.
    return ops.convert_to_tensor(array if array.flags.writeable else array.copy())


def fetch(tensor: Any) -> np.ndarray:
    """A tensor as a NumPy array."""
    return np.asarray(ops.convert_to_numpy(tensor))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of the backend means that the device is out of memory."""
    kind = type(error).__name__
    return (
        kind in {"ResourceExhaustedError", "OutOfMemoryError", "MemoryError"}
        or "RESOURCE_EXHAUSTED" in str(error)
        or "out of memory" in str(error).lower()
    )
