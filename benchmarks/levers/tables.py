"""Tables and targets: the variants' differences to the default."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks import common
from benchmarks.cells import PARAMS, mean_and_error
from benchmarks.common import Target
from benchmarks.levers.variants import BASE_MODEL, DEFAULT, NONE, VARIANTS
from pipelines.params import Params, load

if TYPE_CHECKING:
    from benchmarks.levers.heads import Measured

ABOUT = (
    "Means over cells and seeds of the paired difference to the row `default`: test "
    "error in points, with the standard error over the pairs; ratio of the test NLL; "
    "expected calibration error (15 bins) in points; Brier score; ratios of the "
    "seconds, exploration included. Ratios are geometric means. The default: weights "
    "averaged over 0.1 of the steps, the centre at the origin, L2 weight and width "
    "chosen on training samples, images without augmentation, the recipe's schedule "
    "cut after 0.6 of the epochs. `no lever` takes the last weights, and the base's "
    "function as centre. Only augmented cells have rows with passes; if passes are "
    "stacked, L2 weight and width are chosen on the first one. The seconds do not "
    "include the weight averages. Steps are timed on the trunk of all samples; the "
    "other trunks are given the same time per step."
)
BY_CELL = "by cell: the default's value and the differences to it, seed means."


def pairs(
    cells: Sequence[Measured], name: str, other: str = DEFAULT
) -> Iterator[tuple[Measured, Measured]]:
    """The results of two variants, for each cell and seed that has both."""
    for cell in cells:
        if name in cell and other in cell:
            yield cell[name], cell[other]


def difference(cells: Sequence[Measured], name: str, key: str) -> tuple[float, float]:
    """Mean of a variant's value minus the default's, and its standard error."""
    return mean_and_error([a[key] - b[key] for a, b in pairs(cells, name)])


def ratio(
    cells: Sequence[Measured], name: str, key: str, other: str = DEFAULT
) -> float:
    """The geometric mean of a variant's value divided by another one's."""
    logs = [math.log(a[key] / b[key]) for a, b in pairs(cells, name, other)]
    return math.exp(fmean(logs))


def summary(cells: Sequence[Measured]) -> str:
    """One line for each variant: its mean difference to the default."""
    lines = []
    for name, variant in VARIANTS.items():
        count = len(list(pairs(cells, name)))
        if not count:
            continue
        error, spread = difference(cells, name, "error")
        lines.append(
            [
                variant.lever,
                name,
                f"{count}",
                f"{error:+.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}"),
                f"{ratio(cells, name, 'nll'):.3f}",
                f"{difference(cells, name, 'ece')[0]:+.2f}",
                f"{difference(cells, name, 'brier')[0]:+.4f}",
                f"{ratio(cells, name, 'seconds'):.2f}",
                f"{ratio(cells, name, 'seconds', BASE_MODEL):.2f}",
            ]
        )
    header = ["lever", "row", "pairs", "error, points", "NLL", "ECE", "Brier"]
    return common.table([*header, "time", "time / base"], lines)


def by_cell(cells: Sequence[Measured], key: str, digits: int) -> str:
    """Means over the seeds: the default's value, and the differences to it."""
    named: dict[str, list[Measured]] = {}
    for cell in cells:
        named.setdefault(cell_name(cell["data"], cell["augmentation"]), []).append(cell)
    lines = []
    for name in VARIANTS:
        line = [name]
        for of_cell in named.values():
            if name == DEFAULT:
                number = fmean(cell[DEFAULT][key] for cell in of_cell)
                line.append(f"{number:.{digits}f}")
            elif list(pairs(of_cell, name)):
                line.append(f"{difference(of_cell, name, key)[0]:+.{digits}f}")
            else:
                line.append("")
        if any(line[1:]):
            lines.append(line)
    return common.table(["row", *named], lines)


def missing(cells: Sequence[tuple[str, str]], seeds: int) -> str:
    """A sentence on the cells of the profile that were measured, and the others."""
    every = [cell_name(*cell) for cell in cells_of(load(PARAMS))]
    done = [cell_name(*cell) for cell in cells]
    text = f"Measured: {len(done)} of {len(every)} cells, seeds 0 to {seeds - 1}."
    left = [name for name in every if name not in done]
    return f"{text} Not measured: {', '.join(left)}." if left else text


def cells_of(params: Params) -> list[tuple[str, str]]:
    """Data sets and augmentations of a profile."""
    return list(itertools.product(params.grid.datasets, params.grid.augmentations))


def cell_name(data: str, augmentation: str) -> str:
    """The name of a cell, as `--cells` takes it."""
    return f"{data}-{augmentation}"


def targets_of(cells: Sequence[Measured]) -> list[Target]:
    """The figures that must be shown."""
    error, _ = difference(cells, NONE, "error")
    solved_rows = [name for name, variant in VARIANTS.items() if variant.solve]
    gaps = [cell[name]["gap"] for cell in cells for name in solved_rows if name in cell]
    targets = [
        Target("default: points of test error more than without levers", -error, 0.0),
        Target("largest gap of the regularised loss", max(gaps), 1e-6),
    ]
    for augmentation, bound in (("none", 0.75), ("standard", 0.85)):
        part = [cell for cell in cells if cell["augmentation"] == augmentation]
        if part:
            claim = f"default: time over the base's, augmentation {augmentation}"
            measured = ratio(part, DEFAULT, "seconds", BASE_MODEL)
            targets.append(Target(claim, measured, bound))
    return targets
