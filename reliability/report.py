"""What a measurement returns, and the files and the page made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import common
from pipelines import files

if TYPE_CHECKING:
    from benchmarks.common import Target

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "reliability" / "results"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures reliability -->", "<!-- /figures reliability -->"


@dataclass(frozen=True)
class Report:
    """Figures beside their targets, and what they were made of.

    Attributes:
        title: Title of the Markdown file.
        body: Its paragraphs and tables: what was done, and everything that failed.
        targets: The figures and their targets.
        settings: Options and seeds that the measurement was made with.
        measurements: Single results, as `json.dumps` takes them.
    """

    title: str
    body: Sequence[str]
    targets: Sequence[Target]
    settings: Mapping[str, Any] = field(default_factory=dict)
    measurements: Any = None


def write(name: str, report: Report, folder: Path = RESULTS) -> None:
    """Writes `NAME.json` and `NAME.md`, and prints the latter."""
    common.write(
        folder,
        name,
        title=report.title,
        body=report.body,
        targets=report.targets,
        settings=report.settings,
        measurements=report.measurements,
    )


def table(folder: Path = RESULTS) -> str:
    """One row for each figure: what, measured, target, date, commit, machine."""
    rows = []
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        made = record["provenance"]
        for target in record["targets"]:
            sign = "≥" if target["at_least"] else "≤"
            link = f"../reliability/results/{file.stem}.md"
            rows.append(
                [
                    f"[{file.stem}]({link})",
                    target["claim"],
                    f"{target['measured']:.6g}",
                    f"{sign} {target['bound']:.6g}",
                    "met" if target["met"] else "**missed**",
                    made["date"],
                    made["code"],
                    made["device"],
                ]
            )
    header = ["", "what", "measured", "target", "", "date", "commit", "machine"]
    return common.table(header, rows) if rows else "Nothing measured yet."


def fill_page(page: Path = PAGE, folder: Path = RESULTS) -> None:
    """Writes the table into the page, between its markers.

    Raises:
        ValueError: If the page lacks the markers.
    """
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} needs one {BEGIN} and one {END}.")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    files.write_text(page, f"{before}{BEGIN}\n{table(folder)}\n{END}{after}")
