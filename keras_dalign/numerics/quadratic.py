"""The quadratic model `f_c(u) = sum_r g_r(u) (w_cr . u)^2` and its convex relaxation.

The outputs are linear in the matrices `M_cr = w_cr w_cr^T`. For a loss `L` that is
convex in the outputs, the objective `L(f) + penalty * sum_cr |w_cr|^4` is therefore a
convex function of the matrices,

    L(f) + penalty * sum_cr (tr M_cr)^2   with   f_c(u) = sum_r g_r(u) u^T M_cr u,

and its minimum over all positive semi-definite `M_cr`, of any rank, is a lower bound of
the minimum over the weights. Let `G = dL/df` at some outputs `f`, and

    T_cr = sum_i G_ic g_r(u_i) u_i u_i^T   with the smallest eigenvalue `mu_cr`.

For all weights `w'`, with outputs `f'`,

    L(f') >= L(f) + <G, f' - f>                                (convexity)
           = L(f) - <G, f> + sum_cr w'_cr^T T_cr w'_cr,

and `w'^T T w' + penalty |w'|^4 >= mu |w'|^2 + penalty |w'|^4`, which is at least
`-min(mu, 0)^2 / (4 penalty)`. So the objective is never below

    L(f) - <G, f> - sum_cr min(mu_cr, 0)^2 / (4 penalty).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from keras_dalign.numerics.threads import over_rows

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.numerics.losses import ConvexLoss

# Products of weights and features computed at a time, so that they stay in the cache.
_PRODUCTS_AT_ONCE = 2**17
# Above this number of products, several threads share the work.
_SPLIT_PRODUCTS = 2**17


def outputs(u: Array, gates: Array, w: Array) -> Array:
    """Outputs of the quadratic model.

    Args:
        u: Features, shape `(n, d)`.
        gates: `g_r(u_i)`, shape `(n, m)`.
        w: Weights, shape `(d, C, m)`.

    Returns:
        `f`, shape `(n, C)`.
    """
    found = np.empty((len(u), w.shape[1]))
    for rows in _blocks(slice(0, len(u)), w):
        found[rows] = _outputs(_products(u[rows], w), gates[rows])
    return found


def value_and_gradient(
    u: Array, gates: Array, w: Array, targets: Array, shares: Array, loss: ConvexLoss
) -> tuple[float, Array]:
    """A weighted sum of the samples' losses, and its gradient in the weights.

    Args:
        u: Features, shape `(n, d)`.
        gates: `g_r(u_i)`, shape `(n, m)`.
        w: Weights, shape `(d, C, m)`.
        targets: From `loss.targets`, shape `(n, C)`.
        shares: Factors of the samples' losses, shape `(n,)`.
        loss: The loss.

    Returns:
        The sum, and `2 sum_i (dL/df_ic) g_r(u_i) (w_cr . u_i) u_i`, shape `(d, C, m)`.
    """
    d, C, m = w.shape

    # An overflow gives infinity, and the line search then takes a shorter step.
    @np.errstate(over="ignore", invalid="ignore")
    def part(given: slice) -> tuple[float, Array]:
        value, slope = 0.0, np.zeros((d, C * m))
        for rows in _blocks(given, w):
            products = _products(u[rows], w)
            f = _outputs(products, gates[rows])
            values, cotangents = loss.value_and_gradient(f, targets[rows])
            value += float(shares[rows] @ values)
            cotangents = cotangents * (2.0 * shares[rows][:, None])
            products *= gates[rows][:, None, :]
            products *= cotangents[:, :, None]
            slope += u[rows].T @ products.reshape(-1, C * m)
        return value, slope

    parts = over_rows(part, len(u), split=len(u) * C * m > _SPLIT_PRODUCTS)
    values, slopes = zip(*parts, strict=True)
    return sum(values), sum(slopes).reshape(d, C, m)


def moments(u: Array, gates: Array, cotangents: Array) -> Array:
    """The matrices `T_cr = sum_i cotangents_ic g_r(u_i) u_i u_i^T`.

    Args:
        u: Features, shape `(n, d)`.
        gates: `g_r(u_i)`, shape `(n, m)`.
        cotangents: Gradients in the outputs, shape `(n, C)`.

    Returns:
        Shape `(C, m, d, d)`.
    """
    d, C, m = u.shape[1], cotangents.shape[1], gates.shape[1]
    found = np.empty((C, m, d, d))
    for c in range(C):
        for r in range(m):
            np.matmul((u * (cotangents[:, c] * gates[:, r])[:, None]).T, u, found[c, r])
    return found


def smallest_eigenvalues(matrices: Array) -> Array:
    """The smallest eigenvalue of each symmetric matrix.

    Args:
        matrices: Shape `(..., d, d)`; the lower triangles are read.

    Returns:
        Shape `(...)`.
    """
    found = np.empty(matrices.shape[:-2])
    for place in np.ndindex(found.shape):
        (found[place],) = scipy.linalg.eigh(
            matrices[place], eigvals_only=True, subset_by_index=[0, 0]
        )
    return found


def _blocks(rows: slice, w: Array) -> list[slice]:
    step = max(1, _PRODUCTS_AT_ONCE // (w.shape[1] * w.shape[2]))
    starts = range(rows.start, rows.stop, step)
    return [slice(start, min(start + step, rows.stop)) for start in starts]


def _products(u: Array, w: Array) -> Array:
    """`w_cr . u_i`, shape `(n, C, m)`."""
    d, C, m = w.shape
    return (u @ w.reshape(d, C * m)).reshape(-1, C, m)


def _outputs(products: Array, gates: Array) -> Array:
    found: Array = np.einsum("nm,ncm,ncm->nc", gates, products, products)
    return found
