import keras
import numpy as np
import pytest
from small import cross_entropy, digits, mlp

import keras_dalign as kd
from keras_dalign.head.features import FeaturePass, FeatureSet
from keras_dalign.numerics.gram import explicit_features
from keras_dalign.numerics.losses import (
    BinaryCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)
from keras_dalign.solving.device_products import DeviceProducts
from keras_dalign.solving.problem import ConvexProblem
from keras_dalign.solving.products import NumpyProducts

# JAX has float64 only where it was switched on for the whole process.
DTYPES = ["float32"]
if keras.backend.backend() != "jax":
    DTYPES.append("float64")
LOSSES = {
    "softmax": SoftmaxCrossEntropy(),
    "soft labels": SoftmaxCrossEntropy(sparse=False, label_smoothing=0.1),
    "binary": BinaryCrossEntropy(reduction="mean_with_sample_weight"),
    "squared": SquaredError(reduction="sum"),
}


def problem(
    loss="softmax", n=23, d=5, units=3, width=4, weighted=True, seed=0, share=False
):
    rng = np.random.default_rng(seed)
    features = np.c_[rng.standard_normal((n, d - 1)), np.ones(n)]
    y = rng.integers(0, units, n)
    if loss != "softmax":
        y = np.eye(units)[y]
    loss = LOSSES[loss]
    return ConvexProblem(
        features,
        rng.standard_normal((d, 1 if share else units, width)),
        rng.choice([-0.5, 0.5], (1 if share else units, width)),
        4.0,
        rng.standard_normal((n, units)),
        loss.targets(y, units),
        rng.random(n) if weighted else None,
        loss,
        rng.standard_normal(d * units * width + units),
    )


def dense(of):
    """`Phi` with its bias columns, `(n * C, size)`, from the explicit features."""
    matrix = np.zeros((of.n, of.units, of.size))
    for c in range(of.units):
        phi = explicit_features(of.features, *of.gates.of_output(c), of.slope)
        index = np.zeros((of.d, of.units, of.width), bool)
        index[:, c] = True
        columns = np.flatnonzero(index)  # d-major, where `phi` is gate by gate.
        by_gate = phi.reshape(of.n, of.width, of.d).transpose(0, 2, 1)
        matrix[:, c, columns] = by_gate.reshape(of.n, -1)
        matrix[:, c, of.d * of.units * of.width + c] = 1.0
    return matrix.reshape(of.n * of.units, of.size)


def brute_force_value(of, theta, l2=0.0):
    logits = (of.offset.ravel() + dense(of) @ theta).reshape(of.n, of.units)
    total = sum(
        of.weights[i] * of.loss.value(logits[i : i + 1], of.targets[i : i + 1])[0]
        for i in range(of.n)
    )
    return total / of.normalizer + l2 / 2 * np.sum((theta - of.center) ** 2)


@pytest.fixture(params=LOSSES)
def case(request):
    return problem(request.param), np.random.default_rng(1)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("units", [1, 3])
def test_products_are_those_with_the_explicit_features(units, share):
    of = problem("squared", units=units, share=share)
    rng = np.random.default_rng(1)
    theta, u = rng.standard_normal(of.size), rng.standard_normal((of.n, units))
    phi = dense(of)
    np.testing.assert_allclose(of.product(theta).ravel(), phi @ theta, atol=1e-12)
    np.testing.assert_allclose(of.transposed_product(u), phi.T @ u.ravel(), atol=1e-12)
    np.testing.assert_allclose(of.logits(theta), of.offset + of.product(theta))


@pytest.mark.parametrize(
    ("accelerator", "kind"), [(True, DeviceProducts), (False, NumpyProducts)]
)
def test_large_problems_are_solved_in_float32(accelerator, kind, monkeypatch):
    of = problem("softmax", n=30)
    assert of.fast is of.exact
    assert of.exact.dtype == np.float64
    where = "keras_dalign.solving.problem"
    monkeypatch.setattr(f"{where}._LARGE", 1)
    monkeypatch.setattr(f"{where}.has_accelerator", lambda: accelerator)
    of = problem("softmax", n=30)
    assert type(of.fast) is kind
    assert of.fast.dtype == np.float32
    theta = np.random.default_rng(1).standard_normal(of.size)
    rough, exact = of.evaluate(theta, 0.1, of.fast), of.evaluate(theta, 0.1)
    assert rough.value == pytest.approx(exact.value, rel=1e-6)
    scale = np.abs(exact.gradient).max()
    np.testing.assert_allclose(rough.gradient, exact.gradient, atol=1e-5 * scale)
    assert (rough.gradient != exact.gradient).any()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_restricted_to_a_subspace(k):
    of = problem()
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.standard_normal((of.d, k)))[0]
    some = of.restricted(of.coordinates(basis))
    assert some.size == k * of.units * of.width + of.units
    theta = rng.standard_normal(some.size)
    there = of.unrestricted(basis, theta)
    assert there.shape == (of.size,)
    # Changes of `q` lie in the subspace; loss and L2 term are those of all features.
    change = (there - of.center)[: -of.units].reshape(of.d, -1)
    np.testing.assert_allclose(basis @ (basis.T @ change), change, atol=1e-12)
    np.testing.assert_allclose(some.logits(theta), of.logits(there), atol=1e-12)
    value, gradient = some.value_and_gradient(theta, 0.3)
    expected, whole = of.value_and_gradient(there, 0.3)
    assert value == pytest.approx(expected, rel=1e-12)
    q = basis.T @ whole[: -of.units].reshape(of.d, -1)
    np.testing.assert_allclose(
        gradient, np.concatenate([q.ravel(), whole[-of.units :]]), atol=1e-12
    )
    factors = (np.arange(of.n) % 2).astype(float)
    assert some.reweighted(factors).loss_of(some.logits(theta)) == pytest.approx(
        of.reweighted(factors).loss_of(of.logits(there))
    )


def test_one_sample():
    of = problem(n=1)
    theta = np.ones(of.size)
    np.testing.assert_allclose(of.product(theta).ravel(), dense(of) @ theta)


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_value_and_gradient(case, l2):
    of, rng = case
    theta, v = rng.standard_normal((2, of.size))
    value, gradient = of.value_and_gradient(theta, l2)
    assert value == pytest.approx(brute_force_value(of, theta, l2), rel=1e-12)
    h = 1e-5
    ahead, behind = (brute_force_value(of, theta + s * h * v, l2) for s in (1, -1))
    assert gradient @ v == pytest.approx((ahead - behind) / (2 * h), rel=1e-6)


def test_loss_in_the_logits(case):
    of, rng = case
    theta = rng.standard_normal(of.size)
    logits = of.logits(theta)
    assert of.loss_of(logits) == pytest.approx(of.value_and_gradient(theta)[0])
    np.testing.assert_allclose(
        of.transposed_product(of.loss_gradient(logits)), of.value_and_gradient(theta)[1]
    )


def test_blocks_of_rows_give_what_all_rows_give(monkeypatch):
    of = problem(n=200)
    theta = np.random.default_rng(2).standard_normal(of.size)
    whole = of.value_and_gradient(theta)
    monkeypatch.setattr("keras_dalign.solving.products._BLOCK_BYTES", 1)
    blocks = problem(n=200).value_and_gradient(theta)
    assert blocks[0] == pytest.approx(whole[0], rel=1e-13)
    np.testing.assert_allclose(blocks[1], whole[1], atol=1e-13)


def test_gram():
    of = problem()
    phi = dense(of).reshape(of.n, of.units, -1)
    for c in range(of.units):
        np.testing.assert_allclose(of.gram(c), phi[:, c] @ phi[:, c].T, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_reweighted_to_0_is_without_the_sample(loss):
    of = problem(loss)
    kept = np.random.default_rng(3).random(of.n) < 0.6
    theta = np.random.default_rng(4).standard_normal(of.size)
    some, subset = of.reweighted(kept.astype(float)), of.subset(np.flatnonzero(kept))
    assert some.normalizer == pytest.approx(subset.normalizer)
    left, right = some.value_and_gradient(theta), subset.value_and_gradient(theta)
    assert left[0] == pytest.approx(right[0], rel=1e-12)
    np.testing.assert_allclose(left[1], right[1], atol=1e-12)
    assert some.rows is of.rows
    assert some.gates is of.gates


@pytest.mark.parametrize("gates", ["random", "learned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_head_computes_what_the_model_computes(gates, dtype):
    x, y = digits(60)
    model = kd.align(mlp(dtype=dtype), n_samples=60, gates=gates, seed=2)
    model.start_exploiting()
    features = FeaturePass(model, keep=True).run(x, y).feature_set()
    of = ConvexProblem.from_head(model.head, features, LOSSES["softmax"])
    theta = of.theta_of(model.head)
    logits = model.predict(x, verbose=0)
    np.testing.assert_allclose(of.logits(theta), logits, atol=2e-5, rtol=2e-5)
    np.testing.assert_array_equal(
        of.center, theta if gates == "learned" else np.zeros(of.size)
    )
    new = theta + np.random.default_rng(0).standard_normal(of.size) / 30
    others = [w for w in model.weights if w.path not in _trained(model)]
    before = [np.array(w) for w in others]
    of.assign(model.head, new)
    np.testing.assert_allclose(
        of.logits(new), model.predict(x, verbose=0), atol=1e-4, rtol=1e-4
    )
    np.testing.assert_allclose(of.theta_of(model.head), new, rtol=1e-6)
    for old, variable in zip(before, others, strict=True):
        np.testing.assert_array_equal(old, np.array(variable))


def _trained(model):
    return {model.head.q.path, model.head.bias.path}


def test_from_head_with_features_of_two_kinds():
    x, y = digits(40)
    model = kd.align(mlp(), n_samples=40, features="hidden", seed=0)
    model.start_exploiting()
    features = FeaturePass(model, keep=True).run(x, y).feature_set()
    of = ConvexProblem.from_head(model.head, features, LOSSES["softmax"])
    theta = np.random.default_rng(0).standard_normal(of.size) / 30
    of.assign(model.head, theta)
    logits = model.predict(x, verbose=0)
    np.testing.assert_allclose(of.logits(theta), logits, atol=1e-4, rtol=1e-4)


def test_from_head_in_half_precision():
    x, y = digits(40)
    policy = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    model = kd.align(mlp(dtype=policy), n_samples=40, seed=0)
    model.start_exploiting()
    features = FeaturePass(model, keep=True).run(x, y).feature_set()
    of = ConvexProblem.from_head(model.head, features, LOSSES["softmax"])
    logits = np.asarray(model.predict(x, verbose=0), dtype="float32")
    np.testing.assert_allclose(of.logits(np.zeros(of.size)), logits, atol=0.1)


def test_bad_problems():
    _, y = digits(20)
    model = kd.align(mlp(), n_samples=20)
    model.compile(loss=cross_entropy())
    features = FeatureSet(np.zeros((20, 16), "float32"), y, None, 20)
    loss = LOSSES["softmax"]
    with pytest.raises(ValueError, match=r"gates are not set.*phase 'exploring'"):
        ConvexProblem.from_head(model.head, features, loss)
    model.start_exploiting()
    for weights, match in (
        (np.ones(19), "one weight per sample"),
        (np.full(20, -1.0), "at least 0"),
        (np.full(20, np.nan), "finite"),
        (np.zeros(20), "nothing to minimise"),
    ):
        bad = FeatureSet(features.z, y, weights, 20)
        with pytest.raises(ValueError, match=match):
            ConvexProblem.from_head(model.head, bad, loss)
    with pytest.raises(ValueError, match=r"Targets are needed.*y=None"):
        ConvexProblem.from_head(
            model.head, FeatureSet(features.z, None, None, 20), loss
        )
    with pytest.raises(ValueError, match="integers from 0 to 9"):
        ConvexProblem.from_head(
            model.head, FeatureSet(features.z, y + 5, None, 20), loss
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("l2", [0.0, 0.2])
def test_rounding_of_the_gradient_is_within_its_bound(loss, l2):
    # Against sums in extended precision, for parameters so large that terms cancel.
    for seed, size in enumerate((1.0, 1e3, 1e6)):
        of = problem(loss, n=60, seed=seed)
        theta = size * np.random.default_rng(seed).standard_normal(of.size)
        at = of.evaluate(theta, l2)
        phi = dense(of).astype(np.longdouble)
        logits = of.offset + (phi @ theta).reshape(of.n, of.units)
        slopes = of.loss.gradient(logits, of.targets.astype(np.longdouble))
        slopes *= of.weights[:, None] / np.longdouble(of.normalizer)
        exact = phi.T @ slopes.ravel() + l2 * (theta - of.center)
        wrong = float(np.linalg.norm(at.gradient - exact))
        bound = of.gradient_rounding(at, l2)
        assert wrong <= bound
        assert bound <= 1e-9 * size * np.abs(of.features).max() * of.size


def test_other_gates_on_the_same_features():
    of = problem(share=True)
    rng = np.random.default_rng(4)
    r, w = rng.standard_normal((of.d, 1, 7)), rng.standard_normal((1, 7))
    other = of.with_gates(r, w)
    assert other.rows is of.rows
    assert (other.width, other.size) == (7, of.d * of.units * 7 + of.units)
    assert not other.center.any()
    theta = rng.standard_normal(other.size)
    np.testing.assert_allclose(
        other.product(theta), (dense(other) @ theta).reshape(of.n, of.units), atol=1e-12
    )


def test_one_output_alone():
    of = problem()
    phi = dense(of).reshape(of.n, of.units, -1)
    for c in range(of.units):
        alone = of.single_output(c)
        columns = np.abs(phi[:, c]).sum(axis=0) > 0
        theta = np.random.default_rng(c).standard_normal(alone.size)
        expected = dense(alone) @ theta
        np.testing.assert_allclose(alone.product(theta)[:, 0], expected, atol=1e-12)
        np.testing.assert_allclose(alone.gram(0), of.gram(c), atol=1e-12)
        assert columns.sum() == alone.size
