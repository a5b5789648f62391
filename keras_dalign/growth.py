"""How the weights of a layer grow with the width, and the rules of parametrisations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import keras
from keras import layers

KINDS = ("mup", "ntk", "mean_field", "standard")
OPTIMIZERS = ("sgd", "adam")

NORMALIZATIONS = (
    layers.BatchNormalization,
    layers.GroupNormalization,
    layers.LayerNormalization,
    layers.RMSNormalization,
)
# Weights that act on one unit each. They are scaled as biases are.
VECTORS = ("bias", "gamma", "beta", "scale")

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_WITH_KERNEL = (layers.Dense, *_CONVOLUTIONS, layers.EinsumDense, layers.Embedding)
_FIXED_DEVIATION = (
    keras.initializers.RandomNormal,
    keras.initializers.RandomUniform,
    keras.initializers.TruncatedNormal,
    keras.initializers.Zeros,
)


class UnknownRoleError(ValueError):
    """The role of a layer, input, hidden or output, cannot be determined.

    Args:
        layer: The layer.
        base: The same layer of another width.
        reason: Why it cannot be determined.
    """

    def __init__(
        self, layer: keras.layers.Layer, base: keras.layers.Layer, reason: str
    ) -> None:
        super().__init__(
            f"The role of a layer cannot be told: {reason}. Received: {words(layer)} "
            f"in the model, {words(base)} in the base. Keep its sizes as in the base, "
            "or build the layer of others."
        )


@dataclasses.dataclass(frozen=True)
class Growth:
    """The weights of a layer, and their growth from the base's layer.

    Attributes:
        kernel: The variable that mixes units, or None.
        vectors: The variables that act on one unit each, such as the bias.
        r_in: Fan-in divided by the fan-in of the base's layer.
        r_out: Fan-out divided by the fan-out of the base's layer. Vectors grow by the
            same factor.
    """

    kernel: keras.Variable | None
    vectors: list[keras.Variable]
    r_in: float
    r_out: float

    def multipliers(self, kind: str, optimizer: str) -> tuple[float, float]:
        """The multipliers of stored weights.

        Args:
            kind: One of `KINDS`.
            optimizer: One of `OPTIMIZERS`.

        Returns:
            The multiplier of the kernel, and that of the vectors.
        """
        if kind == "standard":
            return 1.0, 1.0
        if kind == "ntk":
            if optimizer == "sgd":
                return 1.0 / math.sqrt(self.r_in), 1.0
            vector = 1.0 / math.sqrt(self.r_out)
            return vector / self.r_in, vector
        if optimizer == "sgd":
            return math.sqrt(self.r_out / self.r_in), math.sqrt(self.r_out)
        return 1.0 / self.r_in, 1.0

    def spread(self, kind: str) -> float:
        """Standard deviation of the effective initial kernel, relative to the base's.

        Args:
            kind: One of `KINDS` but `"standard"`, which does not change kernels.

        Returns:
            The ratio.
        """
        is_output = self.r_out == 1.0
        if kind == "mean_field" or (kind == "mup" and is_output):
            return 1.0 / self.r_in
        return 1.0 / math.sqrt(self.r_in)


def growth(layer: keras.layers.Layer, base: keras.layers.Layer) -> Growth:
    """The growth of a layer's weights from the base's layer.

    Args:
        layer: A built layer.
        base: The same layer of another width.

    Returns:
        The growth.

    Raises:
        UnknownRoleError: If fan-in and fan-out cannot be determined.
    """
    kernel, vectors = _own_weights(layer, base)
    if kernel is None:
        r_in, r_out = 1.0, _ratio(shapes(layer)[0], shapes(base)[0])
    else:
        shape, other = (_kernel_shape(x) for x in (layer, base))
        inputs, outputs = _axes(layer)
        fixed = sorted(set(range(len(shape))) - set(inputs) - set(outputs))
        others = [
            ([sizes[axis] for axis in fixed], getattr(x, "groups", 1))
            for sizes, x in ((shape, layer), (other, base))
        ]
        if others[0] != others[1]:
            raise UnknownRoleError(
                layer, base, "a size that grows is neither its fan-in nor its fan-out"
            )
        r_in, r_out = (
            _ratio([shape[axis] for axis in axes], [other[axis] for axis in axes])
            for axes in (inputs, outputs)
        )
    for vector, twin in zip(vectors, _vectors(base), strict=True):
        if _ratio(vector.shape, twin.shape) != r_out:
            raise UnknownRoleError(
                layer, base, f"its {vector.name} does not grow as its outputs do"
            )
    return Growth(kernel, vectors, r_in, r_out)


def to_base_size(layer: keras.layers.Layer, base: keras.layers.Layer) -> float:
    """The factor that gives an initial kernel the standard deviation of the base's.

    Args:
        layer: A layer with a kernel.
        base: The same layer of another width.

    Returns:
        The standard deviation of the layer's initializer at the base's shape, divided
        by that at the layer's own shape.

    Raises:
        ValueError: If the standard deviation of the initializer is unknown.
    """
    is_embedding = isinstance(layer, layers.Embedding)
    initializer = (
        layer.embeddings_initializer if is_embedding else layer.kernel_initializer
    )
    mine, theirs = (_kernel_shape(x) for x in (layer, base))
    if isinstance(initializer, _FIXED_DEVIATION):
        return 1.0
    if isinstance(initializer, keras.initializers.Orthogonal):
        longer = [max(math.prod(s[:-1]), s[-1]) for s in (mine, theirs)]
        return math.sqrt(longer[0] / longer[1])
    if isinstance(initializer, keras.initializers.VarianceScaling):
        fans = [_fan(layer, initializer, shape) for shape in (mine, theirs)]
        return math.sqrt(fans[0] / fans[1])
    raise ValueError(
        "How large the initializer's kernels are at other shapes is unknown. "
        f"Received: {initializer} of layer '{layer.name}'. Use one of "
        "keras.initializers with a variance: VarianceScaling or one of its kinds, "
        "RandomNormal, TruncatedNormal, RandomUniform, Orthogonal or Zeros."
    )


def _fan(layer: keras.layers.Layer, initializer: Any, shape: tuple[int, ...]) -> float:
    """The divisor of an initializer's variance, up to a constant factor."""
    rank = len(shape)
    inputs, outputs = [rank - 2], [rank - 1]
    if isinstance(layer, layers.EinsumDense):
        if hasattr(initializer, "input_axes"):
            inputs, outputs = _axes(layer)
        else:
            # Older versions of Keras treat every kernel as that of a convolution.
            inputs, outputs = [*range(rank - 1)], [*range(rank - 2), rank - 1]
    if getattr(initializer, "input_axes", None) is not None:
        inputs, outputs = initializer.input_axes, initializer.output_axes
    fan_in, fan_out = (math.prod(shape[i] for i in axes) for axes in (inputs, outputs))
    return {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": fan_in + fan_out}[
        initializer.mode
    ]


def shapes(layer: keras.layers.Layer) -> list[tuple[int, ...]]:
    """The shapes of a layer's variables."""
    return [tuple(variable.shape) for variable in layer.variables]


def words(layer: keras.layers.Layer) -> str:
    """Name, class and shapes of the weights of a layer, for a message."""
    found = [tuple(variable.shape) for variable in layer.weights]
    return f"'{layer.name}' ({type(layer).__name__}, weights of shapes {found})"


def _own_weights(
    layer: keras.layers.Layer, base: keras.layers.Layer
) -> tuple[keras.Variable | None, list[keras.Variable]]:
    """The kernel of a layer, if it has one, and its vectors."""
    vectors = _vectors(layer)
    if type(layer) in NORMALIZATIONS:
        return None, vectors
    others = [v for v in layer.weights if all(v is not vector for vector in vectors)]
    if type(layer) not in _WITH_KERNEL or len(others) != 1:
        known = ", ".join(kind.__name__ for kind in (*_WITH_KERNEL, *NORMALIZATIONS))
        raise UnknownRoleError(
            layer,
            base,
            f"only layers of these classes may grow, without adapters or quantization: "
            f"{known}",
        )
    return others[0], vectors


def _vectors(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The weights of a layer that act on one unit each."""
    found = [getattr(layer, name, None) for name in VECTORS]
    # In some layers the name belongs to a flag.
    return [value for value in found if isinstance(value, keras.Variable)]


def _ratio(shape: Iterable[int], base: Iterable[int]) -> float:
    return math.prod(shape) / math.prod(base)


def _kernel_shape(layer: keras.layers.Layer) -> tuple[int, ...]:
    is_embedding = isinstance(layer, layers.Embedding)
    return tuple((layer.embeddings if is_embedding else layer.kernel).shape)


def _axes(layer: keras.layers.Layer) -> tuple[list[int], list[int]]:
    """The axes of a layer's kernel for its fan-in, and those for its fan-out."""
    if isinstance(layer, layers.EinsumDense):
        left, output = layer.equation.replace(" ", "").split("->")
        inputs, kernel = left.split(",")
        return (
            [i for i, k in enumerate(kernel) if k in inputs and k not in output],
            [i for i, k in enumerate(kernel) if k in output and k not in inputs],
        )
    rank = len(_kernel_shape(layer))
    # Rows of an embedding are looked up and not summed, so it has no fan-in.
    is_embedding = isinstance(layer, layers.Embedding)
    return ([] if is_embedding else [rank - 2]), [rank - 1]
