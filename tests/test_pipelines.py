import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
yaml = pytest.importorskip("yaml")

from pipelines import datasets, evaluate, files, prepare, train  # noqa: E402
from pipelines.layout import Layout  # noqa: E402
from pipelines.params import FILE, DataParams, Params, Run, load  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def params(tmp_path: Path) -> Params:
    """The digits grid, but tiny."""
    raw = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    raw["grid"]["seeds"] = [0, 1]
    raw["prepare"]["digits"] = {"n_train": 150, "n_test": 60, "split_seed": 0}
    raw["train"]["digits"] |= {
        "model": {"name": "mlp", "units": [16]},
        "epochs": 2,
        "batch_size": 32,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return load(path)


@pytest.fixture
def report():
    pytest.importorskip("matplotlib")
    from pipelines import report

    return report


def fabricate(layout: Layout, run: Run, error_rate: float, **changes) -> None:
    """Writes metrics and a timing as if the run had been made."""
    metrics = {
        "error_rate": error_rate,
        "train_loss": 0.01 * (1 + run.seed),
        "train_error_rate": 0.0,
        "lower_bound": 0.0,
        "gap": 0.02 * (1 + run.seed),
        "curves": {
            "train_loss": [1.0, 0.5, 0.25],
            "error_rate": [0.5, 0.2, error_rate],
            "phase": [0.0, 0.0, float(run.method != "base")],
        },
        "provenance": {
            "synthetic": False,
            "data_sha256": "abc",
            "versions": {"keras": "3.99"},
            "device": "abacus",
            "threads": 2,
        },
    }
    metrics["provenance"] |= changes
    files.write_json(layout.metrics(run), metrics)
    files.write_json(layout.timing(run), {"seconds": 2.0 + run.seed})


def test_stages_from_raw_data_to_table(params, tmp_path, report):
    params = replace(params, grid=replace(params.grid, seeds=(0,)))
    layout = Layout(tmp_path)
    prepare.main("digits", params=params, root=tmp_path)
    for run in params.grid.runs():
        key = (run.dataset, run.method, run.seed)
        train.main(*key, params=params, root=tmp_path)
        evaluate.main(*key, root=tmp_path)
        metrics = files.read_json(layout.metrics(run))
        certificate = files.read_json(layout.certificate(run))
        assert metrics["train_loss"] == pytest.approx(certificate["loss"], rel=1e-4)
        assert metrics["gap"] == certificate["gap"] >= 0
        assert 0 < metrics["error_rate"] < 1
        phases = [0, 0] if run.method == "base" else [0, 1]
        assert metrics["curves"]["phase"] == phases
        assert metrics["provenance"]["seed"] == run.seed
        assert files.read_json(layout.timing(run))["seconds"] > 0
    # One seed, one start: until the switch random gates are the base run, bit for bit.
    base, random = (
        files.read_json(layout.history(Run("digits", method, 0)))
        for method in ("base", "two_phase_random")
    )
    assert base["loss"][0] == random["loss"][0]
    assert base["val_loss"][0] == random["val_loss"][0]
    assert base["loss"][1] != random["loss"][1]
    text = report.main(params=params, root=tmp_path).read_text(encoding="utf-8")
    for method in params.grid.methods:
        assert f"| {params.label(method)} |" in text
    assert report.NOT_RUN not in text
    assert layout.figure("digits").read_bytes().startswith(b"\x89PNG")
    summary = files.read_json(layout.summary)["digits"]
    assert set(summary) == set(params.grid.methods)
    # Nothing temporary stays.
    assert not list(tmp_path.rglob(".*"))


def test_a_run_repeats_bit_for_bit(params, tmp_path):
    layout, run = Layout(tmp_path), Run("digits", "two_phase_random", 1)
    prepare.main("digits", params=params, root=tmp_path)
    found = []
    for _ in range(2):
        train.main("digits", "two_phase_random", 1, params=params, root=tmp_path)
        folder = sorted(layout.run(run).iterdir())
        found.append({path.name: path.read_bytes() for path in folder})
    assert found[0] == found[1]


def test_table_is_what_the_hand_computes(params, tmp_path, report):
    layout = Layout(tmp_path)
    for run in params.grid.runs():
        if run.method != "two_phase_learned":
            fabricate(layout, run, 0.02 + 0.02 * run.seed)
    # Files of a seed that is not in the grid are not looked at.
    fabricate(layout, Run("digits", "base", 7), 1.0)
    # A method of which a seed is missing was not run.
    fabricate(layout, Run("digits", "two_phase_learned", 0), 0.5)

    table = report.main(params=params, root=tmp_path).read_text(encoding="utf-8")

    # Errors 2 % and 4 %: mean 3, deviation sqrt(2); losses 0.01 and 0.02; gaps 0.02
    # and 0.04; seconds 2 and 3.
    lines = table.splitlines()
    assert "| base | 3.00 ± 1.41 | 1.5e-02 | 4.0e-02 | 2.5 |" in lines
    assert (
        "| two-phase, learned gates | not run (1 of 2 seeds) | not run | not run | "
        "not run |"
    ) in lines
    assert "Measured with keras 3.99, on abacus, 2 threads." in table
    names, *rows = layout.csv.read_text(encoding="utf-8").splitlines()
    assert names.split(",")[3:] == [
        "error_rate",
        "train_loss",
        "train_error_rate",
        "lower_bound",
        "gap",
        "seconds",
    ]
    assert rows[:3] == [
        "digits,base,0,0.02,0.01,0.0,0.0,0.02,2.0",
        "digits,two_phase_random,0,0.02,0.01,0.0,0.0,0.02,2.0",
        "digits,two_phase_learned,0,0.5,0.01,0.0,0.0,0.02,2.0",
    ]
    summary = files.read_json(layout.summary)
    assert set(summary["digits"]) == {"base", "two_phase_random"}
    assert summary["digits"]["base"] == {
        "error_rate": pytest.approx(0.03),
        "error_rate_std": pytest.approx(0.02 / np.sqrt(2)),
        "train_loss": pytest.approx(0.015),
        "gap": 0.04,
        "seeds": 2,
    }


def test_report_on_nothing_says_not_run(params, tmp_path, report):
    table = report.main(params=params, root=tmp_path).read_text(encoding="utf-8")
    assert "| base | not run | not run | not run | not run |" in table
    assert not Layout(tmp_path).figure("digits").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"synthetic": True}, "Synthetic"), ({"data_sha256": "other"}, "same data")],
)
def test_report_refuses(params, tmp_path, report, changes, message):
    fabricate(Layout(tmp_path), Run("digits", "base", 0), 0.1)
    fabricate(Layout(tmp_path), Run("digits", "base", 1), 0.1, **changes)
    with pytest.raises(ValueError, match=message):
        report.main(params=params, root=tmp_path)


def test_quickstart_prints_table_and_paths_last(params, tmp_path, report, capsys):
    from pipelines import quickstart

    grid = replace(params.grid, methods=("base",), seeds=(0,))
    params = replace(params, grid=grid)
    table = quickstart.main(params=params, root=tmp_path)
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-2] == f"table:  {table}"
    assert lines[-1] == f"figure: {Layout(tmp_path).figure('digits')}"
    assert any(line.startswith("| base | ") for line in lines)


def test_evaluate_refuses_what_does_not_belong_together(params, tmp_path):
    layout, run = Layout(tmp_path), Run("digits", "base", 0)
    prepare.main("digits", params=params, root=tmp_path)
    train.main("digits", "base", 0, params=params, root=tmp_path)
    certificate = files.read_json(layout.certificate(run))
    files.write_json(layout.certificate(run), certificate | {"loss": 1e-9})
    with pytest.raises(ValueError, match="does not belong to its logits"):
        evaluate.main("digits", "base", 0, root=tmp_path)
    made_with = files.read_json(layout.provenance(run))
    files.write_json(layout.provenance(run), made_with | {"data_sha256": "other"})
    with pytest.raises(ValueError, match="made with other data"):
        evaluate.main("digits", "base", 0, root=tmp_path)
    with pytest.raises(FileNotFoundError, match="earlier stage"):
        evaluate.main("digits", "base", 1, root=tmp_path)


def test_evaluate_needs_numpy_only():
    code = "import sys, pipelines.evaluate; print('keras' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "False"


def test_cross_entropy_is_exact_where_it_is_tiny_and_where_it_is_huge():
    logits = np.array([[30.0, 0.0, 0.0], [0.0, 2000.0, 0.0], [1.0, 1.0, 1.0]])
    assert evaluate.cross_entropy(logits[:1], np.array([0])) == pytest.approx(
        2 * np.exp(-30.0), rel=1e-12
    )
    assert evaluate.cross_entropy(logits[1:2], np.array([0])) == 2000.0
    assert evaluate.cross_entropy(logits[2:], np.array([2])) == pytest.approx(
        np.log(3), rel=1e-15
    )
    assert evaluate.error_rate(logits, np.array([0, 0, 1])) == pytest.approx(2 / 3)


def test_prepared_digits(params, tmp_path):
    path = prepare.main("digits", params=load(), root=tmp_path)
    data, description = datasets.read(Layout(tmp_path), "digits")
    assert data.x_train.shape == (1200, 8, 8, 1)
    assert data.x_test.shape == (597, 8, 8, 1)
    assert description["n_classes"] == 10
    assert description["synthetic"] is False
    # No image is in both parts more often than in the data set, where all differ.
    everything = np.concatenate([data.x_train, data.x_test]).reshape(1797, -1)
    assert len(np.unique(everything, axis=0)) == 1797
    before = path.read_bytes()
    prepare.cli(["--dataset", "digits", "--root", str(tmp_path)])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"x_train": a["x_train"][1:]}, "Expected 20 train samples"),
        (lambda a: {"x_train": a["x_train"] * 3}, r"\[0, 1\]"),
        (lambda a: {"x_test": a["x_test"] * np.nan}, r"\[0, 1\]"),
        (lambda a: {"x_test": a["x_test"][:, :1]}, "same for training and test"),
        (lambda a: {"y_train": a["y_train"] - 1}, "integers from 0"),
        (lambda a: {"y_test": a["y_test"] * 0}, "Every class"),
        (lambda a: {"y_test": a["y_test"] + 1}, "Every class"),
    ],
)
def test_bad_data_are_refused(change, message):
    arrays = {
        "x_train": np.full((20, 2, 2, 1), 0.5, "float32"),
        "y_train": np.arange(20) % 2,
        "x_test": np.full((10, 2, 2, 1), 0.5, "float32"),
        "y_test": np.arange(10) % 2,
    }
    wanted = DataParams(20, 10)
    datasets.check(datasets.Dataset(**arrays), wanted)
    with pytest.raises(ValueError, match=message):
        datasets.check(datasets.Dataset(**{**arrays, **change(arrays)}), wanted)


def test_changed_and_damaged_data_are_refused(params, tmp_path):
    path = prepare.main("digits", params=params, root=tmp_path)
    arrays = dict(
        zip(datasets.PARTS, files.read_arrays(path, *datasets.PARTS), strict=True)
    )
    arrays["y_train"] = arrays["y_train"][::-1]
    files.write_arrays(path, arrays)
    with pytest.raises(ValueError, match="does not belong to its description"):
        datasets.read(Layout(tmp_path), "digits")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        datasets.read(Layout(tmp_path), "digits")


def test_unknown_names_list_what_there_is(params, tmp_path):
    with pytest.raises(ValueError, match="'mnits'; there are digits"):
        prepare.main("mnits", params=params, root=tmp_path)
    prepare.main("digits", params=params, root=tmp_path)
    with pytest.raises(ValueError, match="there are base, two_phase_learned"):
        train.main("digits", "bass", 0, params=params, root=tmp_path)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("train", {"epochs": 3}, "must have the keys batch_size, epochs"),
        ("grid", {"methods": ["magic"]}, "'magic'; there are base"),
    ],
)
def test_bad_params_are_refused(tmp_path, section, change, message):
    raw = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    if section == "train":
        raw["train"]["digits"] = change
    else:
        raw[section] |= change
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "numbers.json"
    files.write_json(path, {"a": 1.0})
    with pytest.raises(ValueError, match="must be finite"):
        files.write_json(path, {"a": float("nan")})

    def killed():
        with files.replacing(path) as temporary:
            temporary.write_text("{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert files.read_json(path) == {"a": 1.0}
    assert list(tmp_path.iterdir()) == [path]


def test_lock_and_pipeline_have_the_same_stages():
    pytest.importorskip("dvc")
    lock = ROOT / "dvc.lock"
    if not lock.exists() or not (ROOT / ".dvc").exists():
        pytest.skip("not a checkout with results")
    result = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    locked = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
    assert set(locked) == set(result.stdout.split())


def test_committed_results_are_those_of_the_grid(report):
    layout, params = Layout(ROOT), load()
    if not layout.summary.exists():
        pytest.skip("not a checkout with results")
    results = report.read(params, layout)
    assert set(results) == set(params.grid.runs())
    assert layout.table.read_text(encoding="utf-8") == report.table(params, results)
    assert json.loads(layout.summary.read_text()) == report.summary(params, results)
