"""Initial values of the gated units, and a check that they fit into memory.

Every value follows from the head's seed, and is the same on every backend.
"""

from __future__ import annotations

import math

import numpy as np

from keras_dalign.numerics.memory import free_gib

# The sigmoid of this number is 1 in every dtype: the gate is always open.
_ALWAYS_OPEN = 40.0
# Each kind of random value has a separate generator, with the seed `[seed, kind]`.
_TRAINED, _GATES, _SIGNS = 0, 1, 3


def random_gates(
    dim: int, groups: int, width: int, *, slope: float, seed: int, first_open: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Draws random gates and their output weights.

    Gates are nested: the first ones are the same at every width.

    Args:
        dim: Length `d` of the normalised features.
        groups: Number of sets of gates: 1 if outputs share them, else that of outputs.
        width: Number of gates per group.
        slope: Slope of the gates' sigmoid.
        seed: The head's seed.
        first_open: Whether the first gate is always open, with output weight 1.

    Returns:
        Gates `r` and output weights `w`, float64, of shapes `(d, groups, width)` and
        `(groups, width)`.

    Raises:
        MemoryError: If they do not fit into memory.
    """
    check_memory(dim, groups, width)
    rng = np.random.default_rng([seed, _GATES])
    drawn = width - first_open
    # Drawn unit by unit, so that the first ones are the same at every width.
    r = rng.standard_normal((drawn, dim, groups)).transpose(1, 2, 0)
    r /= math.sqrt(dim)
    w = output_signs(drawn, groups, seed) / math.sqrt(max(drawn, 1))
    if first_open:
        opened = np.zeros((dim, groups, 1))
        opened[-1] = _ALWAYS_OPEN / slope
        r = np.concatenate([opened, r], axis=2)
        w = np.concatenate([np.ones((groups, 1)), w], axis=1)
    return r, w


def learned_gates(q: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Gates that are the units' own weights plus Gaussian noise.

    Args:
        q: The units' weights, shape `(d, units, width)`, float64.
        noise: Standard deviation in units of the root mean square of `q`.
        seed: The head's seed.

    Returns:
        Gates `r`, of the shape of `q`, float64.
    """
    rng = np.random.default_rng([seed, _GATES])
    return q + noise * np.sqrt(np.mean(q**2)) * rng.standard_normal(q.shape)


def explored_weights(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Initial `q` of learned gates, from N(0, I / d).

    Args:
        shape: `(d, units, width)`.
        seed: The head's seed.

    Returns:
        Array of this shape, float64.
    """
    rng = np.random.default_rng([seed, _TRAINED])
    return rng.standard_normal(shape) / math.sqrt(shape[0])


def output_signs(width: int, groups: int, seed: int) -> np.ndarray:
    """Random signs of the output weights, nested as the gates are.

    Args:
        width: Number of units per group.
        groups: Number of sets of gates: 1 if outputs share them, else that of outputs.
        seed: The head's seed.

    Returns:
        Array of -1 and 1, shape `(groups, width)`, float64.
    """
    rng = np.random.default_rng([seed, _SIGNS])
    return rng.choice([-1.0, 1.0], size=(width, groups)).T


def check_memory(dim: int, units: int, width: int) -> None:
    """Checks that gated units fit into memory, before anything is allocated.

    Args:
        dim: Length `d` of the normalised features.
        units: Number of outputs.
        width: Number of gated units per output.

    Raises:
        MemoryError: If the units, and their gradients, take more than what is free.
    """
    gib = 4 * 2 * dim * units * width / 2**30
    free = free_gib()
    if free is not None and gib > free:
        raise MemoryError(
            f"The gated units would take {gib:.3g} GiB, of {free:.3g} GiB that are "
            f"free: d * units * width = {dim} * {units} * {width} weights, and as much "
            "again to train them. Pass a smaller `width` or the true number of "
            "samples, or solve with an L2 term, which needs a small width."
        )
