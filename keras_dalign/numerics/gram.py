"""The alignment head's features and Gram matrices, in NumPy and float64.

For one output (one class) the gated part of the head is the linear model

    g(x) = sum_k w_k * s(slope * (r_k . zh)) * (q_k . zh),   s(t) = 1 / (1 + exp(-t)),

in its trained weights `q`. Its `n x (m * d)` feature matrix `Phi` has the Gram matrix

    K = Phi Phi^T = (Zh Zh^T) o (G G^T),   G = s(slope * Zh R) diag(w),

where `o` is the entrywise product. `K` is computed in `O(n^2)` memory, without the
`n x (m * d)` features. These are here only as the reference that `K` is tested against.

All inputs are converted to float64: at the condition numbers that occur here, float32
cannot decide whether a matrix has full rank.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def gate_activations(Zh: npt.ArrayLike, R: npt.ArrayLike, slope: float) -> Array:
    """Values of the gates, `s(slope * Zh R)`.

    Args:
        Zh: Normalised features, shape `(n, d)`.
        R: Gates of one class, shape `(d, m)`: column `k` is `r_k`.
        slope: Slope of the sigmoid, positive.

    Returns:
        Gate values in `[0, 1]`, shape `(n, m)`, float64. Their relative error is small,
        also for closed gates.

    Raises:
        ValueError: If the shapes do not fit, or `slope` is not positive and finite.
    """
    features, gates = _as_matrix(Zh, "Zh"), _as_matrix(R, "R")
    if gates.shape[0] != features.shape[1]:
        raise ValueError(
            "`R` must have one row per column of `Zh`. "
            f"Received: R.shape={gates.shape}, Zh.shape={features.shape}"
        )
    if not (np.isfinite(slope) and slope > 0):
        raise ValueError(
            f"`slope` must be positive and finite. Received: slope={slope}"
        )
    # exp(-log(1 + exp(-t))): no overflow for any t, and, unlike a tanh, full relative
    # accuracy where the gate is nearly closed.
    return np.exp(-np.logaddexp(0.0, -float(slope) * (features @ gates)))


def explicit_features(
    Zh: npt.ArrayLike, R: npt.ArrayLike, w: npt.ArrayLike, slope: float
) -> Array:
    """The dense features `Phi` of one class: the reference for `gram_matrix`.

    Columns are ordered gate by gate: column `k * d + j` is
    `w[k] * s(slope * Zh @ R[:, k]) * Zh[:, j]`. With trained weights `Q` of shape
    `(m, d)`, row `k` being `q_k`, the head's output is `Phi @ Q.ravel()`.

    Args:
        Zh: Normalised features, shape `(n, d)`.
        R: Gates of one class, shape `(d, m)`.
        w: Output weights of the gated units, shape `(m,)`.
        slope: Slope of the sigmoid, positive.

    Returns:
        `Phi`, shape `(n, m * d)`, float64. It is large: use it for small cases only.

    Raises:
        ValueError: If the shapes do not fit, or `slope` is not positive and finite.
    """
    features = _as_matrix(Zh, "Zh")
    gates = _weighted_gates(features, R, w, slope)
    return (gates[:, :, None] * features[:, None, :]).reshape(len(features), -1)


def gram_matrix(
    Zh: npt.ArrayLike, R: npt.ArrayLike, w: npt.ArrayLike, slope: float
) -> Array:
    """The Gram matrix `K = Phi Phi^T = (Zh Zh^T) o (G G^T)` of one class.

    Costs `n^2 (d + m)` multiply-adds and two `n x n` matrices.

    Args:
        Zh: Normalised features, shape `(n, d)`.
        R: Gates of one class, shape `(d, m)`.
        w: Output weights of the gated units, shape `(m,)`.
        slope: Slope of the sigmoid, positive.

    Returns:
        `K`, shape `(n, n)`, float64, symmetric and positive semi-definite up to
        rounding.

    Raises:
        ValueError: If the shapes do not fit, or `slope` is not positive and finite.
    """
    features = _as_matrix(Zh, "Zh")
    gates = _weighted_gates(features, R, w, slope)
    gram = features @ features.T
    gram *= gates @ gates.T
    return gram


def _weighted_gates(
    features: Array, R: npt.ArrayLike, w: npt.ArrayLike, slope: float
) -> Array:
    """The gate values times the output weights, `G` of shape `(n, m)`."""
    gates = gate_activations(features, R, slope)
    weights = np.asarray(w, dtype=np.float64)
    if weights.shape != (gates.shape[1],):
        raise ValueError(
            "`w` must have one entry per column of `R`. "
            f"Received: w.shape={weights.shape}, number of columns={gates.shape[1]}"
        )
    return gates * weights


def _as_matrix(value: npt.ArrayLike, name: str) -> Array:
    matrix = np.asarray(value, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(
            f"`{name}` must be a matrix. Received: {name}.shape={matrix.shape}"
        )
    return matrix
