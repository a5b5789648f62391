"""The files that a command runs: what its code imports, found without running it."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from pipelines.layout import PACKAGES, ROOT

# The content of files by path, from the repository's root, with "/".
Tree = Mapping[str, bytes]


def on_disk(root: Path = ROOT) -> dict[str, bytes]:
    """Reads the code.

    Args:
        root: The repository's root.

    Returns:
        All files of `PACKAGES`, without hidden ones and what Python compiles.
    """
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            parts = path.relative_to(root).parts
            hidden = any(each.startswith((".", "__pycache__")) for each in parts)
            if path.is_file() and not hidden:
                found["/".join(parts)] = path.read_bytes()
    return found


def digests(tree: Tree, commands: Iterable[Sequence[str]]) -> dict[str, str]:
    """Digests of the files that some commands run.

    Args:
        tree: The code.
        commands: The words of each, as for `files`.

    Returns:
        By path, 16 hexadecimal digits of the SHA-256 of its content. Line endings do
        not count: git may change them.
    """
    paths = set().union(*(files(tree, command) for command in commands))
    return {
        path: hashlib.sha256(tree[path].replace(b"\r\n", b"\n")).hexdigest()[:16]
        for path in sorted(paths)
    }


def files(tree: Tree, command: Sequence[str]) -> set[str]:
    """The files that `python pipelines WORDS` runs or may run.

    A module runs its packages and all that it imports, also within functions, but not
    under `TYPE_CHECKING`. Some names are put together at run time, such as
    `import_module(f"pipelines.{stage}")`. Their last part is assumed to be a word of
    the command, or, if no word fits, any module. Other files in the folder of a
    package, such as a style sheet, belong to it.

    Args:
        tree: The code.
        command: The words, such as `["train", "--dataset", "digits"]`.

    Returns:
        Paths in `tree`.
    """
    modules = {_name(path): path for path in tree if path.endswith(".py")}
    found: set[str] = set()
    todo = ["pipelines.__main__"]
    while todo:
        name = todo.pop()
        if name in found or name not in modules:
            continue
        found.add(name)
        path = modules[name]
        package = name if path.endswith("/__init__.py") else name.rpartition(".")[0]
        names, prefixes = _imports(tree[path], package, path)
        todo += [name.rpartition(".")[0], *names]
        for prefix in prefixes:
            candidates = {
                each
                for each in modules
                if each.startswith(prefix) and "." not in each[len(prefix) :]
            }
            todo += candidates & {prefix + word for word in command} or candidates
    paths = {modules[name] for name in found}
    other_files = {
        path
        for path in tree
        if not path.endswith(".py")
        and str(PurePosixPath(path).with_name("__init__.py")) in paths
    }
    return paths | other_files


def _name(path: str) -> str:
    """The name of the module in a file."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def _imports(
    source: bytes, package: str, path: str
) -> tuple[frozenset[str], frozenset[str]]:
    """What a module imports.

    Args:
        source: Its code.
        package: Its package.
        path: Its path, for the error's text.

    Returns:
        Names of modules, some of which may be names in modules instead; and the
        beginnings of names that are put together.

    Raises:
        ValueError: If a name is put together in another way.
    """
    names, prefixes = set(), set()
    for node in _run(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and _last(node.func) == "import_module":
            match node.args[0]:
                case ast.Constant(value=str(name)):
                    names.add(name)
                case ast.JoinedStr(values=[ast.Constant(value=str(prefix)), _]):
                    prefixes.add(prefix)
                case other:
                    raise ValueError(
                        "The name of a module that is imported must be known, but for "
                        f"its last part. Received: {ast.unparse(other)} in {path}"
                    )
    return frozenset(names), frozenset(prefixes)


def _last(function: ast.expr) -> str:
    """The name of a function, without what it is an attribute of."""
    return ast.unparse(function).rpartition(".")[2]


def _run(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those under `TYPE_CHECKING`."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)
