import random

import keras
import numpy as np
import pytest
from keras import layers, ops
from small import assert_equal, convnet, digits, weights

import keras_dalign as kd
from keras_dalign import compat

SGD, ADAM = "sgd", "adam"
RATE = 0.1


def mlp(*widths, seed=0, activation="tanh", **options):
    keras.utils.set_random_seed(seed)
    hidden = [layers.Dense(n, activation, **options) for n in widths]
    return keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(10, **options)])


def optimizer_of(family, **options):
    if family == SGD:
        return keras.optimizers.SGD(RATE)
    return keras.optimizers.Adam(RATE, epsilon=options.pop("epsilon", 1e-30))


def trained(model, x, y, optimizer, steps=1, loss="mse"):
    # A few steps take less time than a graph of them.
    model.compile(optimizer=optimizer, loss=loss, run_eagerly=steps < 3)
    for _ in range(steps):
        model.train_on_batch(x, y)
    return model


def one_hot_digits(n):
    x, y = digits(n)
    return x, np.eye(10, dtype="float32")[y]


# What the tables of Yang & Hu and of Tensor Programs V say, as (multiplier, deviation,
# learning rate) of the input's, the hidden layers' and the output's weights and of
# biases; p and q are the growth of fan-in and fan-out. Deviations are over those of a
# fan-in initializer.
TABLES = {
    ("mup", SGD, "table 8"): (
        lambda _p, q: (1, 1, q),
        lambda p, q: (1, 1, q / p),
        lambda p, _q: (1 / p, p**0.5, p),
        lambda q: (1, 1, q),
    ),
    ("mup", SGD, "table 3"): (
        lambda _p, q: (1, 1, q),
        lambda p, q: (1, 1, q / p),
        lambda p, _q: (1, p**-0.5, 1 / p),
        lambda q: (1, 1, q),
    ),
    ("mup", ADAM, "table 8"): (
        lambda _p, _q: (1, 1, 1),
        lambda p, _q: (1, 1, 1 / p),
        lambda p, _q: (1 / p, p**0.5, 1),
        lambda _q: (1, 1, 1),
    ),
    ("mup", ADAM, "table 3"): (
        lambda _p, _q: (1, 1, 1),
        lambda p, _q: (1, 1, 1 / p),
        lambda p, _q: (1, p**-0.5, 1 / p),
        lambda _q: (1, 1, 1),
    ),
    ("ntk", SGD, "rates"): (
        lambda _p, _q: (1, 1, 1),
        lambda p, _q: (1, 1, 1 / p),
        lambda p, _q: (1, 1, 1 / p),
        lambda _q: (1, 1, 1),
    ),
    ("ntk", ADAM, "rates"): (
        lambda _p, q: (1, 1, q**-0.5),
        lambda p, q: (1, 1, q**-0.5 / p),
        lambda p, _q: (1, 1, 1 / p),
        lambda q: (1, 1, q**-0.5),
    ),
    ("mean_field", SGD, "averages"): (
        lambda _p, q: (1, 1, q),
        lambda p, q: (1 / p, p**0.5, q * p),
        lambda p, _q: (1 / p, p**0.5, p),
        lambda q: (1, 1, q),
    ),
    ("mean_field", ADAM, "averages"): (
        lambda _p, _q: (1, 1, 1),
        lambda p, _q: (1 / p, p**0.5, 1),
        lambda p, _q: (1 / p, p**0.5, 1),
        lambda _q: (1, 1, 1),
    ),
    ("standard", SGD, "Keras"): (
        *(lambda _p, _q: (1, 1, 1),) * 3,
        lambda _q: (1, 1, 1),
    ),
}


class Reference:
    """A tanh network in NumPy, with a rate for each weight, in float64."""

    def __init__(self, values, rules, ratios, family):
        *kernels, last = zip(values[::2], values[1::2], strict=True)
        roles = [rules[0]] + [rules[1]] * (len(kernels) - 1) + [rules[2]]
        self.family, self.t = family, 0
        self.a, self.w, self.rates = [], [], []
        for (kernel, bias), role, (p, q) in zip(
            [*kernels, last], roles, ratios, strict=True
        ):
            for value, (a, b, c) in ((kernel, role(p, q)), (bias, rules[3](q))):
                self.a.append(a)
                self.w.append(b * value.astype("float64"))
                self.rates.append(RATE * c)
        self.moments = [[np.zeros_like(w), np.zeros_like(w)] for w in self.w]
        self.epsilons = [0.0] * len(self.w)

    def outputs(self, x):
        self.z = [x.astype("float64")]
        effective = [a * w for a, w in zip(self.a, self.w, strict=True)]
        for kernel, bias in zip(effective[::2], effective[1::2], strict=True):
            self.z.append(np.tanh(self.z[-1] @ kernel + bias))
        self.z[-1] = self.z[-2] @ effective[-2] + effective[-1]
        return self.z[-1]

    def step(self, x, y):
        delta = 2 * (self.outputs(x) - y) / y.size
        gradients = []
        for i in range(len(self.w) - 2, -1, -2):
            z, a, a_bias = self.z[i // 2], self.a[i], self.a[i + 1]
            gradients = [a * z.T @ delta, a_bias * delta.sum(axis=0), *gradients]
            delta = (delta @ (a * self.w[i]).T) * (1 - z**2)
        self.t += 1
        for i, (rate, g, moments) in enumerate(
            zip(self.rates, gradients, self.moments, strict=True)
        ):
            if self.family == SGD:
                self.w[i] -= rate * g
                continue
            for k, (decay, value) in enumerate(((0.9, g), (0.999, g**2))):
                moments[k] = decay * moments[k] + (1 - decay) * value
            first, second = (
                moment / (1 - decay**self.t)
                for moment, decay in zip(moments, (0.9, 0.999), strict=True)
            )
            # Keras adds epsilon before the second moment's bias is corrected.
            epsilon = self.epsilons[i] / np.sqrt(1 - 0.999**self.t)
            self.w[i] -= rate * first / (np.sqrt(second) + epsilon)


@pytest.mark.parametrize(("kind", "family", "gauge"), list(TABLES))
def test_training_equals_that_of_the_tables(kind, family, gauge):
    # Fan-in and fan-out grow differently, and there are biases that are not zero.
    options = {"kernel_initializer": "lecun_normal", "bias_initializer": "normal"}
    model, base = mlp(48, 24, 36, **options), mlp(8, 12, 12, **options)
    ratios = [(1, 6), (6, 2), (2, 3), (3, 1)]
    reference = Reference(
        model.get_weights(), TABLES[kind, family, gauge], ratios, family
    )
    result = kd.parametrize(model, base, kind, family)
    x = np.random.default_rng(0).normal(size=(30, 64)).astype("float32")
    _, y = one_hot_digits(30)
    np.testing.assert_allclose(
        result.predict(x, verbose=0), reference.outputs(x), atol=2e-5
    )
    # A step of Adam is as long as it is sure: none of these is too long to compare.
    rate = RATE if family == SGD else 0.003
    reference.rates = [r * rate / RATE for r in reference.rates]
    start = reference.outputs(x)
    optimizer = optimizer_of(family)
    optimizer.learning_rate = rate
    trained(result, x, y, optimizer, steps=10)
    for _ in range(10):
        reference.step(x, y)
    expected = reference.outputs(x)
    moved = np.max(np.abs(expected - start))
    assert moved > 0.03
    np.testing.assert_allclose(
        result.predict(x, verbose=0), expected, atol=5e-4 * moved
    )


def test_epsilon_counts_as_divided_by_the_multiplier():
    options = {"kernel_initializer": "lecun_normal"}
    model, base = mlp(48, 48, **options), mlp(8, 8, **options)
    ratios = [(1, 6), (6, 6), (6, 1)]
    x, y = one_hot_digits(30)
    x = x + 0.1

    def moved(epsilon, factors):
        reference = Reference(
            model.get_weights(), TABLES["mup", ADAM, "table 3"], ratios, ADAM
        )
        reference.epsilons = [epsilon * factor for factor in factors]
        reference.rates = [rate / 10 for rate in reference.rates]
        for _ in range(3):
            reference.step(x, y)
        return reference.outputs(x)

    # About as large as gradients, so that it matters.
    epsilon = 1e-4
    result = kd.parametrize(model, base, "mup", ADAM)
    optimizer = keras.optimizers.Adam(RATE / 10, epsilon=epsilon)
    outputs = trained(result, x, y, optimizer, steps=3).predict(x, verbose=0)
    expected = moved(epsilon, [1, 1, 6, 1, 6, 1])
    np.testing.assert_allclose(outputs, expected, atol=1e-4)
    assert np.max(np.abs(outputs - moved(epsilon, [1] * 6))) > 0.005


def everything(width, seed=0):
    """One of each: layers whose weights grow, and what they have to pass by."""
    keras.utils.set_random_seed(seed)
    images = keras.Input((8, 8, 2), name="images")
    words = keras.Input((5,), dtype="int32", name="words")
    h = layers.Conv2D(width, 3, padding="same", activation="relu", name="conv")(images)
    h = layers.BatchNormalization(name="bn")(h)
    skip = layers.Conv2D(width, 1, use_bias=False, groups=2, name="skip")(h)
    h = layers.Add()([layers.Conv2D(width, 3, padding="same", name="deep")(h), skip])
    h = layers.GlobalAveragePooling2D()(layers.Dropout(0.3, seed=3)(h))
    e = layers.Embedding(11, width, name="words_of")(words)
    e = layers.LayerNormalization(name="ln")(e)
    e = layers.EinsumDense(
        "abc,cde->abde",
        (5, width // 2, 3),
        bias_axes="de",
        activation="tanh",
        name="einsum",
    )(e)
    e = layers.GlobalAveragePooling1D()(layers.Reshape((5, -1))(e))
    h = ops.tanh(layers.Concatenate()([h, e]))
    return keras.Model([images, words], layers.Dense(4, name="logits")(h))


def everything_data(n=24):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(n, 8, 8, 2)).astype("float32")
    words = rng.integers(11, size=(n, 5)).astype("int32")
    return [images, words], rng.normal(size=(n, 4)).astype("float32")


# The roles of its weights: growth of fan-in and fan-out when the width is three times
# the base's; biases and norms as if fan-in were one.
P, Q = "fan_in", "fan_out"
ROLES = {
    "conv/kernel": {Q},
    "conv/bias": {Q},
    "bn/gamma": {Q},
    "bn/beta": {Q},
    "skip/kernel": {P, Q},
    "deep/kernel": {P, Q},
    "deep/bias": {Q},
    "words_of/embeddings": {Q},
    "ln/gamma": {Q},
    "ln/beta": {Q},
    "einsum/kernel": {P, Q},
    "einsum/bias": {Q},
    "logits/kernel": {P},
    "logits/bias": set(),
}


def rate_of(kind, family, role, r=3):
    """How far an effective weight moves, over how far it would with plain weights."""
    p, q = (r if side in role else 1 for side in (P, Q))
    if kind == "standard":
        return 1
    if family == SGD:
        return 1 / p if kind == "ntk" else q / p
    return q**-0.5 / p if kind == "ntk" else 1 / p


def named(model):
    """The weights by the names of layer and variable."""
    return {
        "/".join(v.path.split("/")[-2:]): ops.convert_to_numpy(v)
        for v in model.trainable_variables
    }


@pytest.mark.parametrize("kind", ["mup", "ntk"])
@pytest.mark.parametrize("family", [SGD, ADAM])
def test_every_kind_of_layer_moves_by_its_role(kind, family):
    x, y = everything_data()
    model = kd.parametrize(everything(12), everything(4), kind, family)
    start = named(model)
    assert set(start) == set(ROLES)
    # The same function with plain weights: those of the model times the multipliers.
    multiplier = {
        name: np.sqrt(rate_of(kind, family, role))
        if family == SGD
        else rate_of(kind, family, role)
        for name, role in ROLES.items()
    }
    plain = everything(12)
    for variable, name in zip(plain.trainable_variables, named(plain), strict=True):
        variable.assign(multiplier[name] * start[name])
    plain_start = named(plain)
    np.testing.assert_allclose(
        model.predict(x, verbose=0), plain.predict(x, verbose=0), rtol=1e-4, atol=1e-5
    )
    trained(model, x, y, optimizer_of(family))
    trained(plain, x, y, optimizer_of(family))
    after, plain_after = named(model), named(plain)
    for name, role in ROLES.items():
        moved = multiplier[name] * (after[name] - start[name])
        by_itself = plain_after[name] - plain_start[name]
        expected = rate_of(kind, family, role) * by_itself
        # An entry whose gradient is rounding alone may move by Adam either way.
        far = np.abs(moved - expected) > 2e-3 * np.max(np.abs(expected))
        assert np.max(np.abs(expected)) > 0, name
        assert np.mean(far) <= (0.01 if family == ADAM else 0.0), name


@pytest.mark.parametrize(
    "initializer",
    [
        "glorot_uniform",
        "lecun_normal",
        keras.initializers.VarianceScaling(mode="fan_out"),
        keras.initializers.RandomNormal(stddev=0.1),
        keras.initializers.TruncatedNormal(stddev=0.1),
        keras.initializers.RandomUniform(-0.1, 0.1),
        "orthogonal",
    ],
)
@pytest.mark.parametrize("kind", ["mup", "ntk", "mean_field"])
def test_how_large_effective_kernels_are_at_the_beginning(initializer, kind):
    def network(width):
        keras.utils.set_random_seed(0)
        options = {"kernel_initializer": initializer}
        rows = (13, 2, width)
        return keras.Sequential(
            [
                keras.Input((16, 24)),
                layers.Conv1D(width, 2, use_bias=False, name="input", **options),
                layers.Conv1D(2 * width, 3, use_bias=False, name="hidden", **options),
                layers.Reshape((13, 2, width)),
                layers.EinsumDense("abcd,cdef->abef", rows, name="einsum", **options),
                layers.Flatten(),
                layers.Dense(32, use_bias=False, name="output", **options),
            ]
        )

    base, model = network(16), network(80)
    result = kd.parametrize(model, base, kind, ADAM)
    scales = {"input": 1.0}
    for layer in result.layers:
        if isinstance(layer, layers.Rescaling):
            scales[layer.name.split("_")[0]] = layer.scale
    if kind == "ntk":
        assert scales.pop("input") == pytest.approx(5**-0.5)
        assert scales == pytest.approx(
            {"hidden": 5**-1.5, "einsum": 5**-1.5, "output": 1 / 5}
        )
        scales["input"] = 5**-0.5
    growth = {
        "mup": {"input": 1, "hidden": 5**-0.5, "einsum": 5**-0.5, "output": 1 / 5},
        "ntk": {"input": 1, "hidden": 5**-0.5, "einsum": 5**-0.5, "output": 5**-0.5},
        "mean_field": {"input": 1, "hidden": 1 / 5, "einsum": 1 / 5, "output": 1 / 5},
    }[kind]
    for name, expected in growth.items():
        effective = scales[name] * np.std(result.get_layer(name).get_weights()[0])
        own = np.std(base.get_layer(name).get_weights()[0])
        assert effective / own == pytest.approx(expected, rel=0.06), name


@pytest.mark.parametrize(
    ("kind", "family"), [("mup", SGD), ("ntk", ADAM), ("mean_field", SGD)]
)
def test_at_the_base_widths_nothing_changes_bit_for_bit(kind, family):
    x, y = everything_data()
    model = everything(6)
    result = kd.parametrize(model, everything(6, seed=1), kind, family)
    assert [x.name for x in result.layers] == [x.name for x in model.layers]
    assert result.name == model.name
    assert_equal(weights(result), weights(model))
    for network in (result, model):
        trained(network, x, y, optimizer_of(family, epsilon=1e-7), steps=2)
    assert_equal(weights(result), weights(model))


def test_a_model_is_its_own_base_and_a_copy_shares_nothing():
    x, y = one_hot_digits(20)
    model = mlp(8)
    before = weights(model)
    trained(kd.parametrize(model, model), x, y, keras.optimizers.SGD(0.1))
    assert_equal(weights(model), before)


def test_standard_is_the_model_as_keras_initialises_it():
    model = everything(12)
    result = kd.parametrize(model, everything(4), "standard")
    assert [x.name for x in result.layers] == [x.name for x in model.layers]
    assert_equal(weights(result), weights(model))


def test_the_width_may_shrink():
    x, _ = one_hot_digits(20)
    options = {"kernel_initializer": "lecun_normal"}
    model = mlp(4, 4, **options)
    result = kd.parametrize(model, mlp(16, 16, **options), "mup")
    reference = Reference(
        model.get_weights(),
        TABLES["mup", SGD, "table 8"],
        [(1, 0.25), (0.25, 0.25), (0.25, 1)],
        SGD,
    )
    np.testing.assert_allclose(
        result.predict(x, verbose=0), reference.outputs(x), atol=1e-5
    )


def test_the_global_random_state_is_left_alone():
    model, base = convnet(), convnet()
    state = random.getstate()
    kd.parametrize(model, base)
    assert random.getstate() == state


def change(kind, width, family):
    """How far the last hidden layer moves, relative to where it began."""
    # Targets that are far from the outputs: these begin smaller under muP.
    x, y = one_hot_digits(40)
    x, y = x / 4, 10 * y
    model = kd.parametrize(mlp(width, width), mlp(64, 64), kind, family)
    features = keras.Model(model.input, model.layers[-1].input)
    start = features.predict(x, verbose=0)
    optimizer = {
        SGD: keras.optimizers.SGD(0.02),
        ADAM: keras.optimizers.Adam(0.0005, epsilon=1e-12),
    }[family]
    trained(model, x, y, optimizer, steps=5)
    moved = features.predict(x, verbose=0)
    return np.linalg.norm(moved - start) / np.linalg.norm(start)


@pytest.mark.parametrize("family", [SGD, ADAM])
def test_features_move_at_every_width_under_mup_alone(family):
    ratios = {
        kind: change(kind, 512, family) / change(kind, 128, family)
        for kind in ("mup", "ntk")
    }
    assert 0.8 < ratios["mup"] < 1.1
    # Four times the width, half the movement.
    assert 0.4 < ratios["ntk"] < 0.6


def test_masks_pass_the_multipliers():
    def network(width):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((None,), dtype="int32")
        h = layers.Embedding(5, width, mask_zero=True)(inputs)
        h = layers.GlobalAveragePooling1D()(layers.Dense(width, "relu")(h))
        return keras.Model(inputs, layers.Dense(3)(h))

    model = kd.parametrize(network(8), network(2), "mup")
    words = np.array([[1, 2, 3, 4, 0, 0], [1, 2, 3, 4, 1, 1]], "int32")
    padded, longer = model.predict(words, verbose=0)
    (short,) = model.predict(words[:1, :4], verbose=0)
    np.testing.assert_allclose(padded, short, rtol=1e-5)
    assert not np.allclose(longer, short, rtol=1e-3)


def test_saved_and_loaded(tmp_path):
    x, y = everything_data()
    model = kd.parametrize(everything(12), everything(4), "mup")
    trained(model, x, y, keras.optimizers.SGD(0.1))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0)
    )
    assert_equal(weights(loaded), weights(model))
    # All layers are Keras's own: the file can be read without this package.
    assert all(type(x).__module__.startswith("keras.") for x in loaded.layers)


def test_activations_and_regularizers_follow_the_multiplier():
    def network(width):
        keras.utils.set_random_seed(0)
        regularized = layers.Dense(
            width, "relu", activity_regularizer=keras.regularizers.L2(0.5)
        )
        linear = layers.Dense(width, activity_regularizer=keras.regularizers.L1(0.1))
        return keras.Sequential(
            [keras.Input((64,)), regularized, linear, layers.Dense(2, "softmax")]
        )

    x, _ = one_hot_digits(8)
    result = kd.parametrize(network(12), network(3), "mup")
    first, second, last = (
        keras.Model(result.input, result.get_layer(name).output)
        for name in _names_behind(result)
    )
    relu = np.asarray(first.predict(x, verbose=0))
    flat = np.asarray(second.predict(x, verbose=0))
    assert np.min(relu) == 0.0
    assert np.min(flat) < 0.0
    np.testing.assert_allclose(last.predict(x, verbose=0).sum(axis=1), 1.0, atol=1e-6)
    result(x)
    penalties = sorted(float(ops.convert_to_numpy(loss)) for loss in result.losses)
    expected = sorted([0.5 * np.sum(relu**2) / 8, 0.1 * np.sum(np.abs(flat)) / 8])
    # Older versions of Keras add up over the batch, others take its mean.
    samples = 8 if penalties[0] > 4 * expected[0] else 1
    np.testing.assert_allclose(penalties, samples * np.array(expected), rtol=1e-5)


def _names_behind(model):
    dense = [x.name for x in model.layers if isinstance(x, layers.Dense)]
    return f"{dense[0]}_activation", f"{dense[1]}_activation", dense[2]


def test_aligned_trained_and_certified():
    x, y = digits(60)
    model = kd.parametrize(mlp(32, 32, seed=2), mlp(8, 8), "mup")
    aligned = kd.align(model, n_samples=len(x), seed=0)
    np.testing.assert_array_equal(
        aligned.predict(x, verbose=0), model.predict(x, verbose=0)
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    bound = kd.certify(model, x, y, loss=loss, gradient_bound=True).gradient_bound
    assert bound is not None
    optimizer = kd.DAlign(
        keras.optimizers.SGD(0.1), explore=3, solve_options={"l2": 0, "tol": 1e-4}
    )
    aligned.compile(optimizer=optimizer, loss=loss)
    aligned.fit(x, y, batch_size=20, epochs=5, verbose=0)
    assert kd.certify(aligned, x, y).gap <= 1e-4


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_dtype_policies(policy):
    if policy == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX computes in float32 unless it is told otherwise.")
    options = {"dtype": policy}
    x, y = one_hot_digits(20)
    model = kd.parametrize(mlp(32, 32, **options), mlp(8, 8, **options), "mup")
    plain = kd.parametrize(mlp(32, 32), mlp(8, 8), "mup")
    model.set_weights(plain.get_weights())
    assert {layer.compute_dtype for layer in model.layers[1:]} == {
        policy.removeprefix("mixed_")
    }
    tolerance = {"mixed_bfloat16": 0.05, "mixed_float16": 0.005}.get(policy, 1e-5)
    np.testing.assert_allclose(
        model.predict(x, verbose=0), plain.predict(x, verbose=0), atol=tolerance
    )
    trained(model, x, y, keras.optimizers.SGD(0.1))
    assert np.all(np.isfinite(model.predict(x, verbose=0)))


def nested(width, seed=0):
    keras.utils.set_random_seed(seed)
    block = keras.Sequential(
        [keras.Input((width,)), layers.Dense(width, "tanh", name="in_block")],
        name="block",
    )
    inputs = keras.Input((64,))
    stem = keras.Model(inputs, layers.Dense(width, name="stem_in")(inputs), name="stem")
    outputs = layers.Dense(10, name="logits")(block(stem(inputs)))
    return keras.Model(inputs, outputs)


def test_models_within_models():
    x, y = one_hot_digits(20)
    flat = mlp(24, 24)
    flat.layers[0].activation = keras.activations.linear
    flat_base = mlp(8, 8)
    model = nested(24)
    model.set_weights(flat.get_weights())
    result = kd.parametrize(model, nested(8), "mup")
    expected = kd.parametrize(flat, flat_base, "mup")
    for network in (result, expected):
        trained(network, x, y, keras.optimizers.SGD(0.1), steps=2)
    np.testing.assert_allclose(
        result.predict(x, verbose=0), expected.predict(x, verbose=0), atol=1e-6
    )


class Own(keras.Model):
    def train_step(self, *args):
        return super().train_step(*args)


class Subclass(keras.Sequential):
    pass


def test_subclasses_of_keras_models():
    inputs = keras.Input((64,))
    x, _ = one_hot_digits(5)

    def network(width, kind=Own):
        keras.utils.set_random_seed(0)
        outputs = layers.Dense(10)(layers.Dense(width)(inputs))
        return kind(inputs, outputs)

    with pytest.warns(UserWarning, match=r"not carried over.*Own.*train_step"):
        result = kd.parametrize(network(12), network(4))
    expected = kd.parametrize(network(12, keras.Model), network(4))
    np.testing.assert_array_equal(
        result.predict(x, verbose=0), expected.predict(x, verbose=0)
    )
    listed = Subclass([keras.Input((64,)), layers.Dense(4), layers.Dense(10)])
    assert_equal(weights(kd.parametrize(listed, listed)), weights(listed))


def test_shared_tensors_and_several_outputs():
    def network(width):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((64,))
        h = layers.Dense(width, "tanh", name="h")(inputs)
        left, right = layers.Dense(width, name="l")(h), layers.Dense(width, name="r")(h)
        both = left * right + h
        return keras.Model(
            inputs, {"a": layers.Dense(3, name="a")(both), "b": both[:, :2]}
        )

    x, _ = one_hot_digits(5)
    outputs = kd.parametrize(network(12), network(4)).predict(x, verbose=0)
    assert {name: value.shape for name, value in outputs.items()} == {
        "a": (5, 3),
        "b": (5, 2),
    }


def refused(make, message, **options):
    with pytest.raises(ValueError, match=message):
        kd.parametrize(make(12), make(4), **options)


def single(layer, shape=(8,), **input_options):
    """A maker of networks with one layer of some width in the middle."""

    def make(width):
        inputs = keras.Input(shape, **input_options)
        h = layer(width)(inputs)
        return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(h)))

    return make


def test_arguments_that_do_not_exist():
    with pytest.raises(ValueError, match=r"`kind` must be.*'mup'.*kind='mu'"):
        kd.parametrize(mlp(4), mlp(4), "mu")
    with pytest.raises(ValueError, match=r"`optimizer` must be.*optimizer='muon'"):
        kd.parametrize(mlp(4), mlp(4), optimizer="muon")
    with pytest.raises(ValueError, match=r"`model` must be a built.*model=3"):
        kd.parametrize(3, mlp(4))
    unbuilt = keras.Sequential([layers.Dense(3)])
    with pytest.raises(ValueError, match=r"`base` must be a built.*keras.Input"):
        kd.parametrize(mlp(4), unbuilt)
    with pytest.raises(ValueError, match="before it is aligned"):
        kd.parametrize(kd.align(mlp(4), n_samples=8, width=2), mlp(4))


def test_bases_that_do_not_match():
    model = mlp(8, 8)
    with pytest.raises(ValueError, match=r"3 layers in model.*2 in base"):
        kd.parametrize(model, mlp(4))
    other = keras.Sequential(
        [keras.Input((64,)), layers.Dense(4), layers.ReLU(), layers.Dense(10)]
    )
    with pytest.raises(ValueError, match=r"Received: 'dense.*Dense.*has 're_lu.*ReLU"):
        kd.parametrize(model, other)
    with pytest.raises(ValueError, match=r"same ranks.*\(64, 8\).*the base has"):
        kd.parametrize(model, mlp(4, 4, use_bias=False))
    wide = keras.Sequential([keras.Input((60,)), layers.Dense(4), layers.Dense(10)])
    with pytest.raises(ValueError, match=r"the model's inputs.*\(None, 64\)"):
        kd.parametrize(mlp(8), wide)
    more = keras.Sequential([keras.Input((64,)), layers.Dense(4), layers.Dense(11)])
    with pytest.raises(ValueError, match=r"the model's outputs.*\(None, 11\)"):
        kd.parametrize(mlp(8), more)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (single(layers.SimpleRNN, (4, 8)), r"only layers of these.*SimpleRNN"),
        (
            single(lambda n: layers.SeparableConv1D(n, 2), (4, 8)),
            r"only layers of these.*SeparableConv1D",
        ),
        (
            single(lambda n: layers.DepthwiseConv1D(2, depth_multiplier=n), (4, 8)),
            r"only layers of these.*DepthwiseConv1D",
        ),
        (
            single(lambda n: layers.Conv2DTranspose(n, 2), (4, 4, 8)),
            r"only layers of these.*Conv2DTranspose",
        ),
        (
            single(lambda n: layers.TimeDistributed(layers.Dense(n)), (4, 8)),
            r"only layers of these.*TimeDistributed",
        ),
        (
            single(lambda n: layers.Embedding(n, 4), (4,), dtype="int32"),
            r"neither its fan-in nor its fan-out.*Embedding.*\(12, 4\)",
        ),
        (
            single(lambda n: layers.Conv1D(8, n // 4, padding="same"), (4, 8)),
            r"neither its fan-in nor its fan-out.*Conv1D",
        ),
        (
            single(lambda n: layers.Conv1D(12, 1, groups=n // 2), (4, 12)),
            r"neither its fan-in nor its fan-out.*Conv1D",
        ),
        (
            single(
                lambda n: keras.Sequential(
                    [
                        layers.Dense(n),
                        layers.Reshape((n, 1)),
                        layers.EinsumDense("abc,bcd->abd", (n, 2)),
                    ]
                )
            ),
            r"neither its fan-in nor its fan-out.*EinsumDense",
        ),
        (
            single(
                lambda n: layers.EinsumDense("ab,bcd->acd", (n, 2), bias_axes="d"),
            ),
            r"bias does not grow as its outputs do.*EinsumDense",
        ),
        (
            single(
                lambda n: keras.Sequential(
                    [layers.Dense(n), layers.BatchNormalization(scale=False)]
                )
            ),
            r"a shift cannot be multiplied without a scale.*BatchNormalization",
        ),
        (
            single(lambda n: layers.Dense(n, kernel_initializer="ones")),
            r"initializer's kernels are.*unknown.*Ones.*VarianceScaling",
        ),
        (
            single(lambda n: layers.Dense(n, kernel_constraint="non_neg")),
            r"constraint would act on stored.*kernel_constraint.*NonNeg",
        ),
    ],
)
def test_layers_whose_role_cannot_be_told(make, message):
    refused(make, message)


def test_shared_kernels():
    def twice(width):
        inputs = keras.Input((64,))
        layer = layers.Dense(width, name="twice")
        h = layers.Concatenate()([layer(inputs), layer(-inputs)])
        return keras.Model(inputs, layers.Dense(3)(h))

    def tied(width):
        inputs = keras.Input((64,))
        first, second = (layers.Dense(width, use_bias=False) for _ in range(2))
        first.build((None, 64))
        second.build((None, 64))
        with compat.new_variables(second, [second._kernel]):
            second._kernel = first._kernel
        h = layers.Concatenate()([first(inputs), second(inputs)])
        return keras.Model(inputs, layers.Dense(3)(h))

    refused(twice, r"called more than once.*'twice'")
    small = twice(4)
    assert_equal(weights(kd.parametrize(small, small)), weights(small))
    refused(tied, "Kernels that layers share")
