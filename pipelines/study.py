"""One study of the mechanism; `pipelines/studies` has them."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from pipelines import files, provenance
from pipelines.layout import Layout
from pipelines.params import pick
from pipelines.studies.settings import FILE, Studies, load


def main(name: str, *, studies: Studies | None = None, root: Path = Path()) -> Path:
    """Runs a study and writes its rows.

    Args:
        name: Name of the study: a module of `pipelines.studies`, whose settings are
            among those of the studies.
        studies: The settings; those of `profiles/studies/params.yaml` by default.
        root: The folder of all files.

    Returns:
        The path of the rows.
    """
    layout = Layout(root)
    settings = pick("study", studies or load(), name)
    study = importlib.import_module(f"pipelines.studies.{name}")
    rows = study.run(settings)
    record = {
        "settings": settings,
        "rows": rows,
        "provenance": provenance.environment(),
    }
    files.write_json(layout.study(name), record)
    return layout.study(name)


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    line.add_argument("--study", required=True)
    line.add_argument("--root", type=Path, default=Path(), help="folder of results")
    line.add_argument("--params", type=Path, default=FILE)
    given = line.parse_args(arguments)
    main(given.study, studies=load(given.params), root=given.root)


if __name__ == "__main__":
    cli()
