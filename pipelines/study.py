"""Runs one study of `pipelines/studies`."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines import closure, files, provenance
from pipelines.layout import Layout
from pipelines.params import pick
from pipelines.studies.settings import FILE, Studies, load


def main(name: str, *, studies: Studies | None = None, root: Path = Path()) -> Path:
    """Runs a study and writes its rows.

    The rows of each cell are kept until all are computed. A killed study continues with
    the missing cells, unless its code or settings have changed.

    Args:
        name: Name of the study: a package of `pipelines.studies`, whose settings are
            among those of the studies.
        studies: The settings; those of `profiles/studies/params.yaml` by default.
        root: The folder of all files.

    Returns:
        The path of the rows.
    """
    layout = Layout(root)
    settings = pick("study", studies or load(), name)
    study = importlib.import_module(f"pipelines.studies.{name}")
    code = closure.digests(closure.on_disk(), [["study", name]])
    rows = []
    for cell in study.cells(settings):
        kept = layout.study_cells(name) / f"{_digest(code, settings, cell)}.json"
        if not kept.is_file():
            files.write_json(kept, {"rows": study.measure(settings, cell)})
        rows += files.read_json(kept, "rows")["rows"]
    record = {
        "settings": settings,
        "rows": rows,
        "provenance": provenance.environment(),
    }
    files.write_json(layout.study(name), record)
    shutil.rmtree(layout.study_cells(name), ignore_errors=True)
    return layout.study(name)


def _digest(*values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
