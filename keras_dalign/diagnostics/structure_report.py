"""The result of `check_structure`: whether the structure holds, and what breaks it."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

from keras_dalign.numerics.html_table import html_table


@dataclasses.dataclass(frozen=True)
class StructureCause:
    """One reason why the common model structure does not hold.

    Attributes:
        kind: `"probabilities"`, `"nonlinearity"`, `"degree"` (tied weights, or those of
            several consecutive layers), `"constant"` (a part of the outputs that does
            not depend on the parameters) or `"inner parameters"`.
        what: What was found, in words.
        change: What to change.
    """

    kind: str
    what: str
    change: str


@dataclasses.dataclass(frozen=True)
class StructureReport:
    """Whether `f = f0 + J theta`, with `f0` the frozen linear part of a head.

    Attributes:
        holds: Whether `error <= tolerance`.
        error: The larger of `||f - f0 - J theta|| / ||f||` at the model's weights and
            at randomly moved weights. One point is not enough: at weights of 0, for
            example, any structure gives 0.
        tolerance: The largest error that counts as rounding.
        parameters: Paths of the variables that make up `theta`.
        n_parameters: Number of parameters, `P`.
        n: Number of samples.
        units: Number of outputs, `C`.
        offset: `||f0|| / ||f||`.
        degree: The `k` for which `J theta = k (f - f0)`, the degree of homogeneity in
            the parameters; None if there is none.
        linear: Whether `J` is the same at both weights. With a ReLU after the
            parameters, for example, the structure holds, but the outputs are not linear
            in them.
        causes: Why the structure does not hold; empty if it does.
        dtype: What it was computed in.
    """

    holds: bool
    error: float
    tolerance: float
    parameters: tuple[str, ...]
    n_parameters: int
    n: int
    units: int
    offset: float
    degree: float | None
    linear: bool
    causes: tuple[StructureCause, ...]
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict that `json.dumps` accepts."""
        fields = dataclasses.asdict(self)
        fields["parameters"] = list(self.parameters)
        fields["causes"] = [dataclasses.asdict(cause) for cause in self.causes]
        return fields

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "does not hold"
        constant = " less a frozen linear part" if self.offset else ""
        text = (
            f"The common model structure {verdict}: the outputs{constant} differ from "
            f"J theta in {self._parameter_names()} by {self.error:.2g} of their norm "
            f"(tolerance {self.tolerance:.0e}; {self.n_parameters} parameters, "
            f"{self.n} samples, {self.units} outputs; in {self.dtype})."
        )
        if self.holds and not self.linear:
            text += (
                " They are not linear in theta, only homogeneous: J itself changes "
                "with it, and training by these parameters alone is not convex."
            )
        for cause in self.causes:
            text += f" What breaks it: {cause.what}. {cause.change}."
        return text

    def _parameter_names(self) -> str:
        shown = ", ".join(self.parameters[:4])
        more = len(self.parameters) - 4
        return f"{shown} and {more} more variables" if more > 0 else shown

    def _repr_html_(self) -> str:
        rows = {
            "common model structure": f"<b>{'holds' if self.holds else 'broken'}</b>",
            "relative error": f"{self.error:.2g}",
            "tolerance": f"{self.tolerance:.0e}",
            "parameters": html.escape(self._parameter_names()),
            "samples": str(self.n),
            "outputs": str(self.units),
            "computed in": html.escape(self.dtype),
        }
        for place, cause in enumerate(self.causes, start=1):
            text = html.escape(f"{cause.what}. {cause.change}.")
            rows[f"what breaks it ({place})"] = text
        return html_table(rows)
