"""Model surgery: swap the output layer of a Keras model for an alignment head."""

from __future__ import annotations

import dataclasses
import inspect
import random
import warnings
from typing import Any

import keras
from keras import ops

from keras_dalign import compat
from keras_dalign.head.alignment_head import GATES, AlignmentHead
from keras_dalign.head.pointwise_dense import PointwiseDense, is_pointwise
from keras_dalign.numerics.arguments import choice, flag, integer, keras_model, shown
from keras_dalign.numerics.default_width import default_width
from keras_dalign.numerics.keras_losses import convex_loss
from keras_dalign.training.aligned_model import AlignedModel
from keras_dalign.training.feature_map import flattened, pooled_less

AUTO = "auto"
_BY_HAND = (
    "Build the model by hand instead: keras_dalign.AlignedModel(trunk, "
    "keras_dalign.AlignmentHead(units, n_samples=...))."
)
# What may stand behind the output layer: operations without weights that turn
# logits into probabilities, that change no number of a map of one place, or that do
# nothing.
_PROBABILITIES = ("softmax", "sigmoid", "log_softmax")
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


def align(
    model: keras.Model,
    n_samples: int,
    *,
    gates: str = "random",
    layer: str | keras.layers.Layer | None = None,
    features: str | keras.layers.Layer | None = AUTO,
    width: int | None = None,
    slope: float = 20.0,
    share_gates: bool = True,
    seed: int | None = None,
    copy: bool = False,
) -> AlignedModel:
    """Replaces the output layer of a model by an `AlignmentHead`.

    The result has the model's inputs and outputs (logits, in the dtype of the model's
    outputs). With `gates="random"` it computes, until the switch, what the model
    computes, bit for bit.

    The output layer is a `Dense` on feature vectors, or a convolution with kernels of
    size 1 on a map of a single place, which is one (models of `keras.applications` that
    pool with `keepdims` end so). On a larger map that is averaged afterwards it is one
    as well, but only up to rounding: such a model is refused.

    Args:
        model: A built Keras classifier or regressor with one output that ends in
            such a layer: Functional, Sequential, from `keras.applications`, or a
            subclass whose `call` can be traced. A softmax or sigmoid behind (or
            in) that layer is dropped with a warning.
        n_samples: Positive int, number of training samples.
        gates: `"random"` or `"learned"`, see `AlignmentHead`.
        layer: The output layer, or its name, if it is not to be detected. What
            stands behind it is dropped.
        features: What feeds the gated units. `"auto"`: where the model ends in a
            global average pooling (its own, or that of a model that it calls as a
            layer) and gates are random, the feature map in front of
            it, averaged over a coarse grid only, see `feature_map.pooled_less`;
            else, and with None, the output layer's input. Or a layer of the model, or
            its name, whose output is taken (and flattened).
        width: Gated units per output, see `AlignmentHead`.
        slope: Positive float, see `AlignmentHead`.
        share_gates: Whether outputs share random gates, see `AlignmentHead`.
        seed: Int, see `AlignmentHead`.
        copy: Whether to work on a copy of the model's weights. By default they are
            shared: exploration trains the given model, exploitation leaves it.

    Returns:
        The `AlignedModel`, to be compiled with `DAlign`, or handed to `solve`, which
        needs no `compile` if the given model was compiled: its loss is kept as
        `inherited_loss`, made to take logits where it took probabilities.

    Raises:
        ValueError: If the model cannot be aligned; the message says what to do.
        MemoryError: If the units of learned gates do not fit into memory.

    Warns:
        UserWarning: If a softmax or sigmoid is dropped, the width is too small, or the
            model's class overrides how Keras trains, which is not carried over.

    Example:

    ```python
    base = keras.applications.MobileNetV2(weights=None, classes=10,
                                          input_shape=(32, 32, 3))
    model = keras_dalign.align(base, n_samples=len(x))
    ```
    """
    integer("n_samples", n_samples, advice="Pass n_samples=len(x).")
    choice("gates", gates, GATES)
    flag("copy", copy)
    if isinstance(model, AlignedModel):
        raise ValueError(
            "The model has an alignment head already. Received: an AlignedModel. Align "
            "the base model anew if you want another head."
        )
    graph = _as_graph(model)
    if copy:
        graph = _copied(graph)
        layer, features = _name(layer), _name(features)
    output = _find_output(graph, layer)
    dense = output.dense
    linear, gated = _features(graph, output, features, n_samples, gates)
    if gated is None:
        outputs = linear
    elif gates == "learned":
        # There is no linear part: what leads to its features alone would be dead.
        outputs = flattened(gated, "gated_features")
    else:
        outputs = [linear, gated]
    trunk = keras.Model(graph.input, outputs, name=f"{model.name}_trunk")
    head = AlignmentHead(
        dense.units,
        width=width,
        n_samples=n_samples,
        gates=gates,
        slope=slope,
        share_gates=share_gates,
        seed=seed,
        dense=dense if gates == "random" else None,
        output_dtype=output.dtype,
        activity_regularizer=output.layer.activity_regularizer,
        dtype=dense.dtype_policy,
        name="alignment_head",
    )
    aligned = AlignedModel(trunk, head, name=model.name, dtype=model.dtype_policy)
    aligned.inherited_loss = _loss_of_logits(getattr(model, "loss", None), output)
    messages = [
        *output.warnings,
        *_width_warnings(head, n_samples),
        *_training_warnings(model),
    ]
    for message in messages:
        warnings.warn(message, stacklevel=2)
    return aligned


def _training_warnings(model: keras.Model) -> list[str]:
    """Says so if the model trains in a way of its own, which it will not any more."""
    own = [
        name
        for name in ("train_step", "compute_loss", "fit")
        if getattr(type(model), name) is not getattr(keras.Model, name)
    ]
    if not own:
        return []
    text = (
        "The model's own way to train is not carried over: the aligned model explores "
        f"with Keras's. Received: {type(model).__name__}, which overrides "
        f"{', '.join(own)}. Train it first, and call keras_dalign.solve on the aligned "
        "model, if that matters."
    )
    return [text]


def output_layer(
    model: keras.Model,
) -> tuple[keras.Model, keras.layers.Dense | PointwiseDense]:
    """Cuts a model in front of its output layer.

    Args:
        model: A model that `align` accepts and that puts out logits.

    Returns:
        The model of the features, which shares the given one's weights, and the output
        layer. A convolution comes as a `PointwiseDense`.

    Raises:
        ValueError: If the model does not end in an output layer that `align` takes, or
            puts out probabilities.
    """
    graph = _as_graph(model)
    output = _find_output(graph, None)
    if output.warnings:
        raise ValueError(
            "The model must put out logits. Received: a model that ends in a softmax "
            "or sigmoid. Remove it, and use a loss made with from_logits=True."
        )
    name = f"{model.name}_features"
    return keras.Model(graph.input, output.features, name=name), output.dense


# Losses of probabilities that are losses of logits once this nonlinearity is dropped.
_FROM_LOGITS = {
    "softmax": (
        keras.losses.SparseCategoricalCrossentropy,
        keras.losses.CategoricalCrossentropy,
    ),
    "sigmoid": (keras.losses.BinaryCrossentropy,),
}


def _loss_of_logits(loss: Any, output: _Output) -> keras.losses.Loss | None:
    """The loss that a model was compiled with, for its logits, or None."""
    # A loss of probabilities becomes the same one of logits where exactly the
    # nonlinearity was dropped that made them.
    try:
        loss = keras.losses.get(_single_loss(loss))
    except (TypeError, ValueError):
        return None
    if loss is None or output.dropped is None:
        return None
    if not output.dropped:
        return loss if _is_convex(loss) else None
    for kind in _FROM_LOGITS.get("".join(output.dropped), ()):
        if type(loss) is kind:
            options = compat.loss_options(loss)
            if options["from_logits"]:
                return None
            options["from_logits"] = True
            rebuilt = kind(**options, reduction=loss.reduction, name=loss.name)
        elif loss is _FUNCTIONS[kind]:
            rebuilt = kind(from_logits=True)
        else:
            continue
        return rebuilt if _is_convex(rebuilt) else None
    return None


_FUNCTIONS = {
    keras.losses.SparseCategoricalCrossentropy: (
        keras.losses.sparse_categorical_crossentropy
    ),
    keras.losses.CategoricalCrossentropy: keras.losses.categorical_crossentropy,
    keras.losses.BinaryCrossentropy: keras.losses.binary_crossentropy,
}


def _single_loss(loss: Any) -> Any:
    if isinstance(loss, dict) and "class_name" not in loss:
        loss = list(loss.values())
    if isinstance(loss, (list, tuple)):
        return loss[0] if len(loss) == 1 else None
    return loss


def _is_convex(loss: Any) -> bool:
    try:
        convex_loss(loss)
    except ValueError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class _Output:
    """The output layer found, the tensor of features it works on, and what to say.

    Attributes:
        layer: The layer.
        dense: The layer, as one that works on feature vectors.
        features: These vectors, shape `(batch, p)`.
        dtype: Dtype of the logits.
        warnings: What to say.
        dropped: Names of the nonlinearities behind it; None if unknown things are.
    """

    layer: keras.layers.Layer
    dense: keras.layers.Dense | PointwiseDense
    features: keras.KerasTensor
    dtype: str
    warnings: list[str]
    dropped: tuple[str, ...] | None


def _width_warnings(head: AlignmentHead, n_samples: int) -> list[str]:
    d, width = head.dim, head.requested_width
    if width is None or width * d >= n_samples:
        return []
    message = (
        f"The head is too narrow to fit any labels of {n_samples} samples: width * d = "
        f"{width} * {d} = {width * d}. Received: width={width}. A width of "
        f"{default_width(n_samples, d, head.slope)} would do. With an L2 term it does "
        "not matter."
    )
    return [message]


def _as_graph(model: Any) -> keras.Model:
    """The model as a Functional (or built Sequential) model that shares weights."""
    keras_model(model)
    if isinstance(model, keras.Sequential) and not getattr(model, "inputs", None):
        raise ValueError(
            "The Sequential model is not built, so its features have no known "
            f"shape. Received: model '{model.name}'. Begin it with "
            "keras.Input(shape), or call model.build((None, ...)) first."
        )
    ends = compat.graph_ends(model)
    if ends is None:
        graph = _traced(model)
    elif isinstance(model, keras.Sequential):
        graph = keras.Model(*ends, name=model.name)
    else:
        graph = model
    if len(graph.outputs) != 1:
        raise ValueError(
            "Only models with one output can be aligned. Received: "
            f"{len(graph.outputs)} outputs. Align a model of one of them: "
            "keras.Model(model.input, model.outputs[0])."
        )
    return graph


def _traced(model: keras.Model) -> keras.Model:
    """A Functional twin of a subclassed model, made by tracing its `call`."""
    if not model.built:
        raise ValueError(
            "The model is not built. Received: subclassed model "
            f"'{model.name}'. Call it on a batch of data first."
        )
    if compat.is_functional(model):
        inputs = model.input
    else:
        shapes = compat.build_shapes(model)
        if len(shapes) != 1 or not compat.is_shape(next(iter(shapes.values()))):
            raise ValueError(
                "The input shape of the subclassed model is unknown. Received: model "
                f"'{model.name}'. Call it on one batch of data (a single tensor) "
                f"first. {_BY_HAND}"
            )
        shape = next(iter(shapes.values()))
        inputs = keras.Input(shape=shape[1:], dtype=model.input_dtype)
    try:
        graph = keras.Model(inputs, model.call(inputs), name=model.name)
        training = None
        if "training" in inspect.signature(model.call).parameters:
            training = keras.Model(inputs, model.call(inputs, training=True))
    except Exception as error:
        raise _untraceable(model, error) from error
    # What runs in training only would be lost: the twin is made of one trace.
    if training is not None and _operations(training) != _operations(graph):
        raise ValueError(
            "The model's `call` does other operations in training than in inference "
            f"(Python code that depends on `training`). Received: model '{model.name}' "
            f"of type {type(model).__name__}. Leave such choices to layers that take "
            f"`training`. {_BY_HAND}"
        )
    return graph


def _untraceable(model: keras.Model, error: Exception) -> ValueError:
    return ValueError(
        "The model's `call` cannot be traced: it must be made of Keras layers and "
        f"keras.ops. Received: model '{model.name}' of type "
        f"{type(model).__name__}, which failed with: {error}. {_BY_HAND}"
    )


def _operations(graph: keras.Model) -> list[str]:
    """What a graph does, in order: layers by name, other operations by kind."""
    operations = [call.operation for call in compat.calls(graph)]
    return [
        operation.name
        if isinstance(operation, keras.layers.Layer)
        else type(operation).__name__
        for operation in operations
    ]


def _copied(graph: keras.Model) -> keras.Model:
    # Layers that draw numbers get their seeds from Python's global generator, which
    # must not move; the copy goes on with the originals' seeds.
    state = random.getstate()
    clone = keras.models.clone_model(graph)
    random.setstate(state)
    for copied, original in zip(clone.variables, graph.variables, strict=True):
        # By value: on JAX an assigned array is shared, and training donates it.
        copied.assign(ops.convert_to_numpy(original))
    return clone


def _name(value: Any) -> Any:
    """The name of a layer or function; anything else as it is."""
    if isinstance(value, keras.layers.Layer):
        return value.name
    return getattr(value, "__name__", value)


def _find_output(graph: keras.Model, layer: Any) -> _Output:
    if layer is not None:
        return _named_output(graph, layer)
    output = tensor = graph.outputs[0]
    dropped: list[str] = []
    while True:
        call, index = compat.producer(tensor)
        operation = call.operation
        if isinstance(operation, keras.Model):
            # The output is made inside of a nested model: step into it.
            try:
                inner = operation.call(*call.args, **call.kwargs)
            except Exception as error:
                raise _untraceable(operation, error) from error
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
                f"`layer=`. {_BY_HAND}"
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


def _named_output(graph: keras.Model, layer: Any) -> _Output:
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
    call = _last_call(graph, layer)
    output = _output_at(call, [], call.outputs[0].dtype)
    if call.outputs[0] is not graph.outputs[0]:
        output.warnings.append(
            f"Everything behind the output layer '{layer.name}' is dropped: the "
            "aligned model ends in its logits."
        )
        output = dataclasses.replace(output, dropped=None)
    return output


def _output_at(call: compat.Call, dropped: list[str], dtype: str) -> _Output:
    """An output layer that was found, nonlinearities dropped behind it, and a dtype."""
    layer = call.operation
    if compat.overrides_call(layer):
        raise ValueError(
            "The output layer must compute what Keras's own layer computes. Received: "
            f"'{layer.name}' of type {type(layer).__name__}, which overrides `call`. "
            f"{_BY_HAND}"
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
        raise ValueError(
            "The output layer has a nonlinearity that no loss undoes. Received: "
            f"'{layer.name}' with activation={_name(layer.activation)}. Make its "
            f"activation None, or add a Dense layer behind it. {_BY_HAND}"
        )
    messages = [
        f"The trailing {name} is dropped: the aligned model puts out logits. Compile "
        "it with a loss made with from_logits=True."
        for name in dropped
        if name in _PROBABILITIES
    ]
    dropped = [name for name in dropped if name != "linear"]
    return _Output(layer, dense, features, dtype, messages, tuple(dropped))


def _is_dropped(operation: Any, tensor: keras.KerasTensor, units: int | None) -> bool:
    """Whether what gave a tensor may stand behind an output layer of these units."""
    if not keras.backend.is_float_dtype(tensor.dtype):
        return False
    name = _nonlinearity(operation)
    # Along any other axis, a softmax would not be one over the outputs.
    return name == "linear" or (name in _PROBABILITIES and tensor.shape[-1] == units)


def _is_one_place(features: keras.KerasTensor, data_format: str) -> bool:
    shape = features.shape
    sides = shape[2:] if data_format == "channels_first" else shape[1:-1]
    return set(sides) == {1}


def _nonlinearity(operation: Any) -> str | None:
    """Name of the nonlinearity that an operation applies, if that is all it does."""
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


def _last_call(graph: keras.Model, layer: keras.layers.Layer) -> compat.Call:
    """The last call of a layer within the model's graph."""
    calls = compat.calls_of(layer, graph)
    if not calls:
        raise ValueError(
            "The layer takes no part in the model. Received: "
            f"layer '{layer.name}', model '{graph.name}'"
        )
    return calls[-1]


def _features(
    graph: keras.Model, output: _Output, features: Any, n_samples: int, gates: str
) -> tuple[keras.KerasTensor, keras.KerasTensor | None]:
    """What feeds the output layer, and what feeds the gated units if that is other."""
    if features is None:
        return output.features, None
    names = {known.name for known in graph.layers}
    if not isinstance(features, str) or features != AUTO or AUTO in names:
        return output.features, _feature_tensor(graph, features)
    if gates != "random":
        return output.features, None
    return pooled_less(output.features, n_samples) or (output.features, None)


def _feature_tensor(graph: keras.Model, features: Any) -> keras.KerasTensor:
    if isinstance(features, str):
        names = [known.name for known in graph.layers]
        if features not in names:
            raise ValueError(
                "`features`: the model has no such layer. Received: "
                f"features='{features}'. Its layers are: {names}"
            )
        features = graph.get_layer(features)
    if not isinstance(features, keras.layers.Layer):
        raise ValueError(
            "`features` must be a layer of the model or its name. Received: "
            f"features={shown(features)}"
        )
    return _last_call(graph, features).outputs[0]
