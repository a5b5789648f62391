import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dalign.numerics.column_space import (
    by_factor,
    by_gram,
    factor_cut,
    gram_cut,
)
from keras_dalign.numerics.lsqr import by_iteration
from keras_dalign.numerics.operators import DenseOperator, Operator

SHAPES = [(30, 80), (80, 30), (40, 40), (700, 90), (1, 5), (5, 1), (1, 1)]


def planted(shape, values, seed=0):
    """A matrix with given singular values, and an orthonormal basis of its columns."""
    rng = np.random.default_rng(seed)
    rows, columns = shape
    left, _ = np.linalg.qr(rng.standard_normal((rows, len(values))))
    right, _ = np.linalg.qr(rng.standard_normal((columns, len(values))))
    return (left * values) @ right.T, left


def targets(rows, k=2, seed=1):
    return np.random.default_rng(seed).standard_normal((rows, k))


def distance(basis, Y):
    return np.linalg.norm(Y - basis @ (basis.T @ Y), axis=0)


def project(route, matrix, Y, cut=None, lot=None, **arguments):
    operator = DenseOperator(matrix)
    if route == "factor":
        return by_factor(operator, Y, cut or factor_cut(matrix.shape))
    cut = cut or gram_cut(matrix.shape)
    if route == "gram":
        return by_gram(operator, Y, cut, 1e-9, lot or len(matrix))
    arguments = {"tolerance": 1e-9, "max_iterations": 2000, "held": 2000, **arguments}
    return by_iteration(operator, Y, cut, **arguments)


ROUTES = ["factor", "gram", "iteration"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("deficiency", [0, 0.5])
def test_the_distance_is_that_from_the_planted_space(route, shape, deficiency):
    rank = max(1, int(min(shape) * (1 - deficiency)))
    values = np.logspace(1, -1.5, rank)
    matrix, basis = planted(shape, values)
    Y = targets(len(matrix))
    found = project(route, matrix, Y)
    errors = np.linalg.norm(found.error, axis=0)
    np.testing.assert_allclose(errors, distance(basis, Y), atol=2e-8)
    assert found.converged
    if route == "iteration":
        assert found.rank is found.sigma_min is None
        assert found.sigma_max == pytest.approx(values[0], rel=1e-6)
    else:
        assert found.rank == rank
        assert found.sigma_max == pytest.approx(values[0])
        assert found.sigma_min == pytest.approx(values[-1])


@pytest.mark.parametrize("route", ROUTES)
def test_the_slope_is_that_of_the_error(route):
    matrix, _ = planted((60, 40), np.logspace(0, -3, 20))
    found = project(route, matrix, targets(60), cut=1e-2)
    expected = np.linalg.norm(matrix.T @ found.error, axis=0)
    np.testing.assert_allclose(found.slope, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_a_zero_matrix_reaches_nothing(route, shape):
    Y = targets(shape[0])
    found = project(route, np.zeros(shape), Y)
    np.testing.assert_array_equal(found.error, Y)
    assert found.rank in (0, None)
    assert found.sigma_min in (0, None)
    assert found.sigma_max == 0
    assert found.converged


@pytest.mark.parametrize("route", ROUTES)
def test_zero_targets_are_reached(route):
    matrix, _ = planted((20, 30), np.ones(10))
    Y = targets(20)
    Y[:, 1] = 0
    found = project(route, matrix, Y)
    assert np.linalg.norm(found.error[:, 1]) == 0
    assert np.linalg.norm(found.error[:, 0]) > 0


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_the_factor_sees_what_the_gram_matrix_does_not(shape):
    values = np.logspace(0, -10, 50)
    matrix, basis = planted(shape, values)
    Y = basis @ targets(50, 1)
    factor, gram = project("factor", matrix, Y), project("gram", matrix, Y)
    assert factor.rank == 50
    assert np.linalg.norm(factor.error) < 1e-5 * np.linalg.norm(Y)
    # sqrt(eps * 100) is 1.5e-7.
    assert gram.rank == np.count_nonzero(values > gram_cut(shape)) == 34


def test_lsqr_goes_on_where_the_gram_matrix_is_blind():
    values = np.r_[np.ones(20), 1e-8, 0.9e-8]
    matrix, basis = planted((40, 60), values)
    Y = basis @ targets(22, 1)
    found = project("gram", matrix, Y)
    assert found.rank == 20
    assert found.iterations > 0
    assert np.linalg.norm(found.error) < 1e-4 * np.linalg.norm(Y)


def test_the_cut_off_decides_what_counts():
    values = np.array([1.0, 1e-2, 1e-4])
    matrix, basis = planted((20, 30), values)
    Y = targets(20, 1)
    for route in ("factor", "gram"):
        for cut, rank in ((1e-5, 3), (1e-3, 2), (0.5, 1)):
            found = project(route, matrix, Y, cut=cut)
            assert found.rank == rank
            if route == "factor":
                expected = distance(basis[:, :rank], Y)
                np.testing.assert_allclose(np.linalg.norm(found.error), expected)


class Blocked(DenseOperator):
    """Gives blocks of a size of its own, as samples of several rows do."""

    def __init__(self, matrix, size):
        super().__init__(matrix)
        self.size = size

    def blocks(self, size):
        return super().blocks(self.size)


@pytest.mark.parametrize("lot", [1, 7, 30, 64])
@pytest.mark.parametrize("size", [1, 4, 9, 30])
def test_the_gram_matrix_comes_in_lots(lot, size):
    matrix = targets(30, 17)
    gram = Blocked(matrix, size).gram(lot)
    np.testing.assert_allclose(gram, matrix @ matrix.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 4, 9, 30])
@pytest.mark.parametrize("columns", [17, 40])
def test_the_factor_comes_in_blocks(columns, size):
    matrix, Y = targets(30, columns), targets(30)
    blocked = by_factor(Blocked(matrix, size), Y, 1e-14)
    whole = by_factor(DenseOperator(matrix), Y, 1e-14)
    np.testing.assert_allclose(blocked.error, whole.error, atol=1e-13)
    assert blocked.sigma_min == pytest.approx(whole.sigma_min)


class Counted(DenseOperator):
    """Products only, counted; the matrix is never formed."""

    def __init__(self, matrix):
        super().__init__(matrix)
        self.products = 0

    def matvec(self, vector):
        self.products += 1
        return super().matvec(vector)

    def rmatvec(self, vector):
        self.products += 1
        return super().rmatvec(vector)

    def blocks(self, size):
        raise AssertionError("LSQR needs products only")

    dense = gram = matmat = rmatmat = blocks


def test_lsqr_takes_products_only_and_counts_its_steps():
    matrix, _ = planted((50, 80), np.logspace(0, -1, 50))
    operator, told = Counted(matrix), []
    found = by_iteration(operator, targets(50, 1), 1e-7, 1e-6, 1000, 9, told.append)
    assert found.converged
    assert told == list(range(1, found.iterations + 1))
    # Two a step, and two for what each start of it was worth.
    assert 2 * found.iterations < operator.products <= 2 * found.iterations + 15


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_lsqr_reaches_the_best_of_its_krylov_space(steps):
    matrix, _ = planted((60, 90), np.logspace(0, -6, 60))
    Y = targets(60, 1)
    found = project("iteration", matrix, Y, max_iterations=steps)
    assert found.iterations == steps
    assert not found.converged
    space = np.empty((90, 0))
    direction = matrix.T @ Y
    for _ in range(steps):
        direction -= space @ (space.T @ direction)
        direction -= space @ (space.T @ direction)
        direction /= np.linalg.norm(direction)
        space = np.concatenate([space, direction], axis=1)
        direction = matrix.T @ (matrix @ direction)
    beta, *_ = np.linalg.lstsq(matrix @ space, Y, rcond=None)
    best = np.linalg.norm(Y - matrix @ (space @ beta))
    assert np.linalg.norm(found.error) == pytest.approx(best, rel=1e-6)
    # That of J on that space, hence not above that of J.
    sigma_max = np.linalg.norm(matrix @ space, 2)
    assert found.sigma_max == pytest.approx(sigma_max, rel=1e-6)


def test_held_vectors_spare_steps():
    matrix, _ = planted((80, 120), np.logspace(0, -5, 80))
    for operator in (matrix, matrix.T):
        Y = matrix @ targets(120, 1) if operator is matrix else targets(120, 1)
        errors = [
            np.linalg.norm(
                project("iteration", operator, Y, held=held, max_iterations=40).error
            )
            for held in (0, 20, 40)
        ]
        assert errors[2] < errors[1] < errors[0]


def test_lsqr_knows_that_it_has_not_converged():
    matrix, _ = planted((60, 90), np.logspace(0, -6, 60))
    found = project("iteration", matrix, targets(60, 1), max_iterations=30)
    Y = np.linalg.norm(targets(60, 1))
    # The targets lie in the column space, and LSQR does not get there.
    assert np.linalg.norm(found.error) > 1e-6 * Y
    slope, left = found.slope[0], np.linalg.norm(found.error)
    assert found.converged == (slope <= 0.1 * found.cut * found.sigma_max * left)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    rank=st.integers(1, 12),
    decades=st.floats(0, 4),
    seed=st.integers(0, 2**16),
)
def test_all_routes_agree_with_lstsq(rows, columns, rank, decades, seed):
    values = np.logspace(0, -decades, min(rank, rows, columns))
    matrix, _ = planted((rows, columns), values, seed)
    Y = targets(rows, 1, seed)
    beta, *_ = np.linalg.lstsq(matrix, Y, rcond=1e-8)
    expected = np.linalg.norm(Y - matrix @ beta)
    for route in ROUTES:
        found = project(route, matrix, Y, tolerance=1e-8)
        error = np.linalg.norm(found.error)
        # Attained, hence never below the least; rounding apart.
        assert error >= expected - 1e-9
        if found.converged:
            assert error == pytest.approx(expected, abs=1e-5)
        if route != "iteration":
            assert found.rank == len(values)


def test_corrections_gain_the_digits_that_squares_lose():
    matrix, basis = planted((60, 90), np.logspace(0, -6, 60))
    Y = basis @ targets(60, 1)
    # eps * cond^2 is 2e-4; the tolerance leaves nothing for LSQR to do.
    found = by_gram(DenseOperator(matrix), Y, gram_cut(matrix.shape), 0.5, 60)
    assert found.iterations == 0
    assert np.linalg.norm(found.error) < 1e-8 * np.linalg.norm(Y)


@pytest.mark.parametrize("cut", [1e-7, 1e-14])
@pytest.mark.parametrize("sigma_max", [0.0, 1.0])
def test_rounding_is_no_direction(cut, sigma_max):
    matrix, basis = planted((40, 60), np.ones(20))
    Y = targets(40, 1)
    # Outside the column space but for rounding, which a huge beta would blow up.
    Y -= basis @ (basis.T @ Y)
    Y -= basis @ (basis.T @ Y)
    found = by_iteration(
        DenseOperator(matrix), Y, cut, 1e-9, 50, 50, sigma_max=sigma_max
    )
    np.testing.assert_allclose(found.error, Y, rtol=1e-12, atol=1e-12)
    assert found.rounding < 1e-12


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_the_rounding_grows_with_the_solution(shape):
    for decades in (2, 6, 10):
        matrix, basis = planted(shape, np.logspace(0, -decades, 30))
        Y = basis @ targets(30, 1)
        found = project("factor", matrix, Y)
        # beta is about 10^decades * ||Y||.
        scale = 2.0**-52 * 10**decades * np.linalg.norm(Y)
        assert 0.1 * scale < found.rounding < 10 * scale
        assert np.linalg.norm(found.error) < 10 * found.rounding


def test_an_operator_needs_its_three_methods():
    with pytest.raises(TypeError, match="abstract"):
        Operator((1, 1))
