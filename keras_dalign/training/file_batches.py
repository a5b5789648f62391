"""Training batches of features that are kept in a file, on TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

from keras_dalign.head.features import FeatureSet, as_inputs


def needs_file_batches(features: FeatureSet) -> bool:
    """Whether `fit` would copy features that are kept in a file into memory."""
    # With JAX and PyTorch, Keras slices arrays.
    return keras.backend.backend() == "tensorflow" and any(
        _is_map(leaf) for leaf in keras.tree.flatten(features.z)
    )


@contextmanager
def file_batches(
    features: FeatureSet,
    *,
    batch_size: int | None,
    steps: int | None,
    shuffle: bool | str,
    class_weight: dict[int, float] | None,
) -> Iterator[Any]:
    """The batches that `fit` would make of the features as arrays.

    Keras's pipeline for arrays copies them into a tensor, which features in a file are
    meant to avoid. Here the pipeline shuffles and batches row numbers, so the batches
    hold the same samples. The rows are read from the file, one batch ahead.

    Args:
        features: The features, with targets and weights.
        batch_size: As in `fit`.
        steps: As `steps_per_epoch` in `fit`.
        shuffle: As in `fit`.
        class_weight: As in `fit`.

    Yields:
        A `tf.data.Dataset` of `(inputs, targets)` or `(inputs, targets, weights)`. It
        is valid until the end of the `with` statement.
    """
    import tensorflow as tf  # noqa: PLC0415  (only where it is the backend)

    leaves = keras.tree.flatten(features.z)
    rows = np.arange(len(leaves[0]))
    adapter = ArrayDataAdapter(
        tuple(rows if _is_map(leaf) else leaf for leaf in leaves),
        features.y,
        features.sample_weight,
        batch_size=batch_size,
        steps=steps,
        shuffle=shuffle,
        class_weight=class_weight,
    )
    dtype = keras.config.floatx()

    def read(index: int, part: Any) -> Any:
        if not _is_map(leaves[index]):
            return part
        found = tf.numpy_function(
            lambda chosen: leaves[index][chosen].astype(dtype, copy=False),
            [part],
            dtype,
        )
        found.set_shape((part.shape[0], *leaves[index].shape[1:]))
        return found

    def look_up(parts: Any, *rest: Any) -> Any:
        found = [read(index, part) for index, part in enumerate(parts)]
        return (as_inputs(tuple(found) if len(found) > 1 else found[0]), *rest)

    # Without the length, Keras would warn at the end that data are missing.
    size = tf.data.experimental.assert_cardinality(adapter.num_batches)
    batches = adapter.get_tf_dataset().map(look_up).apply(size)
    try:
        yield batches.prefetch(tf.data.AUTOTUNE)
    finally:
        # TensorFlow keeps every function that a graph has called. The arrays that the
        # function refers to would stay on the disk.
        leaves.clear()


def _is_map(leaf: Any) -> bool:
    return isinstance(leaf, np.memmap)
