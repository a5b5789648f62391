"""Which commits results were made with, and what of their code has changed since.

The report notes, for every commit, the files that the stages ran and what they
contained. Whatever shows the results compares that with the code as it is now, without
git, and so without what a clone may lack.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipelines import closure, files, repository

# Of a folder with more changed files, their number is said and not their names.
_NAMED = 3

Commands = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Origins:
    """The code of some results.

    Attributes:
        made: By commit, what was made with it. The commit "" is not known.
        changed: The files that the results came from and that are not the same now.
        unknown: The commits of which this is not known.
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
        """What of the code has changed."""
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
    """Notes the code of results.

    Args:
        path: The file to write. Of commits that git does not have, what an old one says
            is kept.
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
    names: list[str] = []
    for folder, found in by_folder.items():
        many = len(found) > _NAMED
        names += [f"{folder} ({len(found)} files)"] if many else found
    return names
