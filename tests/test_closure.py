"""The code that each stage runs, and what dvc.yaml says of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

from pipelines import closure  # noqa: E402
from pipelines.layout import ROOT  # noqa: E402

CODE = "${code}/"
# The other profiles have the pipeline of the root.
PROFILES = [".", "profiles/studies"]


@pytest.fixture(scope="module")
def tree():
    return closure.on_disk()


def stages(folder):
    """Name, command and dependencies of each stage, one for every study."""
    folder = ROOT / folder
    pipeline = yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    for name, stage in pipeline["stages"].items():
        keys = params["studies"] if stage.get("foreach") == "${studies}" else [""]
        for key in keys:
            text = json.dumps(stage.get("do", stage)).replace("${key}", key)
            filled = json.loads(text)
            yield f"{name} {key}", filled["cmd"].split(), filled["deps"]


@pytest.mark.parametrize("folder", PROFILES)
def test_stages_depend_on_the_code_that_they_run_and_on_no_other(folder, tree):
    for name, (python, program, *words), deps in stages(folder):
        assert (python, program) == ("python", f"{CODE}pipelines"), name
        stated = [dep.removeprefix(CODE) for dep in deps if dep.startswith(CODE)]
        covered = [
            {path for path in tree if path == dep or path.startswith(f"{dep}/")}
            for dep in stated
        ]
        assert all(covered), name
        ran, listed = closure.files(tree, words), set().union(*covered)
        assert ran - listed == set(), f"{name} also depends on"
        # The package is one dependency; its command line is a program of its own.
        others = listed - ran - {"keras_dalign/__main__.py"}
        assert others == set(), f"{name} does not depend on"


@pytest.mark.parametrize("stage", ["train", "report"])
def test_what_python_imports_is_in_the_closure(stage, tree):
    for needed in ("filelock", "matplotlib"):
        pytest.importorskip(needed)
    program = (
        f"import json, sys, pipelines.__main__, pipelines.{stage}\n"
        "files = [getattr(each, '__file__', None) for each in sys.modules.values()]\n"
        "print(json.dumps([each for each in files if each]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = map(Path, json.loads(result.stdout.splitlines()[-1]))
    found = {
        path.relative_to(ROOT).as_posix() for path in paths if ROOT in path.parents
    }
    own = {path for path in found if path in tree}
    assert f"pipelines/{stage}.py" in own
    assert own <= closure.files(tree, [stage])


def module(*lines):
    return "\n".join(lines).encode()


def test_closure_follows_what_is_run():
    tree = {
        "pipelines/__init__.py": module("import os"),
        "pipelines/__main__.py": module(
            "from importlib import import_module", "import_module(f'pipelines.{x}')"
        ),
        "pipelines/train.py": module(
            "from typing import TYPE_CHECKING",
            "from keras_dalign.deep import thing, name",
            "if TYPE_CHECKING:",
            "    import pipelines.types",
            "else:",
            "    import pipelines.otherwise",
            "def f():",
            "    from . import lazy",
        ),
        "pipelines/lazy.py": module("import pipelines.train"),
        "pipelines/otherwise.py": b"",
        "pipelines/types.py": b"",
        "pipelines/report.py": module("import numpy.linalg"),
        "keras_dalign/__init__.py": b"",
        "keras_dalign/py.typed": b"",
        "keras_dalign/deep/__init__.py": module("from .. import sibling"),
        "keras_dalign/deep/thing.py": b"",
        "keras_dalign/deep/page.css": b"",
        "keras_dalign/deep/unused.py": b"",
        "keras_dalign/sibling.py": b"",
        "keras_dalign/other/__init__.py": b"",
    }
    start = {"pipelines/__init__.py", "pipelines/__main__.py"}
    assert closure.files(tree, ["report", "--seed", "1"]) == {
        *start,
        "pipelines/report.py",
    }
    assert closure.files(tree, ["train"]) == {
        *start,
        "pipelines/train.py",
        "pipelines/lazy.py",
        "pipelines/otherwise.py",
        "keras_dalign/__init__.py",
        "keras_dalign/py.typed",
        "keras_dalign/deep/__init__.py",
        "keras_dalign/deep/thing.py",
        "keras_dalign/deep/page.css",
        "keras_dalign/sibling.py",
    }
    # Where no word is the name of a module, it may be any, but none further down.
    assert "pipelines/types.py" in closure.files(tree, [])
    assert "keras_dalign/other/__init__.py" not in closure.files(tree, [])


def test_names_that_nobody_knows_are_refused():
    tree = {"pipelines/__main__.py": b"import importlib\nimportlib.import_module(name)"}
    with pytest.raises(ValueError, match=r"Received: name in pipelines/__main__\.py"):
        closure.files(tree, ["train"])


def test_line_endings_do_not_count():
    texts = ({"pipelines/__main__.py": b"a = 1%s" % end} for end in (b"\n", b"\r\n"))
    one, two = (closure.digests(tree, [["train"]]) for tree in texts)
    assert one == two
    assert len(one["pipelines/__main__.py"]) == 16
