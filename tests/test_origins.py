import subprocess

import pytest

pytest.importorskip("yaml")

from pipelines import closure, files, origins, repository
from pipelines.layout import ROOT

TRAIN = [["train"]]
TREE = {
    "pipelines/__main__.py": (
        b"from importlib import import_module\nimport_module(f'pipelines.{x}')"
    ),
    "pipelines/train.py": b"import keras_dalign",
    "pipelines/report.py": b"",
    "keras_dalign/__init__.py": b"from keras_dalign import a, b, c, d",
    **{f"keras_dalign/{name}.py": b"" for name in "abcd"},
}


def told(path, tree):
    return origins.read(path, TRAIN, tree).sentence


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """What was made with two commits, of which git has one."""
    known = {"a" * 40: TREE}
    monkeypatch.setattr(repository, "tree", known.get)
    path = tmp_path / "code.json"
    origins.record(path, {"runs": ["a" * 40], "tuning": ["a" * 40]}, TRAIN)
    return path


def test_what_has_changed_is_named(recorded):
    assert told(recorded, TREE) == (
        "The code that made these results has not changed since."
    )
    # What the stages do not run may change.
    assert told(recorded, TREE | {"pipelines/report.py": b"1"}) == told(recorded, TREE)
    start = "Changed since, in the code that made these results: "
    halved = TREE | {"keras_dalign/a.py": b"1"}
    assert told(recorded, halved) == f"{start}keras_dalign/a.py."
    fewer = {path: text for path, text in TREE.items() if not path.endswith("/d.py")}
    assert told(recorded, fewer) == f"{start}keras_dalign/d.py."
    more = TREE | {
        "pipelines/train.py": b"import keras_dalign, pipelines.new",
        "pipelines/new.py": b"",
    }
    assert told(recorded, more) == f"{start}pipelines/new.py, pipelines/train.py."
    many = TREE | {f"keras_dalign/{name}.py": b"1" for name in "abcd"}
    assert told(recorded, many) == f"{start}keras_dalign (4 files)."
    folders = {f"keras_dalign/{name}/e.py": b"" for name in "vwxyz"}
    imports = b"from keras_dalign import a, b, c, d\nfrom keras_dalign." + (
        b"\nfrom keras_dalign.".join(f"{name} import e".encode() for name in "vwxyz")
    )
    deep = TREE | folders | {"keras_dalign/__init__.py": imports}
    assert told(recorded, deep) == f"{start}keras_dalign (6 files)."


def test_who_made_what_is_named(recorded):
    found = origins.read(recorded, TRAIN, TREE)
    assert found.commits() == ["commit aaaaaaaaaa (runs, tuning)"]
    assert found.commits(without="runs") == ["commit aaaaaaaaaa (tuning)"]
    assert origins.read(recorded.with_name("none.json"), TRAIN) is None


def test_commits_that_git_does_not_have(recorded, monkeypatch):
    # What is known of a commit is kept where git has lost it, as in a shallow clone.
    monkeypatch.setattr(repository, "tree", lambda commit: None)
    made = {"runs": ["a" * 40, None], "frontier": ["b" * 40]}
    origins.record(recorded, made, TRAIN)
    assert told(recorded, TREE | {"keras_dalign/a.py": b"1"}) == (
        "Changed since one or more of these commits, in the code that made these "
        "results: keras_dalign/a.py. What has changed since a commit that was not "
        "recorded and commit bbbbbbbbbb is not known."
    )
    assert set(files.read_json(recorded)) == {"", "a" * 40, "b" * 40}


def test_git_knows_the_code_of_a_commit():
    if repository.code()["commit"] is None:
        pytest.skip("not a checkout")
    tree = repository.tree("HEAD")
    names = subprocess.run(
        ["git", "ls-files", "--with-tree=HEAD", "keras_dalign", "pipelines"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(tree) <= set(names.stdout.split())
    assert b"def solve" in tree["keras_dalign/certification/solver.py"]
    assert closure.files(tree, ["train"])
    assert repository.tree("0" * 40) is None


def test_a_file_comes_from_the_commit_that_changed_it(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=tests", "-c", "user.email=tests@example.org")
        done = subprocess.run(
            ["git", *who, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    path = tmp_path / "study.json"
    monkeypatch.setattr(repository, "ROOT", tmp_path)
    assert repository.commit_of(path) is None
    git("init", "-q")
    commits = []
    for name in ("study.json", "other.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
        git("add", name)
        git("commit", "-q", "-m", name)
        commits.append(git("rev-parse", "HEAD"))
    assert repository.commit_of(path) == commits[0]
    # Made anew, and so with the code that is there.
    path.write_text("[]", encoding="utf-8")
    assert repository.commit_of(path) == commits[1]
    (tmp_path / "new.json").write_text("{}", encoding="utf-8")
    assert repository.commit_of(tmp_path / "new.json") == commits[1]
