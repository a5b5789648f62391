"""Checks whether the alignment head can fit any labels on given samples.

The head separates every sample from the others exactly when its gated features `Phi`
(`n x (m * d)`, see `gram.py`) have rank `n`. `check_rank` measures that rank for given
gates. `union.py` has the rank that exact arithmetic gives for almost every choice of
gates; `check_rank` uses it to find the samples that cause a failure.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from keras_dalign.numerics.default_width import default_width
from keras_dalign.numerics.gram import gram_matrix
from keras_dalign.numerics.rank_check import Pairs, RankCheck, Reason
from keras_dalign.numerics.rounding import EPS
from keras_dalign.numerics.subspace import (
    finite_matrix,
    first_equal,
    visible,
    visible_rank,
)
from keras_dalign.numerics.union import union_rank

if TYPE_CHECKING:
    from keras_dalign.numerics import Array, Indices

# `union_rank` takes about rows * width * rank^2 multiply-adds. Above this number, some
# five seconds on two cores, a failed check does not search for the samples that cause
# the failure.
_UNION_BUDGET = 1e10

# Indices, groups or pairs listed in a check.
_MAX_LISTED = 20

# Features that agree up to this relative size are the same up to the rounding of a
# float32 trunk.
_SAME_FEATURES = 1e-5


def check_rank(
    Zh: npt.ArrayLike,
    R: npt.ArrayLike,
    w: npt.ArrayLike,
    slope: float,
    *,
    n_samples: int | None = None,
    max_rows: int = 2048,
    seed: int = 0,
    u: npt.ArrayLike | None = None,
    positions: npt.ArrayLike | None = None,
) -> RankCheck:
    """Check whether a head's gates separate the samples.

    The steps are:

    1. The rank of `Zh`, and the condition `m * rank(Zh) >= n`. Without it the rank is
       deficient whatever the gates.
    2. Samples with identical features, which no head separates.
    3. The eigenvalues of the Gram matrix, in float64, of the distinct samples, or of
       `max_rows` of them chosen at random if there are more. If each output has its own
       gates, this is done for every output, and the result is for the output of least
       rank.
    4. If step 1 or 3 fails, a search for the set of samples that causes it.

    An eigenvalue of the Gram matrix counts as zero up to
    `max(rows, d, m) * eps * lambda_max`, the usual bound on the rounding error of a
    zero eigenvalue. A singular value of `Phi` thus counts as zero up to the square root
    of that, some `1e-6 * sigma_max` or less. The check errs on the safe side: it may
    report a deficiency where exact arithmetic has full rank, and hardly ever the
    reverse. The rank of `Zh` uses the same cut-off, `sqrt(max(n, d) * eps)`. Directions
    below it, such as the rounding noise of a float32 trunk, do not show in the Gram
    matrix.

    Takes about half a second for 2048 rows and shared gates on two cores, and some
    seconds more for the search of step 4.

    Args:
        Zh: Normalised features, shape `(n, d)`, last column 1.
        R: Gates, shape `(d, m)`, or `(d, C, m)` if each of `C` outputs has its own.
        w: Output weights of the gated units, shape `(m,)` or `(C, m)`.
        slope: Slope of the sigmoid, positive.
        n_samples: Number of training samples, if `Zh` holds only some of them. The
            ranks and repetitions are then those of the rows given.
        max_rows: Number of rows up to which the Gram matrix is decomposed.
        seed: Seed for the choice of rows.
        u: The features before standardisation and normalisation, shape `(n, ...)`. They
            distinguish samples that are equal from samples that only normalisation
            makes equal.
        positions: Positions of the samples in the data set, shape `(n,)`, to name them
            by, if `Zh` holds only some of them. Defaults to `0..n - 1`.

    Returns:
        A `RankCheck`.

    Raises:
        ValueError: If `Zh`, `R`, `w` or `u` has the wrong shape or is not finite, the
            last column of `Zh` is not 1, a number is out of its range, or there is not
            one position per row.
    """
    features = finite_matrix(Zh, "Zh")
    gates, weights = _gates_by_output(R, w)
    given, dim = features.shape
    n = given if n_samples is None else int(n_samples)
    _check_arguments(features, weights, n, max_rows)
    raw = _raw_features(u, given)
    names = _positions(positions, given)
    width = int(np.count_nonzero(weights, axis=1).min())

    cut = visible(features)
    feature_rank = visible_rank(features)
    # Samples that were not given may add directions, unless those given are already
    # linearly dependent.
    rank_bound = feature_rank if feature_rank < given or given == n else min(n, dim)
    first = first_equal(features)
    distinct = np.flatnonzero(first == np.arange(given))
    repeated = np.flatnonzero(first != np.arange(given))
    n_duplicates = len(repeated)
    n_distinct = n - n_duplicates
    too_narrow = width * rank_bound < n_distinct

    if len(distinct) > max_rows:
        chosen = np.random.default_rng(seed).choice(
            len(distinct), max_rows, replace=False
        )
        distinct = distinct[np.sort(chosen)]
    rows = features[distinct]
    output, spectrum = _weakest_output(rows, gates, weights, slope)
    eigenvalues, zero, rank = spectrum.eigenvalues, spectrum.zero, spectrum.rank

    reason: Reason | None = None
    needed, subset_rank = width, 0
    subset = near = near_to = np.zeros(0, np.intp)
    if too_narrow or rank < len(rows):
        subset, subset_rank, crowding = _crowding(rows, width, cut)
        crowding *= n_distinct / len(rows)
        needed = max(
            default_width(n_distinct, rank_bound, slope), math.ceil(2 * crowding)
        )
        near, near_to = _near_pairs(rows)
        if too_narrow:
            reason = "width"
        elif len(subset):
            reason = "subset"
        elif len(near) and rank >= len(rows) - len(near):
            reason, needed = "near", width
        else:
            reason, needed = "conditioning", max(needed, 2 * width)

    near, near_to = distinct[near], distinct[near_to]
    same = np.concatenate([repeated, near]), np.concatenate([first[repeated], near_to])
    parallel, parallel_to = _differing(raw, *same)
    dead = np.ptp(features[:, :-1], axis=0) <= cut * math.sqrt(dim)
    return RankCheck(
        n=n,
        n_given=given,
        rows_checked=len(rows),
        rank=rank,
        full=reason is None and n_duplicates == 0,
        feature_rank=feature_rank,
        feature_dim=dim,
        width=width,
        needed_width=needed,
        n_duplicates=n_duplicates,
        n_near=len(near),
        n_parallel=None if raw is None else len(parallel),
        n_dead=int(np.count_nonzero(dead)),
        subset_size=len(subset),
        subset_rank=subset_rank,
        sigma_min=math.sqrt(eigenvalues[0]),
        sigma_max=math.sqrt(eigenvalues[-1]),
        tolerance=math.sqrt(zero),
        dtype="float64",
        output=output if len(weights) > 1 else None,
        reason=reason,
        duplicates=_duplicate_groups(first, names),
        near=_named_pairs(near, near_to, names),
        parallel=_named_pairs(parallel, parallel_to, names),
        dead=_listed(np.flatnonzero(dead)),
        subset=_listed(names[distinct[subset]]),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Spectrum:
    """Eigenvalues of a Gram matrix, ascending, the cut-off of zeros, and the rank."""

    eigenvalues: Array
    zero: float
    rank: int


def _weakest_output(
    rows: Array, gates: Array, weights: Array, slope: float
) -> tuple[int, _Spectrum]:
    """The output whose Gram matrix has the least rank, and its spectrum."""
    spectra = []
    for output, output_weights in enumerate(weights):
        gram = gram_matrix(rows, gates[:, output], output_weights, slope)
        eigenvalues = np.maximum(np.linalg.eigvalsh(gram), 0.0)
        zero = max(*rows.shape, len(output_weights)) * EPS * eigenvalues[-1]
        rank = int(np.count_nonzero(eigenvalues > zero))
        spectra.append(_Spectrum(eigenvalues, zero, rank))
    return min(
        enumerate(spectra),
        key=lambda item: (item[1].rank, item[1].eigenvalues[0]),
    )


def _gates_by_output(R: npt.ArrayLike, w: npt.ArrayLike) -> tuple[Array, Array]:
    """The arguments `R` and `w` as gates `(d, G, m)` and weights `(G, m)`."""
    gates, weights = (np.asarray(array, dtype=np.float64) for array in (R, w))
    if gates.ndim == 2:
        gates = finite_matrix(gates, "R")[:, None]
    if weights.ndim == 1:
        weights = weights[None]
    if gates.ndim != 3 or not np.isfinite(gates).all():
        raise ValueError(
            "`R` must be finite, of shape (d, m) or (d, C, m). Received: "
            f"R.shape={np.shape(R)}"
        )
    if weights.shape != gates.shape[1:]:
        raise ValueError(
            "`w` must have one entry per gate. Received: "
            f"w.shape={np.shape(w)}, R.shape={np.shape(R)}"
        )
    return gates, weights


def _crowding(rows: Array, width: int, rtol: float) -> tuple[Indices, int, float]:
    """Finds the set of rows with too low a rank for the width, and the ratio needed.

    A set of rows needs a width of at least size / rank. The largest such ratio is found
    up to less than 1: the width is raised to the ratio of a set that fails, until no
    set fails.

    Returns:
        The indices and the rank of the set that fails `width`, and the largest ratio.
        Empty and 0 if no set fails, or if the search would take too long.
    """
    subset, rank, ratio = np.zeros(0, np.intp), 0, 0.0
    trial = max(width, 1)
    dim = rows.shape[1]
    while len(rows) * trial * dim**2 <= _UNION_BUDGET:
        found = union_rank(rows, trial, rtol=rtol)
        if found.full or not found.exact:
            break
        if not len(subset):
            subset, rank = np.array(found.subset, np.intp), found.subset_rank
        ratio = len(found.subset) / found.subset_rank
        trial = max(trial + 1, math.ceil(ratio))
    return subset, rank, ratio


def _near_pairs(rows: Array) -> tuple[Indices, Indices]:
    """Rows that the Gram matrix does not separate from an earlier row, and that row."""
    gram = rows @ rows.T
    norms = np.diagonal(gram).copy()
    squares = norms[:, None] + norms[None, :] - 2 * gram
    near = np.tril(squares <= max(rows.shape) * EPS * norms[:, None], -1)
    found = np.flatnonzero(near.any(axis=1))
    return found, near[found].argmax(axis=1)


def _differing(
    raw: np.ndarray | None, samples: Indices, others: Indices
) -> tuple[Indices, Indices]:
    """The pairs whose raw features differ by more than rounding in float32."""
    if raw is None:
        return samples[:0], others[:0]
    left, right = raw[samples].astype(np.float64), raw[others].astype(np.float64)
    lengths = (np.linalg.norm(rows, axis=1) for rows in (left, right))
    distance = np.linalg.norm(left - right, axis=1)
    differ = distance > _SAME_FEATURES * np.maximum(*lengths)
    return samples[differ], others[differ]


def _duplicate_groups(first: Indices, names: Indices) -> tuple[tuple[int, ...], ...]:
    leaders = np.unique(first[first != np.arange(len(first))])[:_MAX_LISTED]
    return tuple(_listed(names[first == leader]) for leader in leaders)


def _named_pairs(samples: Indices, others: Indices, names: Indices) -> Pairs:
    pairs = zip(names[samples[:_MAX_LISTED]], names[others[:_MAX_LISTED]], strict=True)
    return tuple((int(sample), int(other)) for sample, other in pairs)


def _listed(indices: Indices) -> tuple[int, ...]:
    return tuple(int(index) for index in indices[:_MAX_LISTED])


def _raw_features(u: npt.ArrayLike | None, given: int) -> np.ndarray | None:
    if u is None:
        return None
    raw = np.asarray(u)
    if raw.ndim < 2 or len(raw) != given:
        raise ValueError(
            "`u` must have one row per row of `Zh`. Received: "
            f"u.shape={raw.shape}, {given} rows of `Zh`"
        )
    if not np.isfinite(raw).all():
        raise ValueError("`u` must be finite. Received: NaN or infinity in `u`")
    return raw.reshape(given, -1)


def _positions(positions: npt.ArrayLike | None, given: int) -> Indices:
    if positions is None:
        return np.arange(given)
    names = np.asarray(positions)
    if names.shape != (given,) or names.dtype.kind not in "iu":
        raise ValueError(
            "`positions` must hold one integer per row of `Zh`. Received: "
            f"positions of shape {names.shape} and dtype {names.dtype}, {given} rows"
        )
    return names


def _check_arguments(
    features: Array, weights: Array, n_samples: int, max_rows: int
) -> None:
    if features.size == 0:
        raise ValueError(
            "`Zh` must have at least one row and one column. "
            f"Received: Zh.shape={features.shape}"
        )
    if not (features[:, -1] == 1).all():
        raise ValueError(
            "The last column of `Zh` must be the constant 1. "
            f"Received: values from {features[:, -1].min()} to {features[:, -1].max()}"
        )
    if weights.size == 0 or not np.isfinite(weights).all():
        raise ValueError(
            "`w` must have at least one entry, all of them finite. "
            f"Received: w={weights}"
        )
    if n_samples < len(features):
        raise ValueError(
            "`n_samples` must not be smaller than the number of rows of `Zh`. "
            f"Received: n_samples={n_samples}, Zh.shape={features.shape}"
        )
    if max_rows < 1:
        raise ValueError(
            f"`max_rows` must be at least 1. Received: max_rows={max_rows}"
        )
