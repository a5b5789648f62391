"""Options of the full-batch solver."""

from __future__ import annotations

import dataclasses
from typing import Any

from keras_dalign.numerics.arguments import choice, integer, number
from keras_dalign.numerics.rounding import EPS

METHODS = ("auto", "lbfgs", "direct")
TRAINING, VALIDATION = "training", "validation"
JUDGES = (TRAINING, VALIDATION)
ORIGIN, BASE = "origin", "base"
CENTERS = (ORIGIN, BASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """Options of the full-batch solver.

    Args:
        tol: Positive float: the gap at which it stops.
        method: One of `METHODS`.
        l2: Weight of the L2 term, at least 0, or `"auto"`.
        max_iterations: Positive int.
        judge: The samples on which L2 weight and width are chosen: `"training"`, a
            fifth of the training samples, or `"validation"`, the validation samples.
        center: Where the L2 term of random gates is zero. With `"origin"` the units
            replace the output layer, so the term penalises the whole last layer. With
            `"base"` the output layer stays as it was trained, and the term penalises
            what the units add to it.

    Raises:
        ValueError: If an argument is out of its range.
    """

    tol: float = 1e-6
    method: str = "auto"
    l2: float | str = "auto"
    max_iterations: int = 1000
    judge: str = TRAINING
    center: str = ORIGIN

    def __post_init__(self) -> None:
        wanted = (
            f"a positive number, not below the machine precision of float64, {EPS:.2g}"
        )
        number("tol", self.tol, wanted, lambda v: v >= EPS)
        choice("method", self.method, METHODS)
        if not isinstance(self.l2, str) or self.l2 != "auto":
            number("l2", self.l2, "a non-negative number or 'auto'", lambda v: v >= 0)
        integer("max_iterations", self.max_iterations)
        choice("judge", self.judge, JUDGES)
        choice("center", self.center, CENTERS)
        if self.judge == VALIDATION and self.l2 == 0:
            raise ValueError(
                "Validation samples serve to choose the L2 weight and the width. "
                f"Received: judge='{VALIDATION}' with l2={self.l2}. Pass l2='auto'."
            )

    def replaces_dense(self, gates: str) -> bool:
        """Whether units are to replace the output layer of a head with such gates."""
        return bool(self.l2 != 0 and self.center == ORIGIN and gates == "random")

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> SolveOptions:
        """The options given as a dict.

        Args:
            options: Any of the arguments by name.

        Returns:
            The options.

        Raises:
            ValueError: If there is an unknown name, or a value is out of its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"Options of the solver are {known}. Received: {unknown}")
        return cls(**options)
