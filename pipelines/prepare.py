"""Stage 1: load, verify, split and check a data set, and write it as arrays.

Writes `data/NAME.npz` (uint8, see `datasets.Pixels`) and `data/NAME.json` (source,
title, counts, shapes, class balance, hash, versions). `--import-from FOLDER`, or the
variable KERAS_DALIGN_IMPORT, takes the data from files instead of a download.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipelines import datasets
from pipelines.datasets import imported
from pipelines.layout import Layout
from pipelines.params import Params, load, parser, pick


def main(
    dataset: str,
    *,
    params: Params | None = None,
    root: Path = Path(),
    import_from: Path | None = None,
    allow_unverified: bool = False,
) -> Path:
    """Prepares a data set.

    Args:
        dataset: Its name under `prepare` in the parameters. It is that of a data set in
            `datasets.KNOWN`, unless `source` names this.
        params: The parameters; those of params.yaml by default.
        root: The folder of all files.
        import_from: A folder of files to take instead of a download; by default the
            one that the variable KERAS_DALIGN_IMPORT names, if it is set.
        allow_unverified: Whether to take data of unknown content; titles say so.

    Returns:
        The path of the arrays.
    """
    params, layout = params or load(), Layout(root)
    wanted = pick("data set (under `prepare`)", params.prepare, dataset)
    source = wanted.source or dataset
    pick("data set", datasets.KNOWN, source)
    named = os.environ.get(imported.VARIABLE)
    if import_from is None and named:
        import_from = Path(named)
    path = layout.arrays(dataset)
    data, description = datasets.load(
        source,
        wanted,
        path.parent / "tfds",
        import_from=import_from,
        allow_unverified=allow_unverified,
    )
    datasets.write(layout, dataset, data, description)
    return path


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__, "dataset")
    line.add_argument(
        "--import-from",
        type=Path,
        metavar="FOLDER",
        help=f"take the data from this folder, which holds {imported.FORMAT}",
    )
    line.add_argument(
        "--allow-unverified",
        action="store_true",
        help="take data whose content is not known; tables will say so",
    )
    given = line.parse_args(arguments)
    main(
        given.dataset,
        params=load(given.params),
        root=given.root,
        import_from=given.import_from,
        allow_unverified=given.allow_unverified,
    )


if __name__ == "__main__":
    cli()
