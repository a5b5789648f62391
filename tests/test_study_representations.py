import copy
import itertools

import keras
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
yaml = pytest.importorskip("yaml")

if keras.backend.backend() != "tensorflow":
    pytest.skip("pipelines run on TensorFlow", allow_module_level=True)

from matplotlib.figure import Figure  # noqa: E402
from scipy import linalg  # noqa: E402

from pipelines import study  # noqa: E402
from pipelines.studies import representations  # noqa: E402
from pipelines.studies.representations import (  # noqa: E402
    heads,
    representation,
    sizes,
    target,
)
from pipelines.studies.representations.draws import Draw  # noqa: E402

TINY = {
    "dimensions": [3, 4],
    "smallest": [10, 20],
    "largest": [20, 30],
    "step": 1.5,
    "ratio": 1.5,
    "validation": 50,
    "test": 60,
    "ridges": [0.001, 0.1],
    "penalties": {"raw": [0.0002, 0.002], "neural": [0.002, 0.02]},
    "units": {"raw": 12, "neural": 8, "ungated": 4},
    "iterations": 5,
    "certificate": {
        "d": 3,
        "n": 20,
        "widths": [2, 8],
        "ungated": [4],
        "penalty": 0.02,
        "iterations": 50,
    },
    "limits": {"d": 4, "sizes": [10, 20]},
    "seeds": 1,
}


@pytest.fixture(scope="module")
def rows():
    return [
        row
        for cell in representations.cells(TINY)
        for row in representations.measure(TINY, cell)
    ]


# The study ---------------------------------------------------------------------------


def test_the_committed_settings_have_the_same_keys():
    settings = study.load()["representations"]
    representations.cells(settings)
    assert settings["seeds"] >= 3
    assert set(settings) == set(TINY)


def test_rows_repeat_their_cells_and_cells_their_rows(rows):
    cells = representations.cells(TINY)
    for cell in cells:
        assert any(cell.items() <= row.items() for row in rows)
    again = representations.measure(TINY, cells[0])
    assert again == [row for row in rows if cells[0].items() <= row.items()]
    assert {row["kind"] for row in rows} == {"samples", "certificate", "limit"}


def test_claims_and_figure(rows):
    claims = representations.claims(rows, TINY)
    assert len({claim.name for claim in claims}) == len(claims) == 18
    figure = Figure()
    axes = list(figure.subplots(1, representations.PANELS))
    representations.draw(axes, rows)
    figure.canvas.draw()
    assert len(axes[0].get_legend_handles_labels()[1]) == 5


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["depth"], 3, "`studies.representations` has no key 'depth'"),
        (["units", "wide"], 3, "`studies.representations.units` has no key 'wide'"),
        (["dimensions"], [0, 4], "dimensions` must be a list of integers"),
        (["dimensions"], [4], "two different ones"),
        (["smallest"], [10], "two different ones"),
        (["step"], 1.0, "step` must be one number between 1.01"),
        (["ratio"], -1.0, "ratio` must be one number"),
        (["penalties", "raw"], [0.0], "penalties.raw` must be a list of numbers"),
        (
            ["certificate", "widths"],
            [2.5],
            "certificate.widths` must be a list of integers",
        ),
        (["limits", "sizes"], [], "limits.sizes` must be a list of integers"),
        (["seeds"], True, "seeds` must be one integer"),
    ],
)
def test_settings_out_of_range(path, value, message):
    settings = copy.deepcopy(TINY)
    place = settings
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        representations.cells(settings)


# The target --------------------------------------------------------------------------


def test_moments_are_those_of_the_sphere():
    d = 5
    z = target.sphere(np.random.default_rng(0), 200_000, d)[:, 0]
    for k, tolerance in ((1, 0.01), (2, 0.01), (3, 0.02), (4, 0.03), (6, 0.2)):
        assert np.mean(z**k) == pytest.approx(target.moment(d, k), abs=tolerance)


@pytest.mark.parametrize("d", [3, 8, 16])
def test_the_target_is_purely_of_degree_4(d):
    # Gauss quadrature of the density (1 - t^2)^((d - 3) / 2) of t = z / sqrt(d).
    t, w = np.polynomial.legendre.leggauss(400)
    w = w * (1 - t**2) ** ((d - 3) / 2)
    w /= w.sum()
    z = np.sqrt(d) * t
    y = target.values(z, d, target.PURE)
    assert w @ y == pytest.approx(0.0, abs=1e-10)
    assert w @ y**2 == pytest.approx(1.0, rel=1e-8)
    for k in (1, 2, 3):
        assert w @ (y * z**k) == pytest.approx(0.0, abs=1e-8)
    assert w @ (y * z**4) > 0.1
    plain = target.values(z, d, target.PLAIN)
    assert [w @ plain, w @ plain**2] == pytest.approx([0.0, 1.0], abs=1e-8)
    # Most of its variance is of degree 2.
    normed = (z**2 - 1) / np.sqrt(w @ (z**2 - 1) ** 2)
    assert (w @ (plain * normed)) ** 2 > 0.5


# The representation ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [representation.SOFTPLUS, representation.STEP])
def test_the_representation_is_white(kind):
    d, D = 4, 20
    layer = representation.units(np.random.default_rng(0), d, D, kind)
    h = representation.white(np.random.default_rng(1), d, layer, D)
    # The unlabelled inputs, drawn once more.
    x = target.sphere(np.random.default_rng(1), 20 * D, d)
    seen = h(x)
    np.testing.assert_allclose(seen.T @ seen / len(x), np.eye(seen.shape[1]), atol=1e-8)
    # It is linear in the layer.
    g = layer(x)
    fitted = g @ np.linalg.lstsq(g, seen, rcond=None)[0]
    np.testing.assert_allclose(fitted, seen, atol=1e-6)


def test_width_of_the_layer():
    assert [representation.width(d, 1.5) for d in (8, 12, 16)] == [67, 136, 229]


def test_step_units_lack_most_of_a_square():
    settings = {**TINY, "test": 4000}
    smooth = Draw(settings, 8, 0)
    steps = Draw(settings, 8, 0, units=representation.STEP)
    assert smooth.beyond() < 0.15
    assert steps.beyond() > 0.5


# Heads -------------------------------------------------------------------------------


def test_linear_is_ridge_regression():
    rng = np.random.default_rng(0)
    u, y, others = rng.standard_normal((9, 4)), rng.standard_normal(9), np.eye(4)
    found = heads.linear(u, y, [0.1, 1.0], others)
    for column, ridge in zip(found.T, [0.1, 1.0], strict=True):
        expected = linalg.solve(u.T @ u / 9 + ridge * np.eye(4), u.T @ y / 9)
        np.testing.assert_allclose(column, expected, rtol=1e-10)


def test_tangent_kernel_is_that_of_a_wide_network(monkeypatch):
    monkeypatch.setattr(heads, "_ROWS", 2)
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((5, 3)), rng.standard_normal((4, 3))
    v[0] = 2 * u[0]
    # Gradients in the first layer of sum_r a_r relu(w_r . u) / sqrt(m), a_r = +-1.
    w = rng.standard_normal((3, 400_000))
    open_u, open_v = u @ w > 0, v @ w > 0
    empirical = (u @ v.T) * (open_u @ open_v.T.astype("float64")) / w.shape[1]
    found = heads.tangent_kernel(u, v)
    np.testing.assert_allclose(found, 2 * empirical / 3, atol=0.01)
    assert found[0, 0] == pytest.approx(2 * u[0] @ u[0] / 3, rel=1e-3)


def test_kernel_regression_by_conjugate_gradients():
    rng = np.random.default_rng(0)
    u, others = rng.standard_normal((60, 5)), rng.standard_normal((7, 5))
    y, ridges = rng.standard_normal(60), [0.01, 1.0]
    K = heads.tangent_kernel(u, u).astype("float64")
    k = heads.tangent_kernel(others, u).astype("float64")
    found = heads.kernel(u, y, ridges, others)
    for column, ridge in zip(found.T, ridges, strict=True):
        exact = k @ linalg.solve(K + ridge * np.eye(60), y, assume_a="pos")
        np.testing.assert_allclose(column, exact, atol=2e-3)


def test_conjugate_gradients_that_do_not_converge(monkeypatch):
    monkeypatch.setattr(heads, "_STEPS", 2)
    K = np.diag(np.logspace(-6, 0, 20)).astype("float32")
    with pytest.raises(RuntimeError, match=r"not converged after 2 steps.*1e-08"):
        heads.solve(K, np.ones(20), [1e-8])


def test_the_path_of_penalties_ends_at_the_same_minima():
    rng = np.random.default_rng(0)
    u, y = rng.standard_normal((40, 4)), rng.standard_normal(40)

    def predictions(penalties):
        return heads.quadratic(
            u,
            y,
            penalties,
            u[:5],
            units=6,
            second_derivative="one",
            iterations=500,
            seed=0,
        )

    path = predictions([0.01, 0.1])
    for column, penalty in zip(path.T, [0.01, 0.1], strict=True):
        np.testing.assert_allclose(predictions([penalty])[:, 0], column, atol=1e-4)


# Numbers of samples ------------------------------------------------------------------


def test_draws_of_more_samples_begin_with_the_same_ones():
    one, other = Draw(TINY, 3, 1), Draw(TINY, 3, 1)
    x, y = one.sample(4)
    more, values = other.sample(9)
    np.testing.assert_array_equal(more[:4], x)
    np.testing.assert_array_equal(values[:4], y)
    np.testing.assert_array_equal(one.sample(9)[0], more)


def test_crossings():
    # On a straight line in log n.
    assert sizes.crossing([100, 200, 400], [0.9, 0.7, 0.4]) == pytest.approx(
        200 * 2 ** (2 / 3)
    )
    assert sizes.crossing([100, 200], [0.9, 0.7]) == pytest.approx(400)
    assert sizes.crossing([100, 200], [0.9, 1.1]) == 200
    assert sizes.crossing([100], [0.4]) == 100


def test_exponents_of_known_powers():
    rows = []
    for d, seed in itertools.product([8, 16], [0, 1]):
        at_half = d ** (2 + seed)
        for n, error in ((at_half // 2, 0.75), (2 * at_half, 0.25)):
            row = {"head": "quadratic", "input": "raw", "d": d, "seed": seed}
            rows.append({"kind": "samples", "n": n, "error": error, **row})
    found = sizes.exponents(rows, "quadratic", "raw")
    assert found == pytest.approx([2.0, 3.0])
    assert not any(row["extrapolated"] for row in sizes.halves(rows))
