import dataclasses
import json

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_problems import LOSSES, REDUCTIONS, minimised, random_case
from scipy.optimize import minimize

import keras_dalign.diagnostics.gradient_bound as module
from keras_dalign.certification.certify import certify
from keras_dalign.diagnostics.gradient_bound import gradient_bound
from keras_dalign.diagnostics.jacobian import Jacobian
from keras_dalign.numerics.keras_losses import convex_loss
from keras_dalign.numerics.losses import (
    BinaryCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)
from keras_dalign.numerics.target_logits import target_logits


class Matrix:
    """A Jacobian that is known as a matrix; `f = offset + J theta` unless `f` is given.

    The bound has to hold for any `f`.
    """

    kind = "generic"
    dtype = "float64"

    def __init__(self, matrix, theta, offset, outputs=None):
        self.matrix = matrix
        self.shape = matrix.shape
        self.n, self.units = offset.shape
        self._theta = theta
        self._offset = offset
        self._outputs = outputs

    def dense(self):
        return self.matrix

    def matvec(self, vector):
        return self.matrix @ vector

    def rmatvec(self, vector):
        return self.matrix.T @ vector

    def offset(self):
        return self._offset

    def theta(self):
        return self._theta

    def outputs(self):
        if self._outputs is not None:
            return self._outputs
        flat = self.matrix @ self._theta
        return self._offset + flat.reshape(self.n, self.units)


class Head(Matrix):
    kind = "head"

    def __init__(self, case):
        problem = case.problem
        columns = [problem.product(row).ravel() for row in np.eye(problem.size)]
        super().__init__(np.stack(columns, axis=1), case.theta, problem.offset)
        self.problem = problem

    def dense(self):
        raise AssertionError("The head has structure; its matrix need not be formed.")


class Last(Matrix):
    """An output layer with kernel `(p, C)` and bias."""

    kind = "last"

    def __init__(self, features, theta, outputs):
        matrix = np.kron(features, np.eye(outputs))
        super().__init__(matrix, theta, np.zeros((len(features), outputs)))
        self.features = features

    def dense(self):
        raise AssertionError("An output layer need not be formed.")


def bound(jacobian, case, **arguments):
    problem = case.problem
    return gradient_bound(
        jacobian,
        problem.loss,
        problem.targets,
        problem.weights,
        case.groups,
        case.lower_bound,
        parameters="head",
        **arguments,
    )


def loss_of(case, jacobian):
    """The loss, written another way."""
    problem = case.problem
    values = problem.loss.value(jacobian.outputs(), problem.targets)
    return float((problem.weights * values).sum() / problem.normalizer)


def nonlinear_of(case):
    """Any outputs, and any matrix for their Jacobian, zeros among them."""
    n, units = case.problem.targets.shape
    rng = np.random.default_rng(len(case.theta))
    outputs = rng.standard_normal((n, units))[case.groups] * rng.choice([0.1, 10.0])
    matrix = rng.standard_normal((n * units, rng.integers(1, 30)))
    matrix *= rng.choice([0.0, 1.0], p=[0.2, 0.8])
    theta = rng.standard_normal(matrix.shape[1])
    return Matrix(matrix, theta, np.zeros((n, units)), outputs)


def last_of(case, theta_scale=1.0):
    problem = case.problem
    rng = np.random.default_rng(1)
    size = problem.d * problem.units
    return Last(
        problem.features, theta_scale * rng.standard_normal(size), problem.units
    )


CASES = {
    "name": st.sampled_from(sorted(LOSSES)),
    "seed": st.integers(0, 2**32 - 1),
    "n": st.integers(1, 14),
    "outputs": st.integers(1, 4),
    "weighted": st.booleans(),
    "reduction": st.sampled_from(REDUCTIONS),
    "share": st.booleans(),
    "conflicts": st.booleans(),
    "near": st.booleans(),
    "kind": st.sampled_from(["head", "matrix", "last", "lsmr", "nonlinear"]),
}


@settings(deadline=None, max_examples=60)
@given(**CASES)
def test_never_below_the_measured_gap(kind, near, conflicts, n, **arguments):
    case = random_case(n=n, repeats=n // 2 if conflicts else 0, **arguments)
    if near:
        case = minimised(case, 40)
    jacobian = Head(case)
    if kind == "last":
        jacobian = last_of(case)
    elif kind == "nonlinear":
        jacobian = nonlinear_of(case)
    elif kind != "head":
        jacobian = Matrix(jacobian.matrix, case.theta, case.problem.offset)
    with pytest.MonkeyPatch.context() as patch:
        if kind == "lsmr":
            patch.setattr(module, "_EXACT_ROWS", 0)
        found = bound(jacobian, case)
    assert found.solver == ("lsmr" if kind == "lsmr" else "eigendecomposition")
    loss = loss_of(case, jacobian)
    assert found.loss == pytest.approx(loss, rel=1e-12, abs=1e-300)
    assert found.gap >= (loss - case.lower_bound) * (1 - 1e-9) - 1e-12
    # The parts make up the whole.
    whole = found.gradient_norm * found.distance
    whole += found.output_gradient_norm * found.residual
    whole += max(found.target_loss - case.lower_bound, 0)
    assert found.gap == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("repeats", [0, 5])
def test_vanishes_with_the_gradient_where_the_labels_are_aligned(name, repeats):
    case = random_case(name, 3, repeats=repeats, width=12)
    jacobian = Head(minimised(case, 2000))
    found = bound(jacobian, case)
    start = loss_of(case, Head(case)) - case.lower_bound
    assert found.gap < 1e-4 * start
    assert found.residual * found.output_gradient_norm < 1e-4 * start


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_is_about_as_sharp_as_the_inequality_allows(name):
    """Brute force over `beta`, `scale` and `psi` at once, by a smooth optimizer."""
    case = minimised(random_case(name, 5, n=6, outputs=2, width=4), 15)
    jacobian = Head(case)
    found = bound(jacobian, case)
    problem, loss = case.problem, case.problem.loss
    family = target_logits(loss, problem.targets, problem.weights, case.groups)
    outputs = jacobian.outputs()
    slopes = loss.gradient(outputs, problem.targets) / problem.normalizer
    g_theta = np.linalg.norm(jacobian.matrix.T @ slopes.ravel())
    g_out = np.linalg.norm(slopes)
    assert found.gradient_norm == pytest.approx(g_theta, rel=1e-10)
    assert found.output_gradient_norm == pytest.approx(g_out, rel=1e-10)

    def right_side(free):
        scale, psi, delta = free[0], free[1], free[2:]
        logits = family.at(scale, psi)
        error = logits - outputs - (jacobian.matrix @ delta).reshape(outputs.shape)
        if isinstance(loss, SoftmaxCrossEntropy):
            error = error - error.mean(axis=1, keepdims=True)
        target = loss.value(logits, problem.targets).sum() / problem.normalizer
        return g_theta * np.linalg.norm(delta) + g_out * np.linalg.norm(error) + target

    starts = [
        np.concatenate([[found.scale, found.psi], scale * np.ones(problem.size)])
        for scale in (0.01, 1.0)
    ]
    best = min(
        minimize(right_side, start, method="L-BFGS-B", options={"maxfun": 200_000}).fun
        for start in starts
    )
    assert found.gap <= 1.2 * (best - case.lower_bound) + 1e-9


def test_target_loss_in_closed_form():
    case = minimised(random_case("sparse", 0), 50)
    found = bound(Head(case), case)
    outputs = case.problem.units
    expected = np.log1p((outputs - 1) * np.exp(-2 * found.psi))
    assert found.target_loss == pytest.approx(expected, rel=1e-9)
    case = minimised(random_case("binary", 0), 50)
    found = bound(Head(case), case)
    assert found.target_loss == pytest.approx(np.log1p(np.exp(-found.psi)), rel=1e-9)


def test_squared_error_by_hand():
    """One output, no offset: `L(F*) = 0` and `beta` solves the equations."""
    theta = np.array([1.0, -1.0])
    jacobian = Matrix(np.diag([1.0, 2.0]), theta, np.zeros((2, 1)))
    # The gradient is (2 theta - ...) / n; where it is small, beta is the solution.
    targets = jacobian.outputs() + np.array([[1e-9], [-2e-9]])
    found = gradient_bound(
        jacobian,
        SquaredError(),
        targets,
        np.ones(2),
        np.arange(2),
        0.0,
        parameters="all",
    )
    # ||J^T (f - y)|| ||J^-1 (y - f)||, the residual being at hand at no cost.
    exact = np.hypot(1.0, 4.0) * np.hypot(1.0, 1.0) * 1e-18
    assert found.gap <= exact * 1.01
    assert found.gap >= 2.5e-18 * 0.999
    assert found.scale == pytest.approx(1.0, abs=1e-6)
    assert found.target_loss == pytest.approx(0.0, abs=1e-18)


def test_label_conflicts_count_by_their_best_common_output():
    """Group means for squared error: the gap goes to 0 although the loss does not."""
    case = random_case("squared", 7, repeats=6, width=12)
    case = minimised(case, 3000)
    found = bound(Head(case), case)
    assert case.lower_bound > 0.05
    assert found.loss == pytest.approx(case.lower_bound, rel=1e-6)
    assert found.gap < 1e-5


def test_samples_without_weight_do_not_matter():
    case = random_case("sparse", 2, weighted=True, width=12)
    keep = np.flatnonzero(case.problem.weights > 0)
    fewer = dataclasses.replace(
        case, problem=case.problem.subset(keep), groups=np.arange(len(keep))
    )
    fewer.problem.normalizer = case.problem.normalizer
    loss = dataclasses.replace(case.problem.loss, reduction="sum")
    for each in (case, fewer):
        each.problem.loss = loss
    with_them = bound(Head(case), case)
    without = bound(Head(fewer), fewer)
    assert with_them.gap == pytest.approx(without.gap, rel=1e-4)


def test_one_sample():
    for name in sorted(LOSSES):
        case = minimised(random_case(name, 1, n=1, outputs=1, width=3), 1000)
        assert bound(Head(case), case).gap < 1e-3


def test_the_structure_error_is_information():
    case = random_case("sparse", 1)
    jacobian = Head(case)
    assert bound(jacobian, case).structure_error < 1e-12
    exact = jacobian.outputs()
    jacobian.outputs = lambda: exact * (1 + 1e-4)
    assert bound(jacobian, case).structure_error == pytest.approx(
        np.linalg.norm(1e-4 * exact) / np.linalg.norm(exact * (1 + 1e-4)), rel=1e-6
    )
    jacobian = nonlinear_of(case)
    found = bound(jacobian, case)
    linear = jacobian.matrix @ jacobian.theta()
    outputs = jacobian.outputs().ravel()
    assert found.structure_error == pytest.approx(
        np.linalg.norm(outputs - linear) / np.linalg.norm(outputs)
    )
    assert "structure" not in str(found)


def test_non_finite_outputs():
    case = random_case("sparse", 0)
    jacobian = Head(case)
    jacobian.outputs = lambda: np.full((12, 3), np.nan)
    with pytest.raises(ValueError, match="outputs must be finite"):
        bound(jacobian, case)


def test_report():
    case = minimised(random_case("sparse", 0), 50)
    found = bound(Head(case), case)
    fields = json.loads(json.dumps(found.to_dict()))
    assert fields == dataclasses.asdict(found)
    text = str(found)
    assert f"{found.n_parameters} parameters (head)" in text
    assert "computed in float64" in text
    assert BinaryCrossEntropy().name not in text


# Models that are not linear in their parameters ---------------------------------------


class Tied(keras.layers.Layer):
    """`tanh(x W) W^T + b`."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 4))
        self.bias = self.add_weight(shape=(shape[-1],))
        self.built = True

    def call(self, x):
        hidden = keras.ops.tanh(keras.ops.matmul(x, self.kernel))
        product = keras.ops.matmul(hidden, keras.ops.transpose(self.kernel))
        return product + self.bias


def two_layers(weights, x):
    kernel, bias, last, last_bias = weights
    return np.tanh(x @ kernel + bias) @ last + last_bias


def nonlinear_output(weights, x):
    return np.tanh(x @ weights[0] + weights[1])


def tied(weights, x):
    return np.tanh(x @ weights[0]) @ weights[0].T + weights[1]


NONLINEAR = {
    "two layers": (
        lambda: [keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)],
        two_layers,
    ),
    "nonlinear output": (
        lambda: [keras.layers.Dense(3, "tanh")],
        nonlinear_output,
    ),
    "tied": (lambda: [Tied()], tied),
}


def softmax(logits, targets):
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -(targets * logs).sum(axis=1), np.exp(logs) - targets


def binary(logits, targets):
    p = 1 / (1 + np.exp(-logits))
    values = -targets * np.log(p) - (1 - targets) * np.log1p(-p)
    return values.mean(axis=1), (p - targets) / 3


def squared(outputs, targets):
    return ((outputs - targets) ** 2).mean(axis=1), 2 * (outputs - targets) / 3


def entropy(p):
    return -p * np.log(np.where(p > 0, p, 1.0))


# The loss of Keras, its value and gradient by hand, and that of a group of samples with
# the mean target `p` and the variances `v` at its best common output.
BY_HAND = {
    "softmax": (
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        softmax,
        lambda p, v: entropy(p).sum(),
    ),
    "binary": (
        keras.losses.BinaryCrossentropy(from_logits=True),
        binary,
        lambda p, v: (entropy(p) + entropy(1 - p)).mean(),
    ),
    "squared": (
        keras.losses.MeanSquaredError(),
        squared,
        lambda p, v: v.mean(),
    ),
}


def nonlinear_case(name, loss, seed):
    """Data with repeated inputs, labels in conflict and weights; and the model."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((20, 3)).astype("float32")
    x[15:] = x[:5]
    labels = rng.integers(0, 3, 20)
    targets = np.eye(3)[labels]
    if loss == "binary":
        targets = rng.integers(0, 2, (20, 3)).astype(float)
    elif loss == "squared":
        targets = rng.standard_normal((20, 3)).astype("float32").astype(float)
    keras.utils.set_random_seed(seed)
    layers, forward = NONLINEAR[name]
    model = keras.Sequential([keras.Input((3,)), *layers()])
    model.compile(loss=BY_HAND[loss][0])
    return model, forward, x, labels if loss == "softmax" else targets, targets


def complex_step(forward, weights, x):
    """The dense Jacobian, to rounding: `Im f(theta + i h e_k) / h`."""
    columns = []
    for index, array in enumerate(weights):
        for position in np.ndindex(array.shape):
            moved = [part.astype(complex) for part in weights]
            moved[index][position] += 1e-30j
            columns.append(forward(moved, x.astype(float)).imag.ravel() / 1e-30)
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("name", NONLINEAR)
@pytest.mark.parametrize("loss", BY_HAND)
@pytest.mark.parametrize("weight_scale", [1.0, 4.0])
def test_holds_for_models_that_are_not_linear(name, loss, weight_scale, monkeypatch):
    """Each step of the inequality, with a dense Jacobian and losses by hand."""
    model, forward, x, y, targets = nonlinear_case(name, loss, 3)
    model.set_weights([weight_scale * w + 0.1 for w in model.get_weights()])
    weights = np.linspace(0, 2, 20)
    shares = weights / 20
    vectors = []
    product = Jacobian.matvec

    def spy(self, vector):
        vectors.append(vector)
        return product(self, vector)

    monkeypatch.setattr(Jacobian, "matvec", spy)
    certificate = certify(
        model, x, y, sample_weight=weights, gradient_bound=True, parameters="all"
    )
    found = certificate.gradient_bound
    assert found.dtype == "float64"
    # Measured by hand: the loss and its infimum over all functions of the inputs.
    _, by_hand, group_loss = BY_HAND[loss]
    parameters = [np.asarray(w, dtype=float) for w in model.get_weights()]
    outputs = forward(parameters, x.astype(float))
    values, slopes = by_hand(outputs, targets)
    infimum = 0.0
    for i in range(15):
        rows = [i, i + 15] if i < 5 else [i]
        mass = shares[rows].sum()
        if mass:
            p = shares[rows] @ targets[rows] / mass
            v = shares[rows] @ (targets[rows] - p) ** 2 / mass
            infimum += mass * group_loss(p, v)
    assert found.loss == pytest.approx(shares @ values, rel=1e-9)
    assert found.lower_bound == pytest.approx(infimum, rel=1e-9)
    assert found.structure_error > 1e-2
    assert shares @ values - infimum <= found.gap
    # Step by step, for the delta that was found.
    delta = next(
        v for v in vectors if np.linalg.norm(v) == pytest.approx(found.distance)
    )
    matrix = complex_step(forward, parameters, x)
    cotangents = shares[:, None] * slopes
    gradient = matrix.T @ cotangents.ravel()
    groups = np.r_[:15, :5]
    family = target_logits(convex_loss(model.loss), targets, weights, groups)
    best = family.at(found.scale, found.psi)
    rest = best - outputs - (matrix @ delta).reshape(20, 3)
    gap = shares @ values - shares @ by_hand(best, targets)[0]
    assert gap <= np.sum(cotangents * (outputs - best)) + 1e-12
    assert np.sum(cotangents * (outputs - best)) == pytest.approx(
        -gradient @ delta - np.sum(cotangents * rest), rel=1e-8
    )
    assert found.gradient_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-8)
    assert found.output_gradient_norm == pytest.approx(
        np.linalg.norm(cotangents), rel=1e-8
    )
    if loss == "softmax":  # It does not see what moves all logits of a sample.
        rest = rest - rest.mean(axis=1, keepdims=True)
    assert found.residual == pytest.approx(np.linalg.norm(rest[weights > 0]), rel=1e-6)


def test_vanishes_with_the_gradient_in_a_model_that_is_not_linear():
    """Trained in all its parameters to zero loss, by Gauss-Newton steps by hand."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((10, 3)).astype("float32")
    y = rng.standard_normal((10, 2)).astype("float32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(12, "tanh"), keras.layers.Dense(2)]
    )
    model.compile(loss="mse")
    before = certify(model, x, y, gradient_bound=True, parameters="all")
    weights = [np.asarray(w, dtype=float) for w in model.get_weights()]
    for _ in range(30):
        residual = (two_layers(weights, x.astype(float)) - y).ravel()
        matrix = complex_step(two_layers, weights, x)
        step = np.linalg.lstsq(matrix, residual, rcond=None)[0]
        ends = np.cumsum([w.size for w in weights])[:-1]
        parts = np.split(0.5 * step, ends)
        weights = [w - d.reshape(w.shape) for w, d in zip(weights, parts, strict=True)]
    model.set_weights(weights)
    found = certify(model, x, y, gradient_bound=True, parameters="all")
    assert found.gradient_bound.gap >= found.gradient_bound.loss
    assert found.gradient_bound.gap < 1e-9 * before.gradient_bound.gap
