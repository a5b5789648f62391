"""Can the alignment head fit any labels on these samples? The rank, and why it fails.

The gated features `Phi` (`n x (m * d)`, see `gram.py`) separate every sample from the
others exactly when their rank is `n`. For distinct rows of `Zh` and almost every choice
of gates that rank is known without the gates:

    rank(Phi) = min over sets A of distinct rows ( n_distinct - |A| + m * rank(Zh_A) ),

the rank of the union of `m` copies of the linear matroid of `Zh`. A failed rank thus
has a culprit: a set `A` of more than `m * rank(Zh_A)` samples in too small a subspace.
Identical rows open identical gates, so they count once: each repetition costs one rank,
whatever the width.

The formula speaks of exact arithmetic; `check_rank` asks the gates themselves.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from keras_dalign.gram import Array, gram_matrix

_EPS = float(np.finfo(np.float64).eps)

# `union_rank` takes about rows * width * rank^2 multiply-adds. Beyond this many
# (some five seconds on two cores) a failed check looks for no culprit set.
_UNION_BUDGET = 1e10

# Subsets of n rows in `union_rank_exact`: 2^n rank computations.
_EXACT_LIMIT = 16


def default_width(n_samples: int, rank: int) -> int:
    """The number of gated units that can separate `n_samples`, with room to spare.

    `ceil(2 * n_samples / rank)`. Half of it is the least that counting allows
    (`m * rank >= n`); the factor 2 pays for features that die or collapse while the
    trunk trains and so cost rank, and it keeps the Gram matrix well conditioned.

    Args:
        n_samples: Number of training samples.
        rank: Rank of their normalised features, constant column included.

    Returns:
        The width `m`, at least 1.

    Raises:
        ValueError: If either number is below 1.
    """
    if n_samples < 1:
        raise ValueError(
            f"`n_samples` must be at least 1. Received: n_samples={n_samples}"
        )
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1. Received: rank={rank}")
    # In integers: a float quotient can round a whole number upwards.
    return -(-2 * int(n_samples) // int(rank))


def numerical_rank(matrix: npt.ArrayLike, rtol: float | None = None) -> int:
    """Rank of a matrix in float64: the singular values above a cut-off.

    The default cut-off is `max(shape) * eps * sigma_max`, the size to which rounding in
    a backward stable decomposition may lift a singular value that is zero (the rule of
    LAPACK users, and of `numpy.linalg.matrix_rank`).

    A tall matrix is first reduced to its triangular factor, block of rows by block of
    rows, and the singular values are those of the factor. This costs about
    `2 n d^2` flop (`n = 1e5`: `d = 512` about a second or two on two cores, `d = 2000`
    half a minute), a copy of a few `d x d` blocks in memory, and no accuracy, whereas
    the `d x d` Gram matrix would square the condition number and lose every singular
    value below `1e-8 * sigma_max`.

    Args:
        matrix: Shape `(n, d)`, any real dtype; judged in float64.
        rtol: Cut-off relative to the largest singular value. The default is
            `max(n, d) * eps`.

    Returns:
        The rank, `0` for a zero or empty matrix.

    Raises:
        ValueError: If it is no matrix, or not finite, or `rtol` is outside `[0, 1)`.
    """
    checked = _finite_matrix(matrix, "matrix")
    if rtol is None:
        rtol = max(checked.shape) * _EPS
    elif not 0 <= rtol < 1:
        raise ValueError(f"`rtol` must be in [0, 1). Received: rtol={rtol}")
    if checked.size == 0:
        return 0
    values = _singular_values(checked)
    return int(np.count_nonzero(values > rtol * values[0]))


@dataclasses.dataclass(frozen=True)
class UnionRank:
    """The rank of the gated features for almost every choice of gates, with its proof.

    Attributes:
        rank: `n_distinct - len(subset) + width * subset_rank`. No gates of this width
            reach more.
        attained: Number of rows found to be separable by a partition into `width`
            linearly independent sets. Equal to `rank` unless rounding blurs which rows
            are independent.
        n: Number of rows.
        n_distinct: Number of distinct rows.
        width: Number of gates `m`.
        subset: Indices of the rows that minimise the formula, the smallest such set:
            those too many for the subspace they span. Empty if there are none.
            Of repeated rows it names the first.
        subset_rank: Rank of these rows.
    """

    rank: int
    attained: int
    n: int
    n_distinct: int
    width: int
    subset: tuple[int, ...]
    subset_rank: int

    @property
    def full(self) -> bool:
        """Whether every distinct row can be separated from the others."""
        return self.attained == self.n_distinct

    @property
    def exact(self) -> bool:
        """Whether the bounds from both sides agree, which proves `rank`."""
        return self.rank == self.attained


def union_rank_exact(Zh: npt.ArrayLike, width: int) -> UnionRank:
    """`union_rank` by brute force over all subsets: the reference, for a few rows.

    Args:
        Zh: Features, shape `(n, d)`, at most 16 distinct rows.
        width: Number of gates, at least 1.

    Returns:
        A `UnionRank` whose subset is the smallest of the minimising ones.

    Raises:
        ValueError: If `Zh` is not a finite matrix, has more than 16 distinct rows, or
            `width` is below 1.
    """
    features = _finite_matrix(Zh, "Zh")
    _check_width(width)
    distinct = _first_occurrences(features)
    n = len(distinct)
    if n > _EXACT_LIMIT:
        raise ValueError(
            f"`union_rank_exact` goes through all subsets of at most {_EXACT_LIMIT} "
            f"distinct rows; use `union_rank`. Received: distinct rows={n}"
        )
    best, best_rank = n, 0
    best_subset: tuple[int, ...] = ()
    # By growing size, so that the first of equal values has the fewest rows.
    for size in range(1, n + 1):
        for subset in itertools.combinations(distinct.tolist(), size):
            subset_rank = numerical_rank(features[list(subset)])
            value = n - size + width * subset_rank
            if value < best:
                best, best_subset, best_rank = value, subset, subset_rank
    return UnionRank(best, best, len(features), n, width, best_subset, best_rank)


def union_rank(
    Zh: npt.ArrayLike, width: int, *, rtol: float | None = None
) -> UnionRank:
    """Rank of the gated features for almost every choice of gates, and the culprits.

    Partitions as many distinct rows as possible into `width` linearly independent sets,
    by augmenting paths (matroid partition). The partition shows from below, and the set
    of rows where the paths get stuck from above, what the rank is.

    Takes about `n * width * rank^2` multiply-adds where rows find a place directly,
    and as many again for every search that gets stuck in a new subspace; memory
    `2 * width * rank^2`. Meant for some thousands of rows.

    Args:
        Zh: Features, shape `(n, d)`.
        width: Number of gates, at least 1.
        rtol: Relative distance from a subspace below which a row counts as inside. The
            default, `sqrt(max(n, d) * eps)`, is where a direction drops out of the Gram
            matrix, which squares it, in float64.

    Returns:
        A `UnionRank`.

    Raises:
        ValueError: If `Zh` is not a finite matrix, or `width` is below 1, or `rtol`
            is outside `(0, 1)`.
    """
    features = _finite_matrix(Zh, "Zh")
    _check_width(width)
    if rtol is None:
        rtol = _visible(features)
    elif not 0 < rtol < 1:
        raise ValueError(f"`rtol` must be in (0, 1). Received: rtol={rtol}")
    distinct = _first_occurrences(features)
    # Independence does not depend on the rows' lengths; the cut-offs would.
    rows = _unit_rows(features[distinct])
    width = int(width)
    partition = _Partition(_coordinates(rows, rtol), width, rtol)
    stuck = partition.fill()
    subset_rank = numerical_rank(rows[stuck], rtol) if len(stuck) else 0
    return UnionRank(
        rank=len(rows) - len(stuck) + width * subset_rank,
        attained=partition.placed,
        n=len(features),
        n_distinct=len(rows),
        width=width,
        subset=tuple(distinct[stuck].tolist()),
        subset_rank=subset_rank,
    )


Reason = Literal["width", "subset", "near", "conditioning"]


@dataclasses.dataclass(frozen=True)
class RankCheck:
    """Outcome of `check_rank`; prints as a sentence with the numbers and the remedy.

    Attributes:
        n: Number of samples.
        n_given: Number of them whose features were given.
        rows_checked: Number of distinct rows whose Gram matrix was decomposed.
        rank: Numerical rank of that Gram matrix.
        full: Whether nothing was found that costs rank. Where `complete` is false, this
            is necessary for full rank, and not sufficient.
        feature_rank: Numerical rank of the normalised features, constant included.
        feature_dim: Number of columns of the normalised features, `d`.
        width: Number of gated units whose output weight is not zero, `m`.
        needed_width: A width that mends what a width can mend: `width` where nothing
            of that kind failed, else the default width for the rank of the features
            or, if that asks for more, of the samples crowded into a subspace. It is
            right for exact arithmetic. Check again with it: float64 may want more, or
            a steeper slope, where many samples share very few dimensions. An
            estimate if `reason` is `"conditioning"` or the check is not `complete`.
        n_duplicates: Number of samples whose features repeat those of an earlier one.
        n_near: Number of the rows checked that lie, without being equal, within
            rounding of an earlier one. Counted only if the rank falls short.
        n_dead: Number of features that are constant over the samples, without the
            constant column itself.
        subset_size: Number of the rows checked that share too small a subspace, 0 if
            none were found.
        subset_rank: Dimension of that subspace.
        sigma_min: Smallest singular value of the features `Phi` of the rows checked.
        sigma_max: Largest singular value of the same.
        tolerance: Singular values up to this one count as zero.
        dtype: The precision in which all this was judged.
        reason: What costs rank among distinct samples, if anything does: `"width"`
            (fewer than `n` features, whatever the gates), `"subset"` (too many samples
            in one subspace), `"near"` (samples too close for float64),
            `"conditioning"` (none of these, or too many samples and features for a
            search of some seconds).
    """

    n: int
    n_given: int
    rows_checked: int
    rank: int
    full: bool
    feature_rank: int
    feature_dim: int
    width: int
    needed_width: int
    n_duplicates: int
    n_near: int
    n_dead: int
    subset_size: int
    subset_rank: int
    sigma_min: float
    sigma_max: float
    tolerance: float
    dtype: str
    reason: Reason | None

    @property
    def complete(self) -> bool:
        """Whether all distinct samples were in the Gram matrix that was decomposed."""
        return self.rows_checked == self.n - self.n_duplicates

    def to_dict(self) -> dict[str, Any]:
        """The attributes as a dictionary of plain Python values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """One sentence on the outcome, then the cause and the remedy if it failed."""
        numbers = (
            f"rank {self.rank} of {self.rows_checked}, "
            f"sigma_min {self.sigma_min:.2g}, sigma_max {self.sigma_max:.2g}, "
            f"tolerance {self.tolerance:.2g}, {self.dtype}; width {self.width}, "
            f"feature rank {self.feature_rank} of {self.feature_dim}"
        )
        if self.full and self.complete:
            return f"Full rank: the head separates all {self.n} samples ({numbers})."
        scope = (
            f"{self.rows_checked} randomly chosen samples of {self.n}"
            if not self.complete
            else f"{self.rows_checked} distinct samples of {self.n}"
        )
        if self.full:
            return (
                f"No rank deficiency found in {scope}, which is necessary and not "
                f"sufficient for full rank ({numbers})."
            )
        parts = [f"Rank deficient, checked on {scope} ({numbers})."]
        parts.extend(self._causes())
        if self.n_duplicates:
            parts.append(
                f"{self.n_duplicates} samples have exactly the features of another "
                "one: identical inputs cost rank, and no width helps."
            )
        return " ".join(parts)

    def _causes(self) -> list[str]:
        causes = []
        use = f"Use a width of {self.needed_width} or more."
        if self.reason == "width":
            dead = f" ({self.n_dead} features are constant)" if self.n_dead else ""
            scope = (
                "whatever the gates"
                if self.n_given == self.n
                else "unless the samples not given add directions"
            )
            causes.append(
                f"Width times feature rank is {self.width * self.feature_rank}{dead}, "
                f"less than the {self.n - self.n_duplicates} distinct samples, so the "
                f"rank is deficient, {scope}. {use}"
            )
        elif self.reason == "subset":
            causes.append(
                f"{self.subset_size} of the samples lie in a subspace of dimension "
                f"{self.subset_rank}, where this width separates only "
                f"{self.width * self.subset_rank}. {use}"
            )
        elif self.reason == "conditioning":
            causes.append(
                "No set of samples was identified as the cause; most likely these "
                "gates and features are too ill-conditioned for float64. Try a larger "
                f"width ({self.needed_width}), or another slope: a steeper one tells "
                "close samples apart, a gentler one opens gates that are all closed."
            )
        if self.n_near:
            causes.append(
                f"{self.n_near} samples differ from another one by no more than "
                "rounding: such inputs cost rank in float64, and no width helps."
            )
        return causes


def check_rank(
    Zh: npt.ArrayLike,
    R: npt.ArrayLike,
    w: npt.ArrayLike,
    slope: float,
    *,
    n_samples: int | None = None,
    max_rows: int = 2048,
    seed: int = 0,
) -> RankCheck:
    """Check whether one class's gates separate the samples.

    In this order: (a) the rank of `Zh` and the condition `m * rank(Zh) >= n`, without
    which the rank is deficient whatever the gates; (b) samples with identical features,
    which no head separates; (c) in float64, the eigenvalues of the Gram matrix of the
    distinct samples, or of `max_rows` of them chosen at random if there are more.
    If (a) or (c) fails, the set of samples that causes it is looked for.

    An eigenvalue of the Gram matrix counts as zero up to
    `max(rows, d, m) * eps * lambda_max`, the usual bound on what rounding leaves of a
    zero, so a singular value of `Phi` does up to the square root of that, some
    `1e-6 * sigma_max` or less. The check therefore errs on the safe side: it can call
    deficient what has full rank in exact arithmetic, hardly the reverse. The
    rank of `Zh` uses the same cut-off, `sqrt(max(n, d) * eps)`, because the
    directions below it, rounding noise of a float32 trunk among them, do not
    show in the Gram matrix.

    Takes about half a second for 2048 rows on two cores, and some seconds more if it
    fails and has to look for the cause.

    Args:
        Zh: Normalised features, shape `(n, d)`, last column 1.
        R: Gates of one class, shape `(d, m)`. With gates that are drawn alike for all
            classes, one class stands for all.
        w: Output weights of the gated units, shape `(m,)`.
        slope: Slope of the sigmoid, positive.
        n_samples: Number of training samples, if `Zh` holds only some of them. The
            ranks and repetitions are then those of the rows given.
        max_rows: Number of rows up to which the Gram matrix is decomposed.
        seed: Seed for the choice of rows.

    Returns:
        A `RankCheck`.

    Raises:
        ValueError: If `Zh`, `R` or `w` has the wrong shape or is not finite, the last
            column of `Zh` is not 1, or a number is out of its range.
    """
    features = _finite_matrix(Zh, "Zh")
    gates = _finite_matrix(R, "R")
    weights = np.asarray(w, dtype=np.float64)
    given, dim = features.shape
    n = given if n_samples is None else int(n_samples)
    _check_arguments(features, weights, n, max_rows)
    width = int(np.count_nonzero(weights))

    cut = _visible(features)
    feature_rank = numerical_rank(features, cut)
    # Samples that are not here may add directions. The rank is evidence about them only
    # if those that are here are already dependent.
    rank_bound = feature_rank if feature_rank < given or given == n else min(n, dim)
    distinct = _first_occurrences(features)
    n_duplicates = given - len(distinct)
    n_distinct = n - n_duplicates
    too_narrow = width * rank_bound < n_distinct

    if len(distinct) > max_rows:
        chosen = np.random.default_rng(seed).choice(
            len(distinct), max_rows, replace=False
        )
        distinct = distinct[np.sort(chosen)]
    rows = features[distinct]
    eigenvalues = np.maximum(
        np.linalg.eigvalsh(gram_matrix(rows, gates, weights, slope)), 0.0
    )
    zero = max(*rows.shape, len(weights)) * _EPS * eigenvalues[-1]
    rank = int(np.count_nonzero(eigenvalues > zero))

    reason: Reason | None = None
    needed, n_near, subset_size, subset_rank = width, 0, 0, 0
    if too_narrow or rank < len(rows):
        subset_size, subset_rank, crowding = _crowding(rows, width, cut)
        crowding *= n_distinct / len(rows)
        needed = max(default_width(n_distinct, rank_bound), math.ceil(2 * crowding))
        n_near = _count_near(rows)
        if too_narrow:
            reason = "width"
        elif subset_size:
            reason = "subset"
        elif n_near and rank >= len(rows) - n_near:
            reason, needed = "near", width
        else:
            reason, needed = "conditioning", max(needed, 2 * width)

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
        n_near=n_near,
        n_dead=int(
            np.count_nonzero(np.ptp(features[:, :-1], axis=0) <= cut * math.sqrt(dim))
        ),
        subset_size=subset_size,
        subset_rank=subset_rank,
        sigma_min=math.sqrt(eigenvalues[0]),
        sigma_max=math.sqrt(eigenvalues[-1]),
        tolerance=math.sqrt(zero),
        dtype="float64",
        reason=reason,
    )


class _Partition:
    """Rows in `width` linearly independent sets, grown by augmenting paths.

    Set `k` keeps its rows `basis[k]` and the dual rows `dual[k]` (both padded to
    `(r, r)`), so that `dual[k] @ y` are the coefficients of `y` in the basis, and what
    the basis does not reach of `y` is its distance from the set's span.
    """

    def __init__(self, rows: Array, width: int, tolerance: float) -> None:
        rank = rows.shape[1]
        self.rows = rows
        self.tolerance = tolerance
        self.rank = rank
        self.placed = 0
        self.members = np.full((width, rank), -1)
        self.sizes = np.zeros(width, dtype=int)
        self.basis = np.zeros((width, rank, rank))
        self.dual = np.zeros((width, rank, rank))
        # Where each row is: (set, position in it).
        self.places: dict[int, tuple[int, int]] = {}

    def fill(self) -> npt.NDArray[np.intp]:
        """Place what can be placed.

        Returns:
            Indices of the rows left over and of those they could replace: together the
            smallest set that minimises the rank formula.
        """
        stuck: set[int] = set()
        span = np.zeros((0, self.rank))
        for row in range(len(self.rows)):
            vector = self.rows[row]
            # The rows reached by a failed search hold as many places as their subspace
            # ever can, and no later search leads through them. Another row of that
            # subspace need not be tried.
            outside = vector - span.T @ (span @ vector)
            if stuck and np.linalg.norm(outside) <= self.tolerance:
                stuck.add(row)
                continue
            reached = self._augment(row)
            if reached:
                stuck |= reached
                span = _orthonormal(self.rows[sorted(stuck)], self.tolerance)
        return np.array(sorted(stuck), dtype=np.intp)

    def _augment(self, start: int) -> set[int]:
        """Place one more row, moving others. Empty if done, else the rows reached."""
        parent = {start: start}
        queue = [start]
        for row in queue:
            coefficients, distances = self._express(row)
            target = int(np.argmax(distances))
            if distances[target] > self.tolerance:
                self._shift(row, target, parent)
                return set()
            # The rows that this one could replace in their sets.
            circuits = self.members[np.abs(coefficients) > self.tolerance]
            for other in circuits.tolist():
                if other not in parent:
                    parent[other] = row
                    queue.append(other)
        return set(queue)

    def _express(self, row: int) -> tuple[Array, Array]:
        """A row's coefficients `(m, r)` in each set, and distances `(m,)` from it."""
        vector = self.rows[row]
        coefficients = self.dual @ vector
        distances = np.zeros(len(self.sizes))
        # A set with as many rows as there are dimensions takes no more.
        for index in np.flatnonzero(self.sizes < self.rank):
            rest = vector - coefficients[index] @ self.basis[index]
            distances[index] = np.linalg.norm(rest)
        return coefficients, distances

    def _shift(self, row: int, target: int, parent: dict[int, int]) -> None:
        """Put `row` into set `target`, and its predecessors where it and they were."""
        size = int(self.sizes[target])
        self.sizes[target] += 1
        self.placed += 1
        place = (target, size)
        changed = {target}
        path = [row]
        while parent[path[-1]] != path[-1]:
            path.append(parent[path[-1]])
        for mover in path:
            left = self.places.get(mover)
            self.places[mover] = place
            self.members[place] = mover
            self.basis[place] = self.rows[mover]
            changed.add(place[0])
            if left is not None:
                place = left
        if len(path) == 1:
            self._extend(target, size)
        else:
            for index in changed:
                count = self.sizes[index]
                self.dual[index, :count] = np.linalg.pinv(self.basis[index, :count]).T

    def _extend(self, index: int, size: int) -> None:
        """Update the dual of a set that got one more row (Greville), in `r^2`."""
        vector = self.basis[index, size]
        coefficients = self.dual[index, :size] @ vector
        rest = vector - coefficients @ self.basis[index, :size]
        new = rest / (rest @ rest)
        self.dual[index, :size] -= np.outer(coefficients, new)
        self.dual[index, size] = new


def _crowding(rows: Array, width: int, rtol: float) -> tuple[int, int, float]:
    """Size and rank of the rows too many for the width, and the worst size / rank.

    The width has to reach the worst ratio. It is found, up to less than 1, by raising
    the width to the ratio of the set that fails it, until none does.

    Returns:
        The size and rank of the set that fails `width`, and the ratio; all 0 if none
        does, or if the search would take too long.
    """
    size, rank, ratio = 0, 0, 0.0
    trial = max(width, 1)
    dim = rows.shape[1]
    while len(rows) * trial * dim**2 <= _UNION_BUDGET:
        found = union_rank(rows, trial, rtol=rtol)
        if found.full or not found.exact:
            break
        if not size:
            size, rank = len(found.subset), found.subset_rank
        ratio = len(found.subset) / found.subset_rank
        trial = max(trial + 1, math.ceil(ratio))
    return size, rank, ratio


def _count_near(rows: Array) -> int:
    """Number of rows whose distance from an earlier one is lost in the Gram matrix."""
    gram = rows @ rows.T
    norms = np.diagonal(gram).copy()
    squares = norms[:, None] + norms[None, :] - 2 * gram
    near = squares <= max(rows.shape) * _EPS * norms[:, None]
    return int(np.count_nonzero(np.tril(near, -1).any(axis=1)))


def _coordinates(rows: Array, rtol: float) -> Array:
    """Unit rows in as many coordinates as their rank, again of length 1 (or 0).

    Left singular vectors: a linear map of the row space, so the same sets are
    independent, chosen to spread the rows as evenly as possible.

    Returns:
        Shape `(n, rank)`.
    """
    coordinates = _unit_rows(_orthonormal(rows.T, rtol).T)
    # A zero row comes out of the decomposition as rounding noise.
    coordinates[~rows.any(axis=1)] = 0
    return coordinates


def _unit_rows(matrix: Array) -> Array:
    """The rows scaled to length 1; a zero row stays zero."""
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    scaled: Array = np.divide(matrix, norms, out=np.zeros_like(matrix), where=norms > 0)
    return scaled


def _orthonormal(rows: Array, rtol: float) -> Array:
    """Orthonormal basis of the row space, as rows `(rank, d)`."""
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    basis: Array = vectors[values > rtol * np.max(values, initial=0.0)]
    return basis


def _singular_values(matrix: Array) -> Array:
    """Singular values, largest first, by a blocked triangular factor if it is tall."""
    n, d = matrix.shape
    factor = matrix
    if n > 4 * d:
        step = max(4 * d, 1024)
        factor = np.zeros((0, d))
        for start in range(0, n, step):
            block = np.concatenate([factor, matrix[start : start + step]])
            factor = np.asarray(np.linalg.qr(block, mode="r"), dtype=np.float64)
    values: Array = np.linalg.svd(factor, compute_uv=False).astype(np.float64)
    return values


def _first_occurrences(features: Array) -> npt.NDArray[np.intp]:
    """Indices of the rows that repeat no earlier one, compared exactly."""
    seen: dict[int, list[int]] = {}
    first = []
    for index, row in enumerate(features):
        # Adding 0.0 turns -0.0, equal but with other bytes, into 0.0.
        same = seen.setdefault(hash((row + 0.0).tobytes()), [])
        if not any(np.array_equal(row, features[other]) for other in same):
            same.append(index)
            first.append(index)
    return np.array(first, dtype=np.intp)


def _visible(features: Array) -> float:
    """Relative size below which a direction is lost in a Gram matrix in float64."""
    return math.sqrt(max(features.shape) * _EPS)


def _finite_matrix(value: npt.ArrayLike, name: str) -> Array:
    matrix = np.asarray(value, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(
            f"`{name}` must be a matrix. Received: {name}.shape={matrix.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        raise ValueError(
            f"`{name}` must be finite. Received: NaN or infinity in {len(bad)} of "
            f"{len(matrix)} rows, first in row {bad[0]}"
        )
    return matrix


def _check_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"`width` must be at least 1. Received: width={width}")


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
