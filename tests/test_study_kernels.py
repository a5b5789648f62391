"""Kernels of wide networks against Monte Carlo, dense Jacobians and sums by hand."""

import math

import keras
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

import keras_dalign as kd
from pipelines.studies import kernels, settings
from pipelines.studies.kernels import (
    arc_cosine,
    kernel_weights,
    layer_rates,
    network,
    random_features,
    recurrent,
)

TINY = {
    "feature_samples": 12,
    "feature_depths": [1, 2],
    "feature_dimensions": [16, 64],
    "feature_draws": 2,
    "ridge": 0.01,
    "network_samples": 3,
    "network_depth": 2,
    "network_widths": [4, 8],
    "recurrent_widths": [3, 6],
    "outputs": 2,
    "rate_samples": 5,
    "rate_widths": [4, 16],
    "rate": 1.0,
    "rate_steps": 20,
    "layer_rates": [2.0, 1.0, 0.5],
    "search_samples": 12,
    "search_tested": 10,
    "search_width": 8,
    "search_depth": 2,
    "ridges": [0.01, 0.1],
    "seeds": 1,
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_the_study_at_a_tiny_size():
    assert set(settings.load()["kernels"]) == set(TINY)
    rows = []
    for cell in kernels.cells(TINY):
        found = kernels.measure(TINY, cell)
        assert found
        for row in found:
            assert cell.items() <= row.items()
        rows += found
    claims = kernels.claims(rows, TINY)
    assert len({claim.name for claim in claims}) == len(claims) == 20
    assert all(len(claim.values) == 1 for claim in claims)
    # The validation error is what the search descends on, from equal weights.
    by_name = {claim.name: claim for claim in claims}
    assert max(by_name["search_validation"].values) <= 1.0
    axes = Figure().subplots(1, kernels.PANELS)
    kernels.draw(axes, rows)
    assert all(panel.get_xlabel() and panel.get_ylabel() for panel in axes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"width": 3}, r"`studies.kernels` has no key 'width'; the nearest is"),
        ({"network_widths": [4, 0]}, r"network_widths` .*Received: .*\[4, 0\]"),
        (
            {"feature_depths": []},
            "`studies.kernels.feature_depths` must be a list of integers",
        ),
        ({"ridge": 0.0}, "`studies.kernels.ridge` must be one number between 1e-12"),
        ({"rate": 2.0}, "`studies.kernels.rate` must be one number"),
        ({"feature_dimensions": [16, 17]}, r"must be even.*Received: \[17\]"),
        ({"search_tested": 1797}, "There are 1797 digits. Received: 1821"),
    ],
)
def test_settings_that_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        kernels.cells({**TINY, **changes})


def test_a_setting_that_is_missing():
    rest = {name: value for name, value in TINY.items() if name != "seeds"}
    with pytest.raises(ValueError, match=r"must have the keys .*, without seeds"):
        kernels.cells(rest)


def test_arc_cosine_kernels_by_monte_carlo():
    cosine = np.array([-1.0, -0.8, 0.0, 0.3, 0.95, 1.0])
    u, v = normal(2, 10**6)
    w = cosine[:, None] * u + np.sqrt(1.0 - cosine**2)[:, None] * v
    steps = 2.0 * ((u > 0) & (w > 0)).mean(axis=1)
    ramps = 2.0 * (np.maximum(u, 0) * np.maximum(w, 0)).mean(axis=1)
    np.testing.assert_allclose(arc_cosine.degree_0(cosine), steps, atol=4e-3)
    np.testing.assert_allclose(arc_cosine.degree_1(cosine), ramps, atol=8e-3)


def test_moments_of_two_variances_by_monte_carlo():
    first, second, covariance = 0.5, 3.0, -0.7
    factor = np.linalg.cholesky([[first, covariance], [covariance, second]])
    a, b = factor @ normal(2, 10**6, seed=1)
    product, slopes = recurrent.relu_moments(
        np.array(covariance), np.array(first), np.array(second)
    )
    expected = (np.maximum(a, 0) * np.maximum(b, 0)).mean()
    assert product == pytest.approx(expected, abs=4e-3)
    assert slopes == pytest.approx(((a > 0) & (b > 0)).mean(), abs=2e-3)


def test_the_limit_of_one_hidden_layer_by_hand():
    x, z = normal(3, 4), normal(2, 4, seed=1)
    found = arc_cosine.tangent_kernel(x, z, 1)
    for i, j in np.ndindex(3, 2):
        lengths = np.linalg.norm(x[i]) * np.linalg.norm(z[j])
        angle = math.acos(x[i] @ z[j] / lengths)
        hand = math.sin(angle) + 2 * (math.pi - angle) * math.cos(angle)
        assert found[i, j] == pytest.approx(lengths * hand / math.pi)


def mlp_kernel(weights, x):
    """The tangent kernel of the NTK parametrisation, by backpropagation.

    `weights` are standard normal, hidden ones `(fan-in, units)`; one output.
    """
    scales = [math.sqrt(2.0 / w.shape[0]) for w in weights]
    scales[-1] = math.sqrt(1.0 / weights[-1].shape[0])
    inputs, slopes = [x], []
    for w, scale in zip(weights[:-1], scales, strict=False):
        before = scale * inputs[-1] @ w
        slopes.append(before > 0)
        inputs.append(np.maximum(before, 0.0))
    back = np.ones((len(x), 1))
    kernel = np.zeros((len(x), len(x)))
    for layer in reversed(range(len(weights))):
        own = scales[layer] ** 2 * (inputs[layer] @ inputs[layer].T)
        kernel += own * (back @ back.T)
        if layer:
            back = scales[layer] * (back @ weights[layer].T) * slopes[layer - 1]
    return kernel


def test_the_kernel_of_a_network_is_that_of_the_ntk_parametrisation():
    net = network.mlp(4, 7, 2, 1, seed=3)
    x = normal(5, 4).astype("float32")
    weights = [
        keras.ops.convert_to_numpy(v).astype("float64") / math.sqrt(variance)
        for v, variance in zip(net.model.weights, net.variances, strict=True)
    ]
    expected = mlp_kernel(weights, x.astype("float64"))
    np.testing.assert_allclose(net.tangent_kernel(x), expected, rtol=1e-6, atol=1e-9)


def test_wide_networks_have_the_limit_of_two_hidden_layers():
    x, n = normal(4, 3), 800
    draws = [
        mlp_kernel(
            [
                normal(3, n, seed=seed),
                normal(n, n, seed=seed + 20),
                normal(n, 1, seed=seed + 40),
            ],
            x,
        )
        for seed in range(16)
    ]
    limit = arc_cosine.tangent_kernel(x, x, 2) / 3
    assert arc_cosine.distance(np.mean(draws, axis=0), limit) < 0.06


@pytest.mark.parametrize("initializer", network.INITIALIZERS)
def test_weights_have_the_variances_that_are_said(initializer):
    net = network.mlp(16, 64, 2, 10, seed=0, initializer=initializer)
    assert net.variances == (2 / 16, 2 / 64, 1 / 64)
    for variable, variance in zip(net.model.weights, net.variances, strict=True):
        value = keras.ops.convert_to_numpy(variable)
        assert (value**2).mean() == pytest.approx(variance, rel=0.25)
        if initializer == "orthogonal":
            side = min(value.shape)
            gram = value @ value.T if side == value.shape[0] else value.T @ value
            expected = variance * max(value.shape) * np.eye(side)
            np.testing.assert_allclose(gram, expected, atol=1e-5)


def test_several_outputs_share_no_derivative():
    limit = network.of_all_outputs(np.arange(16.0).reshape(4, 4), 2)
    np.testing.assert_array_equal(limit[::2, ::2], np.arange(16.0).reshape(4, 4))
    np.testing.assert_array_equal(limit[::2, 1::2], 0.0)


@pytest.mark.parametrize("method", random_features.METHODS)
def test_random_features_have_the_kernel_as_their_mean(method):
    x = normal(4, 3)
    limit = arc_cosine.tangent_kernel(x, x, 1)
    rng, options = np.random.default_rng(0), random_features.METHODS[method]
    draws = np.array(
        [random_features.approximation(x, 1, 200, rng, **options) for _ in range(1000)]
    )
    error = draws.std(axis=0) / math.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - limit) < 4.5 * error).all()


def test_leverage_scores_by_importance_sampling():
    # The same features with the lengths drawn: chi, with d + 2 degrees of freedom.
    d, rng = 3, np.random.default_rng(0)
    x, z = normal(2, d)
    w = rng.standard_normal((10**6, d))
    lengths = np.sqrt(rng.chisquare(d + 2, len(w)))
    w *= (lengths / np.linalg.norm(w, axis=1))[:, None]
    # The density's factor has mean 1.
    assert (d / lengths**2).mean() == pytest.approx(1.0, abs=8e-3)
    products = 2 * d / lengths**2 * np.maximum(w @ x, 0) * np.maximum(w @ z, 0)
    features = random_features.degree_1(np.stack([x, z]), 10**6, rng, leverage=True)
    assert features[0] @ features[1] == pytest.approx(products.mean(), rel=0.01)


def test_the_sketch_over_all_pairs_is_the_tensor_product():
    a, b = normal(2, 3), normal(2, 4, seed=1)

    class Every:
        """Draws each pair once, and signs as they come."""

        def __init__(self):
            self.rng, self.size = np.random.default_rng(0), iter((3, 4))

        def choice(self, values, size):
            return self.rng.choice(values, size)

        def integers(self, high, size):
            assert high == next(self.size)
            assert size == 12
            first, second = np.divmod(np.arange(12), 4)
            return first if high == 3 else second

    sketch = random_features.tensor_sketch(a, b, 24, Every())
    assert sketch.shape == (2, 24)
    products = np.einsum("np,nq->npq", a, b).reshape(2, 12)
    np.testing.assert_allclose(sketch @ sketch.T, products @ products.T)


def test_the_spectral_error_bounds_the_approximation():
    a, b = normal(5, 5), normal(5, 5, seed=1)
    kernel = a @ a.T
    found = kernel + 0.1 * (b + b.T)
    error = random_features.spectral_error(found, kernel, 0.5)
    ridge = 0.5 * np.eye(5)
    for sign in (-1, 1):
        bound = sign * ((1 + sign * error) * (kernel + ridge) - found - ridge)
        # Touched in one of the two directions.
        assert np.linalg.eigvalsh(bound)[0] > -1e-9
    smaller = 0.99 * error
    assert any(
        np.linalg.eigvalsh(
            sign * ((1 + sign * smaller) * (kernel + ridge) - found - ridge)
        )[0]
        < 0
        for sign in (-1, 1)
    )


@pytest.mark.parametrize("rank", [2, 5])
def test_the_prediction_is_gradient_descent_in_the_kernel(rank):
    features = normal(8, rank)
    kernel = features @ features.T
    own, cross = kernel[:5, :5], kernel[5:, :5]
    f, g, y = normal(5, 1, seed=1), normal(3, 1, seed=2), normal(5, 1, seed=3)
    rate = 1.0 / np.linalg.eigvalsh(own)[-1]
    found = layer_rates.predicted(own, cross, f, g, y, rate, 30)
    for _ in range(30):
        residual = f - y
        f, g = f - rate * own @ residual, g - rate * cross @ residual
    np.testing.assert_allclose(found, g, atol=1e-10)


def test_a_step_with_rates_by_layer_is_the_gradient_times_them():
    net = network.mlp(3, 4, 1, 1, seed=0)
    x, y = normal(6, 3).astype("float32"), normal(6, 1, seed=1)
    jacobian = kd.jacobian(net.model, x)
    gradient = jacobian.rmatvec((jacobian.outputs() - y).ravel())
    before = jacobian.theta()
    layer_rates.descend(net.model, x, y, [0.5, 3.0], 0.01, 1)
    moved = kd.jacobian(net.model, x).theta() - before
    factors = np.repeat([0.5, 3.0], [12, 4])
    np.testing.assert_allclose(moved, -0.01 * factors * gradient, atol=1e-6)


def test_all_steps_of_an_epoch_are_made_on_all_samples():
    x, y = normal(6, 3).astype("float32"), normal(6, 1, seed=1)
    ends = []
    for steps in ([3], [1, 1, 1]):
        net = network.mlp(3, 4, 1, 1, seed=0)
        for count in steps:
            layer_rates.descend(net.model, x, y, [1.0, 2.0], 0.01, count)
        ends.append(net.model.predict(x, verbose=0))
    np.testing.assert_allclose(*ends, rtol=1e-5)


def weighted_problem():
    features = [normal(9, 4, seed=seed) for seed in range(3)]
    kernels_ = np.stack([each @ each.T for each in features])
    return features, kernels_[:, :6, :6], kernels_[:, 6:, :6], normal(9, 2, seed=9)


def test_the_weighted_prediction_is_ridge_regression_on_weighted_features():
    features, own, cross, y = weighted_problem()
    weights, ridge = np.array([0.5, 0.0, 2.0]), 0.3
    found = kernel_weights.prediction(own, cross, y[:6], weights, ridge)
    phi = np.concatenate(
        [math.sqrt(w) * each for w, each in zip(weights, features, strict=True)], axis=1
    )
    gram = phi[:6].T @ phi[:6] + ridge * np.eye(phi.shape[1])
    expected = phi[6:] @ np.linalg.solve(gram, phi[:6].T @ y[:6])
    np.testing.assert_allclose(found, expected)


def test_the_gradient_of_the_search_by_finite_differences():
    _, own, cross, y = weighted_problem()
    weights = np.array([0.5, 1.0, 2.0])

    def error(at):
        return kernel_weights.validation_error(own, cross, y[:6], y[6:], at, 0.3)

    value, gradient = error(weights)
    found = kernel_weights.prediction(own, cross, y[:6], weights, 0.3)
    assert value == pytest.approx(((found - y[6:]) ** 2).mean() / 2)
    for place, step in enumerate(1e-6 * np.eye(3)):
        slope = (error(weights + step)[0] - error(weights - step)[0]) / 2e-6
        assert gradient[place] == pytest.approx(slope, rel=1e-6)


def test_the_search_ends_at_a_minimum():
    _, own, cross, y = weighted_problem()
    arguments = (own, cross, y[:6], y[6:])
    found = kernel_weights.search(*arguments, 0.3)
    assert (found >= 0).all()

    def error(weights):
        return kernel_weights.validation_error(*arguments, weights, 0.3)[0]

    assert error(found) < error(np.ones(3))
    for place in range(3):
        nearby = found.copy()
        nearby[place] += 1e-2
        assert error(nearby) > error(found) - 1e-8


SCALES = recurrent.Scales(state=1.3, inputs=0.8, bias=0.4, output=0.9)


def test_the_recurrent_limit_of_one_step_by_hand():
    x, z = normal(2, 1, 3), normal(3, 1, 3, seed=1)
    found = recurrent.limit(x, z, SCALES)
    for i, j in np.ndindex(2, 3):
        pair = [x[i, 0], z[j, 0]]
        s, a, b = (
            0.8**2 * u @ v / 3 + 0.4**2
            for u, v in ((pair[0], pair[1]), (pair[0], pair[0]), (pair[1], pair[1]))
        )
        angle = math.acos(s / math.sqrt(a * b))
        product = math.sqrt(a * b) * (
            math.sin(angle) + (math.pi - angle) * math.cos(angle)
        )
        hand = product / (2 * math.pi) + s * (math.pi - angle) / (2 * math.pi)
        assert found[i, j] == pytest.approx(0.9**2 * hand)


def rnn_kernel(parameters, x, z, scales):
    """The tangent kernel by backpropagation through time, over all pairs of steps."""
    W, U, b, v = parameters
    n, m = W.shape[0], U.shape[0]

    def states(sequences):
        h, before, slopes = np.zeros((len(sequences), n)), [], []
        for step in range(sequences.shape[1]):
            before.append(h)
            a = scales.state * h @ W / math.sqrt(n) + scales.bias * b
            a = a + scales.inputs * sequences[:, step] @ U / math.sqrt(m)
            slopes.append(a > 0)
            h = np.maximum(a, 0.0)
        back, backs = np.tile(scales.output * v / math.sqrt(n), (len(h), 1)), []
        for active in reversed(slopes):
            back = back * active
            backs.insert(0, back)
            back = scales.state * back @ W.T / math.sqrt(n)
        return h, before, backs

    (h, before, backs), (g, before2, backs2) = states(x), states(z)
    kernel = scales.output**2 * h @ g.T / n
    for t in range(x.shape[1]):
        for t2 in range(z.shape[1]):
            kernel = kernel + (backs[t] @ backs2[t2].T) * (
                scales.state**2 * before[t] @ before2[t2].T / n
                + scales.inputs**2 * x[:, t] @ z[:, t2].T / m
                + scales.bias**2
            )
    return kernel


def parameters_of(n, m, seed):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(s) for s in ((n, n), (m, n), (n,), (n,)))


@pytest.mark.parametrize("length", [4, 2])
def test_wide_recurrent_networks_have_the_limit(length):
    x, z = normal(3, 4, 3), normal(2, length, 3, seed=1)
    draws = np.array(
        [rnn_kernel(parameters_of(400, 3, seed), x, z, SCALES) for seed in range(100)]
    )
    limit = recurrent.limit(x, z, SCALES)
    assert arc_cosine.distance(draws.mean(axis=0), limit) < 0.08


def test_the_kernel_of_a_recurrent_network_by_backpropagation_through_time():
    net = recurrent.network(3, 5, 1, seed=2, scales=SCALES)
    U, W, b, v = (
        keras.ops.convert_to_numpy(each).astype("float64") / math.sqrt(variance)
        for each, variance in zip(net.model.weights, net.variances, strict=True)
    )
    # The bias is drawn as well: it has a variance.
    assert b.std() > 0
    x, z = (normal(2, length, 3).astype("float32") for length in (4, 3))
    expected = rnn_kernel((W, U, b, v.ravel()), x, z, SCALES)
    np.testing.assert_allclose(net.tangent_kernel(x, z), expected, rtol=1e-5, atol=1e-8)


def test_the_limit_is_symmetric_in_its_sequences():
    x, z = normal(3, 4, 3), normal(2, 2, 3, seed=1)
    np.testing.assert_allclose(
        recurrent.limit(x, z, SCALES), recurrent.limit(z, x, SCALES).T
    )
