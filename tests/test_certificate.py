import dataclasses
import json
import re

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_dalign as kd
from keras_dalign.certification.certificate import Certificate
from keras_dalign.certification.certify import certify
from keras_dalign.diagnostics.gradient_bound import GradientBound
from keras_dalign.head.features import FeaturePass
from keras_dalign.numerics.gram import explicit_features
from keras_dalign.numerics.keras_losses import convex_loss
from keras_dalign.numerics.losses import SoftmaxCrossEntropy, SquaredError
from keras_dalign.training.switch import switch

L = keras.losses
SPARSE = L.SparseCategoricalCrossentropy(from_logits=True)


def linear(n_outputs=3, n_inputs=2, loss=SPARSE, **compile_args):
    """A small model; its weights are large enough to matter."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((n_inputs,)), keras.layers.Dense(n_outputs)])
    model.compile(loss=loss, **compile_args)
    return model


def lookup(logits, loss=SPARSE):
    """A model that maps the integer input `i` to `logits[i]`."""
    table = np.asarray(logits, dtype="float32")
    model = keras.Sequential(
        [
            keras.Input((), dtype="int32"),
            keras.layers.Embedding(*table.shape, weights=[table]),
        ]
    )
    model.compile(loss=loss)
    return model


def points(n=20, n_inputs=2, seed=0):
    return np.random.default_rng(seed).standard_normal((n, n_inputs)).astype("float32")


X = points()
Y = np.arange(20) % 3


# Loss and gap ------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_loss_is_that_of_evaluate(batch_size):
    model = linear()
    certificate = certify(model, X, Y, batch_size=batch_size)
    expected = model.evaluate(X, Y, batch_size=20, verbose=0)
    assert certificate.loss == pytest.approx(expected, rel=1e-5)
    assert certificate.lower_bound == 0
    assert certificate.gap == certificate.loss
    assert certificate.n_samples == 20
    assert certificate.n_distinct == 20
    assert certificate.n_conflicts == 0
    assert certificate.conflicts == ()
    assert certificate.dtype == "float32"


@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"]
)
@pytest.mark.parametrize("column", [False, True])
def test_weights_follow_the_reduction(reduction, column):
    loss = L.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    model = linear(loss=loss)
    weights = np.linspace(0, 3, 20)[:, None] if column else np.linspace(0, 3, 20)
    x = X.copy()
    x[1::2] = x[::2]
    certificate = certify(model, x, Y, sample_weight=weights, batch_size=6)
    logits = model.predict_on_batch(x)
    expected = loss(Y, logits, sample_weight=weights.ravel().astype("float32"))
    assert certificate.loss == pytest.approx(float(expected), rel=1e-5)
    divisor = {"sum": 1, "sum_over_batch_size": 20}.get(reduction, weights.sum())
    pairs = weights.reshape(10, 2)
    total = pairs.sum(axis=1, keepdims=True)
    pairs = np.where(pairs > 0, pairs, total)
    entropy = (weights.reshape(10, 2) * np.log(total / pairs)).sum()
    assert certificate.lower_bound == pytest.approx(entropy / divisor, rel=1e-12)


def test_a_loss_can_be_given():
    model = linear()
    given = certify(model, X, points(n_inputs=3), loss="mse")
    assert given.objective.startswith("squared error, mean over the samples")
    uncompiled = keras.Sequential(model.layers)
    assert certify(uncompiled, X, Y, loss=SPARSE).loss == certify(model, X, Y).loss


def test_dropout_and_regularisation_are_left_out():
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense(3, kernel_regularizer="l2")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dropout(0.5), dense])
    model.compile(loss=SPARSE)
    plain = linear()
    plain.set_weights(model.get_weights())
    assert certify(model, X, Y).loss == certify(plain, X, Y).loss


def test_several_inputs():
    a, b = keras.Input((2,)), keras.Input((1,))
    out = keras.layers.Dense(3)(keras.layers.concatenate([a, b]))
    model = keras.Model([a, b], out)
    model.compile(loss=SPARSE)
    extra = np.zeros((20, 1), "float32")
    x = X.copy()
    x[1] = x[0]
    assert certify(model, [x, extra], Y).n_distinct == 19
    extra[1] = 1
    assert certify(model, [x, extra], Y).n_distinct == 20


# The lower bound ---------------------------------------------------------------------


def best_table(y, ids, weights, n_outputs):
    """Logits of the best function of the input: log frequencies of the labels."""
    counts = np.zeros((ids.max() + 1, n_outputs))
    np.add.at(counts, (ids, y), weights)
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(counts), -60.0)


@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_ids=st.integers(1, 6),
    reduction=st.sampled_from(["sum_over_batch_size", "mean_with_sample_weight"]),
)
def test_the_best_function_of_the_inputs_has_no_gap(seed, n_ids, reduction):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, n_ids, 30).astype("int32")
    y = rng.integers(0, 3, 30)
    weights = rng.random(30)
    loss = L.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    model = lookup(best_table(y, ids, weights, 3), loss)
    certificate = certify(model, ids, y, sample_weight=weights, batch_size=8)
    assert 0 <= certificate.gap < 1e-6
    assert certificate.loss == pytest.approx(certificate.lower_bound, abs=1e-6)
    assert certificate.n_distinct == len(set(ids))
    labels = [set(y[ids == i]) for i in set(ids)]
    assert certificate.n_conflicts == sum(len(found) > 1 for found in labels)


@pytest.mark.parametrize(
    ("loss", "y", "expected"),
    [
        (SPARSE, [0, 1, 2, 2], np.log(2) / 2),
        (
            L.CategoricalCrossentropy(from_logits=True),
            [[1, 0], [0.5, 0.5], [0, 1], [0, 1]],
            (0.75 * np.log(4 / 3) + 0.25 * np.log(4)) / 2,
        ),
        (
            L.CategoricalCrossentropy(from_logits=True, label_smoothing=0.5),
            [[1, 0], [0, 1], [0, 1], [0, 1]],
            np.log(2) / 2 + (0.75 * np.log(4 / 3) + 0.25 * np.log(4)) / 2,
        ),
        (L.BinaryCrossentropy(from_logits=True), [0, 1, 1, 1], np.log(2) / 2),
        (
            L.BinaryCrossentropy(from_logits=True),
            [[0, 1], [1, 1], [1, 0], [1, 0]],
            np.log(2) / 4,
        ),
        (L.MeanSquaredError(), [1.0, 3.0, 7.0, 7.0], 0.5),
        (L.MeanSquaredError(), [[1.0, 0], [3.0, 0], [7.0, 1], [7.0, 1]], 0.25),
    ],
)
def test_lower_bound_by_hand(loss, y, expected):
    """Inputs 0, 0, 1, 1: the first two disagree, the others agree."""
    y = np.asarray(y)
    n_outputs = 3 if loss is SPARSE else (1 if y.ndim == 1 else y.shape[1])
    model = lookup(np.full((2, n_outputs), 0.25), loss)
    certificate = certify(model, np.array([0, 0, 1, 1]), y)
    assert certificate.lower_bound == pytest.approx(expected, rel=1e-12)
    assert certificate.gap == certificate.loss - certificate.lower_bound
    assert certificate.gap > 0
    assert certificate.n_distinct == 2
    assert certificate.n_conflicts == 1
    assert certificate.conflicts == ((0, 1),)


def test_conflicts_are_found_across_batches_and_listed_once_per_target():
    ids = np.array([5, 1, 5, 2, 5, 1, 2, 5])
    y = np.array([0, 1, 1, 2, 0, 1, 0, 2])
    certificate = certify(lookup(np.zeros((6, 3))), ids, y, batch_size=3)
    assert certificate.n_conflicts == 2
    assert certificate.conflicts == ((0, 2, 7), (3, 6))


def test_the_list_of_conflicts_is_limited():
    ids = np.repeat(np.arange(30), 30)
    y = np.tile(np.arange(30), 30)
    certificate = certify(lookup(np.zeros((30, 30))), ids, y)
    assert certificate.n_conflicts == 30
    assert len(certificate.conflicts) == 20
    assert {len(conflict) for conflict in certificate.conflicts} == {20}


def test_a_sample_without_weight_conflicts_with_nothing():
    ids, y, weights = np.zeros(3, "int32"), np.array([1, 0, 0]), [0.0, 1.0, 1.0]
    certificate = certify(
        lookup(np.zeros((1, 3))), ids, y, sample_weight=np.array(weights)
    )
    assert certificate.n_samples == 3
    assert certificate.n_conflicts == 0
    assert certificate.lower_bound == 0


def test_negative_zero_is_zero():
    x = np.array([[0.0, 1.0], [-0.0, 1.0]], "float32")
    assert certify(linear(), x, np.array([0, 1])).n_distinct == 1
    y = np.array([[0.0], [-0.0]])
    certificate = certify(linear(1, loss="mse"), x, y)
    assert certificate.n_distinct == 1
    assert certificate.n_conflicts == 0


def test_inputs_one_ulp_apart_are_distinct():
    x = np.ones((2, 2), "float32")
    x[1, 1] = np.nextafter(x[0, 1], np.float32(2))
    certificate = certify(linear(), x, np.array([0, 1]))
    assert certificate.n_distinct == 2
    assert certificate.lower_bound == 0


def test_the_layout_in_memory_does_not_matter():
    model = linear()
    x = np.vstack([X, X])
    y = np.concatenate([Y, (Y + 1) % 3])
    plain = certify(model, x, y)
    assert plain.n_conflicts == 20
    assert certify(model, np.asfortranarray(x), y) == plain


# Streams -----------------------------------------------------------------------------


class Stream(keras.utils.PyDataset):
    def __init__(self, x, y, weights):
        super().__init__()
        self.data = (x, y, weights)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return tuple(part[7 * index : 7 * index + 7] for part in self.data)


def stream_cases():
    x = np.concatenate([X[:15], X[1:6]])
    return x, Y, np.linspace(0.5, 2, 20)


def test_streams_and_arrays_agree():
    model = linear()
    x, y, weights = stream_cases()
    expected = certify(model, x, y, sample_weight=weights, batch_size=7)
    assert expected.n_conflicts > 0
    stream = Stream(x, y, weights)
    assert certify(model, stream) == expected
    generator = (stream[i] for i in range(3))
    assert certify(model, generator, steps=3) == expected


def test_tf_data_agrees_with_arrays():
    tf = pytest.importorskip("tensorflow")
    model = linear()
    parts = stream_cases()
    stream = tf.data.Dataset.from_tensor_slices(parts).batch(7)
    x, y, weights = parts
    expected = certify(model, x, y, sample_weight=weights, batch_size=7)
    assert certify(model, stream) == expected


# What a certificate shows ------------------------------------------------------------


def example(**changes):
    fields = {
        "loss": 0.123456789,
        "lower_bound": 0.0234567,
        "gap": 0.100000089,
        "n_samples": 1200,
        "n_distinct": 1198,
        "n_conflicts": 1,
        "conflicts": ((3, 17),),
        "objective": "squared error, mean over the samples",
        "dtype": "float32",
    }
    return Certificate(**{**fields, **changes})


def test_the_sentence_rounds_bounds_to_the_safe_side():
    assert str(example()) == (
        "The loss is 0.123457, at most 0.101 above its global minimum.\n"
        "No function of the inputs can go below 0.0234: 1200 samples, 1198 distinct "
        "inputs, 1 of them with conflicting targets.\n"
        "Objective: squared error, mean over the samples; outputs in float32, sums in "
        "float64."
    )


@pytest.mark.parametrize("gap", [1e-17, 3.0000001e-9, 0.5, 1.2341, 99999.0])
def test_the_printed_gap_is_never_smaller(gap):
    text = str(example(gap=gap))
    printed = float(re.search(r"at most (\S+) above", text)[1])
    assert gap <= printed <= gap * 1.01


def test_a_gap_of_zero_is_one_to_rounding():
    assert "at most 0 (to rounding) above" in str(example(gap=0.0))


def test_to_dict_is_json():
    certificate = certify(lookup(np.zeros((1, 3))), np.zeros(2, "int32"), np.arange(2))
    fields = json.loads(json.dumps(certificate.to_dict()))
    assert fields.pop("conflicts") == [[0, 1]]
    for name, value in fields.items():
        assert value == getattr(certificate, name)
    assert len(fields) + 1 == len(dataclasses.fields(certificate))


def test_notebook_view_is_escaped():
    text = example(objective="<loss>")._repr_html_()
    assert "&lt;loss&gt;" in text
    assert "<loss>" not in text
    assert "<b>0.101</b>" in text


def test_the_objective_says_what_is_left_out():
    objective = certify(linear(), X, Y).objective
    assert objective == (
        "softmax cross-entropy, mean over the samples as given, in inference mode, "
        "without regularisation or augmentation"
    )
    weighted = certify(linear(), X, Y, sample_weight=np.ones(20)).objective
    assert weighted == objective.replace("given,", "given, with sample weights,")


def test_a_certificate_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        example().gap = 0.0


# A gap below zero --------------------------------------------------------------------


class Predictor(keras.Model):
    """A model with given predictions."""

    def __init__(self, *outputs):
        super().__init__()
        self.loss = SPARSE
        self.given = iter([np.asarray(part) for part in outputs])

    def predict_on_batch(self, x):
        return next(self.given)


def test_different_outputs_for_identical_inputs_are_an_error():
    model = Predictor(np.array([[9.0, 0.0], [0.0, 9.0]], "float32"))
    with pytest.raises(RuntimeError, match=r"stochastic.*lower_bound=0.693147"):
        certify(model, np.ones((2, 1)), np.array([0, 1]))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gap_below_zero_by_rounding_is_zero(dtype):
    ulp = np.finfo(dtype).eps
    logits = np.array([[2 + 2 * ulp, 2], [2, 2 + 2 * ulp]], dtype)
    certificate = certify(Predictor(logits), np.ones((2, 1)), np.array([0, 1]))
    assert certificate.loss < certificate.lower_bound
    assert certificate.gap == 0
    logits = np.array([[2 + 500 * ulp, 2], [2, 2 + 500 * ulp]], dtype)
    with pytest.raises(RuntimeError, match="below the least"):
        certify(Predictor(logits), np.ones((2, 1)), np.array([0, 1]))


def test_replicas_that_repeat_the_batch_count_once():
    logits = np.array([[1.0, 0.0], [0.0, 2.0]], "float32")
    x, y = np.arange(2.0), np.array([0, 1])
    model = Predictor(np.vstack([logits, logits]))
    with pytest.raises(ValueError, match=r"one row of outputs per sample.*\(4, 2\)"):
        certify(model, x, y)

    class Replicated(Predictor):
        distribute_strategy = type("Strategy", (), {"num_replicas_in_sync": 2})

    model = Replicated(np.vstack([logits, logits]))
    assert certify(model, x, y) == certify(Predictor(logits), x, y)


# Errors ------------------------------------------------------------------------------


def changed(array, index, value):
    array = np.array(array, dtype="float64")
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("x", "y", "weights", "message"),
    [
        (changed(X, (3, 1), np.nan), Y, None, "Inputs `x` must be finite"),
        (changed(X, (3, 1), np.inf), Y, None, "Inputs `x` must be finite"),
        (X.astype(str), Y, None, "`x` must be numbers"),
        (X, changed(Y, 3, np.nan), None, "labels `y` must be finite"),
        (X, changed(Y, 3, 3), None, "integers from 0 to 2"),
        (X, None, None, "Targets are needed.*y=None"),
        (X, [Y, Y], None, "`y` must be one array.*2 arrays"),
        (X, Y[:9], None, "same number of samples"),
        (X[:0], Y[:0], None, "`x` is empty"),
        (X, Y, changed(np.ones(20), 3, -1), "at least 0.*-1"),
        (X, Y, changed(np.ones(20), 3, np.nan), "at least 0.*nan"),
        (X, Y, np.ones((20, 3)), r"one weight per sample.*\(20, 3\)"),
        (X, Y, np.zeros(20), "`sample_weight` are 0"),
    ],
)
def test_bad_data(x, y, weights, message):
    with pytest.raises(ValueError, match=message):
        certify(linear(), x, y, sample_weight=weights)


def test_non_finite_outputs():
    model = linear()
    model.set_weights([np.full((2, 3), np.nan), np.zeros(3)])
    with pytest.raises(ValueError, match=r"outputs must be finite.*float32"):
        certify(model, X, Y)


def test_a_loss_beyond_float64():
    model = Predictor(np.full((2, 1), 1e200))
    with (
        pytest.raises(ValueError, match="overflows float64"),
        np.errstate(over="ignore"),
    ):
        certify(model, X[:2], np.ones(2), loss="mse")


def test_no_loss():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match=r"pass `loss`, or call `model.compile"):
        certify(model, X, Y)


def test_probabilities():
    for loss in ("sparse_categorical_crossentropy", "mae"):
        with pytest.raises(ValueError, match="convex in the model's outputs"):
            certify(linear(loss=loss), X, Y)


@pytest.mark.parametrize(
    "last",
    [
        lambda: [keras.layers.Dense(3, activation="softmax")],
        lambda: [keras.layers.Dense(3, activation="sigmoid")],
        lambda: [keras.layers.Dense(3), keras.layers.Softmax()],
        lambda: [keras.layers.Dense(3), keras.layers.Activation("softmax")],
    ],
)
def test_a_softmax_inside_with_from_logits(last):
    model = keras.Sequential([keras.Input((2,)), *last()])
    model.compile(loss=SPARSE)
    with pytest.raises(ValueError, match="ends in a softmax or sigmoid"):
        certify(model, X, Y)


def test_a_sigmoid_output_under_squared_error_is_no_mistake():
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(1, activation="sigmoid")]
    )
    assert certify(model, X, Y / 2, loss="mse").gap > 0


def test_several_outputs():
    x = keras.Input((2,))
    model = keras.Model(x, [keras.layers.Dense(3)(x), keras.layers.Dense(3)(x)])
    with pytest.raises(ValueError, match=r"one output is needed.*2 outputs"):
        certify(model, X, Y, loss=SPARSE)


class TwoOutputs(keras.Model):
    def call(self, x):
        return {"a": x, "b": x}


def test_several_outputs_of_a_subclass():
    with pytest.raises(ValueError, match=r"one output is needed.*2 outputs"):
        certify(TwoOutputs(), X, Y, loss=SPARSE)


def test_outputs_with_more_axes():
    model = keras.Sequential([keras.Input((2, 2)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match=r"shape \(n, C\).*\(5, 2, 3\) for 5"):
        certify(model, X.reshape(10, 2, 2)[:5], Y[:5], loss=SPARSE)


def test_outputs_that_change_in_number():
    model = Predictor(np.zeros((1, 2)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="2 outputs, then 3"):
        certify(model, np.arange(2.0), np.array([0, 1]), batch_size=1)


def test_a_convex_loss_object_is_accepted():
    model = linear()
    assert certify(model, X, Y, loss=SoftmaxCrossEntropy()) == certify(model, X, Y)
    y = points(n_inputs=3)
    as_name = certify(model, X, y, loss="mse")
    assert certify(model, X, y, loss=SquaredError()) == as_name


# The loss with an L2 term ------------------------------------------------------------


def head_model(x, loss=SPARSE, units=3, **arguments):
    """A model that exploits, from weights of its head that are not at the centre."""
    keras.utils.set_random_seed(0)
    base = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            keras.layers.Dense(5, "tanh"),
            keras.layers.Dense(units),
        ]
    )
    model = kd.align(base, n_samples=len(x), seed=3, **arguments)
    model.compile(loss=loss)
    switch(model, x)
    rng = np.random.default_rng(1)
    for variable in model.head.exploited_variables:
        value = keras.ops.convert_to_numpy(variable)
        variable.assign(value + 0.5 * rng.standard_normal(variable.shape))
    return model


def dense_problem(model, z):
    """Constant part, a dense feature matrix for each output, and parameters, centre."""
    head = model.head
    z = np.asarray(z, "float64")
    zh = head.normalize_exactly(z)
    features = []
    for c in range(head.units):
        r, w = head.gates_in_use()
        group = c % len(w)
        phi = explicit_features(zh, r[:, group], w[group], head.slope)
        features.append(np.concatenate([phi, np.ones((len(z), 1))], axis=1))
    offset = np.zeros((len(z), head.units))
    if head.dense is not None and not head.replaces_dense:
        kernel, bias = (
            np.asarray(keras.ops.convert_to_numpy(v), "float64")
            for v in head.dense.weights
        )
        offset += z @ kernel + bias
    q, r, b = (
        np.asarray(keras.ops.convert_to_numpy(v), "float64")
        for v in (head.q, head.r, head.bias)
    )
    theta = [np.append(q[:, c].T, b[c]) for c in range(head.units)]
    centre = [
        np.append(r[:, c].T if head.gates == "learned" else 0 * q[:, c].T, 0.0)
        for c in range(head.units)
    ]
    return offset, features, np.stack(theta), np.stack(centre)


def regularised(theta, centre, offset, features, loss, targets, shares, l2):
    logits = offset + np.stack(
        [phi @ part for phi, part in zip(features, theta, strict=True)], axis=1
    )
    slopes = shares[:, None] * loss.gradient(logits, targets)
    gradient = np.stack(
        [phi.T @ slopes[:, c] for c, phi in enumerate(features)]
    ) + l2 * (theta - centre)
    value = shares @ loss.value(logits, targets)
    return value + l2 / 2 * ((theta - centre) ** 2).sum(), gradient


L2_CASES = [
    (SPARSE, Y, "random", None),
    (SPARSE, Y, "learned", None),
    (
        L.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        Y,
        "random",
        np.r_[np.zeros(9), np.linspace(0.2, 3, 11)],
    ),
    (
        L.BinaryCrossentropy(from_logits=True, label_smoothing=0.1, reduction="sum"),
        Y % 2,
        "random",
        np.linspace(0, 3, 20),
    ),
    (L.MeanSquaredError(), points(n_inputs=3, seed=5), "random", None),
]


@pytest.mark.parametrize(("loss", "y", "gates", "weights"), L2_CASES)
def test_l2_gap_against_dense_features(loss, y, gates, weights):
    from scipy.optimize import minimize

    units = 1 if isinstance(loss, L.BinaryCrossentropy) else 3
    model = head_model(X, loss, units, gates=gates)
    convex = convex_loss(loss)
    found = certify(model, X, y, sample_weight=weights, l2=0.05, batch_size=7)
    all_weights = np.ones(20) if weights is None else weights
    shares = all_weights / convex.normalizer(20, all_weights.sum())
    offset, features, theta, centre = dense_problem(
        model, model.trunk.predict_on_batch(X)
    )
    targets = convex.targets(y, units)
    rest = (centre, offset, features, convex, targets, shares, 0.05)
    value, gradient = regularised(theta, *rest)
    assert found.l2 == 0.05
    assert found.l2_loss == pytest.approx(value, rel=1e-5)
    assert found.l2_gap == pytest.approx((gradient**2).sum() / 0.1, rel=1e-3)
    # The minimum is where the certificate says it is at least.
    shape = theta.shape

    def flat(point):
        value, gradient = regularised(point.reshape(shape), *rest)
        return value, gradient.ravel()

    options = {"maxiter": 2000, "ftol": 0, "gtol": 1e-13}
    best = minimize(flat, theta.ravel(), jac=True, method="L-BFGS-B", options=options)
    assert found.l2_lower_bound <= best.fun * (1 + 1e-5)
    assert found.l2_lower_bound >= found.lower_bound
    assert found.l2_loss - best.fun <= found.l2_gap * (1 + 1e-5)
    # At the minimum the certificate closes in on it.
    best = best.x.reshape(shape)
    width = model.head.width
    q = [part[:-1].reshape(width, -1).T for part in best]
    model.head.q.assign(np.stack(q, axis=1))
    model.head.bias.assign(best[:, -1])
    at_best = certify(model, X, y, sample_weight=weights, l2=0.05)
    assert at_best.l2_gap < 1e-6 * max(value, 1.0)
    assert at_best.l2_loss <= found.l2_loss
    if not found.lower_bound:
        assert at_best.l2_lower_bound == at_best.l2_loss - at_best.l2_gap


def test_l2_of_streams():
    model = head_model(X)
    x, y, weights = stream_cases()
    expected = certify(model, x, y, sample_weight=weights, l2=0.1)
    stream = Stream(x, y, weights)
    found = certify(model, (stream[i] for i in range(3)), steps=3, l2=0.1)
    assert found.l2_gap == pytest.approx(expected.l2_gap, rel=1e-5)
    assert found.l2_loss == pytest.approx(expected.l2_loss, rel=1e-6)


def test_l2_says_which_objective():
    found = certify(head_model(X), X, Y, l2=0.25)
    assert "Regularised with l2=0.25, the loss is" in str(found)
    assert "above its minimum over the head's q and b" in str(found)
    assert "loss with l2=0.25" in found._repr_html_()
    plain = certify(head_model(X), X, Y)
    assert "Regularised" not in str(plain)
    assert plain.l2_gap is plain.l2_lower_bound is None


@pytest.mark.parametrize("l2", [0, -1.0, np.nan, np.inf, "auto"])
def test_l2_must_be_positive(l2):
    with pytest.raises(ValueError, match="`l2` must be positive"):
        certify(head_model(X), X, Y, l2=l2)


def test_l2_needs_a_head_that_exploits():
    with pytest.raises(ValueError, match=r"alignment head.*align` first"):
        certify(linear(), X, Y, l2=1.0)
    model = kd.align(linear(), n_samples=20)
    with pytest.raises(ValueError, match=r"gates are set.*phase 'exploring'"):
        certify(model, X, Y, loss=SPARSE, l2=1.0)


# The bound by the gradient -----------------------------------------------------------


def in_order(certificate):
    bound = certificate.gradient_bound
    assert certificate.gap <= bound.gap * (1 + 1e-5) + 1e-6
    assert bound.loss == pytest.approx(certificate.loss, rel=1e-4, abs=1e-6)
    assert bound.lower_bound == certificate.lower_bound
    return bound


BOUND_CASES = [
    (SPARSE, Y, 3),
    (L.CategoricalCrossentropy(True, label_smoothing=0.1), np.eye(3)[Y], 3),
    (L.BinaryCrossentropy(from_logits=True), Y % 2, 1),
    (L.MeanSquaredError(reduction="sum"), points(n_inputs=3, seed=4), 3),
]


@pytest.mark.parametrize(("loss", "y", "units"), BOUND_CASES)
@pytest.mark.parametrize("kind", ["last", "head", "list"])
def test_the_bounds_agree_in_order(loss, y, units, kind):
    x = X.copy()
    x[15:] = x[:5]
    weights = np.linspace(0, 2, 20)
    model = linear(units, loss=loss)
    parameters = None
    if kind == "head":
        model = head_model(x, loss, units)
    elif kind == "list":
        parameters = model.weights
    found = certify(
        model,
        x,
        y,
        sample_weight=weights,
        gradient_bound=True,
        parameters=parameters,
        batch_size=8,
    )
    assert found.n_distinct == 15
    bound = in_order(found)
    assert bound.dtype == "float64"
    assert bound.n_parameters == sum(
        int(np.prod(v.shape))
        for v in (model.head.exploited_variables if kind == "head" else model.weights)
    )
    words = {"last": "last", "head": "head"}.get(kind, model.weights[0].path)
    assert words in bound.parameters
    assert bound.structure_error < 1e-9


def test_gradient_norms_of_a_linear_model():
    """By hand: logits `x W + b`, gradient `x^T (softmax - onehot) / n`."""
    model = linear()
    bound = certify(model, X, Y, gradient_bound=True).gradient_bound
    kernel, bias = (np.asarray(w, "float64") for w in model.get_weights())
    x = np.concatenate([X.astype("float64"), np.ones((20, 1))], axis=1)
    logits = x @ np.vstack([kernel, bias])
    exp = np.exp(logits)
    slopes = (exp / exp.sum(axis=1, keepdims=True) - np.eye(3)[Y]) / 20
    assert bound.output_gradient_norm == pytest.approx(np.linalg.norm(slopes), rel=1e-9)
    assert bound.gradient_norm == pytest.approx(np.linalg.norm(x.T @ slopes), rel=1e-9)
    expected = np.log1p(2 * np.exp(-2 * bound.psi))
    assert bound.target_loss == pytest.approx(expected, rel=1e-9)


def test_a_linear_model_at_its_minimum():
    """Linear regression on targets that it can reach: rank and gap in closed form."""
    weights = np.array([[1.0, -2.0], [0.5, 3.0]])
    y = X @ weights + 1
    model = linear(2, loss="mse")
    model.set_weights([weights, np.ones(2)])
    found = certify(model, X, y, gradient_bound=True)
    assert in_order(found).gap < 1e-12


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_low_precision_is_judged_in_float64(dtype):
    keras.config.set_dtype_policy(dtype)
    try:
        model = head_model(X)
    finally:
        keras.config.set_dtype_policy("float32")
    found = certify(model, X, Y, gradient_bound=True, l2=0.1)
    assert found.gradient_bound.dtype == "float64"
    low = dtype != "float32"
    assert found.gradient_bound.loss == pytest.approx(
        found.loss, rel=0.1 if low else 1e-4
    )
    assert found.gap <= found.gradient_bound.gap * (1.1 if low else 1 + 1e-5)
    assert found.l2_loss >= found.loss * (0.9 if low else 1 - 1e-5)


@pytest.mark.parametrize("kind", ["last", "head"])
def test_one_sample_with_all_certificates(kind):
    model = linear() if kind == "last" else head_model(X)
    l2 = 0.1 if kind == "head" else None
    found = certify(model, X[:1], Y[:1], gradient_bound=True, l2=l2)
    in_order(found)


def test_gradient_bound_of_a_stream():
    model = linear()
    x, y, weights = stream_cases()
    expected = certify(
        model, x, y, sample_weight=weights, batch_size=7, gradient_bound=True
    )
    assert certify(model, Stream(x, y, weights), gradient_bound=True) == expected


class Changing(Stream):
    """Counts its passes, and changes with them."""

    change = staticmethod(lambda part, n_pass: part)
    n_pass = -1

    def __getitem__(self, index):
        if index == 0:
            self.n_pass += 1
        part = super().__getitem__(index)
        return tuple(self.change(column, self.n_pass) for column in part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part, n: np.roll(part, n, axis=0), "in order|is not what it was"),
        (lambda part, n: part[: 7 - n], "size|is not what it was|same number"),
        (lambda part, n: part + n % 2, "content|is not what it was"),
    ],
)
def test_a_stream_that_changes_between_passes(change, message):
    x, _, weights = stream_cases()
    # Targets and weights that may change without being out of range.
    stream = Changing(x, points(21, 3)[:20], weights)
    stream.change = change
    with pytest.raises(ValueError, match=message):
        certify(linear(loss="mse"), stream, gradient_bound=True)


def test_a_generator_is_read_once_only():
    x, y, weights = stream_cases()
    stream = Stream(x, y, weights)
    generator = (stream[i] for i in range(3))
    with pytest.raises(ValueError, match=r"read once only.*generator"):
        certify(linear(), generator, steps=3, gradient_bound=True)
    assert len(list(generator)) == 3


def test_a_model_without_the_structure():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(4, "tanh"),
            keras.layers.Dense(3),
        ]
    )
    model.compile(loss=SPARSE)
    last = in_order(certify(model, X, Y, gradient_bound=True))
    assert last.structure_error < 1e-9
    whole = in_order(certify(model, X, Y, gradient_bound=True, parameters="all"))
    assert whole.structure_error > 0.01
    assert whole.n_parameters == model.count_params()


def test_a_stochastic_model_has_no_gradient_bound():
    class Noise(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.seeds = keras.random.SeedGenerator(0)

        def call(self, x):
            shape = keras.ops.shape(x)
            return x + keras.random.normal(shape, seed=self.seeds)

    model = keras.Sequential([keras.Input((2,)), Noise(), keras.layers.Dense(3)])
    model.compile(loss=SPARSE)
    with pytest.raises(ValueError, match="not a fixed function"):
        certify(model, X, Y, gradient_bound=True)


def test_parameters_without_the_gradient_bound():
    with pytest.raises(ValueError, match=r"pass gradient_bound=True"):
        certify(linear(), X, Y, parameters="last")


def test_a_certificate_with_everything_is_json():
    found = certify(head_model(X), X, Y, gradient_bound=True, l2=0.1)
    fields = json.loads(json.dumps(found.to_dict()))
    assert fields["gradient_bound"] == found.gradient_bound.to_dict()
    assert fields["l2"] == 0.1
    assert GradientBound(**fields["gradient_bound"]) == found.gradient_bound
    text = str(found)
    assert "By its gradient, it is at most" in text
    assert text.index("Regularised") < text.index("By its gradient")
    assert "gap by the gradient" in found._repr_html_()


# Planted repeats ---------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [16, 1000])
def test_planted_repeats_of_images(batch_size):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 8, 8, 3), dtype="uint8")
    y = rng.integers(0, 10, 200)
    images[150:160] = images[:10]
    images[160:165] = images[:5]
    y[150:165] = y[np.r_[:10, :5]]
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10),
        ]
    )
    model.compile(loss=SPARSE)
    found = certify(model, images, y, batch_size=batch_size)
    assert found.n_distinct == 185
    assert found.n_conflicts == 0
    assert found.lower_bound == 0
    # Three of a kind with labels a, a, b; two of a kind with labels a, b.
    y[160:162] = (y[:2] + 1) % 10
    y[155:158] = (y[5:8] + 1) % 10
    found = certify(model, images, y, batch_size=batch_size)
    assert found.n_conflicts == 5
    assert set(found.conflicts) == {(0, 160), (1, 161), (5, 155), (6, 156), (7, 157)}
    three = np.log(3) - 2 / 3 * np.log(2)
    expected = (2 * 3 * three + 3 * 2 * np.log(2)) / 200
    assert found.lower_bound == pytest.approx(expected, rel=1e-12)


def residual_regression(seed):
    """A residual trunk with a solved head, data, and the exact regularised minimum."""
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    n, p, outputs, hidden = (int(rng.integers(*ends)) for ends in SIZES)
    inputs = keras.Input((p,))
    z = keras.layers.Dense(hidden, activation="relu")(inputs)
    z = keras.layers.Add()([z, keras.layers.Dense(hidden, activation="relu")(z)])
    base = keras.Model(inputs, keras.layers.Dense(outputs)(z))
    x = rng.standard_normal((n, p)).astype("float32")
    y = (10 ** rng.uniform(-1, 2) * rng.standard_normal((n, outputs))).astype("float32")
    l2 = float(10 ** rng.uniform(-6, 0))
    model = kd.align(
        base,
        n_samples=n,
        seed=seed,
        gates=("random", "learned")[seed % 2],
        share_gates=seed % 3 == 0,
    )
    model.compile("sgd", "mse")
    method = ("direct", "lbfgs")[seed % 2]
    result = kd.solve(model, x, y, l2=l2, method=method, tol=1e-9, verbose=0)
    features = FeaturePass(model, keep=True).run(x, y).feature_set()
    offset, phis, _, centres = dense_problem(model, features.z)
    best = 0.0
    for c in range(outputs):
        right = (y[:, c] - offset[:, c] - phis[c] @ centres[c]) / np.sqrt(n * outputs)
        rows = phis[c] / np.sqrt(n * outputs)
        rows = np.r_[rows, np.sqrt(l2 / 2) * np.eye(rows.shape[1])]
        right = np.r_[right, np.zeros(rows.shape[1])]
        found = np.linalg.lstsq(rows, right, rcond=None)[0]
        best += float(np.sum((rows @ found - right) ** 2))
    return result, kd.certify(model, x, y, l2=l2), best


SIZES = ((5, 60), (1, 6), (1, 4), (2, 9))


@pytest.mark.parametrize("seed", range(12))
def test_the_regularised_optimum_is_within_the_certificate(seed):
    result, certificate, best = residual_regression(seed)
    for value, gap in (
        (certificate.l2_loss, certificate.l2_gap),
        (result.value, result.gap),
    ):
        # Up to the rounding of the reference, and of the loss in float32.
        assert value - gap <= best * (1 + 1e-12)
        assert value >= best * (1 - 1e-5)
