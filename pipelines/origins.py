"""The commits that results were made with, and the changes of their code since.

The report records, for every commit, the files that the stages ran and digests of them.
Reports compare these with the current code. This needs no git history, which a clone
may lack.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipelines import closure, files, repository

# For a folder with more changed files, their number is listed instead of their names.
_NAMED = 3
# If more folders have changes, they are counted by their topmost folder.
_FOLDERS = 4

Commands = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Origins:
    """The code of some results.

    Attributes:
        made: By commit, what was made with it. The commit "" is not known.
        changed: The files that made the results and have changed since.
        unknown: The commits for which the changes are not known.
    """

    made: Mapping[str, Sequence[str]]
    changed: Collection[str] = ()
    unknown: Collection[str] = ()

    def commits(self, *, without: str = "") -> list[str]:
        """Each commit and what was made with it, for readers.

        Args:
            without: What is left out.

        Returns:
            Texts such as "commit 0123456789 (tuning)".
        """
        named = {
            commit: [each for each in made if each != without]
            for commit, made in self.made.items()
        }
        return [
            f"{_short(commit)} ({', '.join(made)})"
            for commit, made in sorted(named.items())
            if made
        ]

    @property
    def sentence(self) -> str:
        """A sentence about the changes of the code."""
        texts = []
        if self.changed:
            which = " one or more of these commits" if len(self.made) > 1 else ""
            texts.append(
                f"Changed since{which}, in the code that made these results: "
                f"{', '.join(_listed(self.changed))}."
            )
        elif not self.unknown:
            texts.append("The code that made these results has not changed since.")
        if self.unknown:
            names = " and ".join(map(_short, sorted(self.unknown)))
            texts.append(f"What has changed since {names} is not known.")
        return " ".join(texts)


def record(
    path: Path, made: Mapping[str, Iterable[str | None]], commands: Commands
) -> None:
    """Records the code of results.

    Args:
        path: The file to write. For commits that git does not have, entries of an
            earlier file are kept.
        made: By a name for readers, the commits that it was made with; None if one is
            not known.
        commands: The words of the stages that made them, as for `closure.files`.
    """
    old = files.read_json(path) if path.is_file() else {}
    by_commit: dict[str, list[str]] = {}
    for name, commits in made.items():
        for commit in {each or "" for each in commits}:
            by_commit.setdefault(commit, []).append(name)
    found = {}
    for commit in sorted(by_commit):
        tree = repository.tree(commit) if commit else None
        contents = (
            old.get(commit, {}).get("files")
            if tree is None
            else closure.digests(tree, commands)
        )
        found[commit] = {"made": by_commit[commit], "files": contents}
    files.write_json(path, found)


def read(
    path: Path, commands: Commands, tree: closure.Tree | None = None
) -> Origins | None:
    """Compares the code of results with that of now.

    Args:
        path: What `record` wrote.
        commands: The words of the stages that make such results.
        tree: The code; that on the disk by default.

    Returns:
        What was found, or None if nothing was noted.
    """
    if not path.is_file():
        return None
    recorded = files.read_json(path)
    now = closure.digests(closure.on_disk() if tree is None else tree, commands)
    changed: set[str] = set()
    for each in recorded.values():
        then = each["files"] or now
        changed |= {name for name in {*then, *now} if then.get(name) != now.get(name)}
    return Origins(
        {commit: each["made"] for commit, each in recorded.items()},
        changed,
        {commit for commit, each in recorded.items() if not each["files"]},
    )


def _short(commit: str) -> str:
    return f"commit {commit[:10]}" if commit else "a commit that was not recorded"


def _listed(paths: Iterable[str]) -> list[str]:
    by_folder: dict[str, list[str]] = {}
    for path in sorted(paths):
        by_folder.setdefault(str(PurePosixPath(path).parent), []).append(path)
    if len(by_folder) > _FOLDERS:
        by_top: dict[str, list[str]] = {}
        for folder, found in by_folder.items():
            by_top.setdefault(PurePosixPath(folder).parts[0], []).extend(found)
        by_folder = by_top
    names: list[str] = []
    for folder, found in by_folder.items():
        many = len(found) > _NAMED
        names += [f"{folder} ({len(found)} files)"] if many else found
    return names
