"""The private names of Keras: each function by what it says of a small graph."""

import keras
import pytest
from keras import layers, ops

from keras_dalign import compat


def graph():
    inputs = keras.Input((6,), name="inputs")
    shared = layers.Dense(6, name="shared")
    h = ops.relu(shared(inputs))
    h = shared(inputs=layers.Dropout(0.5, name="drop")(h, training=False))
    return keras.Model(inputs, h, name="graph")


def test_producer():
    model = graph()
    call, index = compat.producer(model.outputs[0])
    assert index == 0
    assert call.operation is model.get_layer("shared")
    assert call.args == ()
    assert list(call.kwargs) == ["inputs"]
    assert call.outputs == [model.outputs[0]]
    (dropped,) = call.inputs
    call, _ = compat.producer(dropped)
    assert call.operation is model.get_layer("drop")
    assert len(call.args) == 1
    assert call.kwargs == {"training": False}


def test_the_producer_of_one_of_several_tensors():
    inputs = keras.Input((6,))
    inner = keras.Model(inputs, {"a": ops.relu(inputs), "b": layers.Dense(2)(inputs)})
    outputs = inner(keras.Input((6,)))
    for index, name in enumerate("ab"):
        call, found = compat.producer(outputs[name])
        assert (call.operation, found) == (inner, index)
        assert call.outputs[index] is outputs[name]


def test_upstream():
    model = graph()
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(3, name="inside")])
    h = inner(model.outputs[0])
    layers.ReLU(name="downstream")(h)
    found = compat.upstream([h, model.outputs[0]])
    assert len(found) == 5
    names = {operation.name for operation in found if hasattr(operation, "weights")}
    assert names == {inner.name, "shared", "drop", "inputs"}
    assert sum(isinstance(operation, layers.Layer) for operation in found) == 4


def test_calls():
    model = graph()
    shared = model.get_layer("shared")
    # Calls in other models are no part of this one.
    shared(keras.Input((6,)))
    found = compat.calls(model)
    names = [type(call.operation).__name__ for call in found]
    assert names == ["InputLayer", "Dense", names[2], "Dropout", "Dense"]
    of_shared = compat.calls_of(shared, model)
    assert of_shared == [found[1], found[4]]
    assert of_shared[0].inputs == model.inputs
    assert of_shared[1].outputs == model.outputs
    assert compat.calls_of(layers.Dense(2), model) == []


class Mine(keras.Model):
    def call(self, inputs, training=None, mask=None):
        return super().call(2.0 * inputs, training=training, mask=mask)


class Plain(keras.Model):
    def __init__(self):
        super().__init__()
        self.top = layers.Dense(2)

    def call(self, inputs):
        return self.top(inputs)


class Subclass(keras.Model):
    """It trains in its own way, and computes what its graph does."""

    def train_step(self, *args):
        return super().train_step(*args)


def kinds():
    functional = graph()
    ends = functional.input, functional.output
    unbuilt = keras.Sequential([layers.Dense(2)])
    built = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    called = Plain()
    called(keras.ops.ones((3, 6)))
    return {
        "functional": functional,
        "subclass": Subclass(*ends),
        "own call": Mine(*ends),
        "unbuilt": unbuilt,
        "sequential": built,
        "plain": called,
    }


@pytest.mark.parametrize(
    "name", ["functional", "subclass", "own call", "unbuilt", "sequential", "plain"]
)
def test_kinds_of_models(name):
    model = kinds()[name]
    functional = name in {"functional", "subclass", "own call"}
    assert compat.is_functional(model) == functional
    assert compat.overrides_call(model) == (name in {"own call", "plain"})
    ends = compat.graph_ends(model)
    if name in {"own call", "unbuilt", "plain"}:
        assert ends is None
        return
    inputs, outputs = ends
    twin = keras.Model(inputs, outputs)
    x = keras.ops.ones((3, 6))
    assert bool(keras.ops.all(twin(x) == model(x)))


def test_the_structure_of_inputs_is_kept():
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    model = keras.Model({"a": a, "b": b}, [a + b, a * b])
    inputs, outputs = compat.graph_ends(model)
    assert inputs == {"a": a, "b": b}
    assert outputs == model.outputs
    assert compat.graph_ends(layers.Dense(2)) is None


def test_build_shapes():
    model = Plain()
    assert compat.build_shapes(model) == {}
    model(keras.ops.ones((3, 6)))
    (shape,) = compat.build_shapes(model).values()
    assert tuple(shape)[1:] == (6,)


def test_loss_options():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=3)
    options = compat.loss_options(loss)
    assert options["from_logits"] is True
    assert options["ignore_class"] == 3
    options["from_logits"] = False
    assert compat.loss_options(loss)["from_logits"] is True
