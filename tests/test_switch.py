import numpy as np
import pytest
from keras.ops import convert_to_numpy as to_numpy
from small import assert_equal, convnet, cross_entropy, digit_images, weights

import keras_dalign as kd
from keras_dalign.head import features
from keras_dalign.training.switch import switch


def explored(gates="random", n=96):
    x, y = digit_images(n)
    model = kd.align(convnet(), n_samples=n, gates=gates, seed=3)
    model.compile("adam", loss=cross_entropy())
    model.fit(x, y, epochs=2, verbose=0)
    return model, x, y


@pytest.mark.parametrize("gates", ["random", "learned"])
def test_statistics_are_those_of_the_population(gates):
    model, x, _ = explored(gates)
    report, kept = switch(model, x)
    assert kept is None
    conv = model.trunk.get_layer("conv")
    inputs = to_numpy(conv(x)).reshape(-1, 6).astype("float64")
    bn = model.trunk.get_layer("bn")
    np.testing.assert_allclose(to_numpy(bn.moving_mean), inputs.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(
        to_numpy(bn.moving_variance), inputs.var(axis=0), rtol=1e-4
    )
    z = model.trunk.predict(x, verbose=0).astype("float64")
    standardize = model.head.standardize
    np.testing.assert_allclose(
        to_numpy(standardize.moving_mean), z.mean(axis=0), atol=1e-5
    )
    np.testing.assert_allclose(
        to_numpy(standardize.moving_variance), z.var(axis=0), rtol=1e-4
    )
    assert (report.n_samples, report.n_batch_norms) == (96, 1)
    assert model.phase == "exploiting"
    assert model.switch_report is report


def test_kept_features_give_the_model_s_outputs():
    model, x, y = explored()
    _, kept = switch(model, x, y, keep_features=True)
    outputs = to_numpy(model.head(kept.z))
    np.testing.assert_allclose(outputs, model.predict(x, verbose=0), atol=1e-5)
    np.testing.assert_array_equal(kept.y, y)


def test_the_rank_check_is_of_the_head_s_own_features():
    model, x, _ = explored()
    report, _ = switch(model, x)
    v = model.head.normalize_exactly(model.trunk.predict(x, verbose=0))
    r, w = model.head.gates_of(0)
    gate = 1 / (1 + np.exp(-model.head.slope * (v @ r)))
    phi = ((w * gate)[:, :, None] * v[:, None, :]).reshape(len(v), -1)
    sigma = np.linalg.svd(phi, compute_uv=False)
    assert report.rank.rank == np.linalg.matrix_rank(phi)
    assert report.rank.sigma_max == pytest.approx(sigma[0], rel=1e-6)
    assert report.rank.sigma_min == pytest.approx(sigma[-1], rel=1e-3)
    assert report.rank.dtype == "float64"


def test_an_error_leaves_the_model_as_it_was():
    model, x, _ = explored()
    before = weights(model)
    x = x.copy()
    x[5] = np.nan
    with pytest.raises(ValueError, match="finite"):
        switch(model, x)
    assert model.phase == "exploring"
    assert model.switch_report is None
    assert_equal(before, weights(model))


def test_the_rank_check_names_repeated_samples():
    x, y = digit_images(96)
    x[50] = x[7]
    model = kd.align(convnet(), n_samples=96, seed=3)
    model.compile("adam", loss=cross_entropy())
    report, _ = switch(model, x, y, batch_size=10)
    assert report.rank.duplicates == ((7, 50),)
    assert report.rank.n_parallel == 0


@pytest.mark.parametrize("keep", [False, True, "disk"])
def test_the_rank_check_of_a_sample_names_samples_of_the_data(monkeypatch, keep):
    monkeypatch.setattr(features, "_SAMPLE_ROWS", 60)
    x, y = digit_images(96)
    x[1::2] = x[::2]
    model = kd.align(convnet(), n_samples=96, seed=3)
    model.compile("adam", loss=cross_entropy())
    report, _ = switch(model, x, y, batch_size=10, keep_features=keep)
    assert report.n_samples == report.rank.n == 96
    assert report.rank.n_given == 60
    pairs = report.rank.duplicates
    assert all(left // 2 == right // 2 for left, right in pairs)
    assert max(right for _, right in pairs) >= 60
    assert report.rank.n_parallel == 0
