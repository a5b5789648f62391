"""Mutation score: the share of small changes of the code that the tests notice.

The mutator is our own, as the common ones do not suit TensorFlow: `cosmic-ray` starts a
process for each mutant, which imports it for ten seconds, and `mutmut` forks from a
process that has run the tests, whose threads are gone after the fork. Here a process
that has only imported forks for each mutant.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import fnmatch
import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import sys
import time
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import numpy as np

from benchmarks.common import Target, table
from reliability import backends
from reliability.report import Report

PACKAGE = backends.ROOT / "keras_dalign"
TESTS = backends.ROOT / "tests"
REASONS = backends.ROOT / "reliability" / "survivors.toml"
SCORE = 0.9

# Files of the package by pattern, and the test files that concern them, those that find
# most first. Patterns, as files are split and renamed.
CONCERNED: dict[str, tuple[str, ...]] = {
    "numerics/*loss*": ("test_losses*", "test_target_logits*"),
    "numerics/*gram*": ("test_gram*", "test_column_space*"),
    "numerics/*rank*": ("test_rank*",),
    "numerics/*repeat*": ("test_repeats*",),
    "solving/*width*": ("test_width*", "test_solver*"),
    "solving/*l2*": ("test_l2_path*", "test_solver*"),
    "solving/*minimum*": ("test_minimum*", "test_problem*"),
    "solving/*problem*": ("test_problem*", "test_minimum*", "test_solver*"),
    "solving/*product*": ("test_products*", "test_problem*"),
    "solving/*": ("test_solver*", "test_minimum*", "test_problem*"),
    "certification/*certificate*": ("test_certificate*",),
}

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_CALCULATED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# A child may take this multiple of the CPU time of the unchanged code, and more.
_TIMES, _MORE_SECONDS = 3.0, 20.0
_NO_TESTS = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--sample", type=int, default=500, help="number of mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--seconds", type=float, default=8 * 3600.0, help="begin none after these"
    )
    parser.add_argument(
        "--only", nargs="*", default=["*"], help="patterns of files in the package"
    )


@dataclass(frozen=True)
class Mutant:
    """One change of a file.

    Attributes:
        path: The file, relative to the package.
        node: The node, by its place in `ast.walk`.
        part: Which of the node's operators, for comparisons.
        line: Its line.
        kind: What is changed.
    """

    path: str
    node: int
    part: int
    line: int
    kind: str


def mutants(path: Path) -> list[Mutant]:
    """All mutants of a file.

    Messages of errors, annotations and docstrings are left out: nothing depends on
    their numbers.

    Args:
        path: The file, in the package.

    Returns:
        The mutants in the order of the file.
    """
    tree = ast.parse(path.read_text("utf-8"))
    left_out = {id(inner) for node in _left_out(tree) for inner in ast.walk(node)}
    name = path.relative_to(PACKAGE).as_posix()
    found = [
        Mutant(name, index, part, getattr(node, "lineno", 0), kind)
        for index, node in enumerate(ast.walk(tree))
        if id(node) not in left_out
        for part, kind in _kinds(node)
    ]
    return sorted(found, key=lambda each: (each.line, each.node, each.part))


def _left_out(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Raise, ast.JoinedStr)):
            yield node
        if isinstance(node, ast.AnnAssign):
            yield node.annotation
        if isinstance(node, ast.arg) and node.annotation is not None:
            yield node.annotation
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from node.decorator_list
            if node.returns is not None:
                yield node.returns
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield node


def _kinds(node: ast.AST) -> Iterator[tuple[int, str]]:
    """The parts of a node that can be changed, and what they are."""
    if isinstance(node, ast.Compare):
        yield from ((i, "comparison") for i in range(len(node.ops)))
    elif isinstance(node, (ast.BinOp, ast.AugAssign)):
        if type(node.op) in _CALCULATED:
            yield 0, "arithmetic"
    elif isinstance(node, ast.BoolOp):
        yield 0, "boolean"
    elif isinstance(node, ast.UnaryOp):
        if isinstance(node.op, (ast.Not, ast.USub)):
            yield 0, "boolean" if isinstance(node.op, ast.Not) else "arithmetic"
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, (bool, int, float)):
            yield 0, "constant"
    elif isinstance(node, ast.Return):
        constant = node.value is None or isinstance(node.value, ast.Constant)
        if not constant:
            yield 0, "return"


class _Apply(ast.NodeTransformer):
    """Changes one node."""

    def __init__(self, target: ast.AST, part: int) -> None:
        self.target, self.part = target, part

    def visit(self, node: ast.AST) -> Any:
        if node is not self.target:
            return self.generic_visit(node)
        if isinstance(node, ast.Compare):
            node.ops[self.part] = _COMPARED[type(node.ops[self.part])]()
        elif isinstance(node, (ast.BinOp, ast.AugAssign)):
            node.op = _CALCULATED[type(node.op)]()
        elif isinstance(node, ast.BoolOp):
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        elif isinstance(node, ast.UnaryOp):
            return node.operand
        elif isinstance(node, ast.Constant):
            value: Any = node.value
            node.value = not value if isinstance(value, bool) else value + 1
        elif isinstance(node, ast.Return):
            node.value = ast.Constant(None)
        return node


def changed(mutant: Mutant) -> tuple[ast.Module, str]:
    """The file with the change.

    Args:
        mutant: The mutant.

    Returns:
        The tree, and the lines that differ, with `-` and `+`.
    """
    tree = ast.parse((PACKAGE / mutant.path).read_text("utf-8"))
    before = ast.unparse(tree).splitlines()
    node = next(
        each for index, each in enumerate(ast.walk(tree)) if index == mutant.node
    )
    new = ast.fix_missing_locations(_Apply(node, mutant.part).visit(tree))
    after = ast.unparse(copy.deepcopy(new)).splitlines()
    lines = difflib.unified_diff(before, after, lineterm="", n=0)
    kept = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    return new, "\n".join(f"{line[0]} {line[1:].strip()}" for line in kept)


def concerned(path: str) -> list[str]:
    """The test files of a file of the package; none if it is no target."""
    for pattern, names in CONCERNED.items():
        # Of a folder that a file was split into, too.
        if fnmatch.fnmatch(path, pattern):
            found = [str(each) for name in names for each in sorted(TESTS.glob(name))]
            return list(dict.fromkeys(found))
    return []


def targets(only: Sequence[str]) -> list[Path]:
    """The files that are mutated."""
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path.stem != "__init__"]
    names = {path.relative_to(PACKAGE).as_posix(): path for path in files}
    return [
        path
        for name, path in names.items()
        if concerned(name) and any(fnmatch.fnmatch(name, each) for each in only)
    ]


class _Loader(importlib.abc.InspectLoader):
    def __init__(self, code: CodeType) -> None:
        self.code = code

    def get_source(self, fullname: str) -> None:  # noqa: ARG002
        return None

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002
        return self.code


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the changed code in the place of a module's."""

    def __init__(self, name: str, code: CodeType, path: Path) -> None:
        self.name, self.code, self.path = name, code, path

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_loader(
            fullname, _Loader(self.code), origin=str(self.path)
        )


def _warm() -> None:
    """Imports what the tests import, and runs nothing."""
    # Not plugins of pytest, which it wants to import itself.
    for name in ("pytest", "scipy.optimize", "scipy.linalg", "keras"):
        importlib.import_module(name)
    importlib.import_module("sklearn.datasets")


def verdict(
    mutant: Mutant | None, tests: Sequence[str], seconds: float | None
) -> tuple[int, float]:
    """Runs tests in a child, with a change or without one.

    Args:
        mutant: The change, or None.
        tests: Test files.
        seconds: CPU time that it may take, or None.

    Returns:
        pytest's exit code, or minus the number of the signal that ended the child; and
        the CPU seconds that it took.
    """
    sys.stdout.flush()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        code = 3
        try:
            code = _child(mutant, tests, seconds)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return os.waitstatus_to_exitcode(status), spent


def _child(mutant: Mutant | None, tests: Sequence[str], seconds: float | None) -> int:
    if seconds is not None:
        spent = time.process_time()
        limit = int(spent + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for name in list(sys.modules):
        if name.partition(".")[0] in {"keras_dalign", "pipelines", "benchmarks"}:
            del sys.modules[name]
    if mutant is not None:
        tree, _ = changed(mutant)
        path = PACKAGE / mutant.path
        name = ".".join(("keras_dalign", *Path(mutant.path).with_suffix("").parts))
        code = compile(tree, str(path), "exec")
        sys.meta_path.insert(0, _Finder(name, code, path))
    import pytest  # noqa: PLC0415  (a dependency of the tests)

    os.chdir(backends.ROOT)
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]
    return int(pytest.main(["-x", "-q", *plugins, *tests]))


def reasons(file: Path = REASONS) -> dict[tuple[str, str], str]:
    """Why survivors are left: by path and difference.

    Args:
        file: Has a `[[survivor]]` with `path`, `diff` and `reason` for each.

    Returns:
        The reasons.
    """
    if not file.exists():
        return {}
    known = tomllib.loads(file.read_text("utf-8")).get("survivor", [])
    return {(each["path"], each["diff"].strip()): each["reason"] for each in known}


def measure(options: argparse.Namespace) -> Report:
    """Tries a sample of mutants.

    Args:
        options: See `add_options`.

    Returns:
        The share that the tests notice, and the survivors.

    Raises:
        RuntimeError: If tests of the unchanged code fail.
    """
    deadline = time.monotonic() + options.seconds
    files = targets(options.only)
    everything = [each for path in files for each in mutants(path)]
    order = np.random.default_rng(options.seed).permutation(len(everything))
    sample = [everything[i] for i in order[: options.sample]]
    _warm()
    limits: dict[tuple[str, ...], float] = {}
    found: list[dict[str, Any]] = []
    for mutant in sample:
        if time.monotonic() > deadline:
            break
        tests = tuple(concerned(mutant.path))
        if tests not in limits:
            code, spent = verdict(None, tests, None)
            if code:
                raise RuntimeError(
                    f"Tests of the unchanged code fail. Received: code {code} of "
                    f"{' '.join(tests)}. Mend them first."
                )
            limits[tests] = _TIMES * spent + _MORE_SECONDS
        code, spent = verdict(mutant, tests, limits[tests])
        if code == _NO_TESTS:
            raise RuntimeError(f"There are no tests. Received: {' '.join(tests)}")
        _, diff = changed(mutant)
        row = {
            "path": mutant.path,
            "line": mutant.line,
            "kind": mutant.kind,
            "diff": diff,
            "survived": code == 0,
            "out_of_time": code < 0,
            "seconds": round(spent, 1),
        }
        found.append(row)
        print(f"{'survived' if code == 0 else 'killed'} {mutant.path}:{mutant.line}")
    return report(found, len(everything), options)


def report(
    found: list[dict[str, Any]], everything: int, options: argparse.Namespace
) -> Report:
    """The figures of tried mutants."""
    known = reasons()
    survivors = [each for each in found if each["survived"]]
    for each in survivors:
        each["reason"] = known.get((each["path"], each["diff"]), "")
    without = [each for each in survivors if not each["reason"]]
    counted = len(found) - (len(survivors) - len(without))
    score = 1.0 - len(without) / counted if counted else float("nan")
    paths = sorted({each["path"] for each in found})
    rows = []
    for path in paths:
        of = [each for each in found if each["path"] == path]
        left = [each for each in of if each["survived"]]
        rows.append([f"`{path}`", str(len(of)), str(len(of) - len(left))])
    listed = [
        [
            f"`{each['path']}:{each['line']}`",
            each["kind"],
            "<br>".join(f"`{line}`" for line in each["diff"].splitlines()),
            each["reason"] or "none",
        ]
        for each in survivors
    ]
    late = sum(each["out_of_time"] for each in found)
    about = (
        f"{len(found)} of {everything:,} mutants of {len(targets(options.only))} "
        "files, drawn at random: a comparison, an operator, a constant, a boolean or a "
        "returned value is another one. Killed: a test of the file fails, or "
        f"the process takes {_TIMES:g} times the CPU time and more ({late}). The score "
        "leaves out survivors that are equivalent, with their reasons in "
        "`reliability/survivors.toml`."
    )
    return Report(
        title="Mutation score",
        body=[
            about,
            table(["file", "mutants", "killed"], rows),
            *(
                [table(["survivor", "kind", "difference", "reason"], listed)]
                if listed
                else ["No survivors."]
            ),
        ],
        targets=[
            Target("mutation score", score, SCORE, at_least=True),
            Target("mutants tried", len(found), options.sample, at_least=True),
            Target("survivors without a reason", len(without), 0),
        ],
        settings={"sample": options.sample, "seed": options.seed},
        measurements={"mutants": found},
    )
