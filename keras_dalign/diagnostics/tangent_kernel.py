"""The tangent kernel of a model: the Gram matrix of its Jacobian's rows.

For `n` samples and `C` outputs it is `J diag(w) J2^T`, with the Jacobian `J` at some
inputs, `J2` at the same or others, and a weight for each variable (Jacot, Gabriel &
Hongler 2018; weighted: Tan, Wu & Huang 2021). Consider gradient descent on a squared
error, with a learning rate for each variable in proportion to its weight. To first
order, a step changes the outputs by minus the kernel times the error.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.diagnostics.alignment_systems import checked_finite
from keras_dalign.diagnostics.jacobian_builder import jacobian
from keras_dalign.numerics.gram import gate_activations
from keras_dalign.numerics.memory import check_memory

if TYPE_CHECKING:
    from keras_dalign.diagnostics.jacobian import Jacobian
    from keras_dalign.numerics import Array

# The most bytes of rows held at a time, of the first Jacobian and of the second one.
_HELD_BYTES = 2**29
_BLOCK_BYTES = 2**26


def tangent_kernel(
    model: keras.Model,
    x: Any,
    x2: Any = None,
    parameters: str | Sequence[keras.Variable] = "all",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    *,
    batch_size: int = 256,
) -> Array:
    """Computes the tangent kernel `J diag(weights) J2^T` of a model in inference mode.

    The computation is in float64, on a float64 copy of the model; `jacobian` reports if
    a model could not be rebuilt. Neither Jacobian is formed whole: 512 MiB of the first
    one's rows are held at a time, and for each such lot the second one's rows are
    computed again. With `x2=None` each block is multiplied once, and the result is
    exactly symmetric. A last layer needs only its inputs,
    `K = (phi diag(w) phi2^T) (x) I_C`, and so does an alignment head that exploits.

    Args:
        model: A built Keras model with one output of shape `(batch, C)`.
        x: Inputs: `n` samples, as arrays or as a stream that can be read again; see
            `jacobian`.
        x2: Other inputs, `n2` samples, in the same form. Default: `x`.
        parameters: The variables to differentiate by: `"all"`, `"last"`, `"head"` or a
            list; see `jacobian`.
        weights: A finite number of at least 0 for each variable: a dict from the
            variables' paths, or a sequence in the order of
            `jacobian(model, x, parameters).variables`. Default: 1 for each.
        batch_size: Samples per batch, for arrays.

    Returns:
        Shape `(n * C, n2 * C)`, float64, rows and columns in the C-order of the outputs
        `(n, C)`. `kernel.reshape(n, C, n2, C)` has the samples on axes 0 and 2.

    Raises:
        ValueError: If the weights do not fit the variables or are negative or not
            finite, or the derivatives are not finite; for model, data and parameters as
            `jacobian`.
        MemoryError: If the kernel and the rows that are held do not fit into memory.

    Example:

    ```python
    kernel = keras_dalign.tangent_kernel(model, x)
    slowest = np.linalg.eigvalsh(kernel)[0]
    between = keras_dalign.tangent_kernel(model, x_test, x)
    ```
    """
    J = jacobian(model, x, parameters, batch_size=batch_size)
    J2 = J
    if x2 is not None:
        J2 = jacobian(model, x2, parameters, batch_size=batch_size)
        if J2.kind != J.kind:
            # The structure is verified on the data, and holds on one of the two only.
            J, J2 = (
                jacobian(model, each, J.variables, batch_size=batch_size)
                for each in (x, x2)
            )
    factors = _factors(weights, J.variables)
    check_memory(
        8 * J.shape[0] * J2.shape[0] + _working_bytes(J, J2),
        f"The tangent kernel, {J.shape[0]} x {J2.shape[0]},",
    )
    if J.kind == "generic":
        return _by_rows(J, J2, factors)
    blocks = _of_last if J.kind == "last" else _of_head
    kernel = np.zeros((J.n, J.units, J2.n, J.units))
    for output, block in enumerate(blocks(J, J2, factors)):
        kernel[:, output, :, output] = block
    return kernel.reshape(J.shape[0], J2.shape[0])


def _working_bytes(J: Jacobian, J2: Jacobian) -> int:
    """Bytes held in addition to the kernel: some rows, or the blocks of one output."""
    if J.kind != "generic":
        return 3 * 8 * J.n * J2.n
    sample = 8 * J.units * J.shape[1]
    return sum(
        min(max(size, sample), n * sample)
        for size, n in ((_HELD_BYTES, J.n), (_BLOCK_BYTES, J2.n))
    )


def _by_rows(J: Jacobian, J2: Jacobian, factors: list[float]) -> Array:
    """The kernel of Jacobians without structure, a lot of rows at a time."""
    roots = _per_parameter([math.sqrt(factor) for factor in factors], J)
    kernel = np.empty((J.shape[0], J2.shape[0]))
    for lot in _lots(J, roots):
        whole = J2 is J and lot[-1][0].stop - lot[0][0].start == J.shape[0]
        for columns, right in lot if whole else _blocks(J2, roots):
            for rows, left in lot:
                if J2 is not J:
                    kernel[rows, columns] = left @ right.T
                elif rows == columns:
                    # Of one array with itself: NumPy makes this exactly symmetric.
                    kernel[rows, rows] = left @ left.T
                elif rows.start < columns.start:
                    kernel[rows, columns] = left @ right.T
                    kernel[columns, rows] = kernel[rows, columns].T
    return kernel


def _blocks(J: Jacobian, roots: Array) -> Iterator[tuple[slice, Array]]:
    """Blocks of rows in order, each column scaled by the root of its weight."""
    for rows, block in J.row_blocks(_BLOCK_BYTES):
        yield rows, checked_finite(block) * roots


def _lots(J: Jacobian, roots: Array) -> Iterator[list[tuple[slice, Array]]]:
    """Lists of blocks of rows in order, each list of at most `_HELD_BYTES`."""
    lot: list[tuple[slice, Array]] = []
    for rows, block in _blocks(J, roots):
        if lot and sum(each.nbytes for _, each in lot) + block.nbytes > _HELD_BYTES:
            yield lot
            lot = []
        lot.append((rows, block))
    yield lot


def _of_last(J: Any, J2: Any, factors: list[float]) -> Iterator[Array]:
    """The block of each output: the Gram matrix of the features, for all the same."""
    # The weight of the layer's kernel is for all features, that of its bias for the
    # column of ones.
    roots = np.full(J.features.shape[1], math.sqrt(factors[0]))
    if len(factors) > 1:
        roots[-1] = math.sqrt(factors[1])
    left = checked_finite(J.features) * roots
    right = left if J2 is J else checked_finite(J2.features) * roots
    gram = left @ right.T
    return (gram for _ in range(J.units))


def _of_head(J: Any, J2: Any, factors: list[float]) -> Iterator[Array]:
    """The block of each output: `(Zh Zh2^T) o (G G2^T)` and the bias."""
    slope = J.problem.slope
    features = J.problem.features
    others = features if J2 is J else J2.problem.features
    inner = factors[0] * (features @ others.T)
    for output in range(J.units):
        r, w = J.problem.gates.of_output(output)
        left = gate_activations(features, r, slope) * w
        right = left if J2 is J else gate_activations(others, r, slope) * w
        yield inner * (left @ right.T) + factors[1]


def _per_parameter(values: list[float], J: Jacobian) -> Array:
    sizes = [math.prod(variable.shape) for variable in J.variables]
    return np.repeat(np.asarray(values), sizes)


def _factors(
    weights: Mapping[str, float] | Sequence[float] | None,
    variables: list[keras.Variable],
) -> list[float]:
    """A number per variable, in their order."""
    paths = [variable.path for variable in variables]
    if weights is None:
        return [1.0] * len(paths)
    if isinstance(weights, Mapping):
        if len(set(paths)) < len(paths):
            raise ValueError(
                "Variables with equal paths cannot be told apart in a dict. Pass "
                f"`weights` as a sequence. Received: variables with paths {paths[:10]}"
            )
        missing = [path for path in paths if path not in weights]
        foreign = [path for path in weights if path not in paths]
        if missing or foreign:
            raise ValueError(
                "`weights` must name each variable of the Jacobian, and no other. "
                f"Received: no number for {missing[:10]}; numbers for {foreign[:10]}, "
                "which are not among them"
            )
        given = [weights[path] for path in paths]
    else:
        given = list(weights)
    if len(given) != len(paths):
        raise ValueError(
            f"`weights` must be one number per variable, {len(paths)} in all, in the "
            f"order of {paths[:10]}. Received: {len(given)} numbers"
        )
    for path, value in zip(paths, given, strict=True):
        if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
            raise ValueError(
                "`weights` must be finite numbers, none negative. Received: "
                f"{value!r} for '{path}'"
            )
    return [float(value) for value in given]
