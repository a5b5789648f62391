"""The rank formula against SVD and brute force, and every outcome of the check."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from keras_dalign.numerics import rank as rank_module
from keras_dalign.numerics.default_width import closed_share, default_width, least_gates
from keras_dalign.numerics.gram import (
    explicit_features,
    gate_activations,
    gram_matrix,
)
from keras_dalign.numerics.rank import check_rank
from keras_dalign.numerics.subspace import numerical_rank, visible_rank
from keras_dalign.numerics.union import union_rank, union_rank_exact

SLOPE = 4.0


def _normalise(raw):
    """Standardise, scale rows to sqrt(p), append 1; a zero row stays zero."""
    raw = raw - raw.mean(axis=0)
    scale = raw.std(axis=0)
    raw = raw / np.where(scale > 0, scale, 1)
    norms = np.linalg.norm(raw, axis=1, keepdims=True)
    unit = raw * np.sqrt(raw.shape[1]) / np.where(norms > 0, norms, 1)
    return np.concatenate([unit, np.ones((len(raw), 1))], axis=1)


def _sample(n, p, seed=0):
    return _normalise(np.random.default_rng(seed).normal(size=(n, p)))


def _planted(n, p, crowd, dim, seed=0):
    """`n` rows of which `crowd` span only `dim` dimensions, constant included."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(n, p))
    raw[:crowd, dim - 1 :] = 0
    norms = np.linalg.norm(raw, axis=1, keepdims=True)
    rows = np.concatenate([raw * np.sqrt(p) / norms, np.ones((n, 1))], axis=1)
    order = rng.permutation(n)
    return rows[order], set(np.flatnonzero(order < crowd).tolist())


def _gates(d, m, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(d, m)) / np.sqrt(d), rng.choice([-1, 1], m) / np.sqrt(m)


def _svd_rank(features, m, seed=1):
    phi = explicit_features(features, *_gates(features.shape[1], m, seed), SLOPE)
    return np.linalg.matrix_rank(phi, tol=1e-10 * np.linalg.norm(phi))


# --- width and rank of the features ---------------------------------------------------


@pytest.mark.parametrize("slope", [2.0, 4.0, 20.0, 100.0])
def test_closed_share_is_that_of_random_gates(slope):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 30))
    rows *= np.sqrt(30) / np.linalg.norm(rows, axis=1, keepdims=True)
    gates = rng.normal(size=(30, 2000)) / np.sqrt(30)
    closed = gate_activations(rows, gates, slope) < 1e-3
    assert closed.mean() == pytest.approx(closed_share(slope), abs=3e-3)


@pytest.mark.parametrize(("slope", "share"), [(20.0, 0.365), (1e9, 0.5), (0.5, 0.0)])
def test_closed_share(slope, share):
    assert closed_share(slope) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("slope", [1.0, 4.0, 20.0, 1e6])
@pytest.mark.parametrize("n", [1, 50, 1000, 10**6])
def test_least_gates_leave_a_hundredth_of_a_sample(n, slope):
    least = least_gates(n, slope)
    assert n * closed_share(slope) ** least <= 0.01
    assert least == 1 or n * closed_share(slope) ** (least - 1) > 0.01


def test_least_gates_grow_with_the_logarithm():
    assert least_gates(1000, 20.0) == 12
    assert least_gates(10**6, 20.0) == 19
    # The share of gates that a gentle slope closes is no float any more.
    assert least_gates(1000, 1e-3) == 1


@pytest.mark.parametrize(
    ("n", "rank", "width"),
    [(10, 5, 4), (11, 5, 5), (100, 1, 200), (60000, 65, 1847), (1000, 2001, 4)],
)
def test_default_width(n, rank, width):
    assert default_width(n, rank, SLOPE) == width


@given(st.integers(1, 10**18), st.integers(1, 10**6), st.floats(0.1, 1e3))
def test_default_width_is_the_least_with_twice_the_columns(n, rank, slope):
    width = default_width(n, rank, slope)
    assert width * rank >= 2 * n
    assert width >= least_gates(n, slope)
    assert (width - 1) * rank < 2 * n or width == least_gates(n, slope)


@pytest.mark.parametrize(
    ("n", "rank", "slope", "message"),
    [
        (0, 3, 4.0, "`n_samples` must be at least 1. Received: n_samples=0"),
        (3, 0, 4.0, "`rank` must be at least 1. Received: rank=0"),
        (3, 3, 0.0, "`slope` must be positive and finite. Received: slope=0.0"),
        (3, 3, np.inf, "`slope` must be positive and finite. Received: slope=inf"),
    ],
)
def test_default_width_bad_input(n, rank, slope, message):
    with pytest.raises(ValueError, match=message):
        default_width(n, rank, slope)


@pytest.mark.parametrize("shape", [(6, 9), (30, 12), (5000, 12), (9, 6)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_numerical_rank_of_products(shape, rank):
    rng = np.random.default_rng(rank)
    matrix = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    assert numerical_rank(matrix) == rank


def test_numerical_rank_sees_what_a_gram_matrix_would_lose():
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5000, 4)))
    matrix = basis * [1, 1e-4, 1e-8, 1e-10]
    assert numerical_rank(matrix) == 4
    assert numerical_rank(matrix, rtol=1e-6) == 2
    squared = np.linalg.eigvalsh(matrix.T @ matrix)
    assert np.count_nonzero(squared > 5000 * np.finfo(float).eps * squared[-1]) < 4


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (1, 5), (5, 1), (300, 300)])
@pytest.mark.parametrize("visible", [1e-4, 1e-9])
def test_visible_rank_counts_what_a_gram_matrix_can_show(shape, visible):
    n, d = shape
    rng = np.random.default_rng(0)
    full = min(shape)
    values = np.ones(full)
    values[full // 2 :] = visible
    values[0] = 1.0
    left = np.linalg.qr(rng.standard_normal((n, full)))[0]
    right = np.linalg.qr(rng.standard_normal((d, full)))[0]
    matrix = (left * values) @ right.T
    assert visible_rank(matrix) == np.count_nonzero(values > 1e-6)
    assert visible_rank(np.zeros(shape)) == 0


def test_numerical_rank_uses_every_row():
    for row in (0, 1023, 1024, 4999):
        matrix = np.ones((5000, 3))
        matrix[row, 1] = 2
        assert numerical_rank(matrix) == 2


def test_numerical_rank_of_nothing():
    assert numerical_rank(np.zeros((4, 3))) == 0
    assert numerical_rank(np.zeros((0, 3))) == 0


@pytest.mark.parametrize(
    ("matrix", "rtol", "message"),
    [
        ([1.0], None, r"must be a matrix. Received: matrix.shape=\(1,\)"),
        ([[1.0], [np.nan]], None, "must be finite.*1 of 2 rows, first in row 1"),
        ([[1.0]], 1.0, r"`rtol` must be in \[0, 1\). Received: rtol=1.0"),
    ],
)
def test_numerical_rank_bad_input(matrix, rtol, message):
    with pytest.raises(ValueError, match=message):
        numerical_rank(matrix, rtol)


# --- the rank formula -----------------------------------------------------------------


def _duplicated():
    rows = _sample(9, 3)
    return rows[[0, 1, 2, 3, 0, 4, 5, 0, 6, 7, 8, 3]]


def _dead():
    raw = np.random.default_rng(3).normal(size=(24, 6))
    raw[:, [1, 4]] = 7.0
    return _normalise(raw)


STRUCTURED = {
    "generic": _sample(12, 3),
    "planted": _planted(14, 5, crowd=9, dim=2)[0],
    "planted, every row": _planted(12, 5, crowd=12, dim=3)[0],
    "duplicates": _duplicated(),
    "dead features": _dead(),
    "two points on a line": _sample(8, 1),
    "antipodes": _normalise(np.concatenate([np.eye(4), -np.eye(4)])),
    "a zero row": np.concatenate([_sample(6, 2), [[0.0, 0.0, 1.0]]]),
    "one row": np.array([[1.0, 1.0]]),
}


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
def test_formula_is_the_rank_of_the_features(name, m):
    features = STRUCTURED[name]
    found = union_rank(features, m)
    assert found.exact
    # The rank of drawn gates never exceeds the formula, and nearly always attains it.
    assert found.rank == _svd_rank(features, m)


def test_parallel_rows_have_different_gates():
    # Not normalised: z, 2 z and 3 z span one dimension, and their gates differ.
    row = np.array([0.3, -1.0, 0.5])
    features = np.outer([1, 2, 3], row)
    assert [union_rank(features, m).rank for m in (1, 2, 3)] == [1, 2, 3]
    assert [_svd_rank(features, m) for m in (1, 2, 3)] == [1, 2, 3]


def test_each_repetition_costs_one_rank_whatever_the_width():
    features = _duplicated()
    found = union_rank(features, 50)
    assert (found.n, found.n_distinct, found.rank) == (12, 9, 9)
    assert found.full
    assert _svd_rank(features, 50) == 9


def test_negative_zero_is_zero():
    assert union_rank(np.array([[0.0, 1.0], [-0.0, 1.0]]), 2).n_distinct == 1


def test_culprits_are_the_planted_rows():
    features, crowd = _planted(300, 20, crowd=80, dim=4)
    found = union_rank(features, 15)
    assert not found.full
    assert set(found.subset) == crowd
    assert found.subset_rank == 4
    assert found.rank == found.attained == 300 - 80 + 15 * 4 == _svd_rank(features, 15)
    assert union_rank(features, 20).full


@settings(deadline=None, max_examples=150)
@given(
    hnp.arrays(
        float,
        st.tuples(st.integers(1, 8), st.integers(1, 4)),
        elements=st.integers(-2, 2).map(float),
    ),
    st.integers(1, 4),
)
def test_union_rank_is_the_brute_force_one(features, width):
    assert union_rank(features, width) == union_rank_exact(features, width)


# Cases where the rows that come first must make room, by one move or by two.
ROOM = {
    "one move": [[0, 1, 0], [1, 1, 0], [1, 0, 0], [2, 2, 0]],
    "two moves": [
        [1, 0, 0],
        [0, 1, 1],
        [1, 0, -1],
        [-1, 0, -1],
        [0, -1, 1],
        [-1, 0, 0],
    ],
}


@pytest.mark.parametrize("name", ROOM)
@pytest.mark.parametrize("tail", [0, 1, 2])
def test_rows_make_room_for_others(name, tail):
    features = np.array(ROOM[name], dtype=float)
    rank = len(features)
    # More rows of a direction that is full already, and a zero row, gain nothing.
    for extra in range(tail):
        more = [5 + extra, 0, 0] if extra else [0, 0, 0]
        features = np.concatenate([features, [more]])
    found = union_rank(features, 2)
    assert found.rank == found.attained == rank
    assert found == union_rank_exact(features, 2)


def test_rows_that_moved_count_where_they_are():
    # After a move both sets have changed; the rows that follow meet both.
    features = np.array(
        [
            [0.0, 2, 2],
            [0, 0, -2],
            [0, 0, 0],
            [-1, 1, 1],
            [0, -2, 0],
            [0, -1, -1],
            [0, 1, 0],
        ]
    )
    found = union_rank(features, 2)
    assert (found.rank, found.subset) == (5, (0, 1, 2, 4, 5, 6))
    assert found == union_rank_exact(features, 2)


def test_union_rank_on_many_sparse_cases():
    # Few of such matrices need a row to move; among these there are a dozen.
    rng = np.random.default_rng(0)
    for _ in range(600):
        shape = rng.integers(4, 8), rng.integers(2, 5)
        features = rng.integers(-1, 2, size=shape) * (rng.random(shape) < 0.6)
        assert union_rank(features, 2) == union_rank_exact(features, 2)


def test_the_length_of_rows_does_not_matter():
    features, crowd = _planted(60, 9, crowd=30, dim=4)
    scales = 10.0 ** np.random.default_rng(0).integers(-12, 6, size=(60, 1))
    found = union_rank(features * scales, 6)
    assert found == union_rank(features, 6)
    assert set(found.subset) == crowd


def test_a_zero_row_is_lost_in_any_union():
    features = [[1.0, 2, 2, 1], [0, 0, 0, 0], [1, -2, -1, 0], [0, 1, -1, 1]]
    found = union_rank(features, 3)
    assert (found.rank, found.subset, found.subset_rank) == (3, (1,), 0)
    assert found == union_rank_exact(features, 3)


def test_brute_force_by_partitions():
    # Another way still: try every assignment of the rows to the m sets.
    rng = np.random.default_rng(5)
    sizes = set()
    for _ in range(12):
        features = rng.integers(-1, 2, size=(5, 3)).astype(float)
        features = np.unique(features, axis=0)
        best = max(
            sum(
                numerical_rank(features[np.array(owners) == k])
                for k in range(2)
                if k in owners
            )
            for owners in itertools.product(range(2), repeat=len(features))
        )
        assert union_rank_exact(features, 2).rank == best
        sizes.add(best)
    assert len(sizes) > 1


def test_every_set_takes_one_row_of_each_direction():
    # 3 rows along each of two axes, and 3 sets: each set must take one of each, so the
    # rows that came first must not share a set.
    features = np.array([[1.0, 0], [0, 1], [2, 0], [3, 0], [0, 2], [0, 3]])
    found = union_rank(features, 3)
    assert found.full
    assert found.exact
    assert union_rank(features, 2).subset == (0, 1, 2, 3, 4, 5)


def test_exact_union_rank_has_a_limit():
    with pytest.raises(ValueError, match=r"at most 16 distinct rows.*rows=17"):
        union_rank_exact(_sample(17, 3), 2)


@pytest.mark.parametrize("function", [union_rank, union_rank_exact])
def test_union_rank_bad_input(function):
    with pytest.raises(ValueError, match="`width` must be at least 1"):
        function(_sample(4, 2), 0)
    with pytest.raises(ValueError, match="`Zh` must be finite"):
        function([[np.inf]], 1)


def test_union_rank_rtol():
    nearly = np.array([[1.0, 0, 0], [0, 1, 0], [1, 1, 1e-4], [1, -1, 0]])
    assert union_rank(nearly, 1).rank == 3
    assert union_rank(nearly, 1, rtol=1e-3).rank == 2
    with pytest.raises(ValueError, match=r"`rtol` must be in .*rtol=0"):
        union_rank(nearly, 1, rtol=0.0)


# --- the check ------------------------------------------------------------------------


def test_check_passes_and_reports_what_svd_reports():
    features = _sample(120, 9)
    gates = _gates(10, default_width(120, 10, SLOPE))
    check = check_rank(features, *gates, SLOPE)
    values = np.linalg.svd(explicit_features(features, *gates, SLOPE), compute_uv=False)
    assert check.full
    assert check.complete
    assert check.reason is None
    assert (check.n, check.n_given, check.rows_checked, check.rank) == (120,) * 4
    assert (check.feature_rank, check.feature_dim) == (10, 10)
    assert check.width == check.needed_width == 24
    assert (check.n_duplicates, check.n_near, check.n_dead) == (0, 0, 0)
    assert (check.subset_size, check.subset_rank) == (0, 0)
    assert check.dtype == "float64"
    assert check.sigma_max == pytest.approx(values[0], rel=1e-10)
    assert check.sigma_min == pytest.approx(values[-1], rel=1e-6)
    assert 0 < check.tolerance < check.sigma_min
    eps = np.finfo(float).eps
    assert check.tolerance == pytest.approx(np.sqrt(120 * eps) * values[0])
    text = str(check)
    assert text.startswith("Full rank: the head separates all 120 samples (rank 120 of")
    assert "width 24, feature rank 10 of 10" in text


def test_to_dict_is_plain():
    check = check_rank(_sample(20, 3), *_gates(4, 10), SLOPE)
    values = json.loads(json.dumps(check.to_dict()))
    assert values["rank"] == 20
    assert values["full"] is True
    assert values["reason"] is None
    assert values == check.to_dict()


def test_width_too_small():
    features = _sample(120, 9)
    check = check_rank(features, *_gates(10, 11), SLOPE)
    assert not check.full
    assert check.reason == "width"
    assert check.rank == 110
    assert check.sigma_min <= check.tolerance
    assert (check.subset_size, check.subset_rank) == (120, 10)
    assert check.needed_width == 24
    assert "Width times feature rank is 110, less than the 120 distinct" in str(check)
    assert "whatever the gates. Use a width of 24 or more." in str(check)
    assert check_rank(features, *_gates(10, check.needed_width), SLOPE).full


def test_dead_features_need_a_larger_width():
    raw = np.random.default_rng(0).normal(size=(120, 9))
    raw[:, 2:8] = 3.0
    features = _normalise(raw)
    check = check_rank(features, *_gates(10, default_width(120, 10, SLOPE)), SLOPE)
    assert check.reason == "width"
    assert check.n_dead == 6
    assert (check.feature_rank, check.feature_dim) == (4, 10)
    assert check.rank == 24 * 4
    assert check.needed_width == 60
    assert "is 96 (6 features are constant: 2, 3, 4, 5, 6 and 1 more)" in str(check)
    assert check_rank(features, *_gates(10, check.needed_width), SLOPE).full


def test_collapsed_features_of_a_float32_trunk():
    # Rank 4 in exact arithmetic; rounding to float32 hides that from float64.
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(120, 3)) @ rng.normal(size=(3, 9))
    features = _normalise(raw).astype("float32")
    assert numerical_rank(features) == 10
    check = check_rank(features, *_gates(10, default_width(120, 10, SLOPE)), SLOPE)
    assert check.feature_rank == 4
    assert check.reason == "width"
    assert check_rank(features, *_gates(10, check.needed_width), SLOPE).full


def test_crowded_subspace():
    features, crowd = _planted(200, 19, crowd=120, dim=8)
    check = check_rank(features, *_gates(20, 11), SLOPE)
    assert check.width * check.feature_rank >= 200
    assert check.reason == "subset"
    assert check.rank == 200 - 120 + 11 * 8
    assert (check.subset_size, check.subset_rank) == (len(crowd), 8)
    assert check.needed_width == 2 * 120 / 8
    assert "120 of the samples lie in a subspace of dimension 8, where" in str(check)
    assert "this width separates only 88: samples " in str(check)
    assert " and 115 more. Use a width of 30 or more" in str(check)
    assert check_rank(features, *_gates(20, check.needed_width), SLOPE).full


def test_needed_width_serves_the_worst_of_nested_crowds():
    # 60 samples in 4 dimensions among 150 in 16, and 24 others. The larger set lacks
    # most at width 5, and mending it, with 10, would leave the smaller one lacking.
    rng = np.random.default_rng(2)
    raw = rng.normal(size=(174, 39))
    raw[:150, 15:] = 0
    raw[:60, 3:] = 0
    norms = np.linalg.norm(raw, axis=1, keepdims=True)
    features = np.concatenate([raw * np.sqrt(39) / norms, np.ones((174, 1))], axis=1)
    check = check_rank(features, *_gates(40, 5), 20.0)
    assert check.reason == "subset"
    assert (check.subset_size, check.subset_rank) == (150, 16)
    assert check.needed_width == 2 * 60 / 4
    assert check_rank(features, *_gates(40, check.needed_width), 20.0).full
    middling = check_rank(features, *_gates(40, 10), 20.0)
    assert middling.reason == "subset"
    assert (middling.subset_size, middling.subset_rank) == (60, 4)


def test_smooth_gates_cannot_tell_a_crowd_on_a_curve_apart():
    # 90 samples on a circle: any gates of width 60 are enough in exact arithmetic, and
    # steep ones come close in float64, where smooth ones fail.
    features, _ = _planted(200, 19, crowd=90, dim=3)
    assert union_rank(features, 60).full
    smooth = check_rank(features, *_gates(20, 60), 1.0)
    steep = check_rank(features, *_gates(20, 60), 20.0)
    assert smooth.reason == "conditioning"
    assert smooth.rank < steep.rank
    assert "larger width (120), or another slope: a steeper" in str(smooth)


def test_repeated_samples_are_told_apart_from_a_failing_width():
    features = _sample(60, 9)
    features = np.concatenate([features, features[:5], features[:1]])
    check = check_rank(features, *_gates(10, 14), SLOPE)
    assert check.n == 66
    assert check.n_duplicates == 6
    assert check.rows_checked == check.rank == 60
    assert check.complete
    assert not check.full
    assert check.reason is None
    assert check.needed_width == check.width
    assert "6 samples have exactly the features of another one" in str(check)
    assert "no width helps" in str(check)
    assert "Use a width" not in str(check)


def test_repeated_samples_and_a_failing_width():
    features = np.concatenate([_sample(60, 9), _sample(60, 9)[:7]])
    check = check_rank(features, *_gates(10, 5), SLOPE)
    assert check.reason == "width"
    assert check.needed_width == default_width(60, 10, SLOPE) == 12
    assert "Use a width of 12" in str(check)
    assert "7 samples have exactly" in str(check)
    mended = check_rank(features, *_gates(10, 12), SLOPE)
    assert mended.reason is None
    assert mended.rank == mended.rows_checked == 60


def test_samples_within_rounding():
    features = _sample(60, 9)
    copies = features[:3].copy()
    copies[:, :-1] *= 1 + 1e-9
    features = np.concatenate([features, copies])
    check = check_rank(features, *_gates(10, 14), SLOPE)
    assert check.n_duplicates == 0
    assert check.reason == "near"
    assert (check.n_near, check.rank) == (3, 60)
    assert check.needed_width == check.width
    assert "3 samples differ from another one by no more than rounding" in str(check)


def test_closed_gates():
    # All gates closed for the first sample: full rank on paper, nothing in float64.
    features = _sample(40, 9)
    gates, weights = _gates(10, 12)
    gates -= np.outer(features[0], 1 + features[0] @ gates) / 10
    np.testing.assert_allclose(features[0] @ gates, -1)
    check = check_rank(features, gates, weights, 400.0)
    assert union_rank(features, 12).full
    assert check.reason == "conditioning"
    assert check.rank < 40
    assert check.needed_width == 24
    assert "larger width (24), or another slope" in str(check)
    assert check_rank(features, gates, weights, SLOPE).full


def test_units_without_output_weight_do_not_count():
    gates, weights = _gates(10, 24)
    weights[5:] = 0
    check = check_rank(_sample(120, 9), gates, weights, SLOPE)
    assert check.width == 5
    assert check.reason == "width"
    assert check.rank == 50
    weights[:] = 0
    check = check_rank(_sample(120, 9), gates, weights, SLOPE)
    assert (check.width, check.rank, check.needed_width) == (0, 0, 24)


def test_subsample_passes_and_says_what_that_is_worth():
    check = check_rank(_sample(300, 9), *_gates(10, 60), SLOPE, max_rows=100)
    assert check.full
    assert not check.complete
    assert (check.n, check.rows_checked, check.rank) == (300, 100, 100)
    assert str(check).startswith("No rank deficiency found in 100 randomly chosen")
    assert "necessary and not sufficient" in str(check)


def test_subsample_cannot_excuse_a_width_too_small():
    check = check_rank(_sample(300, 9), *_gates(10, 29), SLOPE, max_rows=100)
    assert check.rank == check.rows_checked == 100
    assert not check.full
    assert check.reason == "width"
    assert check.needed_width == 60
    assert "deficient, whatever the gates" in str(check)


def test_subsample_scales_the_crowd_to_all_samples():
    features, _ = _planted(600, 19, crowd=400, dim=8)
    check = check_rank(features, *_gates(20, 30), SLOPE, max_rows=400)
    # Some 267 of the 400 rows are crowded, where 30 * 8 fit; all in all it is 400.
    assert check.reason == "subset"
    assert check.rows_checked == 400
    assert 240 < check.subset_size < 300
    assert check.needed_width == np.ceil(2 * check.subset_size / 8 * 600 / 400)
    assert check.needed_width >= 400 / 8
    assert check_rank(features, *_gates(20, check.needed_width), SLOPE).full


def test_subsample_depends_on_the_seed_alone():
    features, gates = _sample(300, 9), _gates(10, 60)
    first = check_rank(features, *gates, SLOPE, max_rows=100, seed=3)
    again = check_rank(features, *gates, SLOPE, max_rows=100, seed=3)
    other = check_rank(features, *gates, SLOPE, max_rows=100, seed=4)
    assert first == again
    assert first.sigma_min != other.sigma_min


def test_features_of_some_samples_only():
    features = _sample(100, 9)
    check = check_rank(features, *_gates(10, 30), SLOPE, n_samples=250)
    assert check.full
    assert not check.complete
    assert (check.n, check.n_given, check.rows_checked) == (250, 100, 100)
    check = check_rank(features, *_gates(10, 30), SLOPE, n_samples=1000)
    assert check.reason == "width"
    assert check.needed_width == 200
    assert "unless the samples not given add directions" in str(check)


def test_few_given_samples_do_not_limit_the_rank_of_the_others():
    # Six rows have rank 6; the ten columns may well have rank 10 over all samples.
    check = check_rank(_sample(6, 9), *_gates(10, 30), SLOPE, n_samples=250)
    assert check.feature_rank == 6
    assert check.full
    narrow = check_rank(_sample(6, 9), *_gates(10, 20), SLOPE, n_samples=250)
    assert narrow.reason == "width"
    assert narrow.needed_width == default_width(250, 10, SLOPE)


def test_check_names_no_culprit_where_the_search_is_too_long(monkeypatch):
    features, _ = _planted(200, 19, crowd=120, dim=8)
    monkeypatch.setattr("keras_dalign.numerics.rank._UNION_BUDGET", 0)
    check = check_rank(features, *_gates(20, 11), SLOPE)
    assert check.reason == "conditioning"
    assert check.needed_width == 22
    assert "No set of samples was identified" in str(check)


def test_one_sample():
    check = check_rank([[0.0, 1.0]], *_gates(2, 1), SLOPE)
    assert check.full
    assert check.rank == 1


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(1, 8), st.integers(1, 12), st.integers(0, 99))
def test_check_agrees_with_the_formula(n, p, m, seed):
    features = _sample(n, p, seed)
    if p == 1:
        features = np.unique(features, axis=0)
    gates = _gates(p + 1, m, seed)
    check = check_rank(features, *gates, 1.0)
    values = np.linalg.svd(gram_matrix(features, *gates, 1.0), compute_uv=False)
    assert check.rank <= union_rank(features, m).rank
    assert check.sigma_max == pytest.approx(np.sqrt(values[0]))
    assert check.full == (check.rank == len(features))


# --- outputs with gates of their own --------------------------------------------------


def _separate_gates(d, outputs, m):
    pairs = [_gates(d, m, seed) for seed in range(outputs)]
    gates, weights = zip(*pairs, strict=True)
    return np.stack(gates, axis=1), np.stack(weights)


def test_the_least_of_all_outputs_is_reported():
    features = _sample(60, 9)
    gates, weights = _separate_gates(10, 4, 14)
    check = check_rank(features, gates, weights, SLOPE)
    assert check.full
    singles = [check_rank(features, gates[:, c], weights[c], SLOPE) for c in range(4)]
    assert check.sigma_min == min(single.sigma_min for single in singles)
    assert singles[check.output].sigma_min == check.sigma_min
    assert f"least of all outputs, output {check.output})" in str(check)
    assert [single.output for single in singles] == [None] * 4
    # All units of one output are the same one.
    gates[:, 2] = gates[:, 2, :1]
    check = check_rank(features, gates, weights, SLOPE)
    assert not check.full
    assert check.output == 2
    assert check.rank == check_rank(features, gates[:, 2], weights[2], SLOPE).rank == 10
    assert check.to_dict()["output"] == 2


def test_outputs_differ_in_the_units_that_count():
    features = _sample(60, 9)
    gates, weights = _separate_gates(10, 3, 14)
    weights[1, 5:] = 0.0
    check = check_rank(features, gates, weights, SLOPE)
    assert (check.output, check.width, check.rank) == (1, 5, 50)
    assert check.reason == "width"


def test_shared_gates_are_checked_once(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return gram_matrix(*args)

    monkeypatch.setattr(rank_module, "gram_matrix", counted)
    gates, weights = _gates(10, 14)
    flat = check_rank(_sample(60, 9), gates, weights, SLOPE)
    assert len(calls) == 1
    shared = check_rank(_sample(60, 9), gates[:, None], weights[None], SLOPE)
    assert len(calls) == 2
    assert shared == flat
    assert shared.output is None


# --- who costs rank -------------------------------------------------------------------


def test_full_rank_names_nobody():
    features = _sample(60, 9)
    check = check_rank(features, *_gates(10, 14), SLOPE, u=features[:, :-1])
    assert check.full
    assert check.n_parallel == 0
    assert check.duplicates == check.near == check.parallel == ()
    assert check.dead == check.subset == ()


def test_repeated_samples_are_named_group_by_group():
    rows = _sample(10, 9)
    order = [0, 1, 2, 0, 3, 4, 1, 5, 0, 6, 7, 8, 9]
    check = check_rank(rows[order], *_gates(10, 6), SLOPE)
    assert check.duplicates == ((0, 3, 8), (1, 6))
    assert check.n_duplicates == 3
    assert check.n_parallel is None
    assert "another one (samples 0, 3, 8; 1 and 6): identical inputs" in str(check)
    assert "positive multiples" not in str(check)


def test_long_lists_are_cut_and_counted():
    rows = _sample(40, 9)
    features = np.concatenate([rows, np.repeat(rows[:30], 1, axis=0)])
    features = np.concatenate([features, np.repeat(rows[:1], 50, axis=0)])
    check = check_rank(features, *_gates(10, 30), SLOPE)
    assert check.n_duplicates == 80
    assert len(check.duplicates) == 20
    assert check.duplicates[0] == (0, 40, *range(70, 88))
    assert check.duplicates[1:] == tuple((i, 40 + i) for i in range(1, 20))
    assert "samples 0, 40, 70, 71, 72, ...; 1 and 41; 2 and 42; " in str(check)
    assert str(check).count("; 4 and 44; ...") == 1


def _raw_and_rows(n, p, seed=0):
    """Raw features and what standardisation by fixed moments and length makes of it."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=p)
    raw = mean + rng.normal(size=(n, p))
    return mean, raw


def _normalised_about(mean, raw):
    unit = raw - mean
    unit *= np.sqrt(raw.shape[1]) / np.linalg.norm(unit, axis=1, keepdims=True)
    return np.concatenate([unit, np.ones((len(raw), 1))], axis=1)


def test_parallel_samples_are_told_from_identical_ones():
    mean, raw = _raw_and_rows(60, 9)
    # Exactly the same normalised row for a power of two, or one within rounding.
    raw[10] = raw[3]
    raw[20] = mean + 3 * (raw[5] - mean)
    raw[30] = mean + 7 * (raw[5] - mean)
    raw[40] = mean - 2 * (raw[6] - mean)
    features = _normalised_about(mean, raw)
    features[30] = features[20]
    check = check_rank(features, *_gates(10, 14), SLOPE, u=raw)
    assert (check.n_duplicates, check.n_near, check.n_parallel) == (2, 1, 2)
    assert check.reason == "near"
    assert check.duplicates == ((3, 10), (20, 30))
    assert check.near == ((20, 5),)
    assert check.parallel == ((30, 20), (20, 5))
    assert "Of these, 2 differ from the other one before normalisation" in str(check)
    assert "rounding (samples 20 and 5)" in str(check)
    plain = check_rank(features, *_gates(10, 14), SLOPE)
    assert plain.n_parallel is None
    assert plain.parallel == ()


def test_the_rounding_of_float32_is_no_difference():
    mean, raw = _raw_and_rows(60, 9)
    raw[10] = raw[3] * (1 + 2e-7)
    features = _normalised_about(mean, raw)
    features[10] = features[3]
    check = check_rank(features, *_gates(10, 14), SLOPE, u=raw.astype("float32"))
    assert (check.n_duplicates, check.n_parallel) == (1, 0)


def test_crowded_samples_are_named():
    features, crowd = _planted(200, 19, crowd=120, dim=8)
    check = check_rank(features, *_gates(20, 11), SLOPE)
    assert check.subset == tuple(sorted(crowd)[:20])
    named = ", ".join(map(str, check.subset[:5]))
    assert f"only 88: samples {named} and 115 more. Use" in str(check)


def test_names_of_sampled_rows_are_those_of_the_rows_given():
    features, crowd = _planted(600, 19, crowd=400, dim=8)
    # Repetitions in front shift the distinct rows against the rows given.
    features = np.concatenate([features[:1], features[:1], features])
    crowd = {index + 2 for index in crowd}
    check = check_rank(features, *_gates(20, 30), SLOPE, max_rows=400)
    assert check.reason == "subset"
    assert len(check.subset) == 20
    assert set(check.subset) <= crowd | {0}
    assert check.duplicates == ((0, 1, 2),)


def test_positions_name_the_samples():
    features, crowd = _planted(200, 19, crowd=120, dim=8)
    features[7] = features[4]
    positions = 1000 + 3 * np.arange(200)
    check = check_rank(features, *_gates(20, 11), SLOPE, positions=positions)
    assert (1012, 1021) in check.duplicates
    assert set(check.subset) <= {1000 + 3 * index for index in crowd}
    assert check.subset


def test_dead_features_are_named_by_column():
    raw = np.random.default_rng(0).normal(size=(120, 40))
    raw[:, 5:35] = 3.0
    check = check_rank(_normalise(raw), *_gates(41, 6), SLOPE)
    assert check.n_dead == 30
    assert check.dead == tuple(range(5, 25))
    assert "(30 features are constant: 5, 6, 7, 8, 9 and 25 more)" in str(check)


def test_lists_become_json():
    rows = _sample(40, 9)
    rows[0, :-1], rows[1] = rows[0, :-1], rows[0]
    check = check_rank(rows, *_gates(10, 3), SLOPE, u=rows)
    values = check.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["duplicates"] == [[0, 1]]
    assert len(values["subset"]) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Zh": [[1.0, np.nan], [0, 1]]}, "`Zh` must be finite.*1 of 2 rows.*row 0"),
        ({"Zh": np.ones(3)}, "`Zh` must be a matrix"),
        ({"Zh": np.ones((0, 2))}, r"at least one row.*Zh.shape=\(0, 2\)"),
        ({"Zh": [[1.0, 2.0]]}, "must be the constant 1.*from 2.0 to 2.0"),
        ({"R": np.full((2, 3), np.inf)}, "`R` must be finite"),
        ({"R": np.ones((3, 3))}, "one row per column of `Zh`"),
        ({"w": [1.0, np.nan, 1.0]}, "`w` must have at least one entry, all of them"),
        ({"w": [], "R": np.ones((2, 0))}, "`w` must have at least one entry"),
        ({"w": [1.0]}, r"`w` must have one entry per gate.*\(1,\), R.shape=\(2, 3\)"),
        ({"w": np.ones((2, 3))}, "`w` must have one entry per gate"),
        ({"R": np.ones((2, 2, 3))}, "`w` must have one entry per gate"),
        ({"R": np.full((2, 1, 3), np.nan)}, r"`R` must be finite, of shape \(d, m\)"),
        ({"R": np.ones((2, 1, 1, 3))}, r"or \(d, C, m\).*R.shape=\(2, 1, 1, 3\)"),
        ({"slope": -1.0}, "`slope` must be positive"),
        ({"n_samples": 1}, "`n_samples` must not be smaller.*n_samples=1"),
        ({"max_rows": 0}, "`max_rows` must be at least 1. Received: max_rows=0"),
        ({"u": np.ones((3, 1))}, r"`u` must have one row per row.*shape=\(3, 1\), 2"),
        ({"u": np.ones(2)}, "`u` must have one row per row"),
        ({"u": [[np.nan], [0.0]]}, "`u` must be finite"),
        ({"positions": [1, 2, 3]}, r"`positions` must hold one integer.*\(3,\)"),
        ({"positions": [0.5, 1.0]}, "`positions` must hold one integer.*float64"),
    ],
)
def test_check_bad_input(change, message):
    arguments = {"Zh": [[1.0, 1.0], [-1.0, 1.0]], "R": np.ones((2, 3)), "w": np.ones(3)}
    with pytest.raises(ValueError, match=message):
        check_rank(**{**arguments, "slope": SLOPE, **change})
