import dataclasses

import keras
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dalign.numerics.keras_losses import convex_loss
from keras_dalign.numerics.losses import (
    BinaryCrossEntropy,
    ConvexLoss,
    SoftmaxCrossEntropy,
    SquaredError,
)

L = keras.losses
REDUCTIONS = ["sum_over_batch_size", "mean", "mean_with_sample_weight", "sum"]


def soft_rows(rng, n, n_outputs):
    rows = rng.random((n, n_outputs)) ** 3
    return rows / rows.sum(axis=1, keepdims=True)


def case(name, n=7, seed=0):
    """A Keras loss, labels and logits for it."""
    rng = np.random.default_rng(seed)
    few, many, one = (3 * rng.standard_normal((n, c)) for c in (3, 5, 1))
    one_hot = np.eye(3)[rng.integers(0, 3, n)]
    bits = rng.integers(0, 2, n)
    sparse = L.SparseCategoricalCrossentropy(from_logits=True)
    dense = L.CategoricalCrossentropy(from_logits=True)
    smooth = L.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2)
    binary = L.BinaryCrossentropy(from_logits=True)
    smooth_binary = L.BinaryCrossentropy(from_logits=True, label_smoothing=0.3)
    mse = L.MeanSquaredError()
    return {
        "sparse": (sparse, rng.integers(0, 3, n), few),
        "sparse, column": (sparse, rng.integers(0, 3, (n, 1)), few),
        "sparse, floats": (sparse, rng.integers(0, 3, n).astype("float32"), few),
        "one-hot": (dense, one_hot, few),
        "soft": (dense, soft_rows(rng, n, 3), few),
        "smooth one-hot": (smooth, one_hot, few),
        "smooth soft": (smooth, soft_rows(rng, n, 3), few),
        "binary": (binary, bits, one),
        "binary, column": (binary, bits[:, None].astype(bool), one),
        "multi-label": (binary, rng.integers(0, 2, (n, 5)), many),
        "soft multi-label": (binary, rng.random((n, 5)), many),
        "smooth binary": (smooth_binary, bits, one),
        "smooth multi-label": (smooth_binary, rng.integers(0, 2, (n, 5)), many),
        "regression": (mse, rng.standard_normal(n), one),
        "regression, column": (mse, rng.standard_normal((n, 1)), one),
        "regression, several": (mse, rng.standard_normal((n, 5)), many),
    }[name]


CASES = [
    "sparse",
    "sparse, column",
    "sparse, floats",
    "one-hot",
    "soft",
    "smooth one-hot",
    "smooth soft",
    "binary",
    "binary, column",
    "multi-label",
    "soft multi-label",
    "smooth binary",
    "smooth multi-label",
    "regression",
    "regression, column",
    "regression, several",
]


def as_keras(keras_loss, y, logits, sample_weight=None):
    value = keras_loss(
        y.astype("float32"), logits.astype("float32"), sample_weight=sample_weight
    )
    return keras.ops.convert_to_numpy(value)


@pytest.mark.parametrize("name", CASES)
def test_value_is_the_keras_loss_of_each_sample(name):
    keras_loss, y, logits = case(name)
    loss = convex_loss(keras_loss)
    targets = loss.targets(y, logits.shape[1])
    assert targets.shape == logits.shape
    assert targets.dtype == np.float64
    values = loss.value(logits, targets)
    assert values.dtype == np.float64
    each = [
        as_keras(keras_loss, y[i : i + 1], logits[i : i + 1]) for i in range(len(y))
    ]
    np.testing.assert_allclose(values, each, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["sparse", "smooth multi-label", "regression"])
def test_reductions_are_those_of_keras(name, reduction, weighted):
    keras_loss, y, logits = case(name)
    keras_loss = type(keras_loss).from_config(
        {**keras_loss.get_config(), "reduction": reduction}
    )
    loss = convex_loss(keras_loss)
    n = len(y)
    weights = np.linspace(0.0, 3.0, n) if weighted else np.ones(n)
    values = loss.value(logits, loss.targets(y, logits.shape[1]))
    ours = weights @ values / loss.normalizer(n, weights.sum())
    keras_weights = weights.astype("float32") if weighted else None
    theirs = as_keras(keras_loss, y, logits, keras_weights)
    assert ours == pytest.approx(float(theirs), rel=1e-5)


def hessians(loss, logits, targets):
    """Of each sample's loss, `(n, C, C)`, by central differences."""
    n, units = logits.shape
    found = np.zeros((n, units, units))
    for c in range(units):
        step = np.zeros_like(logits)
        step[:, c] = 1e-5
        above = loss.gradient(logits + step, targets)
        below = loss.gradient(logits - step, targets)
        found[:, :, c] = (above - below) / 2e-5
    return found


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_together_are_those_alone(name):
    keras_loss, y, logits = case(name)
    loss = convex_loss(keras_loss)
    targets = loss.targets(y, logits.shape[1])
    value, gradient = loss.value_and_gradient(logits, targets)
    np.testing.assert_array_equal(value, loss.value(logits, targets))
    np.testing.assert_array_equal(gradient, loss.gradient(logits, targets))


@pytest.mark.parametrize("size", [0.1, 1.0, 15.0])
@pytest.mark.parametrize("name", CASES)
def test_losses_on_the_device_keep_small_numbers(name, size):
    """Relative to each number, as losses and slopes of fitted samples are tiny."""
    keras_loss, y, logits = case(name, n=200)
    loss = convex_loss(keras_loss)
    logits = (size * logits).astype("float32")
    logits[5] = logits[5, 0]
    targets = loss.targets(y, logits.shape[1]).astype("float32")
    expected = loss.value_and_gradient(logits.astype(float), targets.astype(float))
    tensors = keras.ops.convert_to_tensor(logits), keras.ops.convert_to_tensor(targets)
    found = map(keras.ops.convert_to_numpy, loss.value_and_gradient_on_device(*tensors))
    for of_device, exact in zip(found, expected, strict=True):
        assert of_device.dtype == np.float32
        # Soft targets and squares differ from the outputs by rounding at their size.
        atol = 1e-7 * np.abs(exact).max() if targets.min() != 0 else 1e-15
        np.testing.assert_allclose(of_device, exact, rtol=2e-5, atol=atol)


@pytest.mark.parametrize(
    ("loss", "worst"),
    [
        (SoftmaxCrossEntropy(), [[0.0, 0.0, -99.0]]),
        (BinaryCrossEntropy(), [[0.0, 0.0, 0.0]]),
        (SquaredError(), [[0.3, 0.1, -2.0]]),
    ],
)
def test_no_curvature_passes_the_bound_and_one_reaches_it(loss, worst):
    rng = np.random.default_rng(0)
    logits = np.concatenate([rng.standard_normal((50, 3)) * 3, np.array(worst)])
    targets = np.eye(3)[rng.integers(3, size=len(logits))]
    largest = np.linalg.eigvalsh(hessians(loss, logits, targets))[:, -1]
    bound = loss.max_curvature(3)
    assert (largest <= bound * (1 + 1e-6)).all()
    assert largest[-1] == pytest.approx(bound)


def test_targets_of_the_alignment_condition():
    targets = np.array([[1.0, 0.0], [0.25, 0.75]])
    modified = [[1.0, -1.0], [-0.5, 0.5]]
    np.testing.assert_array_equal(
        SoftmaxCrossEntropy().aligned_targets(targets), modified
    )
    np.testing.assert_array_equal(
        BinaryCrossEntropy().aligned_targets(targets), modified
    )
    np.testing.assert_array_equal(SquaredError().aligned_targets(targets), targets)


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_derivative_of_the_value(name):
    keras_loss, y, logits = case(name)
    loss = convex_loss(keras_loss)
    targets = loss.targets(y, logits.shape[1])
    numerical = np.zeros_like(logits)
    for c in range(logits.shape[1]):
        step = np.zeros_like(logits)
        step[:, c] = 1e-5
        above = loss.value(logits + step, targets)
        numerical[:, c] = (above - loss.value(logits - step, targets)) / 2e-5
    np.testing.assert_allclose(
        loss.gradient(logits, targets), numerical, rtol=1e-6, atol=1e-8
    )


def test_cross_entropies_keep_their_digits_when_tiny():
    logits = np.array([[60.0, 0.0, -5.0]])
    softmax = SoftmaxCrossEntropy()
    value = softmax.value(logits, softmax.targets([0], 3))[0]
    assert value == pytest.approx(np.exp(-60) + np.exp(-65), rel=1e-12, abs=0)
    binary = BinaryCrossEntropy()
    value = binary.value(np.array([[60.0]]), binary.targets([1], 1))[0]
    assert value == pytest.approx(np.exp(-60), rel=1e-12, abs=0)


@pytest.mark.parametrize("scale", [1e3, 1e100])
@pytest.mark.parametrize("name", ["sparse", "smooth soft", "smooth multi-label"])
def test_large_logits_do_not_overflow(name, scale):
    keras_loss, y, logits = case(name)
    loss = convex_loss(keras_loss)
    targets = loss.targets(y, logits.shape[1])
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(loss.value(scale * logits, targets)).all()
        assert np.isfinite(loss.gradient(scale * logits, targets)).all()


# The lower bound ---------------------------------------------------------------------


def brute_force_infimum(loss, targets, weights):
    """Minimum over one output for all samples, by a general-purpose optimiser."""
    ones = np.ones((len(targets), 1))

    def objective(z):
        logits = ones * z
        value = weights @ loss.value(logits, targets)
        return value, weights @ loss.gradient(logits, targets)

    start = np.zeros(targets.shape[1])
    bounds = [(-40.0, 40.0)] * len(start)  # An infimum at infinity is near at 40.
    found = scipy.optimize.minimize(
        objective, start, jac=True, bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-9}
    )
    return found.fun


@pytest.mark.parametrize("name", CASES)
def test_lower_bound_is_the_best_common_output_of_a_group(name):
    keras_loss, y, logits = case(name, n=12)
    loss = convex_loss(keras_loss)
    targets = loss.targets(y, logits.shape[1])
    weights = np.linspace(0.0, 2.0, len(y))
    groups = np.array([2, 0, 2, 1, 1, 2, 0, 2, 2, 3, 1, 0])
    bounds = loss.lower_bound(targets, weights, groups, 5)
    assert bounds.shape == (5,)
    assert bounds[4] == 0
    for group in range(4):
        members = groups == group
        brute = brute_force_infimum(loss, targets[members], weights[members])
        assert bounds[group] == pytest.approx(brute, rel=1e-6, abs=1e-7)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_lower_bound_is_below_every_output_and_approached(data):
    name = data.draw(st.sampled_from(CASES))
    n = data.draw(st.integers(1, 6))
    seed = data.draw(st.integers(0, 2**32 - 1))
    keras_loss, y, logits = case(name, n=n, seed=seed)
    loss = convex_loss(keras_loss)
    targets = loss.targets(y, logits.shape[1])
    weights = np.array(
        data.draw(st.lists(st.floats(0.01, 10), min_size=n, max_size=n)),
    )
    one_group = np.zeros(n, dtype=np.intp)
    bound = loss.lower_bound(targets, weights, one_group, 1)[0]
    for row in logits:
        value = weights @ loss.value(np.tile(row, (n, 1)), targets)
        assert bound <= value + 1e-12 * value
    brute = brute_force_infimum(loss, targets, weights)
    assert bound == pytest.approx(brute, rel=1e-5, abs=1e-6)


def test_lower_bound_of_agreeing_hard_labels_is_zero():
    loss = SoftmaxCrossEntropy()
    targets = loss.targets([1, 1, 0], 3)
    bounds = loss.lower_bound(targets, np.ones(3), np.array([0, 0, 1]), 2)
    np.testing.assert_array_equal(bounds, [0.0, 0.0])


def test_lower_bound_is_the_entropy_of_conflicting_labels():
    loss = SoftmaxCrossEntropy()
    targets = loss.targets([0, 1, 1, 1], 3)
    bound = loss.lower_bound(targets, np.ones(4), np.zeros(4, np.intp), 1)[0]
    assert bound == pytest.approx(np.log(4) + 3 * np.log(4 / 3), rel=1e-14)


def test_lower_bound_of_squared_error_survives_a_large_mean():
    loss = SquaredError()
    targets = loss.targets(1e8 + np.array([0.0, 1.0]), 1)
    bound = loss.lower_bound(targets, np.ones(2), np.zeros(2, np.intp), 1)[0]
    assert bound == pytest.approx(0.5, rel=1e-12, abs=0)


def test_rounded_soft_labels_have_an_exact_lower_bound():
    loss = SoftmaxCrossEntropy(sparse=False)
    y = soft_rows(np.random.default_rng(0), 4, 3).astype("float16")
    targets = loss.targets(y, 3)
    assert (targets.sum(axis=1) != 1).any()
    bound = loss.lower_bound(targets, np.ones(4), np.zeros(4, np.intp), 1)[0]
    assert bound == pytest.approx(
        brute_force_infimum(loss, targets, np.ones(4)), rel=1e-10
    )


# Bad labels --------------------------------------------------------------------------

DENSE = SoftmaxCrossEntropy(sparse=False)


@pytest.mark.parametrize(
    ("loss", "y", "n_outputs", "message"),
    [
        (SoftmaxCrossEntropy(), [0, 3], 3, "integers from 0 to 2.*Received: label 3"),
        (SoftmaxCrossEntropy(), [0, -1], 3, "integers from 0 to 2.*Received: label -1"),
        (SoftmaxCrossEntropy(), [0, 0.5], 3, "integers from 0 to 2.*label 0.5"),
        (SoftmaxCrossEntropy(), np.eye(3), 3, r"CategoricalCross.*shape=\(3, 3\)"),
        (SoftmaxCrossEntropy(), [0, 1], 1, "BinaryCrossentropy.*n_outputs=1"),
        (
            SoftmaxCrossEntropy(),
            [0, np.nan],
            3,
            "labels `y` must be finite.*nan in row 1",
        ),
        (SoftmaxCrossEntropy(), ["cat", "dog"], 3, "must be real numbers.*dtype <U3"),
        (DENSE, [0, 1], 3, r"SparseCategoricalCross.*shape=\(2,\)"),
        (DENSE, np.eye(4), 3, r"shape \(n, 3\).*shape=\(4, 4\)"),
        (DENSE, [[0.5, 0.4]], 2, "must sum to 1.*row 0 with sum 0.9"),
        (DENSE, [[1.5, -0.5]], 2, "between 0 and 1.*label 1.5"),
        (DENSE, [[np.inf, 0]], 2, "must be finite.*inf in row 0"),
        (BinaryCrossEntropy(), [-1, 1], 1, "between 0 and 1.*label -1"),
        (BinaryCrossEntropy(), [0, 2], 1, "between 0 and 1.*label 2"),
        (BinaryCrossEntropy(), [0, 1], 2, r"shape \(n, 2\), as.*shape \(2,\)"),
        (BinaryCrossEntropy(), [[0], [1]], 2, r"shape \(n, 2\).*shape \(2, 1\)"),
        (BinaryCrossEntropy(), [[0, 1]], 1, r"\(n, 1\) or \(n,\).*shape \(1, 2\)"),
        (BinaryCrossEntropy(), [np.nan], 1, "labels `y` must be finite"),
        (SquaredError(), [1.0, np.inf], 1, "targets `y` must be finite.*inf in row 1"),
        (SquaredError(), [1.0, 2.0], 2, r"Targets `y` must have shape \(n, 2\)"),
        (SquaredError(), np.ones((2, 2, 2)), 2, r"shape \(2, 2, 2\)"),
        (SquaredError(), 1.0, 1, r"shape \(\)"),
    ],
)
def test_bad_labels_are_explained(loss, y, n_outputs, message):
    with pytest.raises(ValueError, match=message):
        loss.targets(y, n_outputs)


# Recognising Keras losses ------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (L.SparseCategoricalCrossentropy(from_logits=True), SoftmaxCrossEntropy()),
        (
            L.CategoricalCrossentropy(
                from_logits=True, label_smoothing=0.1, reduction="sum"
            ),
            SoftmaxCrossEntropy(sparse=False, label_smoothing=0.1, reduction="sum"),
        ),
        (
            L.BinaryCrossentropy(from_logits=True, label_smoothing=0.1, axis=1),
            BinaryCrossEntropy(label_smoothing=0.1),
        ),
        (L.MeanSquaredError(reduction="mean"), SquaredError(reduction="mean")),
        ("mse", SquaredError()),
        ("MSE", SquaredError()),
        ("mean_squared_error", SquaredError()),
        ("MeanSquaredError", SquaredError()),
        (L.mean_squared_error, SquaredError()),
        (["mse"], SquaredError()),
        ({"out": "mse"}, SquaredError()),
        (
            L.serialize(L.SparseCategoricalCrossentropy(from_logits=True)),
            SoftmaxCrossEntropy(),
        ),
        (BinaryCrossEntropy(), BinaryCrossEntropy()),
    ],
)
def test_convex_loss_recognises(loss, expected):
    assert convex_loss(loss) == expected


def test_the_objective_names_loss_smoothing_and_reduction():
    loss = BinaryCrossEntropy(label_smoothing=0.1, reduction="sum")
    assert loss.objective == (
        "binary cross-entropy with label smoothing 0.1, sum over the samples"
    )


class NotQuiteMSE(L.MeanSquaredError):
    def call(self, y_true, y_pred):
        return -super().call(y_true, y_pred)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("sparse_categorical_crossentropy", "SparseCategoricalCrossentropy.*from_log"),
        ("categorical_crossentropy", "`keras.losses.CategoricalCrossentropy"),
        ("binary_crossentropy", r"`keras.losses.BinaryCrossentropy\(from_logits=True"),
        ("bce", "takes probabilities.*Received: loss='bce'"),
        ("CategoricalCrossentropy", "takes probabilities"),
        (L.BinaryCrossentropy(), "takes probabilities"),
        (L.SparseCategoricalCrossentropy(), "takes probabilities"),
        (L.sparse_categorical_crossentropy, "takes probabilities"),
        (L.MeanAbsoluteError(), "not known to be convex"),
        ("mae", "not known to be convex.*loss='mae'"),
        (L.Huber(), "not known to be convex"),
        (lambda y, z: y - z, "not known to be convex"),
        (NotQuiteMSE(), "not known to be convex"),
        (None, "not known to be convex.*loss=None"),
        ("no such loss", "does not know this loss.*loss='no such loss'"),
        ({"class_name": "Nonsense", "config": {}}, "does not know this loss"),
        (
            L.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1),
            "'ignore_class': 1.*not supported",
        ),
        (L.CategoricalCrossentropy(from_logits=True, axis=0), "`axis`"),
        (L.MeanSquaredError(reduction=None), "objective is undefined.*reduction=None"),
        (L.BinaryCrossentropy(from_logits=True, reduction="none"), "reduction='none'"),
        (
            L.BinaryCrossentropy(from_logits=True, label_smoothing=1.5),
            "label_smoothing=1.5",
        ),
        (["mse", "mse"], "several outputs"),
        ({"a": "mse", "b": "mse"}, "several outputs"),
    ],
)
def test_convex_loss_refuses(loss, message):
    with pytest.raises(ValueError, match=message):
        convex_loss(loss)


def test_losses_are_values():
    loss = SquaredError()
    assert isinstance(loss, ConvexLoss)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.reduction = "sum"
