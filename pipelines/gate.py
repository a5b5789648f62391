"""Checks that the committed results belong to the committed code.

It fails if results of the profile `quick` are out of date, which take two minutes to
make again. For the other profiles, which take hours, it prints how many stages are out
of date. With `--all`, for releases, it fails for these, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from pipelines.layout import ROOT, Layout

# Exit codes of DVC, also if data are missing that were never made.
_CODES = (0, 1, 255)


def main(*, everything: bool = False, root: Path = ROOT) -> None:
    """Checks all profiles that were run.

    Args:
        everything: Whether to be strict for every profile.
        root: The repository's root.

    Raises:
        SystemExit: If something that has to be up to date is not.
    """
    failures = []
    for pipeline in (root / "dvc.yaml", *sorted(root.glob("profiles/*/dvc.yaml"))):
        lock, name = pipeline.with_name("dvc.lock"), pipeline.relative_to(root)
        if not lock.is_file():
            continue
        locked = locked_paths(lock.read_text("utf-8"))
        # What was never run has no results that could be out of date.
        stale = _downstream(would_run(pipeline, root) & set(locked), locked)
        text = f"{name}: {len(stale)} of {len(locked)} stages belong to other code"
        if not stale:
            print(f"{name}: all {len(locked)} stages belong to this code.")
        elif everything or pipeline.parent == root:
            failures.append(
                f"{text}: {_counted(stale)}. Run `dvc repro {name}` and `python "
                "pipelines readme`, and commit what they change."
            )
        else:
            print(f"{text} ({_made_with(Layout(pipeline.parent).code)}).")
    if failures:
        raise SystemExit("\n".join(failures))


def would_run(pipeline: Path, root: Path) -> set[str]:
    """The stages that DVC would run first, without the files that it tracks.

    Args:
        pipeline: A dvc.yaml.
        root: The repository's root.

    Returns:
        Their names.

    Raises:
        RuntimeError: If DVC cannot read the pipeline.
    """
    dvc = (sys.executable, "-m", "dvc", "repro", "--dry", "--allow-missing")
    # Stages that were never run fail, as their data are missing; DVC continues.
    result = subprocess.run(
        [*dvc, "--keep-going", str(pipeline.relative_to(root))],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
    )
    output = result.stdout + result.stderr
    found = {
        name.rsplit(":", 1)[-1]
        for line in output.splitlines()
        if "Running stage" in line or "failed to reproduce" in line
        for name in re.findall(r"'([^']+)'", line)
    }
    readable = found or "up to date" in output
    if result.returncode not in _CODES or not readable:
        raise RuntimeError(f"DVC cannot read {pipeline}. Received: {output}")
    return found


def locked_paths(lock: str) -> dict[str, dict[str, list[str]]]:
    """The paths of `deps` and `outs` by stage, of a dvc.lock as DVC lays it out.

    Args:
        lock: The text of the lock.

    Returns:
        Lists of paths by section, by stage.

    Raises:
        ValueError: If a path belongs to no stage.
    """
    found: dict[str, dict[str, list[str]]] = {}
    paths: dict[str, list[str]] = {}
    section = ""
    for line in lock.splitlines():
        if match := re.fullmatch(r"  (\S+):", line):
            paths = found.setdefault(match[1], {"deps": [], "outs": []})
        elif match := re.fullmatch(r"    (\w+):.*", line):
            section = match[1]
        elif match := re.fullmatch(r"    - path: (.+)", line):
            if section not in paths:
                raise ValueError(
                    "A damaged dvc.lock. Received: the path "
                    f"{match[1][:80]!r} outside of the `deps` and `outs` of a stage. "
                    "Restore it from git, or run `dvc repro`."
                )
            paths[section].append(match[1])
    return found


def _downstream(
    stale: Collection[str], paths: Mapping[str, Mapping[str, Sequence[str]]]
) -> set[str]:
    """Some stages and all that depend on what they make."""
    found, more = set(stale), set(stale)
    while more:
        outs = {PurePosixPath(path) for name in found for path in paths[name]["outs"]}
        # A stage may depend on a folder of what others make, or on a part of it.
        around = outs.union(*(out.parents for out in outs))
        more = {
            name
            for name in set(paths) - found
            for dep in map(PurePosixPath, paths[name]["deps"])
            if dep in around or not outs.isdisjoint(dep.parents)
        }
        found |= more
    return found


def _counted(stages: Iterable[str]) -> str:
    """Stages by their names before the "@", with numbers."""
    found = Counter(each.partition("@")[0] for each in stages)
    return ", ".join(f"{name} ({n})" for name, n in sorted(found.items()))


def _made_with(code: Path) -> str:
    if not code.is_file():
        return "made with commits that were not recorded"
    # Those that are not known have no name.
    commits = json.loads(code.read_text("utf-8"))
    names = [commit[:10] or "one that was not recorded" for commit in commits]
    return f"made with commit{'s' * (len(names) > 1)} {', '.join(names)}"


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    line.add_argument("--all", action="store_true", help="be strict for all profiles")
    line.add_argument("--root", type=Path, default=ROOT, help="the repository's root")
    given = line.parse_args(arguments)
    main(everything=given.all, root=given.root)


if __name__ == "__main__":
    cli()
