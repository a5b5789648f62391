"""Samples that a polynomial of degree 4 takes, with and without a white representation.

For a target of degree `p` in one direction of `d` inputs, a tangent kernel needs a
number of samples that grows like `d^p`. The quadratic Taylor model of a wide layer
needs `d^(p-1)` on the inputs themselves, and `d^(p/2)` on a fixed random layer whose
outputs are made white (Chen, Bai, Lee, Zhao, Wang, Xiong & Socher, "Towards
Understanding Hierarchical Learning: Benefits of Neural Representations", NeurIPS 2020;
Bai & Lee, "Beyond Linearization", ICLR 2020).

The quadratic model's training is not convex. How far each minimum is from the global
one is certified by `keras_dalign.certify`, which is not in these papers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import keras_dalign as kd
from pipelines.studies.representations import heads, representation
from pipelines.studies.representations.draws import Draw
from pipelines.studies.representations.expectations import claims
from pipelines.studies.representations.figure import draw
from pipelines.studies.representations.heads import (
    KERNEL,
    LINEAR,
    NEURAL,
    PAIRS,
    QUADRATIC,
    RAW,
    UNGATED,
)
from pipelines.studies.representations.settings import check
from pipelines.studies.representations.sizes import HALF
from pipelines.studies.representations.target import PLAIN

if TYPE_CHECKING:
    from pipelines.studies.sample import Row

__all__ = ["PANELS", "TITLE", "cells", "claims", "draw", "measure"]

TITLE = "Samples against dimension, with and without a representation"
PANELS = 3


def cells(settings: Mapping[str, Any]) -> list[Row]:
    """The cells of the study.

    Args:
        settings: `dimensions`; `smallest` and `largest` number of samples for each,
            with the ratio `step` between; `ratio` of the layer's units to polynomials
            of degree 2; sizes of the `validation` and `test` draws; `ridges`;
            `penalties` by input; `units` of the quadratic heads; `iterations` of
            L-BFGS; `certificate`: `d`, `n`, `widths` with gates and `ungated` ones,
            `penalty`, `iterations`; `limits`: `d` and two `sizes`; `seeds`.

    Returns:
        A cell for each seed, dimension, head and input; for each certificate; and for
        each limit.

    Raises:
        ValueError: If a key is missing or unknown, or a value is out of its range.
    """
    check(settings)
    found: list[Row] = []
    for seed in range(settings["seeds"]):
        found += [
            {"kind": "samples", "head": head, "input": inputs, "d": d, "seed": seed}
            for head, inputs in [*PAIRS, (LINEAR, RAW), (LINEAR, NEURAL)]
            for d in settings["dimensions"]
        ]
        found += [
            {"kind": "certificate", "head": head, "width": width, "seed": seed}
            for head, key in ((QUADRATIC, "widths"), (UNGATED, "ungated"))
            for width in settings["certificate"][key]
        ]
        found += [
            {"kind": "limit", "case": PLAIN, "head": head, "n": n, "seed": seed}
            for head in (KERNEL, QUADRATIC)
            for n in settings["limits"]["sizes"]
        ]
        n = max(settings["limits"]["sizes"])
        found += [
            {"kind": "limit", "case": "step units", "head": head, "n": n, "seed": seed}
            for head in (KERNEL, QUADRATIC)
        ]
    return found


def measure(settings: Mapping[str, Any], cell: Mapping[str, Any]) -> list[Row]:
    """Computes one cell.

    Args:
        settings: See `cells`.
        cell: One of `cells`.

    Returns:
        Of `samples`: a row for each number of samples, up to the first whose test error
        is below 1/2, with the `error` (mean squared, over the variance of the test
        targets) of the weight that was best on the validation draw. Of `certificate`:
        the `value` of the objective at the minimum that L-BFGS found, and the `gap`. Of
        `limit`: the `error`.
    """
    if cell["kind"] == "samples":
        return list(_samples(settings, cell))
    if cell["kind"] == "certificate":
        return [_certificate(settings, cell)]
    kinds = {
        PLAIN: {"target": PLAIN},
        "step units": {"units": representation.STEP},
    }[cell["case"]]
    draw = Draw(settings, settings["limits"]["d"], cell["seed"], **kinds)
    found = draw.errors(cell["head"], NEURAL, cell["n"])
    return [{**cell, "d": draw.d, "beyond": draw.beyond(), **found}]


def _samples(settings: Mapping[str, Any], cell: Mapping[str, Any]) -> Iterator[Row]:
    draw = Draw(settings, cell["d"], cell["seed"])
    place = settings["dimensions"].index(cell["d"])
    smallest, largest = settings["smallest"][place], settings["largest"][place]
    if cell["head"] == LINEAR:
        smallest = largest
    n = float(smallest)
    while round(n) <= largest:
        found = draw.errors(cell["head"], cell["input"], round(n))
        yield {**cell, "n": round(n), **found}
        if found["error"] < HALF:
            return
        n *= settings["step"]


def _certificate(settings: Mapping[str, Any], cell: Mapping[str, Any]) -> Row:
    given = settings["certificate"]
    draw = Draw(settings, given["d"], cell["seed"])
    x, y = draw.sample(given["n"])
    u = draw.inputs(x, NEURAL)
    gates = "one" if cell["head"] == UNGATED else "step"
    model = heads.quadratic_model(
        u.shape[1], cell["width"], gates, cell["seed"], given["penalty"]
    )
    kd.solve_quadratic(
        model, u, y, loss="mse", tol=1e-12, max_iterations=given["iterations"]
    )
    bound = kd.certify(model, u, y, loss="mse").quadratic_bound
    if bound is None:
        raise RuntimeError("The model has lost its quadratic head.")
    return {
        **cell,
        "value": bound.value,
        "gap": bound.gap,
        "rounding": bound.rounding,
        "relative": bound.gap / bound.value,
    }
