"""Re-estimated statistics against those that NumPy computes of the whole data."""

import math

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_dalign import AlignmentHead, align, reestimate_batch_norm
from keras_dalign.head import batch_norm

BACKEND = keras.backend.backend()
# Keras computes in float64 on TensorFlow alone, whatever a layer's policy.
EXACT, TOLERANCE = ("float64", 1e-12) if BACKEND == "tensorflow" else ("float32", 2e-6)


@pytest.fixture(autouse=True)
def defaults():
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


def data(*shape, seed=0, dtype=EXACT):
    rng = np.random.default_rng(seed)
    # A mean far from 0, and another one for every sample and every channel.
    x = rng.normal(3.0, 2.0, size=shape) * np.arange(1, shape[-1] + 1)
    return (x + np.linspace(-5, 5, shape[0]).reshape(-1, *[1] * (x.ndim - 1))).astype(
        dtype
    )


def numpy(tensor):
    return np.asarray(ops.convert_to_numpy(tensor), dtype="float64")


def statistics(layer):
    return numpy(layer.moving_mean), numpy(layer.moving_variance)


def weights(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.variables]


def assert_population(layer, x, axes=0, tolerance=TOLERANCE):
    """The layer holds the mean and the variance of `x`, as NumPy has them."""
    x = numpy(x)
    mean, variance = statistics(layer)
    scale = np.abs(x).max()
    np.testing.assert_allclose(mean, x.mean(axis=axes), rtol=0, atol=tolerance * scale)
    np.testing.assert_allclose(
        variance, x.var(axis=axes), rtol=0, atol=tolerance * scale**2
    )


def normalisations(model):
    return [
        layer
        for layer in model._flatten_layers()
        if type(layer).__name__.startswith("B")
    ]


def single(shape=(4,), dtype=EXACT, **options):
    inputs = keras.Input(shape, dtype=dtype)
    layer = layers.BatchNormalization(dtype=dtype, **options)
    return keras.Model(inputs, layer(inputs)), layer


def deep(dtype=EXACT):
    """Three normalisations in a row, with dropout in between."""
    inputs = h = keras.Input((4,), dtype=dtype)
    for _ in range(3):
        h = layers.Dense(6, "tanh", dtype=dtype)(h)
        h = layers.BatchNormalization(dtype=dtype, gamma_initializer="normal")(h)
        h = layers.Dropout(0.5, dtype=dtype)(h)
    return keras.Model(inputs, layers.Dense(2, dtype=dtype)(h))


def inputs_of(model, x):
    """What goes into each normalisation of a Functional model, in inference mode."""
    found = normalisations(model)
    probe = keras.Model(model.input, [layer.input for layer in found])
    return dict(zip(map(id, found), probe(x, training=False), strict=True))


class TestOneLayer:
    @pytest.mark.parametrize("batch_size", [1, 7, 1000])
    def test_ragged_batches(self, batch_size):
        model, layer = single()
        x = data(23, 4)
        assert reestimate_batch_norm(model, x, batch_size=batch_size) == 1
        assert_population(layer, x)

    @pytest.mark.parametrize("axis", [-1, 1, 2, 3])
    def test_feature_maps(self, axis):
        model, layer = single((3, 5, 2), axis=axis)
        x = data(11, 3, 5, 2)
        reestimate_batch_norm(model, x, batch_size=4)
        axes = tuple(a for a in range(4) if a != axis % 4)
        assert_population(layer, x, axes)

    @pytest.mark.parametrize("center", [True, False])
    def test_without_scale(self, center):
        model, layer = single(center=center, scale=False)
        x = data(9, 4)
        reestimate_batch_norm(model, x, passes=2)
        assert_population(layer, x)

    @pytest.mark.parametrize(
        ("dtype", "mean"), [("float32", 2.0**14), ("mixed_float16", 2.0**9)]
    )
    def test_a_large_mean_does_not_cancel(self, dtype, mean):
        """E[x^2] - E[x]^2 in float32 would have few digits right, if any."""
        keras.config.set_dtype_policy(dtype)
        model, layer = single((2,), dtype=None)
        x = mean + np.random.default_rng(0).integers(-2, 3, size=(64, 2))
        reestimate_batch_norm(model, x.astype("float32"), batch_size=10)
        assert layer.moving_mean.dtype == "float32"
        np.testing.assert_allclose(statistics(layer)[0], x.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(statistics(layer)[1], x.var(axis=0), rtol=1e-4)

    def test_what_was_there_is_forgotten(self):
        model, layer = single()
        x = data(9, 4)
        results = []
        for value in (0.0, 1e3):
            layer.moving_mean.assign(np.full(4, value))
            layer.moving_variance.assign(np.full(4, value + 1))
            reestimate_batch_norm(model, x, passes=3)
            results.append(statistics(layer))
        np.testing.assert_array_equal(results[0], results[1])

    def test_the_order_of_samples_does_not_matter(self):
        model, layer = single()
        x = data(40, 4)
        for order in (slice(None), slice(None, None, -1)):
            reestimate_batch_norm(model, x[order], batch_size=7)
            assert_population(layer, x)


class TestMasks:
    @staticmethod
    def model():
        inputs = keras.Input((5, 3), dtype=EXACT)
        layer = layers.BatchNormalization(dtype=EXACT)
        h = layer(layers.Masking(-1.0, dtype=EXACT)(inputs))
        return keras.Model(inputs, h), layer

    @staticmethod
    def masked(*rows):
        x = data(12, 5, 3)
        keep = np.random.default_rng(1).random((12, 5)) < 0.6
        keep[list(rows)] = False
        x[~keep] = -1.0
        return x, keep

    def test_masked_steps_do_not_count(self):
        model, layer = self.model()
        x, keep = self.masked()
        reestimate_batch_norm(model, x, batch_size=5)
        assert_population(layer, x[keep])

    def test_batches_without_a_single_step(self):
        model, layer = self.model()
        x, keep = self.masked(0, 1, 4, 5)
        reestimate_batch_norm(model, x, batch_size=2, passes=2)
        assert_population(layer, x[keep])

    def test_nothing_but_masks(self):
        model, _ = self.model()
        before = weights(model)
        with pytest.raises(ValueError, match="masked out throughout"):
            reestimate_batch_norm(model, -np.ones((4, 5, 3), EXACT))
        np.testing.assert_array_equal(weights(model), before)


class TestManyLayers:
    def test_enough_passes_are_self_consistent(self):
        """Every layer holds the population statistics of its input in inference."""
        model = deep()
        x = data(50, 4)
        assert reestimate_batch_norm(model, x, batch_size=8, passes=3) == 3
        for layer, h in zip(
            normalisations(model), inputs_of(model, x).values(), strict=True
        ):
            assert_population(layer, h, tolerance=max(TOLERANCE, 1e-11))
        before = weights(model)
        # A fixed point: one more pass finds the same.
        reestimate_batch_norm(model, x, batch_size=50, passes=4)
        for a, b in zip(weights(model), before, strict=True):
            np.testing.assert_allclose(a, b, rtol=max(1e-9, 10 * TOLERANCE), atol=1e-5)

    def test_pass_by_pass_one_more_layer_is_exact(self):
        x = data(50, 4)
        for passes in (1, 2):
            model = deep()
            reestimate_batch_norm(model, x, batch_size=8, passes=passes)
            exact = []
            for layer, h in zip(
                normalisations(model), inputs_of(model, x).values(), strict=True
            ):
                error = np.abs(statistics(layer)[0] - numpy(h).mean(axis=0)).max()
                exact.append(error < 1e-5)
            assert exact == [True] * passes + [False] * (3 - passes)

    def test_one_pass_is_training_without_dropout(self):
        """With a single batch, what `training=True` would compute."""
        model = deep()
        for layer in model.layers:
            if isinstance(layer, layers.Dropout):
                layer.rate = 0.0
        x = data(20, 4)
        expected = numpy(model(x, training=True))
        reestimate_batch_norm(model, x, batch_size=20)
        np.testing.assert_allclose(
            numpy(model(x, training=False)), expected, rtol=1e-4, atol=1e-4
        )

    def test_only_statistics_change(self):
        model = deep()
        model.compile("adam", "mse")
        x = data(20, 4)
        model.fit(x, x[:, :2], verbose=0)
        optimizer = [
            np.array(ops.convert_to_numpy(v)) for v in model.optimizer.variables
        ]
        # Seed generators are among the variables.
        assert any("seed" in v.path for v in model.variables)
        before = {
            v.path: a for v, a in zip(model.variables, weights(model), strict=True)
        }
        reestimate_batch_norm(model, x, passes=2)
        after = {
            v.path: a for v, a in zip(model.variables, weights(model), strict=True)
        }
        changed = {p for p in before if not np.array_equal(before[p], after[p])}
        assert changed == {p for p in before if "moving" in p}
        for a, b in zip(optimizer, model.optimizer.variables, strict=True):
            np.testing.assert_array_equal(a, ops.convert_to_numpy(b))
        # The model's own compiled functions see the new statistics.
        predicted = model.predict(x, verbose=0)
        np.testing.assert_allclose(predicted, numpy(model(x)), rtol=1e-5, atol=1e-6)
        model.fit(x, x[:, :2], verbose=0)

    def test_a_frozen_layer_is_left_alone(self):
        model = deep()
        first, second, _ = normalisations(model)
        second.moving_mean.assign(np.arange(6.0))
        second.trainable = False
        x = data(20, 4)
        assert reestimate_batch_norm(model, x, passes=2) == 2
        np.testing.assert_array_equal(statistics(second), [np.arange(6.0), np.ones(6)])
        found = inputs_of(model, x)
        assert_population(first, found[id(first)])
        model.trainable = False
        assert reestimate_batch_norm(model, x) == 0

    def test_none(self):
        inputs = keras.Input((4,))
        model = keras.Model(inputs, layers.Dense(2)(inputs))
        before = weights(model)
        assert reestimate_batch_norm(model, data(5, 4)) == 0
        for a, b in zip(weights(model), before, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_nested_models(self):
        def block():
            return keras.Sequential(
                [layers.Dense(4, dtype=EXACT), layers.BatchNormalization(dtype=EXACT)]
            )

        blocks = [block(), keras.Sequential([block(), layers.Activation("tanh")])]
        model = keras.Sequential([keras.Input((4,), dtype=EXACT), *blocks])
        x = data(20, 4)
        assert reestimate_batch_norm(model, x, batch_size=6, passes=2) == 2
        dense, norm = blocks[0].layers
        h = dense(x)
        assert_population(norm, h)
        dense, norm = blocks[1].layers[0].layers
        assert_population(norm, dense(blocks[0](x, training=False)), tolerance=1e-6)

    def test_custom_layers(self):
        class Block(layers.Layer):
            def __init__(self, **options):
                super().__init__(**options)
                self.norms = [layers.BatchNormalization(dtype=EXACT) for _ in range(2)]

            def build(self, shape):
                for norm in self.norms:
                    norm.build(shape)

            def call(self, x, training=None):
                x = self.norms[0](x, training=training)
                return self.norms[1](ops.square(x), training=training)

        class Subclass(keras.Model):
            def __init__(self):
                super().__init__(dtype=EXACT)
                self.block = Block(dtype=EXACT)

            def call(self, x, training=None):
                return self.block(x, training=training)

        model = Subclass()
        x = data(20, 4)
        model(x)
        assert reestimate_batch_norm(model, x, batch_size=6, passes=2) == 2
        first, second = model.block.norms
        assert_population(first, x)
        assert_population(second, np.square(numpy(first(x))), tolerance=1e-5)

    def test_a_layer_that_is_called_twice_has_one_population(self):
        shared = layers.BatchNormalization(dtype=EXACT)
        a, b = keras.Input((5, 3), dtype=EXACT), keras.Input((3,), dtype=EXACT)
        model = keras.Model([a, b], [shared(a[:, 0]), shared(b)])
        x = [data(10, 5, 3), 100 + data(10, 3, seed=1)]
        assert reestimate_batch_norm(model, x, batch_size=4) == 1
        assert_population(shared, np.concatenate([x[0][:, 0], x[1]]))

    def test_a_layer_that_takes_no_part_is_left_alone(self):
        class Auxiliary(keras.Model):
            def __init__(self):
                super().__init__()
                self.used, self.unused = (layers.BatchNormalization() for _ in range(2))

            def build(self, shape):
                self.used.build(shape)
                self.unused.build(shape)

            def call(self, x, training=None):
                return self.unused(x) if training else self.used(x)

        model = Auxiliary()
        x = data(9, 4, dtype="float32")
        model(x)
        before = statistics(model.unused)
        assert reestimate_batch_norm(model, x) == 1
        np.testing.assert_array_equal(statistics(model.unused), before)
        assert_population(model.used, x, tolerance=2e-6)

    @pytest.mark.parametrize("gates", ["random", "learned"])
    def test_aligned_models(self, gates):
        """The head's standardisation counts where it is in use."""
        model = align(deep("float32"), 20, gates=gates)
        model.compile("sgd", "mse")
        x = data(20, 4, dtype="float32")
        assert reestimate_batch_norm(model, x) == 3 + (gates == "learned")
        model.start_exploiting()
        before = weights(model)
        with pytest.raises(ValueError, match=r"set at the switch.*exploiting"):
            reestimate_batch_norm(model, x)
        for a, b in zip(weights(model), before, strict=True):
            np.testing.assert_array_equal(a, b)
        assert reestimate_batch_norm(model.trunk, x) == 3

    def test_a_head_by_itself(self):
        inputs = keras.Input((4,))
        head = AlignmentHead(2, width=3, gates="learned")
        model = keras.Model(inputs, head(inputs))
        x = data(9, 4, dtype="float32")
        assert reestimate_batch_norm(model, x) == 1
        assert_population(head.standardize, x, tolerance=2e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    """Statistics are of what the layer is given, which is half precision."""
    keras.config.set_dtype_policy(policy)
    model = deep(None)
    x = data(40, 4, dtype="float32") / 8
    assert reestimate_batch_norm(model, x, batch_size=8, passes=3) == 3
    for layer, h in zip(
        normalisations(model), inputs_of(model, x).values(), strict=True
    ):
        assert keras.backend.standardize_dtype(h.dtype) == policy.removeprefix("mixed_")
        assert layer.moving_variance.dtype == "float32"
        assert_population(layer, h, tolerance=2e-3)


def test_inputs_that_half_precision_cannot_hold():
    """The model's first layer makes small numbers of them, in float32."""
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((4,))
    h = layers.Rescaling(1e-6, dtype="float32")(inputs)
    layer = layers.BatchNormalization()
    model = keras.Model(inputs, layer(h))
    x = 1e6 * data(9, 4, dtype="float32")
    reestimate_batch_norm(model, x)
    assert_population(layer, 1e-6 * x, tolerance=1e-3)


class Batches(keras.utils.PyDataset):
    def __init__(self, x, with_targets):
        super().__init__()
        self.x, self.with_targets = x, with_targets

    def __len__(self):
        return math.ceil(len(self.x) / 7)

    def __getitem__(self, index):
        x = self.x[7 * index : 7 * index + 7]
        return (x, x[:, 0], x[:, 1]) if self.with_targets else (x,)


class TestData:
    @staticmethod
    def check(x, stream, **options):
        model, layer = single()
        assert reestimate_batch_norm(model, stream, **options) == 1
        assert_population(layer, x)

    @pytest.mark.parametrize("with_targets", [True, False])
    @pytest.mark.parametrize("passes", [1, 2])
    def test_py_dataset(self, passes, with_targets):
        x = data(23, 4)
        self.check(x, Batches(x, with_targets), passes=passes)

    def test_generator(self):
        x = data(24, 4)

        def endless():
            while True:
                for start in range(0, 24, 6):
                    yield x[start : start + 6], None

        self.check(x, endless(), steps=4, passes=3)

    def test_a_generator_needs_steps(self):
        model, _ = single()
        with pytest.raises(ValueError, match="pass `steps`"):
            reestimate_batch_norm(model, iter([data(4, 4)]))

    def test_tensors(self):
        x = data(23, 4)
        self.check(x, ops.convert_to_tensor(x), batch_size=7)

    def test_tf_data(self):
        tf = pytest.importorskip("tensorflow")
        if BACKEND != "tensorflow":
            pytest.skip("Reading tf.data elsewhere is tested with `data`.")
        x = data(23, 4)
        dataset = tf.data.Dataset.from_tensor_slices((x, x[:, 0])).batch(7)
        self.check(x, dataset, passes=2)
        self.check(x[:14], dataset.repeat(), steps=2)

    def test_data_loader(self):
        if BACKEND != "torch":
            pytest.skip("The DataLoader comes with PyTorch.")
        import torch

        x = data(23, 4)
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(x[:, 0])), 7
        )
        self.check(x, loader, passes=2)

    def test_dicts(self):
        a, b = (keras.Input((4,), dtype=EXACT, name=name) for name in "ab")
        layer = layers.BatchNormalization(dtype=EXACT)
        model = keras.Model({"a": a, "b": b}, layer(a - b))
        x = {"a": data(9, 4), "b": data(9, 4, seed=1)}
        reestimate_batch_norm(model, x, batch_size=4)
        assert_population(layer, x["a"] - x["b"])


class TestErrors:
    @pytest.mark.parametrize("passes", [0, -1, 1.0, True, None, "2"])
    def test_passes(self, passes):
        model, _ = single()
        with pytest.raises(ValueError, match=f"`passes` must be.*passes={passes!r}"):
            reestimate_batch_norm(model, data(4, 4), passes=passes)

    def test_passes_of_numpy(self):
        model, _ = single()
        assert reestimate_batch_norm(model, data(4, 4), passes=np.int64(1)) == 1

    @pytest.mark.parametrize(("row", "bad"), [(0, np.inf), (19, np.nan), (19, -np.inf)])
    def test_non_finite_inputs(self, row, bad):
        model = deep()
        x = data(20, 4)
        reestimate_batch_norm(model, x)
        before = weights(model)
        x[row, 1] = bad
        # A tanh would hide an infinity: the first layer must see it.
        model.layers[1].activation = keras.activations.linear
        with pytest.raises(ValueError, match=r"non-finite.*left as it was"):
            reestimate_batch_norm(model, x, batch_size=8)
        self.assert_untouched(model, before)

    @staticmethod
    def assert_untouched(model, before):
        for a, b in zip(weights(model), before, strict=True):
            np.testing.assert_array_equal(a, b)
        for layer in model._flatten_layers():
            assert "call" not in vars(layer)

    def test_an_error_in_the_second_pass_undoes_the_first(self):
        model, _ = single()
        before = weights(model)
        x = data(8, 4)
        with pytest.raises(ValueError, match="empty"):
            reestimate_batch_norm(model, iter([x[:4], x[4:]]), steps=2, passes=2)
        self.assert_untouched(model, before)

    def test_an_interrupt_undoes_the_first_pass(self):
        model, _ = single()
        before = weights(model)
        x = data(8, 4)

        def interrupted():
            yield x
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            reestimate_batch_norm(model, interrupted(), steps=1, passes=2)
        self.assert_untouched(model, before)

    @pytest.mark.parametrize("empty", [np.zeros((0, 4), EXACT), iter([])])
    def test_no_data(self, empty):
        model, _ = single()
        before = weights(model)
        with pytest.raises(ValueError, match="empty"):
            reestimate_batch_norm(model, empty, steps=1)
        self.assert_untouched(model, before)

    def test_calls_are_restored_when_the_model_fails(self):
        class Failing(layers.Layer):
            fails = False

            def call(self, x):
                if self.fails:
                    raise RuntimeError("in the middle")
                return x

        inputs = keras.Input((4,))
        failing = Failing()
        h = layers.BatchNormalization()(inputs)
        model = keras.Model(inputs, layers.BatchNormalization()(failing(h)))
        before = weights(model)
        x = data(6, 4, dtype="float32")
        failing.fails = True
        with pytest.raises(RuntimeError, match="in the middle"):
            reestimate_batch_norm(model, x)
        self.assert_untouched(model, before)
        failing.fails = False
        assert reestimate_batch_norm(model, x) == 2

    def test_calls_are_restored_after_success(self):
        model = deep()
        x = data(6, 4)
        reestimate_batch_norm(model, x)
        for layer in model._flatten_layers():
            assert "call" not in vars(layer)
        # And do what they did: training moves the statistics again.
        before = statistics(normalisations(model)[0])
        model(2 * x, training=True)
        assert not np.array_equal(statistics(normalisations(model)[0]), before)

    def test_unbuilt(self):
        model = keras.Sequential(
            [layers.Dense(3), layers.BatchNormalization(name="bn")]
        )
        with pytest.raises(ValueError, match=r"not built.*unbuilt layer 'bn'"):
            reestimate_batch_norm(model, data(4, 4))

    def test_a_subclass_with_a_constructor_of_its_own(self):
        class Slow(layers.BatchNormalization):
            def __init__(self, decay, **options):
                super().__init__(momentum=decay, **options)

        model = keras.Sequential([keras.Input((4,)), Slow(0.9)])
        x = data(8, 4, dtype="float32")
        assert reestimate_batch_norm(model, x) == 1
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(model.layers[0].moving_mean),
            x.mean(axis=0),
            atol=1e-6,
        )

    def test_a_subclass_with_a_call_of_its_own(self):
        class Scaled(layers.BatchNormalization):
            def call(self, inputs, scale=1.0, training=None):
                return scale * super().call(inputs, training=training)

        model = keras.Sequential([keras.Input((4,)), Scaled(name="bn")])
        before = weights(model)
        with pytest.raises(
            ValueError, match=r"'bn' of type Scaled.*overrides `call`.*trainable=False"
        ):
            reestimate_batch_norm(model, data(8, 4))
        self.assert_untouched(model, before)
        model.layers[0].trainable = False
        assert reestimate_batch_norm(model, data(8, 4)) == 0

    def test_no_model(self):
        with pytest.raises(ValueError, match=r"must be a keras.Model.*BatchNorm"):
            reestimate_batch_norm(layers.BatchNormalization(), data(4, 4))

    def test_renormalisation(self):
        model, layer = single(renorm=True)
        with pytest.raises(ValueError, match=rf"renormalisation.*{layer.name}"):
            reestimate_batch_norm(model, data(4, 4))

    def test_a_subclass_that_computes_something_else(self):
        class Activated(layers.BatchNormalization):
            def call(self, inputs, training=None, mask=None):
                return ops.relu(super().call(inputs, training=training, mask=mask))

        inputs = keras.Input((4,))
        layer = Activated(name="activated")
        model = keras.Model(inputs, layer(inputs))
        with pytest.raises(ValueError, match=r"'activated' of type Activated, which"):
            reestimate_batch_norm(model, data(4, 4, dtype="float32"))
        layer.trainable = False
        assert reestimate_batch_norm(model, data(4, 4, dtype="float32")) == 0


def test_remat():
    """Under JAX's `checkpoint` no value may leave a layer, statistics included."""
    if BACKEND == "tensorflow":
        pytest.skip("Keras cannot rematerialise layers with keywords on TensorFlow.")
    inputs = keras.Input((4,))
    with keras.RematScope(mode="full"):
        h = layers.BatchNormalization()(layers.Dense(3)(inputs))
    model = keras.Model(inputs, h)
    modes = [layer._remat_mode for layer in model.layers]
    assert any(mode is not None for mode in modes)
    x = data(9, 4, dtype="float32")
    assert reestimate_batch_norm(model, x) == 1
    assert_population(model.layers[-1], model.layers[1](x), tolerance=2e-6)
    assert [layer._remat_mode for layer in model.layers] == modes


def test_batch_norm_layers_are_listed_once():
    shared = layers.BatchNormalization()
    inputs = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), shared])
    model = keras.Model(inputs, shared(inner(inputs)))
    assert batch_norm.batch_norm_layers(model) == [shared]
