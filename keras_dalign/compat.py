"""The private names of Keras that this package uses, each behind a small function.

Keras has no public way to find the operation that made a symbolic tensor. If a release
moves one of these names, only this module has to change; its tests fail then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras.src.backend.common import global_state
from keras.src.utils import io_utils

# Where Keras keeps its subclasses of optimizers for PyTorch.
_TORCH_OPTIMIZERS = "keras.src.backend.torch.optimizers."


@dataclasses.dataclass(frozen=True)
class Call:
    """One symbolic call of an operation.

    Attributes:
        operation: The layer, model or operation of `keras.ops` that was called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        inputs: The symbolic tensors among the arguments, flat.
        outputs: The symbolic tensors that it returned, flat.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[keras.KerasTensor]
    outputs: list[keras.KerasTensor]


def _call(node: Any) -> Call:
    arguments = node.arguments
    return Call(
        node.operation,
        arguments.args,
        arguments.kwargs,
        node.input_tensors,
        node.output_tensors,
    )


def producer(tensor: keras.KerasTensor) -> tuple[Call, int]:
    """The call that made a symbolic tensor.

    Args:
        tensor: The tensor.

    Returns:
        The call, and the index of the tensor among its outputs.
    """
    operation, node_index, tensor_index = tensor._keras_history
    return _call(operation._inbound_nodes[node_index]), tensor_index


def upstream(tensors: Iterable[keras.KerasTensor]) -> list[Any]:
    """The operations that compute symbolic tensors, each of them once.

    Args:
        tensors: The tensors.

    Returns:
        Layers (input layers, too), models and operations. A model that was called is
        one operation; its layers are not listed.
    """
    found: dict[int, Any] = {}
    seen: set[int] = set()
    waiting = list(tensors)
    while waiting:
        tensor = waiting.pop()
        if id(tensor) not in seen:
            seen.add(id(tensor))
            call, _ = producer(tensor)
            found[id(call.operation)] = call.operation
            waiting += call.inputs
    return list(found.values())


def calls(graph: keras.Model) -> list[Call]:
    """The calls that a Functional model is made of.

    Args:
        graph: The model.

    Returns:
        The calls from the inputs to the outputs, sorted by depth.
    """
    by_depth = graph._nodes_by_depth
    return [_call(node) for d in sorted(by_depth, reverse=True) for node in by_depth[d]]


def calls_of(operation: Any, graph: keras.Model) -> list[Call]:
    """The calls of an operation that are part of a Functional model.

    Args:
        operation: A layer or another operation.
        graph: The model.

    Returns:
        The calls, in the order in which they were made.
    """
    nodes = {id(node) for nodes in graph._nodes_by_depth.values() for node in nodes}
    return [_call(node) for node in operation._inbound_nodes if id(node) in nodes]


def is_functional(model: keras.Model) -> bool:
    """Whether a model was made of symbolic inputs and outputs."""
    return hasattr(model, "_inputs_struct")


def overrides_call(model: keras.Model) -> bool:
    """Whether a model's class has a `call` that is not one of Keras."""
    owner = next(base for base in type(model).__mro__ if "call" in vars(base))
    return not owner.__module__.startswith("keras.")


def graph_ends(model: Any) -> tuple[Any, list[keras.KerasTensor]] | None:
    """The symbolic inputs and outputs between which a model is a graph of operations.

    Args:
        model: Anything.

    Returns:
        The inputs, in the structure that the model takes, and the outputs, flat. None
        if it is no Functional or built Sequential model, or overrides `call`.
    """
    if not isinstance(model, keras.Model) or overrides_call(model):
        return None
    if isinstance(model, keras.Sequential):
        # The property raises if the model is not built.
        inputs = getattr(model, "inputs", None)
        return (inputs[0], model.outputs) if inputs else None
    return (model.input, model.outputs) if is_functional(model) else None


def inputs_of(model: keras.Model) -> list[keras.KerasTensor] | None:
    """The symbolic inputs of a model.

    Args:
        model: The model.

    Returns:
        The inputs, flat; None for a model that is no graph.
    """
    # The property of a Sequential model raises if it is not built.
    inputs = getattr(model, "inputs", None)
    return list(inputs) if inputs else None


def saves_as_hdf5() -> bool:
    """Whether Keras is writing or reading a whole model in its legacy format."""
    return bool(global_state.get_global_attribute("use_legacy_config", False))


def build_shapes(model: keras.Model) -> dict[str, Any]:
    """The shapes of the arguments of `call` that a model was built with, by name."""
    return getattr(model, "_build_shapes_dict", None) or {}


def is_shape(shape: Any) -> bool:
    """Whether a value is the shape of one tensor, not a structure of shapes."""
    return isinstance(shape, (tuple, list)) and all(
        size is None or isinstance(size, int) for size in shape
    )


def loss_options(loss: keras.losses.Loss) -> dict[str, Any]:
    """The arguments of the function that one of Keras's losses wraps.

    Args:
        loss: An instance of one of Keras's classes.

    Returns:
        A new dict; `get_config` leaves some of them out.
    """
    return dict(loss._fn_kwargs)


@contextmanager
def new_variables(layer: keras.Layer, old: Iterable[Any]) -> Iterator[None]:
    """Lets a built layer replace some of its variables.

    Args:
        layer: The layer.
        old: Variables to remove.

    Yields:
        Nothing; within the context `layer.add_weight` works.
    """
    tracker = layer._tracker
    was_locked = tracker.locked
    tracker.unlock()
    try:
        for variable in old:
            layer._untrack_variable(variable)
        # The path of a variable begins with that of its layer.
        with layer._open_name_scope():
            yield
    finally:
        if was_locked:
            tracker.lock()


def of_any_backend(config: Any) -> Any:
    """A serialized object with optimizers that every backend knows.

    On PyTorch Keras has subclasses of its optimizers, and writes down their modules,
    which cannot be imported without PyTorch.

    Args:
        config: What `keras.saving.serialize_keras_object` gives, or a part of it.

    Returns:
        The same with the optimizers' public module.
    """
    if isinstance(config, list):
        return [of_any_backend(each) for each in config]
    if not isinstance(config, dict):
        return config
    found = {key: of_any_backend(value) for key, value in config.items()}
    module = found.get("module")
    if isinstance(module, str) and module.startswith(_TORCH_OPTIMIZERS):
        found |= {"module": "keras.optimizers", "registered_name": None}
    return found


def print_message(message: str) -> None:
    """Prints as Keras prints: to a log where interactive logging is disabled."""
    io_utils.print_msg(message)
