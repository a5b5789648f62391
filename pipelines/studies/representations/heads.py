"""Heads on fixed inputs: linear and tangent-kernel regression, the quadratic head.

Each head is a function of training inputs and targets, its weights of regularisation
and other inputs. It returns predictions, one column for each weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np

import keras_dalign as kd

LINEAR, KERNEL, QUADRATIC, UNGATED = (
    "linear",
    "tangent kernel",
    "quadratic",
    "quadratic, no gates",
)
# What they see.
RAW, NEURAL = "raw", "neural"
# Those that learn, and the exponent of d in theory.
PAIRS = {
    (KERNEL, RAW): 4,
    (KERNEL, NEURAL): 4,
    (QUADRATIC, RAW): 3,
    (QUADRATIC, NEURAL): 2,
    (UNGATED, NEURAL): 2,
}

# Rows of a kernel that are computed at once.
_ROWS = 1024
# Conjugate gradients end at this residual, relative to the targets.
_RESIDUAL = 1e-4
_STEPS = 300


def linear(
    u: np.ndarray, y: np.ndarray, ridges: Sequence[float], others: np.ndarray
) -> np.ndarray:
    """Ridge regression.

    Args:
        u: Training inputs, shape `(n, k)`.
        y: Targets, shape `(n,)`.
        ridges: Weights `s` of `(1/n) sum_i (w . u_i - y_i)^2 + s |w|^2`.
        others: Inputs, shape `(N, k)`.

    Returns:
        Predictions for them, shape `(N, len(ridges))`.
    """
    values, vectors = np.linalg.eigh(u.T @ u / len(u))
    projected = vectors.T @ (u.T @ y / len(u))
    weights = projected[:, None] / (values[:, None] + np.asarray(ridges))
    return others @ (vectors @ weights)


def tangent_kernel(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The tangent kernel of a wide two-layer ReLU network in its first layer.

    Args:
        u: Inputs, shape `(n, k)`.
        v: Inputs, shape `(N, k)`.

    Returns:
        `(u . v) (pi - angle(u, v)) / (pi k)`, shape `(n, N)`, float32.
    """
    u, v = u.astype(np.float32), v.astype(np.float32)
    lengths, other_lengths = np.linalg.norm(u, axis=1), np.linalg.norm(v, axis=1)
    found = np.empty((len(u), len(v)), np.float32)
    for start in range(0, len(u), _ROWS):
        rows = slice(start, start + _ROWS)
        block = found[rows]
        np.matmul(u[rows], v.T, out=block)
        cosines = block / lengths[rows, None]
        cosines /= other_lengths
        np.clip(cosines, -1.0, 1.0, out=cosines)
        np.arccos(cosines, out=cosines)
        np.subtract(np.float32(np.pi), cosines, out=cosines)
        cosines *= np.float32(1.0 / (np.pi * u.shape[1]))
        block *= cosines
    return found


def kernel(
    u: np.ndarray, y: np.ndarray, ridges: Sequence[float], others: np.ndarray
) -> np.ndarray:
    """Kernel ridge regression with the tangent kernel.

    Args:
        u: Training inputs, shape `(n, k)`.
        y: Targets, shape `(n,)`.
        ridges: What is added to the kernel's diagonal.
        others: Inputs, shape `(N, k)`.

    Returns:
        Predictions for them, shape `(N, len(ridges))`.
    """
    coefficients = solve(tangent_kernel(u, u), y, ridges)
    found = np.empty((len(others), len(ridges)))
    for start in range(0, len(others), _ROWS):
        rows = slice(start, start + _ROWS)
        found[rows] = tangent_kernel(others[rows], u) @ coefficients
    return found


def solve(K: np.ndarray, y: np.ndarray, ridges: Sequence[float]) -> np.ndarray:
    """Solves `(K + s I) a = y` for several `s` at once, by conjugate gradients.

    Args:
        K: Symmetric positive semi-definite, shape `(n, n)`, float32.
        y: Shape `(n,)`.
        ridges: The `s`, positive.

    Returns:
        Shape `(n, len(ridges))`, float32.

    Raises:
        RuntimeError: If it does not converge.
    """
    shifts = np.asarray(ridges, np.float32)
    a = np.zeros((len(y), len(shifts)), np.float32)
    residual = np.repeat(y.astype(np.float32)[:, None], len(shifts), axis=1)
    direction = residual.copy()
    squares = (residual**2).sum(axis=0)
    enough = np.float32(_RESIDUAL) ** 2 * squares
    for _ in range(_STEPS):
        # Columns that have converged stay as they are.
        on = np.flatnonzero(squares > enough)
        if not len(on):
            return a
        ahead = direction[:, on]
        image = K @ ahead + shifts[on] * ahead
        length = squares[on] / (ahead * image).sum(axis=0)
        a[:, on] += length * ahead
        residual[:, on] -= length * image
        new = (residual[:, on] ** 2).sum(axis=0)
        direction[:, on] = residual[:, on] + ahead * (new / squares[on])
        squares[on] = new
    raise RuntimeError(
        f"Conjugate gradients have not converged after {_STEPS} steps. Received: "
        f"ridges={list(ridges)}, relative residuals "
        f"{np.sqrt(squares / enough) * _RESIDUAL}. Use larger ridges."
    )


def quadratic(
    u: np.ndarray,
    y: np.ndarray,
    penalties: Sequence[float],
    others: np.ndarray,
    *,
    units: int,
    second_derivative: str,
    iterations: int,
    seed: int,
) -> np.ndarray:
    """The quadratic head, from its initial weights along a path of penalties.

    Args:
        u: Training inputs, shape `(n, k)`.
        y: Targets, shape `(n,)`.
        penalties: Weights of the head's penalty.
        others: Inputs, shape `(N, k)`.
        units: Units of the head.
        second_derivative: Their `phi''`.
        iterations: Most iterations for each penalty.
        seed: Seed of the head.

    Returns:
        Predictions for them, shape `(N, len(penalties))`.
    """
    model = quadratic_model(u.shape[1], units, second_derivative, seed)
    found = np.empty((len(others), len(penalties)))
    for column in np.argsort(penalties)[::-1]:
        model.layers[-1].penalty = float(penalties[column])
        kd.solve_quadratic(
            model, u, y, loss="mse", max_iterations=iterations, batch_size=len(u)
        )
        found[:, column] = model.predict_on_batch(others)[:, 0]
    return found


def quadratic_model(
    k: int, units: int, second_derivative: str, seed: int, penalty: float = 1.0
) -> keras.Model:
    """A quadratic head in float64 as a model of inputs `(n, k)`."""
    keras.utils.clear_session()
    head = kd.QuadraticHead(
        1, units, second_derivative, penalty, seed=seed, dtype="float64"
    )
    return keras.Sequential([keras.Input((k,), dtype="float64"), head])
