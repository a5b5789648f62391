"""Population statistics for batch normalisation, from passes over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.layers import BatchNormalization

from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.head.batch_moments import (
    has_tensorflow_kernel,
    moments_and_normalized,
    normalize,
)
from keras_dalign.numerics.arguments import integer, keras_model
from keras_dalign.numerics.threads import in_turn

# Count, mean and variance.
_Moments = tuple[np.ndarray, ...]


@in_turn
def reestimate_batch_norm(
    model: keras.Model,
    x: Any,
    *,
    batch_size: int = 256,
    passes: int = 1,
    steps: int | None = None,
) -> int:
    """Sets the statistics of every `BatchNormalization` from the whole data.

    Training keeps exponential moving averages. After few steps, or with a high
    momentum, they are far from the statistics of the data, and the model computes
    another function in inference mode than it was trained for. Here the mean and the
    variance of the input of every normalisation are pooled over all samples, exactly
    and in float64. All other layers run in inference mode: dropout is off.

    In the first pass, a normalisation gets the same inputs as in training: layers
    before it normalise by the statistics of the batch. So a large `batch_size` is more
    exact.
    Each further pass normalises by the statistics of the pass before. The first
    normalisation is exact after one pass, the second one after two, and so on. In
    practice one pass is close for all.

    Layers with `trainable=False` are not changed: they train with their moving
    statistics, which cannot be out of date. Layers that the model does not use in
    inference mode are not changed either.

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
        ValueError: If the model is unbuilt or exploits already, if there are no data,
            if `passes` is not a positive int, if a layer is no plain batch
            normalisation, or if statistics come out non-finite. The model is not
            changed then.

    Example:

    ```python
    base.fit(x, y, epochs=10)
    keras_dalign.reestimate_batch_norm(base, x)
    base.evaluate(x_test, y_test)
    ```
    """
    integer("passes", passes)
    layers = batch_norm_layers(model)
    if not layers:
        return 0
    before = {index: _statistics(layer) for index, layer in enumerate(layers)}
    found: dict[int, Any] = {}
    try:
        for index in range(passes):
            if index < 2:
                probe = _MomentsProbe(model, layers, by_batch=index == 0)
            batches = data.batches(x, batch_size=batch_size, steps=steps, model=model)
            found = _pool(probe.moments(batch[0]) for batch in batches)
            _set_statistics(layers, found)
    except BaseException:
        _set_statistics(layers, before)
        raise
    return len(found)


def batch_norm_layers(model: keras.Model) -> list[BatchNormalization]:
    """The layers that normalise by batch statistics in training, each once."""
    keras_model(model)
    layers: list[BatchNormalization] = []
    for layer in model._flatten_layers():
        if isinstance(layer, AlignmentHead) and layer.phase == EXPLOITING:
            raise ValueError(
                "The model's statistics were set at the switch and are part of what is "
                f"frozen since. Received: model '{model.name}', whose alignment head "
                "is exploiting. Re-estimate before the switch."
            )
        if isinstance(layer, BatchNormalization) and layer.trainable:
            _check_is_plain(layer)
            if not any(layer is known for known in layers):
                layers.append(layer)
    return layers


def _check_is_plain(layer: BatchNormalization) -> None:
    if not layer.built:
        raise ValueError(
            "The model is not built: its batch normalisations have no statistics yet. "
            f"Received: unbuilt layer '{layer.name}'. Call the model once on a batch "
            "of data."
        )
    if getattr(layer, "renorm", False):
        raise ValueError(
            "Batch renormalisation cannot be re-estimated. Received: layer "
            f"'{layer.name}' with renorm=True"
        )
    if type(layer).call is not BatchNormalization.call:
        raise ValueError(
            "Only layers that compute what BatchNormalization computes can be "
            f"re-estimated. Received: layer '{layer.name}' of type "
            f"{type(layer).__name__}, which overrides `call`. Freeze it with "
            "trainable=False, and its moving statistics are kept."
        )


class _MomentsProbe(keras.Model):
    """Maps a batch to the count, mean and variance of each normalisation's input.

    It is a Keras model, so Keras compiles it on every backend. Outputs have one row per
    call of the layer; the replicas of a distribution strategy add rows. There is one
    array per layer, since many small operations would take longer to trace than the
    layers.
    """

    def __init__(
        self, model: keras.Model, layers: list[BatchNormalization], by_batch: bool
    ) -> None:
        # TensorFlow accepts no name that begins with an underscore, as the default
        # would. No autocast: the model itself decides how its inputs are cast.
        super().__init__(name="moments_probe", dtype=model.dtype_policy, autocast=False)
        self.model = model
        self.normalizations = layers
        self.by_batch = by_batch
        if has_tensorflow_kernel():
            self.jit_compile = False
        self.built = True

    def call(self, inputs: Any) -> dict[str, Any]:
        """Runs the model in inference mode and measures its normalisations.

        Args:
            inputs: The model's inputs.

        Returns:
            Count, mean and variance side by side, `(calls, 1 + 2 * channels)`, by
            index of the layer, for those that were called.
        """
        found: dict[int, list[Any]] = {id(layer): [] for layer in self.normalizations}

        def normalized(layer: BatchNormalization, x: Any, mask: Any) -> Any:
            x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
            (count, mean, variance), by_batch = moments_and_normalized(layer, x, mask)
            row = ops.concatenate([ops.reshape(count, (1,)), mean, variance])
            found[id(layer)].append(ops.reshape(row, (1, -1)))
            if self.by_batch:
                x = by_batch
            else:
                x = normalize(layer, x, layer.moving_mean, layer.moving_variance)
            return ops.cast(x, layer.compute_dtype)

        with _replaced_call(self.model, self.normalizations, normalized):
            self.model(inputs, training=False)
        # The inputs of all calls of a layer are pooled.
        return {
            str(index): rows[0] if len(rows) == 1 else ops.concatenate(rows, axis=0)
            for index, layer in enumerate(self.normalizations)
            if (rows := found[id(layer)])
        }

    def moments(self, x: Any) -> dict[int, _Moments]:
        """The moments of one batch, as float64 arrays of one row per replica."""
        return {
            int(index): _parts(np.asarray(rows, dtype="float64"))
            for index, rows in self.predict_on_batch(x).items()
        }


def _parts(rows: np.ndarray) -> _Moments:
    channels = rows.shape[1] // 2
    count, mean, variance = np.split(rows, [1, 1 + channels], axis=1)
    return count, mean, variance


@contextmanager
def _replaced_call(
    model: keras.Model,
    layers: list[BatchNormalization],
    function: Callable[..., Any],
) -> Iterator[None]:
    """While the model is traced, its normalisations call `function` instead."""

    def replacement(layer: BatchNormalization) -> Callable[..., Any]:
        def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:  # noqa: ARG001
            return function(layer, inputs, mask)

        return call

    # Under keras.RematScope, tensors inside of a layer's call cannot be read outside.
    # Without gradients there is nothing to rematerialise.
    remat = [
        layer for layer in model._flatten_layers() if "_remat_mode" in layer.__dict__
    ]
    modes = [layer.__dict__["_remat_mode"] for layer in remat]
    try:
        for layer in remat:
            layer.__dict__["_remat_mode"] = None
        for layer in layers:
            layer.__dict__["call"] = replacement(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("call", None)
        for layer, mode in zip(remat, modes, strict=True):
            layer.__dict__["_remat_mode"] = mode


def _pool(
    batches: Iterator[dict[int, _Moments]],
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Pools moments by the law of total variance (Chan's update), in float64."""
    pooled: dict[int, list[Any]] = {}
    for batch in batches:
        for index, rows in batch.items():
            total = pooled.setdefault(index, [0.0, 0.0, 0.0])
            for (count,), mean, variance in zip(*rows, strict=True):
                # The whole batch is masked, or the replica got no samples.
                if count == 0:
                    continue
                n = total[0] + count
                # Values that are not finite are refused below.
                with np.errstate(invalid="ignore", over="ignore"):
                    delta = mean - total[1]
                    total[2] = (
                        total[0] * total[2]
                        + count * variance
                        + delta**2 * (total[0] * count / n)
                    ) / n
                    total[1] = total[1] + delta * (count / n)
                total[0] = n
    for count, mean, variance in pooled.values():
        if count == 0:
            raise ValueError(
                "Batch-norm statistics need at least one sample. Received: data that "
                "are masked out throughout."
            )
        if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(variance))):
            raise ValueError(
                "Batch-norm statistics came out non-finite; the model was left as it "
                "was. Received: NaN or infinity in `x`, or in what the model makes of "
                "it. Check the inputs, and that training did not diverge."
            )
    return {index: (mean, variance) for index, (_, mean, variance) in pooled.items()}


def _statistics(layer: BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
    return (
        ops.convert_to_numpy(layer.moving_mean),
        ops.convert_to_numpy(layer.moving_variance),
    )


def _set_statistics(
    layers: list[BatchNormalization],
    statistics: dict[int, tuple[np.ndarray, np.ndarray]],
) -> None:
    for index, (mean, variance) in statistics.items():
        layers[index].moving_mean.assign(mean)
        layers[index].moving_variance.assign(variance)
