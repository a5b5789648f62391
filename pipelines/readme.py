"""Writes the overview of each profile into README.md, between its markers.

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
from pipelines.studies import settings

# Where the results of a profile are, from the repository's root.
PROFILES = {
    "quick": Path(),
    "cpu": Path("profiles", "cpu"),
    "whole": Path("profiles", "whole"),
    "semeion": Path("profiles", "semeion"),
    "letter": Path("profiles", "letter"),
    "studies": Path("profiles", "studies"),
}


def main(*, root: Path = ROOT) -> Path:
    """Writes the reports and README.md anew, with the numbers that there are.

    Args:
        root: The repository's root.

    Returns:
        The path of README.md.
    """
    for name, folder in PROFILES.items():
        layout, params = Layout(root / folder), root / folder / "params.yaml"
        if not layout.overview.is_file():
            continue
        if name == "studies":
            study_report.tell(settings.load(params), layout)
        else:
            report.tell(load(params), layout)
    path = root / "README.md"
    files.write_text(path, filled(path.read_text(encoding="utf-8"), root=root))
    return path


def filled(text: str, *, root: Path = ROOT) -> str:
    """The text with the overviews between the markers.

    Only the profiles whose markers are in the text are looked at.

    Args:
        text: Markdown with `<!-- table NAME -->` and `<!-- /table NAME -->`, each on a
            line of its own.
        root: The repository's root.

    Returns:
        The text with what lies between the markers replaced.

    Raises:
        FileNotFoundError: If a profile has no report.
        ValueError: If a marker is there twice or without its partner, or names no
            profile.
    """
    for name in sorted(set(re.findall(r"<!-- /?table (\S+) -->", text))):
        begin, end = f"<!-- table {name} -->", f"<!-- /table {name} -->"
        if name not in PROFILES:
            raise ValueError(
                f"There is no such profile. Received: the marker {begin}; there are "
                f"{', '.join(PROFILES)}"
            )
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
        text = f"{before}{begin}\n{_overview(name, root)}{end}{after}"
    return text


def _overview(name: str, root: Path) -> str:
    path = Layout(root / PROFILES[name]).overview
    if not path.is_file():
        raise FileNotFoundError(
            f"The profile {name} has no report yet: {path} is missing. Run its stage "
            "`report` or `study_report`, or take its markers out of README.md."
        )
    return path.read_text(encoding="utf-8")


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    line.add_argument("--root", type=Path, default=ROOT, help="the folder of README.md")
    print(main(root=line.parse_args(arguments).root))


if __name__ == "__main__":
    cli()
