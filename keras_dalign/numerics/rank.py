"""Can the alignment head fit any labels on these samples? The rank, and why it fails.

The gated features `Phi` (`n x (m * d)`, see `gram.py`) separate every sample from the
others exactly when their rank is `n`. `union.py` has the rank that exact arithmetic
gives for almost every choice of gates; `check_rank` asks the gates themselves.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.special

from keras_dalign.numerics.gram import Array, gram_matrix
from keras_dalign.numerics.subspace import (
    EPS,
    finite_matrix,
    first_equal,
    visible,
    visible_rank,
)
from keras_dalign.numerics.union import union_rank

# `union_rank` takes about rows * width * rank^2 multiply-adds. Beyond this many
# (some five seconds on two cores) a failed check looks for no culprit set.
_UNION_BUDGET = 1e10

# Indices, groups or pairs listed in a check, and those that its sentence names.
_MAX_LISTED = 20
_MAX_NAMED = 5

# Features that agree up to this much are the same up to the rounding of a float32
# trunk, where their normalised rows agree up to rounding.
_SAME_FEATURES = 1e-5

# A gate below 1e-3 counts as closed: `s(t) = 1e-3` at `t = -log(999)`.
_LOGIT_OF_CLOSED = math.log(999.0)

Indices = npt.NDArray[np.intp]
Pairs = tuple[tuple[int, int], ...]

Reason = Literal["width", "subset", "near", "conditioning"]


def closed_share(slope: float) -> float:
    """The probability that a random gate is closed for a sample.

    A gate `s(slope * r . v)` with `r ~ N(0, I / d)` and `||v||^2 = d` has
    `r . v ~ N(0, 1)`. It counts as closed below 1e-3, so with probability
    `Phi(-log(999) / slope)`: 0.365 for a slope of 20.

    Args:
        slope: Slope of the gates' sigmoid, positive.

    Returns:
        The probability, in (0, 1/2).
    """
    return math.exp(_log_closed_share(slope))


def least_gates(n_samples: int, slope: float) -> int:
    """The number of random gates that leaves no sample without an open one.

    With `m` gates a sample has none that is open with probability
    `closed_share(slope)^m`. The number returned makes the expected number of such
    samples among `n_samples` at most 0.01.

    Args:
        n_samples: Number of training samples, at least 1.
        slope: Slope of the gates' sigmoid, positive.

    Returns:
        `ceil(log(100 n_samples) / -log(closed_share(slope)))`: 12 for 1,000 samples
        and a slope of 20.
    """
    needed = math.log(100 * n_samples) / -_log_closed_share(slope)
    return max(1, math.ceil(needed))


def _log_closed_share(slope: float) -> float:
    return float(scipy.special.log_ndtr(-_LOGIT_OF_CLOSED / slope))


def default_width(n_samples: int, rank: int, slope: float) -> int:
    """The number of gated units that can separate `n_samples`, with room to spare.

    The larger of two numbers. `ceil(2 * n_samples / rank)` is twice the least that
    counting allows (`m * rank >= n`); the factor 2 pays for features that die or
    collapse while the trunk trains and so cost rank, and it keeps the Gram matrix well
    conditioned. `least_gates` matters for features as many as the samples: a sample
    for which every gate is closed cannot be fitted.

    Args:
        n_samples: Number of training samples.
        rank: Rank of their normalised features, constant column included.
        slope: Slope of the gates' sigmoid, positive.

    Returns:
        The width `m`, at least 1.

    Raises:
        ValueError: If a number is out of its range.
    """
    if n_samples < 1:
        raise ValueError(
            f"`n_samples` must be at least 1. Received: n_samples={n_samples}"
        )
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1. Received: rank={rank}")
    if not (math.isfinite(slope) and slope > 0):
        raise ValueError(
            f"`slope` must be positive and finite. Received: slope={slope}"
        )
    # In integers: a float quotient can round a whole number upwards.
    by_rank = -(-2 * int(n_samples) // int(rank))
    return max(by_rank, least_gates(n_samples, slope))


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
        n_parallel: Number of the samples counted in `n_duplicates` or `n_near` whose
            features were not the same before normalisation: standardised, they only
            differ in length. None if the features before normalisation were not given.
        n_dead: Number of features that are constant over the samples, without the
            constant column itself.
        subset_size: Number of the rows checked that share too small a subspace, 0 if
            none were found.
        subset_rank: Dimension of that subspace.
        sigma_min: Smallest singular value of the features `Phi` of the rows checked.
        sigma_max: Largest singular value of the same.
        tolerance: Singular values up to this one count as zero.
        dtype: The precision in which all this was judged.
        output: The output whose gates have the least rank, to which the numbers belong;
            None if all outputs share their gates.
        reason: What costs rank among distinct samples, if anything does: `"width"`
            (fewer than `n` features, whatever the gates), `"subset"` (too many samples
            in one subspace), `"near"` (samples too close for float64),
            `"conditioning"` (none of these, or too many samples and features for a
            search of some seconds).
        duplicates: The samples with one and the same features, group by group, those
            that repeat an earlier sample's.
        near: Pairs of a sample counted in `n_near` and an earlier one.
        parallel: Pairs of a sample counted in `n_parallel` and an earlier one.
        dead: Columns of the features counted in `n_dead`.
        subset: The samples that share too small a subspace.

    The last five list the first 20 at most (of a group, the first 20 samples), by the
    positions of the samples that `check_rank` was given, whichever rows it checked.
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
    n_parallel: int | None
    n_dead: int
    subset_size: int
    subset_rank: int
    sigma_min: float
    sigma_max: float
    tolerance: float
    dtype: str
    output: int | None
    reason: Reason | None
    duplicates: tuple[tuple[int, ...], ...]
    near: Pairs
    parallel: Pairs
    dead: tuple[int, ...]
    subset: tuple[int, ...]

    @property
    def complete(self) -> bool:
        """Whether all distinct samples were in the Gram matrix that was decomposed."""
        return self.rows_checked == self.n - self.n_duplicates

    def to_dict(self) -> dict[str, Any]:
        """The attributes as a dictionary that `json.dumps` accepts."""
        fields = dataclasses.asdict(self)
        for name in ("dead", "subset"):
            fields[name] = list(fields[name])
        for name in ("duplicates", "near", "parallel"):
            fields[name] = [list(samples) for samples in fields[name]]
        return fields

    def __str__(self) -> str:
        """One sentence on the outcome, then the cause and the remedy if it failed."""
        numbers = (
            f"rank {self.rank} of {self.rows_checked}, "
            f"sigma_min {self.sigma_min:.2g}, sigma_max {self.sigma_max:.2g}, "
            f"tolerance {self.tolerance:.2g}, {self.dtype}; width {self.width}, "
            f"feature rank {self.feature_rank} of {self.feature_dim}"
        )
        if self.output is not None:
            numbers += f"; least of all outputs, output {self.output}"
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
                f"{self.n_duplicates} samples have exactly the features of another one "
                f"({_groups(self.duplicates)}): identical inputs, or inputs that the "
                "features do not tell apart, cost rank, and no width helps."
            )
        if self.n_parallel:
            parts.append(
                f"Of these, {self.n_parallel} differ from the other one before "
                f"normalisation ({_groups(self.parallel)}): their standardised "
                "features are positive multiples of one another. Richer features, from "
                "an earlier layer for instance, tell them apart."
            )
        return " ".join(parts)

    def _causes(self) -> list[str]:
        causes = []
        use = f"Use a width of {self.needed_width} or more."
        if self.reason == "width":
            dead = ""
            if self.n_dead:
                columns = _listing(self.dead, self.n_dead)
                dead = f" ({self.n_dead} features are constant: {columns})"
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
                f"{self.width * self.subset_rank}: samples "
                f"{_listing(self.subset, self.subset_size)}. {use}"
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
                f"rounding ({_groups(self.near)}): such inputs cost rank in float64, "
                "and no width helps."
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
    u: npt.ArrayLike | None = None,
    positions: npt.ArrayLike | None = None,
) -> RankCheck:
    """Check whether a head's gates separate the samples.

    In this order: (a) the rank of `Zh` and the condition `m * rank(Zh) >= n`, without
    which the rank is deficient whatever the gates; (b) samples with identical features,
    which no head separates; (c) in float64, the eigenvalues of the Gram matrix of the
    distinct samples, or of `max_rows` of them chosen at random if there are more.
    Where each output has gates of its own, (c) is done for all of them, and the check
    is of the output whose rank is least. If (a) or (c) fails, the set of samples that
    causes it is looked for.

    An eigenvalue of the Gram matrix counts as zero up to
    `max(rows, d, m) * eps * lambda_max`, the usual bound on what rounding leaves of a
    zero, so a singular value of `Phi` does up to the square root of that, some
    `1e-6 * sigma_max` or less. The check therefore errs on the safe side: it can call
    deficient what has full rank in exact arithmetic, hardly the reverse. The
    rank of `Zh` uses the same cut-off, `sqrt(max(n, d) * eps)`, because the
    directions below it, rounding noise of a float32 trunk among them, do not
    show in the Gram matrix.

    Takes about half a second for 2048 rows and shared gates on two cores, and some
    seconds more if it fails and has to look for the cause.

    Args:
        Zh: Normalised features, shape `(n, d)`, last column 1.
        R: Gates, shape `(d, m)`, or `(d, C, m)` where each of `C` outputs has its own.
        w: Output weights of the gated units, shape `(m,)` or `(C, m)`.
        slope: Slope of the sigmoid, positive.
        n_samples: Number of training samples, if `Zh` holds only some of them. The
            ranks and repetitions are then those of the rows given.
        max_rows: Number of rows up to which the Gram matrix is decomposed.
        seed: Seed for the choice of rows.
        u: The features before standardisation and normalisation, shape `(n, ...)`, to
            tell samples that are the same from samples that normalisation makes so.
        positions: What to call the samples, shape `(n,)`: their positions in the data
            set, if `Zh` holds only some of them. Defaults to `0..n - 1`.

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
    # Samples that are not here may add directions. The rank is evidence about them only
    # if those that are here are already dependent.
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
    """Eigenvalues of a Gram matrix, ascending, and how many of them are not zero."""

    eigenvalues: Array
    zero: float
    rank: int


def _weakest_output(
    rows: Array, gates: Array, weights: Array, slope: float
) -> tuple[int, _Spectrum]:
    """The output whose Gram matrix has the least rank, and the spectrum of that."""
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
    """Gates `(d, G, m)` and weights `(G, m)` for what `check_rank` accepts."""
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
    """The rows too many for the width, their rank, and the worst size / rank.

    The width has to reach the worst ratio. It is found, up to less than 1, by raising
    the width to the ratio of the set that fails it, until none does.

    Returns:
        The indices and the rank of the set that fails `width`, and the ratio; empty
        and 0 if none does, or if the search would take too long.
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
    """Rows whose distance from an earlier one is lost in the Gram matrix, and that."""
    gram = rows @ rows.T
    norms = np.diagonal(gram).copy()
    squares = norms[:, None] + norms[None, :] - 2 * gram
    near = np.tril(squares <= max(rows.shape) * EPS * norms[:, None], -1)
    found = np.flatnonzero(near.any(axis=1))
    return found, near[found].argmax(axis=1)


def _differing(
    raw: np.ndarray | None, samples: Indices, others: Indices
) -> tuple[Indices, Indices]:
    """The pairs whose features differ by more than a float32 trunk's rounding."""
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


def _listing(indices: tuple[int, ...], total: int) -> str:
    """Some of the indices in words, and how many more there are."""
    shown = [str(index) for index in indices[:_MAX_NAMED]]
    if total > len(shown):
        return f"{', '.join(shown)} and {total - len(shown)} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _groups(groups: tuple[tuple[int, ...], ...]) -> str:
    """Some of the groups of samples in words."""
    shown = [
        ", ".join(map(str, group[:_MAX_NAMED])) + (", ..." * (len(group) > _MAX_NAMED))
        if len(group) > 2
        else _listing(group, len(group))
        for group in groups[:_MAX_NAMED]
    ]
    return f"samples {'; '.join(shown)}{'; ...' * (len(groups) > _MAX_NAMED)}"


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
