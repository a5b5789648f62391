"""The result of `certify`: how far a training loss is from its global minimum."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras

from keras_dalign.certification.model_card import model_card
from keras_dalign.numerics.html_table import html_table
from keras_dalign.numerics.rounding import rounded

if TYPE_CHECKING:
    from keras_dalign.certification.quadratic_bound import QuadraticBound
    from keras_dalign.diagnostics.gradient_bound import GradientBound


@dataclasses.dataclass(frozen=True)
class Certificate:
    """An upper bound on the distance of a training loss to its global minimum.

    `gap` bounds `loss` minus the infimum of the loss over *all* functions of the
    inputs, hence over all parameters of the model. A gap of 0 means that the two are
    equal up to rounding.

    Attributes:
        loss: Measured loss over all samples, in inference mode.
        lower_bound: Loss that no function of the inputs can go below.
        gap: `loss - lower_bound`, at least 0.
        n_samples: Number of samples.
        n_distinct: Number of distinct inputs among them.
        n_conflicts: Number of distinct inputs that came with two or more different
            targets, samples of weight 0 aside. Without conflicts (and label smoothing
            or soft labels) the lower bound is 0.
        conflicts: The first 20 of these conflicts: for each, the positions in the data
            of samples that share the input and differ in the target (the first sample
            of each target, 20 at most).
        objective: The loss that is certified, in words.
        dtype: The dtype of the model's outputs. Sums are always in float64.
        l2: Weight of the L2 term, or None if no such term was requested.
        l2_loss: The loss plus `l2 / 2` times the squared change of the head's `q` and
            `b`, in float64 from the features on; None without L2 term.
        l2_gap: Upper bound on `l2_loss` minus its minimum over all `q` and `b`; None
            without L2 term.
        gradient_bound: The bound by the gradient, or None if it was not requested. Up
            to rounding it is never below `gap`.
        quadratic_bound: For a model that ends in a `QuadraticHead`, the bound on its
            objective minus the global minimum over the head's weights; else None.
        data_digest: Identifies the samples: 128 bits, as 32 hexadecimal digits, of
            their inputs, targets and weights, in any order. Inputs in another dtype are
            other inputs.
    """

    loss: float
    lower_bound: float
    gap: float
    n_samples: int
    n_distinct: int
    n_conflicts: int
    conflicts: tuple[tuple[int, ...], ...]
    objective: str
    dtype: str
    l2: float | None = None
    l2_loss: float | None = None
    l2_gap: float | None = None
    gradient_bound: GradientBound | None = None
    quadratic_bound: QuadraticBound | None = None
    data_digest: str = ""

    @property
    def l2_lower_bound(self) -> float | None:
        """Lower bound on `l2_loss` over all `q` and `b`; None without L2 term."""
        if self.l2_loss is None or self.l2_gap is None:
            return None
        return max(self.l2_loss - self.l2_gap, self.lower_bound)

    def to_dict(self) -> dict[str, Any]:
        """The certificate as a dict that `json.dumps` accepts."""
        fields = dataclasses.asdict(self)
        fields["conflicts"] = [list(conflict) for conflict in self.conflicts]
        return fields

    def model_card(self, model: keras.Model) -> str:
        """A model card with this certificate, for a hub of models.

        It states the objective, the loss and its gap, the digest of the data, how to
        check these, and the versions in use.

        Args:
            model: The certified model.

        Returns:
            Markdown that begins with YAML metadata.

        Raises:
            ValueError: If `model` is not a `keras.Model`.
        """
        return model_card(self, model)

    def __str__(self) -> str:
        return "\n".join(self._sentences())

    def _sentences(self) -> Iterator[str]:
        gap = rounded(self.gap, up=True) if self.gap else "0 (to rounding)"
        yield f"The loss is {self.loss:.6g}, at most {gap} above its global minimum."
        if self.l2_loss is not None and self.l2_gap is not None:
            yield (
                f"Regularised with l2={self.l2:g}, the loss is {self.l2_loss:.6g}, at "
                f"most {rounded(self.l2_gap, up=True)} above its minimum over the "
                "head's q and b. It is the loss plus l2 / 2 times their squared change."
            )
        if self.gradient_bound is not None:
            yield str(self.gradient_bound)
        if self.quadratic_bound is not None:
            yield str(self.quadratic_bound)
        yield (
            "No function of the inputs can go below "
            f"{rounded(self.lower_bound, up=False)}: {self.n_samples} samples, "
            f"{self.n_distinct} distinct inputs, {self.n_conflicts} of them with "
            "conflicting targets."
        )
        yield (
            f"Objective: {self.objective}; outputs in {self.dtype}, sums in float64."
        )

    def _repr_html_(self) -> str:
        rows = {
            "loss": f"{self.loss:.6g}",
            "lower bound": rounded(self.lower_bound, up=False),
            "gap": f"<b>{rounded(self.gap, up=True)}</b>",
            "samples": str(self.n_samples),
            "distinct inputs": str(self.n_distinct),
            "conflicts": str(self.n_conflicts),
            "objective": html.escape(self.objective),
            "outputs in": html.escape(self.dtype),
        }
        if self.l2_loss is not None and self.l2_gap is not None:
            rows[f"loss with l2={self.l2:g}"] = f"{self.l2_loss:.6g}"
            rows["its gap"] = f"<b>{rounded(self.l2_gap, up=True)}</b>"
        if self.gradient_bound is not None:
            rows["gap by the gradient"] = (
                f"<b>{rounded(self.gradient_bound.gap, up=True)}</b>"
            )
        if self.quadratic_bound is not None:
            bound = self.quadratic_bound
            rows[f"objective with penalty={bound.penalty:g}"] = f"{bound.value:.6g}"
            rows["its global gap"] = f"<b>{rounded(bound.gap, up=True)}</b>"
        return html_table(rows)
