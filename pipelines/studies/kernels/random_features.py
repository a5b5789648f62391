"""Random features of the tangent kernel of a ReLU network.

Han, Avron, Shoham, Kim and Shin (2021) and Zandieh, Han, Avron, Shoham, Kim and Shin
(NeurIPS 2021). The recursion of `arc_cosine.tangent_kernel`, with random features in
place of both arc-cosine kernels, and a sketch in place of the tensor product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.studies import sample
from pipelines.studies.kernels import arc_cosine

if TYPE_CHECKING:
    from pipelines.studies.kernels.arc_cosine import Array
    from pipelines.studies.sample import Row

METHODS = {
    "plain": {"leverage": False, "sketch": False},
    "leverage scores": {"leverage": True, "sketch": False},
    "sketch": {"leverage": False, "sketch": True},
    "sketch, leverage scores": {"leverage": True, "sketch": True},
}


def approximation(
    x: Array,
    depth: int,
    dimension: int,
    rng: np.random.Generator,
    *,
    leverage: bool = False,
    sketch: bool = False,
) -> Array:
    """The kernel that random features give.

    Args:
        x: Inputs, shape `(n, d)`, none zero.
        depth: Number of hidden layers of the network.
        dimension: Features per arc-cosine kernel, and of the sketch: an even number.
        rng: Where all is drawn from.
        leverage: Draws the weights of the features of degree 1 by their leverage
            scores.
        sketch: Sketches the tensor products. Without it they are exact, as the kernel
            needs their inner products only.

    Returns:
        Shape `(n, n)`; its expectation for `depth=1` is
        `arc_cosine.tangent_kernel(x, x, 1)`.
    """
    first, tangent = x, x
    gram = x @ x.T
    for _ in range(depth):
        zeroth = degree_0(first, dimension, rng)
        first = degree_1(first, dimension, rng, leverage=leverage)
        if sketch:
            product = tensor_sketch(tangent, zeroth, dimension, rng)
            tangent = np.concatenate([first, product], axis=1)
            gram = tangent @ tangent.T
        else:
            gram = first @ first.T + gram * (zeroth @ zeroth.T)
    return gram


def degree_0(x: Array, dimension: int, rng: np.random.Generator) -> Array:
    """Features `(n, dimension)` of the arc-cosine kernel of degree 0."""
    weights = rng.standard_normal((x.shape[1], dimension))
    return np.sqrt(2.0 / dimension) * (x @ weights > 0.0)


def degree_1(
    x: Array, dimension: int, rng: np.random.Generator, *, leverage: bool = False
) -> Array:
    """Features of the arc-cosine kernel of degree 1, times `|x| |z|`.

    Args:
        x: Inputs, shape `(n, d)`.
        dimension: Number of features.
        rng: Where their weights are drawn from.
        leverage: The density of a weight `w` is that of a standard normal one times
            `|w|^2 / d`, to which its leverage score is at most in proportion, and its
            feature is divided by the root of that factor.

    Returns:
        Shape `(n, dimension)`.
    """
    weights = rng.standard_normal((x.shape[1], dimension))
    if leverage:
        # A feature is in proportion to the length of its weight, which is divided out:
        # it need not be drawn (chi, with d + 2 degrees of freedom).
        weights *= np.sqrt(x.shape[1]) / np.linalg.norm(weights, axis=0)
    return np.sqrt(2.0 / dimension) * np.maximum(x @ weights, 0.0)


def tensor_sketch(
    a: Array, b: Array, dimension: int, rng: np.random.Generator
) -> Array:
    """A sketch of the tensor product of two vectors for each sample.

    Both are transformed by random signs and a discrete Fourier transform. The sketch
    has products of random pairs of their entries.

    Args:
        a: Shape `(n, p)`.
        b: Shape `(n, q)`.
        dimension: An even number.
        rng: Where signs and pairs are drawn from.

    Returns:
        Shape `(n, dimension)`. Of two samples `i` and `j`, the expectation of the inner
        product is `(a_i . a_j) (b_i . b_j)`.
    """
    entries = [
        np.fft.fft(each * rng.choice([-1.0, 1.0], each.shape[1]))[
            :, rng.integers(each.shape[1], size=dimension // 2)
        ]
        for each in (a, b)
    ]
    product = np.sqrt(2.0 / dimension) * entries[0] * entries[1]
    return np.concatenate([product.real, product.imag], axis=1)


def spectral_error(found: Array, kernel: Array, ridge: float) -> float:
    """The least `e` with `(1 - e)(K + r I) <= found + r I <= (1 + e)(K + r I)`.

    Args:
        found: The approximation, shape `(n, n)`.
        kernel: `K`, positive semi-definite, shape `(n, n)`.
        ridge: `r > 0`.

    Returns:
        The largest absolute eigenvalue of `found - K` relative to `K + r I`.
    """
    values, vectors = np.linalg.eigh(kernel)
    whitened = vectors / np.sqrt(np.maximum(values, 0.0) + ridge)
    difference = np.linalg.eigvalsh(whitened.T @ (found - kernel) @ whitened)
    return float(np.abs(difference).max())


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Errors of random features on digits.

    Args:
        settings: Those of the study.
        cell: With `depth` and `seed`.

    Returns:
        A row for each method and dimension: the relative `error` in the Frobenius norm,
        and the `spectral` one with `ridge` times the kernel's mean eigenvalue, both as
        root mean squares over `feature_draws` draws of the features.
    """
    x, _ = sample.pooled_digits(settings["feature_samples"], cell["seed"])
    kernel = arc_cosine.tangent_kernel(x, x, cell["depth"])
    ridge = settings["ridge"] * float(np.trace(kernel)) / len(x)
    rows = []
    for dimension in settings["feature_dimensions"]:
        for index, (method, options) in enumerate(METHODS.items()):
            rng = np.random.default_rng([cell["seed"], cell["depth"], dimension, index])
            errors = []
            for _ in range(settings["feature_draws"]):
                found = approximation(x, cell["depth"], dimension, rng, **options)
                spectral = spectral_error(found, kernel, ridge)
                errors.append((arc_cosine.distance(found, kernel), spectral))
            means = np.sqrt(np.mean(np.square(errors), axis=0))
            rows.append(
                {
                    **cell,
                    "method": method,
                    "dimension": dimension,
                    "error": float(means[0]),
                    "spectral": float(means[1]),
                }
            )
    return rows
