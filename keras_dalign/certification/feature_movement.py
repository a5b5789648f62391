"""How far features have moved: one minus their linear centred kernel alignment.

Source: S. Kornblith, M. Norouzi, H. Lee and G. Hinton, "Similarity of Neural Network
Representations Revisited", ICML 2019.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from keras_dalign.numerics import Array


def feature_movement(features: Array, reference: Array) -> float:
    """One minus the cosine of the angle between the kernels of two feature matrices.

    Args:
        features: Shape `(n, p)`; they are centred first, as `reference` is.
        reference: Those they are compared with, shape `(n, k)`.

    Returns:
        Between 0, for the same features up to rotation, shift and scaling, and 1.
    """
    now, before = (
        rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
        for rows in (features, reference)
    )
    norms = np.linalg.norm(now.T @ now) * np.linalg.norm(before.T @ before)
    if not norms:
        # Without features that differ between samples, there is no angle: 0 if neither
        # has any, 1 if one has.
        return float(now.any() or before.any())
    cosine = np.linalg.norm(now.T @ before) ** 2 / norms
    return float(np.clip(1.0 - cosine, 0.0, 1.0))
