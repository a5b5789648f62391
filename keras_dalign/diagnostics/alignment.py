"""Checks whether the data are aligned with a model.

With the Jacobian `J` (`nC x P`) of all logits in the parameters and the modified
targets `Y_l` (`2 Y - 1` for the cross-entropies, `Y` for squared error), the
data-architecture alignment condition of Kawaguchi, Zhang & Deng (2022) is that
`vec(Y_l)` lies in the column space of `J`. It is a condition on data, labels and
architecture together, and may hold although `J J^T` is singular. It is measured by

    r = min over beta of ||vec(Y_l) - J beta|| / ||Y_l||,   in [0, 1].

A reported residual is always attained by some `beta`, so it is an upper bound on `r`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import scipy.linalg

from keras_dalign.diagnostics.alignment_report import AlignmentReport
from keras_dalign.diagnostics.alignment_route import (
    METHODS,
    WORDS,
    Plan,
    allowed_memory,
    plan_route,
    size_text,
)
from keras_dalign.diagnostics.alignment_systems import (
    Deflated,
    KnownColumns,
    System,
    checked_finite,
    systems_of,
)
from keras_dalign.diagnostics.jacobian_builder import jacobian
from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING
from keras_dalign.head.objective import (
    check_outputs,
    check_targets,
    loss_of,
    single_array,
)
from keras_dalign.numerics.arguments import choice, integer, number
from keras_dalign.numerics.column_space import by_factor, by_gram, factor_cut
from keras_dalign.numerics.lsqr import by_iteration
from keras_dalign.numerics.repeats import PassRecord, digests
from keras_dalign.numerics.rounding import EPS
from keras_dalign.numerics.threads import in_turn
from keras_dalign.training.aligned_model import AlignedModel

if TYPE_CHECKING:
    from keras_dalign.diagnostics.jacobian import Jacobian
    from keras_dalign.numerics import Array
    from keras_dalign.numerics.losses import ConvexLoss
    from keras_dalign.numerics.operators import Products
    from keras_dalign.numerics.projection import Projection

# Seconds between two messages of a long run of LSQR.
_LOG_SECONDS = 30.0

_log = logging.getLogger("keras_dalign")


@in_turn
def check_alignment(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    parameters: str | Sequence[keras.Variable] | None = None,
    loss: Any = None,
    tolerance: float = 1e-6,
    method: str = "auto",
    rank_tolerance: float | None = None,
    max_memory: int | None = None,
    max_iterations: int = 500,
    batch_size: int = 256,
) -> AlignmentReport:
    """Measures the distance of the modified targets to the Jacobian's column space.

    The Jacobian is computed in inference mode and in float64, whatever dtype the model
    trains in; the report says if the model could not be rebuilt in float64. Structured
    Jacobians are not formed: that of the last layer is `phi (x) I_C`, with `phi` its
    inputs and a column of ones, and that of the head has one block for each output.

    Routes, the most exact first:

    - `"dense"`: a triangular factor of `J` (of `phi`; of each block) and its singular
      values. A wide matrix is formed in memory, a tall one read in blocks of rows.
    - `"gram"`: the eigenvalues of `J J^T`, formed from as many rows of `J` at a time as
      fit. They are squares, so singular values below about
      `sqrt(nC * eps) * sigma_max` are lost.
    - `"lsqr"`: products with `J` alone. It keeps a row and a column for each step, as
      long as these fit. It gives no rank. Its residual falls from step to step and is
      an upper bound wherever it ends. If the output layer is among the parameters, its
      part is solved exactly at every step.

    `"auto"` takes the first route that fits `max_memory` and 5e12 flop, a minute or two
    on two cores. If `"dense"` would take more than seconds and `"gram"` is much
    cheaper, it takes `"gram"`, and then `"dense"` if the Gram matrix is singular. The
    logger `keras_dalign` gets the memory that a route needs before it is allocated.

    Args:
        model: Any Keras model with one output, of logits (or of predictions, for
            squared error), shape `(n, C)`, with or without an alignment head.
        x: Inputs: arrays, or a stream that gives the same samples in every pass.
        y: Targets, for arrays. Sample weights in a stream are ignored: the condition
            does not depend on them.
        parameters: `"head"` (`q` and `b` of an alignment head that exploits), `"last"`
            (the output layer), `"all"`, or a list of variables. Default: `"head"` for a
            model whose head exploits, else `"last"`.
        loss: A loss as in `keras.Model.compile`, if not the one that the model was
            compiled with.
        tolerance: The residual up to which the condition holds.
        method: `"auto"`, `"dense"`, `"gram"` or `"lsqr"`.
        rank_tolerance: Singular values up to this one, relative to the largest, count
            as zero. Default: the size of rounding errors, `max(nC, P) * eps` for
            `"dense"` and the square root of it for the others.
        max_memory: The most bytes to allocate; default: half of the free memory.
        max_iterations: The most steps of LSQR, for each output if these are separate.
            Each step reads the data twice.
        batch_size: Samples per product, for arrays.

    Returns:
        The report.

    Raises:
        ValueError: If an argument is out of range, the loss is not convex or not given,
            the targets do not fit it, anything is not finite, the model is stochastic,
            or a stream changed between two passes.
        MemoryError: If the requested method needs more than `max_memory`.

    Example:

    ```python
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    print(keras_dalign.check_alignment(model, x, y, parameters="all"))
    ```
    """
    begin = time.perf_counter()
    _check_arguments(method, tolerance, rank_tolerance, max_memory, max_iterations)
    convex = loss_of(model, loss)
    check_outputs(model, convex)
    if parameters is None:
        exploits = isinstance(model, AlignedModel) and model.phase == EXPLOITING
        parameters = "head" if exploits else "last"
    record, labels, samples = _read(model, x, y, batch_size)
    J = jacobian(model, x, parameters, batch_size=batch_size)
    if record.n != J.n:
        raise ValueError(
            "The data changed in size between two passes: every pass must give the "
            f"same samples. Received: {record.n} samples, then {J.n}"
        )
    eps = float(np.finfo(J.dtype).eps)
    _check_precision(tolerance, rank_tolerance, eps, J.dtype)
    targets = convex.aligned_targets(convex.targets(labels, J.units))
    largest = float(np.abs(targets).max())
    # Scaled, since squares of the targets may overflow; the residual is the same.
    scaled = targets / largest if largest else targets
    systems = systems_of(J, scaled)
    settings = (method, rank_tolerance, eps, max_memory, max_iterations)
    plan = _logged(plan_route(systems, *settings))
    known = None
    if plan.route == "lsqr" and J.kind == "generic":
        known = _last_layer(model, x, J, batch_size, plan, max_memory)
    projections = [
        _project(system, plan, tolerance, max_iterations, known) for system in systems
    ]
    if (
        method == "auto"
        and plan.route == "gram"
        and not _full_row_rank(systems, projections)
    ):
        exact = plan_route(systems, *settings, gram_singular=True)
        if exact.route == "dense":
            plan = _logged(exact)
            projections = [
                _project(system, plan, tolerance, max_iterations, None)
                for system in systems
            ]
    if not data.is_arrays(x):
        record.check_same(_read(model, x, None, batch_size)[0])
    return _report(
        J,
        projections,
        scaled,
        samples,
        plan,
        tolerance=tolerance,
        loss=convex,
        parameters=parameters,
        begin=begin,
    )


def _logged(plan: Plan) -> Plan:
    """Logs the route and its memory; returns the plan."""
    _log.info(
        "check_alignment: %s, as %s; it needs %s.",
        WORDS[plan.route],
        plan.reason,
        size_text(plan.memory),
    )
    return plan


def _full_row_rank(systems: list[System], projections: list[Projection]) -> bool:
    """Whether every system has full row rank."""
    return all(
        projection.rank == system.operator.shape[0]
        for system, projection in zip(systems, projections, strict=True)
    )


def _project(
    system: System,
    plan: Plan,
    tolerance: float,
    max_iterations: int,
    known: KnownColumns | None,
) -> Projection:
    operator, targets = system.operator, system.targets
    if plan.route == "dense":
        return by_factor(operator, targets, plan.cut, plan.eps)
    if plan.route == "gram":
        return by_gram(operator, targets, plan.cut, tolerance, plan.lot, plan.eps)
    products: Products = operator
    scale = 1.0
    if known is not None:
        products = deflated = Deflated(operator, known.basis)
        left = deflated.outside(deflated.outside(targets[:, 0]))[:, None]
        scale = float(np.linalg.norm(targets)) / (float(np.linalg.norm(left)) or 1.0)
        targets = left
    return by_iteration(
        products,
        targets,
        plan.cut,
        tolerance * scale,
        max_iterations,
        plan.held,
        _Progress(),
        0.0 if known is None else known.sigma_max,
        plan.eps,
    )


def _last_layer(
    model: keras.Model,
    x: Any,
    J: Jacobian,
    batch_size: int,
    plan: Plan,
    max_memory: int | None,
) -> KnownColumns | None:
    """The output layer's columns, if `J` has them and they fit into memory."""
    try:
        last: Any = jacobian(model, x, "last", batch_size=batch_size)
    except (MemoryError, ValueError):
        return None
    own = {id(variable) for variable in J.variables}
    if last.kind != "last" or not own.issuperset(id(v) for v in last.variables):
        return None
    features = last.features
    if plan.memory + 4 * features.nbytes > allowed_memory(max_memory):
        return None
    left, values, _ = scipy.linalg.svd(
        checked_finite(features), full_matrices=False, check_finite=False
    )
    kept = values > factor_cut(features.shape) * values[0]
    return KnownColumns(left[:, kept], float(values[0]))


class _Progress:
    """Logs the number of steps of a long run of LSQR at intervals."""

    def __init__(self) -> None:
        self._last_logged = time.perf_counter()

    def __call__(self, steps: int) -> None:
        now = time.perf_counter()
        if now - self._last_logged >= _LOG_SECONDS:
            self._last_logged = now
            _log.info("check_alignment: %d steps of LSQR.", steps)


def _report(
    J: Jacobian,
    projections: list[Projection],
    targets: Array,
    samples: list[bytes],
    plan: Plan,
    *,
    tolerance: float,
    loss: ConvexLoss,
    parameters: Any,
    begin: float,
) -> AlignmentReport:
    n, units = J.n, J.units
    error = np.concatenate([p.error.reshape(n, -1) for p in projections], axis=1)
    slope = float(np.linalg.norm(np.concatenate([p.slope for p in projections])))
    norm, left = float(np.linalg.norm(targets)), float(np.linalg.norm(error))
    rounding = math.hypot(*(p.rounding for p in projections))
    sigma_max = max(p.sigma_max for p in projections)
    # At most 1, since a `beta` of 0 attains it.
    residual = min((left + rounding) / norm, 1.0) if norm else 0.0
    groups, n_distinct = _groups(samples)
    lower_bound = _spread(targets, groups, n_distinct)
    ranks = [p.rank for p in projections if p.rank is not None]
    least = [p.sigma_min for p in projections if p.sigma_min]
    copies = units if J.kind == "last" else 1
    rank = copies * sum(ranks) if ranks else None
    converged = all(p.converged for p in projections) or residual <= tolerance
    words = {
        "head": "the head's q and b",
        "last": "the last layer",
        "all": "all parameters",
    }
    return AlignmentReport(
        residual=residual,
        aligned=residual <= tolerance,
        decided=converged or lower_bound > tolerance,
        lower_bound=lower_bound,
        residuals=tuple(
            float(np.linalg.norm(error[:, c]) / (np.linalg.norm(targets[:, c]) or 1.0))
            for c in range(units)
        ),
        tolerance=tolerance,
        rank=rank,
        full_row_rank=None if rank is None else rank == n * units,
        sigma_max=sigma_max,
        sigma_min=None if rank is None else min(least, default=0.0),
        rank_tolerance=plan.cut,
        optimality=slope / (sigma_max * left) if sigma_max * left else 0.0,
        loss=loss.name,
        parameters=(
            words[parameters]
            if isinstance(parameters, str)
            else f"{len(parameters)} given variables"
        ),
        n=n,
        n_distinct=n_distinct,
        units=units,
        n_rows=n * units,
        n_parameters=J.shape[1],
        dtype=J.dtype,
        route=plan.route,
        reason=plan.reason,
        memory=plan.memory,
        iterations=sum(p.iterations for p in projections),
        converged=converged,
        seconds=time.perf_counter() - begin,
    )


def _groups(samples: list[bytes]) -> tuple[np.ndarray, int]:
    """The group of identical inputs of each sample, and the number of groups."""
    known: dict[bytes, int] = {}
    groups = np.array([known.setdefault(sample, len(known)) for sample in samples])
    return groups, len(known)


def _spread(targets: Array, groups: np.ndarray, n_groups: int) -> float:
    """The norm of the targets minus their groups' means, relative to the targets'."""
    norm = float(np.linalg.norm(targets))
    if n_groups == len(targets) or not norm:
        return 0.0
    sums = np.zeros((n_groups, targets.shape[1]))
    np.add.at(sums, groups, targets)
    means = sums / np.bincount(groups, minlength=n_groups)[:, None]
    spread = float(np.linalg.norm(targets - means[groups])) / norm
    # For equal targets in each group, the difference is rounding alone.
    return spread if spread > len(targets) * EPS else 0.0


def _read(
    model: keras.Model, x: Any, y: Any, batch_size: int
) -> tuple[PassRecord, np.ndarray, list[bytes]]:
    """One pass over the data: its record, the labels, a digest of each input."""
    if isinstance(x, Iterator):
        raise ValueError(
            "`x` must be read several times, which a generator does not allow: "
            "pass arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or a torch "
            f"`DataLoader`. Received: x of type {type(x).__name__}"
        )
    record, labels, samples = PassRecord(), [], []
    for inputs, targets, _ in data.batches(x, y, batch_size=batch_size):
        data.check_inputs(model, inputs)
        found = digests(inputs)
        check_targets(targets)
        labels.append(single_array(targets, "y"))
        record.add(found, *labels[-1:])
        samples += found
    return record, np.concatenate(labels), samples


def _check_arguments(
    method: str,
    tolerance: float,
    rank_tolerance: float | None,
    max_memory: int | None,
    max_iterations: int,
) -> None:
    choice("method", method, METHODS)
    for name, share in (("tolerance", tolerance), ("rank_tolerance", rank_tolerance)):
        if share is not None or name == "tolerance":
            number(name, share, "a number between 0 and 1", lambda v: 0 < v < 1)
    if max_memory is not None:
        integer("max_memory", max_memory)
    integer("max_iterations", max_iterations)


def _check_precision(
    tolerance: float, rank_tolerance: float | None, eps: float, dtype: str
) -> None:
    for name, value in (("tolerance", tolerance), ("rank_tolerance", rank_tolerance)):
        if value is not None and value < eps:
            raise ValueError(
                f"`{name}` is below machine precision, {eps:.2g} for a Jacobian in "
                f"{dtype}, so rounding alone may exceed it. "
                f"Received: {name}={value}"
            )
