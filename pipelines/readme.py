"""Writes overviews and claims into README.md and docs/, between markers.

What the reports say of the code is brought up to date on the way, without running
anything: so it is the command after every change of the code.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from pipelines import files, report, study_report
from pipelines.layout import ROOT, Layout
from pipelines.params import load
from pipelines.studies import claims, settings

# Where the results of a profile are, from the repository's root.
PROFILES = {
    "quick": Path(),
    "cpu": Path("profiles", "cpu"),
    "whole": Path("profiles", "whole"),
    "semeion": Path("profiles", "semeion"),
    "letter": Path("profiles", "letter"),
    "studies": Path("profiles", "studies"),
}


def main(*, root: Path = ROOT) -> list[Path]:
    """Writes the reports and README.md anew, with the numbers that there are.

    Args:
        root: The repository's root.

    Returns:
        The paths of README.md and of the pages in docs/.
    """
    for name, folder in PROFILES.items():
        layout, params = Layout(root / folder), root / folder / "params.yaml"
        if not layout.overview.is_file():
            continue
        if name == "studies":
            study_report.write_overview(settings.load(params), layout)
        else:
            report.write_texts(load(params), layout)
    paths = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    for path in paths:
        files.write_text(path, filled(path.read_text(encoding="utf-8"), root=root))
    return paths


def filled(text: str, *, root: Path = ROOT) -> str:
    """The text with overviews and claims between the markers.

    Only what the markers in the text name is looked at.

    Args:
        text: Markdown with `<!-- table PROFILE -->` and `<!-- /table PROFILE -->`, or
            `<!-- claims STUDY -->` and `<!-- /claims STUDY -->`, each on a line of its
            own.
        root: The repository's root.

    Returns:
        The text with what lies between the markers replaced.

    Raises:
        FileNotFoundError: If a profile has no report.
        ValueError: If a marker is there twice or without its partner, or names no
            profile or study.
    """
    for kind, name in sorted(set(re.findall(r"<!-- /?(table|claims) (\S+) -->", text))):
        begin, end = f"<!-- {kind} {name} -->", f"<!-- /{kind} {name} -->"
        if (
            text.count(begin) != 1
            or text.count(end) != 1
            or end in text.split(begin, maxsplit=1)[0]
        ):
            raise ValueError(
                f"A table needs one {begin} and one {end} after it. Received: "
                f"{text.count(begin)} and {text.count(end)} of them, in this order or "
                "the other."
            )
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        content = _overview(name, root) if kind == "table" else _claims(name, root)
        text = f"{before}{begin}\n{content}{end}{after}"
    return text


def _overview(name: str, root: Path) -> str:
    if name not in PROFILES:
        raise ValueError(
            f"There is no such profile. Received: the marker <!-- table {name} -->; "
            f"there are {', '.join(PROFILES)}"
        )
    path = Layout(root / PROFILES[name]).overview
    if not path.is_file():
        raise FileNotFoundError(
            f"The profile {name} has no report yet: {path} is missing. Run its stage "
            "`report` or `study_report`, or take its markers out of README.md."
        )
    return path.read_text(encoding="utf-8")


def _claims(name: str, root: Path) -> str:
    folder = root / PROFILES["studies"]
    studies = settings.load(folder / "params.yaml")
    if name not in studies:
        raise ValueError(
            f"There is no such study. Received: the marker <!-- claims {name} -->; "
            f"there are {', '.join(studies)}"
        )
    path = Layout(folder).study_metrics
    metrics = files.read_json(path) if path.is_file() else {}
    if name not in metrics:
        return "Not run yet.\n"
    return claims.table(metrics[name].values())


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    line.add_argument("--root", type=Path, default=ROOT, help="the folder of README.md")
    for path in main(root=line.parse_args(arguments).root):
        print(path)


if __name__ == "__main__":
    cli()
