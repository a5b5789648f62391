import re

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy as to_numpy
from small import (
    assert_equal,
    convnet,
    cross_entropy,
    digit_images,
    digits,
    mlp,
    weights,
)

import keras_dalign as kd
from keras_dalign.head import features
from keras_dalign.numerics.gram import explicit_features
from keras_dalign.training.switch import switch


def explored(gates="random", n=96, **head):
    x, y = digit_images(n)
    model = kd.align(convnet(), n_samples=n, gates=gates, seed=3, **head)
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


@pytest.mark.parametrize("share_gates", [True, False])
def test_the_rank_check_is_of_the_head_s_own_features(share_gates):
    model, x, _ = explored(share_gates=share_gates)
    report, _ = switch(model, x)
    v = model.head.normalize_exactly(model.trunk.predict(x, verbose=0))
    r, w = model.head.gates_in_use()
    assert len(w) == (1 if share_gates else 10)
    ranks, values = [], []
    for c in range(len(w)):
        phi = explicit_features(v, r[:, c], w[c], model.head.slope)
        values.append(np.linalg.svd(phi, compute_uv=False))
        ranks.append(np.linalg.matrix_rank(phi))
    output = int(np.argmin([sigma[-1] for sigma in values]))
    assert report.rank.rank == min(ranks)
    assert report.rank.output == (None if share_gates else output)
    assert report.rank.sigma_max == pytest.approx(values[output][0], rel=1e-6)
    assert report.rank.sigma_min == pytest.approx(values[output][-1], rel=1e-3)
    assert report.rank.dtype == "float64"


def test_one_output_whose_units_are_all_the_same_is_named():
    """Learned gates are an output's own, and so is the rank."""
    x, y = digits(96)
    model = kd.align(mlp(), n_samples=96, gates="learned", seed=3)
    model.compile(
        kd.DAlign("sgd", None, explore=0, noise=0.0), loss=cross_entropy(), metrics=[]
    )
    q = to_numpy(model.head.q).copy()
    q[:, 3] = q[:, 3, :1]
    model.head.q.assign(q)
    with pytest.warns(UserWarning, match=r"rank check.*of all outputs, output 3\)"):
        model.fit(x, y, epochs=1, verbose=0)
    rank = model.switch_report.rank
    assert not rank.full
    # All its units have one and the same gate.
    assert (rank.output, rank.rank) == (3, rank.feature_rank)


def test_with_an_l2_term_no_rank_is_needed():
    model, x, _ = explored()
    report, _ = switch(model, x, width=2, rank_matters=False)
    assert model.head.width == 2
    assert report.rank is None
    assert "the L2 term makes the optimum unique at any rank" in str(report)


def mlp_with_features(p, seed=0):
    """Ends in `p` features, as many as there are samples, or more."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(48, "relu"),
            keras.layers.Dense(p, "relu"),
            keras.layers.Dense(10),
        ]
    )


def trained(p, n=200):
    """A base model, its test error, and the digits that it was trained on and not."""
    x, y = digits(n + 800)
    base = mlp_with_features(p)
    base.compile(keras.optimizers.Adam(3e-3), cross_entropy(), metrics=["accuracy"])
    base.fit(x[:n], y[:n], epochs=15, batch_size=25, verbose=0)
    return base, (x[:n], y[:n]), (x[n:], y[n:])


def error_rate(model, x, y):
    return float(np.mean(model.predict(x, verbose=0).argmax(axis=1) != y))


# The whole claim of the default, as features grow from fewer to more than samples.
@pytest.mark.parametrize("p", [50, 100, 200, 400])
def test_the_default_fits_any_labels_however_many_features_there_are(p):
    base, (x, y), test = trained(p)
    before = error_rate(base, *test)
    model = kd.align(base, n_samples=len(x), seed=1)
    result = kd.solve(model, x, y, l2=0, tol=1e-6, verbose=0)
    rank = model.switch_report.rank
    assert rank.full
    assert rank.complete
    assert rank.rank == 200
    assert result.converged
    assert result.gap <= 1.01e-6
    assert kd.certify(model, x, y).loss <= 1.01e-6
    assert error_rate(model, *test) <= before + 0.04


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("p", [200, 400])
def test_too_few_gates_are_found_out_and_the_remedy_is_one(p, width):
    """Counting asks for one or two gates here, which are closed for many samples."""
    base, (x, y), _ = trained(p)
    assert width >= -(-200 // (p + 1))
    model = kd.align(base, n_samples=len(x), seed=1, width=width)
    with pytest.warns(UserWarning, match="rank check at the switch failed"):
        report, _ = switch(model, x, y)
    rank = report.rank
    assert not rank.full
    assert rank.rank < 200
    assert re.search(rf"width (of |\(){rank.needed_width}\b", str(rank))
    mended = kd.align(base, n_samples=len(x), seed=1, width=rank.needed_width)
    report, _ = switch(mended, x, y)
    assert report.rank.full


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


@pytest.mark.parametrize("gates", ["random", "learned"])
def test_an_error_after_the_gates_were_set_leaves_the_model_as_it_was(
    gates, monkeypatch
):
    model, x, _ = explored(gates)
    before = weights(model)

    def fail(*args, **kwargs):
        raise RuntimeError

    monkeypatch.setattr("keras_dalign.training.switch.check_rank", fail)
    with pytest.raises(RuntimeError):
        switch(model, x)
    assert model.phase == "exploring"
    assert (model.head.width is None) is (gates == "random")
    assert_equal(before, weights(model))


@pytest.mark.parametrize("wanted", ["n_samples", "width"])
def test_units_that_do_not_fit_leave_the_model_as_it_was(wanted):
    x, y = digits(96)
    size = {"n_samples": 10**12} if wanted == "n_samples" else {"width": 10**12}
    model = kd.align(mlp(), seed=3, **{"n_samples": 96, **size})
    model.compile(kd.DAlign("adam", None, explore=1), loss=cross_entropy())
    model.fit(x, y, epochs=1, verbose=0)
    before = weights(model)
    outputs = model.predict(x, verbose=0)
    with pytest.raises(MemoryError, match=r"would take [\d.e+]+ GiB, of [\d.e+]+ GiB"):
        model.fit(x, y, initial_epoch=1, epochs=2, verbose=0)
    assert model.phase == "exploring"
    assert model.switch_report is None
    assert_equal(before, weights(model))
    np.testing.assert_array_equal(outputs, model.predict(x, verbose=0))
    # An L2 term needs few units, however many samples there might be.
    if wanted == "n_samples":
        result = kd.solve(model, x, y, l2=1e-2, verbose=0)
        assert result.converged
        assert result.width <= 64


def test_learned_units_that_do_not_fit():
    with pytest.raises(MemoryError, match="GiB"):
        kd.align(mlp(), n_samples=10**12, gates="learned")


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
