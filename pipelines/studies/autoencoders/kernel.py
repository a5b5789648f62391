"""Tangent kernels of the autoencoders, and their limits for infinite width.

All are of shape `(n d, n d)`, in blocks `(i, j)` of `d x d` for inputs `x_i`, `x_j` of
norm 1. With `g_i = 1{W^T x_i > 0}` and `p_i = relu(W^T x_i)` the blocks are `c^2` times

- encoder: `(x_i . x_j) A diag(g_i g_j) A^T`,
- decoder: `(p_i . p_j) I`,
- joint: their sum,
- tied: both, with `A = W`, and `(W (g_i p_j)) x_i^T + x_j (W (g_j p_i))^T`, since one
  matrix does the work of two.

For `c = 1 / sqrt(m d)` and `t = x_i . x_j` those of encoder and decoder tend to
`t k0(t) I / d` and `k1(t) I / d` (Cho & Saul 2009).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipelines.studies.autoencoders.network import Array, Autoencoder


def tangent_kernel(network: Autoencoder, x: Array) -> Array:
    """The kernel in what is trained, at the network's weights.

    Args:
        network: The network.
        x: Inputs, shape `(n, d)`.

    Returns:
        Shape `(n d, n d)`, rows in the C-order of the outputs.
    """
    n, d = x.shape
    hidden = network.hidden(x)
    active = (hidden > 0).astype(float)
    hidden *= active
    decoder = network.decoder
    blocks = np.zeros((n, d, n, d))
    if network.trained != "decoder":
        # Row (i, a) is A[a] where unit r is active at x_i.
        rows = (active[:, None, :] * decoder).reshape(n * d, -1)
        blocks += (rows @ rows.T).reshape(n, d, n, d) * (x @ x.T)[:, None, :, None]
    if network.trained != "encoder":
        outputs = np.arange(d)
        # Indexed so, the outputs come first: (d, n, n).
        blocks[:, outputs, :, outputs] += hidden @ hidden.T
    if network.trained == "tied":
        # Entry a of W (g_i p_j), times entry b of x_i; and the transpose.
        cross = np.einsum("ar,ir,jr->iaj", decoder, active, hidden, optimize=True)
        mixed = cross[:, :, :, None] * x[:, None, None, :]
        blocks += mixed + mixed.transpose(2, 3, 0, 1)
    return network.scale**2 * blocks.reshape(n * d, n * d)


def limit_kernel(trained: str, x: Array) -> Array:
    """What the kernel tends to for infinite width and `c = 1 / sqrt(m d)`.

    Args:
        trained: `"encoder"`, `"decoder"` or `"joint"`. Tied networks have none: their
            outputs grow with the width.
        x: Inputs of norm 1, shape `(n, d)`.

    Returns:
        Shape `(n d, n d)`.

    Raises:
        ValueError: If there is no limit.
    """
    d = x.shape[1]
    cosines = np.clip(x @ x.T, -1.0, 1.0)
    parts = {"encoder": cosines * k0(cosines), "decoder": k1(cosines)}
    parts["joint"] = parts["encoder"] + parts["decoder"]
    if trained not in parts:
        raise ValueError(f"A limit is known for {sorted(parts)}. Received: {trained!r}")
    return np.kron(parts[trained] / d, np.eye(d))


def k0(cosine: Array) -> Array:
    """`E[1{w.x > 0} 1{w.z > 0}]` for `w ~ N(0, I)` and inputs of this cosine."""
    return (np.pi - np.arccos(cosine)) / (2 * np.pi)


def k1(cosine: Array) -> Array:
    """`E[relu(w.x) relu(w.z)]` for `w ~ N(0, I)` and inputs of norm 1."""
    sine = np.sqrt(1.0 - cosine**2)
    return (sine + cosine * (np.pi - np.arccos(cosine))) / (2 * np.pi)
