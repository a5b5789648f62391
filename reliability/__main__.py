"""`python -m reliability NAME [options]`, or `page` to fill docs/reliability.md."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

import reliability
from reliability import report


def names() -> list[str]:
    """The measurements: the modules of this package that have `measure`."""
    found = [module.name for module in pkgutil.iter_modules(reliability.__path__)]
    modules = {name: f"reliability.{name}" for name in found if name != "__main__"}
    return [
        name
        for name, module in modules.items()
        if hasattr(importlib.import_module(module), "measure")
    ]


def main(words: list[str] | None = None) -> int:
    """Runs one measurement.

    Returns:
        0 if all of its targets are met, 1 otherwise.
    """
    parser = argparse.ArgumentParser(prog="reliability", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    commands.add_parser("page", help="fill the table of docs/reliability.md")
    modules = {name: importlib.import_module(f"reliability.{name}") for name in names()}
    for name, module in modules.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        formatter = argparse.ArgumentDefaultsHelpFormatter
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=formatter
        )
        module.add_options(command)
    options = parser.parse_args(words)
    missed = False
    if options.name != "page":
        found = modules[options.name].measure(options)
        report.write(options.name, found)
        missed = not all(target.met for target in found.targets)
    report.fill_page()
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
