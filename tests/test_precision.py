"""Float64 copies: the same function, in float64 everywhere, and nothing else moved."""

import random

import keras
import numpy as np
import pytest
from keras import ops
from small import assert_equal, convnet, cross_entropy, digit_images, digits, mlp

import keras_dalign as kd
from keras_dalign.diagnostics.precision import RebuildError, float64_context, in_float64

BACKEND = keras.backend.backend()


class Scale(keras.layers.Layer):
    """Not registered, and without `get_config`."""

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor
        self.inner = keras.layers.Dense(4)

    def call(self, x):
        return self.factor * self.inner(x)


class Plain(keras.Model):
    """A constructor that takes nothing of what Keras puts into a config.

    Keras does not note the arguments of a model's constructor.
    """

    def __init__(self, width=5):
        super().__init__()
        self.width = width
        self.hidden = keras.layers.Dense(width, "tanh")
        self.last = keras.layers.Dense(3)

    def call(self, x):
        return self.last(self.hidden(x))


class Stubborn(Plain):
    def get_config(self):
        raise NotImplementedError("no config")


def predict(model, x):
    with float64_context():
        x = keras.tree.map_structure(
            lambda leaf: ops.convert_to_tensor(leaf, dtype="float64"), x
        )
        return np.asarray(ops.convert_to_numpy(model(x, training=False)))


def dense64(x, *layers):
    """An MLP by NumPy, ReLU between the layers."""
    h = np.asarray(x, dtype="float64")
    for index, layer in enumerate(layers):
        kernel, bias = (np.asarray(w).astype("float64") for w in layer.get_weights())
        h = np.maximum(h, 0) if index else h
        h = h @ kernel + bias
    return h


@pytest.mark.parametrize(
    "policy", ["float32", "mixed_float16", "mixed_bfloat16", "bfloat16"]
)
def test_copy_computes_in_float64_to_the_last_digit(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = mlp()
    finally:
        keras.config.set_dtype_policy("float32")
    x, _ = digits(20)
    copy = in_float64(model)
    outputs = predict(copy, x)
    assert outputs.dtype == np.float64
    # Any float32 on the way would cost 1e-7.
    np.testing.assert_allclose(
        outputs, dense64(x, *model.layers), rtol=1e-13, atol=1e-14
    )
    assert {str(w.dtype) for w in copy.weights} == {"float64"}
    assert {layer.compute_dtype for layer in copy.layers} == {"float64"}


def test_convolutions_batch_norm_and_pooling_stay_in_float64():
    x, _ = digit_images(6)
    model = convnet()
    copy = in_float64(model)
    names = ["float64", "float32"]
    exact, rounded = predict(copy, x), model.predict(x, verbose=0)
    assert [exact.dtype.name, rounded.dtype.name] == names
    # Two orders of summation in float64 agree to 1e-13; float32 within would show.
    flipped = predict(copy, x[::-1].copy())[::-1]
    np.testing.assert_allclose(exact, flipped, rtol=0, atol=1e-13)
    kernel = np.asarray(model.get_layer("conv").get_weights()[0], dtype="float64")
    bias = np.asarray(model.get_layer("conv").get_weights()[1], dtype="float64")
    padded = np.pad(np.asarray(x, "float64"), ((0, 0), (1, 1), (1, 1), (0, 0)))
    h = bias + sum(
        padded[:, i : i + 8, j : j + 8] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )
    h = np.maximum(h / np.sqrt(1 + 1e-3), 0)
    h = h.reshape(6, 2, 4, 2, 4, 6).mean(axis=(2, 4)).reshape(6, -1)
    logits = model.get_layer("logits")
    np.testing.assert_allclose(exact, dense64(h, logits), rtol=1e-12, atol=1e-13)


def test_nested_functional_models_casts_and_integer_inputs():
    words = keras.Input((3,), dtype="int32", name="words")
    numbers = keras.Input((4,), name="numbers")
    inner_in = keras.Input((4,))
    inner = keras.Model(inner_in, keras.layers.Dense(5, "tanh")(inner_in), name="in")
    h = keras.layers.Embedding(7, 2)(words)
    h = keras.layers.Concatenate()([keras.layers.Flatten()(h), inner(numbers)])
    h = ops.cast(ops.cast(h, "float16"), "float32")
    model = keras.Model([words, numbers], keras.layers.Dense(2)(h))
    copy = in_float64(model)
    rng = np.random.default_rng(0)
    w, z = rng.integers(0, 7, size=(5, 3)), rng.normal(size=(5, 4))
    assert str(copy.inputs[0].dtype) == "int32"
    with float64_context():
        inputs = [ops.convert_to_tensor(w.astype("int32")), ops.convert_to_tensor(z)]
        outputs = np.asarray(ops.convert_to_numpy(copy(inputs)))
    table, k1, b1, k2, b2 = (
        np.asarray(v).astype("float64") for v in model.get_weights()
    )
    h = np.concatenate([table[w].reshape(5, -1), np.tanh(z @ k1 + b1)], axis=1)
    np.testing.assert_allclose(outputs, h @ k2 + b2, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gates", ["random", "learned"])
@pytest.mark.parametrize("exploits", [False, True])
def test_aligned_models_keep_their_phase(gates, exploits):
    x, _ = digits(20)
    model = kd.align(mlp(), n_samples=20, gates=gates)
    if exploits:
        model.start_exploiting()
        rng = np.random.default_rng(0)
        model.head.q.assign(rng.normal(size=model.head.q.shape))
    copy = in_float64(model)
    assert copy.phase == model.phase
    for target, source in zip(copy.weights, model.weights, strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(target), ops.convert_to_numpy(source)
        )
    np.testing.assert_allclose(
        predict(copy, x), model.predict(x, verbose=0), rtol=1e-4, atol=1e-4
    )


def test_layers_shared_by_trunk_and_head_are_shared_in_the_copy():
    inputs = keras.Input((6,))
    dense = keras.layers.Dense(6)
    trunk = keras.Model(inputs, keras.layers.ReLU()(dense(inputs)))
    head = kd.AlignmentHead(6, n_samples=8, dense=dense)
    model = kd.AlignedModel(trunk, head)
    copy = in_float64(model)
    assert copy.head.dense is copy.trunk.layers[1]


def test_custom_layers_need_not_be_registered():
    x = np.random.default_rng(0).normal(size=(5, 3))
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2)(Scale(2.0)(inputs)))
    scale, last = model.layers[1:]
    copy = in_float64(model, x)
    assert {str(w.dtype) for w in copy.weights} == {"float64"}
    expected = dense64(x, scale.inner) * 2
    kernel, bias = last.get_weights()
    np.testing.assert_allclose(
        predict(copy, x), expected @ kernel.astype("float64") + bias, rtol=1e-12
    )


def test_subclassed_models_are_built_on_a_batch():
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    model = Plain()
    model(x)
    copy = in_float64(model, x)
    assert [tuple(w.shape) for w in copy.weights] == [
        tuple(w.shape) for w in model.weights
    ]
    np.testing.assert_allclose(predict(copy, x), model.predict(x, verbose=0), rtol=1e-3)


def test_the_model_and_all_random_state_are_left_alone():
    model = convnet()
    model.get_layer("conv").trainable = False
    model.compile("adam", cross_entropy())
    model.fit(*digit_images(32), epochs=1, verbose=0)
    weights, optimizer = model.get_weights(), model.optimizer
    state = [np.array(ops.convert_to_numpy(v)) for v in optimizer.variables]
    flags = [v.trainable for v in model.variables]
    paths = [v.path for v in model.variables]
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    python, numpy = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    before = (keras.config.floatx(), keras.config.dtype_policy().name)

    copy = in_float64(model)
    with float64_context():
        copy.get_layer("logits").kernel.assign(np.zeros((24, 10)))

    assert_equal(model.get_weights(), weights)
    assert model.optimizer is optimizer
    assert_equal(
        [np.array(ops.convert_to_numpy(v)) for v in optimizer.variables], state
    )
    assert [v.trainable for v in model.variables] == flags
    assert [v.path for v in model.variables] == paths
    assert [len(layer._inbound_nodes) for layer in model.layers] == nodes
    assert random.getstate() == python
    np.testing.assert_array_equal(np.random.get_state()[1], numpy)  # noqa: NPY002
    assert (keras.config.floatx(), keras.config.dtype_policy().name) == before
    assert model.compiled
    assert not copy.compiled


def test_context_is_left_as_it_was_entered():
    def fail():
        with float64_context():
            assert keras.backend.result_type("float64", "float64") == "float64"
            assert keras.config.floatx() == "float64"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    kept = "float64" if BACKEND == "tensorflow" else "float32"
    assert keras.backend.result_type("float64", "float64") == kept
    assert keras.config.floatx() == "float32"
    assert keras.backend.standardize_dtype(ops.ones(2).dtype) == "float32"


def test_models_that_cannot_be_rebuilt_are_an_error_of_their_own():
    x = np.ones((2, 4), dtype="float32")
    model = Stubborn()
    model(x)
    with pytest.raises(RebuildError, match=r"Stubborn.*no config"):
        in_float64(model, x)
    with pytest.raises(RebuildError, match="Call it once"):
        in_float64(Plain())
    wide = Plain(7)
    wide(x)
    with pytest.raises(RebuildError, match="weights of other shapes"):
        in_float64(wide, x)
    assert keras.config.floatx() == "float32"


def test_quantized_models_have_no_float64_form():
    inputs = keras.Input((8,))
    dense = keras.layers.Dense(4)
    model = keras.Model(inputs, keras.layers.Dense(2)(dense(inputs)))
    dense.quantize("int8")
    with pytest.raises(RebuildError, match="quantized"):
        in_float64(model)


def test_a_weight_that_is_nan_is_refused():
    """Compiled, TensorFlow made zeros of it: `check_structure` found nothing wrong."""
    x, y = digits(12)
    model = mlp()
    kernel, bias = model.layers[0].get_weights()
    kernel[3, 2] = np.nan
    model.layers[0].set_weights([kernel, bias])
    with pytest.raises(ValueError, match=r"must not be NaN.*NaN in '.*hidden/kernel"):
        kd.check_structure(model, x)
    with pytest.raises(ValueError, match="must not be NaN"):
        kd.check_alignment(model, x, y, loss=cross_entropy())
