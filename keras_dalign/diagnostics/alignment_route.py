"""Chooses how alignment is computed: the most exact way that fits memory and time."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

from keras_dalign.numerics.column_space import factor_cut, gram_cut
from keras_dalign.numerics.memory import free_gib

if TYPE_CHECKING:
    from keras_dalign.diagnostics.alignment_systems import System

Method = Literal["dense", "gram", "lsqr"]

METHODS = ("auto", "dense", "gram", "lsqr")
WORDS = {
    "dense": "triangular factor of J and its singular values",
    "gram": "eigenvalues of the Gram matrix J J^T",
    "lsqr": "LSQR on products with J",
}

_NAMES: dict[Method, str] = {"dense": "a factor of J", "gram": "its Gram matrix"}

# The most exact route is the first choice if it takes seconds, or at most so many times
# the flop of the next one.
_QUICK_FLOPS = 1e11
_FLOP_RATIO = 4.0
# The most flop of a decomposition by "auto": a minute or two on two cores.
_FLOP_BUDGET = 5e12


@dataclasses.dataclass(frozen=True)
class Plan:
    """The route and its settings.

    Attributes:
        route: `"dense"`, `"gram"` or `"lsqr"`.
        reason: Why this route.
        memory: Bytes that it needs.
        cut: Singular values up to this one, relative to the largest, count as zero.
        eps: Machine precision of the Jacobian.
        lot: Rows that are formed at a time for a Gram matrix.
        held: Vectors of each kind that LSQR keeps.
    """

    route: Method
    reason: str
    memory: int
    cut: float
    eps: float
    lot: int
    held: int


def plan_route(
    systems: list[System],
    method: str,
    rank_tolerance: float | None,
    eps: float,
    max_memory: int | None,
    max_iterations: int,
    *,
    gram_singular: bool = False,
) -> Plan:
    """Chooses the route, before anything large is allocated.

    Args:
        systems: The least-squares problems, all of one shape.
        method: The requested route, or `"auto"`.
        rank_tolerance: The requested tolerance, or None for the default.
        eps: Machine precision of the Jacobian.
        max_memory: The most bytes to allocate, or None for half of the free memory.
        max_iterations: The most steps of LSQR.
        gram_singular: Whether a Gram matrix was found to be singular. Small singular
            values, too, make it so.

    Returns:
        The route and its settings.

    Raises:
        ValueError: If the requested method cannot resolve the rank tolerance.
        MemoryError: If it needs more memory than is allowed.
    """
    system = systems[0]
    shape = system.operator.shape
    allowed = allowed_memory(max_memory)
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
    too_coarse = rank_tolerance is not None and rank_tolerance < gram_cut(shape)

    def made(route: Method, reason: str) -> Plan:
        cut = cuts[route] if rank_tolerance is None else rank_tolerance
        return Plan(route, reason, memory[route], cut, eps, lot, held)

    if method != "auto":
        route: Method = method  # type: ignore[assignment]
        if route == "gram" and too_coarse:
            raise ValueError(
                "A Gram matrix does not show singular values that small: use "
                '`method="dense"` or `"lsqr"`, or a `rank_tolerance` of at least '
                f"{gram_cut(shape):.2g}. Received: rank_tolerance={rank_tolerance}"
            )
        if memory[route] > allowed:
            raise MemoryError(
                f"method={method!r} needs {size_text(memory[route])} for a matrix of "
                f"{shape[0]} x {shape[1]}, and {size_text(allowed)} are allowed. Use "
                '`method="auto"`, fewer samples, or more `max_memory`.'
            )
        return made(route, f"method={method!r} was requested")
    why = []
    cheaper = flops["dense"] > max(_QUICK_FLOPS, _FLOP_RATIO * flops["gram"])
    order: tuple[Method, ...] = ("gram", "dense") if cheaper else ("dense", "gram")
    if gram_singular:
        order = ("dense",)
        why.append("the Gram matrix, which hides small singular values, is singular")
    for route in order:
        name = _NAMES[route]
        if route == "gram" and too_coarse:
            why.append(f"{name} does not show the rank tolerance")
        elif memory[route] > allowed:
            why.append(
                f"{name} would take {size_text(memory[route])} of the "
                f"{size_text(allowed)} allowed"
            )
        elif flops[route] > _FLOP_BUDGET:
            why.append(f"{name} would take {flops[route]:.2g} flop")
        else:
            why.append(f"it fits: {flops[route]:.2g} flop")
            return made(route, "; ".join(why))
    return made("lsqr", "; ".join(why))


def allowed_memory(max_memory: int | None) -> float:
    """The most bytes to allocate: `max_memory`, or half of the free memory."""
    if max_memory is not None:
        return max_memory
    free = free_gib()
    # Half of it, since the model and the data need memory, too.
    return math.inf if free is None else free * 2**29


def _lot(system: System, allowed: float) -> int:
    """Rows formed at a time, so that two lots of them and the Gram matrix fit."""
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


def size_text(n_bytes: float) -> str:
    """An amount of memory in MiB or GiB, for messages."""
    unit, scale = ("GiB", 2**30) if n_bytes >= 2**30 else ("MiB", 2**20)
    return f"{n_bytes / scale:.3g} {unit}"
