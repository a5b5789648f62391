"""Finds a model's last layers with weights, and the operations after them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import keras

from keras_dalign.head.alignment_head import EXPLORING, AlignmentHead


@dataclasses.dataclass(frozen=True)
class LastLayer:
    """A layer with weights after which no other layer with weights comes.

    Attributes:
        layer: The layer.
        tensor: Its input, symbolic (the first one of several).
        behind: The operations without weights from the layer to the output, in order.
    """

    layer: keras.layers.Layer
    tensor: keras.KerasTensor
    behind: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class OutputPath:
    """The end of a model's graph.

    Attributes:
        inputs: The symbolic inputs, in the structure that the model takes.
        last: The last layers with weights: more than one where their outputs are
            merged.
        skipped: Layers with weights whose outputs reach the model's output also on a
            path around the last layer.
        n_calls: How often each layer of the graph is called, by the layer's `id`.
        layers: These layers.
    """

    inputs: Any
    last: tuple[LastLayer, ...]
    skipped: tuple[LastLayer, ...]
    n_calls: dict[int, int]
    layers: tuple[keras.layers.Layer, ...]

    @property
    def dense(self) -> keras.layers.Dense | None:
        """The last layer, or an exploring head's, if it is one `Dense`; else None."""
        if len(self.last) != 1 or self.skipped:
            return None
        layer = self.last[0].layer
        if isinstance(layer, AlignmentHead):
            layer = layer.dense if layer.phase == EXPLORING else None
        is_dense = (
            isinstance(layer, keras.layers.Dense)
            and type(layer).call is keras.layers.Dense.call
            and layer.quantization_mode is None
            and not getattr(layer, "lora_enabled", False)
        )
        return layer if is_dense else None

    def variables(self) -> list[keras.Variable]:
        """The weights of the last layers that training would change."""
        found: list[keras.Variable] = []
        for last in self.last:
            layer = last.layer
            if isinstance(layer, AlignmentHead):
                own = layer.explored_variables
            elif isinstance(layer, keras.layers.Dense) and not layer.trainable:
                own = [v for v in (layer.kernel, layer.bias) if v is not None]
            else:
                own = layer.trainable_weights
            found += [v for v in own if not any(v is known for known in found)]
        return found


def output_path(model: keras.Model, x: Any) -> OutputPath | None:
    """Finds a model's last layers with weights.

    Subclassed models are traced, which adds a symbolic call to their layers; see
    `untouched_graph`.

    Args:
        model: A built model with one output.
        x: A batch of inputs, for the shapes to trace a subclassed model with.

    Returns:
        The path, or None if the model's `call` cannot be traced.
    """
    try:
        inputs, output = _ends(model, x)
        walk = _Walk()
        walk.back(output, ())
        walk.count(output)
    except Exception:  # noqa: BLE001  (whatever a user's `call` raises on symbols)
        return None
    found = list({id(last.layer): last for last in walk.found}.values())
    ends = [
        last
        for last in found
        if not any(
            other is not last and walk.reaches(other.tensor, last.layer)
            for other in found
        )
    ]
    skipped = tuple(last for last in found if last not in ends)
    return OutputPath(inputs, tuple(ends), skipped, walk.n_calls, tuple(walk.layers))


@contextlib.contextmanager
def untouched_graph(model: keras.Model) -> Iterator[None]:
    """Removes the symbolic calls that tracing a model adds to its layers.

    Args:
        model: The model that is traced in the context.

    Yields:
        Nothing.
    """
    layers = list(model._flatten_layers())
    counts = [
        (len(x._inbound_nodes), len(x._outbound_nodes))  # noqa: SLF001
        for x in layers
    ]
    try:
        yield
    finally:
        for layer, (inbound, outbound) in zip(layers, counts, strict=True):
            del layer._inbound_nodes[inbound:]
            del layer._outbound_nodes[outbound:]  # noqa: SLF001


def _ends(model: keras.Model, x: Any) -> tuple[Any, keras.KerasTensor]:
    if hasattr(model, "_inputs_struct") and not _overrides_call(model):
        return model.input, model.outputs[0]
    if isinstance(model, keras.Sequential) and not _overrides_call(model):
        return model.inputs[0], model.outputs[0]
    inputs = keras.tree.map_structure(
        lambda leaf: keras.Input(leaf.shape[1:], dtype=str(leaf.dtype)), x
    )
    takes_training = "training" in inspect.signature(model.call).parameters
    outputs = model.call(inputs, **({"training": False} if takes_training else {}))
    (output,) = keras.tree.flatten(outputs)
    return inputs, output


def _overrides_call(model: keras.Model) -> bool:
    owner = next(base for base in type(model).__mro__ if "call" in vars(base))
    return not owner.__module__.startswith("keras.")


class _Walk:
    """Follows tensors back to the operations that made them, into nested models."""

    def __init__(self) -> None:
        self.found: list[LastLayer] = []
        self.n_calls: dict[int, int] = {}
        self.layers: list[keras.layers.Layer] = []
        self._inner: dict[tuple[int, int], list[keras.KerasTensor]] = {}

    def back(self, tensor: keras.KerasTensor, behind: tuple[Any, ...]) -> None:
        """Collects the first layer with weights on each way back from a tensor."""
        operation, node = self._made(tensor)
        if isinstance(operation, keras.layers.Layer) and operation.weights:
            self.found.append(LastLayer(operation, node.input_tensors[0], behind))
            return
        for source in node.input_tensors:
            self.back(source, (operation, *behind))

    def reaches(self, tensor: keras.KerasTensor, layer: Any) -> bool:
        """Whether a tensor depends on a layer."""
        return any(operation is layer for operation, _ in self._all(tensor))

    def count(self, tensor: keras.KerasTensor) -> None:
        """Counts the calls of all layers that a tensor depends on."""
        for operation, _ in self._all(tensor):
            calls = self.n_calls.get(id(operation), 0)
            self.n_calls[id(operation)] = calls + 1
            if not calls and isinstance(operation, keras.layers.Layer):
                self.layers.append(operation)

    def _all(self, tensor: keras.KerasTensor) -> list[tuple[Any, Any]]:
        seen: dict[int, tuple[Any, Any]] = {}
        waiting = [tensor]
        while waiting:
            operation, node = self._made(waiting.pop())
            if id(node) not in seen:
                seen[id(node)] = (operation, node)
                waiting += node.input_tensors
        return list(seen.values())

    def _made(self, tensor: keras.KerasTensor) -> tuple[Any, Any]:
        operation, node_index, tensor_index = tensor._keras_history
        node = operation._inbound_nodes[node_index]
        if not isinstance(operation, keras.Model):
            return operation, node
        key = (id(operation), node_index)
        if key not in self._inner:
            arguments = node.arguments
            self._inner[key] = keras.tree.flatten(
                operation.call(*arguments.args, **arguments.kwargs)
            )
        return self._made(self._inner[key][tensor_index])
