import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

from fabricated import fabricate, grid, provenance

from pipelines import closure, files, origins, readme, report, study_report
from pipelines.layout import Layout
from pipelines.params import FILE, Run, load
from pipelines.reporting import curves, frontier, page, texts
from pipelines.reporting.results import read
from pipelines.studies import settings
from pipelines.studies.claims import Claim

ROOT = Path(__file__).resolve().parent.parent


def run_of(method, seed=0, dataset="digits", augmentation="none"):
    return Run(dataset, augmentation, method, seed)


def test_table_is_what_the_hand_computes(tmp_path):
    params, layout = grid(tmp_path), Layout(tmp_path)
    for seed in (0, 1):
        calibration = {"nll": 0.2 + 0.1 * seed, "ece": 0.04 + 0.02 * seed}
        base = run_of("base", seed)
        fabricate(layout, base, 0.03, seconds=10.0, metrics=calibration)
        fabricate(layout, run_of("base_bn", seed), 0.02 + 0.02 * seed)
    # A method of which a seed is missing was not run.
    fabricate(layout, run_of("two_phase_random"), 0.5)
    # Files of a seed that is not in the grid are not looked at.
    fabricate(layout, run_of("base", 7), 1.0)

    path = report.main(params=params, root=tmp_path)

    lines = path.read_text(encoding="utf-8").splitlines()
    # Re-estimated: errors 2 and 4 %: mean 3, deviation sqrt(2); seconds 2 and 3, over
    # 10 each: sqrt(0.06) = 0.245, and log(1.5) / 2 for the error of the logarithm.
    # Base: differences +1 and -1 points: error 1, times the quantile 12.71.
    assert (
        "| base | 3.00 ± 0.00 | 0.250 | 5.0 | not recorded | 0.00 [-12.71, +12.71] | "
        "1.5e-02 | 4.0e-02 | no switch | 10.0 | 1 |"
    ) in lines
    assert (
        "| base, re-estimated | 3.00 ± 1.41 | not recorded | not recorded | not "
        "recorded | itself | 1.5e-02 | 4.0e-02 | no switch | 2.5 | 0.24 [0.02, 3.22] |"
    ) in lines
    assert (
        f"| two-phase, random gates | not run (1 of 2 seeds) |{' not run |' * 9}"
    ) in lines
    summary = files.read_json(layout.summary)["digits"]["none"]
    assert set(summary) == {"base", "base_bn"}
    assert summary["base"]["error_rate"] == pytest.approx(0.03)
    assert summary["base"]["gap"] == 0.04
    assert summary["base"]["nll"] == pytest.approx(0.25)
    assert "nll" not in summary["base_bn"]
    assert summary["base"]["difference_standard_error"] == pytest.approx(0.01)
    assert "seconds" not in json.dumps(summary)
    rows = list(csv.DictReader(io.StringIO(layout.csv.read_text(encoding="utf-8"))))
    assert len(rows) == 6
    assert [row["nll"] for row in rows[:2]] == ["0.2", ""]
    assert rows[2]["switch_rank"] == "1200"
    assert rows[2]["seconds_exploit"] == "0.5"
    assert rows[2]["commit"] == "0123456789abcdef"
    assert rows[5]["error_rate"] == rows[5]["commit"] == ""


def test_nothing_says_not_run(tmp_path):
    params = grid(tmp_path)
    text = report.main(params=params, root=tmp_path).read_text(encoding="utf-8")
    assert f"| base |{' not run |' * 10}" in text.splitlines()
    layout = Layout(tmp_path)
    assert not layout.figure("digits-none").exists()
    assert "not run" in layout.html.read_text(encoding="utf-8")
    assert files.read_json(layout.summary) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"synthetic": True}, "Synthetic"),
        ({"data_sha256": "other"}, "same data"),
        ({"data_sha256": None}, "which data"),
    ],
)
def test_report_refuses(tmp_path, changes, message):
    params = grid(tmp_path)
    fabricate(Layout(tmp_path), run_of("base", 0), 0.1)
    fabricate(Layout(tmp_path), run_of("base", 1), 0.1, **changes)
    with pytest.raises(ValueError, match=message):
        report.main(params=params, root=tmp_path)


def test_report_refuses_a_synthetic_frontier(tmp_path):
    section = {"datasets": ["digits"], "method": "two_phase_random", "explore": [0.5]}
    params, layout = grid(tmp_path, frontier=section), Layout(tmp_path)
    made = provenance("digits", synthetic=True)
    for seed in params.grid.seeds:
        path = layout.frontier("digits", seed)
        files.write_json(path, {"points": [], "provenance": made})
    with pytest.raises(ValueError, match="frontier of digits"):
        report.main(params=params, root=tmp_path)


@pytest.mark.parametrize("title", ["MNIST (5,000 of 60,000)", "MNIST"])
def test_partial_data_never_carry_the_name_alone(tmp_path, title):
    methods = ("base", "base_short", "dalign")
    params = grid(tmp_path, datasets=("mnist",), methods=methods)
    layout = Layout(tmp_path)
    for run in params.grid.runs():
        fabricate(layout, run, 0.1, partial=True, title=title)
    report.main(params=params, root=tmp_path)
    wanted = title if "(" in title else "MNIST (partial)"
    for path in (layout.table, layout.overview, layout.html):
        text = path.read_text(encoding="utf-8")
        assert wanted in text
        assert text.count("MNIST") == text.count(wanted)


def test_uncommitted_changes_are_told(tmp_path):
    params, layout = grid(tmp_path), Layout(tmp_path)
    for run in params.grid.runs():
        fabricate(layout, run, 0.1, dirty=run.seed == 1)
    text = report.main(params=params, root=tmp_path).read_text(encoding="utf-8")
    assert "**3 of 6 runs were made with uncommitted changes.**" in text
    assert "commit 0123456789 with uncommitted changes (3 runs)" in text
    html = layout.html.read_text(encoding="utf-8")
    assert "3 of 6 runs were made with uncommitted changes" in html


def test_figures_are_drawn_and_repeat_byte_for_byte(tmp_path):
    sections = {
        "frontier": {
            "datasets": ["digits"],
            "method": "two_phase_random",
            "explore": [0.5, 1.0],
        },
        "tune": {"datasets": ["digits"], "recipes": ["cosine"]},
    }
    methods = ("base", "base_bn", "base_short", "dalign", "dalign_better", "letter")
    params, layout = grid(tmp_path, methods=methods, **sections), Layout(tmp_path)
    for run in params.grid.runs():
        nll = {"nll": 0.1} if run.method != "letter" else {}
        fabricate(layout, run, 0.1 + 0.01 * run.seed, metrics=nll)
    rows = [
        {
            "seed": s,
            "explore": x,
            "seconds": 1.0,
            "error_rate": 0.1,
            "train_loss": x / 10,
        }
        for s in (0, 1)
        for x in (1.0, 0.5)
    ]
    made = provenance("digits")
    for seed in (0, 1):
        own = [row for row in rows if row["seed"] == seed]
        files.write_json(
            layout.frontier("digits", seed),
            {"points": own, "base": own[:1], "base_bn": own[:1], "provenance": made},
        )
        # Of one seed alone nothing is drawn.
        assert len(read(params, layout).frontier) == seed
    files.write_json(
        layout.tuning("digits", "none", "cosine"),
        {
            "validation": 0.2,
            "seed": 0,
            "errors": {"base": 0.125, "base_bn": 0.12},
            "provenance": made,
        },
    )
    results = read(params, layout)
    before = {k: p.read_bytes() for k, p in report.draw(results, layout).items()}
    after = {k: p.read_bytes() for k, p in report.draw(results, layout).items()}
    assert set(before) == {
        *("answer", "errors", "nll", "times"),
        *("curves-digits-none", "frontier-digits"),
    }
    # What wall times decide is not among the files that DVC hashes.
    apart = {k for k, p in report.figures(results, layout).items() if "time-" in str(p)}
    assert set(before) - apart == {"errors", "nll"}
    seconds = {method: 9.0 + k for k, method in enumerate(methods)}
    before_the_times = before["errors"], before["nll"]
    for run in params.grid.runs():
        path = layout.timing(run)
        files.write_json(path, files.read_json(path) | {"seconds": seconds[run.method]})
    slower = report.draw(read(params, layout), layout)
    assert before_the_times == tuple(slower[k].read_bytes() for k in ("errors", "nll"))
    assert before["answer"] != slower["answer"].read_bytes()
    assert all(each.startswith(b"\x89PNG") for each in before.values())
    assert before == after
    assert frontier.by_share(rows, "seconds", 2.0) == {0.5: [2.0, 2.0], 1.0: [2.0, 2.0]}
    assert "| cosine | 12.50 | 12.00 | best, used |" in texts.full(results)


def test_curves_of_unequal_length_keep_their_last_value(tmp_path):
    params, layout = grid(tmp_path), Layout(tmp_path)
    short = {
        "epoch": [1, 2],
        "train_loss": [3.0, 2.0],
        "phase": [0, 1],
        "test_epoch": [2],
        "test_error_rate": [0.25],
    }
    fabricate(layout, run_of("letter"), 0.1)
    fabricate(layout, run_of("letter", 1), 0.1, metrics={"curves": short})
    params = grid(tmp_path, methods=("base", "letter"))
    runs = read(params, layout).of("digits", "none", "letter")
    epochs, values = curves.series(runs, "train_loss")
    assert epochs.tolist() == [1, 2, 3, 4]
    assert values.tolist() == [[1.0, 0.5, 0.25, 0.125], [3.0, 2.0, 2.0, 2.0]]
    epochs, values = curves.series(runs, "error_rate")
    assert epochs.tolist() == [2, 4]
    assert values.tolist() == [[0.5, 0.1], [0.25, 0.25]]


def test_epochs_are_spread_evenly_over_the_seconds_of_a_phase(tmp_path):
    methods = ("base", "solve", "letter")
    params, layout = grid(tmp_path, methods=methods, seeds=(0,)), Layout(tmp_path)
    for run in params.grid.runs():
        # Explored for four seconds, two of the switch, two exploited.
        fabricate(layout, run, 0.1, seconds=8.0)
    found = {run.method: each for run, each in read(params, layout).by_run.items()}
    epochs = np.array([1, 2, 3, 4])
    assert curves.seconds(found["base"], epochs).tolist() == [2.0, 4.0, 6.0, 8.0]
    assert curves.seconds(found["letter"], epochs).tolist() == [2.0, 4.0, 7.0, 8.0]
    # The solver has no epochs: its segment leads from here to the end.
    assert curves.seconds(found["solve"], epochs[:2]).tolist() == [2.0, 4.0]


def test_readme_is_filled_between_its_markers(tmp_path):
    params = grid(tmp_path, methods=("base", "base_short", "dalign"))
    layout = Layout(tmp_path)
    for run in params.grid.runs():
        fabricate(layout, run, 0.1)
    report.main(params=params, root=tmp_path)
    path = tmp_path / "README.md"
    empty = "a\n<!-- table quick -->\nold\n<!-- /table quick -->\nz\n"
    path.write_text(empty, encoding="utf-8")
    readme.cli(["--root", str(tmp_path)])
    text = path.read_text(encoding="utf-8")
    inside = layout.overview.read_text(encoding="utf-8")
    assert text == f"a\n<!-- table quick -->\n{inside}<!-- /table quick -->\nz\n"
    assert "| Digits, no augmentation | no worse | 10.00 → 10.00 |" in inside
    assert readme.filled(text, root=tmp_path) == text


def test_readme_says_what_has_changed_in_the_code_since(tmp_path, monkeypatch):
    params, layout = grid(tmp_path), Layout(tmp_path)
    for run in params.grid.runs():
        fabricate(layout, run, 0.1)
    then, commands = closure.on_disk(), report.stages(params)
    path = "keras_dalign/numerics/losses.py"
    tree = {**then, path: then[path] + b"\n# changed"}
    monkeypatch.setattr(origins.repository, "tree", lambda commit: tree)
    report.main(params=params, root=tmp_path)
    said = (
        "Code: commit 0123456789 (6 runs). Changed since, in the code that made these "
        "results: keras_dalign/numerics/losses.py."
    )
    for path in (layout.table, layout.overview, layout.html):
        assert said in path.read_text(encoding="utf-8")
    numbers = layout.csv.read_bytes(), layout.figure("errors").read_bytes()
    # As if the gradient were mended, and another file changed.
    tree["keras_dalign/numerics/losses.py"] = then["keras_dalign/numerics/losses.py"]
    code = files.read_json(layout.code)
    found = closure.digests(tree, commands) | {"pipelines/train.py": "other"}
    code["0123456789abcdef"]["files"] = found
    files.write_json(layout.code, code)
    path = tmp_path / "README.md"
    path.write_text("<!-- table quick -->\n<!-- /table quick -->\n", encoding="utf-8")
    readme.main(root=tmp_path)
    for each in (layout.table, layout.overview, layout.html, path):
        text = each.read_text(encoding="utf-8")
        assert "in the code that made these results: pipelines/train.py." in text
        assert "losses.py" not in text
    assert numbers == (layout.csv.read_bytes(), layout.figure("errors").read_bytes())


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("<!-- table quick -->", ValueError, "1 and 0 of them"),
        ("<!-- /table cpu -->\n<!-- table cpu -->", ValueError, "after it"),
        ("<!-- table gpu -->\n<!-- /table gpu -->", ValueError, "there are quick"),
        ("<!-- table cpu -->\n<!-- /table cpu -->", FileNotFoundError, "no report"),
        ("<!-- claims width -->", ValueError, "1 and 0 of them"),
    ],
)
def test_readme_refuses(tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        readme.filled(text, root=tmp_path)


def test_pages_of_studies_are_filled_between_their_markers(tmp_path):
    folder = tmp_path / readme.PROFILES["studies"]
    folder.mkdir(parents=True)
    (folder / FILE.name).write_text("studies: {width: {n: 3}}", encoding="utf-8")
    page = tmp_path / "docs" / "studies" / "width.md"
    page.parent.mkdir(parents=True)
    (tmp_path / "README.md").write_text("", encoding="utf-8")
    empty = "a\n<!-- claims width -->\n<!-- /claims width -->\nz\n"
    page.write_text(empty, encoding="utf-8")
    readme.main(root=tmp_path)
    assert "-->\nNot run yet.\n<!--" in page.read_text(encoding="utf-8")
    claim = Claim("wide", "The residual is below 1", [0.5], high=1.0)
    metrics = {"width": {"wide": claim.metrics()}}
    files.write_json(Layout(folder).study_metrics, metrics)
    readme.main(root=tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "\n| The residual is below 1 | 0.5 | 1 | seen |\n<!-- /claims" in text
    with pytest.raises(ValueError, match=r"no such study.*claims depth.*are width"):
        readme.filled(empty.replace("width", "depth"), root=tmp_path)


def test_readme_says_what_the_reports_say():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.filled(text) == text


# Also that they say what has changed in the code: `python pipelines readme` does.
@pytest.mark.parametrize("profile", sorted(set(readme.PROFILES) - {"studies"}))
def test_committed_results_are_those_of_the_grid(profile):
    folder = ROOT / readme.PROFILES[profile]
    layout = Layout(folder)
    if not layout.overview.exists():
        pytest.skip(f"no results of the profile {profile} in this checkout")
    results = report.read(load(folder / FILE.name), layout)
    assert layout.table.read_text(encoding="utf-8") == texts.full(results)
    assert layout.overview.read_text(encoding="utf-8") == texts.overview(results)
    assert layout.csv.read_text(encoding="utf-8") == report.runs(results)
    assert json.loads(layout.summary.read_text()) == report.summary(results)
    figures = report.figures(results, layout)
    assert layout.html.read_text(encoding="utf-8") == page.html(results, figures)


def test_committed_studies_say_what_has_changed():
    folder = ROOT / readme.PROFILES["studies"]
    layout, studies = Layout(folder), settings.load(folder / FILE.name)
    wanted = study_report.overview(studies, layout)
    assert layout.overview.read_text(encoding="utf-8") == wanted
    assert set().union(*files.read_json(layout.code).values()) == {"made", "files"}
