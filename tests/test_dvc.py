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
    dvc(folder, "remote", "add", "-q", "-d", "store", str(tmp_path / "store"))
    return folder


@pytest.fixture
def vouched(checkout):
    """The checkout with a lock for the code as it is, and results that nobody made."""
    for name in ("runs/digits-none-exploration-0", "results/figures"):
        (checkout / name).mkdir(parents=True)
    made = ["data/digits.json", "data/digits.npz", "results/summary.json"]
    for run in ("digits-none-base-0", "digits-none-solve-0"):
        (checkout / "runs" / run).mkdir()
        made.append(f"results/metrics/{run}.json")
    for name in made:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name, encoding="utf-8")
    dvc(checkout, "commit", "-f", "-q")
    shutil.rmtree(checkout / "runs")
    return checkout


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


def test_a_clone_that_pulls_has_nothing_to_do(checkout, tmp_path):
    output = dvc(checkout, "repro")
    # All of a seed in one go: its times are compared.
    ran = re.findall(r"Running stage '(.*)'", output)
    assert ran == [
        "prepare@digits",
        "explore@digits-none-0",
        *(f"{stage}@digits-none-0-base" for stage in ("train", "evaluate")),
        *(f"{stage}@digits-none-0-solve" for stage in ("train", "evaluate")),
        "report",
    ]
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
    assert "Running stage 'train@digits-none-0-solve'" in output


def test_a_clone_without_data_and_runs_goes_on(checkout, tmp_path):
    dvc(checkout, "repro", "-q", "evaluate@digits-none-0-base")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "results of one method")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(checkout), str(clone))
    output = run(clone, sys.executable, "pipelines", "resume")
    assert re.findall(r"Running stage '(.*)'", output) == [
        "prepare@digits",
        "explore@digits-none-0",
        "train@digits-none-0-solve",
        "evaluate@digits-none-0-solve",
        "report",
    ]
    # Nothing is left to do, nor to be made for it.
    assert "Running" not in run(clone, sys.executable, "pipelines", "resume")


def test_two_workers_share_a_cache(checkout, tmp_path):
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "code")
    worker = tmp_path / "worker"
    git(tmp_path, "clone", "-q", str(checkout), str(worker))
    dvc(worker, "cache", "dir", "--local", str(checkout / ".dvc" / "cache"))
    dvc(worker, "repro", "-q", "train@digits-none-0-solve")
    timings = Path("results", "timings")
    shutil.copytree(worker / timings, checkout / timings)
    output = dvc(checkout, "repro")
    assert "Stage 'train@digits-none-0-solve' is cached" in output
    assert "Running stage 'train@digits-none-0-base'" in output
    said = (checkout / "results" / "overview.md").read_text(encoding="utf-8")
    assert "The code that made these results has not changed since." in said
    assert (checkout / "results" / "report.html").exists()
