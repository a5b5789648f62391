import keras
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
yaml = pytest.importorskip("yaml")

from matplotlib.figure import Figure  # noqa: E402

from pipelines.studies import losses, sample, settings  # noqa: E402
from pipelines.studies.losses import network  # noqa: E402
from pipelines.studies.losses.geometry import CUTOFF, Geometry  # noqa: E402

TINY = {
    "n": 60,
    "test": 20,
    "width": 12,
    "depth": 1,
    "plain_depth": 1,
    "strong_decay": 0.005,
    "weak_decay": 0.0005,
    "epochs": 2,
    "batch_size": 30,
    "rate": 0.1,
    "squared_rate": 0.02,
    "moments": 1,
    "switches": [1, 2],
    "tol": 1e-8,
    "seeds": 1,
}


def simplex(classes, dim, seed=0):
    """Directions of an equiangular tight frame, `(classes, dim)`."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((dim, classes)))[0]
    return (np.eye(classes) - 1 / classes) @ basis.T


def test_of_an_exact_simplex_all_are_zero():
    frame = simplex(5, 8)
    y = np.repeat(np.arange(5), [1, 2, 3, 4, 5])
    shift = np.arange(8.0)
    found = Geometry.of(3 * frame[y] + shift, y, 0.2 * frame.T + shift[:, None])
    assert found.nc1 == pytest.approx(0.0, abs=1e-20)
    assert found.nc2 == pytest.approx(0.0, abs=1e-12)
    assert found.nc3 == pytest.approx(0.0, abs=1e-12)
    assert sample.effective_rank(frame[y]) < 5


def test_measures_are_those_of_the_matrices_written_out():
    rng = np.random.default_rng(0)
    n, p, classes = 30, 7, 4
    y = rng.permutation(np.arange(n) % classes)
    h, kernel = rng.standard_normal((n, p)), rng.standard_normal((p, classes))
    means = [h[y == k].mean(axis=0) for k in range(classes)]
    mean = np.mean(means, axis=0)
    within = sum(
        np.outer(a - means[k], a - means[k]) for a, k in zip(h, y, strict=True)
    )
    between = sum(np.outer(each - mean, each - mean) for each in means) / classes
    inverse = np.linalg.pinv(between, rcond=CUTOFF, hermitian=True)
    found = Geometry.of(h, y, kernel)
    assert found.nc1 == pytest.approx(np.trace(within / n @ inverse) / classes)
    frame = (np.eye(classes) - np.ones((classes, classes)) / classes) / np.sqrt(3)
    a = kernel.T - kernel.T.mean(axis=0)
    for value, matrix in (
        (found.nc2, a @ a.T),
        (found.nc3, a @ (np.array(means) - mean).T),
    ):
        off = matrix / np.linalg.norm(matrix) - frame
        assert value == pytest.approx(np.linalg.norm(off))


@pytest.mark.parametrize(
    ("y", "kernel", "match"),
    [
        ([0, 0, 1, 1], np.ones((2, 3)), r"samples per class \[2, 2, 0\]"),
        ([0, 0, 0, 0], np.ones((2, 1)), r"two classes or more.*Received: 1 outputs"),
        ([0, 0, 1, 2], np.ones((2, 2)), r"Received: 2 outputs"),
    ],
)
def test_classes_that_cannot_be_measured(y, kernel, match):
    with pytest.raises(ValueError, match=match):
        Geometry.of(np.random.default_rng(0).random((4, 2)), y, kernel)


def test_equal_class_means_are_named_with_the_cutoff():
    h = np.array([[1.0, 3.0], [2.0, 1.0], [1.0, 3.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match=r"are equal.*cut-off for rounding of 2.2e-15"):
        Geometry.of(h + 0.5, [0, 0, 1, 1], np.ones((2, 2)))


def test_losses_are_those_of_the_formulas():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 10)).astype("float32")
    y = np.arange(6)
    q = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    own, log = q[y, y], np.log(q)
    expected = {
        network.CROSS_ENTROPY: -np.log(own),
        network.SQUARED: np.square(logits - 15 * np.eye(10)[y]).mean(axis=1),
        network.FOCAL: -((1 - own) ** 3) * np.log(own),
        network.SMOOTHING: -0.95 * np.log(own) - 0.05 * log.mean(axis=1),
    }
    for name in network.LOSSES:
        found = float(network.loss(name)(network.targets(name, y), logits))
        assert found == pytest.approx(expected[name].mean(), rel=1e-5)


def test_weight_decay_is_on_all_trainable_weights():
    model = network.classifier(6, 2, batch_norm=True, weight_decay=0.3, seed=0)
    assert len(model.trainable_weights) == 2 * 4 + 2
    squares = sum(float(np.sum(np.square(w))) for w in model.trainable_weights)
    penalty = sum(float(keras.ops.convert_to_numpy(each)) for each in model.losses)
    assert penalty == pytest.approx(0.15 * squares, rel=1e-5)


def test_the_learning_rate_falls_twice():
    model = network.classifier(3, 1, batch_norm=False, weight_decay=0.0, seed=0)
    network.compile_model(model, network.FOCAL, rate=0.5, steps=100)
    x, y = np.zeros((10, 64), "float32"), network.targets(network.FOCAL, np.arange(10))
    rates = []
    for _ in range(3):
        rates.append(float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)))
        network.train(model, x, y, epochs=6, batch_size=1, rng=np.random.default_rng(0))
    assert rates == pytest.approx([0.5, 0.5, 0.005])


def test_the_study_end_to_end():
    raw = settings.load()["losses"]
    assert set(raw) == set(TINY)
    assert len(losses.cells(raw)) == 3 * 3 * 4
    cells = losses.cells(TINY)
    rows = [row for cell in cells for row in losses.measure(TINY, cell)]
    heads = [row for row in rows if "switch" in row]
    assert len(heads) == 4 * 2
    assert len(rows) == len(cells) + len(heads)
    assert all(row["rank"] <= row["n"] == 60 for row in heads)
    features = [row for row in rows if "epoch" in row]
    assert all(0 <= row["train_error"] <= 1 and row["nc1"] > 0 for row in features)
    claims = losses.claims(rows, TINY)
    assert len({claim.name for claim in claims}) == len(claims) == 4 * 8
    assert all(claim.verdict() for claim in claims)
    losses.draw(Figure().subplots(1, losses.PANELS), rows)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gamma": 3}, "`studies.losses` has no key 'gamma'"),
        ({"width": 0}, r"losses.width` .* between 1 and .* Received: width=0"),
        ({"batch_size": 61}, r"full batch. Received: batch_size=61"),
        ({"test": 1790}, r"1797 digits. Received: n=60"),
        ({"switches": [2, 3]}, r"rising, of the training. Received"),
        ({"switches": [1]}, r"rising, of the training. Received"),
        ({"strong_decay": -1}, r"losses.strong_decay` .* Received: strong_decay=-1"),
    ],
)
def test_settings_that_make_no_sense(change, match):
    with pytest.raises(ValueError, match=match):
        losses.cells({**TINY, **change})
