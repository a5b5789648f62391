"""Checks that a model's outputs are `J theta` in some parameters, and if not, says why.

The common model structure (Kawaguchi, Zhang & Deng 2022): there is a set `S` of
parameters with

    f_X(theta) = sum_{k in S} theta_k * d f_X / d theta_k   for all theta.

Any model that ends in a layer linear in its weights has this structure. By Euler's
theorem it means that the outputs are positively homogeneous of degree 1 in `theta_S`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.diagnostics.jacobian_builder import exploiting_head, jacobian
from keras_dalign.diagnostics.output_path import output_path, untouched_graph
from keras_dalign.diagnostics.reread_data import RereadData
from keras_dalign.diagnostics.structure_causes import StructureDiagnosis, StructurePoint
from keras_dalign.diagnostics.structure_report import StructureCause, StructureReport
from keras_dalign.numerics.arguments import number

if TYPE_CHECKING:
    from keras_dalign.numerics import Array

_TOLERANCES = {"float64": 1e-8, "float32": 1e-4, "float16": 0.03, "bfloat16": 0.1}
_EPSILONS = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}


def check_structure(
    model: keras.Model,
    x: Any,
    *,
    parameters: str | Sequence[keras.Variable] | None = None,
    tolerance: float | None = None,
    batch_size: int = 256,
    steps: int | None = None,
) -> StructureReport:
    """Checks numerically that a model's outputs are `J theta` in some parameters.

    All guarantees of convergence assume this structure. A float64 copy is
    differentiated at the model's weights and at others near them. A few samples are
    enough, since the structure depends on the architecture, not on the data. If the
    check fails, the report says what breaks the structure and what to change; for this
    the model is also evaluated at parameters of 0 and of twice the size.

    Args:
        model: A built Keras model with one output of shape `(batch, C)`.
        x: Inputs: arrays, or a stream that can be read again.
        parameters: As in `jacobian`. Defaults to `"head"` for an `AlignedModel` that
            exploits, whose frozen linear part is then subtracted, and to `"last"`.
        tolerance: The largest relative error that counts as rounding. Defaults to 1e-8,
            and to more for models that cannot be rebuilt in float64.
        batch_size: Samples per batch, for arrays.
        steps: Batches that make one pass, for streams that do not end.

    Returns:
        The report.

    Raises:
        ValueError: If the tolerance is below the resolution of the dtype, or if there
            is no Jacobian (see `jacobian`).

    Example:

    ```python
    print(check_structure(model, x[:64]))
    ```
    """
    if parameters is None:
        parameters = "last" if exploiting_head(model) is None else "head"
    J = jacobian(model, x, parameters, batch_size=batch_size, steps=steps)
    tolerance = _checked_tolerance(tolerance, J.dtype)
    # Checked by differentiation, even if the structure of `J` is known.
    G = J
    if J.kind != "generic":
        G = jacobian(model, x, J.variables, batch_size=batch_size, steps=steps)
    offset = J.offset()
    here = StructurePoint(G, offset)
    elsewhere = StructurePoint(G.at(_moved(G.theta())), offset)
    error = max(here.error, elsewhere.error)
    holds = error <= tolerance
    causes: tuple[StructureCause, ...] = ()
    if not holds:
        # At parameters of 0 all degrees look the same.
        worst = here if here.error > tolerance and np.any(here.theta) else elsewhere
        with untouched_graph(model):
            path = output_path(model, RereadData(x, batch_size, steps, model).first())
            causes = StructureDiagnosis(worst, tolerance, path).causes()
    degree = elsewhere.degree(tolerance)
    change = elsewhere.J.matvec(elsewhere.theta) - here.J.matvec(elsewhere.theta)
    norm = float(np.linalg.norm(here.outputs))
    return StructureReport(
        holds=holds,
        error=error,
        tolerance=tolerance,
        parameters=tuple(variable.path for variable in J.variables),
        n_parameters=J.shape[1],
        n=J.n,
        units=J.units,
        offset=float(np.linalg.norm(offset)) / norm if norm else 0.0,
        degree=degree,
        linear=elsewhere.relative(change) <= tolerance,
        causes=causes,
        dtype=J.dtype,
    )


def _moved(theta: Array) -> Array:
    """Parameters moved by half their root mean square, the same way each time."""
    size = float(np.sqrt(np.mean(theta**2))) or 1.0
    moves = np.random.default_rng(0).standard_normal(theta.shape)
    return theta + 0.5 * size * moves


def _checked_tolerance(tolerance: float | None, dtype: str) -> float:
    if tolerance is None:
        return _TOLERANCES[dtype]
    epsilon = _EPSILONS[dtype]
    wanted = f"a number below 1 and at least {epsilon:.2g}, what {dtype} resolves"
    return number("tolerance", tolerance, wanted, lambda v: epsilon <= v < 1)
