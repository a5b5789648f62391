"""The tangent kernel against dense Jacobians and closed forms."""

import keras
import numpy as np
import pytest
from keras import ops
from scipy.sparse.linalg import lsmr
from small import KINDS, convnet, digit_images, digits, mlp

import keras_dalign as kd
from keras_dalign.diagnostics import tangent_kernel as module

L = keras.layers


def smooth(units=3, seed=0, **last):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((5,)),
            L.Dense(4, "tanh", bias_initializer="random_normal"),
            L.Dense(units, bias_initializer="random_normal", **last),
        ]
    )


def recurrent(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((3, 5)), L.SimpleRNN(4, "relu"), L.Dense(2)])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def exploiting(kind="shared", seed=0):
    model = kd.align(smooth(seed=seed), n_samples=6, seed=seed, **KINDS[kind])
    model.start_exploiting()
    rng = np.random.default_rng(seed)
    model.head.q.assign(rng.normal(size=model.head.q.shape))
    return model


def dense(model, x, parameters="all"):
    """The dense Jacobian, and how many columns each variable has."""
    J = kd.jacobian(model, x, parameters)
    return J.dense(), [int(np.prod(v.shape)) for v in J.variables]


def dense_kernel(model, x, x2, parameters, weights):
    """By dense Jacobians, one entry of the weights a column."""
    (left, sizes), (right, _) = (dense(model, each, parameters) for each in (x, x2))
    return left * np.repeat(weights, sizes) @ right.T


def assert_close(kernel, expected):
    assert kernel.dtype == np.float64
    assert kernel.shape == expected.shape
    tolerance = 1e-12 * np.abs(expected).max()
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=tolerance)


CASES = {
    "dense": (smooth, (7, 5)),
    "one output, one sample": (lambda: smooth(1), (1, 5)),
    "recurrent": (recurrent, (2, 3, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_dense_jacobians(case):
    make, shape = CASES[case]
    model, x, x2 = make(), normal(*shape), normal(4, *shape[1:], seed=1)
    (left, sizes), (right, _) = dense(model, x), dense(model, x2)
    kernel = kd.tangent_kernel(model, x, batch_size=3)
    assert_close(kernel, left @ left.T)
    np.testing.assert_array_equal(kernel, kernel.T)
    weights = np.random.default_rng(2).random(len(sizes))
    weights[1] = 0.0
    kernel = kd.tangent_kernel(model, x, x2, weights=weights, batch_size=3)
    assert_close(kernel, left * np.repeat(weights, sizes) @ right.T)


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_last_layer_needs_its_features_alone(use_bias):
    model = smooth(use_bias=use_bias)
    x, x2 = normal(6, 5), normal(3, 5, seed=1)
    weights = [0.3, 2.0][: 1 + use_bias]
    for other in (None, x2):
        kernel = kd.tangent_kernel(model, x, other, "last", weights)
        second = x if other is None else other
        assert_close(kernel, dense_kernel(model, x, second, "last", weights))
        # The same variables, without the structure.
        variables = model.layers[-1].weights
        assert_close(kernel, kd.tangent_kernel(model, x, other, variables, weights))
    square = kd.tangent_kernel(model, x, None, "last", weights)
    np.testing.assert_array_equal(square, square.T)
    hidden = ops.convert_to_numpy(model.layers[0](x)).astype("float64")
    gram = 0.3 * hidden @ hidden.T + (2.0 if use_bias else 0.0)
    np.testing.assert_allclose(square, np.kron(gram, np.eye(3)), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_alignment_head_has_a_block_an_output(kind):
    model, x, x2 = exploiting(kind), normal(6, 5), normal(3, 5, seed=1)
    for other in (None, x2):
        second = x if other is None else other
        kernel = kd.tangent_kernel(model, x, other, "head", [0.5, 3.0])
        assert_close(kernel, dense_kernel(model, x, second, "head", [0.5, 3.0]))
    square = kd.tangent_kernel(model, x, parameters="head")
    np.testing.assert_array_equal(square, square.T)


def test_images_of_all_layers():
    model, x = convnet(), digit_images(9)[0]
    weights = np.linspace(0, 1, len(model.trainable_variables))
    kernel = kd.tangent_kernel(model, x[:5], x[5:], weights=weights, batch_size=2)
    assert_close(kernel, dense_kernel(model, x[:5], x[5:], "all", weights))


def test_a_few_rows_are_held_at_a_time(monkeypatch):
    model, x, x2 = smooth(), normal(7, 5), normal(5, 5, seed=1)
    J = kd.jacobian(model, x)
    sample = 8 * J.units * J.shape[1]
    whole = [kd.tangent_kernel(model, x), kd.tangent_kernel(model, x, x2)]
    row_blocks, products = kd.Jacobian.row_blocks, []

    def counted(self, max_bytes):
        assert max_bytes == module._BLOCK_BYTES
        for rows, block in row_blocks(self, max_bytes):
            assert block.nbytes <= max(max_bytes, sample)
            products.append(rows)
            yield rows, block

    monkeypatch.setattr(kd.Jacobian, "row_blocks", counted)
    for held, n_lots in [(1, 7), (2 * sample, 4), (4 * sample, 2), (10**9, 1)]:
        monkeypatch.setattr(module, "_HELD_BYTES", held)
        monkeypatch.setattr(module, "_BLOCK_BYTES", 1)
        products.clear()
        kernel = kd.tangent_kernel(model, x)
        assert_close(kernel, whole[0])
        np.testing.assert_array_equal(kernel, kernel.T)
        # One pass to hold the rows, one more for each lot, none if one lot holds all.
        assert len(products) == 7 * (1 if n_lots == 1 else 1 + n_lots)
        products.clear()
        assert_close(kd.tangent_kernel(model, x, x2), whole[1])
        assert len(products) == 7 + 5 * n_lots


def test_streams():
    model, x = smooth(), normal(6, 5)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return (x[index * 2 : index * 2 + 2],)

    kernel = kd.tangent_kernel(model, Batches(), x[:4])
    assert_close(kernel, kd.tangent_kernel(model, x)[:, :12])


def test_a_structure_that_holds_on_some_data_only_is_not_used():
    keras.utils.set_random_seed(0)

    class Clipped(L.Layer):
        def call(self, inputs):
            return ops.minimum(inputs, 1.0)

    inputs = keras.Input((5,))
    h = Clipped()(L.Dense(3, name="end")(inputs))
    model = keras.Model(inputs, h)
    small, large = 1e-3 * normal(4, 5), 10 * normal(4, 5, seed=1)
    assert [kd.jacobian(model, x, "last").kind for x in (small, large)] == [
        "last",
        "generic",
    ]
    for x, x2 in ((small, large), (large, small)):
        kernel = kd.tangent_kernel(model, x, x2, "last")
        assert_close(kernel, kd.tangent_kernel(model, x, x2, model.weights))


def test_weights_by_path():
    model, x = smooth(), normal(4, 5)
    paths = [v.path for v in model.weights]
    named = dict(zip(reversed(paths), (4.0, 3, np.float32(2), 1.0), strict=True))
    assert_close(
        kd.tangent_kernel(model, x, weights=named),
        dense_kernel(model, x, x, "all", [1, 2, 3, 4]),
    )


def test_bad_weights_are_errors():
    model, x = smooth(), normal(4, 5)
    paths = [v.path for v in model.weights]
    for weights, match in [
        ([1.0, 1.0], r"one number per variable, 4 in all.*Received: 2 numbers"),
        ([1.0, -1.0, 1.0, 1.0], r"finite numbers, none negative.*-1.0 for '.*bias'"),
        ([1.0, np.nan, 1.0, 1.0], "finite numbers, none negative"),
        ([1.0, "a", 1.0, 1.0], "finite numbers, none negative"),
        ([np.ones(5)] * 4, "finite numbers, none negative"),
        ({paths[0]: 1.0}, "must name each variable of the Jacobian"),
        (dict.fromkeys([*paths, "other"], 1.0), r"numbers for \['other'\]"),
    ]:
        with pytest.raises(ValueError, match=match):
            kd.tangent_kernel(model, x, weights=weights)


def test_equal_paths_want_a_sequence():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    first, second = L.Dense(5, name="same"), L.Dense(2)
    model = keras.Model(inputs, second(first(inputs)))
    second.kernel._path = first.kernel.path
    with pytest.raises(ValueError, match="equal paths cannot be told apart"):
        kd.tangent_kernel(model, normal(3, 5), weights={first.kernel.path: 1.0})


def test_bad_data_are_errors():
    model, x = smooth(), normal(4, 5)
    broken = x.copy()
    broken[1] = np.inf
    with pytest.raises(ValueError, match=r"inputs .* are not finite"):
        kd.tangent_kernel(model, x, broken)
    keras.utils.set_random_seed(0)

    class Root(L.Layer):
        def call(self, inputs):
            return ops.sqrt(ops.abs(inputs))

    kernel = keras.initializers.Constant(0.0)
    layers = [keras.Input((5,)), L.Dense(2, kernel_initializer=kernel), Root()]
    with pytest.raises(ValueError, match="Jacobian must be finite"):
        kd.tangent_kernel(keras.Sequential(layers), x)


@pytest.mark.parametrize("parameters", ["all", "last"])
def test_what_does_not_fit_is_not_begun(monkeypatch, parameters):
    model, x = smooth(), normal(6, 5)

    def refuse(*_):
        raise AssertionError("begun")

    monkeypatch.setattr(module, "_by_rows", refuse)
    monkeypatch.setattr(module, "_of_last", refuse)
    J = kd.jacobian(model, x, parameters)
    monkeypatch.setattr(module, "jacobian", lambda *_, **__: J)
    monkeypatch.setattr("keras_dalign.numerics.memory.free_gib", lambda: 1e-6)
    with pytest.raises(MemoryError, match=r"The tangent kernel, 18 x 18, would take"):
        kd.tangent_kernel(model, x, parameters=parameters)


def test_a_gradient_step_of_all_weights_by_the_public_operator():
    # The example in the documentation: damped least squares, one Gauss-Newton step.
    x, y = digits(12)
    model = mlp()
    targets = np.eye(10)[y]
    J = kd.jacobian(model, x)
    error = (targets - model.predict(x, verbose=0)).ravel()
    step = lsmr(J.to_scipy(), error, damp=1e-3, maxiter=1000)[0]
    assert isinstance(J, kd.Jacobian)
    kernel = kd.tangent_kernel(model, x)
    dual = np.linalg.solve(kernel + 1e-6 * np.eye(len(kernel)), error)
    np.testing.assert_allclose(J.matvec(step), kernel @ dual, atol=1e-3)
    assert np.linalg.norm(J.matvec(step) - error) < 1e-2 * np.linalg.norm(error)
