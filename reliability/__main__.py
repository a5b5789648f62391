"""`python -m reliability NAME [options]`, or `page` to fill docs/reliability.md."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from pathlib import Path
from typing import Any

from reliability import report


def summaries() -> dict[str, str]:
    """The measurements, the modules that define `measure`, and what each says it does.

    They are read and not imported: some must start before any backend does.

    Returns:
        First lines of docstrings by name.
    """
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
        if "measure" in functions:
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main(words: list[str] | None = None) -> int:
    """Runs one measurement.

    Returns:
        0 if all of its targets are met, 1 otherwise.
    """
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="reliability", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    commands.add_parser("page", help="fill the table of docs/reliability.md")
    module: Any = None
    for name, summary in summaries().items():
        formatter = argparse.ArgumentDefaultsHelpFormatter
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=formatter
        )
        if name == next(iter(words), None):
            module = importlib.import_module(f"reliability.{name}")
            module.add_options(command)
    options = parser.parse_args(words)
    missed = False
    if module is not None:
        found = module.measure(options)
        report.write(options.name, found)
        missed = not all(target.met for target in found.targets)
    report.fill_page()
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
