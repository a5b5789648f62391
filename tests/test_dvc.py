"""The pipeline as DVC runs it: once, twice, and in a clone that pulls."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("dvc")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("filelock")
yaml = pytest.importorskip("yaml")

from pipelines import gate  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = Path("results", "timings")


def run(folder, *command):
    result = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DVC_NO_ANALYTICS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def dvc(folder, *arguments):
    return run(folder, sys.executable, "-m", "dvc", *arguments)


def git(folder, *arguments):
    who = ("-c", "user.name=tests", "-c", "user.email=tests@example.org")
    return run(folder, "git", *who, *arguments)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The code and a tiny grid, in a repository of its own, as Git has it."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("keras_dalign", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("dvc.yaml", "params.yaml", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["grid"] |= {"datasets": ["digits"], "seeds": [0]}
    params["grid"]["methods"] = ["base", "solve"]
    params["tune"] |= {"datasets": [], "recipes": []}
    params["prepare"]["digits"] = {"n_train": 150, "n_test": 60}
    params["train"]["digits"] |= {"epochs": 2, "checkpoints": [0.5, 1.0]}
    params["methods"]["solve"]["explore"] = 0.5
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    git(folder, "init", "-q")
    dvc(folder, "init", "-q")
    # Without it, what Python compiles on the way would count as code.
    shutil.copy(ROOT / ".dvcignore", folder / ".dvcignore")
    return folder


def copied(folder, copy):
    """A copy of a repository, in which a test may do what it likes."""
    return shutil.copytree(folder, copy, symlinks=True)


def invented(repository, folder):
    """A copy of the repository, with results that nobody made."""
    copied(repository, folder)
    for name in ("runs/digits-none-exploration-0", "results/figures"):
        (folder / name).mkdir(parents=True)
    made = ["data/digits.json", "data/digits.npz", "results/summary.json"]
    for run in ("digits-none-base-0", "digits-none-solve-0"):
        (folder / "runs" / run).mkdir()
        made.append(f"results/metrics/{run}.json")
    for name in made:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def with_a_lock(repository, tmp_path_factory):
    """A lock for the code as it is, and results that nobody made."""
    folder = invented(repository, tmp_path_factory.mktemp("locked") / "checkout")
    dvc(folder, "commit", "-f", "-q")
    shutil.rmtree(folder / "runs")
    return folder


@pytest.fixture
def vouched(with_a_lock, tmp_path):
    return copied(with_a_lock, tmp_path / "checkout")


class Finished:
    """A repository whose pipeline two workers ran, who share a cache.

    Attributes:
        checkout: The repository, with all results.
        started: What DVC said to the worker that trained one method.
        ended: What DVC said in the repository, where the rest was run.
    """

    def __init__(self, repository, folder):
        self.checkout = copied(repository, folder / "checkout")
        dvc(self.checkout, "remote", "add", "-q", "-d", "store", str(folder / "store"))
        git(self.checkout, "add", "-A")
        git(self.checkout, "commit", "-q", "-m", "code")
        worker = folder / "worker"
        git(folder, "clone", "-q", str(self.checkout), str(worker))
        cache = str(self.checkout / ".dvc" / "cache")
        dvc(worker, "cache", "dir", "--local", cache)
        self.started = dvc(worker, "repro", "train@digits-none-0-solve")
        shutil.copytree(worker / TIMINGS, self.checkout / TIMINGS)
        self.ended = dvc(self.checkout, "repro")


@pytest.fixture(scope="module")
def finished(repository, tmp_path_factory):
    """The pipeline is run once, for all tests that look at what it made."""
    return Finished(repository, tmp_path_factory.mktemp("finished"))


def test_gate_is_strict_for_quick(vouched, capsys):
    gate.main(root=vouched)
    assert "dvc.yaml: all 7 stages belong to this code." in capsys.readouterr().out
    losses = vouched / "keras_dalign" / "numerics" / "losses.py"
    text = losses.read_text(encoding="utf-8")
    halved = text.replace("return value, shares", "return value, 0.5 * shares")
    assert halved != text
    losses.write_text(halved, encoding="utf-8")
    # The data are those of this code: only what is made from them is not.
    asked = (
        r"6 of 7 stages belong to other code: evaluate \(2\), explore \(1\), "
        r"report \(1\), train \(2\)\. Run"
    )
    with pytest.raises(SystemExit, match=asked):
        gate.main(root=vouched)
    losses.write_text(text, encoding="utf-8")
    gate.main(root=vouched)
    (vouched / "keras_dalign" / "new.py").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit, match=asked):
        gate.main(root=vouched)


def test_gate_speaks_of_the_other_profiles_and_is_strict_on_demand(vouched, capsys):
    profile = vouched / "profiles" / "cpu"
    profile.mkdir(parents=True)
    shutil.copy(vouched / "dvc.yaml", profile / "dvc.yaml")
    text = (vouched / "params.yaml").read_text(encoding="utf-8")
    text = text.replace("code: .", "code: ../..")
    (profile / "params.yaml").write_text(text, encoding="utf-8")
    # One that was never run has nothing that could be out of date.
    gate.main(everything=True, root=vouched)
    lock = (vouched / "dvc.lock").read_text(encoding="utf-8")
    lock = lock.replace("./pipelines", "../../pipelines")
    lock = lock.replace("./keras_dalign", "../../keras_dalign")
    (profile / "dvc.lock").write_text(lock, encoding="utf-8")
    gate.main(everything=True, root=vouched)
    (profile / "dvc.lock").write_text(
        re.sub(r"(evaluate.py\n.*\n +md5: )\w+", r"\g<1>" + 32 * "a", lock),
        encoding="utf-8",
    )
    (profile / "results").mkdir()
    made = dict.fromkeys(("0123456789abcdef", "fedcba9876543210"))
    (profile / "results" / "code.json").write_text(json.dumps(made), encoding="utf-8")
    capsys.readouterr()
    gate.main(root=vouched)
    said = "3 of 7 stages belong to other code"
    commits = "made with commits 0123456789, fedcba9876"
    assert f"profiles/cpu/dvc.yaml: {said} ({commits})." in capsys.readouterr().out
    with pytest.raises(SystemExit, match=rf"{said}: evaluate \(2\), report"):
        gate.main(everything=True, root=vouched)


def test_gate_needs_a_pipeline_that_dvc_can_read(vouched):
    (vouched / "dvc.yaml").write_text("stages: 1\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="cannot read"):
        gate.main(root=vouched)


def ran(output):
    return re.findall(r"Running stage '(.*)'", output)


def test_all_of_a_seed_is_run_in_one_go(repository, tmp_path):
    """Its times are compared."""
    checkout = invented(repository, tmp_path / "checkout")
    assert ran(dvc(checkout, "repro", "--dry")) == [
        "prepare@digits",
        "explore@digits-none-0",
        *(f"{stage}@digits-none-0-base" for stage in ("train", "evaluate")),
        *(f"{stage}@digits-none-0-solve" for stage in ("train", "evaluate")),
        "report",
    ]


def test_two_workers_share_a_cache(finished):
    assert ran(finished.started) == [
        "prepare@digits",
        "explore@digits-none-0",
        "train@digits-none-0-solve",
    ]
    assert "Stage 'train@digits-none-0-solve' is cached" in finished.ended
    assert ran(finished.ended) == [
        "train@digits-none-0-base",
        "evaluate@digits-none-0-base",
        "evaluate@digits-none-0-solve",
        "report",
    ]
    results = finished.checkout / "results"
    said = (results / "overview.md").read_text(encoding="utf-8")
    assert "The code that made these results has not changed since." in said
    assert (results / "report.html").exists()


def test_a_clone_that_pulls_has_nothing_to_do(finished, tmp_path):
    checkout, clone = finished.checkout, tmp_path / "clone"
    assert not ran(dvc(checkout, "repro"))
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "results")
    dvc(checkout, "push", "-q")

    git(tmp_path, "clone", "-q", str(checkout), str(clone))
    assert not (clone / "data" / "digits.npz").exists()
    # The gate that continuous integration has, without the data.
    assert not ran(dvc(clone, "repro", "--dry", "--allow-missing"))
    dvc(clone, "pull", "-q")
    assert not ran(dvc(clone, "repro"))
    assert git(clone, "status", "--porcelain") == ""
    run_folder = Path("runs", "digits-none-solve-0")
    for path in (checkout / run_folder).iterdir():
        assert path.read_bytes() == (clone / run_folder / path.name).read_bytes()
    # One that changed is run again, and nothing beside it.
    params = yaml.safe_load((clone / "params.yaml").read_text(encoding="utf-8"))
    params["methods"]["solve"]["l2"] = 0.01
    (clone / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    assert ran(dvc(clone, "repro", "--dry")) == ["train@digits-none-0-solve"]


def test_a_rerun_in_one_process_leaves_nothing_to_do(repository, finished, tmp_path):
    checkout = copied(repository, tmp_path / "checkout")
    stale = checkout / "results" / "metrics" / "digits-none-base-0.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}", encoding="utf-8")
    other = checkout / "profiles" / "cpu"
    other.mkdir(parents=True)
    shutil.copy(checkout / "dvc.yaml", other)
    params = (checkout / "params.yaml").read_text(encoding="utf-8")
    moved = params.replace("code: .\n", "code: ../..\n")
    (other / "params.yaml").write_text(moved, encoding="utf-8")
    run(checkout, sys.executable, "pipelines", "rerun")
    assert not ran(dvc(checkout, "repro"))
    assert not (checkout / "backups" / "rerun.json").exists()
    assert not (other / "dvc.lock").exists()
    for name in ("base", "solve"):
        path = Path("results", "metrics", f"digits-none-{name}-0.json")
        one, several = (
            json.loads((folder / path).read_text(encoding="utf-8"))
            for folder in (checkout, finished.checkout)
        )
        assert one["nll"] == pytest.approx(several["nll"], rel=1e-3)


def test_a_clone_without_data_and_runs_goes_on(repository, finished, tmp_path):
    checkout = copied(repository, tmp_path / "checkout")
    # What one method needs was run before. All but its metrics comes out of a cache.
    cache = str(finished.checkout / ".dvc" / "cache")
    dvc(checkout, "cache", "dir", "--local", cache)
    shutil.copytree(finished.checkout / TIMINGS, checkout / TIMINGS)
    evaluation = "evaluate@digits-none-0-base"
    assert ran(dvc(checkout, "repro", evaluation)) == [evaluation]
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "results of one method")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(checkout), str(clone))
    output = run(clone, sys.executable, "pipelines", "resume")
    assert ran(output) == [
        "prepare@digits",
        "explore@digits-none-0",
        "train@digits-none-0-solve",
        "evaluate@digits-none-0-solve",
        "report",
    ]
    # Nothing is left to do, nor to be made for it.
    assert "Running" not in run(clone, sys.executable, "pipelines", "resume")
