import math

import numpy as np
import pytest

from keras_dalign.numerics.losses import SoftmaxCrossEntropy, SquaredError
from keras_dalign.solving.minimum import minimize
from keras_dalign.solving.preconditioner import Preconditioner
from keras_dalign.solving.problem import ConvexProblem

N, D, UNITS, WIDTH = 60, 7, 3, 2


def problem(loss=None, *, groups=1, spread=1.0, n=N, seed=0):
    """A problem; `spread` makes the columns' lengths differ by that much."""
    rng = np.random.default_rng(seed)
    loss = loss or SoftmaxCrossEntropy()
    features = rng.standard_normal((n, D)) * np.geomspace(1, spread, D)
    gates = rng.standard_normal((D, groups, WIDTH))
    signs = rng.choice([-0.7, 0.7], (groups, WIDTH))
    if isinstance(loss, SquaredError):
        targets = rng.standard_normal((n, UNITS))
    else:
        targets = np.eye(UNITS)[rng.integers(UNITS, size=n)]
    return ConvexProblem(
        features, gates, signs, 2.0, np.zeros((n, UNITS)), targets, None, loss
    )


def dense(of):
    """`Phi` of one output without the bias, in the order of `q[:, c, :]`."""
    columns = []
    for row in np.eye(of.d * of.width):
        theta = np.zeros((of.d, of.units, of.width))
        theta[:, 0] = row.reshape(of.d, of.width)
        theta = np.concatenate([theta.ravel(), np.zeros(of.units)])
        columns.append(of.product(theta)[:, 0])
    return np.stack(columns, axis=1)


def test_the_second_moment_is_that_of_the_columns():
    of = problem().reweighted(np.arange(N) % 3.0)
    phi = dense(of)
    wanted = phi.T @ (of.samples.shares[:, None] * phi)
    np.testing.assert_allclose(of.second_moment, wanted, rtol=1e-5, atol=1e-6)


def test_other_gates_and_other_weights_have_another_second_moment():
    of = problem()
    first = of.second_moment
    half = of.reweighted(np.arange(N) % 2.0)
    wider = of.with_gates(np.concatenate([of.gates.r] * 2, 2), np.ones((1, 4)))
    assert not np.allclose(half.second_moment, first)
    assert wider.second_moment.shape == (4 * D, 4 * D)


def test_coordinates_and_their_gradient():
    of, l2 = problem(), 0.1
    to = Preconditioner(of, l2)
    rng = np.random.default_rng(1)
    theta, step = rng.standard_normal((2, of.size))
    z = to.coordinates(theta)
    np.testing.assert_allclose(to.parameters(z), theta, atol=1e-10)
    _, gradient = of.value_and_gradient(theta, l2)
    values = [
        of.value_and_gradient(to.parameters(z + part * step), l2)[0]
        for part in (1e-6, -1e-6)
    ]
    slope = (values[0] - values[1]) / 2e-6
    assert slope == pytest.approx(to.gradient(gradient) @ step, rel=1e-6)


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(), SquaredError()])
def test_the_curvature_is_at_most_one_in_its_coordinates(loss):
    of, l2 = problem(loss, spread=100.0), 1e-2
    to = Preconditioner(of, l2)
    rng = np.random.default_rng(2)
    for _ in range(20):
        theta, direction = rng.standard_normal((2, of.size))
        direction[-UNITS:] = 0
        moved = to.parameters(direction)
        change = 1e-4 / np.linalg.norm(moved)
        ends = [
            of.value_and_gradient(theta + part * moved, l2)[1]
            for part in (change, -change)
        ]
        curvature = (ends[0] - ends[1]) @ moved / (2 * change)
        assert 0 < curvature <= (1 + 1e-4) * direction @ direction


def test_it_saves_gradients_and_ends_at_the_same_minimum(monkeypatch):
    of, l2 = problem(spread=300.0), 1e-4
    start = np.zeros(of.size)
    found = minimize(of, start, method="lbfgs", tol=1e-9, l2=l2)
    monkeypatch.setattr(Preconditioner, "pays_after", lambda *_: math.inf)
    plain = minimize(of, start, method="lbfgs", tol=1e-9, l2=l2)
    assert found.reason == "gap"
    assert found.evaluations < 0.5 * plain.evaluations
    assert found.value - plain.value < 1e-9


def test_every_iterate_is_reported_once():
    of = problem(spread=300.0)
    seen = []
    last = minimize(
        of,
        np.zeros(of.size),
        method="lbfgs",
        tol=1e-9,
        l2=1e-4,
        on_iterate=lambda iterate: seen.append(iterate.iteration),
    )
    assert seen == list(range(last.iteration))


def test_columns_that_are_equal_up_to_rounding():
    of = problem()
    features = np.repeat(of.features[:, :1], D, axis=1)
    equal = ConvexProblem(
        features, of.gates.r, of.gates.w, 2.0, of.offset, of.targets, None, of.loss
    )
    last = minimize(equal, np.zeros(of.size), method="lbfgs", tol=1e-10, l2=1e-9)
    assert np.isfinite(last.value)
    assert last.value <= equal.loss_of(equal.offset)


def test_where_it_does_not_pay():
    assert Preconditioner.pays_after(problem(), 0.1) == D * WIDTH / (4 * UNITS)
    assert Preconditioner.pays_after(problem(), 0.0) == math.inf
    assert Preconditioner.pays_after(problem(groups=UNITS), 0.1) == math.inf
