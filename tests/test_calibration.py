import numpy as np
import pytest

from pipelines import evaluate, temperature
from pipelines.calibration import brier, ece, nll, softmax


def problem(n=400, classes=7, scale=2.0, seed=0):
    """Logits that say more than they know, in float32 as models give them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1.0
    return (scale * logits).astype("float32"), labels


def test_nll_is_exact_where_it_is_tiny_and_where_it_is_huge():
    logits = np.array([[30.0, 0.0, 0.0], [0.0, 2000.0, 0.0], [1.0, 1.0, 1.0]])
    assert nll(logits[:1], np.array([0])) == pytest.approx(2 * np.exp(-30.0), rel=1e-12)
    assert nll(logits[1:2], np.array([0])) == 2000.0
    assert nll(logits[2:], np.array([2])) == pytest.approx(np.log(3), rel=1e-15)
    assert evaluate.error_rate(logits, np.array([0, 0, 1])) == pytest.approx(2 / 3)


def test_nll_is_scikit_learn_s():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = problem()
    wanted = metrics.log_loss(labels, softmax(logits))
    assert nll(logits, labels) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("bins", [1, 4, 15])
@pytest.mark.parametrize("scale", [0.1, 2.0, 50.0])
def test_ece_is_that_of_a_slow_loop(bins, scale):
    logits, labels = problem(scale=scale)
    members = [[] for _ in range(bins)]
    for row, label in zip(softmax(logits), labels, strict=True):
        which = next(k for k in range(bins) if row.max() <= (k + 1) / bins + 1e-15)
        members[which].append((row.max(), row.argmax() == label))
    wanted = 0.0
    for each in members:
        if each:
            confidence, right = np.mean(each, axis=0)
            wanted += len(each) / len(labels) * abs(confidence - right)
    assert ece(logits, labels, bins) == pytest.approx(wanted, abs=1e-14)


def test_ece_is_that_of_scikit_learn_s_calibration_curve():
    calibration = pytest.importorskip("sklearn.calibration")
    logits, labels = problem()
    probabilities = softmax(logits)
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    accuracies, confidences = calibration.calibration_curve(
        right, confidence, n_bins=15, strategy="uniform"
    )
    counts = np.histogram(confidence, bins=15, range=(0, 1))[0]
    shares = counts[counts > 0] / len(labels)
    wanted = shares @ np.abs(accuracies - confidences)
    assert ece(logits, labels) == pytest.approx(wanted, rel=1e-12)


def test_ece_of_who_knows_and_of_who_is_always_wrong():
    labels = np.array([0, 1, 2])
    sure = 1000.0 * np.eye(3)
    assert ece(sure, labels) == 0.0
    assert ece(sure[[1, 2, 0]], labels) == 1.0
    # Equal logits: a confidence of 1/3, which is right.
    assert ece(np.zeros((3, 3)), labels) == pytest.approx(0.0, abs=1e-15)


def test_brier_is_that_of_a_slow_loop_and_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = problem()
    wanted = 0.0
    for row, label in zip(softmax(logits), labels, strict=True):
        wanted += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
    assert brier(logits, labels) == pytest.approx(wanted / len(labels), rel=1e-12)
    two, binary = problem(classes=2)
    # Of two classes, scikit-learn counts one.
    half = metrics.brier_score_loss(binary, softmax(two)[:, 1])
    assert brier(two, binary) == pytest.approx(2 * half, rel=1e-12)


def test_logits_are_left_as_they_are():
    logits, labels = problem()
    before = logits.copy()
    for measure in (nll, ece, brier):
        measure(logits, labels)
    np.testing.assert_array_equal(logits, before)


def test_the_temperature_is_the_best_one():
    logits, labels = problem(scale=3.0)
    found = temperature.fit(logits, labels)
    assert found > 1.5
    # Logits that are hotter by a factor need a temperature higher by it.
    again = temperature.fit(2.0 * logits, labels)
    assert again == pytest.approx(2 * found, rel=1e-5)
    best = nll(logits.astype("float64") / found, labels)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert nll(logits.astype("float64") / (factor * found), labels) > best


def test_no_temperature_without_a_mistake_and_bounds_where_there_is_no_best_one():
    labels = np.array([0, 1, 2])
    assert temperature.fit(np.eye(3), labels) == 1.0
    assert temperature.fit(-np.eye(3), labels) == pytest.approx(100, rel=1e-2)
