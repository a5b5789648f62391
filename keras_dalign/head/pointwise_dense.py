"""A convolution on a map of a single place, in the form of a `Dense` layer."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_dalign.numerics.arguments import rebuilding

_KINDS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


def is_pointwise(layer: Any) -> bool:
    """Whether a layer is a convolution that mixes channels only, each place by itself.

    Args:
        layer: Anything.

    Returns:
        True for a `Conv1D`, `Conv2D` or `Conv3D` of one group, without causal padding,
        whose kernels have the size 1 along every axis.
    """
    if not isinstance(layer, _KINDS) or layer.padding == "causal":
        return False
    return layer.groups == 1 and set(layer.kernel_size) == {1}


@keras.saving.register_keras_serializable(package="keras_dalign")
class PointwiseDense(keras.layers.Layer):
    """A convolution with kernels of size 1 as a `Dense` on feature vectors.

    On a map of a single place such a convolution is equivalent to a `Dense`. This layer
    has the attributes of a `Dense`, and computes with the convolution and its weights:
    outputs and gradients are equal bit for bit. The activation is not applied.

    Args:
        convolution: The layer, one that `is_pointwise`.
        **kwargs: Keyword arguments of `keras.layers.Layer`. The dtype is by default the
            convolution's.

    Call arguments:
        inputs: Features, shape `(batch, p)`.

    Output shape:
        `(batch, units)`.

    Attributes:
        convolution: The layer.
        units: Number of outputs, the convolution's filters.
        use_bias: Whether there is a bias.

    Raises:
        ValueError: If the layer is not pointwise.
    """

    def __init__(self, convolution: keras.layers.Layer, **kwargs: Any) -> None:
        if not is_pointwise(convolution):
            raise ValueError(
                "`convolution` must be a convolution of one group with kernels of size "
                f"1 and without causal padding. Received: convolution={convolution}"
            )
        kwargs.setdefault("dtype", convolution.dtype_policy)
        super().__init__(**kwargs)
        self.convolution = convolution
        self.units: int = convolution.filters
        self.use_bias: bool = convolution.use_bias

    def build(self, input_shape: Any) -> None:
        """Builds the convolution, if it is not yet, for features `(batch, p)`."""
        if not self.convolution.built:
            self.convolution.build((None, *self._place(input_shape[-1])))

    def call(self, inputs: Any) -> Any:
        """Computes the outputs, shape `(batch, units)`."""
        layer = self.convolution
        inputs = ops.reshape(inputs, (-1, *self._place(inputs.shape[-1])))
        # With the layer's strides and padding, as PyTorch's rounding depends on them.
        outputs = layer.convolution_op(inputs, layer.kernel)
        if layer.bias is not None:
            place = (1, *self._place(self.units))
            outputs = ops.add(outputs, ops.reshape(layer.bias, place))
        return ops.reshape(outputs, (-1, self.units))

    def _place(self, channels: int) -> tuple[int, ...]:
        """The shape of a map of one place."""
        ones = (1,) * self.convolution.rank
        if self.convolution.data_format == "channels_first":
            return (channels, *ones)
        return (*ones, channels)

    @property
    def kernel(self) -> Any:
        """The weights as those of a `Dense`, shape `(p, units)`."""
        kernel = self.convolution.kernel
        return ops.reshape(kernel, (math.prod(kernel.shape[:-1]), self.units))

    @property
    def bias(self) -> keras.Variable | None:
        """The bias, shape `(units,)`, or None."""
        return self.convolution.bias

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        """Shape of the outputs for features of the given shape."""
        return (input_shape[0], self.units)

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild this layer."""
        convolution = keras.saving.serialize_keras_object(self.convolution)
        return {**super().get_config(), "convolution": convolution}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PointwiseDense:
        """Rebuilds a layer from `get_config`."""
        with rebuilding(cls.__name__):
            layer = keras.saving.deserialize_keras_object(config["convolution"])
            return cls(**{**config, "convolution": layer})
