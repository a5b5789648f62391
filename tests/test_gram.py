"""The Gram matrix and the explicit features against sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from keras_dalign.numerics.gram import explicit_features, gate_activations, gram_matrix


def _case(n, d, m, seed=0):
    rng = np.random.default_rng(seed)
    features = np.concatenate([rng.normal(size=(n, d - 1)), np.ones((n, 1))], axis=1)
    return features, rng.normal(size=(d, m)), rng.normal(size=m)


CASES = [(1, 1, 1), (1, 4, 3), (7, 1, 2), (6, 4, 1), (12, 5, 3), (5, 3, 20)]


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("slope", [0.5, 4.0, 100.0])
def test_gram_matrix_is_the_gram_matrix_of_the_explicit_features(shape, slope):
    case = _case(*shape)
    phi = explicit_features(*case, slope)
    gram = gram_matrix(*case, slope)
    assert phi.shape == (shape[0], shape[1] * shape[2])
    assert gram.dtype == phi.dtype == np.float64
    np.testing.assert_allclose(gram, phi @ phi.T, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(gram, gram.T)


@pytest.mark.parametrize("shape", CASES)
def test_features_times_weights_are_the_heads_sum(shape):
    n, d, m = shape
    slope = 3.0
    features, gates, weights = _case(*shape)
    trained = np.random.default_rng(1).normal(size=(m, d))
    expected = np.zeros(n)
    for i in range(n):
        for k in range(m):
            argument = slope * sum(features[i, j] * gates[j, k] for j in range(d))
            unit = sum(features[i, j] * trained[k, j] for j in range(d))
            expected[i] += weights[k] / (1 + math.exp(-argument)) * unit
    phi = explicit_features(features, gates, weights, slope)
    np.testing.assert_allclose(phi @ trained.ravel(), expected, rtol=1e-11, atol=1e-12)


def test_gates_are_accurate_at_both_ends():
    features = np.array([[-1000.0], [-50.0], [0.0], [50.0], [1000.0]])
    values = gate_activations(features, [[1.0]], 1.0)[:, 0]
    np.testing.assert_allclose(values, [0, math.exp(-50), 0.5, 1, 1], rtol=1e-13)


def test_low_precision_input_is_judged_in_float64():
    features, gates, weights = (a.astype("float32") for a in _case(9, 4, 3))
    gram = gram_matrix(features, gates, weights, 4.0)
    exact = gram_matrix(*(a.astype("float64") for a in (features, gates, weights)), 4.0)
    np.testing.assert_array_equal(gram, exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Zh": np.ones(4)}, r"`Zh` must be a matrix.*Zh.shape=\(4,\)"),
        ({"R": np.ones(4)}, r"`R` must be a matrix.*R.shape=\(4,\)"),
        ({"R": np.ones((3, 2))}, r"one row per column.*R.shape=\(3, 2\)"),
        ({"w": np.ones(3)}, r"one entry per column.*w.shape=\(3,\)"),
        ({"w": np.ones((2, 1))}, r"one entry per column.*w.shape=\(2, 1\)"),
        ({"slope": 0.0}, "positive and finite.*slope=0.0"),
        ({"slope": math.nan}, "positive and finite.*slope=nan"),
    ],
)
@pytest.mark.parametrize("function", [explicit_features, gram_matrix])
def test_bad_input(function, change, message):
    arguments = {"Zh": np.ones((5, 4)), "R": np.ones((4, 2)), "w": np.ones(2)}
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, "slope": 4.0, **change})
