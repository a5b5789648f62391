"""Is the data aligned with the model? The condition, measured.

With the Jacobian `J` (`nC x P`) of all logits in the parameters and the modified
targets `Y_l` (`2 Y - 1` for the cross-entropies, `Y` for squared error), the
data-architecture alignment condition of Kawaguchi, Zhang & Deng (2022) is that
`vec(Y_l)` lies in the column space of `J`. It is a statement about data, labels and
architecture together, and may hold although `J J^T` is singular. Its measure is

    r = min over beta of ||vec(Y_l) - J beta|| / ||Y_l||,   in [0, 1].

Every number reported as the residual is attained by some `beta`, hence at least `r`.
"""

from __future__ import annotations

import dataclasses
import html
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import keras
import numpy as np
import scipy.linalg

from keras_dalign import data
from keras_dalign.aligned_model import AlignedModel
from keras_dalign.alignment_head import EXPLOITING
from keras_dalign.column_space import (
    DenseOperator,
    Operator,
    Products,
    Projection,
    by_factor,
    by_gram,
    by_iteration,
    factor_cut,
    gram_cut,
)
from keras_dalign.features import _free_gib
from keras_dalign.gram import Array, gate_activations
from keras_dalign.jacobian import Jacobian, jacobian
from keras_dalign.objective import check_outputs, loss_of, single_array
from keras_dalign.problem import ConvexProblem
from keras_dalign.repeats import PassRecord, digests
from keras_dalign.subspace import EPS

if TYPE_CHECKING:
    from keras_dalign.losses import ConvexLoss

Method = Literal["dense", "gram", "lsqr"]

_METHODS = ("auto", "dense", "gram", "lsqr")
_WORDS = {
    "dense": "triangular factor of J and its singular values",
    "gram": "eigenvalues of the Gram matrix J J^T",
    "lsqr": "LSQR on products with J",
}

# What "auto" spends on a decomposition: a minute or two on two cores.
_FLOP_BUDGET = 5e12

# Seconds between two messages of a long run of LSQR.
_LOG_SECONDS = 30.0

_log = logging.getLogger("keras_dalign")


@dataclasses.dataclass(frozen=True)
class AlignmentReport:
    """Outcome of `check_alignment`; prints as sentences with the numbers.

    Attributes:
        residual: The share of the modified targets' norm that lies outside the column
            space of the Jacobian: `||Y_l - J beta|| / ||Y_l||` with the `beta` found,
            and what rounding may add to it, so an upper bound on the least. 0 for
            targets that are all zero, which lie in every column space.
        aligned: Whether `residual <= tolerance`.
        decided: Whether that is the last word: the residual is small enough, or the
            route converged, or `lower_bound` is above the tolerance.
        lower_bound: What no function of the inputs can go below: samples with identical
            inputs have identical rows, so whatever their targets have beside the mean
            of their group stays outside.
        residuals: The residual of each output by itself, `C` numbers: its error over
            the norm of its own targets.
        tolerance: The residual up to which the condition holds.
        rank: Number of singular values of the Jacobian above the rank tolerance, or
            None if the route cannot tell.
        full_row_rank: Whether the rank is `n_rows`: then any labels are aligned. None
            if the route cannot tell.
        sigma_max: The largest singular value (`"lsqr"`: a lower bound on it).
        sigma_min: The smallest singular value that counts, 0 if none does; None if the
            route cannot tell.
        rank_tolerance: Singular values up to this one, relative to `sigma_max`, count
            as zero (`"lsqr"`: need not be used up).
        optimality: `||J^T e|| / (sigma_max ||e||)` of the error `e` that is left:
            directions whose relative singular value is well above this one have been
            used up. 0 for a vanishing error.
        loss: The loss, in words: it says what the modified targets are.
        parameters: The parameters that the Jacobian is of, in words.
        n: Number of samples.
        n_distinct: Number of distinct inputs among them.
        units: Number of outputs, `C`.
        n_rows: Rows of the Jacobian, `n * C`.
        n_parameters: Columns of the Jacobian, `P`.
        dtype: The dtype in which the Jacobian was computed. Everything that was done
            with it is in float64.
        route: `"dense"`, `"gram"` or `"lsqr"`.
        reason: Why that route.
        memory: Bytes that the route needed beside the model and the data, estimated
            before they were taken.
        iterations: Steps of LSQR.
        converged: Whether nothing above the rank tolerance is left to take off the
            residual, or it is below the tolerance.
        seconds: Wall time.
    """

    residual: float
    aligned: bool
    decided: bool
    lower_bound: float
    residuals: tuple[float, ...]
    tolerance: float
    rank: int | None
    full_row_rank: bool | None
    sigma_max: float
    sigma_min: float | None
    rank_tolerance: float
    optimality: float
    loss: str
    parameters: str
    n: int
    n_distinct: int
    units: int
    n_rows: int
    n_parameters: int
    dtype: str
    route: Method
    reason: str
    memory: int
    iterations: int
    converged: bool
    seconds: float

    @property
    def condition(self) -> float | None:
        """`sigma_max / sigma_min`; None for rank 0, and if the route cannot tell."""
        return self.sigma_max / self.sigma_min if self.sigma_min else None

    @property
    def worst_output(self) -> int:
        """The output with the largest residual of its own."""
        return int(np.argmax(self.residuals))

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict that `json.dumps` accepts."""
        fields = dataclasses.asdict(self)
        fields["residuals"] = list(self.residuals)
        fields["condition"] = self.condition
        fields["worst_output"] = self.worst_output
        return fields

    def __str__(self) -> str:
        """The verdict, what it rests on, and how it was found."""
        return f"{self._verdict()} {self._spectrum()} {self._how()}"

    def _repr_html_(self) -> str:
        sigma_min = "not known" if self.sigma_min is None else f"{self.sigma_min:.3g}"
        rows = {
            "alignment": f"<b>{html.escape(self._verdict())}</b>",
            "residual": f"{self.residual:.3g}",
            "residual, at least": f"{self.lower_bound:.3g}",
            "rank": "not known" if self.rank is None else f"{self.rank}",
            "rows": f"{self.n_rows} = {self.n} samples x {self.units} outputs",
            "parameters": f"{self.n_parameters} ({html.escape(self.parameters)})",
            "sigma_min, sigma_max": f"{sigma_min}, {self.sigma_max:.3g}",
            "rank tolerance": f"{self.rank_tolerance:.2g}",
            "dtype": html.escape(self.dtype),
            "route": f"{self.route}: {html.escape(self.reason)}",
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{text}</td></tr>"
            for name, text in rows.items()
        )
        return f"<table>{cells}</table>"

    def _verdict(self) -> str:
        share = (
            "of the modified targets lies outside the column space of the Jacobian "
            f"(tolerance {self.tolerance:.2g})"
        )
        if self.aligned:
            return f"Aligned: a share of at most {self.residual:.2g} {share}."
        worst = self.worst_output
        repeats = (
            " Identical inputs with different targets alone leave "
            f"{self.lower_bound:.3g}."
            if self.lower_bound
            else ""
        )
        if not self.decided:
            return (
                f"Undecided: a share of at most {self.residual:.3g} {share}, but LSQR "
                f"had not converged after {self.iterations} steps.{repeats}"
            )
        return (
            f"Not aligned: a share of {self.residual:.3g} {share}; output {worst} is "
            f"worst, with {self.residuals[worst]:.3g} of its own.{repeats}"
        )

    def _spectrum(self) -> str:
        distinct = "" if self.n_distinct == self.n else f", {self.n_distinct} distinct"
        size = (
            f"The Jacobian in {self.parameters} has {self.n_rows} rows ({self.n} "
            f"samples{distinct}, {self.units} outputs) and {self.n_parameters} columns"
        )
        if self.rank is None:
            used = (
                ""
                if self.aligned
                else f"; directions well above {self.optimality:.2g} * sigma_max are "
                "used up"
            )
            return (
                f"{size}; sigma_max is at least {self.sigma_max:.3g}{used} "
                f"({self.dtype})."
            )
        full = ", full row rank: any labels are aligned" if self.full_row_rank else ""
        return (
            f"{size}, rank {self.rank}{full}; sigma_min {self.sigma_min:.3g}, "
            f"sigma_max {self.sigma_max:.3g}, singular values up to "
            f"{self.rank_tolerance:.2g} * sigma_max counted as zero ({self.dtype})."
        )

    def _how(self) -> str:
        return (
            f"Route: {_WORDS[self.route]}, as {self.reason}; {_size(self.memory)}, "
            f"{self.seconds:.3g} s."
        )


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
    """Measures how much of the modified targets the Jacobian's columns leave out.

    The Jacobian is taken in inference mode and in float64, whatever dtype trained (the
    report says if the model could not be rebuilt in it). What has structure is not
    formed: the last layer's Jacobian is `phi (x) I_C`, with `phi` its inputs beside a
    column of ones, and the head's falls into one block an output.

    Routes, the most exact first:

    - `"dense"`: a triangular factor of `J` (of `phi`; of each block) and its singular
      values. A wide matrix is formed for it, a tall one read in blocks of rows.
    - `"gram"`: the eigenvalues of `J J^T`, which needs no more of `J` at a time than
      fits. They are squares: singular values below some `sqrt(nC * eps) * sigma_max`
      are not seen.
    - `"lsqr"`: products with `J` alone, a row and a column of memory a step (as long as
      they fit; it goes on without), no rank. Its residual falls from step to step and
      is an upper bound wherever it ends. The output layer's part, where it is among the
      parameters, is solved for exactly at every step.

    `"auto"` takes the first that fits `max_memory` and 5e12 flop, a minute or two on
    two cores. The memory that a route needs goes to the logger `keras_dalign` before it
    is taken.

    Args:
        model: Any Keras model with one output, of logits (or of predictions, for
            squared error), shape `(n, C)`, with or without an alignment head.
        x: Inputs: arrays, or a stream that can be read several times, alike each time.
        y: Targets, for arrays. Sample weights in a stream are ignored: the condition
            has none.
        parameters: `"head"` (`q` and `b` of an alignment head that exploits), `"last"`
            (the output layer), `"all"`, or a list of variables. Default: `"head"` where
            there is one that exploits, else `"last"`.
        loss: A loss as in `keras.Model.compile`, if not the one that the model was
            compiled with.
        tolerance: The residual up to which the condition holds.
        method: `"auto"`, `"dense"`, `"gram"` or `"lsqr"`.
        rank_tolerance: Singular values up to this one, relative to the largest, count
            as zero. Default: what rounding may make of a zero, `max(nC, P) * eps` for
            `"dense"` and the square root of it for the others.
        max_memory: Bytes that may be taken; default: half of what is free.
        max_iterations: Most steps of LSQR, for each output where they are separate.
            Each step goes over the data twice.
        batch_size: Samples per product, for arrays.

    Returns:
        The report.

    Raises:
        ValueError: If an argument is out of range, the loss is not convex or not given,
            the targets do not fit it, anything is not finite, the model is stochastic,
            or a stream changed between two passes.
        MemoryError: If the method asked for needs more than `max_memory`.

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
    record, labels, samples = _read(x, y, batch_size)
    named = parameters if isinstance(parameters, str) else list(parameters)
    J = jacobian(model, x, named, batch_size=batch_size)
    if record.n != J.n:
        raise ValueError(
            "The data changed in size between two passes: every pass must give the "
            f"same samples. Received: {record.n} samples, then {J.n}"
        )
    eps = float(np.finfo(J.dtype).eps)
    _check_precision(tolerance, rank_tolerance, eps, J.dtype)
    targets = convex.aligned_targets(convex.targets(labels, J.units))
    largest = float(np.abs(targets).max())
    # The residual does not change with the scale; squares of the targets may overflow.
    scaled = targets / largest if largest else targets
    systems = _systems(J, scaled)
    plan = _plan(systems, method, rank_tolerance, eps, max_memory, max_iterations)
    _log.info(
        "check_alignment: %s, as %s; it needs %s.",
        _WORDS[plan.route],
        plan.reason,
        _size(plan.memory),
    )
    known = None
    if plan.route == "lsqr" and J.kind == "generic":
        known = _last_layer(model, x, J, batch_size, plan, max_memory)
    projections = [
        _project(system, plan, tolerance, max_iterations, known) for system in systems
    ]
    if not data.is_arrays(x):
        record.check_same(_read(x, None, batch_size)[0])
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


@dataclasses.dataclass(frozen=True)
class _System:
    """One least-squares problem of those that the Jacobian falls into.

    Attributes:
        operator: Its matrix, `(rows, columns)`.
        targets: `(rows, k)`.
        gram_flops: Multiply-adds for its Gram matrix.
        unit: Rows that are formed together for the Gram matrix, at least; 0 if none
            are.
    """

    operator: Operator
    targets: Array
    gram_flops: float
    unit: int


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The route, why, the bytes it takes, and its settings."""

    route: Method
    reason: str
    memory: int
    cut: float
    eps: float
    lot: int
    held: int


class _HeadOperator(Operator):
    """One output's block of the head's Jacobian, `[Phi_c, 1]`."""

    def __init__(self, problem: ConvexProblem, output: int) -> None:
        n, d, width = problem.n, problem.d, problem.width
        super().__init__((n, d * width + 1))
        one = slice(output, output + 1)
        self._problem = ConvexProblem(
            problem.features,
            problem.r[:, one],
            problem.w[one],
            problem.slope,
            np.zeros((n, 1)),
            np.zeros((n, 1)),
            None,
            problem.loss,
        )

    def matvec(self, vector: Array) -> Array:
        """The product with a vector; see `Operator`."""
        return self._problem.product(vector)[:, 0]

    def rmatvec(self, vector: Array) -> Array:
        """The transpose's product with a vector; see `Operator`."""
        return self._problem.transposed_product(vector[:, None])

    def blocks(self, size: int) -> Iterator[tuple[slice, Array]]:
        """All rows, a block at a time; see `Operator`."""
        problem = self._problem
        for start in range(0, problem.n, size):
            features = problem.features[start : start + size]
            gates = gate_activations(features, problem.r[:, 0], problem.slope)
            gates *= problem.w[0]
            rows = np.empty((len(features), self.shape[1]))
            for j in range(problem.d):
                columns = slice(j * problem.width, (j + 1) * problem.width)
                np.multiply(features[:, j : j + 1], gates, out=rows[:, columns])
            rows[:, -1] = 1.0
            yield slice(start, start + len(rows)), rows

    def gram(self, lot: int) -> Array:  # noqa: ARG002
        """The Gram matrix, whose features need not be formed; see `Operator`."""
        return self._problem.gram(0)


class _JacobianOperator(Operator):
    """The Jacobian without structure, through its products."""

    def __init__(self, J: Jacobian) -> None:
        super().__init__(J.shape)
        self._jacobian = J

    def matvec(self, vector: Array) -> Array:
        """The product with a vector; see `Operator`."""
        return _finite(self._jacobian.matvec(vector))

    def rmatvec(self, vector: Array) -> Array:
        """The transpose's product with a vector; see `Operator`."""
        return _finite(self._jacobian.rmatvec(vector))

    def blocks(self, size: int) -> Iterator[tuple[slice, Array]]:
        """All rows, a block at a time; see `Operator`."""
        for here, rows in self._jacobian.row_blocks(8 * size * self.shape[1]):
            yield here, _finite(rows)


def _systems(J: Jacobian, targets: Array) -> list[_System]:
    structured: Any = J
    if J.kind == "last":
        features = structured.features
        n, columns = features.shape
        operator = DenseOperator(_finite(features))
        return [_System(operator, targets, float(n) * n * columns, 0)]
    if J.kind == "head":
        problem = structured.problem
        flops = float(problem.n) ** 2 * (problem.d + problem.width)
        return [
            _System(_HeadOperator(problem, c), targets[:, c : c + 1], flops, 0)
            for c in range(J.units)
        ]
    rows, columns = J.shape
    column = targets.reshape(-1, 1)
    flops = float(rows) * rows * columns
    return [_System(_JacobianOperator(J), column, flops, J.units)]


def _plan(
    systems: list[_System],
    method: str,
    rank_tolerance: float | None,
    eps: float,
    max_memory: int | None,
    max_iterations: int,
) -> _Plan:
    """Chooses the route, before anything large is allocated."""
    system = systems[0]
    shape = system.operator.shape
    allowed = _allowed(max_memory)
    flops = {
        "dense": len(systems) * _factor_flops(shape),
        "gram": len(systems) * (2 * system.gram_flops + 9.0 * shape[0] ** 3),
    }
    lot = _lot(system, allowed)
    few = 64 * sum(shape)
    room = (allowed - few) / (8 * sum(shape))
    held = int(min(max(room, 0), max_iterations, *shape))
    memory = {
        "dense": _factor_bytes(shape, system.targets.shape[1]),
        "gram": 8 * (5 * shape[0] ** 2 + (2 * lot * shape[1] if system.unit else 0)),
        "lsqr": few + 8 * held * sum(shape),
    }
    square_root = max(gram_cut(shape), factor_cut(shape, eps))
    cuts = {
        "dense": factor_cut(shape, eps),
        "gram": square_root,
        "lsqr": square_root,
    }
    blind = rank_tolerance is not None and rank_tolerance < gram_cut(shape)

    def made(route: Method, reason: str) -> _Plan:
        cut = cuts[route] if rank_tolerance is None else rank_tolerance
        return _Plan(route, reason, memory[route], cut, eps, lot, held)

    if method != "auto":
        route: Method = method  # type: ignore[assignment]
        if route == "gram" and blind:
            raise ValueError(
                "A Gram matrix does not show singular values that small: use "
                '`method="dense"` or `"lsqr"`, or a `rank_tolerance` of at least '
                f"{gram_cut(shape):.2g}. Received: rank_tolerance={rank_tolerance}"
            )
        if memory[route] > allowed:
            raise MemoryError(
                f"method={method!r} needs {_size(memory[route])} for a matrix of "
                f"{shape[0]} x {shape[1]}, and {_size(allowed)} are allowed. Use "
                '`method="auto"`, fewer samples, or more `max_memory`.'
            )
        return made(route, f"method={method!r} was asked for")
    why = []
    for name, route in (("a factor of J", "dense"), ("its Gram matrix", "gram")):
        if route == "gram" and blind:
            why.append("its Gram matrix does not show the rank tolerance")
        elif memory[route] > allowed:
            why.append(
                f"{name} would take {_size(memory[route])} of the {_size(allowed)} "
                "allowed"
            )
        elif flops[route] > _FLOP_BUDGET:
            why.append(f"{name} would take {flops[route]:.2g} flop")
        else:
            why.append(f"it fits: {flops[route]:.2g} flop")
            return made(route, "; ".join(why))
    return made("lsqr", "; ".join(why))


def _allowed(max_memory: int | None) -> float:
    if max_memory is not None:
        return max_memory
    free = _free_gib()
    # Half of what is free: the model and the data need room, too.
    return math.inf if free is None else free * 2**29


def _lot(system: _System, allowed: float) -> int:
    """Rows formed at a time: as many as fit beside the Gram matrix, in two lots."""
    rows, columns = system.operator.shape
    if not system.unit:
        return rows
    room = (allowed - 40.0 * rows**2) / (16.0 * columns)
    lots = min(max(room, 0.0), rows) // system.unit
    return max(int(lots), 1) * system.unit


def _factor_flops(shape: tuple[int, int]) -> float:
    side = min(shape)
    return 3.0 * shape[0] * shape[1] * side + 25.0 * side**3


def _factor_bytes(shape: tuple[int, int], k: int) -> int:
    rows, columns = shape
    side = min(shape)
    if rows <= columns:
        forming = 3 * min(rows, 256) * columns
        return 8 * (rows * columns + forming + 5 * side**2 + 6 * columns * k)
    # Blocks of twice the side, formed, joined to the factor and factored.
    block = max(2 * columns, 256)
    return 8 * ((4 * block + 6 * columns) * (columns + k) + 3 * rows * k)


def _project(
    system: _System,
    plan: _Plan,
    tolerance: float,
    max_iterations: int,
    known: _Known | None,
) -> Projection:
    operator, targets = system.operator, system.targets
    if plan.route == "dense":
        return by_factor(operator, targets, plan.cut, plan.eps)
    if plan.route == "gram":
        return by_gram(operator, targets, plan.cut, tolerance, plan.lot, plan.eps)
    products: Products = operator
    scale = 1.0
    if known is not None:
        products = deflated = _Deflated(operator, known.basis)
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


@dataclasses.dataclass(frozen=True)
class _Known:
    """Columns of the Jacobian of the form `phi (x) I_C`.

    Attributes:
        basis: Orthonormal basis of the columns of `phi`, `(n, r)`.
        sigma_max: Largest singular value of `phi`.
    """

    basis: Array
    sigma_max: float


class _Deflated(Products):
    """`(I - Q Q^T) J`, with an orthonormal basis `Q (x) I_C` of some columns of `J`.

    The least squares in it are those in `J`, solved in these columns exactly.
    """

    def __init__(self, products: Products, basis: Array) -> None:
        super().__init__(products.shape)
        self._products = products
        self._basis = basis

    def outside(self, vector: Array) -> Array:
        """What a vector `(rows,)` has outside the basis; shape `(rows,)`."""
        matrix = vector.reshape(len(self._basis), -1)
        return (matrix - self._basis @ (self._basis.T @ matrix)).ravel()

    def matvec(self, vector: Array) -> Array:
        """The product with a vector; see `Products`."""
        return self.outside(self._products.matvec(vector))

    def rmatvec(self, vector: Array) -> Array:
        """The transpose's product with a vector; see `Products`."""
        return self._products.rmatvec(self.outside(vector))


def _last_layer(
    model: keras.Model,
    x: Any,
    J: Jacobian,
    batch_size: int,
    plan: _Plan,
    max_memory: int | None,
) -> _Known | None:
    """The output layer's columns, if they are among those of `J` and there is room."""
    try:
        last: Any = jacobian(model, x, "last", batch_size=batch_size)
    except (MemoryError, ValueError):
        return None
    own = {id(variable) for variable in J.variables}
    if last.kind != "last" or not own.issuperset(id(v) for v in last.variables):
        return None
    features = last.features
    if plan.memory + 4 * features.nbytes > _allowed(max_memory):
        return None
    left, values, _ = scipy.linalg.svd(
        _finite(features), full_matrices=False, check_finite=False
    )
    kept = values > factor_cut(features.shape) * values[0]
    return _Known(left[:, kept], float(values[0]))


class _Progress:
    """Tells the log, now and then, how far a long run of LSQR is."""

    def __init__(self) -> None:
        self._told = time.perf_counter()

    def __call__(self, steps: int) -> None:
        now = time.perf_counter()
        if now - self._told >= _LOG_SECONDS:
            self._told = now
            _log.info("check_alignment: %d steps of LSQR.", steps)


def _report(
    J: Jacobian,
    projections: list[Projection],
    targets: Array,
    samples: list[bytes],
    plan: _Plan,
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
    # A `beta` of 0 attains 1.
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
    """The share of the targets beside the means of their groups."""
    norm = float(np.linalg.norm(targets))
    if n_groups == len(targets) or not norm:
        return 0.0
    sums = np.zeros((n_groups, targets.shape[1]))
    np.add.at(sums, groups, targets)
    means = sums / np.bincount(groups, minlength=n_groups)[:, None]
    spread = float(np.linalg.norm(targets - means[groups])) / norm
    # Of equal targets, rounding alone may be left.
    return spread if spread > len(targets) * EPS else 0.0


def _read(
    x: Any, y: Any, batch_size: int
) -> tuple[PassRecord, np.ndarray, list[bytes]]:
    """One pass over the data: its record, the labels, a digest of each input."""
    if isinstance(x, Iterator):
        raise ValueError(
            "The data must be read several times, which a generator does not allow: "
            "pass arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or a torch "
            f"`DataLoader`. Received: x of type {type(x).__name__}"
        )
    record, labels, samples = PassRecord(), [], []
    for inputs, targets, _ in data.batches(x, y, batch_size=batch_size):
        found = digests(inputs)
        if targets is not None:
            labels.append(single_array(targets, "y"))
        else:
            raise ValueError(
                "Targets are needed: pass `y`, or a stream of (x, y) batches. "
                "Received: y=None"
            )
        record.add(found, *labels[-1:])
        samples += found
    return record, np.concatenate(labels), samples


def _finite(array: Array) -> Array:
    if not np.isfinite(array).all():
        raise ValueError(
            "The Jacobian must be finite: the model has probably diverged, or is not "
            "differentiable at these inputs. Received: NaN or infinite derivatives"
        )
    return array


def _check_arguments(
    method: str,
    tolerance: float,
    rank_tolerance: float | None,
    max_memory: int | None,
    max_iterations: int,
) -> None:
    if method not in _METHODS:
        raise ValueError(f"`method` must be one of {_METHODS}. Received: {method!r}")
    if not 0 < tolerance < 1:
        raise ValueError(
            f"`tolerance` must be between 0 and 1. Received: tolerance={tolerance}"
        )
    if rank_tolerance is not None and not 0 < rank_tolerance < 1:
        raise ValueError(
            "`rank_tolerance` must be between 0 and 1. "
            f"Received: rank_tolerance={rank_tolerance}"
        )
    for name, value in (
        ("max_memory", max_memory),
        ("max_iterations", max_iterations),
    ):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}")


def _check_precision(
    tolerance: float, rank_tolerance: float | None, eps: float, dtype: str
) -> None:
    for name, value in (("tolerance", tolerance), ("rank_tolerance", rank_tolerance)):
        if value is not None and value < eps:
            raise ValueError(
                f"`{name}` is below machine precision, {eps:.2g} for a Jacobian in "
                f"{dtype}: nothing that small can be told from rounding. "
                f"Received: {name}={value}"
            )


def _size(n_bytes: float) -> str:
    unit, scale = ("GiB", 2**30) if n_bytes >= 2**30 else ("MiB", 2**20)
    return f"{n_bytes / scale:.3g} {unit}"
