"""The rank that gated features have for almost every choice of gates.

For distinct rows of `Zh` that rank has a formula without the gates:

    rank(Phi) = min over sets A of distinct rows ( n_distinct - |A| + m * rank(Zh_A) ),

the rank of the union of `m` copies of the linear matroid of `Zh`. A rank below
`n_distinct` thus has a cause: a set `A` of more than `m * rank(Zh_A)` samples in too
small a subspace. Identical rows open identical gates, so they count once: each
repetition lowers the rank by one, whatever the width. The formula holds in exact
arithmetic.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from keras_dalign.numerics.subspace import (
    coordinates,
    finite_matrix,
    first_occurrences,
    numerical_rank,
    orthonormal,
    unit_rows,
    visible,
)

if TYPE_CHECKING:
    from keras_dalign.numerics import Array

# Subsets of n rows in `union_rank_exact`: 2^n rank computations.
_EXACT_LIMIT = 16


@dataclasses.dataclass(frozen=True)
class UnionRank:
    """The rank of the gated features for almost every choice of gates, with its proof.

    Attributes:
        rank: `n_distinct - len(subset) + width * subset_rank`, an upper bound for all
            gates of this width.
        attained: Number of rows in a partition into `width` linearly independent sets,
            a lower bound for almost all gates. Equal to `rank` unless rounding makes it
            unclear which rows are independent.
        n: Number of rows.
        n_distinct: Number of distinct rows.
        width: Number of gates `m`.
        subset: Indices of the smallest set of rows that minimises the formula: the rows
            that are too many for the subspace they span. Empty if there are none. Of
            repeated rows it has the first.
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
        """Whether the upper and the lower bound agree, which proves `rank`."""
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
    features = finite_matrix(Zh, "Zh")
    _check_width(width)
    distinct = first_occurrences(features)
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
    """Rank of the gated features for almost every choice of gates, and what lowers it.

    Partitions as many distinct rows as possible into `width` linearly independent sets,
    by augmenting paths (matroid partition). The partition is a lower bound on the rank.
    The set of rows reached by the searches that fail gives an upper bound.

    Takes about `n * width * rank^2` multiply-adds if every row fits into a set
    directly, and as many again for every search that fails in a new subspace. Memory is
    `2 * width * rank^2` numbers. Meant for some thousands of rows.

    Args:
        Zh: Features, shape `(n, d)`.
        width: Number of gates, at least 1.
        rtol: Relative distance from a subspace up to which a row counts as inside. The
            default is `sqrt(max(n, d) * eps)`. Directions smaller than that do not show
            in the Gram matrix in float64, as it has their squares.

    Returns:
        A `UnionRank`.

    Raises:
        ValueError: If `Zh` is not a finite matrix, or `width` is below 1, or `rtol`
            is outside `(0, 1)`.
    """
    features = finite_matrix(Zh, "Zh")
    _check_width(width)
    if rtol is None:
        rtol = visible(features)
    elif not 0 < rtol < 1:
        raise ValueError(f"`rtol` must be in (0, 1). Received: rtol={rtol}")
    distinct = first_occurrences(features)
    # Scaling rows does not change independence, and makes the cut-offs relative.
    rows = unit_rows(features[distinct])
    width = int(width)
    partition = _Partition(coordinates(rows, rtol), width, rtol)
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


class _Partition:
    """Rows in `width` linearly independent sets, grown by augmenting paths.

    Set `k` stores its rows `basis[k]` and the dual rows `dual[k]`, both padded to
    `(r, r)`. `dual[k] @ y` are the coefficients of `y` in the basis. The rest of `y` is
    its distance from the span of the set.
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
        # The place of each row: (set, position in it).
        self.places: dict[int, tuple[int, int]] = {}

    def fill(self) -> npt.NDArray[np.intp]:
        """Places as many rows as possible.

        Returns:
            Indices of the rows that were not placed and of those they could replace.
            Together these are the smallest set that minimises the rank formula.
        """
        stuck: set[int] = set()
        span = np.zeros((0, self.rank))
        for row in range(len(self.rows)):
            vector = self.rows[row]
            # The rows reached by a failed search fill all places that their subspace
            # can fill, and no later search passes through them. So further rows of that
            # subspace cannot be placed.
            outside = vector - span.T @ (span @ vector)
            if stuck and np.linalg.norm(outside) <= self.tolerance:
                stuck.add(row)
                continue
            reached = self._augment(row)
            if reached:
                stuck |= reached
                span = orthonormal(self.rows[sorted(stuck)], self.tolerance)
        return np.array(sorted(stuck), dtype=np.intp)

    def _augment(self, start: int) -> set[int]:
        """Places a row, moving others. Returns the rows reached if that failed."""
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
        # A set with as many rows as there are dimensions is full.
        for index in np.flatnonzero(self.sizes < self.rank):
            rest = vector - coefficients[index] @ self.basis[index]
            distances[index] = np.linalg.norm(rest)
        return coefficients, distances

    def _shift(self, row: int, target: int, parent: dict[int, int]) -> None:
        """Puts `row` into set `target`, and each predecessor into the freed place."""
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
        """Updates the dual of a set after one more row (Greville), in `O(r^2)`."""
        vector = self.basis[index, size]
        coefficients = self.dual[index, :size] @ vector
        rest = vector - coefficients @ self.basis[index, :size]
        new = rest / (rest @ rest)
        self.dual[index, :size] -= np.outer(coefficients, new)
        self.dual[index, size] = new


def _check_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"`width` must be at least 1. Received: width={width}")
