"""What a projection on a column space leaves."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from keras_dalign.numerics import Array

# The rounding of a product, in units of eps * sigma_max * ||beta||.
_PRODUCT_ROUNDING = 4.0


@dataclasses.dataclass(frozen=True)
class Projection:
    """What is left of the targets outside a column space, and the spectrum seen.

    Attributes:
        error: `Y - J beta` with the `beta` found, `(rows, k)`.
        rounding: What the rounding of `J beta` may add to the norm of the error.
        slope: `J^T error`, which is 0 at the least distance, as a norm, `(k,)`.
        rank: Number of singular values above the cut-off; None after LSQR.
        sigma_max: The largest singular value; after LSQR a lower bound on it.
        sigma_min: The smallest singular value above the cut-off, 0 if there is none;
            None after LSQR.
        cut: Singular values up to `cut * sigma_max` count as zero; after LSQR, what
            they could still take off the error was not asked for.
        iterations: Steps of LSQR, all targets together.
        converged: Whether nothing above the cut-off is left to take off the error, or
            the error is below the tolerance.
    """

    error: Array
    rounding: float
    slope: Array
    rank: int | None
    sigma_max: float
    sigma_min: float | None
    cut: float
    iterations: int = 0
    converged: bool = True


def product_rounding(solution: Array, sigma_max: float, eps: float) -> float:
    """What the rounding of `J beta` may add to the norm of an error.

    Args:
        solution: `beta`, any shape.
        sigma_max: The largest singular value of `J`.
        eps: Machine precision of the product.

    Returns:
        A few roundings of its largest possible size.
    """
    return _PRODUCT_ROUNDING * eps * sigma_max * float(np.linalg.norm(solution))
