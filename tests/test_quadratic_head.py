import math
import random

import keras
import numpy as np
import pytest
from keras import ops

import keras_dalign as kd
from keras_dalign.head.quadratic_head import SECOND_DERIVATIVES

N, D, C, M = 9, 4, 2, 6


def features(n=N, seed=0):
    return np.random.default_rng(seed).standard_normal((n, D)).astype("float32")


def built(kind="step", **arguments):
    head = kd.QuadraticHead(C, M, kind, **{"seed": 1, **arguments})
    head.build((None, D))
    return head


def test_weights_follow_the_seed_alone():
    head = built()
    w = np.random.default_rng([1, 0]).standard_normal((D, C, M))
    w0 = np.random.default_rng([1, 1]).standard_normal((M, D)).T
    np.testing.assert_allclose(ops.convert_to_numpy(head.w), 0.025 * w, rtol=1e-6)
    np.testing.assert_allclose(ops.convert_to_numpy(head.w0), w0, rtol=1e-6)
    assert set(ops.convert_to_numpy(head.signs)) == {-1.0, 1.0}
    assert [v.name for v in head.trainable_variables] == ["w"]


def test_a_seed_of_none_follows_python_and_leaves_it_as_it_was():
    random.seed(3)
    seeds = {kd.QuadraticHead(1, 2).seed for _ in range(2)}
    after = random.random()
    random.seed(3)
    assert random.random() == after
    assert len(seeds) == 1


@pytest.mark.parametrize("kind", SECOND_DERIVATIVES)
def test_outputs_are_those_of_the_formula(kind):
    head, u = built(kind), features()
    # No direction at all: the gate is that of 0, the output 0.
    u[0] = 0.0
    w, w0, a = (ops.convert_to_numpy(v) for v in (head.w, head.w0, head.signs))
    t = u @ w0 / np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-9)
    gates = {"step": t >= 0, "relu": np.maximum(t, 0), "one": np.ones_like(t)}[kind]
    scaled = a * gates / (2 * math.sqrt(M))
    expected = np.einsum("nr,ncr->nc", scaled, np.einsum("ni,icr->ncr", u, w) ** 2)
    found = ops.convert_to_numpy(head(u))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(head.gates_exactly(u), scaled, rtol=1e-4, atol=1e-7)
    assert head.compute_output_shape((None, D)) == (None, C)


@pytest.mark.parametrize("kind", ["step", "relu"])
def test_gates_do_not_depend_on_the_length_of_the_features(kind):
    head, u = built(kind), features()
    np.testing.assert_allclose(
        head.gates_exactly(64 * u), head.gates_exactly(u), rtol=1e-10
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(head(64 * u)), 4096 * ops.convert_to_numpy(head(u)), 1e-4
    )


def test_keras_adds_the_penalty_and_trains_w_alone():
    model = keras.Sequential([keras.Input((D,)), built(penalty=0.5)])
    head = model.layers[-1]
    w = ops.convert_to_numpy(head.w)
    quartic = 0.5 * np.sum(np.square(np.square(w).sum(axis=0)))
    assert float(ops.convert_to_numpy(sum(model.losses))) == pytest.approx(
        quartic, rel=1e-5
    )
    head.w.assign(20 * w)
    fixed = [ops.convert_to_numpy(v) for v in (head.w0, head.signs)]
    model.compile(keras.optimizers.Adam(0.05), "mse")
    y = np.ones((N, C), "float32")
    before = model.evaluate(features(), y, verbose=0)
    model.fit(features(), y, epochs=40, verbose=0)
    assert model.evaluate(features(), y, verbose=0) < 0.9 * before
    for old, variable in zip(fixed, (head.w0, head.signs), strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), old)


def test_saved_and_loaded(tmp_path):
    model = keras.Sequential([keras.Input((D,)), built("relu", penalty=0.25)])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        loaded.predict_on_batch(features()), model.predict_on_batch(features())
    )
    assert loaded.layers[-1].get_config() == model.layers[-1].get_config()
    # Of a drawn seed, too.
    drawn = kd.QuadraticHead(C, M)
    assert kd.QuadraticHead.from_config(drawn.get_config()).seed == drawn.seed


def test_mixed_precision_keeps_squares_and_weights_in_float32():
    head = built(dtype="mixed_bfloat16")
    outputs = head(100 * features())
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(head.w.dtype) == "float32"
    expected = ops.convert_to_numpy(built()(100 * features()))
    found = ops.convert_to_numpy(ops.cast(outputs, "float32"))
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": 0}, "`units` must be a positive int. Received: units=0"),
        ({"width": 2.5}, "`width` must be a positive int. Received: width=2.5"),
        ({"width": True}, "`width` must be a positive int"),
        ({"second_derivative": "tanh"}, r"one of \('step', 'relu', 'one'\).*'tanh'"),
        ({"penalty": 0.0}, "no certificate. Received: penalty=0.0"),
        ({"penalty": float("nan")}, "`penalty` must be a positive number"),
        ({"seed": -1}, "`seed` must be a non-negative int. Received: seed=-1"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        kd.QuadraticHead(**{"units": 1, "width": 2, **arguments})


@pytest.mark.parametrize("shape", [(None, 3, 4), (None, None)])
def test_features_must_be_vectors(shape):
    with pytest.raises(ValueError, match="vectors of a known length"):
        kd.QuadraticHead(1, 2).build(shape)
