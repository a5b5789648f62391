"""A model as a graph of layers: built, traced or copied."""

from __future__ import annotations

import inspect
import random
from typing import Any

import keras
from keras import ops

from keras_dalign import compat
from keras_dalign.numerics.arguments import keras_model

BUILD_BY_HAND = (
    "Build the model by hand instead: keras_dalign.AlignedModel(trunk, "
    "keras_dalign.AlignmentHead(units, n_samples=...))."
)


def as_graph(model: Any) -> keras.Model:
    """Gives a model as a Functional model that shares its weights.

    Args:
        model: A built Functional or Sequential model, or a subclass whose `call` can be
            traced.

    Returns:
        A model of one output; the given one where it is Functional.

    Raises:
        ValueError: If it is no such model.
    """
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
    """Makes a Functional model with the same weights by tracing a model's `call`."""
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
                f"first. {BUILD_BY_HAND}"
            )
        shape = next(iter(shapes.values()))
        inputs = keras.Input(shape=shape[1:], dtype=model.input_dtype)
    try:
        graph = keras.Model(inputs, model.call(inputs), name=model.name)
        training = None
        if "training" in inspect.signature(model.call).parameters:
            training = keras.Model(inputs, model.call(inputs, training=True))
    except Exception as error:
        raise ValueError(untraceable(model, error)) from error
    # The result is made from one trace, so operations of training alone would be lost.
    if training is not None and _operations(training) != _operations(graph):
        raise ValueError(
            "The model's `call` does other operations in training than in inference "
            f"(Python code that depends on `training`). Received: model '{model.name}' "
            f"of type {type(model).__name__}. Leave such choices to layers that take "
            f"`training`. {BUILD_BY_HAND}"
        )
    return graph


def untraceable(model: keras.Model, error: Exception) -> str:
    """The text of the error for a model whose `call` cannot be traced.

    Args:
        model: The model.
        error: What its `call` raised.

    Returns:
        The text.
    """
    return (
        "The model's `call` cannot be traced: it must be made of Keras layers and "
        f"keras.ops. Received: model '{model.name}' of type "
        f"{type(model).__name__}, which failed with: {error}. {BUILD_BY_HAND}"
    )


def _operations(graph: keras.Model) -> list[str]:
    """The operations of a graph in order: layers by name, others by their class."""
    operations = [call.operation for call in compat.calls(graph)]
    return [
        operation.name
        if isinstance(operation, keras.layers.Layer)
        else type(operation).__name__
        for operation in operations
    ]


def copied(graph: keras.Model) -> keras.Model:
    """Copies a model with its weights.

    Args:
        graph: A Functional model.

    Returns:
        The copy.
    """
    # A new random layer takes its seed from Python's global generator, whose state must
    # not change. The seeds of the original layers are then copied as variables.
    state = random.getstate()
    clone = keras.models.clone_model(graph)
    random.setstate(state)
    for copy, original in zip(clone.variables, graph.variables, strict=True):
        # By value: on JAX an assigned array is shared, and training donates it.
        copy.assign(ops.convert_to_numpy(original))
    return clone


def last_call(graph: keras.Model, layer: keras.layers.Layer) -> compat.Call:
    """The last call of a layer within a model's graph.

    Args:
        graph: The model.
        layer: The layer.

    Returns:
        The call.

    Raises:
        ValueError: If there is none.
    """
    calls = compat.calls_of(layer, graph)
    if not calls:
        raise ValueError(
            "The layer takes no part in the model. Received: "
            f"layer '{layer.name}', model '{graph.name}'"
        )
    return calls[-1]
