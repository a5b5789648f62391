"""The result of a rank check, and the sentences that explain it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

# Indices, groups or pairs that the sentences name.
_MAX_NAMED = 5

Pairs = tuple[tuple[int, int], ...]

# What costs rank among distinct samples; see `RankCheck.reason`.
Reason = Literal["width", "subset", "near", "conditioning"]


@dataclasses.dataclass(frozen=True)
class RankCheck:
    """Outcome of `check_rank`. `str` gives the numbers, the cause and the remedy.

    Attributes:
        n: Number of samples.
        n_given: Number of samples whose features were given.
        rows_checked: Number of distinct rows whose Gram matrix was decomposed.
        rank: Numerical rank of that Gram matrix.
        full: Whether no loss of rank was found. If `complete` is false, this is
            necessary for full rank, and not sufficient.
        feature_rank: Numerical rank of the normalised features, constant included.
        feature_dim: Number of columns of the normalised features, `d`.
        width: Number of gated units whose output weight is not zero, `m`.
        needed_width: A width that removes every failure that a width can remove. It is
            `width` if there is none. Otherwise it is the larger of two default widths:
            for the rank of all features, and for the rank of the samples in too small
            a subspace. It is right for exact arithmetic; check again with it. In
            float64, many samples in very few dimensions may need a larger width or a
            steeper slope. It is an estimate if `reason` is `"conditioning"` or the
            check is not `complete`.
        n_duplicates: Number of samples whose features repeat those of an earlier one.
        n_near: Number of the rows checked that differ from an earlier one by no more
            than rounding, and are not equal to it. Counted only if the rank is too low.
        n_parallel: Number of the samples counted in `n_duplicates` or `n_near` whose
            features differed before normalisation: after standardisation they differ
            in length alone. None if the features before normalisation were not given.
        n_dead: Number of features that are constant over the samples, without the
            constant column itself.
        subset_size: Number of the rows checked that lie in too small a subspace, 0 if
            none were found.
        subset_rank: Dimension of that subspace.
        sigma_min: Smallest singular value of the features `Phi` of the rows checked.
        sigma_max: Largest singular value of these features.
        tolerance: Singular values up to this one count as zero.
        dtype: The precision of the computation.
        output: The output whose gates have the least rank. The numbers are for this
            output. None if all outputs share their gates.
        reason: The cause of a rank deficiency among distinct samples, None if there is
            no deficiency: `"width"` (fewer than `n` columns in `Phi`, whatever the
            gates), `"subset"` (too many samples in one subspace), `"near"` (samples too
            close for float64), `"conditioning"` (none of these, or too many samples and
            features for a search of some seconds).
        duplicates: The groups of samples with identical features.
        near: Pairs of a sample counted in `n_near` and the earlier one.
        parallel: Pairs of a sample counted in `n_parallel` and the earlier one.
        dead: Columns of the features counted in `n_dead`.
        subset: The samples that lie in too small a subspace.

    The last five list at most the first 20 entries (and 20 samples of a group). Samples
    are named by their positions in the arguments of `check_rank`.
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


def _listing(indices: tuple[int, ...], total: int) -> str:
    """The first indices in words, and the number of the others."""
    shown = [str(index) for index in indices[:_MAX_NAMED]]
    if total > len(shown):
        return f"{', '.join(shown)} and {total - len(shown)} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _groups(groups: tuple[tuple[int, ...], ...]) -> str:
    """The first groups of samples in words."""
    shown = [
        ", ".join(map(str, group[:_MAX_NAMED])) + (", ..." * (len(group) > _MAX_NAMED))
        if len(group) > 2
        else _listing(group, len(group))
        for group in groups[:_MAX_NAMED]
    ]
    return f"samples {'; '.join(shown)}{'; ...' * (len(groups) > _MAX_NAMED)}"
