"""A convolution with kernels of size 1 as a Dense: the same numbers, bit for bit."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_dalign as kd
from keras_dalign.head.pointwise_dense import PointwiseDense, is_pointwise

BACKEND = keras.backend.backend()
Z = np.random.default_rng(0).normal(size=(9, 5)).astype("float32")


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


class Scaled(layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, 2.0 * kernel)


def convolution(rank=2, filters=3, **options):
    options = {"bias_initializer": "normal", **options}
    return getattr(layers, f"Conv{rank}D")(filters, 1, **options)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_it_computes_what_the_convolution_and_what_a_dense_computes(
    rank, use_bias, data_format
):
    if data_format == "channels_first" and BACKEND == "tensorflow":
        pytest.skip("TensorFlow has no such convolutions on a CPU.")
    layer = convolution(rank, use_bias=use_bias, data_format=data_format)
    dense = PointwiseDense(layer)
    outputs = numpy(dense(Z))
    ones = (1,) * rank
    shape = (5, *ones) if data_format == "channels_first" else (*ones, 5)
    expected = numpy(layer(Z.reshape(-1, *shape))).reshape(-1, 3)
    np.testing.assert_array_equal(outputs, expected)
    assert dense.units == 3
    assert dense.kernel.shape == (5, 3)
    exact = Z.astype("float64") @ numpy(dense.kernel).astype("float64")
    if use_bias:
        exact += numpy(dense.bias)
    else:
        assert dense.bias is None
    np.testing.assert_allclose(outputs, exact, rtol=1e-5, atol=1e-6)
    assert dense.use_bias == use_bias


def test_what_the_convolution_overrides_is_kept():
    layer = Scaled(3, 1)
    outputs = numpy(PointwiseDense(layer)(Z))
    expected = numpy(layer(Z.reshape(-1, 1, 1, 5))).reshape(-1, 3)
    np.testing.assert_array_equal(outputs, expected)


def test_its_weights_are_the_convolutions():
    layer = convolution(activation="softmax", dtype="mixed_bfloat16")
    layer.build((None, 1, 1, 5))
    dense = PointwiseDense(layer)
    spec = dense(keras.Input((5,)))
    assert (spec.shape, spec.dtype) == ((None, 3), "bfloat16")
    assert [id(v) for v in dense.trainable_variables] == [
        id(v) for v in layer.variables
    ]
    layer.trainable = False
    assert dense.trainable_variables == []


def test_config():
    dense = PointwiseDense(convolution(), name="logits", dtype="float64")
    dense.build((None, 5))
    config = keras.saving.serialize_keras_object(dense)
    twin = keras.saving.deserialize_keras_object(config)
    assert twin.get_config() == dense.get_config()
    assert twin.convolution is not dense.convolution
    assert [v.shape for v in twin.weights] == [v.shape for v in dense.weights]


@pytest.mark.parametrize(
    "layer",
    [
        None,
        layers.Dense(3),
        layers.Conv2D(3, 2),
        layers.Conv2D(3, (1, 2)),
        layers.Conv2D(4, 1, groups=2),
        layers.Conv1D(4, 1, padding="causal"),
        layers.DepthwiseConv2D(1),
        layers.SeparableConv2D(3, 1),
        layers.Conv2DTranspose(3, 1),
    ],
)
def test_what_is_not_pointwise(layer):
    assert not is_pointwise(layer)
    with pytest.raises(ValueError, match=r"one group.*size 1.*Received: convolution="):
        PointwiseDense(layer)


def test_as_the_linear_part_of_a_head():
    layer = convolution()
    head = kd.AlignmentHead(3, n_samples=9, dense=PointwiseDense(layer))
    expected = numpy(layer(Z.reshape(-1, 1, 1, 5))).reshape(-1, 3)
    np.testing.assert_array_equal(numpy(head(Z)), expected)
    assert [id(v) for v in head.explored_variables] == [id(v) for v in layer.variables]
    with pytest.raises(ValueError, match=r"as many units.*units=4, dense.units=3"):
        kd.AlignmentHead(4, n_samples=9, dense=PointwiseDense(layer))
