"""The pipeline as DVC runs it: once, twice, and in a clone that pulls."""

import os
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

ROOT = Path(__file__).resolve().parent.parent


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


@pytest.fixture
def checkout(tmp_path):
    """The code and a tiny grid, in a repository of its own."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("keras_dalign", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("dvc.yaml", "params.yaml", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["grid"] |= {"methods": ["base", "solve"], "seeds": [0]}
    params["prepare"]["digits"] = {"n_train": 150, "n_test": 60}
    params["train"]["digits"] |= {"epochs": 2, "checkpoints": [0.5, 1.0]}
    params["methods"]["solve"]["explore"] = 0.5
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    git(folder, "init", "-q")
    dvc(folder, "init", "-q")
    # Without it, what Python compiles on the way would count as code.
    shutil.copy(ROOT / ".dvcignore", folder / ".dvcignore")
    dvc(folder, "remote", "add", "-q", "-d", "store", str(tmp_path / "store"))
    return folder


def test_a_clone_that_pulls_has_nothing_to_do(checkout, tmp_path):
    assert "Running stage 'train@digits-none-solve-0'" in dvc(checkout, "repro")
    assert "Running stage" not in dvc(checkout, "repro")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "results")
    dvc(checkout, "push", "-q")

    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(checkout), str(clone))
    assert not (clone / "data" / "digits.npz").exists()
    # The gate that continuous integration has, without the data.
    assert "Running stage" not in dvc(clone, "repro", "--dry", "--allow-missing")
    dvc(clone, "pull", "-q")
    assert "Running stage" not in dvc(clone, "repro")
    assert git(clone, "status", "--porcelain") == ""
    run_folder = Path("runs", "digits-none-solve-0")
    for path in (checkout / run_folder).iterdir():
        assert path.read_bytes() == (clone / run_folder / path.name).read_bytes()
    # One that changed is run again, and nothing beside it.
    params = yaml.safe_load((clone / "params.yaml").read_text(encoding="utf-8"))
    params["methods"]["solve"]["l2"] = 0.01
    (clone / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    output = dvc(clone, "repro", "--dry")
    assert output.count("Running stage") == 1
    assert "Running stage 'train@digits-none-solve-0'" in output


def test_two_workers_share_a_cache(checkout, tmp_path):
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "code")
    worker = tmp_path / "worker"
    git(tmp_path, "clone", "-q", str(checkout), str(worker))
    dvc(worker, "cache", "dir", "--local", str(checkout / ".dvc" / "cache"))
    dvc(worker, "repro", "-q", "train@digits-none-solve-0")
    timings = Path("results", "timings")
    shutil.copytree(worker / timings, checkout / timings)
    output = dvc(checkout, "repro")
    assert "Stage 'train@digits-none-solve-0' is cached" in output
    assert "Running stage 'train@digits-none-base-0'" in output
    assert (checkout / "results" / "report.html").exists()
