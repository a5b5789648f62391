"""Principal components of kept features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.solving.feature_rows import FeatureRows


def principal_components(rows: FeatureRows, hold: float) -> Array:
    """Leading eigenvectors of the features' second moments, which are not centred.

    Args:
        rows: The features, `(n, d)`.
        hold: The share of the sum of squares that they explain at least, at most 1.

    Returns:
        The fewest orthonormal columns with that share, `(d, k)`.
    """
    moments = np.zeros((rows.d, rows.d))
    for part in rows.blocks(8 * rows.d, 2**24):
        block = rows.block(part, np.float32)
        moments += block.T @ block
    values, vectors = scipy.linalg.eigh(moments, driver="evd")
    left_out = np.cumsum(np.maximum(values, 0.0))
    basis: Array = vectors[:, left_out > (1.0 - hold) * left_out[-1]]
    return basis
