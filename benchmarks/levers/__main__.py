"""What each lever of the default is worth, alone and together, on the same trunks."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from benchmarks import common
from benchmarks.cells import PARAMS
from benchmarks.levers.measurement import measure
from benchmarks.levers.tables import (
    ABOUT,
    BY_CELL,
    by_cell,
    cell_name,
    cells_of,
    missing,
    summary,
    targets_of,
)
from benchmarks.levers.trunks import LEFT_OUT
from benchmarks.levers.variants import EXPLORE, VARIANTS
from pipelines.params import load


def _options(parser: argparse.ArgumentParser) -> None:
    names = [cell_name(*cell) for cell in cells_of(load(PARAMS))]
    common.add_data_folder(parser, "semeion", "mnist", "cifar10", "cifar100")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "keras-dalign-levers",
        help="folder for the data, the trunks and the rows",
    )
    parser.add_argument(
        "--cells", nargs="+", choices=names, default=names, metavar="CELL", help="cells"
    )


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, seeds=3, more=_options)
    common.warm_up()
    chosen = [
        cell for cell in cells_of(load(PARAMS)) if cell_name(*cell) in options.cells
    ]
    cells = measure(options, chosen)
    common.write(
        options.out,
        "levers",
        title="What each lever is worth",
        body=[
            missing(chosen, options.seeds),
            ABOUT,
            summary(cells),
            f"Test error, %, {BY_CELL}",
            by_cell(cells, "error", 2),
            f"Test NLL, {BY_CELL}",
            by_cell(cells, "nll", 3),
        ],
        targets=targets_of(cells),
        settings={
            "profile": "cpu",
            "explore": EXPLORE,
            "left out": LEFT_OUT,
            "variants": {k: dataclasses.asdict(v) for k, v in VARIANTS.items()},
        },
        measurements=cells,
    )


if __name__ == "__main__":
    main()
