"""The result of a projection on a column space."""

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
    """The part of the targets outside a column space, and the singular values found.

    Attributes:
        error: `Y - J beta` with the `beta` found, `(rows, k)`.
        rounding: Bound on what the rounding of `J beta` adds to the norm of the error.
        slope: Norms of `J^T error`, which are 0 at the least distance, `(k,)`.
        rank: Number of singular values above the cut-off; None after LSQR.
        sigma_max: The largest singular value; after LSQR a lower bound on it.
        sigma_min: The smallest singular value above the cut-off, 0 if there is none;
            None after LSQR.
        cut: Singular values up to `cut * sigma_max` count as zero. LSQR does not try to
            lower the error along their directions.
        iterations: Number of steps of LSQR, summed over the targets.
        converged: Whether directions above the cut-off cannot lower the error further,
            or the error is below the tolerance.
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
    """Estimated bound on what the rounding of `J beta` adds to the norm of an error.

    Args:
        solution: `beta`, any shape.
        sigma_max: The largest singular value of `J`.
        eps: Machine precision of the product.

    Returns:
        A few units of rounding of the largest possible size of `J beta`.
    """
    return _PRODUCT_ROUNDING * eps * sigma_max * float(np.linalg.norm(solution))
