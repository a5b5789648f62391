import keras
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
yaml = pytest.importorskip("yaml")

from matplotlib.figure import Figure  # noqa: E402

import keras_dalign as kd  # noqa: E402
from pipelines.studies import parametrizations as study  # noqa: E402
from pipelines.studies import settings as all_settings  # noqa: E402
from pipelines.studies.parametrizations import network  # noqa: E402

TINY = {
    "n": 6,
    "base": 4,
    "widths": [8, 16],
    "deep_widths": [8, 16],
    "adam_widths": [8, 16],
    "uneven_widths": [32, 64],
    "steps": 3,
    "adam_steps": 2,
    "uneven_steps": 2,
    "learning_rate": 0.1,
    "adam_learning_rate": 0.001,
    "seeds": 1,
}


def test_the_section_has_these_settings():
    assert set(all_settings.load()["parametrizations"]) == set(TINY)
    assert study.cells(all_settings.load()["parametrizations"])


def test_every_cell_is_measured_claimed_and_drawn(monkeypatch):
    cells = study.cells(TINY)
    assert len(cells) == 2 * sum(len(run.kinds) for run in study.RUNS.values())
    # A network of each run, and of each kind: building them is what takes the time.
    rows = []
    for cell in cells:
        chosen = cell["kind"] == "mup" or cell["run"] == "sgd"
        if chosen and cell["width"] in {8, 32}:
            rows += study.measure(TINY, cell)
    for row in rows:
        assert 0 < row["change"] < 2
        assert row["lambda_min"] > 0 or row["run"].startswith("uneven")
        if not study.RUNS[row["run"]].check:
            assert row["bound"] >= row["loss"] * (1 - 1e-6)
    assert {row["layer"] for row in rows if row["run"] == "deep"} == {1, 2, 3, 4, 5}
    # What was not measured is like what was, wider.
    known = {(r["run"], r["layer"]): r for r in rows if r["kind"] == "mup"}
    filled = [
        {**known[cell["run"], layer], **cell, "change": 1 / cell["width"]}
        for cell in cells
        for layer in range(1, 1 + len(study.RUNS[cell["run"]].factors))
    ]
    claims = {claim.name: claim for claim in study.claims(filled, TINY)}
    assert claims["sgd_ntk_change"].values == pytest.approx([-1.0])
    assert claims["sgd_ntk_change"].verdict() == "seen"
    assert claims["deep_mup_change"].verdict() == "not seen"
    assert claims["adam_mup_loss"].values == pytest.approx([0.0])
    assert claims["deep_losses"].values == pytest.approx([1.0])
    assert claims["uneven_adam_mup_change"].verdict() == "not seen"
    axes = Figure().subplots(1, study.PANELS)
    study.draw(axes, filled)
    assert all(panel.get_title() and panel.get_xlabel() for panel in axes)


def test_training_is_that_of_half_the_squared_error():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 16)), rng.normal(size=(7, network.OUTPUTS))
    model = network.parametrized("mup", "sgd", 8, 8, (1.0,), use_bias=False, seed=0)
    w, v = (value.astype("float64") for value in model.get_weights())
    for _ in range(4):
        z = np.tanh(x @ w)
        residual = (z @ v - y) / len(x)
        slope = residual @ v.T * (1 - z**2)
        w, v = w - 0.1 * x.T @ slope, v - 0.1 * z.T @ residual
    network.train(model, x, y, optimizer="sgd", learning_rate=0.1, steps=4)
    for value, expected in zip(model.get_weights(), (w, v), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)
    (z,) = network.features(model, x)
    np.testing.assert_allclose(z, np.tanh(x @ w), atol=1e-5)


def test_smallest_eigenvalue_of_the_gram_matrix():
    z = np.random.default_rng(0).normal(size=(5, 9))
    expected = np.linalg.eigvalsh(z @ z.T / 9)[0]
    assert network.smallest_eigenvalue(z) == pytest.approx(expected)
    assert network.smallest_eigenvalue(z.T) == 0.0


def test_rest_means_minimum():
    """The loss is at most `N |G|^2 / (2 a^2 lambda_min)`, and so is certify's bound."""
    rng = np.random.default_rng(0)
    n = 6
    x, y = rng.normal(size=(n, 16)), rng.normal(size=(n, network.OUTPUTS))
    for kind in ("mup", "ntk"):
        model = network.parametrized(
            kind, "sgd", 32, 8, (1.0, 1.0), use_bias=False, seed=1
        )
        multiplier = model.layers[-2].scale
        assert isinstance(model.layers[-2], keras.layers.Rescaling)
        assert multiplier == pytest.approx(0.5)
        h = network.features(model, x)[-1]
        residual = multiplier * h @ model.get_weights()[-1].astype("float64") - y
        gradient = multiplier * h.T @ residual / n
        smallest = np.linalg.eigvalsh(h @ h.T)[0]
        bound = n * np.sum(gradient**2) / (2 * multiplier**2 * smallest)
        loss = np.sum(residual**2) / (2 * n)
        certificate = kd.certify(model, x, y, loss="mse", gradient_bound=True)
        half = network.OUTPUTS / 2
        assert half * certificate.loss == pytest.approx(loss, rel=1e-5)
        assert loss <= bound
        # Sharper up to a factor of two, as it does not use that the loss is quadratic.
        assert loss <= half * certificate.gradient_bound.gap <= 2 * bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": [4]}, "no key 'width'; the nearest is 'widths'"),
        ({"base": 0}, r"zations.base`.*between 1.*base=0"),
        ({"widths": [8, -1]}, r"zations.widths`.*between 1"),
        ({"uneven_widths": [2, 8]}, r"zations.uneven_widths`.*between 4"),
        ({"adam_widths": [8]}, r"two or more different widths.*adam_widths=\[8\]"),
        ({"seeds": 0}, r"zations.seeds`.*between 1"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        study.cells({**TINY, **change})
