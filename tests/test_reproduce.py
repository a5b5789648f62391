from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

from fabricated import fabricate, grid, provenance

from pipelines import quickstart, reproduce
from pipelines.layout import Layout
from pipelines.params import Run

METHODS = ("base", "base_bn", "dalign", "solve")
ERRORS = (0.02, 0.03, 0.04)
# The committed mean is 3 %, the deviation a point, the quantile of two degrees of
# freedom 4.303: the mean of three others is expected within 3.513 points of it.
HALF = 0.03513


def made(root: Path, shift=None, **changes):
    """Results of all methods, the errors of some of them shifted."""
    root.mkdir(exist_ok=True)
    params = grid(root, methods=METHODS, seeds=(0, 1, 2))
    for run in params.grid.runs():
        error = ERRORS[run.seed] + (shift or {}).get(run.method, 0.0)
        metrics = {"nll": 0.1 * (1 + run.seed)} if run.method != "solve" else {}
        fabricate(Layout(root), run, error, metrics=metrics, **changes)
    return params


@pytest.fixture
def committed(tmp_path):
    made(tmp_path / "committed")
    return tmp_path / "committed"


def test_one_cell_of_each_kind(tmp_path, committed, capsys):
    fresh = tmp_path / "fresh"
    made(fresh, {"base_bn": HALF - 1e-4, "dalign": HALF + 1e-4}, device="another")
    Layout(fresh).metrics(Run("digits", "none", "solve", 1)).unlink()
    with pytest.raises(SystemExit) as stop:
        reproduce.cli(["--fresh", str(fresh), "--root", str(committed)])
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    for row in (
        "| base | 3.00 | 3.00 | -0.51 to 6.51 | bit-equal |",
        "| base, re-estimated | 3.00 | 6.50 | -0.51 to 6.51 | within the interval |",
        "| default | 3.00 | 6.52 | -0.51 to 6.51 | different |",
        "| solve | not run | not run | not run | not run |",
    ):
        assert f"| Digits, no augmentation {row}" in lines
    assert lines[-1] == (
        "Of 4 methods and cells: 1 bit-equal, 1 within the interval, 1 different, "
        "1 not run."
    )
    assert any("on abacus, 2" in line and "on another, 2" in line for line in lines)


def test_what_reproduces_ends_well(tmp_path, committed):
    made(tmp_path / "fresh", {"base_bn": 0.001})
    line = ["--fresh", str(tmp_path / "fresh"), "--root", str(committed)]
    reproduce.cli(line)
    # A chosen part alone is looked at, with as many seeds as are chosen.
    made(tmp_path / "fresh", {"base": 0.2, "dalign": 0.001})
    for run_of in ("base", "dalign"):
        Layout(tmp_path / "fresh").metrics(Run("digits", "none", run_of, 2)).unlink()
    reproduce.cli([*line, "--method", "dalign", "--seed", "0", "1"])
    with pytest.raises(SystemExit):
        reproduce.cli([*line, "--method", "base", "--seed", "0", "1"])


def test_the_least_bit_counts_and_the_nll_is_looked_at(tmp_path, committed):
    fresh = tmp_path / "fresh"
    made(fresh)
    # Older results lack what new code records beside: it cannot be compared.
    for seed in range(3):
        nll, gap = {"nll": 0.1 * (1 + seed)}, 0.02 * (1 + seed)
        for method, changes in {
            "base": {"metrics": nll | {"ece": 0.5}},
            "base_bn": {"metrics": nll, "gap": gap + 1e-17},
            "dalign": {"metrics": {"nll": 5.0}},
        }.items():
            run = Run("digits", "none", method, seed)
            fabricate(Layout(fresh), run, ERRORS[seed], **changes)
    found = [row[-1] for row in reproduce.main(fresh=fresh, root=committed).rows]
    assert found == ["bit-equal", "within the interval", "different", "bit-equal"]


def test_one_seed_has_no_interval(tmp_path):
    for name, error in (("committed", 0.03), ("fresh", 0.031)):
        (tmp_path / name).mkdir()
        params = grid(tmp_path / name, methods=("base",), seeds=(0,))
        fabricate(Layout(tmp_path / name), *params.grid.runs(), error)
    (row,) = reproduce.main(fresh=tmp_path / "fresh", root=tmp_path / "committed").rows
    assert row[-2:] == ("unknown: one seed", "different")


def test_runs_are_made_where_none_are_given(tmp_path, committed, monkeypatch):
    asked = []

    def run(params, root):
        asked.append((params.grid, root))
        made(root)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "run", run)
    old = reproduce.OUT / "quick" / "old"
    old.mkdir(parents=True)
    table = reproduce.main(only={"method": ["base", "solve"]}, root=committed)
    ((found, root),) = asked
    assert (found.methods, found.seeds) == (("base", "solve"), (0, 1, 2))
    assert root == reproduce.OUT / "quick"
    assert not old.exists()
    assert [row[-1] for row in table.rows] == ["bit-equal"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"profile": "studies"}, "no such profile with a grid"),
        ({"only": {"method": ["adam"]}}, "no such method. Received: adam; there are"),
        ({"only": {"seed": [3]}}, "no such seed. Received: 3; there are 0, 1, 2"),
        ({"fresh": Path("nowhere")}, "nothing to compare"),
    ],
)
def test_reproduce_refuses(committed, arguments, message):
    with pytest.raises(ValueError, match=message):
        reproduce.main(root=committed, **arguments)


def test_reproduce_refuses_to_run_for_hours(tmp_path):
    profile = tmp_path / "profiles" / "cpu"
    profile.mkdir(parents=True)
    made(profile)
    with pytest.raises(ValueError, match="choose runs by --dataset"):
        reproduce.main("cpu", root=tmp_path)


def test_reproduce_refuses_other_data(tmp_path, committed):
    other = provenance("digits")["data_sha256"] + "0"
    made(tmp_path / "fresh", data_sha256=other)
    with pytest.raises(ValueError, match="same data only"):
        reproduce.main(fresh=tmp_path / "fresh", root=committed)
