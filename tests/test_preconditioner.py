"""The change of variables before L-BFGS."""

import dataclasses

import numpy as np
import pytest
from random_problems import LOSSES, random_case

from keras_dalign.numerics.losses import SoftmaxCrossEntropy, SquaredError
from keras_dalign.solving import minimum
from keras_dalign.solving.minimum import minimize
from keras_dalign.solving.preconditioner import Preconditioner, iterations_before
from keras_dalign.solving.problem import ConvexProblem

L2 = 1e-2


def hessian(problem, theta, l2=L2, step=1e-5):
    """By differences of gradients, shape `(size, size)`."""
    columns = []
    for unit in np.eye(problem.size):
        ahead = problem.evaluate(theta + step * unit, l2).gradient
        behind = problem.evaluate(theta - step * unit, l2).gradient
        columns.append((ahead - behind) / (2 * step))
    return np.array(columns).T


def matrix(preconditioner, size):
    """`P`, shape `(size, size)`."""
    return np.array([preconditioner.theta(unit) for unit in np.eye(size)]).T


def at(problem, theta, l2=L2):
    return Preconditioner.at(problem, problem.evaluate(theta, l2), l2)


@pytest.mark.parametrize("name", LOSSES)
def test_curvature_is_the_hessian_in_the_logits(name):
    problem = random_case(name, 0, weighted=True).problem
    logits = np.random.default_rng(1).normal(size=problem.targets.shape)
    diagonal, vector = problem.loss.curvature(logits, problem.targets)
    vector = np.zeros_like(diagonal) if vector is None else vector
    step = 1e-5
    for c in range(logits.shape[1]):
        unit = step * np.eye(logits.shape[1])[c]
        ahead = problem.loss.gradient(logits + unit, problem.targets)
        behind = problem.loss.gradient(logits - unit, problem.targets)
        expected = diagonal * np.eye(logits.shape[1])[c] - vector[:, [c]] * vector
        np.testing.assert_allclose((ahead - behind) / (2 * step), expected, atol=1e-8)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_the_new_variables(name, share):
    case = random_case(name, 2, n=40, repeats=3, weighted=True, share=share)
    problem = case.problem
    preconditioner = at(problem, case.theta)
    gradient = np.random.default_rng(3).normal(size=problem.size)
    np.testing.assert_allclose(
        preconditioner.gradient(gradient),
        matrix(preconditioner, problem.size).T @ gradient,
        rtol=1e-9,
        atol=1e-9,
    )


def test_squared_error_of_one_open_gate_is_preconditioned_exactly():
    """Means of Kronecker products are then Kronecker products."""
    rng = np.random.default_rng(4)
    features = np.concatenate([rng.normal(size=(60, 4)), np.ones((60, 1))], axis=1)
    features[:, 0] *= 30.0
    targets = rng.normal(size=(60, 2))
    weights = rng.uniform(0.5, 2.0, 60)
    gates = np.zeros((5, 1, 1))
    gates[-1] = 100.0
    problem = ConvexProblem(
        features,
        gates,
        np.ones((1, 1)),
        20.0,
        0 * targets,
        targets,
        weights,
        SquaredError(),
    )
    q = problem.size - problem.units
    theta = rng.normal(size=problem.size)
    p = matrix(at(problem, theta), problem.size)[:q, :q]
    found = p.T @ hessian(problem, theta)[:q, :q] @ p
    np.testing.assert_allclose(found, np.eye(q), atol=1e-4)


def ill_conditioned(loss, outputs, seed=5, n=400):
    rng = np.random.default_rng(seed)
    p, m = 12, 6
    u = rng.normal(size=(n, p)) * 10.0 ** -np.linspace(0, 2, p)
    u *= np.sqrt(p) / np.linalg.norm(u, axis=1, keepdims=True)
    features = np.concatenate([u, np.ones((n, 1))], axis=1)
    labels = rng.integers(0, outputs, n)
    if isinstance(loss, SquaredError):
        labels = np.eye(outputs)[labels]
    return ConvexProblem(
        features,
        rng.normal(size=(p + 1, 1, m)) / np.sqrt(p),
        np.full((1, m), m**-0.5),
        20.0,
        np.zeros((n, outputs)),
        loss.targets(labels, outputs),
        None,
        loss,
    )


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(), SquaredError()], ids=str)
def test_the_same_minimum_in_fewer_gradients(loss, monkeypatch):
    problem = ill_conditioned(loss, 4)
    start = np.zeros(problem.size)
    options = {"method": "lbfgs", "tol": 1e-10, "l2": 1e-4}
    fast = minimize(problem, start, **options)
    monkeypatch.setattr(minimum.Preconditioner, "at", lambda *_: None)
    slow = minimize(problem, start, **options)
    assert fast.gap <= 1e-10
    assert slow.gap <= 1e-10
    assert abs(fast.value - slow.value) <= 1e-10
    assert fast.evaluations < 0.7 * slow.evaluations


def test_softmax_keeps_the_sum_of_the_outputs():
    """Along it the loss is constant: the minimum has none of it, nor have the steps."""
    problem = ill_conditioned(SoftmaxCrossEntropy(), 4)
    last = minimize(problem, np.zeros(problem.size), method="lbfgs", tol=1e-6, l2=1e-3)
    q = last.theta[: -problem.units].reshape(problem.d, problem.units, -1)
    assert np.abs(q.sum(axis=1)).max() < 1e-8 * np.abs(q).max()


def test_none_without_l2_term():
    case = random_case("sparse", 6, n=40, share=True)
    begin = case.problem.evaluate(case.theta)
    assert Preconditioner.at(case.problem, begin, 0.0) is None
    assert Preconditioner.at(case.problem, begin, L2) is not None


def wide(n=60, p=300):
    """Eigenvectors of so many features cost more than some iterations."""
    rng = np.random.default_rng(7)
    u = rng.normal(size=(n, p)) * 10.0 ** -np.linspace(0, 2, p)
    targets = np.eye(2)[rng.integers(0, 2, n)]
    return ConvexProblem(
        np.concatenate([u, np.ones((n, 1))], axis=1),
        rng.normal(size=(p + 1, 1, 1)),
        np.ones((1, 1)),
        20.0,
        0 * targets,
        targets,
        None,
        SoftmaxCrossEntropy(),
    )


def test_many_features_start_without_it(monkeypatch):
    # In floating-point operations: 301^2 (10 301 + 2 60) over 4 60 604.
    assert iterations_before(wide()) == 1956
    problem = ill_conditioned(SoftmaxCrossEntropy(), 4)
    assert iterations_before(problem) == 0
    iterations, found = [], []

    class Recorded:
        @staticmethod
        def at(*arguments):
            found.append(iterations[-1])
            return Preconditioner.at(*arguments)

    def record(iterate):
        iterations.append(iterate.iteration)
        return False

    monkeypatch.setattr(minimum, "Preconditioner", Recorded)
    monkeypatch.setattr(minimum, "iterations_before", lambda _: 20)
    options = {"method": "lbfgs", "tol": 1e-10, "l2": 1e-4}
    start = np.zeros(problem.size)
    solved = minimize(problem, start, on_iterate=record, **options)
    assert solved.gap <= 1e-10
    assert found == [20]
    monkeypatch.setattr(minimum, "iterations_before", lambda _: 10_000)
    slow = minimize(problem, start, on_iterate=record, **options)
    assert slow.gap <= 1e-10
    assert found == [20]
    assert abs(solved.value - slow.value) <= 1e-10
    assert solved.iteration < slow.iteration


@pytest.mark.parametrize("limit", [10, 20, 25])
def test_the_largest_number_of_iterations_counts_those_without_it(limit, monkeypatch):
    monkeypatch.setattr(minimum, "iterations_before", lambda _: 20)
    problem = wide()
    last = minimize(
        problem,
        np.zeros(problem.size),
        method="lbfgs",
        tol=1e-14,
        l2=1e-4,
        max_iterations=limit,
    )
    assert last.reason == "max_iterations"
    assert last.iteration == limit


def test_certain_outputs_have_no_curvature():
    case = random_case("sparse", 8, n=40, share=True)
    begin = case.problem.evaluate(case.theta)
    certain = dataclasses.replace(begin, logits=1e4 * case.problem.targets)
    assert Preconditioner.at(case.problem, certain, L2) is None
