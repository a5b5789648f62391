"""What gated units see by default: the feature map behind a global average pooling.

A convolutional network averages its last feature map over all places in front of its
output layer. Gated units need not be as forgetful: they are given the same map in a
coarse grid, whose cells are averages, too. There are as many cells as the samples can
feed, since the number of gated units falls as that of features grows, and
`width * d = 2 n` numbers per output are what exploitation trains in any case.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras

from keras_dalign import compat

# Fewer samples than this for each feature would leave less than six gated units.
_SAMPLES_PER_FEATURE = 3
# What is cached, and what the switch's rank check has to look at, grow with them.
_MOST_FEATURES = 2048
_POOLINGS = {
    keras.layers.GlobalAveragePooling2D: keras.layers.AveragePooling2D,
    keras.layers.GlobalAveragePooling3D: keras.layers.AveragePooling3D,
}
# What may stand between the pooling and the output layer.
_PASSED = (keras.layers.Dropout, keras.layers.Flatten)


def pooled_less(
    features: keras.KerasTensor, n_samples: int
) -> tuple[keras.KerasTensor, keras.KerasTensor] | None:
    """The feature map that a global average pooling made features of, in a grid.

    The pooling may stand inside of a Functional or Sequential model that is called as a
    layer, at any depth. A model of the same layers is then called in its place, which
    puts out the map, too.

    Args:
        features: Features of an output layer, shape `(batch, p)`.
        n_samples: Number of training samples.

    Returns:
        The features again, made beside the map, and the averages of the map over the
        cells of the finest grid that has no more than `n_samples / 3` and no more than
        2,048 features, shape `(batch, rows, columns, channels)` (channels first where
        the pooling has them there). Cells are of one size, and overlap a little where
        they do not divide the map. None if the features are no pooled map, if its size
        is unknown, if the samples are too few for more than one cell, or if the model
        that the pooling is in is called more than once on the way: Keras would not keep
        its weights shared in a file.
    """
    found = _beside(features)
    if found is None:
        return None
    features, pooling, feature_map = found
    shape = list(feature_map.shape[1:])
    channels = shape.pop(0 if pooling.data_format == "channels_first" else -1)
    if channels is None or None in shape:
        return None
    grid = _grid(shape, channels, n_samples)
    if grid is None:
        return None
    layer = _POOLINGS[type(pooling)](
        grid.size,
        grid.strides,
        data_format=pooling.data_format,
        dtype=pooling.dtype_policy,
        name=_unused(f"{pooling.name}_less", features),
    )
    return features, layer(feature_map)


def flattened(
    tensor: keras.KerasTensor, name: str, dtype: Any = None
) -> keras.KerasTensor:
    """Flattens features to vectors.

    Args:
        tensor: Features, shape `(batch, ...)`.
        name: Name of the layer that does it; longer if it is taken.
        dtype: Dtype policy of this layer.

    Returns:
        The features, shape `(batch, p)`.
    """
    return keras.layers.Flatten(dtype=dtype, name=_unused(name, tensor))(tensor)


def _unused(name: str, tensor: keras.KerasTensor) -> str:
    """The name, longer if an operation that the tensor is computed by has it."""
    taken = {operation.name for operation in compat.upstream([tensor])}
    while name in taken:
        name += "_"
    return name


def _beside(
    features: keras.KerasTensor,
) -> tuple[keras.KerasTensor, keras.layers.Layer, keras.KerasTensor] | None:
    """Pooled features, the layer that pooled, and the map: all in the same graph."""
    call, index = compat.producer(features)
    layer = call.operation
    if type(layer) in _POOLINGS:
        return features, layer, call.inputs[0]
    if type(layer) in _PASSED:
        found = _beside(call.inputs[0])
        if found is None:
            return None
        pooled, pooling, feature_map = found
        if pooled is not call.inputs[0]:
            args, kwargs = keras.tree.map_structure(
                lambda value: pooled if value is call.inputs[0] else value,
                (call.args, call.kwargs),
            )
            features = layer(*args, **kwargs)
        return features, pooling, feature_map
    ends = compat.graph_ends(layer)
    if ends is None or layer in compat.upstream(call.inputs):
        return None
    inputs, outputs = ends
    found = _beside(outputs[index])
    if found is None:
        return None
    inside, pooling, inside_map = found
    both = keras.Model(inputs, [inside, inside_map], name=layer.name)
    features, feature_map = both(*call.args, **call.kwargs)
    return features, pooling, feature_map


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Cells of one size, at even distances, that cover a map."""

    cells: tuple[int, ...]
    size: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, shape: list[int], most: int) -> _Grid:
        """The finest grid with at most so many cells along each side."""
        cells = tuple(max(_divisions(side, most)) for side in shape)
        strides = tuple(side // n for side, n in zip(shape, cells, strict=True))
        size = tuple(
            side - (n - 1) * stride
            for side, n, stride in zip(shape, cells, strides, strict=True)
        )
        return cls(cells, size, strides)


def _divisions(side: int, most: int) -> list[int]:
    """The numbers of cells along a side whose cells overlap by less than a half."""
    # Cells of one size without padding: Keras's backends pad averages differently.
    return [n for n in range(1, min(side, most) + 1) if side % n < side // n]


def _grid(shape: list[int], channels: int, n_samples: int) -> _Grid | None:
    """The finest grid with few enough features; None if that is a single cell."""
    most = min(n_samples / _SAMPLES_PER_FEATURE, _MOST_FEATURES)
    for along in range(max(shape), 1, -1):
        grid = _Grid.of(shape, along)
        count = math.prod(grid.cells)
        if count > 1 and channels * count <= most:
            return grid
    return None
