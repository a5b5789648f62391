"""`align` on every kind of model that it takes, and its errors for the others."""

import random
import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_dalign as kd
from keras_dalign.diagnostics.precision import float64_context, in_float64
from keras_dalign.numerics.keras_losses import convex_loss

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(11, 6)).astype("float32")
N = 30


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def tail(outputs=4, **options):
    return layers.Dense(outputs, bias_initializer="normal", name="logits", **options)


def mlp(*behind, name="base", **options):
    """Input, hidden layer, `logits`, and what is put behind."""
    inputs = h = keras.Input((6,))
    h = layers.Dense(5, "relu", name="hidden")(h)
    h = tail(**options)(h)
    for layer in behind:
        h = layer(h)
    return keras.Model(inputs, h, name=name)


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


def predict(model, x):
    if not model.compiled:
        model.compile()
    return model.predict(x, verbose=0)


def assert_same(aligned, base, x=X):
    """Bit for bit, compiled and, where that is not slower, eagerly."""
    if BACKEND != "jax":
        eager = numpy(aligned(x, training=False))
        np.testing.assert_array_equal(eager, numpy(base(x, training=False)))
    np.testing.assert_array_equal(predict(aligned, x), predict(base, x))


def ids(variables):
    return {id(v) for v in variables}


def check(base, x=X, n_samples=N, **options):
    """Aligns, and checks what holds for every kind of model."""
    aligned = kd.align(base, n_samples, **options)
    assert isinstance(aligned, kd.AlignedModel)
    assert aligned.phase == "exploring"
    assert aligned.name == base.name
    assert_same(aligned, base, x)
    assert ids(aligned.trainable_variables) == ids(base.trainable_variables)
    return aligned


class TestKindsOfModels:
    def test_functional(self):
        base = mlp()
        aligned = check(base)
        assert aligned.head.dense is base.get_layer("logits")
        assert aligned.trunk.output_shape == (None, 5)
        assert aligned.head.width is None
        assert aligned.head.default_width() == 2 * N // 6

    def test_skip_connections(self):
        inputs = keras.Input((6,))
        h = layers.Dense(6, "relu")(inputs)
        h = layers.BatchNormalization()(layers.Add()([h, inputs])) + inputs * 0.5
        h = layers.Concatenate()([h, inputs, layers.Dropout(0.5)(h)])
        check(keras.Model(inputs, tail()(h)))

    @pytest.mark.parametrize("kind", [dict, list, tuple])
    def test_many_inputs(self, kind):
        a, b = keras.Input((6,), name="a"), keras.Input((2, 3), name="b")
        h = layers.Concatenate()([a, layers.Flatten()(b)])
        h = tail()(layers.Dense(5, "tanh")(h))
        data = (X, X.reshape(-1, 2, 3)[::-1])
        if kind is dict:
            names = dict(zip("ab", (a, b), strict=True))
            check(keras.Model(names, h), dict(zip("ab", data, strict=True)))
        else:
            check(keras.Model(kind([a, b]), h), kind(data))

    @pytest.mark.parametrize("how", ["input", "build", "call"])
    def test_sequential(self, how):
        first = [keras.Input((6,))] if how == "input" else []
        base = keras.Sequential([*first, layers.Dense(5, "relu"), tail()])
        if how == "build":
            base.build((None, 6))
        if how == "call":
            base(X[:3])
        check(base)

    def test_a_linear_model(self):
        """The trunk computes nothing at all."""
        aligned = check(keras.Sequential([keras.Input((6,)), tail()]))
        aligned.compile(kd.DAlign(keras.optimizers.Adam(), None, explore=1), "mse")
        aligned.fit(X, X[:, :4], epochs=2, verbose=0)
        assert aligned.phase == "exploiting"

    def test_nested_model_that_ends_in_dense(self):
        inner = mlp()
        inputs = keras.Input((2, 3))
        h = inner(layers.Reshape((6,))(inputs))
        aligned = check(keras.Model(inputs, h), X.reshape(-1, 2, 3))
        assert aligned.head.dense is inner.get_layer("logits")

    def test_nested_twice(self):
        first, last = mlp(outputs=6, name="first"), mlp(name="last")
        inner = keras.Sequential([layers.Dense(6), last])
        aligned = check(keras.Sequential([keras.Input((6,)), first, inner]))
        assert aligned.head.dense is last.get_layer("logits")

    @pytest.mark.parametrize("index", [0, 1])
    @pytest.mark.parametrize("as_dict", [True, False])
    def test_nested_model_with_several_outputs(self, as_dict, index):
        """The outer model takes one of them: that one is the output."""
        inputs = keras.Input((6,))
        both = [tail(4)(inputs), layers.Dense(2, name="b")(inputs)]
        outputs = dict(zip("ab", both, strict=True)) if as_dict else both
        inner = keras.Model(inputs, outputs)
        outer = keras.Input((6,))
        h = inner(layers.Dense(6)(outer))["ab"[index] if as_dict else index]
        base = keras.Model(outer, h)
        aligned = kd.align(base, N)
        assert_same(aligned, base)
        assert aligned.head.units == (4, 2)[index]

    def test_backbone_and_dense(self):
        inputs = keras.Input((4, 4, 3))
        h = layers.BatchNormalization()(layers.Conv2D(5, 3, padding="same")(inputs))
        backbone = keras.Model(inputs, layers.GlobalAveragePooling2D()(h))
        base = keras.Sequential([keras.Input((4, 4, 3)), backbone, tail()])
        aligned = check(base, np.random.default_rng(1).random((7, 4, 4, 3), "float32"))
        assert backbone in aligned.trunk.layers

    def test_a_dense_that_is_called_twice(self):
        inputs = keras.Input((6,))
        shared = tail(6)
        base = keras.Model(inputs, shared(ops.relu(shared(inputs))))
        for options in ({}, {"layer": "logits"}):
            aligned = check(base, **options)
            assert any(layer is shared for layer in aligned.trunk.layers)
            assert aligned.head.dense is shared

    def test_a_dense_that_other_models_call_as_well(self):
        """The last call overall, and the first one, are those of other models."""
        shared = tail(6)
        first, inputs, last = (keras.Input((6,)) for _ in range(3))
        shared(first)
        base = keras.Model(inputs, shared(layers.Dense(6, "relu")(inputs)))
        shared(last)
        for options in ({}, {"layer": shared}):
            check(base, **options)


class TestSubclasses:
    class Traceable(keras.Model):
        def __init__(self):
            super().__init__(name="mine")
            self.hidden = layers.Dense(5)
            self.norm = layers.BatchNormalization()
            self.drop = layers.Dropout(0.5)
            self.top = tail()

        def call(self, x, training=None):
            h = ops.relu(self.norm(self.hidden(x), training=training))
            return self.top(self.drop(h, training=training))

    class WithoutTraining(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden, self.top = layers.Dense(5), tail()

        def call(self, x):
            return self.top(ops.tanh(self.hidden(x)))

    class TwoPaths(WithoutTraining):
        def call(self, x, training=None):
            if training:
                x = ops.flip(x, axis=1)
            return super().call(x)

    class FunctionalWithItsOwnCall(keras.Model):
        def call(self, inputs, training=None, mask=None):
            return super().call(2.0 * inputs, training=training, mask=mask)

    @pytest.mark.parametrize("kind", [Traceable, WithoutTraining])
    def test_traceable(self, kind):
        base = kind()
        base(X)
        aligned = check(base)
        assert aligned.head.dense is base.top

    def test_the_trace_trains_as_the_model_does(self):
        results = []
        for align in (False, True):
            keras.utils.set_random_seed(1)
            base = self.Traceable()
            base(X)
            model = kd.align(base, N) if align else base
            model.compile(keras.optimizers.Adam(), "mse")
            model.fit(X, X[:, :4], epochs=2, batch_size=4, verbose=0)
            results.append([np.array(w) for w in base.get_weights()])
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_nested_and_traceable(self):
        inner = self.Traceable()
        inputs = keras.Input((6,))
        check(keras.Model(inputs, inner(inputs)))

    def test_functional_with_its_own_call(self):
        inputs = keras.Input((6,))
        base = self.FunctionalWithItsOwnCall(inputs, tail()(inputs))
        assert_same(kd.align(base, N), base)

    def test_untraceable(self):
        class Broken(self.WithoutTraining):
            def call(self, x):
                if isinstance(x, keras.KerasTensor):
                    raise TypeError("needs numbers")
                return super().call(x)

        base = Broken()
        base(X)
        with pytest.raises(
            ValueError, match=r"cannot be traced.*Broken.*needs numbers.*AlignedModel\("
        ):
            kd.align(base, N)

    def test_nested_and_untraceable(self):
        class Broken(self.WithoutTraining):
            def call(self, x):
                if self.built:
                    raise TypeError("needs numbers")
                return super().call(x)

            def compute_output_shape(self, shape):
                return (shape[0], 4)

            def build(self, shape):
                self.hidden.build(shape)
                self.top.build((None, 5))

            def compute_output_spec(self, x):
                return keras.KerasTensor((x.shape[0], 4))

        inputs = keras.Input((6,))
        base = keras.Model(inputs, Broken()(inputs))
        with pytest.raises(ValueError, match=r"cannot be traced.*AlignedModel\("):
            kd.align(base, N)

    def test_paths_of_training_alone_would_be_lost(self):
        base = self.TwoPaths()
        base(X)
        with pytest.raises(ValueError, match=r"other operations in training.*TwoPaths"):
            kd.align(base, N)

    def test_unbuilt(self):
        with pytest.raises(ValueError, match=r"not built.*'mine'. Call it"):
            kd.align(self.Traceable(), N)

    def test_many_inputs(self):
        class Two(keras.Model):
            def __init__(self):
                super().__init__()
                self.top = tail()

            def call(self, inputs):
                return self.top(inputs[0] + inputs[1])

        base = Two()
        base([X, X])
        with pytest.raises(ValueError, match=r"input shape.*unknown.*AlignedModel\("):
            kd.align(base, N)


def image_model(name):
    options = {
        "weights": None,
        "classes": 5,
        "input_shape": (32, 32, 3),
        "classifier_activation": None,
    }
    if name == "MobileNetV2":
        options["alpha"] = 0.35
    return getattr(keras.applications, name)(**options)


@pytest.mark.parametrize("name", ["MobileNetV2", "MobileNetV3Small", "EfficientNetB0"])
def test_keras_applications(name):
    if BACKEND != "tensorflow" and name == "EfficientNetB0":
        pytest.skip("Graphs are the same on every backend: the large ones run on one.")
    base = image_model(name)
    aligned = kd.align(base, 100)
    if name == "MobileNetV3Small":
        last = aligned.head.dense.convolution
        assert last is base.get_layer("logits")
    else:
        last = aligned.head.dense
        assert last is base.layers[-1]
    assert aligned.trunk.output_shape == (None, last.input.shape[-1])
    assert ids(aligned.trainable_variables) == ids(base.trainable_variables)
    if BACKEND == "jax":
        return  # Compiling it twice would take longer than all other tests here.
    x = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    aligned.compile()
    np.testing.assert_array_equal(aligned.predict_on_batch(x), base.predict_on_batch(x))


def pointwise_tail(*behind, map_layers=(), rank=2, name="base", **options):
    """A pooled map of one place, a convolution as output layer, and what is behind."""
    pooling = getattr(layers, f"GlobalAveragePooling{rank}D")
    convolution = getattr(layers, f"Conv{rank}D")
    options = {"bias_initializer": "normal", "name": "logits", **options}
    data_format = options.get("data_format")
    sides = (4, 3, 2)[:rank]
    shape = (3, *sides) if data_format == "channels_first" else (*sides, 3)
    inputs = h = keras.Input(shape)
    for layer in map_layers:
        h = layer(h)
    h = pooling(keepdims=True, data_format=data_format)(h)
    h = convolution(options.pop("outputs", 4), 1, **options)(h)
    for layer in behind:
        h = layer(h)
    return keras.Model(inputs, h, name=name)


MAPS = np.random.default_rng(1).normal(size=(11, 4, 3, 3)).astype("float32")


class TestConvolutions:
    """A convolution on a map of one place is a Dense."""

    @pytest.mark.parametrize(
        "behind",
        [
            [layers.Flatten],
            [lambda: layers.Reshape((4,))],
            [layers.GlobalAveragePooling2D],
            [layers.GlobalMaxPooling2D],
            [lambda: layers.Activation("linear"), layers.Flatten],
            [lambda: layers.Reshape((2, 2)), layers.Identity, layers.Flatten],
        ],
    )
    def test_whatever_flattens(self, behind):
        base = pointwise_tail(*(make() for make in behind))
        aligned = check(base, MAPS)
        assert aligned.head.dense.convolution is base.get_layer("logits")
        assert aligned.trunk.outputs[0].shape == (None, 3)

    @pytest.mark.parametrize("rank", [1, 3])
    def test_other_ranks(self, rank):
        shape = (11, *(4, 3, 2)[:rank], 3)
        x = np.random.default_rng(1).normal(size=shape).astype("float32")
        check(pointwise_tail(layers.Flatten(), rank=rank), x)

    def test_channels_first(self):
        base = pointwise_tail(layers.Flatten(), data_format="channels_first")
        aligned = kd.align(base, N)
        assert aligned.trunk.outputs[0].shape == (None, 3)
        if BACKEND != "tensorflow":  # Its convolutions have them last on a CPU.
            assert_same(aligned, base, MAPS.transpose(0, 3, 1, 2))

    @pytest.mark.parametrize("strides", [1, 2])
    @pytest.mark.parametrize("padding", ["same", "valid"])
    def test_strides_and_no_bias(self, strides, padding):
        options = {"strides": strides, "padding": padding, "use_bias": False}
        check(pointwise_tail(layers.Flatten(), **options), MAPS)

    def test_lora(self):
        base = pointwise_tail(layers.Flatten())
        convolution = base.get_layer("logits")
        convolution.enable_lora(2)
        convolution.lora_kernel_b.assign(np.ones(convolution.lora_kernel_b.shape))
        check(base, MAPS)

    @pytest.mark.parametrize("how", ["argument", "map", "vector"])
    def test_probabilities_are_dropped(self, how):
        softmax = {"map": [layers.Softmax()], "vector": [layers.Flatten()]}
        behind = [*softmax.get(how, []), layers.Flatten(), layers.Identity()]
        if how == "vector":
            behind[1] = layers.Activation("softmax")
        activation = "softmax" if how == "argument" else None
        base = pointwise_tail(*behind, activation=activation)
        base.compile("sgd", "sparse_categorical_crossentropy")
        with pytest.warns(UserWarning, match=r"trailing softmax.*from_logits=True"):
            aligned = kd.align(base, N)
        np.testing.assert_allclose(
            numpy(ops.softmax(aligned(MAPS))), numpy(base(MAPS)), atol=1e-6
        )
        assert convex_loss(aligned.inherited_loss) == convex_loss(SPARSE(True))

    def test_a_softmax_over_something_else_stays(self):
        """Channels first, it is a softmax over the single column."""
        options = {"data_format": "channels_first"}
        with pytest.raises(ValueError, match=r"'logits' with activation=softmax"):
            kd.align(
                pointwise_tail(layers.Flatten(), activation="softmax", **options), N
            )
        base = pointwise_tail(layers.Softmax(), layers.Flatten(), **options)
        with pytest.raises(ValueError, match=r"does not end in.*\(Softmax\)"):
            kd.align(base, N)

    def test_by_name(self):
        base = pointwise_tail(layers.Flatten(), ops.tanh)
        with pytest.warns(UserWarning, match="behind.*'logits' is dropped"):
            aligned = kd.align(base, N, layer="logits")
        flat = layers.Flatten()(base.get_layer("logits").output)
        assert_same(aligned, keras.Model(base.input, flat), MAPS)

    def test_learned_gates_and_an_activity_regularizer(self):
        base = pointwise_tail(layers.Flatten(), activity_regularizer="l2")
        aligned = kd.align(base, N, gates="learned")
        assert aligned.head.dense is None
        aligned = check(base, MAPS)
        losses = []
        for model in (aligned, base):
            model(MAPS)
            losses.append([float(numpy(loss)) for loss in model.losses])
        assert losses[0] == losses[1]
        assert len(losses[0]) == 1

    def test_the_pooled_map_is_seen_in_a_grid(self):
        base = pointwise_tail(
            layers.Flatten(), map_layers=[layers.Conv2D(5, 2, padding="same")]
        )
        aligned = check(base, MAPS, n_samples=3 * 5 * 12)
        assert aligned.trunk.output_shape == [(None, 5), (None, 4, 3, 5)]

    def test_layers_that_are_named_as_ours(self):
        named = [layers.ReLU(name=f"{kind}_features") for kind in ("logits", "gated")]
        base = pointwise_tail(layers.Flatten(), map_layers=named)
        check(base, MAPS)
        learned = kd.align(base, N, gates="learned", features="gated_features")
        assert learned.trunk.output_shape == (None, 4 * 3 * 3)

    @pytest.mark.parametrize("copy", [False, True])
    def test_training_is_the_base_models_bit_for_bit(self, copy, tmp_path):
        """Saved and loaded in the middle, too; then it switches and exploits."""
        y = np.arange(len(MAPS)) % 4
        loss = SPARSE(from_logits=True)

        def made():
            keras.utils.set_random_seed(3)
            norm = layers.BatchNormalization()
            map_layers = [layers.Conv2D(7, 2), norm, layers.Dropout(0.3)]
            return pointwise_tail(layers.Flatten(), map_layers=map_layers)

        def trained(model):
            model.compile("adam", loss)
            keras.utils.set_random_seed(4)
            model.fit(MAPS, y, epochs=2, batch_size=4, verbose=0)
            # In a file, Keras does not keep the state of the dropout.
            model.save(tmp_path / "model.keras")
            loaded = keras.models.load_model(tmp_path / "model.keras")
            loaded.fit(MAPS, y, epochs=2, batch_size=4, shuffle=False, verbose=0)
            return loaded

        base = trained(made())
        model = trained(kd.align(made(), N, copy=copy))
        for a, b in zip(
            base.trainable_variables, model.trainable_variables, strict=True
        ):
            np.testing.assert_array_equal(numpy(a), numpy(b), err_msg=a.path)
        np.testing.assert_array_equal(predict(model, MAPS), predict(base, MAPS))
        before = predict(model, MAPS)
        model.start_exploiting()
        np.testing.assert_array_equal(predict(model, MAPS), before)
        result = kd.solve(model, MAPS, y, l2=0, loss=loss, verbose=0)
        assert result.gap < 1e-5

    @pytest.mark.parametrize(
        ("base", "message"),
        [
            (
                lambda: keras.Sequential(
                    [
                        keras.Input((4, 3, 3)),
                        layers.Conv2D(4, 1, name="logits"),
                        layers.GlobalAveragePooling2D(),
                    ]
                ),
                r"feature vectors.*'logits' on features of shape \(None, 4, 3, 3\)",
            ),
            (
                lambda: pointwise_tail(layers.Flatten(), groups=3, outputs=3),
                r"does not end in.*\(Conv2D\)",
            ),
            (pointwise_tail, r"outputs of shape \(None, 1, 1, 4\) behind 'logits'"),
            (
                lambda: mlp(layers.Reshape((4, 1)), layers.GlobalAveragePooling1D()),
                r"outputs of shape \(None, 1\) behind 'logits' with 4 outputs",
            ),
        ],
    )
    def test_what_is_no_dense(self, base, message):
        with pytest.raises(ValueError, match=message):
            kd.align(base(), N)

    def test_a_convolution_with_its_own_call(self):
        class Cosine(layers.Conv2D):
            def call(self, inputs):
                return ops.tanh(super().call(inputs))

        pooling = layers.GlobalAveragePooling2D(keepdims=True)
        tail = [Cosine(3, 1, name="cosine"), layers.Flatten()]
        base = keras.Sequential([keras.Input((4, 4, 3)), pooling, *tail])
        with pytest.raises(ValueError, match=r"'cosine' of type Cosine.*overrides"):
            kd.align(base, N)


SOFT = {"softmax": ops.softmax, "sigmoid": ops.sigmoid, "log_softmax": ops.log_softmax}


class TestTails:
    @pytest.mark.parametrize("name", SOFT)
    @pytest.mark.parametrize("how", ["argument", "function", "layer", "ops"])
    def test_probabilities_are_dropped(self, name, how):
        behind, options = (), {}
        if how == "argument":
            options = {"activation": name}
        elif how == "function":
            options = {"activation": SOFT[name]}
        elif how == "layer":
            behind = (layers.Activation(name),)
        else:
            behind = (SOFT[name],)
        base = mlp(*behind, **options)
        expected = numpy(base(X))
        with pytest.warns(
            UserWarning, match=rf"trailing {name}.*from_logits=True"
        ) as w:
            aligned = kd.align(base, N)
        assert len(w) == 1
        assert w[0].filename == __file__
        base.get_layer("logits").activation = None
        logits = keras.Model(base.input, base.get_layer("logits").output)
        assert_same(aligned, logits)
        np.testing.assert_allclose(
            numpy(SOFT[name](aligned(X))), expected, atol=1e-6, rtol=1e-6
        )

    @pytest.mark.parametrize("as_argument", [True, False])
    def test_softmax_layer(self, as_argument):
        softmax = layers.Softmax()
        base = mlp(activation=softmax) if as_argument else mlp(softmax)
        with pytest.warns(UserWarning, match=r"trailing softmax.*from_logits=True"):
            aligned = kd.align(base, N)
        assert aligned.head.units == 4

    def test_softmax_of_a_sequential(self):
        base = keras.Sequential([keras.Input((6,)), tail(), layers.Softmax()])
        with pytest.warns(UserWarning, match="trailing softmax") as caught:
            kd.align(base, N)
        assert caught[0].filename == __file__

    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
    @pytest.mark.parametrize("gates", ["random", "learned"])
    @pytest.mark.parametrize(
        "tail",
        [
            lambda: layers.Activation("linear", dtype="float32"),
            lambda: lambda t: ops.cast(t, "float32"),
            lambda: layers.Softmax(dtype="float32"),
            None,
        ],
    )
    @pytest.mark.filterwarnings("ignore:The trailing softmax")
    def test_the_idiom_of_mixed_precision(self, policy, gates, tail, tmp_path):
        """Nothing is lost with a tail in single precision: the logits are in it."""
        base = mlp(*([tail()] if tail else []), dtype=policy)
        aligned = kd.align(base, N, gates=gates)
        half = policy.removeprefix("mixed_")
        assert aligned.head.compute_dtype == half
        dtype = half if tail is None else "float32"

        def dtype_of(tensor):
            return keras.backend.standardize_dtype(tensor.dtype)

        assert dtype_of(base(X)) == dtype
        for model in (aligned, keras.models.clone_model(aligned)):
            assert dtype_of(model(X)) == dtype
            assert dtype_of(model(keras.Input((6,)))) == dtype
        if gates == "random":
            logits = base.get_layer("logits").output
            expected = keras.Model(base.input, logits)(X)
            np.testing.assert_array_equal(
                numpy(ops.cast(aligned(X), "float32")),
                numpy(ops.cast(expected, "float32")),
            )
        aligned.start_exploiting()
        aligned.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        for model in (aligned, loaded):
            assert dtype_of(model(X)) == dtype
        with float64_context():
            assert dtype_of(in_float64(loaded)(X.astype("float64"))) == "float64"

    def test_integers_are_no_logits(self):
        with pytest.raises(ValueError, match=r"does not end in.*\(Cast\)"):
            kd.align(mlp(lambda t: ops.cast(t, "int32")), N)

    def test_what_does_nothing_is_dropped_silently(self):
        behind = (layers.Identity(), lambda t: ops.cast(t, "float32"))
        check(mlp(*behind, layers.Activation(None), activation="linear"))

    @pytest.mark.parametrize(
        "activation", ["relu", "tanh", layers.LeakyReLU, lambda t: t]
    )
    def test_other_nonlinearities(self, activation):
        if activation is layers.LeakyReLU:
            activation = activation()
        name = getattr(activation, "name", getattr(activation, "__name__", activation))
        with pytest.raises(ValueError, match=f"'logits' with activation={name}"):
            kd.align(mlp(activation=activation), N)
        if not isinstance(activation, str):
            return
        with pytest.raises(ValueError, match=r"does not end in.*\(Activation\)"):
            kd.align(mlp(layers.Activation(activation)), N)

    @pytest.mark.parametrize(
        "layer", [layers.ReLU, lambda: layers.Dropout(0.5), lambda: ops.relu]
    )
    def test_no_final_dense(self, layer):
        with pytest.raises(ValueError, match=r"does not end in.*layer=.*Aligned"):
            kd.align(mlp(layer()), N)

    def test_a_convolution_at_the_end(self):
        base = keras.Sequential([keras.Input((4, 4, 3)), layers.Conv2D(5, 3)])
        with pytest.raises(ValueError, match=r"does not end.*\(Conv2D\)"):
            kd.align(base, N)

    def test_dense_on_a_feature_map(self):
        base = keras.Sequential([keras.Input((4, 3)), tail()])
        with pytest.raises(ValueError, match=r"feature vectors.*\(None, 4, 3\).*Pool"):
            kd.align(base, N)

    def test_a_dense_with_its_own_call(self):
        class Cosine(layers.Dense):
            def call(self, inputs):
                return ops.tanh(super().call(inputs))

        base = keras.Sequential([keras.Input((6,)), Cosine(3, name="cosine")])
        with pytest.raises(ValueError, match=r"'cosine' of type Cosine.*overrides"):
            kd.align(base, N)

    def test_a_dense_with_a_subclass_that_computes_the_same(self):
        class Mine(layers.Dense):
            pass

        check(keras.Sequential([keras.Input((6,)), Mine(3)]))

    def test_lora(self):
        base = mlp()
        dense = base.get_layer("logits")
        dense.enable_lora(2)
        dense.lora_kernel_b.assign(np.ones(dense.lora_kernel_b.shape))
        aligned = check(base)
        assert not any(v is dense._kernel for v in aligned.trainable_variables)

    def test_quantized(self):
        base = mlp()
        base.get_layer("logits").quantize("int8")
        with pytest.raises(ValueError, match=r"'logits' with quantization_mode=int8"):
            kd.align(base, N)

    def test_no_bias_and_one_output(self):
        aligned = check(mlp(outputs=1, use_bias=False))
        assert aligned.output_shape == (None, 1)

    def test_several_outputs(self):
        inputs = keras.Input((6,))
        base = keras.Model(inputs, [tail()(inputs), layers.Dense(2)(inputs)])
        with pytest.raises(ValueError, match=r"one output.*2 outputs"):
            kd.align(base, N)


class TestOverrides:
    @pytest.mark.parametrize("by_name", [True, False])
    def test_layer(self, by_name):
        base = mlp(ops.tanh, lambda t: t * 2)
        dense = base.get_layer("logits")
        with pytest.warns(UserWarning, match="behind.*'logits' is dropped") as caught:
            aligned = kd.align(base, N, layer="logits" if by_name else dense)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert_same(aligned, keras.Model(base.input, dense.output))

    def test_an_earlier_dense(self):
        inputs = keras.Input((6,))
        h = layers.Dense(3, name="early")(inputs)
        base = keras.Model(inputs, layers.Dense(2)(h))
        with pytest.warns(UserWarning, match="behind.*'early' is dropped"):
            aligned = kd.align(base, N, layer="early")
        assert aligned.head.units == 3

    def test_the_layer_that_would_be_found_says_nothing(self):
        check(mlp(), layer="logits")

    def test_a_probability_in_the_named_layer(self):
        with pytest.warns(UserWarning, match="trailing softmax") as caught:
            kd.align(mlp(activation="softmax"), N, layer="logits")
        assert len(caught) == 1
        assert caught[0].filename == __file__

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            ("head", r"no such layer.*layer='head'.*'hidden', 'logits'"),
            (
                lambda: layers.Flatten(name="flat"),
                r"must be a Dense layer.*type Flatten",
            ),
            (3, r"must be a Dense layer.*layer=3"),
            (
                lambda: layers.Dense(2, name="other"),
                r"no part in the model.*'other'.*'base'",
            ),
        ],
    )
    def test_bad_layer(self, layer, message):
        with pytest.raises(ValueError, match=message):
            kd.align(mlp(), N, layer=layer() if callable(layer) else layer)

    @staticmethod
    def convolutional():
        inputs = keras.Input((4, 4, 3))
        h = layers.Conv2D(2, 3, padding="same", name="map")(inputs)
        h = layers.Dense(5, name="hidden")(layers.GlobalAveragePooling2D()(h))
        return keras.Model(inputs, tail()(h)), np.random.default_rng(0).random(
            (7, 4, 4, 3), "float32"
        )

    @pytest.mark.parametrize("by_name", [True, False])
    def test_features(self, by_name):
        base, x = self.convolutional()
        layer = base.get_layer("map")
        aligned = check(base, x, features="map" if by_name else layer)
        assert aligned.head.dim == 4 * 4 * 2 + 1
        z, u = aligned.trunk(x)
        assert z.shape == (7, 5)
        np.testing.assert_array_equal(numpy(u), numpy(layer(x)))
        # The map reaches the output: through the units alone.
        aligned.start_exploiting()
        before = numpy(aligned(x))
        aligned.head.q.assign(np.ones(aligned.head.q.shape))
        assert np.abs(numpy(aligned(x)) - before).max() > 1e-3

    def test_features_of_learned_gates(self):
        """There is no linear part: what fed it alone is gone."""
        base, x = self.convolutional()
        aligned = kd.align(base, N, features="map", gates="learned")
        assert aligned.head.dim == 4 * 4 * 2 + 1
        paths = {v.path for v in aligned.trunk.variables}
        assert paths == {v.path for v in base.get_layer("map").variables}
        aligned.compile(keras.optimizers.Adam(), "mse")
        # TensorFlow would warn of variables without gradients.
        aligned.fit(x, np.ones((7, 4)), verbose=0)

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            ("maps", r"no such layer.*features='maps'.*'hidden', 'logits'"),
            (3, r"layer of the model or its name.*3"),
            (lambda: layers.Flatten(name="flat"), r"no part in the model.*'flat'"),
        ],
    )
    def test_bad_features(self, features, message):
        with pytest.raises(ValueError, match=message):
            kd.align(mlp(), N, features=features() if callable(features) else features)

    def test_options_reach_the_head(self):
        head = kd.align(mlp(), N, gates="learned", width=7, slope=3.0, seed=5).head
        assert (head.gates, head.width, head.slope, head.seed) == ("learned", 7, 3.0, 5)
        assert head.n_samples == N
        assert kd.align(mlp(), N).head.share_gates
        assert not kd.align(mlp(), N, share_gates=False).head.share_gates
        with pytest.raises(ValueError, match="gates='both'"):
            kd.align(mlp(), N, gates="both")

    def test_learned_gates_take_no_dense(self):
        base = mlp()
        aligned = kd.align(base, N, gates="learned")
        assert aligned.head.dense is None
        assert ids(aligned.trunk.variables) == ids(base.get_layer("hidden").variables)


class TestWeights:
    def test_are_shared(self):
        base = mlp()
        aligned = kd.align(base, N)
        assert ids(base.variables) <= ids(aligned.variables)
        base.get_layer("hidden").kernel.assign(np.ones((6, 5)))
        base.get_layer("logits").kernel.assign(np.ones((5, 4)))
        assert_same(aligned, base)

    def test_align_leaves_the_model_as_it_was(self):
        base = mlp()
        base.compile("adam", "mse")
        before = [np.array(w) for w in base.get_weights()], base.get_config()
        kd.align(base, N)
        assert base.get_config() == before[1]
        for a, b in zip(base.get_weights(), before[0], strict=True):
            np.testing.assert_array_equal(a, b)
        base.fit(X, X[:, :4], verbose=0)

    @pytest.mark.parametrize("kind", ["functional", "sequential", "subclass", "lora"])
    def test_copy(self, kind):
        base = mlp()
        if kind == "sequential":
            base = keras.Sequential([keras.Input((6,)), mlp(), tail(3)])
        if kind == "subclass":
            base = TestSubclasses.Traceable()
            base(X)
            base.norm.moving_mean.assign(np.arange(5.0))
        if kind == "lora":
            base.get_layer("logits").enable_lora(2)
        aligned = kd.align(base, N, copy=True)
        assert not ids(base.variables) & ids(aligned.variables)
        assert_same(aligned, base)
        before = [np.array(w) for w in base.get_weights()]
        for variable in aligned.trainable_variables:
            variable.assign(np.zeros(variable.shape))
        for a, b in zip(base.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_layers_of_the_original_name_those_of_the_copy(self):
        base = mlp(ops.tanh)
        dense, hidden = base.get_layer("logits"), base.get_layer("hidden")
        with pytest.warns(UserWarning, match="behind"):
            aligned = kd.align(base, N, copy=True, layer=dense, features=hidden)
        assert aligned.head.dense is not dense
        assert not ids(base.variables) & ids(aligned.variables)

    def test_frozen_layers_stay_frozen(self):
        for copy in (False, True):
            inner = keras.Sequential([layers.Dense(6), layers.BatchNormalization()])
            base = keras.Sequential([keras.Input((6,)), inner, tail()])
            inner.trainable = False
            aligned = kd.align(base, N, copy=copy)
            names = [v.name for v in aligned.trainable_variables]
            assert names == [v.name for v in base.trainable_variables]
            assert len(names) == 2

    def test_training_is_the_base_models_bit_for_bit(self):
        """Dropout's own random state, and the data's order, included."""
        results = []
        for options in (None, {"copy": False}, {"copy": True}):
            keras.utils.set_random_seed(3)
            base = keras.Sequential(
                [keras.Input((6,)), layers.Dense(9), layers.Dropout(0.5), tail()]
            )
            model = base if options is None else kd.align(base, N, **options)
            model.compile(keras.optimizers.Adam(), "mse")
            model.fit(X, X[:, :4], epochs=2, batch_size=4, verbose=0)
            results.append([np.array(numpy(v)) for v in model.trainable_variables])
        for weights in results[1:]:
            for a, b in zip(weights, results[0], strict=True):
                np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("copy", [False, True])
    def test_pythons_generator_does_not_move(self, copy):
        base = mlp(layers.Identity())
        state = random.getstate()
        kd.align(base, N, copy=copy)
        assert random.getstate() == state


class TestBadInput:
    @pytest.mark.parametrize("n", [0, -1, True, 1.0, 30.5, None, "30", np.bool_(True)])
    def test_n_samples(self, n):
        with pytest.raises(
            ValueError, match=rf"n_samples={re.escape(repr(n))}. Pass n_samples="
        ):
            kd.align(mlp(), n)

    def test_n_samples_is_required(self):
        with pytest.raises(TypeError, match="n_samples"):
            kd.align(mlp())

    def test_n_samples_of_numpy(self):
        assert kd.align(mlp(), np.int64(N)).head.default_width() == 10

    def test_too_narrow(self):
        with pytest.warns(UserWarning, match="too narrow") as caught:
            kd.align(mlp(), N, width=4)
        (warning,) = caught
        assert warning.filename == __file__
        message = str(warning.message)
        assert "30 samples" in message
        assert "width * d = 4 * 6 = 24" in message
        assert "A width of 10 would do" in message

    def test_just_wide_enough(self):
        """Warnings are errors here."""
        assert kd.align(mlp(), N, width=5).head.default_width() == 5

    def test_aligned_already(self):
        with pytest.raises(ValueError, match="an alignment head already"):
            kd.align(kd.align(mlp(), N), N)

    @pytest.mark.parametrize("model", [None, "base", layers.Dense])
    def test_no_model(self, model):
        model = model(3) if callable(model) else model
        with pytest.raises(
            ValueError, match=rf"must be a keras.Model.*{type(model).__name__}"
        ):
            kd.align(model, N)

    def test_unbuilt_sequential(self):
        base = keras.Sequential([layers.Dense(3)], name="empty")
        with pytest.raises(ValueError, match=r"not built.*'empty'.*Input\(shape\)"):
            kd.align(base, N)


SPARSE = keras.losses.SparseCategoricalCrossentropy
ONE_HOT = keras.losses.CategoricalCrossentropy
BINARY = keras.losses.BinaryCrossentropy


@pytest.mark.parametrize(
    ("activation", "loss", "expected"),
    [
        ("softmax", "sparse_categorical_crossentropy", SPARSE(from_logits=True)),
        ("softmax", SPARSE(reduction="sum"), SPARSE(True, reduction="sum")),
        ("softmax", ONE_HOT(label_smoothing=0.1), ONE_HOT(True, label_smoothing=0.1)),
        ("softmax", ["categorical_crossentropy"], ONE_HOT(from_logits=True)),
        ("sigmoid", "binary_crossentropy", BINARY(from_logits=True)),
        ("sigmoid", BINARY(label_smoothing=0.2), BINARY(True, label_smoothing=0.2)),
        (None, SPARSE(from_logits=True), SPARSE(from_logits=True)),
        (None, "mse", "mse"),
        # None of these is a convex loss of the logits, or one that we know.
        (None, SPARSE(), None),
        ("softmax", SPARSE(from_logits=True), None),
        ("softmax", "binary_crossentropy", None),
        ("softmax", "mse", None),
        ("sigmoid", "mse", None),
        (None, "mae", None),
        (None, None, None),
    ],
)
@pytest.mark.filterwarnings("ignore:The trailing")
def test_the_loss_of_the_base_model_is_inherited(activation, loss, expected):
    base = mlp(activation=activation)
    if loss is not None:
        base.compile("sgd", loss=loss)
    found = kd.align(base, n_samples=20).inherited_loss
    if expected is None:
        assert found is None
    else:
        assert convex_loss(found) == convex_loss(expected)


@pytest.mark.parametrize(
    "loss",
    [
        SPARSE(from_logits=True, reduction="sum"),
        ONE_HOT(from_logits=True, label_smoothing=0.1),
        BINARY(from_logits=True),
        "mse",
        None,
    ],
)
@pytest.mark.parametrize("how", ["file", "config", "clone"])
def test_the_inherited_loss_is_kept_with_the_model(loss, how, tmp_path):
    base = mlp()
    base.compile("sgd", loss=loss)
    model = kd.align(base, n_samples=20)
    expected = model.inherited_loss
    if how == "file":
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    elif how == "config":
        model = kd.AlignedModel.from_config(model.get_config())
    else:
        model = keras.models.clone_model(model)
    if loss is None:
        assert expected is model.inherited_loss is None
    else:
        assert convex_loss(model.inherited_loss) == convex_loss(expected)


@pytest.mark.filterwarnings("ignore:The trailing")
def test_an_inherited_loss_is_what_the_base_model_was_trained_on():
    y = np.arange(len(X)) % 4
    base = mlp(layers.Softmax())
    base.compile("adam", loss="sparse_categorical_crossentropy")
    base.fit(X, y, epochs=1, verbose=0)
    expected = base.evaluate(X, y, verbose=0)
    model = kd.align(base, n_samples=len(X))
    assert kd.certify(model, X, y).loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_behind_a_named_layer_no_loss_is_inherited():
    base = mlp(layers.Dense(3))
    base.compile("sgd", loss=SPARSE(from_logits=True))
    assert kd.align(base, n_samples=20, layer="logits").inherited_loss is None
    assert kd.align(base, n_samples=20).inherited_loss is not None


def test_a_training_step_of_the_model_s_own_is_not_dropped_in_silence():
    class Special(keras.Model):
        def train_step(self, *args, **kwargs):
            return super().train_step(*args, **kwargs)

    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(3)(keras.layers.Dense(5, activation="relu")(inputs))
    with pytest.warns(UserWarning, match="Special, which overrides train_step"):
        kd.align(Special(inputs, outputs), n_samples=4)
    # None of Keras's own kinds of models has one.
    kd.align(keras.Model(inputs, outputs), n_samples=4)
    kd.align(keras.Sequential([inputs, keras.layers.Dense(3)]), n_samples=4)
