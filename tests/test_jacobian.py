"""The Jacobian against finite differences, dense reverse mode and closed forms."""

import keras
import numpy as np
import pytest
from keras import ops
from small import KINDS, convnet, digit_images, digits, gates_of, mlp

import keras_dalign as kd
from keras_dalign.diagnostics import jacobian as jacobian_module
from keras_dalign.diagnostics.determinism import check_deterministic
from keras_dalign.diagnostics.engines import engine
from keras_dalign.diagnostics.jacobian_builder import jacobian
from keras_dalign.diagnostics.precision import float64_context, in_float64

BACKEND = keras.backend.backend()
L = keras.layers


def smooth(units=3, seed=0, inputs=5, **last):
    """No kinks: finite differences of it are accurate."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            L.Dense(4, "tanh", name="hidden", bias_initializer="random_normal"),
            L.Dense(units, name="logits", bias_initializer="random_normal", **last),
        ]
    )


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def exploiting(kind="shared", units=3, n=6, seed=0):
    model = kd.align(smooth(units, seed), n_samples=n, seed=seed, **KINDS[kind])
    model.start_exploiting()
    head, rng = model.head, np.random.default_rng(seed)
    head.q.assign(rng.normal(size=head.q.shape))
    head.bias.assign(rng.normal(size=head.bias.shape))
    return model


def outputs64(copy, x):
    with float64_context():
        tensors = keras.tree.map_structure(
            lambda leaf: ops.convert_to_tensor(
                leaf.astype("float64") if leaf.dtype.kind == "f" else leaf
            ),
            x,
        )
        return np.asarray(ops.convert_to_numpy(copy(tensors, training=False)))


def finite_differences(model, x, variables, step=1e-5):
    """`J`, entry by entry, by central differences of a float64 copy."""
    copy = in_float64(model)
    places = {id(v): i for i, v in enumerate(model.weights)}
    columns = []
    for variable in variables:
        twin = copy.weights[places[id(variable)]]
        value = np.array(ops.convert_to_numpy(twin))
        for index in np.ndindex(*value.shape):
            moved = []
            for sign in (1, -1):
                at = value.copy()
                at[index] += sign * step
                with float64_context():
                    twin.assign(at)
                moved.append(outputs64(copy, x).ravel())
            columns.append((moved[0] - moved[1]) / (2 * step))
        with float64_context():
            twin.assign(value)
    return np.stack(columns, axis=1)


def reverse_mode(model, x, variables):
    """`J`, row by row, by the backend's plain gradient of each output, on TensorFlow.

    On the other backends, a column of it: a directional difference.
    """
    import tensorflow as tf

    copy = in_float64(model)
    places = {id(v): i for i, v in enumerate(model.weights)}
    twins = [copy.weights[places[id(v)]].value for v in variables]
    with tf.GradientTape(persistent=True) as tape:
        outputs = tf.reshape(copy(tf.constant(x, "float64"), training=False), (-1,))
        entries = tf.unstack(outputs)
    return np.stack(
        [
            np.concatenate(
                [
                    np.ravel(g.numpy())
                    for g in tape.gradient(entry, twins, unconnected_gradients="zero")
                ]
            )
            for entry in entries
        ]
    )


def assert_operator(J, dense, tolerance=1e-11, everything=False):
    """`J` against a dense one."""
    rng = np.random.default_rng(7)
    assert J.shape == dense.shape == (J.n * J.units, J.theta().size)
    v, u = rng.normal(size=J.shape[1]), rng.normal(size=J.shape[0])
    pairs = [
        (J.dense(), dense),
        (J.matvec(v), dense @ v),
        (J.rmatvec(u), dense.T @ u),
    ]
    if everything:
        V, U = rng.normal(size=(J.shape[1], 3)), rng.normal(size=(J.shape[0], 3))
        operator = J.to_scipy()
        pairs += [
            (J.matmat(V), dense @ V),
            (J.rmatmat(U), dense.T @ U),
            (operator @ v, dense @ v),
            (operator.T @ u, dense.T @ u),
            (operator @ V, dense @ V),
            (operator.T @ U, dense.T @ U),
        ]
    for found, expected in pairs:
        assert found.dtype == np.float64
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=tolerance * np.abs(dense).max() * len(v)
        )
    # Whatever the reference: the two products are each other's transpose.
    left, right = u @ J.matvec(v), J.rmatvec(u) @ v
    assert abs(left - right) <= 1e-12 * np.abs(u) @ np.abs(dense) @ np.abs(v)


def assert_directions(J, tolerance=1e-7):
    """`J` against differences along directions: cheaper than entry by entry."""
    u = np.random.default_rng(9).normal(size=J.shape[0])
    transposed = J.rmatvec(u)
    for seed in range(3):
        v = np.random.default_rng(seed).normal(size=J.shape[1])
        v /= np.linalg.norm(v)
        plus, minus = (J.at(J.theta() + s * 1e-5 * v).outputs() for s in (1, -1))
        difference = (plus - minus).ravel() / 2e-5
        scale = np.abs(difference).max()
        product = J.matvec(v)
        np.testing.assert_allclose(product, difference, rtol=0, atol=tolerance * scale)
        assert abs(u @ product - transposed @ v) <= 1e-12 * scale * np.abs(u).sum()


CASES = {
    "smooth": (smooth, lambda: normal(7, 5)),
    "one output": (lambda: smooth(1), lambda: normal(4, 5)),
    "one sample": (smooth, lambda: normal(1, 5)),
    "no bias": (lambda: smooth(use_bias=False), lambda: normal(5, 5)),
    "tanh behind": (lambda: smooth(activation="tanh"), lambda: normal(5, 5)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parameters", ["last", "all"])
def test_products_agree_with_finite_differences(case, parameters):
    make, data = CASES[case]
    model, x = make(), data()
    J = jacobian(model, x, parameters, batch_size=3)
    expected = model.layers[1].weights if parameters == "last" else model.weights
    assert [v.path for v in J.variables] == [v.path for v in expected]
    assert all(a is b for a, b in zip(J.variables, expected, strict=True))
    structured = parameters == "last" and case != "tanh behind"
    assert J.kind == ("last" if structured else "generic")
    assert J.dtype == "float64"
    assert J.dtype_reason == ""
    dense = finite_differences(model, x, J.variables)
    assert_operator(J, dense, 1e-9, everything=case == "smooth")
    np.testing.assert_allclose(
        J.outputs(), outputs64(in_float64(model), x), rtol=0, atol=1e-13
    )
    np.testing.assert_array_equal(
        J.theta(), np.concatenate([np.ravel(v) for v in map(_numpy, J.variables)])
    )


def _numpy(variable):
    return np.asarray(ops.convert_to_numpy(variable)).astype("float64")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("units", [1, 3])
def test_heads_are_block_diagonal_and_linear(kind, units):
    model, x = exploiting(kind, units), normal(6, 5)
    J = jacobian(model, x, "head", batch_size=4)
    assert J.kind == "head"
    assert J.variables[0] is model.head.q
    assert J.variables[1] is model.head.bias
    # By hand: class c's rows against class c's columns, nothing else.
    head = model.head
    d, _, m = head.q.shape
    trunk = outputs64(in_float64(model.trunk), x)
    zh = head.normalize_exactly(trunk)
    dense = np.zeros((6, units, d, units, m))
    for c in range(units):
        r, w = gates_of(head, c)
        dense[:, c, :, c] = (
            zh[:, :, None] * (w / (1 + np.exp(-head.slope * zh @ r)))[:, None, :]
        )
    bias = np.broadcast_to(np.eye(units), (6, units, units))
    dense = np.concatenate([dense.reshape(6, units, -1), bias], axis=2)
    dense = dense.reshape(6 * units, -1)
    assert_operator(J, dense, everything=True)
    linear = J.offset() + (dense @ J.theta()).reshape(6, units)
    np.testing.assert_allclose(J.outputs(), linear, atol=1e-12)
    np.testing.assert_allclose(J.outputs(), model.predict(x, verbose=0), atol=1e-4)
    if kind != "learned":
        kernel, b0 = (w.astype("float64") for w in head.dense.get_weights())
        np.testing.assert_allclose(J.offset(), trunk @ kernel + b0, atol=1e-12)
    else:
        np.testing.assert_array_equal(J.offset(), 0.0)
    generic = jacobian(model, x, head.exploited_variables, batch_size=4)
    assert generic.kind == "generic"
    assert_operator(generic, dense)


def test_last_layer_is_a_kronecker_product():
    x, _ = digits(9)
    model = mlp()
    J = jacobian(model, x, "last", batch_size=4)
    assert J.features.shape == (9, 17)
    np.testing.assert_array_equal(J.features[:, -1], 1.0)
    assert_operator(J, np.kron(J.features, np.eye(10)))
    generic = jacobian(model, x, model.layers[-1].weights, batch_size=4)
    np.testing.assert_allclose(J.dense(), generic.dense(), atol=1e-12)


def test_parameters_of_aligned_models():
    x, _ = digits(8)
    base = mlp()
    model = kd.align(base, n_samples=8, seed=0)
    J = jacobian(model, x, "last")
    assert J.kind == "last"
    np.testing.assert_allclose(J.dense(), jacobian(base, x, "last").dense())
    assert [v.path for v in jacobian(model, x, "all").variables] == [
        v.path for v in model.trainable_variables
    ]
    with pytest.raises(ValueError, match="no alignment head that exploits"):
        jacobian(model, x, "head")
    model.start_exploiting()
    assert jacobian(model, x, "last").kind == "head"
    J = jacobian(model, x, "all", batch_size=8)
    head = model.head
    expected = [*base.weights, head.q, head.bias]
    assert [v.path for v in J.variables] == [v.path for v in expected]
    assert not any(v is head.r for v in J.variables)
    columns = J.shape[1] - head.q.shape[0] * 10 * head.width - 10
    np.testing.assert_allclose(
        J.dense()[:, columns:], jacobian(model, x, "head").dense(), atol=1e-12
    )


def test_learned_gates_that_still_explore_have_no_structure():
    model = kd.align(smooth(), n_samples=6, gates="learned")
    x = normal(4, 5)
    J = jacobian(model, x, "last")
    assert J.kind == "generic"
    assert_operator(J, finite_differences(model, x, J.variables), tolerance=1e-8)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the reference is TensorFlow's")
def test_products_agree_with_the_framework_on_an_image_model():
    x, model = digit_images(5)[0], convnet()
    keras.utils.set_random_seed(1)
    statistics = model.get_layer("bn")
    statistics.moving_mean.assign(np.linspace(-0.1, 0.1, 6))
    statistics.moving_variance.assign(np.linspace(0.5, 2.0, 6))
    J = jacobian(model, x, "all", batch_size=2)
    assert_operator(J, reverse_mode(model, x, J.variables))


def test_image_models_agree_with_directional_differences():
    x = normal(5, 8, 8, 1)
    keras.utils.set_random_seed(0)
    model = kd.models.resnet(8, (8, 8, 1), classes=2, width=2)
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):
            rng = np.random.default_rng(len(layer.name))
            layer.moving_mean.assign(rng.normal(size=layer.moving_mean.shape))
            layer.moving_variance.assign(1 + rng.random(layer.moving_mean.shape))
    J = jacobian(model, x, "all", batch_size=3)
    v = np.random.default_rng(1).normal(size=J.shape[1])
    # So small a step crosses no kink of a ReLU, and float64 still resolves it.
    plus, minus = (J.at(J.theta() + s * 1e-7 * v).outputs() for s in (1, -1))
    difference = (plus - minus).ravel() / 2e-7
    scale = np.abs(difference).max()
    np.testing.assert_allclose(J.matvec(v), difference, rtol=0, atol=1e-6 * scale)
    dense = J.dense()
    assert_operator(J, dense)


@pytest.mark.parametrize("layer", ["gru", "attention", "embedding", "convolutions"])
def test_layers_of_other_kinds(layer):
    keras.utils.set_random_seed(0)
    if layer == "gru":
        inputs = keras.Input((3, 2))
        h, x = L.GRU(2)(inputs), normal(2, 3, 2)
    elif layer == "attention":
        inputs = keras.Input((4, 2))
        h = L.LayerNormalization()(inputs)
        h = L.GlobalAveragePooling1D()(L.MultiHeadAttention(1, 2)(h, h))
        x = normal(3, 4, 2)
    elif layer == "embedding":
        inputs = keras.Input((3,), dtype="int32")
        h, x = L.Flatten()(L.Embedding(5, 2)(inputs)), np.arange(9).reshape(3, 3) % 5
    else:
        inputs = keras.Input((3, 3, 1))
        h = L.UpSampling2D(2)(L.Conv2D(2, 2)(inputs))
        h, x = L.Flatten()(L.DepthwiseConv2D(2)(h)), normal(3, 3, 3, 1)
    model = keras.Model(inputs, L.Dense(2)(L.Activation("tanh")(h)))
    J = jacobian(model, x, "all", batch_size=2)
    if layer == "attention" and BACKEND == "jax":
        # JAX's attention sums in float32 whatever it is given, and that is told.
        assert J.dtype == "float32"
        return
    assert J.dtype == "float64"
    assert_directions(J)
    if layer != "gru":  # Its rows take TensorFlow long to trace.
        assert_operator(J, J.dense())


class Narrow(L.Layer):
    """Computes in float32 whatever it is given."""

    def call(self, x):
        return ops.cast(ops.tanh(ops.cast(x, "float32")), x.dtype)


@pytest.mark.parametrize("parameters", ["last", "all"])
def test_float32_within_a_float64_copy_is_told(parameters):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((5,)), L.Dense(30, "tanh"), Narrow(), L.Dense(3)]
    model, x = keras.Sequential(layers), normal(5, 5)
    J = jacobian(model, x, parameters)
    assert J.dtype == "float32"
    assert "computes in float32" in J.dtype_reason


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32"])
@pytest.mark.parametrize("parameters", ["last", "all"])
def test_weights_of_any_precision_are_judged_in_float64(policy, parameters):
    keras.config.set_dtype_policy(policy)
    try:
        model = smooth()
    finally:
        keras.config.set_dtype_policy("float32")
    wide = smooth()
    wide.set_weights([w.astype("float32") for w in model.get_weights()])
    x = normal(5, 5)
    J, K = jacobian(model, x, parameters), jacobian(wide, x, parameters)
    assert J.dtype == "float64"
    np.testing.assert_allclose(J.dense(), K.dense(), rtol=0, atol=1e-14)


def test_own_dtype_on_request():
    model, x = smooth(), normal(5, 5)
    J = jacobian(model, x, "all", dtype=None)
    assert J.dtype == "float32"
    assert "was requested" in J.dtype_reason
    dense = jacobian(model, x, "all").dense()
    assert np.abs(J.dense() - dense).max() > 1e-9
    np.testing.assert_allclose(J.dense(), dense, atol=1e-5)


class Opaque(keras.Model):
    """Cannot be rebuilt; and, with a gain, would be rebuilt wrongly."""

    def __init__(self, gain=None, config=True):
        super().__init__()
        self.gain, self.config = gain or 1.0, config
        self.hidden = L.Dense(4, "tanh")
        self.last = L.Dense(3)

    def call(self, x):
        return self.last(self.gain * self.hidden(x))

    def get_config(self):
        if not self.config:
            raise NotImplementedError("no config")
        return {}


@pytest.mark.parametrize("arguments", [{"config": False}, {"gain": 3.0}])
def test_models_that_cannot_be_rebuilt_say_so(arguments):
    model, x = Opaque(**arguments), normal(5, 5)
    model(x)
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    J = jacobian(model, x, "last", batch_size=2)
    assert (J.kind, J.dtype) == ("last", "float32")
    reason = "computes something else" if "gain" in arguments else "no config"
    assert reason in J.dtype_reason
    K = jacobian(model, x, "all", batch_size=2)
    assert (K.kind, K.dtype) == ("generic", "float32")
    np.testing.assert_allclose(K.dense()[:, -15:], J.dense(), atol=1e-5)
    np.testing.assert_allclose(J.outputs(), model.predict(x, verbose=0), atol=1e-5)
    assert [len(layer._inbound_nodes) for layer in model.layers] == nodes
    # It works on the model itself, whose weights must not move.
    model.last.kernel.assign(np.ones((4, 3)))
    with pytest.raises(ValueError, match="weights have changed"):
        K.matvec(np.zeros(K.shape[1]))


def test_rebuildable_models_may_train_on():
    model, x = smooth(), normal(5, 5)
    J = jacobian(model, x, "all", batch_size=3)
    v = np.ones(J.shape[1])
    before = J.matvec(v)
    model.layers[0].kernel.assign(np.zeros((5, 4)))
    np.testing.assert_array_equal(J.matvec(v), before)


@pytest.mark.parametrize("kind", ["generic", "last", "head"])
def test_at_other_parameters(kind):
    x = normal(5, 5)
    if kind == "head":
        model = exploiting()
        J = jacobian(model, x, "head")
    else:
        model = smooth()
        J = jacobian(model, x, "last" if kind == "last" else "all", batch_size=2)
    assert J.kind == kind
    theta = J.theta() + np.random.default_rng(3).normal(size=J.shape[1])
    there = J.at(theta)
    np.testing.assert_array_equal(there.theta(), theta)
    start = 0
    for variable in J.variables:
        size = int(np.prod(variable.shape))
        variable.assign(theta[start : start + size].reshape(variable.shape))
        start += size
    # The model's weights are float32.
    moved = jacobian(model, x, J.variables)
    np.testing.assert_allclose(there.outputs(), moved.outputs(), atol=1e-4)
    np.testing.assert_allclose(there.dense(), moved.dense(), atol=1e-4)
    v, u = np.ones(J.shape[1]), np.ones(J.shape[0])
    dense = there.dense()
    np.testing.assert_allclose(there.matvec(v), dense @ v, atol=1e-10)
    np.testing.assert_allclose(there.rmatvec(u), dense.T @ u, atol=1e-10)
    np.testing.assert_allclose(there.matmat(v[:, None])[:, 0], dense @ v, atol=1e-10)
    np.testing.assert_allclose(there.rmatmat(u[:, None])[:, 0], dense.T @ u, atol=1e-10)


def test_two_inputs_of_any_structure():
    a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    h = L.Concatenate()([L.Dense(2, "tanh")(a), b])
    model = keras.Model({"a": a, "b": b}, L.Dense(2)(h))
    x = {"a": normal(5, 2), "b": normal(5, 3, seed=1)}
    J = jacobian(model, x, "all", batch_size=2)
    assert_operator(J, finite_differences(model, x, J.variables), tolerance=1e-9)
    last = jacobian(model, x, "last", batch_size=2)
    assert last.kind == "last"
    np.testing.assert_allclose(last.dense(), J.dense()[:, -12:], atol=1e-12)


def test_nested_and_merged_last_layers():
    inputs = keras.Input((5,))
    inner_in = keras.Input((5,))
    inner = keras.Model(inner_in, L.Dense(3)(L.Dense(4, "tanh")(inner_in)))
    nested = keras.Model(inputs, L.Activation("linear")(inner(inputs)))
    x = normal(4, 5)
    J = jacobian(nested, x, "last")
    assert J.kind == "last"
    assert [v.path for v in J.variables] == [v.path for v in inner.layers[2].weights]
    h = L.Dense(4, "tanh")(inputs)
    both = [L.Dense(3), L.Dense(3, use_bias=False)]
    merged = keras.Model(inputs, L.Add()([both[0](inputs), both[1](h)]))
    J = jacobian(merged, x, "last")
    assert J.kind == "generic"
    assert {v.path for v in J.variables} == {v.path for d in both for v in d.weights}
    skip = keras.Model(inputs, L.Add()([L.Dense(4, name="end")(h), h]))
    J = jacobian(skip, x, "last")
    assert [v.path for v in J.variables] == ["end/kernel", "end/bias"]
    assert_operator(J, finite_differences(skip, x, J.variables), tolerance=1e-9)


def test_tied_weights_are_not_taken_for_a_linear_layer():
    inputs = keras.Input((4,))
    dense = L.Dense(4)
    model = keras.Model(inputs, dense(L.Activation("tanh")(dense(inputs))))
    x = normal(5, 4)
    J = jacobian(model, x, "last")
    assert J.kind == "generic"
    assert_operator(J, finite_differences(model, x, J.variables), tolerance=1e-9)


def test_stacks_and_blocks_of_any_width(monkeypatch):
    model, x = smooth(), normal(7, 5)
    J = jacobian(model, x, "all", batch_size=3)
    dense = J.dense()
    V = np.random.default_rng(0).normal(size=(J.shape[1], 5))
    U = np.random.default_rng(0).normal(size=(J.shape[0], 5))
    monkeypatch.setattr(jacobian_module, "_MAX_STACK", 2)
    np.testing.assert_allclose(J.matmat(V), dense @ V, atol=1e-12)
    np.testing.assert_allclose(J.rmatmat(U), dense.T @ U, atol=1e-12)
    assert J.matmat(V[:, :0]).shape == (21, 0)
    kinds = [J, jacobian(model, x, "last"), jacobian(exploiting(), x, "head")]
    for J in kinds:
        dense = J.dense()
        per_sample = 8 * J.units * J.shape[1]
        for max_bytes in (1, per_sample, 2 * per_sample, 10**9):
            blocks = list(J.row_blocks(max_bytes))
            limit = max(max_bytes, per_sample)
            assert all(block.nbytes <= limit for _, block in blocks)
            starts = [rows.start for rows, _ in blocks]
            assert starts == sorted(starts)
            np.testing.assert_allclose(
                np.concatenate([block for _, block in blocks]), dense, atol=1e-13
            )
            np.testing.assert_array_equal(
                np.concatenate([np.arange(21)[rows] for rows, _ in blocks]),
                np.arange(21),
            )


def test_ragged_batches_are_not_compiled_again(monkeypatch):
    model, x = smooth(), normal(7, 5)
    J = jacobian(model, x, "all", batch_size=3)
    shapes = set()
    call = type(J._engine)._run

    def spy(self, function, *arguments):
        shapes.add(tuple(keras.tree.flatten(arguments[1])[0].shape))
        return call(self, function, *arguments)

    monkeypatch.setattr(type(J._engine), "_run", spy)
    J.matvec(np.ones(J.shape[1]))
    J.rmatmat(np.ones((J.shape[0], 2)))
    J.dense()
    assert shapes == {(3, 5)}


class Batches(keras.utils.PyDataset):
    """A stream of ragged batches; what it does in later passes can be spoilt."""

    def __init__(self, x, sizes=(3, 1, 2), targets=False):
        super().__init__()
        self.x, self.targets = x, targets
        self.ends = np.cumsum([0, *sizes])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        batch = self.x[self.ends[index] : self.ends[index + 1]]
        return (batch, np.zeros(len(batch))) if self.targets else (batch,)


@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("parameters", ["last", "all"])
def test_streams_of_ragged_batches(parameters, targets):
    model, x = smooth(), normal(6, 5)
    J = jacobian(model, Batches(x, targets=targets), parameters)
    assert J.n == 6
    assert_operator(J, jacobian(model, x, parameters).dense())
    # A larger batch behind a smaller one is nothing special.
    J = jacobian(model, Batches(x, sizes=(1, 5)), parameters)
    assert_operator(J, jacobian(model, x, parameters).dense())


def test_streams_that_change_are_an_error():
    model, x = smooth(), normal(6, 5)
    stream = Batches(x.copy())
    J = jacobian(model, stream, "all")
    v, u = np.ones(J.shape[1]), np.ones(J.shape[0])
    stream.x = x[::-1]
    for product in (lambda: J.matvec(v), lambda: J.rmatvec(u), J.dense):
        with pytest.raises(ValueError, match="batch 0 is not what it was"):
            product()
    stream.x = x
    stream.ends = np.array([0, 3, 4])
    with pytest.raises(ValueError, match="2 batches instead of 3"):
        J.matvec(v)
    stream.ends = np.array([0, 3, 4, 6, 6 + 1])
    stream.x = np.concatenate([x, x[:1]])
    with pytest.raises(ValueError, match="more than 3 batches"):
        J.matvec(v)
    stream.ends = np.array([0, 3, 4, 6])
    J.matvec(v)
    # Arrays that are written to are no better.
    J = jacobian(model, x, "all")
    x[2, 1] += 1
    with pytest.raises(ValueError, match="The data changed between two passes"):
        J.matvec(v)


def test_bad_data_are_errors():
    model, x = smooth(), normal(6, 5)
    with pytest.raises(ValueError, match=r"a generator does not allow.*generator"):
        jacobian(model, (x[i : i + 1] for i in range(6)), "all")
    with pytest.raises(ValueError, match="empty"):
        jacobian(model, x[:0], "all")
    broken = x.copy()
    broken[4, 0] = np.nan
    with pytest.raises(ValueError, match=r"inputs `x` are not finite.*batch 1"):
        jacobian(model, broken, "all", batch_size=3)
    model.layers[0].kernel.assign(np.full((5, 4), np.inf))
    with pytest.raises(ValueError, match=r"outputs are not finite.*batch 0"):
        jacobian(model, x, "all")


def test_bad_parameters_are_errors():
    model, x = smooth(), normal(6, 5)
    kernel = model.layers[0].kernel
    other = smooth().layers[0].kernel
    dropout = keras.Sequential([keras.Input((5,)), L.Dropout(0.5), L.Dense(2)])
    for parameters, match in [
        ("first", "must be one of"),
        (kernel, "or a list of variables"),
        ([other], "must be variables of the model"),
        ([np.zeros(3)], "must be variables of the model"),
        ([kernel, kernel], "twice"),
        ([], "no parameters"),
        ("head", "no alignment head"),
    ]:
        with pytest.raises(ValueError, match=match):
            jacobian(model, x, parameters)
    del dropout
    head = kd.align(smooth(), n_samples=6)
    head.start_exploiting()
    with pytest.raises(ValueError, match="not floating"):
        jacobian(head, x, [head.head._phase_index])
    model.trainable = False
    with pytest.raises(ValueError, match="without trainable variables"):
        jacobian(model, x, "all")
    assert jacobian(model, x, "last").kind == "last"
    with pytest.raises(ValueError, match="`dtype` must be"):
        jacobian(model, x, "last", dtype="float32")
    with pytest.raises(ValueError, match=r"built keras\.Model"):
        jacobian(keras.Sequential([L.Dense(2)]), x)


def test_vectors_of_other_lengths_are_errors():
    model, x = smooth(), normal(6, 5)
    for parameters in ("last", "all"):
        J = jacobian(model, x, parameters)
        rows, columns = J.shape
        for product, shape in [
            (J.matvec, (columns + 1,)),
            (J.rmatvec, (columns,)),
            (J.matmat, (rows, 2)),
            (J.rmatmat, (columns, 2)),
            (J.at, (columns - 1,)),
        ]:
            with pytest.raises(ValueError, match=r"must have \d+ (entries|rows)"):
                product(np.zeros(shape))


def test_models_with_other_outputs_are_errors():
    inputs = keras.Input((4, 4, 1))
    maps = keras.Model(inputs, L.Conv2D(2, 2)(inputs))
    with pytest.raises(ValueError, match=r"one output of shape \(batch, C\)"):
        jacobian(maps, normal(3, 4, 4, 1), "all")
    inputs = keras.Input((5,))
    two = keras.Model(inputs, [L.Dense(1)(inputs), L.Dense(2)(inputs)])
    with pytest.raises(ValueError, match=r"one output of shape \(batch, C\)"):
        jacobian(two, normal(3, 5), "all")


def test_dense_says_what_it_would_take(monkeypatch):
    J = jacobian(smooth(), normal(6, 5), "all")
    monkeypatch.setattr("keras_dalign.numerics.memory.free_gib", lambda: 1e-9)
    with pytest.raises(MemoryError, match=r"would take .* GiB .* are free"):
        J.dense()


class Mixes(L.Layer):
    """Subtracts the mean of the batch."""

    def call(self, x):
        return x - ops.mean(x, axis=0, keepdims=True)


class Counts(L.Layer):
    """Changes a variable whenever it is called."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1.0)
        return x


class Rolls(L.Layer):
    """Random, behind Keras's back."""

    def call(self, x):
        return x + float(np.random.default_rng().normal())


class AlwaysDrops(L.Dropout):
    """Monte Carlo dropout."""

    def call(self, inputs):
        return super().call(inputs, training=True)


class AlwaysNormalises(L.BatchNormalization):
    """By the batch's statistics in inference, too."""

    def call(self, inputs):
        return super().call(inputs, training=True)


def test_stochastic_models_are_refused_by_name():
    inputs = keras.Input((5,))
    x = normal(6, 5)
    dropped = AlwaysDrops(0.5, name="always_on")(inputs)
    plain = L.Dropout(0.5, name="innocent")(dropped)
    model = keras.Model(inputs, L.Dense(2)(plain))
    before = [np.array(ops.convert_to_numpy(v)) for v in model.variables]
    with pytest.raises(ValueError, match=r"by up to .*'always_on \(") as info:
        jacobian(model, x, "all")
    # PyTorch's own generator draws there, and no seed of Keras moves.
    assert ("innocent" in str(info.value)) == (BACKEND == "torch")
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
    normalised = AlwaysNormalises(name="live")(inputs)
    model = keras.Model(inputs, L.Dense(2)(normalised))
    with pytest.raises(ValueError, match=r"changes the variables.*live"):
        check_deterministic(model, x)
    model = keras.Sequential([keras.Input((5,)), Counts(name="counts"), L.Dense(2)])
    with pytest.raises(ValueError, match=r"changes the variables.*counts"):
        check_deterministic(model, x)
    assert float(ops.convert_to_numpy(model.layers[0].calls)) == 0
    model = keras.Sequential([keras.Input((5,)), Rolls(), L.Dense(2)])
    with pytest.raises(ValueError, match="two passes over the same batch differ"):
        check_deterministic(model, x)
    check_deterministic(keras.Sequential([keras.Input((5,)), L.Dropout(0.5)]), x)


def test_models_that_mix_samples_are_refused():
    model = keras.Sequential([keras.Input((5,)), Mixes(), L.Dense(2)])
    with pytest.raises(ValueError, match="depend on the other samples of its batch"):
        jacobian(model, normal(6, 5), "all")


def test_the_model_is_left_alone():
    model, x = convnet(), digit_images(6)[0]
    model.compile("adam", "mse")
    weights = model.get_weights()
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    J = jacobian(model, x, "all", batch_size=4)
    J.matvec(np.ones(J.shape[1]))
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [len(layer._inbound_nodes) for layer in model.layers] == nodes
    assert model.predict(x, verbose=0).dtype == np.float32


def test_engines_products_agree():
    copy, x = in_float64(smooth()), normal(4, 5).astype("float64")
    derivatives = engine(copy, copy.trainable_variables)
    rows = derivatives.rows(x)
    rng = np.random.default_rng(0)
    V, U = rng.normal(size=(3, derivatives.size)), rng.normal(size=(3, 4, 3))
    np.testing.assert_allclose(
        derivatives.jvps(x, V), np.einsum("bcp,kp->kbc", rows, V), atol=1e-12
    )
    np.testing.assert_allclose(
        derivatives.vjps(x, U), np.einsum("bcp,kbc->kp", rows, U), atol=1e-12
    )
    for k in range(3):
        np.testing.assert_allclose(
            derivatives.jvp(x, V[k]), derivatives.jvps(x, V)[k], atol=1e-13
        )
        np.testing.assert_allclose(
            derivatives.vjp(x, U[k]), derivatives.vjps(x, U)[k], atol=1e-13
        )
