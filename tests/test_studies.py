import importlib
from pathlib import Path

import keras
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
yaml = pytest.importorskip("yaml")

from pipelines import files, readme, study, study_report  # noqa: E402
from pipelines.layout import ROOT, Layout  # noqa: E402
from pipelines.studies import iterates, repeats, sample, width  # noqa: E402
from pipelines.studies.claims import Claim, table  # noqa: E402

STUDIES = ROOT / "pipelines" / "studies"
PAGES = ROOT / "docs" / "studies"

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
    for name, settings in TINY.items():
        # Settings that the committed parameters lack would be of no use.
        assert set(raw["studies"][name]) == set(settings)
    raw["studies"] = TINY
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return study.load(path)


def rows_of(module, settings):
    return [
        row for cell in module.cells(settings) for row in module.measure(settings, cell)
    ]


def test_every_study_writes_its_rows_its_figure_and_its_claims(studies, tmp_path):
    layout = Layout(tmp_path)
    for name in studies:
        study.main(name, studies=studies, root=tmp_path)
        record = files.read_json(layout.study(name), "rows", "settings")
        assert record["settings"] == TINY[name]
        assert record["rows"]
        assert not layout.study_cells(name).exists()
    figures = study_report.main(studies=studies, root=tmp_path)
    assert [path.stem for path in figures] == list(studies)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)
    metrics = files.read_json(layout.study_metrics, *studies)
    for claims in metrics.values():
        assert all(each["statement"] for each in claims.values())


def test_a_killed_study_goes_on_with_the_cells_that_are_missing(
    studies, tmp_path, monkeypatch
):
    whole = study.main("repeats", studies=studies, root=tmp_path / "whole")
    measure, measured = repeats.measure, []

    def stopping(settings, cell):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(cell)
        return measure(settings, cell)

    monkeypatch.setattr(repeats, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        study.main("repeats", studies=studies, root=tmp_path)
    assert not Layout(tmp_path).study("repeats").exists()

    def counting(settings, cell):
        measured.append(cell)
        return measure(settings, cell)

    monkeypatch.setattr(repeats, "measure", counting)
    path = study.main("repeats", studies=studies, root=tmp_path)
    assert measured == repeats.cells(TINY["repeats"])
    assert (
        files.read_json(path, "rows")["rows"]
        == (files.read_json(whole, "rows")["rows"])
    )
    # With other settings nothing is taken over.
    changed = {**studies, "repeats": {**TINY["repeats"], "n": 16}}
    study.main("repeats", studies=changed, root=tmp_path)
    assert len(measured) == 2 * len(repeats.cells(TINY["repeats"]))


def test_verdicts():
    def verdict(values, **bounds):
        return Claim("slope", "The slope is so.", values, **bounds).verdict()

    assert verdict([0.1, 0.2, 0.15], low=0.0, high=0.4) == "seen"
    assert verdict([0.1, 0.2, 0.15], low=0.4) == "not seen"
    assert verdict([0.1, 0.2, 0.15], high=0.16) == "undecided"
    assert verdict([0.1], high=0.16) == "seen"
    assert verdict([0.0, 0.0, 0.0], high=0) == "seen"
    with pytest.raises(ValueError, match=r"finite values.*\[nan\].*'slope'"):
        verdict([float("nan")])


def test_interval_of_the_mean():
    claim = Claim("slope", "The slope is so.", [1.0, 2.0, 3.0])
    # Student's t with two degrees of freedom: 4.303; standard error 1 / sqrt(3).
    assert claim.interval() == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    assert claim.metrics() == {
        "statement": "The slope is so.",
        "mean": 2.0,
        "interval": list(claim.interval()),
        "seeds": 3,
        "verdict": "seen",
    }


def test_table_of_claims():
    claims = [
        Claim("a", "A is above 3", [1.0, 2.0, 3.0], low=3.0),
        Claim("b", "B is above 3", [4.0], low=3.0),
    ]
    assert table(claim.metrics() for claim in claims).splitlines()[2:] == [
        "| A is above 3 | 2 (-0.484 to 4.48) | 3 | **undecided** |",
        "| B is above 3 | 4 | 1 | seen |",
    ]


def test_slope_of_a_power():
    x = np.array([1.0, 2.0, 5.0])
    assert sample.slope(x, 3.0 * x**-0.5) == pytest.approx(-0.5)


def test_pooled_digits():
    x, y = sample.pooled_digits(20, seed=1)
    images, labels = sample.digits(20, seed=1)
    np.testing.assert_array_equal(y, labels)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0)
    means = [image.reshape(8, 8)[2:4, 4:6].mean() for image in images]
    centred = means - np.mean(means)
    # The seventh of the sixteen inputs, up to the norm of its image.
    assert np.corrcoef(x[:, 6], centred)[0, 1] > 0.9


@pytest.mark.parametrize("name", TINY)
def test_all_wrong_settings_are_reported_at_once(name):
    module = importlib.import_module(f"pipelines.studies.{name}")
    wrong = {**TINY[name], "n": 1, "seed": 3, "seeds": "2"}
    with pytest.raises(
        ValueError, match=f"The study '{name}' has 3 mistakes"
    ) as caught:
        module.cells(wrong)
    message = str(caught.value)
    assert "no key 'seed'; the nearest is 'seeds'" in message
    assert f"`studies.{name}.n` must be one integer between 2 and 1797" in message
    assert f"`studies.{name}.seeds` must be one integer" in message
    missing = {key: value for key, value in TINY[name].items() if key != "n"}
    with pytest.raises(ValueError, match=r"must have the keys .*, without n$"):
        module.cells(missing)


def test_a_setting_is_a_list_or_is_not():
    wrong = {**TINY["width"], "widths": 4, "epochs": [2]}
    with pytest.raises(ValueError, match="2 mistakes") as caught:
        width.cells(wrong)
    assert "`studies.width.widths` must be a list of integers" in str(caught.value)
    assert "`studies.width.epochs` must be one integer" in str(caught.value)


def test_a_study_that_does_not_exist(studies, tmp_path):
    with pytest.raises(ValueError, match=r"no such study. Received: 'depth'"):
        study.main("depth", studies=studies, root=tmp_path)


def test_every_study_is_a_package_with_a_section_and_a_page():
    names = set(study.load())
    packages = {path.parent.name for path in STUDIES.glob("*/__init__.py")}
    assert packages == names
    assert {path.stem for path in PAGES.glob("*.md")} - {"README"} == names
    for name in names:
        module = importlib.import_module(f"pipelines.studies.{name}")
        assert module.TITLE
        assert module.cells(study.load()[name])
        page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        assert f"<!-- claims {name} -->" in page
        assert f"profiles/studies/dvc.yaml:study@{name}" in page


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_pages_say_what_was_measured(page):
    text = page.read_text(encoding="utf-8")
    assert readme.filled(text) == text


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
    rows = rows_of(repeats, {**TINY["repeats"], "widths": [1, 64]})
    by_key = {(row["share"], row["width"]): row for row in rows}
    assert by_key[0.0, 64]["residual"] < 1e-6
    assert by_key[0.0, 1]["residual"] > 0.1
    conflicting = by_key[0.25, 64]
    assert conflicting["floor"] > 0.1
    assert conflicting["residual"] == pytest.approx(conflicting["floor"], rel=1e-6)


def test_wide_networks_are_aligned_with_any_labels():
    rows = rows_of(width, {**TINY["width"], "widths": [64], "epochs": 1})
    assert len(rows) == 6
    assert {row["labels"] for row in rows} == set(sample.LABELS)
    assert all(row["residual"] < 1e-6 for row in rows)
    assert all(row["rank"] == row["n_rows"] == 120 for row in rows)


def test_iterates_are_looked_at_in_both_phases():
    rows = rows_of(iterates, TINY["iterates"])
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
    assert sample.effective_rank(left @ right.T + 5.0) == pytest.approx(4.0)
    shares = np.array([0.5, 0.25, 0.125, 0.125])
    features = left * np.sqrt(shares) @ right.T
    entropy = -np.sum(shares * np.log(shares))
    assert sample.effective_rank(features) == pytest.approx(np.exp(entropy))


def test_networks_of_one_seed_are_equal():
    first, second = (sample.network(3, 2, seed=1) for _ in range(2))
    keras.tree.map_structure(
        np.testing.assert_array_equal, first.get_weights(), second.get_weights()
    )
    assert len(first.layers) == 3
