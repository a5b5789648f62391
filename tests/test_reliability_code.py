"""Mutants and coverage, in small."""

import argparse
import ast
import sys

import keras
import pytest

pytest.importorskip("sklearn")

from reliability import backends, code_coverage, mutants

BACKEND = keras.backend.backend()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A package of one file."""
    monkeypatch.setattr(mutants, "PACKAGE", tmp_path)
    path = tmp_path / "part.py"
    path.write_text(
        '"""A docstring."""\n'
        "def f(a: int, b=2):\n"
        "    if a < 0 and b:\n"
        "        raise ValueError(f'{a + 1}')\n"
        "    a += 1\n"
        "    return -a * b\n"
    )
    return path


def test_kinds_of_mutants(source):
    found = mutants.mutants(source)
    changes = {mutants.changed(each)[1] for each in found}
    assert len(changes) == len(found)
    news = {change.split("+ ")[1] for change in changes}
    assert news == {
        "def f(a: int, b=3):",
        "if a <= 0 and b:",
        "if a < 1 and b:",
        "if a < 0 or b:",
        "a -= 1",
        "a += 2",
        "return -a / b",
        "return a * b",
        "return None",
    }


def test_every_target_has_tests_and_mutants():
    files = mutants.targets(["*"])
    names = {path.relative_to(mutants.PACKAGE).parts[0] for path in files}
    assert names == {"numerics", "solving", "certification"}
    for path in files:
        assert mutants.concerned(path.relative_to(mutants.PACKAGE).as_posix()), path
    assert all(mutants.mutants(path) for path in files if path.stem != "options")
    for pattern, tests in mutants.CONCERNED.items():
        for test in tests:
            assert list(mutants.TESTS.glob(test)), (pattern, test)


def test_a_change_is_found_or_survives(tmp_path):
    """In a process that has not run anything, as TensorFlow's threads do not fork."""
    if sys.platform == "win32":
        pytest.skip("There is no fork.")
    code = (
        "from reliability import backends, mutants\n"
        "def child(task):\n"
        "    path = mutants.PACKAGE / 'numerics' / 'rounding.py'\n"
        "    found = mutants.mutants(path)\n"
        "    mutant = next(each for each in found if each.kind == 'return')\n"
        "    return [\n"
        "        mutants.verdict(each, [test], 60.0)[0]\n"
        "        for each in (None, mutant) for test in task['tests']\n"
        "    ]\n"
        "backends.serve(child)\n"
    )
    (tmp_path / "changing.py").write_text(code)
    test = tmp_path / "test_rounding_small.py"
    test.write_text(
        "def test_it():\n"
        "    from keras_dalign.numerics.rounding import rounded\n"
        "    assert rounded(1.0, up=True) == '1'\n"
    )
    other = tmp_path / "test_nothing.py"
    other.write_text("def test_it():\n    assert True\n")
    task = {"tests": [str(test), str(other)]}
    found = backends.run("changing", task, BACKEND, sys.executable, path=str(tmp_path))
    assert found == [0, 0, 1, 0]


def test_reasons(tmp_path):
    file = tmp_path / "survivors.toml"
    file.write_text(
        "[[survivor]]\npath = 'a.py'\ndiff = '''\n- x\n+ y\n'''\nreason = 'r'\n"
    )
    assert mutants.reasons(file) == {("a.py", "- x\n+ y"): "r"}
    assert isinstance(mutants.reasons(), dict)


def test_the_score_leaves_out_survivors_with_reasons(monkeypatch):
    monkeypatch.setattr(mutants, "reasons", lambda: {("a.py", "d"): "equivalent"})
    row = {"line": 1, "kind": "constant", "out_of_time": False, "seconds": 1.0}
    found = [
        {**row, "path": "a.py", "diff": "d", "survived": True},
        {**row, "path": "a.py", "diff": "e", "survived": True},
        {**row, "path": "a.py", "diff": "f", "survived": False},
    ]
    options = argparse.Namespace(sample=3, seed=0, only=[])
    score, tried, without = mutants.report(found, 9, options).targets
    assert score.measured == pytest.approx(0.5)
    assert (tried.measured, without.measured) == (3, 1)


def test_coverage_adds_up_by_part():
    def counts(lines, run, branches, branches_run):
        return {
            "summary": {
                "num_statements": lines,
                "covered_lines": run,
                "num_branches": branches,
                "covered_branches": branches_run,
            },
            "missing_lines": [],
        }

    record = {
        "files": {
            "keras_dalign/growth.py": counts(10, 9, 4, 2),
            "keras_dalign/numerics/gram.py": counts(5, 5, 2, 2),
            "keras_dalign/diagnostics/engines/jax.py": counts(5, 0, 0, 0),
        }
    }
    found = code_coverage.sums(record)
    assert found["total"] == {
        "lines": 20,
        "lines_run": 14,
        "branches": 6,
        "branches_run": 4,
    }
    assert set(found) == {"total", "keras_dalign", "numerics", "diagnostics"}
    assert code_coverage._spans([1, 2, 3, 7]) == "1-3, 7"


def test_data_files_of_backends_are_combined(tmp_path):
    coverage = pytest.importorskip("coverage")
    package = backends.ROOT / "keras_dalign"
    path = package / "numerics" / "rounding.py"
    lines = [node.lineno for node in ast.parse(path.read_text()).body]
    for name, covered in {"jax": lines[:1], "torch": lines[1:]}.items():
        data = coverage.CoverageData(str(tmp_path / f".coverage.{name}"))
        data.add_arcs({str(path): {(-1, line) for line in covered}})
        data.write()
    found, record = code_coverage.combined(tmp_path)
    assert found == ["jax", "torch"]
    (one,) = [each for name, each in record["files"].items() if "rounding" in name]
    assert one["summary"]["covered_lines"] >= len(lines) - 1
    assert (tmp_path / ".coverage.jax").exists()


def test_no_data_file_is_an_error(tmp_path):
    pytest.importorskip("coverage")
    with pytest.raises(FileNotFoundError, match="nox -s coverage"):
        code_coverage.combined(tmp_path)
