"""Lines and branches of the package that the tests of the three backends run."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import Target, table
from reliability import backends
from reliability.report import Report

LINES, BRANCHES = 98.0, 95.0
# All of their lines are run.
WHOLE = ("numerics", "solving", "certification")
FOLDER = backends.ROOT / "build" / "coverage"
_PACKAGE = "keras_dalign"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--data", type=Path, default=FOLDER, help="folder of the backends' data files"
    )


def combined(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Adds up the data files of the backends; they are kept.

    Args:
        folder: Has `.coverage.BACKEND` of each backend.

    Returns:
        The backends, and the report of coverage as JSON.

    Raises:
        FileNotFoundError: If there are none.
    """
    # Of the group `coverage`, which other measurements do without.
    import coverage  # noqa: PLC0415

    found = {name: folder / f".coverage.{name}" for name in backends.MODULES}
    found = {name: path for name, path in found.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(
            f"There is no data file of a backend. Received: {folder}. Run `nox -s "
            "coverage` first."
        )
    with tempfile.TemporaryDirectory() as temporary:
        together = coverage.Coverage(
            data_file=str(Path(temporary, "data")),
            config_file=str(backends.ROOT / "pyproject.toml"),
        )
        together.combine([str(path) for path in found.values()], keep=True)
        out = Path(temporary, "report.json")
        together.json_report(outfile=str(out))
        record: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return list(found), record


def sums(record: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Counts by part of the package: a subpackage, or `keras_dalign` for its modules.

    Args:
        record: The report of coverage.

    Returns:
        `lines`, `lines_run`, `branches` and `branches_run` by part; all in `total`.
    """
    names = {
        "lines": "num_statements",
        "lines_run": "covered_lines",
        "branches": "num_branches",
        "branches_run": "covered_branches",
    }
    found: dict[str, dict[str, int]] = {}
    for path, each in record["files"].items():
        parts = Path(path).parts
        inner = parts[parts.index(_PACKAGE) + 1 :]
        for part in (inner[0] if len(inner) > 1 else _PACKAGE, "total"):
            counts = found.setdefault(part, dict.fromkeys(names, 0))
            for name, key in names.items():
                counts[name] += each["summary"][key]
    return found


def _percent(counts: Mapping[str, int], what: str) -> float:
    whole = counts[what]
    return 100.0 * counts[f"{what}_run"] / whole if whole else 100.0


def _spans(lines: list[int]) -> str:
    """Line numbers, with spans for those that follow each other."""
    spans: list[list[int]] = []
    for line in lines:
        if spans and line == spans[-1][1] + 1:
            spans[-1][1] = line
        else:
            spans.append([line, line])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def measure(options: argparse.Namespace) -> Report:
    """Adds up what the backends recorded.

    Args:
        options: See `add_options`.

    Returns:
        Shares of lines and branches, and the lines that nothing runs.
    """
    found, record = combined(options.data)
    counts = sums(record)
    rows = [
        [
            part,
            f"{each['lines_run']} of {each['lines']}",
            f"{_percent(each, 'lines'):.2f}",
            f"{each['branches_run']} of {each['branches']}",
            f"{_percent(each, 'branches'):.2f}",
        ]
        for part, each in sorted(counts.items())
    ]
    missing = {
        path: each["missing_lines"]
        for path, each in sorted(record["files"].items())
        if each["missing_lines"]
    }
    left = [[path, _spans(lines)] for path, lines in missing.items()]
    none = dict.fromkeys(("lines", "lines_run", "branches", "branches_run"), 0)
    total = counts.get("total", none)
    about = (
        f"The tests on {', '.join(found)} together, by `nox -s coverage` and "
        "`coverage combine`. A line that one backend runs counts as run."
    )
    return Report(
        title="Coverage",
        body=[
            about,
            table(["part", "lines", "%", "branches", "%"], rows),
            table(["file", "lines that nothing runs"], left)
            if left
            else "Nothing left.",
        ],
        targets=[
            Target("% of lines", _percent(total, "lines"), LINES, at_least=True),
            Target(
                "% of branches", _percent(total, "branches"), BRANCHES, at_least=True
            ),
            *(
                Target(
                    f"% of lines of {part}",
                    _percent(counts.get(part, none), "lines"),
                    100.0,
                    at_least=True,
                )
                for part in WHOLE
            ),
            Target("backends", len(found), 3, at_least=True),
        ],
        settings={"backends": found},
        measurements={"counts": counts, "missing": missing},
    )
