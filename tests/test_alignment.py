import json
import logging
import warnings

import keras
import numpy as np
import pytest
from small import KINDS, cross_entropy, digits, gates_of, mlp

from keras_dalign.diagnostics import alignment, alignment_route
from keras_dalign.diagnostics.alignment import AlignmentReport, check_alignment
from keras_dalign.numerics.gram import explicit_features
from keras_dalign.training.surgery import align

L = keras.losses
SPARSE = L.SparseCategoricalCrossentropy(from_logits=True)
BINARY = L.BinaryCrossentropy(from_logits=True)
ROUTES = ["dense", "gram", "lsqr"]


def network(inputs=4, hidden=30, units=3, loss=SPARSE, dtype=None, seed=0):
    """Two layers with a tanh between; without `hidden`, one linear layer."""
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((inputs,))]
    if hidden:
        layers.append(keras.layers.Dense(hidden, "tanh", dtype=dtype))
    layers.append(keras.layers.Dense(units, dtype=dtype))
    model = keras.Sequential(layers)
    model.compile(loss=loss)
    return model


def points(n=12, inputs=4, seed=0):
    return np.random.default_rng(seed).standard_normal((n, inputs)).astype("float32")


def jacobian_by_hand(model, x, parameters):
    """The chain rule written out, in the order of `model.weights`."""
    weights = [np.array(w).astype("float64") for w in model.get_weights()]
    x = np.asarray(x, "float64")
    W, b = weights[-2:]
    units = len(b)
    features = x if len(weights) == 2 else np.tanh(x @ weights[0] + weights[1])
    rows = []
    for i in range(len(x)):
        for c in range(units):
            own = np.eye(units)[c]
            last = np.concatenate([np.outer(features[i], own).ravel(), own])
            first = np.zeros(0)
            if len(weights) == 4:
                inner = W[:, c] * (1 - features[i] ** 2)
                first = np.concatenate([np.outer(x[i], inner).ravel(), inner])
            rows.append(last if parameters == "last" else np.r_[first, last])
    return np.array(rows)


def residual_by_hand(J, Y):
    """Residual, rank and spectrum by a full singular value decomposition."""
    left, values, _ = np.linalg.svd(J, full_matrices=False)
    cut = max(*J.shape, 100) * 2.0**-52
    rank = int(np.sum(values > cut * values[0]))
    basis = left[:, :rank]
    vector = Y.ravel()
    outside = vector - basis @ (basis.T @ vector)
    return np.linalg.norm(outside) / np.linalg.norm(vector), rank, values


def signs(y, units):
    return np.where(np.arange(units) == np.asarray(y)[:, None], 1.0, -1.0)


def planted(n=12):
    """Inputs in a plane through the origin, exactly: they are integers."""
    return np.round(3 * points(n, 2)) @ np.round(3 * points(2, 4, seed=1))


def repeated():
    x = points(12)
    x[6:] = x[:6]
    return x


LABELS = np.arange(12) % 3
CASES = {
    # model, inputs, labels, modified targets, rank of "last" and of "all"
    "full rank": (
        lambda: network(hidden=40),
        points(),
        LABELS,
        signs(LABELS, 3),
        (36, 36),
    ),
    "narrow": (
        lambda: network(hidden=2),
        points(),
        LABELS,
        signs(LABELS, 3),
        (3 * 3, None),
    ),
    "linear model": (
        lambda: network(hidden=0),
        points(),
        LABELS,
        signs(LABELS, 3),
        (3 * 5, 3 * 5),
    ),
    "planted subspace": (
        lambda: network(hidden=0),
        planted(),
        LABELS,
        signs(LABELS, 3),
        (3 * 3, 3 * 3),
    ),
    "repeated inputs": (
        network,
        repeated(),
        LABELS,
        signs(LABELS, 3),
        (18, 18),
    ),
    "conflicting labels": (
        network,
        repeated(),
        np.r_[LABELS[:6], 1, LABELS[7:]],
        signs(np.r_[LABELS[:6], 1, LABELS[7:]], 3),
        (18, 18),
    ),
    "one output": (
        lambda: network(units=1, hidden=5, loss=BINARY),
        points(),
        LABELS % 2,
        signs(1 - LABELS % 2, 2)[:, :1],
        (6, None),
    ),
    "squared error": (
        lambda: network(units=2, hidden=3, loss="mse"),
        points(),
        points(12, 2, seed=5),
        points(12, 2, seed=5).astype("float64"),
        (8, None),
    ),
    "one sample": (
        network,
        points(1),
        LABELS[1:2],
        signs(LABELS[1:2], 3),
        (3, 3),
    ),
    "mixed precision": (
        lambda: network(hidden=2, dtype="mixed_bfloat16"),
        points(),
        LABELS,
        signs(LABELS, 3),
        (9, None),
    ),
    "float64": (
        lambda: network(hidden=2, dtype="float64"),
        points(),
        LABELS,
        signs(LABELS, 3),
        (9, None),
    ),
}

if keras.backend.backend() == "jax":
    # Without a setting for the whole process, JAX has no such weights.
    del CASES["float64"]


@pytest.fixture
def once(monkeypatch):
    """Makes each Jacobian once: a test that compares the routes needs no more."""
    make, made = alignment.jacobian, {}

    def jacobian(model, x, parameters, **arguments):
        key = id(model), parameters
        if key not in made:
            made[key] = make(model, x, parameters, **arguments)
        return made[key]

    monkeypatch.setattr(alignment, "jacobian", jacobian)


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("parameters", ["last", "all"])
@pytest.mark.parametrize("case", CASES)
def test_report_against_a_dense_answer(case, parameters):
    make, x, y, Y, ranks = CASES[case]
    model = make()
    J = jacobian_by_hand(model, x, parameters)
    residual, rank, values = residual_by_hand(J, Y)
    stated = ranks[parameters == "all"]
    assert rank == (stated or rank)
    for route in ROUTES:
        report = check_alignment(model, x, y, parameters=parameters, method=route)
        assert report.route == route
        assert report.residual == pytest.approx(residual, abs=1e-7)
        assert report.residual >= report.lower_bound - 1e-12
        assert report.aligned == (residual < 1e-9)
        assert report.decided
        assert report.converged
        assert report.dtype == "float64"
        assert (report.n, report.units) == Y.shape
        assert (report.n_rows, report.n_parameters) == J.shape
        assert report.sigma_max <= values[0] * (1 + 1e-9)
        if route == "lsqr":
            assert report.rank is report.sigma_min is report.condition is None
            assert report.full_row_rank is None
        else:
            assert report.rank == rank
            assert report.full_row_rank == (rank == len(J))
            assert report.sigma_max == pytest.approx(values[0])
            assert report.sigma_min == pytest.approx(values[rank - 1], rel=1e-5)
            assert report.condition == pytest.approx(
                values[0] / values[rank - 1], rel=1e-5
            )


def test_residuals_of_each_output():
    model, x, Y = network(hidden=2), points(), signs(LABELS, 3)
    left, _, _ = np.linalg.svd(jacobian_by_hand(model, x, "last"), full_matrices=False)
    outside = (Y.ravel() - left @ (left.T @ Y.ravel())).reshape(Y.shape)
    expected = np.linalg.norm(outside, axis=0) / np.linalg.norm(Y, axis=0)
    report = check_alignment(model, x, LABELS)
    np.testing.assert_allclose(report.residuals, expected)
    assert report.worst_output == np.argmax(expected)
    assert report.parameters == "the last layer"


def test_conflicts_bound_the_residual_from_below():
    labels = np.r_[LABELS[:6], 1, LABELS[7:]]
    Y = signs(labels, 3)
    # Sample 6 repeats sample 0, and each is off the mean of their targets.
    expected = np.linalg.norm(Y[6] - Y[0]) / np.sqrt(2) / np.linalg.norm(Y)
    for route in ROUTES:
        report = check_alignment(network(), repeated(), labels, method=route)
        assert report.lower_bound == pytest.approx(expected)
        assert report.residual == pytest.approx(expected)
        assert report.n_distinct == 6
        assert not report.aligned
    assert "Identical inputs with different targets alone leave" in str(report)


def test_a_conflict_decides_where_lsqr_does_not():
    labels = np.r_[LABELS[:6], 1, LABELS[7:]]
    arguments = {"parameters": [], "method": "lsqr", "max_iterations": 1}
    model = network()
    arguments["parameters"] = [model.layers[0].kernel]
    assert check_alignment(model, repeated(), labels, **arguments).decided
    report = check_alignment(model, points(), LABELS, **arguments)
    assert not report.decided
    assert not report.aligned
    assert str(report).startswith("Undecided: a share of at most")
    assert report.iterations == 1


def test_a_list_of_variables():
    model, x = network(hidden=3), points()
    kernel = model.layers[0].kernel
    J = jacobian_by_hand(model, x, "all")[:, : 4 * 3]
    residual, rank, _ = residual_by_hand(J, signs(LABELS, 3))
    for route in ROUTES:
        report = check_alignment(model, x, LABELS, parameters=(kernel,), method=route)
        assert report.residual == pytest.approx(residual, abs=1e-7)
        assert report.rank in {rank, None}
        assert report.parameters == "1 given variables"


# The head --------------------------------------------------------------------------


def exploiting(kind="shared", width=None, n=40):
    x, y = digits(n)
    base = mlp()
    base.compile(loss=cross_entropy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The head is too narrow on purpose.
        # Steep gates close: singular values of all sizes, some as small as rounding.
        model = align(base, n_samples=n, width=width, slope=2, seed=0, **KINDS[kind])
    model.compile(loss=cross_entropy())
    model.start_exploiting()
    return model, x, y


def head_by_hand(model, x, y):
    """Residual and singular values of each output, from explicit features."""
    features = x.astype("float64")
    weights = iter(np.array(w).astype("float64") for w in model.trunk.get_weights())
    for kernel, bias in zip(weights, weights, strict=True):
        features = np.maximum(features @ kernel + bias, 0)
    zh = model.head.normalize_exactly(features)
    Y = signs(y, 10)
    outside, values = [], []
    for c in range(10):
        r, w = gates_of(model.head, c)
        phi = explicit_features(zh, r, w, model.head.slope)
        J = np.concatenate([phi, np.ones((len(x), 1))], axis=1)
        share, _, sigma = residual_by_hand(J, Y[:, c : c + 1])
        outside.append(share)
        values.append(sigma)
    return np.array(outside), np.array(values)


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize(
    ("kind", "width"),
    [("shared", 1), ("shared", None), ("separate", 1), ("learned", 2)],
)
def test_the_head_output_by_output(kind, width):
    model, x, y = exploiting(kind, width)
    shares, values = head_by_hand(model, x, y)
    expected = np.linalg.norm(shares) / np.sqrt(10)
    for route in ROUTES:
        report = check_alignment(model, x, y, method=route)
        assert report.parameters == "the head's q and b"
        np.testing.assert_allclose(report.residuals, shares, atol=2e-6)
        assert report.residual == pytest.approx(expected, abs=1e-6)
        assert report.decided
        if route != "lsqr":
            counts = values > report.rank_tolerance * values[:, :1]
            assert report.rank == counts.sum()
            assert report.full_row_rank == (counts.sum() == 400)
            assert report.sigma_max == pytest.approx(values.max(), rel=1e-6)
            assert report.sigma_min == pytest.approx(values[counts].min(), rel=1e-2)


def test_an_exploring_model_is_judged_by_its_last_layer():
    x, y = digits(20)
    base = mlp()
    base.compile(loss=cross_entropy())
    model = align(base, n_samples=20)
    model.compile(loss=cross_entropy())
    report = check_alignment(model, x, y)
    assert report.parameters == "the last layer"
    assert report.residual == pytest.approx(check_alignment(base, x, y).residual)


# Routes ----------------------------------------------------------------------------


def test_auto_takes_the_most_exact_that_fits(caplog):
    model, x = network(hidden=300), points(40)
    y = np.arange(40) % 3
    caplog.set_level(logging.INFO, "keras_dalign")
    reports = {}
    # J is 120 x 2403, 2.3 MB; its Gram matrix and what eigh needs 0.6 MB, with lots.
    for memory in (2**30, 10**6, 3 * 10**5):
        caplog.clear()
        report = check_alignment(
            model, x, y, parameters="all", max_memory=memory, max_iterations=5
        )
        reports[report.route] = report
        assert f"{report.memory / 2**20:.3g} MiB" in caplog.text
        assert report.memory <= memory
    assert list(reports) == ROUTES
    assert reports["dense"].reason.startswith("it fits")
    assert reports["gram"].reason.startswith("a factor of J would take")
    assert "its Gram matrix would take" in reports["lsqr"].reason
    assert reports["gram"].rank == reports["dense"].rank
    assert reports["gram"].residual == pytest.approx(
        reports["dense"].residual, abs=1e-6
    )
    assert reports["lsqr"].residual >= reports["dense"].residual


def test_auto_keeps_to_the_flop_budget(monkeypatch):
    monkeypatch.setattr(alignment_route, "_FLOP_BUDGET", 1e3)
    report = check_alignment(network(), points(), LABELS)
    assert report.route == "lsqr"
    assert "flop" in report.reason


def test_auto_takes_the_cheaper_route_where_it_is_enough(monkeypatch):
    monkeypatch.setattr(alignment_route, "_QUICK_FLOPS", 0.0)
    monkeypatch.setattr(alignment_route, "_FLOP_RATIO", 0.0)
    # Full row rank, which a Gram matrix shows as well.
    full = check_alignment(network(), points(), LABELS, parameters="all")
    exact = check_alignment(
        network(), points(), LABELS, parameters="all", method="dense"
    )
    assert full.route == "gram"
    assert full.full_row_rank is exact.full_row_rank is True
    # Where it is singular, small singular values are looked at after all.
    deficient = check_alignment(network(), repeated(), LABELS, parameters="all")
    exact = check_alignment(
        network(), repeated(), LABELS, parameters="all", method="dense"
    )
    assert deficient.route == "dense"
    assert "is singular" in deficient.reason
    assert deficient.full_row_rank is False
    assert deficient.residual == exact.residual
    assert deficient.rank == exact.rank


def test_a_method_that_does_not_fit_is_refused():
    arguments = {"parameters": "all", "max_memory": 1000}
    for method in ("dense", "gram", "lsqr"):
        with pytest.raises(MemoryError, match=r"needs .* MiB for a matrix of 36 x"):
            check_alignment(network(), points(), LABELS, method=method, **arguments)


def test_a_gram_matrix_cannot_show_small_singular_values():
    arguments = {"parameters": "all", "rank_tolerance": 1e-10}
    with pytest.raises(ValueError, match="does not show singular values that small"):
        check_alignment(network(), points(), LABELS, method="gram", **arguments)
    report = check_alignment(
        network(), points(), LABELS, max_memory=10**5, max_iterations=2, **arguments
    )
    assert report.route == "lsqr"
    assert "does not show the rank tolerance" in report.reason


def test_the_rank_tolerance_counts():
    model, x = network(), points()
    _, _, values = residual_by_hand(
        jacobian_by_hand(model, x, "last"), signs(LABELS, 3)
    )
    cut = float(np.sqrt(values[17] * values[18]) / values[0])
    for method in ("dense", "gram"):
        report = check_alignment(model, x, LABELS, rank_tolerance=cut, method=method)
        assert report.rank == 18
        assert report.rank_tolerance == cut


# Data ------------------------------------------------------------------------------


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, shuffled=False):
        super().__init__()
        self.x, self.y, self.shuffled = x, y, shuffled
        self.reads = 0

    def __len__(self):
        return 3

    def __getitem__(self, index):
        self.reads += 1
        x = self.x[index::3]
        # From the last pass on.
        if self.shuffled and self.reads > self.shuffled:
            x = x[::-1]
        return (x, self.y[index::3]) if self.y is not None else (x,)


@pytest.mark.parametrize("parameters", ["last", "all"])
def test_a_stream_is_what_its_arrays_are(parameters):
    x, y = points(13), np.arange(13) % 3
    order = np.r_[0:13:3, 1:13:3, 2:13:3]
    model = network(hidden=3)
    stream = check_alignment(model, Batches(x, y), parameters=parameters)
    arrays = check_alignment(model, x[order], y[order], parameters=parameters)
    assert stream.residual == pytest.approx(arrays.residual)
    assert stream.n == 13
    assert stream.rank == arrays.rank


def test_a_stream_that_changes_is_refused():
    stream = Batches(points(13), np.arange(13) % 3)
    check_alignment(network(hidden=3), stream)
    reads = stream.reads
    # The first pass, any in between, and the last.
    for after in (3, 5, reads - 1):
        changing = Batches(points(13), np.arange(13) % 3, after)
        with pytest.raises(ValueError, match="changed"):
            check_alignment(network(hidden=3), changing)


def test_a_generator_is_refused():
    batches = ((points(4), LABELS[:4]) for _ in range(3))
    with pytest.raises(ValueError, match="read several times"):
        check_alignment(network(), batches)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_batches_do_not_matter(batch_size):
    model = network(hidden=3)
    reference = check_alignment(model, points(), LABELS, parameters="all")
    report = check_alignment(
        model, points(), LABELS, parameters="all", batch_size=batch_size
    )
    assert report.residual == pytest.approx(reference.residual, rel=1e-9)


def test_the_scale_of_the_targets_does_not_matter():
    model, Y = network(hidden=2, units=2, loss="mse"), points(12, 2).astype("float64")
    reference = check_alignment(model, points(), Y).residual
    for scale in (1e-200, 1e200):
        report = check_alignment(model, points(), scale * Y)
        assert report.residual == pytest.approx(reference)


@pytest.mark.parametrize("route", ROUTES)
def test_zero_targets_lie_in_every_column_space(route):
    model = network(hidden=2, units=2, loss="mse")
    report = check_alignment(model, points(), np.zeros((12, 2)), method=route)
    assert report.residual == 0
    assert report.residuals == (0, 0)
    assert report.aligned
    assert report.decided


def test_nothing_of_the_model_changes():
    model = network()
    before = [np.array(w) for w in model.get_weights()]
    check_alignment(model, points(), LABELS, method="lsqr", parameters="all")
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


# The report ------------------------------------------------------------------------


def test_report_prints_and_serialises():
    reports = [
        check_alignment(network(hidden=2), points(), LABELS),
        check_alignment(network(), points(), LABELS),
        check_alignment(network(hidden=2), points(), LABELS, method="lsqr"),
    ]
    for report in reports:
        fields = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert fields["residual"] == report.residual
        assert fields["route"] == report.route
        assert fields["worst_output"] == report.worst_output
        assert f"{report.n_rows} rows" in str(report)
        assert "float64" in str(report)
        assert report.reason in str(report)
        assert f"{report.n_rows} = 12 samples x 3 outputs" in report._repr_html_()
    assert "Not aligned: a share of 0." in str(reports[0])
    assert "Aligned: a share of at most" in str(reports[1])
    assert "full row rank: any labels are aligned" in str(reports[1])
    assert "sigma_max is at least" in str(reports[2])


def test_report_is_frozen():
    report = check_alignment(network(hidden=2), points(), LABELS)
    assert isinstance(report, AlignmentReport)
    with pytest.raises(AttributeError):
        report.residual = 0.0


# Bad input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "svd"}, "`method` must be one of"),
        ({"tolerance": 0.0}, "`tolerance` must be a number between 0 and 1"),
        ({"tolerance": float("nan")}, "`tolerance` must be a number between 0 and 1"),
        ({"tolerance": 1e-17}, "below machine precision, 2.2e-16"),
        ({"rank_tolerance": 1e-17}, "`rank_tolerance` is below machine precision"),
        ({"rank_tolerance": 1.0}, "`rank_tolerance` must be a number between 0 and 1"),
        ({"max_memory": 0}, "`max_memory` must be a positive int"),
        ({"max_iterations": 0}, "`max_iterations` must be a positive int"),
        ({"parameters": "first"}, "`parameters` must be one of"),
        ({"parameters": "head"}, "no alignment head that exploits"),
        ({"loss": "mae"}, "convex"),
        ({"loss": "sparse_categorical_crossentropy"}, "from_logits"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_alignment(network(), points(), LABELS, **arguments)


def test_no_loss():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="The model has no loss"):
        check_alignment(model, points(), LABELS)
    assert check_alignment(model, points(), LABELS, loss=SPARSE).n == 12


def test_no_targets():
    for data in (points(), Batches(points(), None)):
        with pytest.raises(ValueError, match="Targets are needed"):
            check_alignment(network(), data)


def test_labels_that_do_not_fit():
    with pytest.raises(ValueError, match="integers from 0 to 2"):
        check_alignment(network(), points(), LABELS + 1)
    with pytest.raises(ValueError, match="same number of samples"):
        check_alignment(network(), points(), LABELS[:5])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_inputs(value):
    x = points()
    x[3, 1] = value
    with pytest.raises(ValueError, match="finite"):
        check_alignment(network(), x, LABELS)


@pytest.mark.parametrize("parameters", ["last", "all"])
def test_a_model_that_has_diverged(parameters):
    model = network()
    model.layers[-1].bias.assign([np.nan, 0.0, 0.0])
    with pytest.raises(ValueError, match="must not be NaN"):
        check_alignment(model, points(), LABELS, parameters=parameters)


def test_a_stochastic_model():
    class Noise(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.seeds = keras.random.SeedGenerator(0)

        def call(self, x):
            return x + keras.random.normal(keras.ops.shape(x), seed=self.seeds)

    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(3)(Noise()(inputs)))
    model.compile(loss=SPARSE)
    with pytest.raises(ValueError, match="not a fixed function"):
        check_alignment(model, points(), LABELS)


def test_a_softmax_at_the_end():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    with pytest.raises(ValueError, match="softmax"):
        check_alignment(model, points(), LABELS, loss=SPARSE)


class Custom(keras.Model):
    """A model whose config does not rebuild it."""

    def __init__(self, units):
        super().__init__()
        self.dense = keras.layers.Dense(units)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        raise NotImplementedError


def test_a_model_that_has_no_float64_copy_is_judged_in_its_own_dtype():
    model = Custom(3)
    model(points())
    report = check_alignment(model, points(), LABELS, loss=SPARSE)
    Y = signs(LABELS, 3)
    J = np.kron(np.c_[points(), np.ones(12)], np.eye(3))
    assert report.dtype == "float32"
    assert report.residual == pytest.approx(residual_by_hand(J, Y)[0], abs=1e-5)
    assert report.rank == 15
    assert report.rank_tolerance > 1e-6
    with pytest.raises(ValueError, match=r"below machine precision, 1\.2e-07"):
        check_alignment(model, points(), LABELS, loss=SPARSE, tolerance=1e-8)
