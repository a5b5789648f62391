import keras
import numpy as np
import pytest
from small import convnet, cross_entropy, digit_images, digits, mlp

import keras_dalign as kd
from keras_dalign.head import data, features
from keras_dalign.head.features import FeaturePass, as_inputs, from_inputs, plan_cache
from keras_dalign.numerics.repeats import digests


def model_of(base, n=96):
    model = kd.align(base, n_samples=n, seed=0)
    model.compile("sgd", loss=cross_entropy())
    return model


def test_moments_are_those_of_the_population():
    x, y = digit_images(96)
    model = model_of(convnet())
    found = FeaturePass(model, keep=True).run(x, y, batch_size=10)
    z = model.trunk.predict(x, verbose=0)
    mean, variance = found.moments()
    np.testing.assert_allclose(mean, z.mean(axis=0, dtype="float64"), rtol=1e-5)
    np.testing.assert_allclose(variance, z.var(axis=0, dtype="float64"), rtol=1e-4)
    kept = found.feature_set()
    np.testing.assert_allclose(kept.z, z, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(kept.y, y)
    np.testing.assert_array_equal(found.positions(), np.arange(96))
    assert kept.sample_weight is None


def test_arrays_and_streams_see_the_same():
    x, y = digits(90)
    model = model_of(mlp())
    whole = FeaturePass(model, keep=True).run(x, y, y * 1.0, batch_size=7)
    # Of 13 batches the last has six samples, and is filled up.
    parts = data.batches(x, y, y * 1.0, batch_size=7)
    streamed = FeaturePass(model, keep=True).run(parts, steps=13)
    for left, right in zip(whole.moments(), streamed.moments(), strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(whole.feature_set().z, streamed.feature_set().z)
    np.testing.assert_array_equal(streamed.feature_set().sample_weight, y * 1.0)
    assert whole.n == streamed.n == 90
    z = model.trunk.predict(x, verbose=0)
    # The trunk is float32, and rounds as the size of its batches has it.
    np.testing.assert_allclose(whole.feature_set().z, z, rtol=1e-5, atol=1e-6)


def test_the_sample_of_rows_is_uniform(monkeypatch):
    monkeypatch.setattr(features, "_SAMPLE_ROWS", 20)
    model = model_of(mlp())
    drawn = np.zeros(100)
    rows = np.arange(100.0).repeat(3).reshape(100, 3).astype("float32")
    for seed in range(400):
        found = FeaturePass(model, keep=False)
        found.rng = np.random.default_rng(seed)
        for start in range(0, 100, 15):
            found._add(rows[start : start + 15], None, None)
        sample = found.rows()[:, 0].astype(int)
        assert sample.shape == (20,)
        assert len(set(sample)) == 20
        np.testing.assert_array_equal(found.positions(), sample)
        drawn[sample] += 1
    # Binomial(400, 0.2): mean 80, standard deviation 8.
    assert abs(drawn - 80).max() < 5 * 8
    assert abs(drawn[:50].mean() - 80) < 5


def test_features_travel_as_marked_inputs():
    z = np.ones((2, 3))
    assert from_inputs(as_inputs(z)) is z
    assert from_inputs(z) is None
    assert from_inputs({"image": z}) is None


@pytest.mark.parametrize(
    ("wanted", "is_array", "free", "keep"),
    [
        ("auto", True, 1.0, True),
        ("auto", True, 1e-9, False),
        ("auto", True, None, True),
        ("auto", False, 1.0, False),
        (True, False, 1e-9, True),
        (False, True, 1.0, False),
    ],
)
def test_when_features_are_kept(monkeypatch, wanted, is_array, free, keep):
    monkeypatch.setattr(features, "free_gib", lambda: free)
    plan = plan_cache(model_of(mlp()).head, 1000, wanted, is_array)
    assert plan.keep is keep
    assert plan.gib == pytest.approx(1000 * 16 * 4 / 2**30)
    assert "cached" in plan.reason


def test_free_memory_is_plausible():
    free = features.free_gib()
    assert free is None or 0 < free < 2**20


def test_half_precision_features_are_kept_in_float32():
    keras.utils.set_random_seed(0)
    base = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(16, "relu", dtype="mixed_bfloat16"),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )
    x, y = digits(40)
    kept = FeaturePass(model_of(base), keep=True).run(x, y).feature_set()
    assert kept.z.dtype == np.float32


def test_digests_are_those_of_the_inputs_in_order():
    x, y = digits(50)
    x[20] = x[3]
    given = FeaturePass(model_of(mlp()), keep=True, digest=True).run(x, y, batch_size=7)
    assert given.feature_set().digests == digests(x)
    assert given.digests[20] == given.digests[3]
    assert len(set(given.digests)) == 49
    without = FeaturePass(model_of(mlp()), keep=True).run(x, y)
    assert without.feature_set().digests is None
