"""Population statistics for batch normalisation, from passes over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dalign import data

BatchNormalization = keras.layers.BatchNormalization


def reestimate_batch_norm(
    model: keras.Model,
    x: Any,
    *,
    batch_size: int = 256,
    passes: int = 1,
    steps: int | None = None,
) -> int:
    """Sets the statistics of every `BatchNormalization` from the whole data.

    Training keeps exponential moving averages, which after few steps (or with a
    high momentum) are far from the statistics of the data; what the model then
    computes in inference mode is not what was trained. Here the mean and the
    variance of every normalisation's input are pooled over all samples, exactly
    and in float64. Everything but batch normalisation runs in inference mode:
    dropout is off.

    In the first pass a normalisation sees what it sees in training, inputs that
    were normalised upstream by the statistics of their batch, so that a large
    `batch_size` is more exact. Each further pass normalises by the statistics just
    found. The first normalisation is exact after one pass, the second one after
    two, and so on; in practice one pass is close for all.

    Layers with `trainable=False` are left alone: they train with their moving
    statistics, which therefore cannot be stale.

    Args:
        model: Any built Keras model. Only moving means and variances change.
        x: Inputs: arrays, a `tf.data.Dataset`, a `PyDataset`, a torch `DataLoader`
            or a generator (whose targets, if any, are ignored).
        batch_size: Int, samples per batch for arrays.
        passes: Positive int, number of passes over the data.
        steps: Int, batches per pass; needed for endless streams.

    Returns:
        The number of layers that were set.

    Raises:
        ValueError: If there are no data, if `passes` is not a positive int, if a
            layer uses batch renormalisation, or if statistics come out non-finite
            (the model is then left as it was).

    Example:

    ```python
    base.fit(x, y, epochs=10)
    keras_dalign.reestimate_batch_norm(base, x)
    base.evaluate(x_test, y_test)
    ```
    """
    if not isinstance(passes, int) or passes < 1:
        raise ValueError(f"`passes` must be a positive int. Received: passes={passes}")
    layers = batch_norm_layers(model)
    if not layers:
        return 0
    before = [_statistics(layer) for layer in layers]
    try:
        for index in range(passes):
            probe = _MomentsProbe(model, layers, by_batch=index == 0)
            batches = data.batches(x, batch_size=batch_size, steps=steps)
            _set_statistics(layers, _pool(probe.moments(batch[0]) for batch in batches))
    except Exception:
        _set_statistics(layers, before)
        raise
    return len(layers)


def batch_norm_layers(model: keras.Model) -> list[BatchNormalization]:
    """The normalisations that train by batch statistics, each once."""
    layers: list[BatchNormalization] = []
    for layer in model._flatten_layers():
        if isinstance(layer, BatchNormalization) and layer.trainable:
            if getattr(layer, "renorm", False):
                raise ValueError(
                    "Batch renormalisation cannot be re-estimated. Received: layer "
                    f"'{layer.name}' with renorm=True"
                )
            if not any(layer is known for known in layers):
                layers.append(layer)
    return layers


class _MomentsProbe(keras.Model):
    """Maps a batch to the count, mean and variance of each normalisation's input.

    Being a Keras model, it is compiled by Keras on every backend. Outputs have one
    row per call of the layer, so that the replicas of a distribution strategy come
    out as further rows.
    """

    def __init__(
        self, model: keras.Model, layers: list[BatchNormalization], by_batch: bool
    ) -> None:
        super().__init__(dtype=model.dtype_policy)
        self.model = model
        self.normalizations = layers
        self.by_batch = by_batch
        self.built = True

    def call(self, inputs: Any, training: bool = False) -> list[Any]:
        """Counts `(calls, 1)`, means and variances `(calls, channels)` by layer."""
        found: dict[int, list[Any]] = {id(layer): [] for layer in self.normalizations}

        def normalize(layer: BatchNormalization, x: Any, mask: Any) -> Any:
            x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
            count, mean, variance = _moments(layer, x, mask)
            row = (ops.reshape(count, (1, 1)), mean[None], variance[None])
            found[id(layer)].append(row)
            if not self.by_batch:
                mean, variance = layer.moving_mean, layer.moving_variance
            x = ops.batch_normalization(
                x,
                mean=ops.cast(mean, x.dtype),
                variance=ops.cast(variance, x.dtype),
                axis=layer.axis,
                offset=None if layer.beta is None else ops.cast(layer.beta, x.dtype),
                scale=None if layer.gamma is None else ops.cast(layer.gamma, x.dtype),
                epsilon=layer.epsilon,
            )
            return ops.cast(x, layer.compute_dtype)

        with _replaced_call(self.normalizations, normalize):
            self.model(inputs, training=False)
        unused = [layer.name for layer in self.normalizations if not found[id(layer)]]
        if unused:
            raise ValueError(
                "Some BatchNormalization layers take no part in the model's output, so "
                f"they have no statistics. Received: {unused}"
            )
        # A layer that is called twice has two populations, pooled as one.
        return [
            [ops.concatenate(rows, axis=0) for rows in zip(*found[id(layer)], strict=True)]
            for layer in self.normalizations
        ]

    def moments(self, x: Any) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The moments of one batch, as float64 arrays of one row per replica."""
        return [
            tuple(np.asarray(part, dtype="float64") for part in layer)
            for layer in self.predict_on_batch(x)
        ]


@contextmanager
def _replaced_call(
    layers: list[BatchNormalization], function: Callable[..., Any]
) -> Iterator[None]:
    """While the model is traced, its normalisations call `function` instead."""

    def replacement(layer: BatchNormalization) -> Callable[..., Any]:
        def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
            return function(layer, inputs, mask)

        return call

    for layer in layers:
        layer.__dict__["call"] = replacement(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["call"]


def _moments(layer: BatchNormalization, x: Any, mask: Any) -> tuple[Any, Any, Any]:
    axes = [axis for axis in range(len(x.shape)) if axis != layer.axis % len(x.shape)]
    if mask is None:
        mean, variance = ops.moments(x, axes=axes)
        return ops.cast(_size(x, axes), x.dtype), mean, variance
    weights = ops.expand_dims(ops.cast(mask, x.dtype), -1)
    weights = ops.broadcast_to(weights, ops.shape(x))
    count = ops.sum(weights, axis=axes)
    mean = ops.sum(weights * x, axis=axes) / count
    shape = [1] * len(x.shape)
    shape[layer.axis] = -1
    variance = ops.sum(weights * ops.square(x - ops.reshape(mean, shape)), axes) / count
    return count[0], mean, variance


def _size(x: Any, axes: list[int]) -> Any:
    shape = ops.shape(x)
    size = 1
    for axis in axes:
        size = size * shape[axis]
    return size


def _pool(
    batches: Iterator[list[tuple[np.ndarray, np.ndarray, np.ndarray]]],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pools moments by the law of total variance (Chan's update), in float64."""
    pooled: list[list[Any]] = []
    for batch in batches:
        if not pooled:
            pooled = [[0.0, 0.0, 0.0] for _ in batch]
        for total, (counts, means, variances) in zip(pooled, batch, strict=True):
            for count, mean, variance in zip(
                counts[:, 0], means, variances, strict=True
            ):
                n = total[0] + count
                delta = mean - total[1]
                total[2] = (
                    total[0] * total[2]
                    + count * variance
                    + delta**2 * (total[0] * count / n)
                ) / n
                total[1] = total[1] + delta * (count / n)
                total[0] = n
    if not pooled:
        raise ValueError(
            "Batch-norm statistics need at least one batch. Received: an empty data set"
        )
    for _, mean, variance in pooled:
        if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(variance))):
            raise ValueError(
                "Batch-norm statistics came out non-finite; the model was left as it "
                "was. Received: NaN or infinity in the inputs, or in what the model "
                "makes of them."
            )
    return [(mean, variance) for _, mean, variance in pooled]


def _statistics(layer: BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
    return (
        ops.convert_to_numpy(layer.moving_mean),
        ops.convert_to_numpy(layer.moving_variance),
    )


def _set_statistics(
    layers: list[BatchNormalization],
    statistics: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    for layer, (mean, variance) in zip(layers, statistics, strict=True):
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(variance)
