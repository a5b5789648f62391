"""Model surgery: swap the output layer of a Keras model for an alignment head."""

from __future__ import annotations

import dataclasses
import inspect
import random
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dalign.head.alignment_head import AlignmentHead
from keras_dalign.numerics.losses import convex_loss
from keras_dalign.numerics.rank import default_width
from keras_dalign.training.aligned_model import AlignedModel
from keras_dalign.training.feature_map import pooled_less

AUTO = "auto"
_BY_HAND = (
    "Build the model by hand instead: keras_dalign.AlignedModel(trunk, "
    "keras_dalign.AlignmentHead(units, n_samples=...))."
)
# What may stand behind the output layer: operations without weights that turn
# logits into probabilities, or do nothing.
_PROBABILITIES = ("softmax", "sigmoid", "log_softmax")
_DROPPED_FUNCTIONS = {
    **{getattr(keras.activations, name): name for name in (*_PROBABILITIES, "linear")},
    **{getattr(ops, name): name for name in _PROBABILITIES},
}


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

    The result has the model's inputs and outputs (logits). With `gates="random"` it
    computes, until the switch, what the model computes, bit for bit.

    Args:
        model: A built Keras classifier or regressor with one output that ends in
            `Dense`: Functional, Sequential, from `keras.applications`, or a
            subclass whose `call` can be traced. A softmax or sigmoid behind (or
            in) the last `Dense` is dropped with a warning.
        n_samples: Positive int, number of training samples.
        gates: `"random"` or `"learned"`, see `AlignmentHead`.
        layer: The output layer, or its name, if it is not to be detected. What
            stands behind it is dropped.
        features: What feeds the gated units. `"auto"`: where the model ends in a
            global average pooling and gates are random, the feature map in front of
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
    _check_n_samples(n_samples)
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
    gated = _gated(graph, output, features, n_samples, gates)
    dense = output.dense
    if len(output.features.shape) != 2:
        raise ValueError(
            "The output layer must work on feature vectors. Received: "
            f"'{dense.name}' on features of shape {tuple(output.features.shape)}. Pool "
            "or flatten them in front of it."
        )
    if gated is None:
        outputs = output.features
    elif gates == "learned":
        # There is no linear part: what leads to its features alone would be dead.
        outputs = keras.layers.Flatten()(gated)
    else:
        outputs = [output.features, gated]
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
        activity_regularizer=dense.activity_regularizer,
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


def output_layer(model: keras.Model) -> tuple[keras.Model, keras.layers.Dense]:
    """Cuts a model in front of its output layer.

    Args:
        model: A model that `align` accepts and that puts out logits.

    Returns:
        The model of the features, which shares the given one's weights, and the output
        layer.

    Raises:
        ValueError: If the model does not end in a `Dense` on feature vectors, or puts
            out probabilities.
    """
    graph = _as_graph(model)
    output = _find_output(graph, None)
    if output.warnings:
        raise ValueError(
            "The model must put out logits. Received: a model that ends in a softmax "
            "or sigmoid. Remove it, and use a loss made with from_logits=True."
        )
    if len(output.features.shape) != 2:
        raise ValueError(
            "The output layer must work on feature vectors. Received: "
            f"'{output.dense.name}' on features of shape "
            f"{tuple(output.features.shape)}. Pool or flatten them in front of it."
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
            options = dict(loss._fn_kwargs)  # noqa: SLF001
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
        dense: The layer.
        features: What it works on.
        warnings: What to say.
        dropped: Names of the nonlinearities behind it; None if unknown things are.
    """

    dense: keras.layers.Dense
    features: keras.KerasTensor
    warnings: list[str]
    dropped: tuple[str, ...] | None


def _check_n_samples(n_samples: Any) -> None:
    is_int = isinstance(n_samples, (int, np.integer)) and not isinstance(
        n_samples, bool
    )
    if not is_int or n_samples < 1:
        raise ValueError(
            "`n_samples` must be the number of training samples, a positive int. "
            f"Received: n_samples={n_samples}. Pass n_samples=len(x)."
        )


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
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`model` must be a keras.Model. Received: model={model} (of type "
            f"{type(model).__name__})"
        )
    if isinstance(model, keras.Sequential):
        if not model.built or not model.inputs:
            raise ValueError(
                "The Sequential model is not built, so its features have no known "
                f"shape. Received: model '{model.name}'. Begin it with "
                "keras.Input(shape), or call model.build((None, ...)) first."
            )
        graph = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    elif _is_functional(model) and not _overrides_call(model):
        graph = model
    else:
        graph = _traced(model)
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
    if _is_functional(model):
        inputs = model.input
    else:
        shapes = getattr(model, "_build_shapes_dict", None) or {}
        if len(shapes) != 1 or not _is_shape(next(iter(shapes.values()))):
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
    return [
        node.operation.name
        if isinstance(node.operation, keras.layers.Layer)
        else type(node.operation).__name__
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
    ]


def _is_functional(model: keras.Model) -> bool:
    return hasattr(model, "_inputs_struct")


def _overrides_call(model: keras.Model) -> bool:
    """Whether a subclass of Functional models computes more than its graph."""
    owner = next(base for base in type(model).__mro__ if "call" in vars(base))
    return not owner.__module__.startswith("keras.")


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, (tuple, list)) and all(
        size is None or isinstance(size, int) for size in shape
    )


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
    tensor = graph.outputs[0]
    dropped: list[str] = []
    while True:
        operation, node_index, tensor_index = tensor._keras_history
        node = operation._inbound_nodes[node_index]
        if isinstance(operation, keras.Model):
            # The output is made inside of a nested model: step into it.
            try:
                inner = operation.call(*node.arguments.args, **node.arguments.kwargs)
            except Exception as error:
                raise _untraceable(operation, error) from error
            tensor = keras.tree.flatten(inner)[tensor_index]
        elif isinstance(operation, keras.layers.Dense):
            break
        elif _may_be_dropped(operation):
            dropped.append(str(_nonlinearity(operation)))
            tensor = node.input_tensors[0]
        else:
            raise ValueError(
                "The model does not end in a Dense layer. Received: "
                f"'{operation.name}' ({type(operation).__name__}) at the end of model "
                f"'{graph.name}'. Name the output layer with `layer=`. {_BY_HAND}"
            )
    return _output_at(operation, node, dropped)


def _named_output(graph: keras.Model, layer: Any) -> _Output:
    if isinstance(layer, str):
        names = [known.name for known in graph.layers]
        if layer not in names:
            raise ValueError(
                f"The model has no such layer. Received: layer='{layer}'. Its layers "
                f"are: {names}"
            )
        layer = graph.get_layer(layer)
    if not isinstance(layer, keras.layers.Dense):
        raise ValueError(
            "The output layer must be a Dense layer. Received: "
            f"layer={layer} (of type {type(layer).__name__})"
        )
    node = _last_node(graph, layer)
    output = _output_at(layer, node, [])
    if node.output_tensors[0] is not graph.outputs[0]:
        output.warnings.append(
            f"Everything behind the output layer '{layer.name}' is dropped: the "
            "aligned model ends in its logits."
        )
        output = dataclasses.replace(output, dropped=None)
    return output


def _output_at(dense: Any, node: Any, dropped: list[str]) -> _Output:
    if type(dense).call is not keras.layers.Dense.call:
        raise ValueError(
            "The output layer must compute what Dense computes. Received: "
            f"'{dense.name}' of type {type(dense).__name__}, which overrides `call`. "
            f"{_BY_HAND}"
        )
    if dense.quantization_mode is not None:
        raise ValueError(
            "A quantized output layer cannot be trained. Received: "
            f"'{dense.name}' with quantization_mode={dense.quantization_mode}. Align "
            "the model before quantizing it."
        )
    activation = _activation(dense.activation)
    if activation in _PROBABILITIES:
        dropped = [*dropped, activation]
    elif activation != "linear":
        raise ValueError(
            "The output layer has a nonlinearity that no loss undoes. Received: "
            f"'{dense.name}' with activation={_name(dense.activation)}. Make its "
            f"activation None, or add a Dense layer behind it. {_BY_HAND}"
        )
    messages = [
        f"The trailing {name} is dropped: the aligned model puts out logits. Compile "
        "it with a loss made with from_logits=True."
        for name in dropped
        if name in _PROBABILITIES
    ]
    dropped = [name for name in dropped if name != "linear"]
    return _Output(dense, node.input_tensors[0], messages, tuple(dropped))


def _may_be_dropped(operation: Any) -> bool:
    return _nonlinearity(operation) in (*_PROBABILITIES, "linear")


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


def _last_node(graph: keras.Model, layer: keras.layers.Layer) -> Any:
    """The last call of a layer within the model's graph."""
    nodes = {id(node) for nodes in graph._nodes_by_depth.values() for node in nodes}
    calls = [node for node in layer._inbound_nodes if id(node) in nodes]
    if not calls:
        raise ValueError(
            "The layer takes no part in the model. Received: "
            f"layer '{layer.name}', model '{graph.name}'"
        )
    return calls[-1]


def _gated(
    graph: keras.Model, output: _Output, features: Any, n_samples: int, gates: str
) -> keras.KerasTensor | None:
    """What feeds the gated units, if it is not the output layer's input."""
    if features is None:
        return None
    names = {known.name for known in graph.layers}
    if features != AUTO or AUTO in names:
        return _feature_tensor(graph, features)
    if gates != "random":
        return None
    return pooled_less(output.features, n_samples, names)


def _feature_tensor(graph: keras.Model, features: Any) -> keras.KerasTensor:
    if isinstance(features, str):
        names = [known.name for known in graph.layers]
        if features not in names:
            raise ValueError(
                f"The model has no such layer. Received: features='{features}'. Its "
                f"layers are: {names}"
            )
        features = graph.get_layer(features)
    if not isinstance(features, keras.layers.Layer):
        raise ValueError(
            f"`features` must be a layer of the model or its name. Received: {features}"
        )
    return _last_node(graph, features).output_tensors[0]
