"""The code blocks of the README and of the pages in docs/, as programs.

Blocks of one page share a namespace, from top to bottom. A block of output that follows
a block of code is what that code prints; in it, `...` stands for anything, and white
space does not count. A comment in the line before a block says what is special:

- `<!-- illustration -->`, before output: it depends on the machine, so it is not
  compared. `python tests/pages.py --write PAGE` puts what was printed there.
- `<!-- run: tensorflow -->`, before code: it is for this backend.
- `<!-- run: needs dvclive -->`, before code: it is skipped without this package.
- `<!-- run: warns -->`: it warns.
- `<!-- run: no, REASON -->`: it is not run.
"""

import argparse
import contextlib
import dataclasses
import doctest
import importlib.util
import io
import os
import re
import sys
import tempfile
import textwrap
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\s*$")
_COMMENT = re.compile(r"^<!-- (.+) -->$")
_WIDTH = 88


@dataclasses.dataclass
class Block:
    """A block of code, and the output that follows it.

    Attributes:
        line: Number of the line that the code begins in, from 1.
        code: The code.
        marks: What the comment says behind `run:`, at commas.
        output: The output, or None.
        output_lines: The lines that the output takes, from 1, without its fences.
        illustration: Whether the output is not compared.
    """

    line: int
    code: str
    marks: list
    output: str | None = None
    output_lines: range = range(0)
    illustration: bool = False

    def runs_on(self, backend):
        """Whether it is run on a backend."""
        backends = {"tensorflow", "jax", "torch"} & set(self.marks)
        return "no" not in self.marks and (not backends or backend in backends)

    @property
    def missing(self):
        """The packages it needs that are not installed."""
        needed = [m.removeprefix("needs ") for m in self.marks if m[:6] == "needs "]
        return [name for name in needed if importlib.util.find_spec(name) is None]

    def run(self, path, namespace):
        """Runs it; gives what it printed."""
        code = compile("\n" * (self.line - 1) + self.code, str(path), "exec")
        printed = io.StringIO()
        with warnings.catch_warnings(record=True) as caught:
            if "warns" in self.marks:
                warnings.simplefilter("always", UserWarning)
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
        if "warns" in self.marks and not caught:
            raise AssertionError(f"{path}:{self.line} does not warn")
        return printed.getvalue()

    def says(self, printed):
        """Whether the page has what was printed."""
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        return doctest.OutputChecker().check_output(self.output, printed, flags)


def blocks(text):
    """The blocks of code of a page."""
    found, comment, after_code = [], "", False
    lines = iter(enumerate(text.splitlines(), start=1))
    for number, line in lines:
        fence = _FENCE.match(line)
        if not fence:
            if line.strip():
                match = _COMMENT.match(line)
                comment = match[1] if match else ""
                after_code = after_code and bool(match)
            continue
        inside = []
        for _, each in lines:
            if each == "```":
                break
            inside.append(each)
        content = "".join(f"{each}\n" for each in inside)
        if fence[1] == "python":
            marks = comment.removeprefix("run:") if comment.startswith("run:") else ""
            marks = [mark.strip() for mark in marks.split(",") if mark.strip()]
            found.append(Block(number + 1, content, marks))
        elif fence[1] == "text" and after_code:
            found[-1].output = content
            found[-1].output_lines = range(number + 1, number + 1 + len(inside))
            found[-1].illustration = comment == "illustration"
        after_code, comment = fence[1] == "python", ""
    return found


def run(path, backend):
    """Runs a page, in a folder of its own; gives blocks with what they printed."""
    namespace = {"__name__": "page"}
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in blocks(path.read_text(encoding="utf-8")):
                if block.runs_on(backend) and not block.missing:
                    yield block, block.run(path, namespace)
        finally:
            os.chdir(here)


def check(path, backend):
    """Runs a page, and compares what it prints."""
    for block, printed in run(path, backend):
        if block.output is None or block.illustration:
            continue
        if not block.says(printed):
            raise AssertionError(
                f"{path}:{block.line} prints\n{printed}\nand the page says\n"
                f"{block.output}"
            )


def write(path, backend):
    """Runs a page, and puts what it prints there, where that is another thing."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for block, printed in reversed(list(run(path, backend))):
        if block.output is not None and not block.says(printed):
            if not block.illustration:
                print(f"{path}:{block.line} printed\n{block.output}and now\n{printed}")
            wrapped = [
                textwrap.wrap(line, _WIDTH, break_on_hyphens=False)
                for line in printed.splitlines()
            ]
            new = [line for each in wrapped for line in each or [""]]
            begin = block.output_lines.start - 1
            lines[begin : begin + len(block.output_lines)] = new
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    """The command line."""
    line = argparse.ArgumentParser(description="Runs the code blocks of a page.")
    line.add_argument("--write", action="store_true", help="put its outputs there")
    line.add_argument("pages", type=Path, nargs="+")
    given = line.parse_args()
    sys.path.insert(0, str(ROOT))
    import keras

    # As in the tests.
    warnings.filterwarnings("error", category=UserWarning, module="keras_dalign|page")
    failed = False
    for path in given.pages:
        try:
            (write if given.write else check)(path.resolve(), keras.backend.backend())
        except Exception:
            failed = True
            traceback.print_exc()
        else:
            print(f"{path}: ok", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
