import gc
import tempfile

import keras
import numpy as np
import pytest
from small import convnet, cross_entropy, digit_images, digits, maps_in, mlp

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


def pooled():
    """A trunk that gives a pair of features, of the linear part and of the gates."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    h = keras.layers.Conv2D(3, 3, activation="relu")(inputs)
    h = keras.layers.BatchNormalization()(h)
    h = keras.layers.GlobalAveragePooling2D()(h)
    return keras.Model(inputs, keras.layers.Dense(10)(h))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("base", [convnet, pooled])
def test_features_on_disk_are_those_in_memory(base, stream, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x, y = digit_images(96)
    model = model_of(base())
    kept = []
    for keep in (True, "disk"):
        given = (
            data.batches(x, y, y * 1.0, batch_size=20) if stream else (x, y, y * 1.0)
        )
        found = FeaturePass(model, keep=keep)
        if stream:
            found.run(given, steps=5)
        else:
            found.run(*given, batch_size=20)
        # The rows for the rank check are the features themselves, not a copy.
        assert np.shares_memory(
            found.rows(), keras.tree.flatten(found.feature_set().z)[-1]
        )
        kept.append(found.feature_set())
        del found
    memory, disk = kept
    for left, right in zip(
        keras.tree.flatten((memory.z, memory.y, memory.sample_weight)),
        keras.tree.flatten((disk.z, disk.y, disk.sample_weight)),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype
    assert isinstance(memory.z, list) == isinstance(disk.z, list) == (base is pooled)
    assert memory.batch_size == disk.batch_size
    *linear, gated = keras.tree.flatten(disk.z)
    assert isinstance(gated, np.memmap)
    assert not any(isinstance(leaf, np.memmap) for leaf in [*linear, disk.y])
    assert list(tmp_path.iterdir()) == []
    del kept, disk, gated, right
    gc.collect()
    assert not maps_in(tmp_path)


def test_an_error_gives_the_disk_back(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x, y = digits(96)
    y[90] = 12
    files = []
    make = tempfile.TemporaryFile

    def made(**arguments):
        files.append(make(**arguments))
        return files[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", made)
    with pytest.raises(ValueError, match="12"):
        FeaturePass(model_of(mlp()), keep="disk").run(x, y, batch_size=30)
    assert [file.closed for file in files] == [True]
    assert not maps_in(tmp_path)


def test_a_pass_that_kept_nothing_has_no_features():
    x, y = digits(20)
    found = FeaturePass(model_of(mlp()), keep=False).run(x, y)
    with pytest.raises(ValueError, match=r"kept no features.*keep=False over 20"):
        found.feature_set()


@pytest.mark.parametrize("keep", [True, "disk"])
def test_the_rows_of_kept_features_are_a_sample_of_them(monkeypatch, keep):
    monkeypatch.setattr(features, "_SAMPLE_ROWS", 20)
    x, y = digits(96)
    found = FeaturePass(model_of(mlp()), keep=keep).run(x, y, batch_size=30)
    positions = found.positions()
    assert len(positions) == 20
    assert (np.diff(positions) > 0).all()
    assert positions[0] > 0 or positions[-1] < 95 or (np.diff(positions) > 1).any()
    np.testing.assert_array_equal(found.rows(), found.feature_set().z[positions])


def test_sampled_rows_are_those_at_their_positions(monkeypatch):
    """Batches that fill the sample, overfill it, and come when it is full."""
    monkeypatch.setattr(features, "_SAMPLE_ROWS", 40)
    x, y = digits(96)
    model = model_of(mlp())
    whole = FeaturePass(model, keep=True).run(x, y, batch_size=30).feature_set()
    found = FeaturePass(model, keep=False).run(x, y, batch_size=30)
    positions = found.positions()
    assert len(set(positions.tolist())) == 40
    assert positions.max() >= 40
    np.testing.assert_array_equal(found.rows(), whole.z[positions])
    # Fewer rows than there are places are all there, in their order.
    monkeypatch.setattr(features, "_SAMPLE_ROWS", 96)
    found = FeaturePass(model, keep=False).run(x, y, batch_size=30)
    np.testing.assert_array_equal(found.rows(), whole.z)
    np.testing.assert_array_equal(found.positions(), np.arange(96))


@pytest.mark.parametrize("block", [8, 2**20])
def test_moments_far_from_zero(monkeypatch, block):
    """In float64, whatever the blocks, also where the first sample is an outlier."""
    monkeypatch.setattr(features, "_BLOCK_BYTES", block)
    rng = np.random.default_rng(0)
    u = (1e4 + rng.normal(size=(1000, 5))).astype("float32")
    u[0] = [0, 1e4, -1e4, 1e8, 1e4]
    found = FeaturePass(model_of(mlp()), keep=False)
    for start in range(0, 1000, 300):
        found._add(u[start : start + 300], None, None)
    mean, variance = found.moments()
    np.testing.assert_allclose(mean, u.mean(axis=0, dtype="float64"), rtol=1e-13)
    np.testing.assert_allclose(variance, u.var(axis=0, dtype="float64"), rtol=1e-11)


@pytest.mark.parametrize(
    ("wanted", "is_array", "free", "free_disk", "keep"),
    [
        ("auto", True, 1.0, 0.0, True),
        ("auto", True, 1e-9, 1.0, "disk"),
        ("auto", True, 1e-9, 1e-9, False),
        ("auto", True, None, 0.0, True),
        ("auto", False, 1.0, 1.0, False),
        ("auto", False, 1e-9, 1.0, False),
        (True, False, 1.0, 0.0, True),
        (True, False, 1e-9, 1.0, "disk"),
        ("disk", True, 1.0, 1.0, "disk"),
        ("disk", False, None, 1.0, "disk"),
        (False, True, 1.0, 1.0, False),
    ],
)
def test_when_features_are_kept(monkeypatch, wanted, is_array, free, free_disk, keep):
    monkeypatch.setattr(features, "free_gib", lambda: free)
    monkeypatch.setattr(features, "free_disk_gib", lambda: free_disk)
    plan = plan_cache(model_of(mlp()).head, 1000, wanted, is_array)
    assert plan.keep == keep
    assert isinstance(plan.keep, type(keep))
    assert plan.gib == pytest.approx(1000 * 16 * 4 / 2**30)
    assert "cached" in plan.reason
    if keep:
        assert "5.96e-05 GiB" in plan.reason
    if keep == "disk":
        assert tempfile.gettempdir() in plan.reason
    elif is_array and wanted == "auto" and not keep:
        assert "1e-09 GiB of memory and 1e-09 GiB in" in plan.reason


@pytest.mark.parametrize("wanted", [True, "disk"])
def test_features_that_fit_nowhere(monkeypatch, wanted):
    monkeypatch.setattr(features, "free_gib", lambda: 1e-9)
    monkeypatch.setattr(features, "free_disk_gib", lambda: 1e-9)
    with pytest.raises(OSError, match=r"take 5.96e-05 GiB.*free in .*TMPDIR"):
        plan_cache(model_of(mlp()).head, 1000, wanted, True)


def test_the_size_of_a_stream_is_not_known():
    head = model_of(mlp()).head
    for wanted, keep in ((True, True), ("disk", "disk")):
        plan = plan_cache(head, None, wanted, False)
        assert plan.keep == keep
        assert plan.gib is None
        assert "GiB" not in plan.reason


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
