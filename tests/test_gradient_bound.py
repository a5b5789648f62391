import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_problems import LOSSES, REDUCTIONS, minimised, random_case
from scipy.optimize import minimize

import keras_dalign.conditions.gradient_bound as module
from keras_dalign.conditions.gradient_bound import gradient_bound
from keras_dalign.numerics.losses import (
    BinaryCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)


class Matrix:
    """A Jacobian `f = offset + J theta` that is known as a matrix."""

    kind = "generic"
    dtype = "float64"

    def __init__(self, matrix, theta, offset):
        self.matrix = matrix
        self.shape = matrix.shape
        self.n, self.units = offset.shape
        self._theta = theta
        self._offset = offset

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
    "conflicts": st.booleans(),
    "near": st.booleans(),
    "kind": st.sampled_from(["head", "matrix", "last", "lsmr"]),
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
    from keras_dalign.numerics.target_logits import target_logits

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


def test_without_the_structure():
    case = random_case("sparse", 0)
    jacobian = Head(case)
    jacobian._theta = 2 * case.theta + 1
    jacobian.outputs = Head(case).outputs
    with pytest.raises(ValueError, match=r"common model structure.*check_structure"):
        bound(jacobian, case)


def test_low_precision_has_a_tolerance_of_its_own():
    case = random_case("sparse", 1)
    jacobian = Head(case)
    exact = jacobian.outputs()
    jacobian.outputs = lambda: exact * (1 + 1e-4)
    with pytest.raises(ValueError, match=r"relative error.*1e-06"):
        bound(jacobian, case)
    jacobian.dtype = "float32"
    found = bound(jacobian, case)
    assert found.dtype == "float32"
    assert found.structure_error == pytest.approx(
        np.linalg.norm(1e-4 * exact) / np.linalg.norm(exact * (1 + 1e-4)), rel=1e-6
    )


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
