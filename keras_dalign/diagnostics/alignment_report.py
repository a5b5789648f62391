"""The result of `check_alignment`, in numbers and in sentences."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

import numpy as np

from keras_dalign.diagnostics.alignment_route import WORDS, Method, size_text
from keras_dalign.numerics.html_table import html_table


@dataclasses.dataclass(frozen=True)
class AlignmentReport:
    """Outcome of `check_alignment`; prints as sentences with the numbers.

    Attributes:
        residual: The share of the modified targets' norm that lies outside the column
            space of the Jacobian: `||Y_l - J beta|| / ||Y_l||` for the `beta` found,
            plus a bound on its rounding. So it is an upper bound on the least residual.
            0 for targets that are all zero, which lie in every column space.
        aligned: Whether `residual <= tolerance`.
        decided: Whether `aligned` is final: the residual is small enough, the route
            converged, or `lower_bound` is above the tolerance. If not, more steps of
            LSQR may still lower the residual below the tolerance.
        lower_bound: Residual that no function of the inputs can go below. Samples with
            identical inputs have identical rows, so the differences of their targets
            from the mean of the group lie outside the column space.
        residuals: The residual of each output, `C` numbers: the norm of its error over
            that of its targets.
        tolerance: The residual up to which the condition holds.
        rank: Number of singular values of the Jacobian above the rank tolerance; None
            for `"lsqr"`, which gives no rank.
        full_row_rank: Whether the rank is `n_rows`, so that any labels are aligned;
            None for `"lsqr"`.
        sigma_max: The largest singular value (`"lsqr"`: a lower bound on it).
        sigma_min: The smallest singular value above the rank tolerance, 0 without any;
            None for `"lsqr"`.
        rank_tolerance: Singular values up to this one, relative to `sigma_max`, count
            as zero. LSQR may stop before it has fitted their directions.
        optimality: `||J^T e|| / (sigma_max ||e||)` of the remaining error `e`, 0 for an
            error of 0. Directions whose relative singular value is well above it have
            been fitted.
        loss: The loss, in words; the modified targets depend on it.
        parameters: The parameters that the model is differentiated by, in words.
        n: Number of samples.
        n_distinct: Number of distinct inputs among them.
        units: Number of outputs, `C`.
        n_rows: Rows of the Jacobian, `n * C`.
        n_parameters: Columns of the Jacobian, `P`.
        dtype: The dtype in which the Jacobian was computed. All that follows is in
            float64.
        route: `"dense"`, `"gram"` or `"lsqr"`.
        reason: Why that route.
        memory: Bytes that the route needs in addition to model and data, as estimated
            before.
        iterations: Steps of LSQR.
        converged: Whether all directions above the rank tolerance have been fitted, or
            the residual is below the tolerance.
        seconds: Wall time.
    """

    residual: float
    aligned: bool
    decided: bool
    lower_bound: float
    residuals: tuple[float, ...]
    tolerance: float
    rank: int | None
    full_row_rank: bool | None
    sigma_max: float
    sigma_min: float | None
    rank_tolerance: float
    optimality: float
    loss: str
    parameters: str
    n: int
    n_distinct: int
    units: int
    n_rows: int
    n_parameters: int
    dtype: str
    route: Method
    reason: str
    memory: int
    iterations: int
    converged: bool
    seconds: float

    @property
    def condition(self) -> float | None:
        """`sigma_max / sigma_min`; None for rank 0 and for `"lsqr"`."""
        return self.sigma_max / self.sigma_min if self.sigma_min else None

    @property
    def worst_output(self) -> int:
        """The output with the largest residual."""
        return int(np.argmax(self.residuals))

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict that `json.dumps` accepts."""
        fields = dataclasses.asdict(self)
        fields["residuals"] = list(self.residuals)
        fields["condition"] = self.condition
        fields["worst_output"] = self.worst_output
        return fields

    def __str__(self) -> str:
        """The verdict, what it rests on, and how it was found."""
        return f"{self._verdict()} {self._spectrum()} {self._how()}"

    def _repr_html_(self) -> str:
        sigma_min = "not known" if self.sigma_min is None else f"{self.sigma_min:.3g}"
        rows = {
            "alignment": f"<b>{html.escape(self._verdict())}</b>",
            "residual": f"{self.residual:.3g}",
            "residual, at least": f"{self.lower_bound:.3g}",
            "rank": "not known" if self.rank is None else f"{self.rank}",
            "rows": f"{self.n_rows} = {self.n} samples x {self.units} outputs",
            "parameters": f"{self.n_parameters} ({html.escape(self.parameters)})",
            "sigma_min, sigma_max": f"{sigma_min}, {self.sigma_max:.3g}",
            "rank tolerance": f"{self.rank_tolerance:.2g}",
            "dtype": html.escape(self.dtype),
            "route": f"{self.route}: {html.escape(self.reason)}",
        }
        return html_table(rows)

    def _verdict(self) -> str:
        share = (
            "of the modified targets lies outside the column space of the Jacobian "
            f"(tolerance {self.tolerance:.2g})"
        )
        if self.aligned:
            return f"Aligned: a share of at most {self.residual:.2g} {share}."
        worst = self.worst_output
        repeats = (
            " Identical inputs with different targets alone leave "
            f"{self.lower_bound:.3g}."
            if self.lower_bound
            else ""
        )
        if not self.decided:
            return (
                f"Undecided: a share of at most {self.residual:.3g} {share}, but LSQR "
                f"had not converged after {self.iterations} steps.{repeats}"
            )
        return (
            f"Not aligned: a share of {self.residual:.3g} {share}; output {worst} is "
            f"worst, with {self.residuals[worst]:.3g} of its targets.{repeats}"
        )

    def _spectrum(self) -> str:
        distinct = "" if self.n_distinct == self.n else f", {self.n_distinct} distinct"
        size = (
            f"The Jacobian in {self.parameters} has {self.n_rows} rows ({self.n} "
            f"samples{distinct}, {self.units} outputs) and {self.n_parameters} columns"
        )
        if self.rank is None:
            used = (
                ""
                if self.aligned
                else f"; directions well above {self.optimality:.2g} * sigma_max are "
                "used up"
            )
            return (
                f"{size}; sigma_max is at least {self.sigma_max:.3g}{used} "
                f"({self.dtype})."
            )
        full = ", full row rank: any labels are aligned" if self.full_row_rank else ""
        return (
            f"{size}, rank {self.rank}{full}; sigma_min {self.sigma_min:.3g}, "
            f"sigma_max {self.sigma_max:.3g}, singular values up to "
            f"{self.rank_tolerance:.2g} * sigma_max counted as zero ({self.dtype})."
        )

    def _how(self) -> str:
        return (
            f"Route: {WORDS[self.route]}, as {self.reason}; {size_text(self.memory)}, "
            f"{self.seconds:.3g} s."
        )
