import json

import keras
import numpy as np
import pytest

import keras_dalign as kd
from keras_dalign.certification.quadratic_bound import weights_of

SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def model_of(units=1, width=8, **arguments):
    keras.utils.set_random_seed(0)
    head = kd.QuadraticHead(units, width, seed=0, **arguments)
    dense = keras.layers.Dense(6, activation="softplus", trainable=False)
    return keras.Sequential([keras.Input((4,)), dense, head])


def points(n=30, d=4, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype("float32")


X, Y = points(), points(d=1, seed=1)


def test_it_ends_where_the_gradient_vanishes():
    model = model_of()
    model.compile(loss="mse")
    trunk = [keras.ops.convert_to_numpy(v) for v in model.layers[0].variables]
    before = model.evaluate(X, Y, verbose=0)
    result = kd.solve_quadratic(model, X, Y, tol=1e-7)
    assert result.converged
    assert result.gradient < 1e-5
    assert result.value < before
    assert result.value == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-5)
    assert result.loss == pytest.approx(kd.certify(model, X, Y).loss, rel=1e-5)
    assert result.loss < result.value
    for old, variable in zip(trunk, model.layers[0].variables, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), old)
    # It goes on from where it is, and there is nothing left to do.
    again = kd.solve_quadratic(model, X, Y, tol=1e-4)
    assert again.iterations == 0
    assert again.value == result.value


def test_results_print_and_serialise():
    result = kd.solve_quadratic(model_of(), X, Y, loss="mse", tol=1e-3)
    assert "as small as asked for after" in str(result)
    assert json.loads(json.dumps(result.to_dict()))["tol"] == 1e-3
    short = kd.solve_quadratic(model_of(), X, Y, loss="mse", max_iterations=2)
    assert not short.converged
    assert short.iterations == 2
    assert "raise `max_iterations`" in short.message
    stuck = kd.solve_quadratic(model_of(), X, Y, loss="mse", tol=1e-300)
    assert "cannot be lowered further" in stuck.message


def test_classes_and_weights():
    labels = (X[:, 0] > 0) + (X[:, 1] > 0).astype(int)
    model = model_of(3, 16, penalty=1e-4)
    weights = np.where(np.arange(30) < 20, 1.0, 0.0)
    kd.solve_quadratic(model, X, labels, loss=SPARSE, sample_weight=weights, tol=1e-5)
    right = model.predict_on_batch(X).argmax(axis=1) == labels
    assert right[:20].all()
    # Samples without weight count for nothing but the divisor.
    other = model_of(3, 16, penalty=1e-4)
    labels[20:] = 0
    kd.solve_quadratic(other, X, labels, loss=SPARSE, sample_weight=weights, tol=1e-5)
    np.testing.assert_array_equal(
        weights_of(model.layers[-1]), weights_of(other.layers[-1])
    )


def test_a_stream_is_read_once():
    from_arrays, from_stream = model_of(), model_of()
    kd.solve_quadratic(from_arrays, X, Y, loss="mse", tol=1e-4, batch_size=10)
    stream = ((X[i : i + 10], Y[i : i + 10]) for i in (0, 10, 20))
    kd.solve_quadratic(from_stream, stream, loss="mse", tol=1e-4, steps=3)
    np.testing.assert_array_equal(
        weights_of(from_arrays.layers[-1]), weights_of(from_stream.layers[-1])
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tol": 0.0}, "`tol` must be a positive number. Received: tol=0.0"),
        ({"max_iterations": 0}, "`max_iterations` must be a positive int"),
        ({"loss": None}, "The model has no loss"),
        ({"y": None}, "Targets are needed"),
        ({"sample_weight": np.zeros(30)}, "All of `sample_weight` are 0"),
        ({"y": np.full((30, 1), 1e200)}, "overflows float64 at the head's weights"),
        ({"x": np.full((30, 4), np.nan)}, "finite"),
    ],
)
def test_bad_input(arguments, message):
    given = {"x": X, "y": Y, "loss": "mse", **arguments}
    with pytest.raises(ValueError, match=message):
        kd.solve_quadratic(model_of(), given.pop("x"), given.pop("y"), **given)


def test_models_that_end_otherwise():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)], name="dense")
    with pytest.raises(ValueError, match=r"last layer is a.*Received: model 'dense'"):
        kd.solve_quadratic(model, X, Y, loss="mse")
