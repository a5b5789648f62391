"""The residual networks against closed forms, published sizes and the papers."""

from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_dalign.models import resnet


def weighted_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the layers that a network's depth counts: no projections."""
    return [
        layer
        for layer in model.layers
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))
        and "shortcut" not in layer.name
    ]


def trainable_parameters(model: keras.Model) -> int:
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def expected_parameters(
    widths: tuple[int, ...],
    blocks: int,
    channels: int,
    classes: int,
    *,
    preactivation: bool,
) -> int:
    """Counts by hand: 3x3 kernels, two numbers per normalised channel."""
    kernels = 9 * channels * widths[0]
    normalised = 0
    before = widths[0]
    for w in widths:
        kernels += 9 * (before * w + (2 * blocks - 1) * w * w)
        if before != w:
            kernels += before * w
        if preactivation:
            normalised += before + (2 * blocks - 1) * w
        else:
            normalised += 2 * blocks * w + (w if before != w else 0)
        before = w
    normalised += widths[-1] if preactivation else widths[0]
    return kernels + 2 * normalised + (widths[-1] + 1) * classes


def predecessor(model: keras.Model, name: str) -> keras.layers.Layer:
    """Returns the layer whose output the named single-input layer takes."""
    tensor = model.get_layer(name).input
    return next(layer for layer in model.layers if layer.output is tensor)


@pytest.fixture
def channels_first() -> Iterator[None]:
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    yield
    keras.config.set_image_data_format(before)


class TestSize:
    @pytest.mark.parametrize("preactivation", [False, True])
    @pytest.mark.parametrize("depth", [8, 14, 20, 32])
    def test_6n_plus_2_by_closed_form(self, depth: int, preactivation: bool) -> None:
        model = resnet(depth, (28, 28, 1), 7, width=5, preactivation=preactivation)
        assert trainable_parameters(model) == expected_parameters(
            (5, 10, 20), (depth - 2) // 6, 1, 7, preactivation=preactivation
        )

    @pytest.mark.parametrize("preactivation", [False, True])
    def test_resnet18_by_closed_form(self, preactivation: bool) -> None:
        model = resnet(18, preactivation=preactivation, width=4)
        assert trainable_parameters(model) == expected_parameters(
            (4, 8, 16, 32), 2, 3, 10, preactivation=preactivation
        )

    # Two projections with their normalisations; the first paper's networks
    # for CIFAR-10 have shortcuts without parameters.
    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)

    @pytest.mark.parametrize(
        ("depth", "millions"),
        [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)],
    )
    def test_published_sizes(self, depth: int, millions: float) -> None:
        # Table 6 of the first paper.
        ours = trainable_parameters(resnet(depth)) - self.projections
        assert round(ours / 1e6, 2) == millions

    def test_known_counts(self) -> None:
        ours = trainable_parameters(resnet(20)) - self.projections
        assert ours == 269_722
        # The usual PyTorch ResNet-18 for CIFAR-10 has as many.
        assert trainable_parameters(resnet(18)) == 11_173_962

    @pytest.mark.parametrize("preactivation", [False, True])
    @pytest.mark.parametrize("depth", [8, 14, 18, 20, 26, 32])
    def test_depth_counts_weighted_layers(
        self, depth: int, preactivation: bool
    ) -> None:
        model = resnet(depth, width=1, preactivation=preactivation)
        assert len(weighted_layers(model)) == depth

    def test_stage_widths(self) -> None:
        kernels = [layer.kernel.shape[-1] for layer in weighted_layers(resnet(8))]
        assert kernels == [16, 16, 16, 32, 32, 64, 64, 10]
        model = resnet(18, width=2)
        assert model.get_layer("features").output.shape == (None, 16)


class TestShape:
    @pytest.mark.parametrize(
        ("shape", "classes"),
        [((32, 32, 3), 100), ((28, 28, 1), 10), ((8, 8, 1), 1), ((1, 5, 2), 3)],
    )
    @pytest.mark.parametrize("depth", [8, 18])
    def test_logits(
        self, depth: int, shape: tuple[int, int, int], classes: int
    ) -> None:
        model = resnet(depth, shape, classes, width=2)
        assert model.output_shape == (None, classes)
        logits = model(np.ones((2, *shape), "float32"))
        assert tuple(logits.shape) == (2, classes)

    def test_resolution_halves_after_the_first_stage(self) -> None:
        model = resnet(18, (32, 32, 3), width=1)
        sizes = [
            model.get_layer(f"stage{s}_block2_add").output.shape[1:]
            for s in (1, 2, 3, 4)
        ]
        assert sizes == [(32, 32, 1), (16, 16, 2), (8, 8, 4), (4, 4, 8)]

    def test_open_height_and_width(self) -> None:
        model = resnet(8, (None, None, 3), 4, width=2)
        assert model.input_shape == (None, None, None, 3)
        for size in (7, 12):
            images = np.ones((2, size, size + 1, 3), "float32")
            assert tuple(model(images).shape) == (2, 4)

    @pytest.mark.usefixtures("channels_first")
    @pytest.mark.parametrize("preactivation", [False, True])
    def test_channels_first(self, preactivation: bool) -> None:
        model = resnet(8, (3, 12, 16), 5, width=4, preactivation=preactivation)
        assert model.get_layer("stage3_block1_add").output.shape == (None, 16, 3, 4)
        assert model.get_layer("features").output.shape == (None, 16)
        assert trainable_parameters(model) == expected_parameters(
            (4, 8, 16), 1, 3, 5, preactivation=preactivation
        )


class TestStructure:
    def test_is_functional_and_ends_in_logits(self) -> None:
        model = resnet(8, width=2)
        assert isinstance(model, keras.Sequential) is False
        last = model.layers[-1]
        assert isinstance(last, keras.layers.Dense)
        assert last.activation is keras.activations.linear
        assert last.input is model.get_layer("features").output

    def test_postactivation_order(self) -> None:
        model = resnet(8, width=2)
        before = {
            "stem_bn": "stem_conv",
            "stem_relu": "stem_bn",
            "stage2_block1_conv1": "stage1_block1_relu",
            "stage2_block1_1_bn": "stage2_block1_conv1",
            "stage2_block1_1_relu": "stage2_block1_1_bn",
            "stage2_block1_conv2": "stage2_block1_1_relu",
            "stage2_block1_2_bn": "stage2_block1_conv2",
            "stage2_block1_relu": "stage2_block1_add",
            "stage2_block1_shortcut_conv": "stage1_block1_relu",
            "stage2_block1_shortcut_bn": "stage2_block1_shortcut_conv",
            "features": "stage3_block1_relu",
        }
        assert {name: predecessor(model, name).name for name in before} == before
        sums = model.get_layer("stage2_block1_add").input
        assert sums[0] is model.get_layer("stage2_block1_2_bn").output
        assert sums[1] is model.get_layer("stage2_block1_shortcut_bn").output

    def test_preactivation_order(self) -> None:
        model = resnet(14, width=2, preactivation=True)
        before = {
            "stage1_block1_1_bn": "stem_conv",
            "stage2_block1_1_bn": "stage1_block2_add",
            "stage2_block1_1_relu": "stage2_block1_1_bn",
            "stage2_block1_shortcut_conv": "stage2_block1_1_relu",
            "stage2_block1_conv1": "stage2_block1_1_relu",
            "stage2_block1_2_bn": "stage2_block1_conv1",
            "stage2_block1_2_relu": "stage2_block1_2_bn",
            "stage2_block1_conv2": "stage2_block1_2_relu",
            "stage2_block2_1_bn": "stage2_block1_add",
            "final_bn": "stage3_block2_add",
            "final_relu": "final_bn",
            "features": "final_relu",
        }
        assert {name: predecessor(model, name).name for name in before} == before

    @pytest.mark.parametrize("preactivation", [False, True])
    def test_identity_shortcut(self, preactivation: bool) -> None:
        model = resnet(14, width=2, preactivation=preactivation)
        entry = "stage1_block1_add" if preactivation else "stage1_block1_relu"
        shortcut = model.get_layer("stage1_block2_add").input[1]
        assert shortcut is model.get_layer(entry).output

    def test_identity_path_carries_the_input(self) -> None:
        # With every second convolution zero, a pre-activation block adds
        # nothing, so a stage's sum is what the stem gave.
        model = resnet(8, (6, 6, 1), width=3, preactivation=True)
        kernel = model.get_layer("stage1_block1_conv2").kernel
        kernel.assign(np.zeros(kernel.shape))
        ends = keras.Model(
            model.inputs,
            [
                model.get_layer("stem_conv").output,
                model.get_layer("stage1_block1_add").output,
            ],
        )
        images = np.random.default_rng(0).normal(size=(2, 6, 6, 1))
        stem, total = ends.predict(images, verbose=0)
        np.testing.assert_array_equal(stem, total)
        assert np.ptp(stem) > 0

    def test_no_convolution_has_a_bias(self) -> None:
        convs = [
            layer
            for layer in resnet(18, width=1).layers
            if isinstance(layer, keras.layers.Conv2D)
        ]
        assert len(convs) == 17 + 3
        assert not any(layer.use_bias for layer in convs)

    def test_he_normal(self) -> None:
        keras.utils.set_random_seed(0)
        kernel = keras.ops.convert_to_numpy(
            resnet(18).get_layer("stage4_block2_conv2").kernel
        )
        assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 512)), rel=0.01)

    def test_names(self) -> None:
        assert resnet(8, width=1).name == "resnet8"
        assert resnet(8, width=1, preactivation=True).name == "resnet8_preactivation"
        assert resnet(8, width=1, name="trunk").name == "trunk"


class TestDtype:
    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
    @pytest.mark.parametrize("preactivation", [False, True])
    def test_mixed_precision(self, policy: str, preactivation: bool) -> None:
        model = resnet(
            8, (8, 8, 1), 3, width=2, dtype=policy, preactivation=preactivation
        )
        conv = model.get_layer("stage1_block1_conv1")
        assert conv.compute_dtype == policy.removeprefix("mixed_")
        assert {v.dtype for v in model.variables} == {"float32"}
        assert model.get_layer("features").output.dtype == "float32"
        logits = model(np.ones((2, 8, 8, 1), "float32"))
        assert keras.backend.standardize_dtype(logits.dtype) == "float32"
        assert np.isfinite(keras.ops.convert_to_numpy(logits)).all()

    def test_mixed_agrees_with_float32(self) -> None:
        full = resnet(8, (8, 8, 1), 3, width=8)
        mixed = resnet(8, (8, 8, 1), 3, width=8, dtype="mixed_bfloat16")
        mixed.set_weights(full.get_weights())
        images = np.random.default_rng(0).normal(size=(4, 8, 8, 1))
        want = full.predict(images, verbose=0)
        got = mixed.predict(images, verbose=0)
        assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()

    def test_default_is_the_global_policy(self) -> None:
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            model = resnet(8, width=1)
        finally:
            keras.config.set_dtype_policy(before)
        assert model.get_layer("stem_conv").compute_dtype == "bfloat16"
        assert model.output.dtype == "float32"

    @pytest.mark.skipif(
        keras.backend.backend() == "jax", reason="JAX has float64 only on request"
    )
    def test_float64(self) -> None:
        model = resnet(8, width=1, dtype="float64")
        assert model.inputs[0].dtype == "float64"
        assert model.output.dtype == "float64"


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_save_and_load(tmp_path: Path, preactivation: bool, dtype: str) -> None:
    model = resnet(8, (8, 8, 1), 3, width=2, preactivation=preactivation, dtype=dtype)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    assert loaded.name == model.name
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 1))
    np.testing.assert_array_equal(
        loaded.predict(images, verbose=0), model.predict(images, verbose=0)
    )


@pytest.mark.parametrize("preactivation", [False, True])
def test_learns(preactivation: bool) -> None:
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, size=64)
    images = rng.normal(size=(64, 8, 8, 1)) + 2.0 * labels[:, None, None, None]
    model = resnet(8, (8, 8, 1), 2, width=4, preactivation=preactivation)
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    history = model.fit(images, labels, epochs=6, batch_size=16, verbose=0)
    assert history.history["loss"][-1] < 0.2 < history.history["loss"][0]


class TestErrors:
    @pytest.mark.parametrize("depth", [0, 2, -4, 9, 10, 19, 34, 8.0, "8", True, None])
    def test_depth(self, depth: object) -> None:
        with pytest.raises(ValueError, match=r"18, or 6 n \+ 2 .*8, 14, 20, 26") as e:
            resnet(depth)
        assert str(e.value).endswith(f"Received: depth={depth!r}")

    @pytest.mark.parametrize(
        "shape",
        [(28, 28), (28, 28, 0), (28, -1, 1), (8, 8, None), (1, 8, 8, 1), 28, "888"],
    )
    def test_input_shape(self, shape: object) -> None:
        with pytest.raises(ValueError, match=r"\(height, width, channels\)") as e:
            resnet(8, shape)
        assert str(e.value).endswith(f"Received: input_shape={shape!r}")

    @pytest.mark.usefixtures("channels_first")
    def test_input_shape_channels_first(self) -> None:
        with pytest.raises(ValueError, match=r"\(channels, height, width\)"):
            resnet(8, (None, 8, 8))

    @pytest.mark.parametrize("value", [0, -1, 2.5, True, "10"])
    def test_counts(self, value: object) -> None:
        with pytest.raises(ValueError, match=r"`classes` must be an integer") as e:
            resnet(8, classes=value)
        assert str(e.value).endswith(f"Received: classes={value!r}")
        with pytest.raises(ValueError, match=r"`width` must be an integer"):
            resnet(8, width=value)

    def test_dtype(self) -> None:
        with pytest.raises(ValueError, match="float7"):
            resnet(8, dtype="float7")

    def test_accepts_numpy_integers(self) -> None:
        shape = tuple(np.array([8, 8, 1]))
        model = resnet(np.int64(8), shape, np.int32(3), width=np.int64(2))
        assert model.output_shape == (None, 3)
