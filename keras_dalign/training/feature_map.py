"""The default input of gated units: the feature map in front of a global pooling.

A convolutional network averages its last feature map over all places in front of its
output layer. Gated units can use more of the map: they get its averages over the cells
of a coarse grid. The number of samples limits the number of cells. Exploitation trains
`width * d = 2 n` numbers per output, so more features mean fewer gated units.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
import numpy as np

from keras_dalign import compat

# Fewer samples than this for each feature would leave less than six gated units.
_SAMPLES_PER_FEATURE = 3
# The cache and the time of the switch's rank check grow with the number of features.
_MOST_FEATURES = 2048
_POOLINGS = {
    keras.layers.GlobalAveragePooling2D: keras.layers.AveragePooling2D,
    keras.layers.GlobalAveragePooling3D: keras.layers.AveragePooling3D,
}
# Layers that may lie between the pooling and the output layer; see `_is_passed`, too.
_PASSED = (keras.layers.Dropout, keras.layers.Flatten)


def pooled_less(
    features: keras.KerasTensor, n_samples: int
) -> tuple[keras.KerasTensor, keras.KerasTensor] | None:
    """The feature map in front of a global average pooling, averaged over a grid.

    The pooling may lie inside of a Functional or Sequential model that is called as a
    layer, at any depth. It is then replaced by a model of the same layers that also
    puts out the map.

    A multiplier between the pooling and the output layer, such as those of
    `keras_dalign.parametrize`, does not apply to the averages: the head standardises
    them.

    Args:
        features: Features of an output layer, shape `(batch, p)`.
        n_samples: Number of training samples.

    Returns:
        The features, computed in the same graph as the map, and the averages of the map
        over the cells of a grid, shape `(batch, rows, columns, channels)` (channels
        first where the pooling has them there). The grid is the finest one with at most
        `n_samples / 3` and at most 2,048 features. Cells have one size, and overlap a
        little where they do not divide the map.

        None if the features are no pooled map, if its size is unknown, or if the
        samples are too few for more than one cell. None, too, if the model that
        contains the pooling is called more than once: Keras would not keep its weights
        shared in a file.
    """
    found = _find_pooling(features)
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
        name: Name of the new layer; a longer one is used if it is taken.
        dtype: Dtype policy of the new layer.

    Returns:
        The features, shape `(batch, p)`.
    """
    return keras.layers.Flatten(dtype=dtype, name=_unused(name, tensor))(tensor)


def _unused(name: str, tensor: keras.KerasTensor) -> str:
    """A name that no operation in the graph of the tensor has: the name, or longer."""
    taken = {operation.name for operation in compat.upstream([tensor])}
    while name in taken:
        name += "_"
    return name


def _find_pooling(
    features: keras.KerasTensor,
) -> tuple[keras.KerasTensor, keras.layers.Layer, keras.KerasTensor] | None:
    """The features, the pooling layer and its input, all in the same graph."""
    call, index = compat.producer(features)
    layer = call.operation
    if type(layer) in _POOLINGS:
        return features, layer, call.inputs[0]
    if _is_passed(layer):
        found = _find_pooling(call.inputs[0])
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
    found = _find_pooling(outputs[index])
    if found is None:
        return None
    inside, pooling, inside_map = found
    both = keras.Model(inputs, [inside, inside_map], name=layer.name)
    features, feature_map = both(*call.args, **call.kwargs)
    return features, pooling, feature_map


def _is_passed(layer: Any) -> bool:
    """Whether a layer between pooling and output layer leaves the pooled map usable."""
    if type(layer) is keras.layers.Rescaling:
        # A plain multiplier, as `parametrize` puts in front of an output layer.
        return bool(np.ndim(layer.scale) == 0 and np.all(np.equal(layer.offset, 0)))
    return type(layer) in _PASSED


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Cells of one size, at even distances, that cover a map."""

    cells: tuple[int, ...]
    size: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, shape: list[int], most: int) -> _Grid:
        """The finest grid with at most `most` cells along each side."""
        cells = tuple(max(_divisions(side, most)) for side in shape)
        strides = tuple(side // n for side, n in zip(shape, cells, strict=True))
        size = tuple(
            side - (n - 1) * stride
            for side, n, stride in zip(shape, cells, strides, strict=True)
        )
        return cls(cells, size, strides)


def _divisions(side: int, most: int) -> list[int]:
    """The numbers of cells along a side whose cells overlap by less than a half."""
    # Cells have one size and no padding: Keras's backends pad averages differently.
    return [n for n in range(1, min(side, most) + 1) if side % n < side // n]


def _grid(shape: list[int], channels: int, n_samples: int) -> _Grid | None:
    """The finest grid within the limit of features; None if it has a single cell."""
    most = min(n_samples / _SAMPLES_PER_FEATURE, _MOST_FEATURES)
    for along in range(max(shape), 1, -1):
        grid = _Grid.of(shape, along)
        count = math.prod(grid.cells)
        if count > 1 and channels * count <= most:
            return grid
    return None
