import keras
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
yaml = pytest.importorskip("yaml")

from matplotlib.figure import Figure  # noqa: E402

from pipelines.studies import separable, settings  # noqa: E402
from pipelines.studies.separable import network  # noqa: E402
from pipelines.studies.separable.slimtrain import (  # noqa: E402
    LEAST_STRENGTH,
    Batch,
    LastLayer,
    changes,
)

TINY = {
    "sizes": [12, 16],
    "validation": 10,
    "test": 10,
    "hidden": 4,
    "code": 2,
    "epochs": 2,
    "batch_size": 6,
    "rates": [0.001, 0.01],
    "other_rates": [0.001],
    "rate": 0.001,
    "strength": 0.05,
    "memory": 1,
    "fixed": [0.01],
    "switches": [1, 2],
    "seeds": 1,
}


@pytest.fixture
def batches():
    """Eight batches: features `(b, p)`, targets `(b, C)`."""
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal((5, 3)), rng.standard_normal((5, 2))) for _ in range(8)
    ]


def scaled(features, targets):
    root = np.sqrt(len(features))
    return np.c_[features, np.ones(len(features))] / root, targets / root


def kronecker(rows, outputs):
    """The Jacobian of `vec(Z W)` in `vec(W)`, row by row."""
    return np.kron(rows, np.eye(outputs))


def test_one_pass_with_full_memory_is_ridge_regression(batches):
    layer = LastLayer(np.zeros((4, 2)), strength=0.05, chosen=True, memory=None)
    for features, targets in batches:
        layer.step(features, targets)
    rows, targets = (
        np.concatenate(parts)
        for parts in zip(*(scaled(*batch) for batch in batches), strict=True)
    )
    assert layer.strength != 0.05
    ridge = np.linalg.solve(
        rows.T @ rows + layer.strength * np.eye(4), rows.T @ targets
    )
    np.testing.assert_allclose(layer.weights, ridge, atol=1e-13)


@pytest.mark.parametrize("chosen", [True, False])
def test_steps_are_those_of_the_matrices_written_out(batches, chosen):
    weights = np.random.default_rng(1).standard_normal((4, 2))
    layer = LastLayer(weights, strength=0.05, chosen=chosen, memory=2)
    x, strength = weights.ravel(), 0.05
    for index, batch in enumerate(batches):
        layer.step(*batch)
        change = layer.strength - strength
        strength = layer.strength
        jacobians = [
            kronecker(scaled(*each)[0], 2)
            for each in batches[max(0, index - 2) : index + 1]
        ]
        gram = sum(each.T @ each for each in jacobians)
        residuals = jacobians[-1] @ x - scaled(*batch)[1].ravel()
        slope = jacobians[-1].T @ residuals + change * x
        x = x - np.linalg.solve(gram + strength * np.eye(8), slope)
        np.testing.assert_allclose(layer.weights.ravel(), x, atol=1e-12)
    assert (strength == 0.05) != chosen


def test_scores_are_those_of_the_matrices_written_out(batches):
    rng = np.random.default_rng(2)
    weights, strength = rng.standard_normal((4, 2)), 0.3
    rows, targets = scaled(*batches[0])
    gram = rows.T @ rows + np.diag([1.0, 2.0, 0.0, 0.0])
    tried = changes(strength)
    scores = Batch(rows, targets, weights, gram).scores(tried, strength)
    jacobian = kronecker(rows, 2)
    for change, score in zip(tried, scores, strict=True):
        inverse = np.linalg.inv(
            np.kron(gram, np.eye(2)) + (strength + change) * np.eye(8)
        )
        slope = jacobian.T @ (jacobian @ weights.ravel() - targets.ravel())
        after = weights.ravel() - inverse @ (slope + change * weights.ravel())
        residuals = jacobian @ after - targets.ravel()
        free = len(residuals) - np.trace(jacobian @ inverse @ jacobian.T)
        assert score == pytest.approx(residuals @ residuals / free**2, rel=1e-8)


def test_a_singular_gram_matrix_gives_finite_weights():
    layer = LastLayer(np.ones((4, 2)), strength=1e-3, chosen=True, memory=0)
    for _ in range(5):
        layer.step(np.zeros((3, 3)), np.ones((3, 2)))
    assert np.isfinite(layer.weights).all()
    assert layer.strength >= LEAST_STRENGTH


def test_changes_are_of_both_signs_and_keep_lambda_positive():
    for strength in (LEAST_STRENGTH, 0.05, 1e3):
        tried = changes(strength)
        assert tried.max() == pytest.approx(1e3)
        assert (tried.min() < 0) == (strength > LEAST_STRENGTH)
        assert (strength + tried >= LEAST_STRENGTH).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"strength": 0.0}, r"singular. Received: strength=0.0"),
        ({"memory": -1}, r"at least 0, or None. Received: memory=-1"),
    ],
)
def test_last_layer_out_of_range(change, match):
    options = {"strength": 1.0, "chosen": True, "memory": 5}
    with pytest.raises(ValueError, match=match):
        LastLayer(np.zeros((2, 1)), **{**options, **change})


def test_the_draws_share_no_image_and_do_not_depend_on_n():
    few, many = (network.Images.drawn(n, 40, 30, seed=1) for n in (8, 50))
    np.testing.assert_array_equal(few.validation, many.validation)
    np.testing.assert_array_equal(few.test, many.test)
    drawn = np.concatenate([many.train, many.validation, many.test])
    assert len(np.unique(drawn, axis=0)) == 120


def test_slimtrain_leaves_the_last_layer_to_the_closed_form():
    x = network.Images.drawn(12, 1, 1, seed=0).train
    model = network.autoencoder(4, 2, seed=0)
    initial = model.get_weights()
    step = network.slimtrain(model, 0.01, strength=0.1, chosen=False, memory=3)
    *_, output = model.layers
    layer = LastLayer(
        np.r_[initial[-2], initial[-1][None]], strength=0.1, chosen=False, memory=3
    )
    for batch in (x[:6], x[6:]):
        features = keras.Model(model.inputs[0], output.input).predict_on_batch(batch)
        layer.step(features, batch)
        step(batch)
        kernel, bias = output.get_weights()
        np.testing.assert_allclose(kernel, layer.weights[:-1], atol=1e-6)
        np.testing.assert_allclose(bias, layer.weights[-1], atol=1e-6)
    trunk = [np.array(weight) for weight in model.trainable_weights]
    assert len(trunk) == 6
    moved = [np.abs(a - b).max() for a, b in zip(trunk, initial[:6], strict=True)]
    assert min(moved) > 1e-3


def test_every_epoch_takes_each_image_once():
    taken = []
    x = np.arange(14)
    for epoch in network.epochs(taken.append, x, count=3, batch_size=4, seed=0):
        assert len(taken) == 3 * epoch
    for epoch in range(3):
        assert len(np.unique(taken[3 * epoch : 3 * epoch + 3])) == 12


def test_the_study_end_to_end():
    raw = settings.load()["separable"]
    assert set(raw) == set(TINY)
    cells = separable.cells(raw)
    # Further values of Lambda for one number of images.
    per_seed = 3 * len(raw["sizes"]) + len(raw["fixed"]) - 1
    assert len(cells) == raw["seeds"] * per_seed
    cells = separable.cells(TINY)
    rows = [row for cell in cells for row in separable.measure(TINY, cell)]
    methods = {row["method"] for row in rows}
    assert methods == {"Adam", "slimTrain", "fixed Lambda = 0.01", "two phases"}
    # After two epochs each: two rates for 16 images, one for 12, of three methods. At
    # one rate the head is solved after each epoch, at the other after the last.
    assert len(rows) == 3 * 2 * (2 + 1) + 2 * 2 + 1
    assert all(np.isfinite(row["test"]) for row in rows)
    # The same network and the same first batch; one step of closed form is better.
    first = {
        row["method"]: row["train"]
        for row in rows
        if (row["epoch"], row["n"], row["rate"]) == (1, 12, 0.001)
    }
    assert first["slimTrain"] < first["Adam"]
    claims = separable.claims(rows, TINY)
    assert len({claim.name for claim in claims}) == len(claims) == 2 * 4 + 2
    assert all(claim.verdict() for claim in claims)
    separable.draw(Figure().subplots(1, separable.PANELS), rows)


def test_the_test_draw_chooses_nothing():
    row = {"method": "Adam", "n": 5, "epoch": 1, "seed": 0}
    rows = [
        {**row, "rate": 0.1, "validation": 1.0, "test": 4.0},
        {**row, "rate": 0.2, "validation": 2.0, "test": 3.0},
    ]
    assert separable.best(rows, "Adam", 5, 1) == [4.0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"widths": 3}, "`studies.separable` has no key 'widths'"),
        ({"code": 0}, r"separable.code` .* between 1 and .* Received: code=0"),
        ({"rates": []}, r"separable.rates` .* Received: rates=\[\]"),
        ({"rates": ["1e-4"]}, r"separable.rates` .* Received: rates=\['1e-4'\]"),
        ({"fixed": [0.0]}, r"separable.fixed` .* Received: fixed=\[0.0\]"),
        ({"batch_size": 13}, r"full batch. Received: batch_size=13"),
        ({"sizes": [1790]}, r"1797 digits. Received: 1810"),
        ({"rate": 0.01}, r"and of `other_rates`. Received: rate=0.01"),
        ({"switches": [1]}, r"the last epoch. Received: switches=\[1\]"),
    ],
)
def test_settings_that_make_no_sense(change, match):
    with pytest.raises(ValueError, match=match):
        separable.cells({**TINY, **change})
