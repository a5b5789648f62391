"""The output layer of a model: the layer that `align` replaces, and how it is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from keras import ops

from keras_dalign import compat
from keras_dalign.head.alignment_head import AlignmentHead
from keras_dalign.head.pointwise_dense import PointwiseDense, is_pointwise
from keras_dalign.numerics.arguments import shown
from keras_dalign.training.feature_map import flattened
from keras_dalign.training.model_graph import (
    BUILD_BY_HAND,
    as_graph,
    last_call,
    untraceable,
)

# Operations without weights that may follow the output layer: they turn logits into
# probabilities, reshape a map of one place, or do nothing.
_PROBABILITIES = ("softmax", "sigmoid", "log_softmax")
# What else to change where one of them is dropped.
_ACCURACY = {"sigmoid": ", and count with keras.metrics.BinaryAccuracy(threshold=0.0)"}
_DROPPED_FUNCTIONS = {
    **{getattr(keras.activations, name): name for name in (*_PROBABILITIES, "linear")},
    **{getattr(ops, name): name for name in _PROBABILITIES},
}
_RESHAPING = (
    keras.layers.Flatten,
    keras.layers.Reshape,
    keras.layers.GlobalAveragePooling1D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalAveragePooling3D,
    keras.layers.GlobalMaxPooling1D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.GlobalMaxPooling3D,
)


@dataclasses.dataclass(frozen=True)
class OutputLayer:
    """An output layer, its features, and the warnings that replacing it needs.

    Attributes:
        layer: The layer.
        dense: The same layer as one that takes feature vectors.
        features: The feature vectors, shape `(batch, p)`.
        dtype: Dtype of the logits.
        warnings: Texts of warnings.
        dropped: Names of the nonlinearities that follow it; None if unknown operations
            follow.
    """

    layer: keras.layers.Layer
    dense: keras.layers.Dense | PointwiseDense
    features: keras.KerasTensor
    dtype: str
    warnings: list[str]
    dropped: tuple[str, ...] | None


def output_layer(
    model: keras.Model,
) -> tuple[keras.Model, keras.layers.Dense | PointwiseDense]:
    """Splits a model into its features and its output layer.

    Args:
        model: A model that `align` accepts and that outputs logits.

    Returns:
        The model of the features, which shares the given one's weights, and the output
        layer. A convolution is given as a `PointwiseDense`.

    Raises:
        ValueError: If the model does not end in an output layer that `align` takes, or
            puts out probabilities.
    """
    graph = as_graph(model)
    output = find_output(graph)
    if output.warnings:
        raise ValueError(
            "The model must put out logits. Received: a model that ends in a softmax "
            "or sigmoid. Remove it, and use a loss made with from_logits=True."
        )
    name = f"{model.name}_features"
    return keras.Model(graph.input, output.features, name=name), output.dense


def find_output(graph: keras.Model, layer: Any = None) -> OutputLayer:
    """Finds the output layer of a model.

    Args:
        graph: A Functional model of one output.
        layer: The layer, or its name; None to search from the model's output.

    Returns:
        The layer.

    Raises:
        ValueError: If there is no output layer that `align` takes.
    """
    if layer is not None:
        return _named_output(graph, layer)
    output = tensor = graph.outputs[0]
    dropped: list[str] = []
    while True:
        call, index = compat.producer(tensor)
        operation = call.operation
        if isinstance(operation, keras.Model):
            # The output is computed inside of a nested model: continue there.
            try:
                inner = operation.call(*call.args, **call.kwargs)
            except Exception as error:
                raise ValueError(untraceable(operation, error)) from error
            tensor = keras.tree.flatten(inner)[index]
        elif isinstance(operation, keras.layers.Dense) or is_pointwise(operation):
            break
        elif _is_dropped(operation, tensor, output.shape[-1]):
            dropped.append(str(_nonlinearity(operation)))
            tensor = call.inputs[0]
        elif isinstance(operation, _RESHAPING):
            tensor = call.inputs[0]
        elif isinstance(operation, AlignmentHead):
            raise ValueError(
                "`model` ends in an alignment head already. Received: "
                f"'{operation.name}' at the end of model '{graph.name}'. Align the "
                "base model anew."
            )
        else:
            raise ValueError(
                "The model does not end in a Dense layer or a convolution of kernel "
                f"size 1. Received: '{operation.name}' ({type(operation).__name__}) at "
                f"the end of model '{graph.name}'. Name the output layer with "
                f"`layer=`. {BUILD_BY_HAND}"
            )
    found = _output_at(call, dropped, output.dtype)
    if tuple(output.shape[1:]) != (found.dense.units,):
        raise ValueError(
            "The model must put out the vector of what its output layer computes. "
            f"Received: outputs of shape {tuple(output.shape)} behind "
            f"'{operation.name}' with {found.dense.units} outputs. Name the output "
            "layer with `layer=`."
        )
    return found


def _named_output(graph: keras.Model, layer: Any) -> OutputLayer:
    if isinstance(layer, str):
        names = [known.name for known in graph.layers]
        if layer not in names:
            raise ValueError(
                f"`layer`: the model has no such layer. Received: layer='{layer}'. "
                f"Its layers are: {names}"
            )
        layer = graph.get_layer(layer)
    if not isinstance(layer, keras.layers.Dense) and not is_pointwise(layer):
        raise ValueError(
            "The output layer must be a Dense layer or a convolution of kernel size 1. "
            f"`layer` must name it. Received: layer={shown(layer)} (of type "
            f"{type(layer).__name__})"
        )
    call = last_call(graph, layer)
    output = _output_at(call, [], call.outputs[0].dtype)
    if call.outputs[0] is not graph.outputs[0]:
        output.warnings.append(
            f"Everything behind the output layer '{layer.name}' is dropped: the "
            "aligned model ends in its logits."
        )
        output = dataclasses.replace(output, dropped=None)
    return output


def _output_at(call: compat.Call, dropped: list[str], dtype: str) -> OutputLayer:
    """The output layer that a call belongs to, if `align` takes it."""
    layer = call.operation
    if compat.overrides_call(layer):
        raise ValueError(
            "The output layer must compute what Keras's own layer computes. Received: "
            f"'{layer.name}' of type {type(layer).__name__}, which overrides `call`. "
            f"{BUILD_BY_HAND}"
        )
    if layer.quantization_mode is not None:
        raise ValueError(
            "A quantized output layer cannot be trained. Received: "
            f"'{layer.name}' with quantization_mode={layer.quantization_mode}. Align "
            "the model before quantizing it."
        )
    dense, features = layer, call.inputs[0]
    if is_pointwise(layer) and _is_one_place(features, layer.data_format):
        dense = PointwiseDense(layer, name=layer.name)
        features = flattened(features, f"{layer.name}_features", layer.dtype_policy)
    if len(features.shape) != 2:
        raise ValueError(
            "The output layer must work on feature vectors. Received: "
            f"'{layer.name}' on features of shape {tuple(features.shape)}. Pool "
            "or flatten them in front of it."
        )
    activation = _activation(layer.activation)
    if activation in _PROBABILITIES and call.outputs[0].shape[-1] == dense.units:
        dropped = [*dropped, activation]
    elif activation != "linear":
        name = _function_name(layer.activation)
        raise ValueError(
            "The output layer has a nonlinearity that no loss undoes. Received: "
            f"'{layer.name}' with activation={name}. Make its "
            f"activation None, or add a Dense layer behind it. {BUILD_BY_HAND}"
        )
    messages = [
        f"The trailing {name} is dropped: the aligned model outputs logits. Compile it "
        f"with a loss made with from_logits=True{_ACCURACY.get(name, '')}."
        for name in dropped
        if name in _PROBABILITIES
    ]
    dropped = [name for name in dropped if name != "linear"]
    return OutputLayer(layer, dense, features, dtype, messages, tuple(dropped))


def _is_dropped(operation: Any, tensor: keras.KerasTensor, units: int | None) -> bool:
    """Whether the operation that gave a tensor may follow an output layer."""
    if not keras.backend.is_float_dtype(tensor.dtype):
        return False
    name = _nonlinearity(operation)
    # A softmax must be over the outputs, not along another axis.
    return name == "linear" or (name in _PROBABILITIES and tensor.shape[-1] == units)


def _is_one_place(features: keras.KerasTensor, data_format: str) -> bool:
    """Whether a feature map has a single place."""
    shape = features.shape
    sides = shape[2:] if data_format == "channels_first" else shape[1:-1]
    return set(sides) == {1}


def _nonlinearity(operation: Any) -> str | None:
    """Name of the nonlinearity that an operation is, None for any other operation."""
    if isinstance(operation, keras.layers.Activation):
        return _activation(operation.activation)
    if isinstance(operation, keras.layers.Softmax):
        return "softmax"
    if isinstance(operation, keras.layers.Identity):
        return "linear"
    if isinstance(operation, keras.layers.Layer):
        return None
    # keras.ops functions appear as operations named after their class.
    return {
        "Softmax": "softmax",
        "Sigmoid": "sigmoid",
        "LogSoftmax": "log_softmax",
        "Cast": "linear",
    }.get(type(operation).__name__)


def _activation(activation: Any) -> str | None:
    """Name of an activation that may be dropped, None for any other."""
    if isinstance(activation, keras.layers.Layer):
        return _nonlinearity(activation)
    return _DROPPED_FUNCTIONS.get(activation)


def _function_name(function: Any) -> Any:
    """The name of a layer or function; anything else as it is."""
    if isinstance(function, keras.layers.Layer):
        return function.name
    return getattr(function, "__name__", function)
