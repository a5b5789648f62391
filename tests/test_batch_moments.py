import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_dalign.head import batch_moments
from keras_dalign.head.batch_moments import moments_and_normalized

BACKEND = keras.backend.backend()
DTYPES = ["float32", "float64"] if BACKEND == "tensorflow" else ["float32"]


def made(shape, axis=-1, dtype="float32", **options):
    keras.utils.set_random_seed(0)
    layer = layers.BatchNormalization(
        axis=axis,
        gamma_initializer="random_normal",
        beta_initializer="random_normal",
        dtype=dtype,
        **options,
    )
    layer.build((None, *shape[1:]))
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.1, 10, size=(1, *shape[1:]))
    return layer, (rng.normal(3, 2, size=shape) * scale).astype(dtype)


def reference(layer, x, keep=None):
    """In float64, from the definition."""
    x = np.moveaxis(np.asarray(x, "float64"), layer.axis, -1)
    values = x.reshape(-1, x.shape[-1]) if keep is None else x[keep]
    mean, variance = values.mean(axis=0), values.var(axis=0)
    normalized = (x - mean) / np.sqrt(variance + layer.epsilon)
    if layer.scale:
        normalized = normalized * np.array(layer.gamma, "float64")
    if layer.center:
        normalized = normalized + np.array(layer.beta, "float64")
    return len(values), mean, variance, np.moveaxis(normalized, -1, layer.axis)


def assert_reference(layer, x, keep=None, tolerance=None):
    tolerance = tolerance or (1e-5 if x.dtype == "float32" else 1e-12)
    mask = None if keep is None else ops.convert_to_tensor(keep)
    moments, normalized = moments_and_normalized(layer, ops.convert_to_tensor(x), mask)
    count, mean, variance = (ops.convert_to_numpy(moment) for moment in moments)
    expected = reference(layer, x, keep)
    assert count == expected[0]
    np.testing.assert_allclose(mean, expected[1], rtol=tolerance)
    np.testing.assert_allclose(variance, expected[2], rtol=tolerance, atol=1e-30)
    normalized = ops.convert_to_numpy(normalized)
    assert normalized.dtype == x.dtype
    np.testing.assert_allclose(normalized, expected[3], rtol=1e-3, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(20, 4), (1, 4), (2, 3), (9, 5, 4), (8, 6, 7, 3), (1, 1, 1, 3), (4, *[3] * 4)],
)
def test_channels_last(shape, dtype):
    assert_reference(*made(shape, dtype=dtype))


@pytest.mark.parametrize("axis", [1, 2])
def test_other_axes(axis):
    assert_reference(*made((8, 6, 7, 3), axis))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_without_scale_or_offset(scale, center):
    assert_reference(*made((8, 6, 7, 3), scale=scale, center=center))


@pytest.mark.parametrize("epsilon", [1e-3, 1e-6])
def test_epsilon(epsilon):
    layer, x = made((50, 3), epsilon=epsilon)
    assert_reference(layer, 1e-2 * x)


@pytest.mark.parametrize("mean", [1e2, 1e3])
def test_a_large_mean_does_not_cancel(mean):
    """Nor do sums of many numbers, a hundred thousand for each channel."""
    layer, _ = made((1, 3))
    x = np.random.default_rng(0).normal(size=(100, 32, 32, 3)) + mean
    assert_reference(layer, x.astype("float32"), tolerance=1e-4)


def test_masks():
    layer, x = made((12, 5, 3))
    assert_reference(layer, x, np.random.default_rng(1).random((12, 5)) < 0.6)


def test_the_formula_is_for_where_there_is_no_kernel(monkeypatch):
    layer, x = made((8, 6, 7, 3))
    used = []
    mean = ops.mean
    monkeypatch.setattr(ops, "mean", lambda *a, **k: used.append(1) or mean(*a, **k))
    moments_and_normalized(layer, ops.convert_to_tensor(x), None)
    assert bool(used) == (BACKEND == "jax")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's devices.")
def test_on_accelerators_xla_compiles_the_formula(monkeypatch):
    import tensorflow as tf

    devices = tf.config.list_logical_devices()
    assert batch_moments.has_tensorflow_kernel()
    gpu = tf.config.LogicalDevice("/device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda: [*devices, gpu])
    assert not batch_moments.has_tensorflow_kernel()
    layer, x = made((8, 6, 7, 3))
    assert batch_moments._kernel(layer, ops.convert_to_tensor(x), None) is None
    assert_reference(layer, x)
