"""Stage 1: load, split and check a data set, and write it as arrays.

Writes `data/NAME.npz` (see `datasets.Dataset`) and `data/NAME.json` (counts, shapes,
class balance, hash).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines import datasets, files
from pipelines.layout import Layout
from pipelines.params import Params, load, parser, pick


def main(dataset: str, *, params: Params | None = None, root: Path = Path()) -> Path:
    """Prepares a data set.

    Args:
        dataset: Its name, in `datasets.LOADERS` and under `prepare` in the parameters.
        params: The parameters; those of params.yaml by default.
        root: The folder of all files.

    Returns:
        The path of the arrays.
    """
    params, layout = params or load(), Layout(root)
    wanted = pick("data set (under `prepare`)", params.prepare, dataset)
    data = pick("data set", datasets.LOADERS, dataset)(wanted)
    datasets.check(data, wanted)
    files.write_arrays(layout.arrays(dataset), data.arrays())
    files.write_json(layout.description(dataset), datasets.describe(data))
    return layout.arrays(dataset)


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__, "dataset").parse_args(arguments)
    main(line.dataset, params=load(line.params), root=line.root)


if __name__ == "__main__":
    cli()
