import importlib
from pathlib import Path

import keras
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
yaml = pytest.importorskip("yaml")

from pipelines import files, study, study_report  # noqa: E402
from pipelines.layout import Layout  # noqa: E402
from pipelines.studies import collapse, iterates, repeats, sample, width  # noqa: E402

TINY = {
    "width": {
        "n": 12,
        "widths": [1, 16],
        "depths": [1],
        "epochs": 2,
        "learning_rate": 0.01,
        "seeds": 1,
    },
    "repeats": {
        "n": 12,
        "widths": [1, 32],
        "depth": 1,
        "shares": [0.0, 0.25],
        "seeds": 1,
    },
    "iterates": {
        "n": 12,
        "widths": [2],
        "two_phase_widths": [2],
        "depth": 1,
        "steps": 4,
        "explore": 2,
        "moments": 3,
        "learning_rate": 0.01,
        "seeds": 1,
    },
    "collapse": {
        "n": 60,
        "width": 8,
        "depth": 1,
        "switches": [1, 2],
        "noises": [0.1],
        "batch_size": 30,
        "learning_rate": 0.01,
        "seeds": 1,
    },
}


@pytest.fixture
def studies(tmp_path: Path):
    raw = yaml.safe_load(study.FILE.read_text(encoding="utf-8"))
    assert set(raw["studies"]) == set(TINY)
    for name, settings in TINY.items():
        # Settings that the committed parameters lack would be of no use.
        assert set(raw["studies"][name]) == set(settings)
    raw["studies"] = TINY
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return study.load(path)


def test_every_study_writes_its_rows_and_its_figure(studies, tmp_path):
    for name in studies:
        study.main(name, studies=studies, root=tmp_path)
        record = files.read_json(Layout(tmp_path).study(name), "rows", "settings")
        assert record["settings"] == TINY[name]
        assert record["rows"]
    figures = study_report.main(studies=studies, root=tmp_path)
    assert [path.stem for path in figures] == list(studies)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)


def test_a_study_that_does_not_exist(studies, tmp_path):
    with pytest.raises(ValueError, match=r"no such study. Received: 'depth'"):
        study.main("depth", studies=studies, root=tmp_path)


def test_every_study_is_a_module_with_a_section():
    for name in TINY:
        module = importlib.import_module(f"pipelines.studies.{name}")
        assert module.TITLE


def test_labels_are_drawn_anew_for_the_share_asked_for():
    x, true = sample.digits(1000, "true")
    same = [
        float(np.mean(sample.digits(1000, labels)[1] == true))
        for labels in sample.LABELS
    ]
    np.testing.assert_array_equal(sample.digits(1000, "random")[0], x)
    # Of labels drawn anew, a tenth comes out as it was.
    np.testing.assert_allclose(same, [1.0, 0.55, 0.1], atol=0.04)


def test_the_floor_is_the_best_least_squares_fit_by_any_function_of_the_images():
    x, y = repeats.with_conflicts(40, 0.25, seed=3)
    assert len(np.unique(x, axis=0)) == 30
    _, groups = np.unique(x, axis=0, return_inverse=True)
    indicators = np.eye(30)[groups.ravel()]
    targets = 2.0 * np.eye(10)[y] - 1.0
    fitted = indicators @ np.linalg.lstsq(indicators, targets, rcond=None)[0]
    expected = np.linalg.norm(targets - fitted) / np.linalg.norm(targets)
    assert repeats.floor(x, y) == pytest.approx(expected)
    assert repeats.floor(*repeats.with_conflicts(40, 0.0, seed=3)) == 0.0


def test_widening_reaches_the_floor_and_stays_there():
    rows = repeats.run({**TINY["repeats"], "widths": [1, 64]})
    by_key = {(row["share"], row["width"]): row for row in rows}
    assert by_key[0.0, 64]["residual"] < 1e-6
    assert by_key[0.0, 1]["residual"] > 0.1
    conflicting = by_key[0.25, 64]
    assert conflicting["floor"] > 0.1
    assert conflicting["residual"] == pytest.approx(conflicting["floor"], rel=1e-6)


def test_wide_networks_are_aligned_with_any_labels():
    rows = width.run({**TINY["width"], "widths": [64], "epochs": 1})
    assert len(rows) == 6
    assert {row["labels"] for row in rows} == set(sample.LABELS)
    assert all(row["residual"] < 1e-6 for row in rows)
    assert all(row["rank"] == row["n_rows"] == 120 for row in rows)


def test_iterates_are_looked_at_in_both_phases():
    rows = iterates.run(TINY["iterates"])
    networks = list(dict.fromkeys(row["network"] for row in rows))
    assert networks == ["width 2", "width 2, two phases"]
    for network in networks:
        steps = [row["step"] for row in rows if row["network"] == network]
        assert steps == [1, 2, 4]
    # Bit for bit the same network while it explores.
    explored = [row["loss"] for row in rows if row["step"] == 2]
    assert explored[0] == explored[1]


def test_effective_rank_of_known_spectra():
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.standard_normal((50, 4)))[0]
    left = np.linalg.qr(left - left.mean(axis=0))[0]
    right = np.linalg.qr(rng.standard_normal((9, 4)))[0]
    assert collapse.effective_rank(left @ right.T + 5.0) == pytest.approx(4.0)
    shares = np.array([0.5, 0.25, 0.125, 0.125])
    features = left * np.sqrt(shares) @ right.T
    entropy = -np.sum(shares * np.log(shares))
    assert collapse.effective_rank(features) == pytest.approx(np.exp(entropy))


def test_networks_of_one_seed_are_equal():
    first, second = (sample.network(3, 2, seed=1) for _ in range(2))
    keras.tree.map_structure(
        np.testing.assert_array_equal, first.get_weights(), second.get_weights()
    )
    assert len(first.layers) == 3
