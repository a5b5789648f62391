"""Compares fresh results of a profile with the committed ones, method by method.

The runs are made again, by the code of the quickstart and into a separate folder, or
read from a folder that has them. Training differs in its last bits from machine to
machine, and then in everything. So the fresh mean is compared with the 95 % prediction
interval from the committed seeds, which one in twenty misses by chance.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines import quickstart, report
from pipelines.layout import ROOT, Layout
from pipelines.params import Grid, Params, load
from pipelines.readme import PROFILES
from pipelines.reporting import comparison, tables
from pipelines.reporting.answer import ROUNDING
from pipelines.reporting.results import NOT_RUN, Result, Results
from pipelines.reporting.table import Table

OUT = Path("build", "reproduce")
EQUAL, WITHIN, DIFFERENT = "bit-equal", "within the interval", "different"

_GRIDS = tuple(name for name in PROFILES if name != "studies")
# The parts of a grid by which runs are chosen, as options.
_PARTS = {"dataset": str, "augmentation": str, "method": str, "seed": int}


def main(
    profile: str = "quick",
    *,
    only: Mapping[str, Sequence[str | int]] | None = None,
    fresh: Path | None = None,
    root: Path = ROOT,
) -> Table:
    """Compares the runs of a profile, or some of them.

    Args:
        profile: Name of a profile with a grid.
        only: By `"dataset"`, `"augmentation"`, `"method"` and `"seed"`, the values to
            compare; what is not named is compared with all its values.
        fresh: A folder with fresh results, as `--root` of the stages; by default the
            runs are made, into `build/reproduce/PROFILE`, which is deleted first.
        root: The root of the repository with the committed results.

    Returns:
        One row a cell and method: the errors, where they are expected, and the finding.

    Raises:
        ValueError: If there is no such profile or value; if all of a large profile
            would be run; if the data differ, or nothing can be compared.
    """
    if profile not in _GRIDS:
        raise ValueError(
            "There is no such profile with a grid. Received: "
            f"{profile!r}; there are {', '.join(_GRIDS)}"
        )
    only = {part: values for part, values in (only or {}).items() if values}
    folder = root / PROFILES[profile]
    params = load(folder / "params.yaml")
    part = _part(params, only)
    if fresh is None:
        if profile != "quick" and not only:
            raise ValueError(
                f"All runs of the profile {profile} would take hours. Received: "
                "neither fresh results nor a choice. Pass --fresh FOLDER, or choose "
                f"runs by --{', --'.join(_PARTS)}."
            )
        fresh = OUT / profile
        shutil.rmtree(fresh, ignore_errors=True)
        quickstart.run(part, fresh)
    committed = report.read(params, Layout(folder))
    return _compared(committed, report.read(part, Layout(fresh)))


def _part(params: Params, only: Mapping[str, Sequence[str | int]]) -> Params:
    """The parameters with the chosen part of the grid."""
    chosen: dict[str, Any] = {}
    for part, values in only.items():
        there = getattr(params.grid, f"{part}s")
        if unknown := [value for value in values if value not in there]:
            raise ValueError(
                f"The grid of {params.profile} has no such {part}. Received: "
                f"{', '.join(map(str, unknown))}; there are "
                f"{', '.join(map(str, there))}"
            )
        chosen[f"{part}s"] = tuple(values)
    grid: Grid = dataclasses.replace(params.grid, **chosen)
    return dataclasses.replace(params, grid=grid)


def _compared(committed: Results, fresh: Results) -> Table:
    rows = []
    for dataset, augmentation in fresh.groups():
        for method in fresh.params.grid.methods:
            cell = (dataset, augmentation, method)
            old, new = committed.of(*cell), fresh.of(*cell)
            row = _row(old, new) if old and new else (NOT_RUN,) * 4
            title = committed.heading(dataset, augmentation)
            rows.append((title, committed.params.label(method), *row))
    if all(row[-1] == NOT_RUN for row in rows):
        raise ValueError(
            "There is nothing to compare. Received: no method of which all seeds are "
            "in both the committed and the fresh results. Run the stages first."
        )
    old_made, new_made = (
        "; ".join(tables.machines(each.by_run.values())) for each in (committed, fresh)
    )
    return Table(
        f"Does the profile {committed.params.profile} reproduce?",
        ("data", "method", "committed test error, %", "fresh", "expected", "finding"),
        tuple(rows),
        f"Committed: made with {old_made}. Fresh: made with {new_made}. Expected: "
        "where 95 % of such means lie, by the committed seeds. The finding looks at "
        "the NLL, too, where both have it.",
    )


def _row(old: Sequence[Result], new: Sequence[Result]) -> tuple[str, ...]:
    """The errors, where the fresh mean is expected, and the finding."""
    by_seed = {each.run.seed: each for each in old}
    pairs = [(by_seed[each.run.seed], each) for each in new]
    for before, after in pairs:
        hashes = [each.provenance["data_sha256"] for each in (before, after)]
        if len(set(hashes)) > 1:
            raise ValueError(
                "Results can be compared on the same data only. Received: "
                f"{after.run.name}, committed with data of sha256 {hashes[0]}, and "
                f"fresh with {hashes[1]}. Prepare the data set again."
            )
    if all(_equal(before, after) for before, after in pairs):
        finding = EQUAL
    else:
        inside = [_inside(old, new, name) for name in ("error_rate", "nll")]
        finding = WITHIN if all(inside) else DIFFERENT
    errors = [[100 * each.number("error_rate") for each in runs] for runs in (old, new)]
    limits = comparison.expected(errors[0], len(new))
    return (
        *(f"{comparison.spread(each).mean:.2f}" for each in errors),
        f"{limits[0]:.2f} to {limits[1]:.2f}" if limits else "unknown: one seed",
        finding,
    )


def _equal(committed: Result, fresh: Result) -> bool:
    """Whether all committed metrics are the fresh ones, to the last bit."""
    return all(
        name in fresh.metrics and fresh.metrics[name] == value
        for name, value in committed.metrics.items()
        if name != "provenance"
    )


def _inside(old: Sequence[Result], new: Sequence[Result], name: str) -> bool:
    """Whether the fresh mean of a metric is where it is expected, if both have it."""
    before, after = (
        [each.known(name) for each in old],
        [each.known(name) for each in new],
    )
    if None in (*before, *after):
        return True
    values = [each for each in before if each is not None]
    mean = comparison.spread([each for each in after if each is not None]).mean
    limits = comparison.expected(values, len(after))
    return limits is not None and limits[0] - ROUNDING <= mean <= limits[1] + ROUNDING


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`.

    Args:
        arguments: Those of the process by default.

    Raises:
        SystemExit: With code 1 if something is different.
    """
    line = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    line.add_argument("--profile", default="quick", help=f"one of {', '.join(_GRIDS)}")
    line.add_argument("--fresh", type=Path, help="a folder with fresh results")
    for part, kind in _PARTS.items():
        line.add_argument(f"--{part}", type=kind, nargs="+", help="only these")
    line.add_argument("--root", type=Path, default=ROOT, help="the repository's root")
    given = line.parse_args(arguments)
    only = {part: getattr(given, part) for part in _PARTS}
    table = main(given.profile, only=only, fresh=given.fresh, root=given.root)
    findings = [row[-1] for row in table.rows]
    counts = [
        f"{findings.count(each)} {each}"
        for each in (EQUAL, WITHIN, DIFFERENT, NOT_RUN)
        if each in findings
    ]
    print(table.title, table.markdown(), table.caption, sep="\n\n")
    print(f"\nOf {len(findings)} methods and cells: {', '.join(counts)}.")
    if DIFFERENT in findings:
        raise SystemExit(1)


if __name__ == "__main__":
    cli()
