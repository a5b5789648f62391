"""The monitor's entries against dense Jacobians, and that nobody notices it."""

import csv
import math
import random

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy as to_numpy
from small import (
    KINDS,
    assert_equal,
    convnet,
    cross_entropy,
    digit_images,
    digits,
    gates_of,
    mlp,
    weights,
)

import keras_dalign as kd
from keras_dalign.certification import monitor as monitor_module
from keras_dalign.certification import monitored_model
from keras_dalign.certification.feature_movement import feature_movement
from keras_dalign.certification.monitor import AlignmentMonitor
from keras_dalign.numerics.gram import explicit_features

BACKEND = keras.backend.backend()
ENTRIES = [
    "alignment_residual",
    "alignment_rank",
    "alignment_condition",
    "gap",
    "feature_movement",
]
HEAD = ["head_residual", "head_rank", "head_condition"]
# To trace the steps takes TensorFlow longer than these few. That the monitor leaves
# compiled ones alone has tests of its own.
EAGERLY = BACKEND == "tensorflow"


def fitted(model, x, y, epochs=1, callbacks=(), loss=None, **arguments):
    """Fits with a monitor; what it logged, and the monitor."""
    monitor = AlignmentMonitor(x, y, **arguments)
    if not model.compiled:
        model.compile(
            keras.optimizers.Adam(1e-2),
            loss=loss or cross_entropy(),
            run_eagerly=EAGERLY,
        )
    run = model.fit(x, y, epochs=epochs, verbose=0, callbacks=[monitor, *callbacks])
    return run.history, monitor


def aligned(n, kind="shared", explore=1, base=None, **arguments):
    options = {**KINDS[kind], **arguments}
    model = kd.align(base or mlp(), n_samples=n, seed=1, **options)
    model.compile(
        kd.DAlign(
            keras.optimizers.Adam(1e-2), None, explore=explore, average_weights=0
        ),
        loss=cross_entropy(),
        run_eagerly=EAGERLY,
    )
    return model


def brute_force(jacobian, targets):
    """Residual, rank and condition of a dense Jacobian, by SVD and least squares."""
    values = np.linalg.svd(jacobian, compute_uv=False)
    cut = np.sqrt(max(jacobian.shape) * np.finfo(float).eps)
    rank = np.count_nonzero(values > cut * values[0])
    solution = np.linalg.lstsq(jacobian, targets.ravel(), rcond=cut)[0]
    left = np.linalg.norm(targets.ravel() - jacobian @ solution)
    return left / np.linalg.norm(targets), rank, values[rank - 1] / values[0]


def assert_close(history, prefix, expected, epoch=-1):
    residual, rank, condition = expected
    assert history[f"{prefix}_rank"][epoch] == rank
    assert history[f"{prefix}_residual"][epoch] == pytest.approx(
        residual, rel=1e-5, abs=1e-6
    )
    assert history[f"{prefix}_condition"][epoch] == pytest.approx(condition, rel=1e-4)


def features_of(model, x):
    """The output layer's inputs, by a model of our own."""
    if len(model.layers) == 1:
        return x.astype("float64")
    inner = keras.Model(model.inputs[0], model.layers[-2].output)
    return inner.predict_on_batch(x).astype("float64")


def one_hot(y, units=10):
    return 2.0 * np.eye(units)[y] - 1.0


def test_the_last_layer_of_a_plain_model():
    x, y = digits(60)
    model = mlp()
    history, monitor = fitted(model, x, y, epochs=2)
    assert list(history) == ["loss", *ENTRIES]
    np.testing.assert_array_equal(monitor.samples, np.arange(60))
    z = np.c_[features_of(model, x), np.ones(60)]
    assert_close(history, "alignment", brute_force(np.kron(z, np.eye(10)), one_hot(y)))
    assert 0.1 < history["alignment_residual"][-1] < 1


def linear(**last):
    return keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, **last)])


def regression(units):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(12, "tanh"),
            keras.layers.Dense(units),
        ]
    )


def duplicated():
    x, y = digits(30)
    return np.concatenate([x, x[:5]]), np.concatenate([y, (y[:5] + 1) % 10])


def planted(n=40):
    """Inputs of rank 5."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 5)) @ rng.normal(size=(5, 64))
    return x.astype("float32"), rng.integers(0, 10, n)


PLAIN = {
    # model, data, rank of [z, 1]
    "more features than samples": (linear, digits(20), 20),
    "linear, planted subspace": (linear, planted(), 6),
    "linear, no bias": (lambda: linear(use_bias=False), planted(), 5),
    "duplicates with conflicting labels": (linear, duplicated(), 30),
    "one sample": (linear, digits(1), 1),
}


@pytest.mark.parametrize("case", PLAIN)
def test_ranks_known_in_closed_form(case):
    build, (x, y), rank = PLAIN[case]
    model = build()
    history, _ = fitted(model, x, y)
    z = features_of(model, x)
    if model.layers[-1].use_bias:
        z = np.c_[z, np.ones(len(x))]
    expected = brute_force(np.kron(z, np.eye(10)), one_hot(y))
    assert expected[1] == 10 * rank
    assert_close(history, "alignment", expected)
    if rank == len(x):
        assert history["alignment_residual"] == [0.0]


@pytest.mark.parametrize("units", [1, 3])
def test_squared_error(units):
    x, _ = digits(50)
    y = np.random.default_rng(0).normal(size=(50, units)).astype("float32")
    model = regression(units)
    history, _ = fitted(model, x, y[:, 0] if units == 1 else y, loss="mse")
    z = np.c_[features_of(model, x), np.ones(50)]
    expected = brute_force(np.kron(z, np.eye(units)), y.astype("float64"))
    assert_close(history, "alignment", expected)
    assert history["gap"][0] == pytest.approx(
        np.mean((model.predict(x, verbose=0) - y) ** 2), rel=1e-5
    )


def test_one_output_and_binary_labels():
    x, y = digits(50)
    y = (y > 4).astype("float32")
    model = regression(1)
    history, _ = fitted(
        model, x, y, loss=keras.losses.BinaryCrossentropy(from_logits=True)
    )
    z = np.c_[features_of(model, x), np.ones(50)]
    assert_close(history, "alignment", brute_force(z, 2.0 * y[:, None] - 1.0))


def test_targets_of_zero_leave_nothing_to_reach():
    x, _ = digits(30)
    history, _ = fitted(regression(1), x, np.zeros(30, "float32"), loss="mse")
    assert history["alignment_residual"] == [0.0]


def test_mixed_precision():
    x, y = digits(60)
    keras.utils.set_random_seed(0)
    policy = "mixed_bfloat16"
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(16, "relu", dtype=policy),
            keras.layers.Dense(10, dtype=policy),
        ]
    )
    history, _ = fitted(model, x, y)
    z = np.c_[features_of(model, x), np.ones(60)]
    expected = brute_force(np.kron(z, np.eye(10)), one_hot(y))
    assert_close(history, "alignment", expected)
    assert history["gap"][0] == pytest.approx(kd.certify(model, x, y).gap, rel=1e-3)


# --- the head -------------------------------------------------------------------------

# A head too narrow for its samples, to have something out of reach, is warned of.
NARROW = pytest.mark.filterwarnings("ignore:The head is too narrow|The rank check")


def head_jacobian(head, u):
    """`blockdiag([Phi_c, 1])`, rows ordered class by class, from an exploiting head."""
    rows = head.normalize_exactly(u)
    blocks = []
    for c in range(head.units):
        phi = explicit_features(rows, *gates_of(head, c), head.slope)
        blocks.append(np.c_[phi, np.ones(len(rows))])
    n, columns = blocks[0].shape
    jacobian = np.zeros((head.units * n, head.units * columns))
    for c, block in enumerate(blocks):
        jacobian[c * n : (c + 1) * n, c * columns : (c + 1) * columns] = block
    return jacobian


@NARROW
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 12])
def test_the_head_that_would_be_if_the_switch_came_now(kind, width):
    x, y = digits(40)
    model = aligned(40, kind, explore=2, width=width)
    found = {}
    before = []

    def look(epoch, logs):
        if epoch == 1:
            found.update(logs)
            before.extend(weights(model))
            model.stop_training = True

    stop = keras.callbacks.LambdaCallback(on_epoch_end=look)
    history, _ = fitted(model, x, y, epochs=3, callbacks=[stop])
    assert model.phase == "exploring"
    assert_equal(before, weights(model))
    u = model.trunk.predict(x, verbose=0).astype("float64")
    standardize = model.head.standardize
    standardize.moving_mean.assign(u.mean(axis=0))
    standardize.moving_variance.assign(u.var(axis=0))
    model.start_exploiting(model.optimizer.noise)
    expected = brute_force(head_jacobian(model.head, u), one_hot(y).T)
    assert_close(history, "head", expected)
    assert (expected[1] == 400) == (width == 12)
    if kind == "learned":
        assert_close(history, "alignment", expected)
    else:
        z = np.c_[u, np.ones(40)]
        last = brute_force(np.kron(z, np.eye(10)), one_hot(y))
        assert_close(history, "alignment", last)


@NARROW
@pytest.mark.parametrize("kind", KINDS)
def test_the_head_in_exploitation(kind):
    x, y = digits(40)
    model = aligned(40, kind, width=1)
    history, _ = fitted(model, x, y, epochs=3)
    assert list(history) == ["loss", "phase", *ENTRIES, *HEAD]
    assert history["phase"] == [0, 1, 1]
    u = model.trunk.predict(x, verbose=0).astype("float64")
    expected = brute_force(head_jacobian(model.head, u), one_hot(y).T)
    for prefix in ("head", "alignment"):
        assert_close(history, prefix, expected, epoch=1)
        assert_close(history, prefix, expected, epoch=2)
    assert history["feature_movement"][1] == history["feature_movement"][2]
    assert history["gap"][2] < history["gap"][1]


def test_a_head_whose_width_the_solver_chooses():
    """The default would be billions of gates; the switch takes a few to begin with."""
    x, y = digits(40)
    model = kd.align(mlp(), n_samples=10**12, seed=1)
    options = {"l2": 1e-2}
    model.compile(
        kd.DAlign("adam", "solve", explore=2, solve_options=options, average_weights=0),
        loss=cross_entropy(),
    )
    found = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: found.append((model.head.width, logs))
    )
    fitted(model, x, y, epochs=3, callbacks=[look])
    assert [width for width, _ in found[:2]] == [None, None]
    u = model.trunk.predict(x, verbose=0).astype("float64")
    for width, logs in ((8, found[1][1]), found[-1]):
        model.set_width(width)
        expected = brute_force(head_jacobian(model.head, u), one_hot(y).T)
        assert logs["head_rank"] == expected[1]
        assert logs["head_condition"] == pytest.approx(expected[2], rel=1e-3)


@NARROW
def test_a_head_on_other_features_than_the_output_layer_s():
    x, y = digits(40)
    model = aligned(40, features="hidden", width=1, explore=2)
    history, _ = fitted(model, x, y, epochs=3)
    z, u = (rows.astype("float64") for rows in model.trunk.predict(x, verbose=0))
    assert_close(
        history,
        "head",
        brute_force(head_jacobian(model.head, u), one_hot(y).T),
    )
    z = np.c_[z, np.ones(40)]
    last = brute_force(np.kron(z, np.eye(10)), one_hot(y))
    # The trunk has no batch norm: the switch leaves its features as they were.
    assert_close(history, "alignment", last, epoch=1)


def test_what_is_frozen_is_computed_once(monkeypatch):
    x, y = digits(40)
    calls = []
    head_space = monitor_module.head_space

    def counted(*args):
        calls.append(args[0].phase)
        return head_space(*args)

    monkeypatch.setattr(monitor_module, "head_space", counted)
    fitted(aligned(40, explore=2), x, y, epochs=6)
    assert calls == ["exploring", "exploring", "exploiting"]


# --- gap and movement -----------------------------------------------------------------


def test_the_gap_is_logged_before_the_solver_logs_its_own():
    x, y = digits(60)
    model = kd.align(mlp(), n_samples=60, seed=0)
    model.compile(kd.DAlign("adam", explore=2), cross_entropy())
    monitor = AlignmentMonitor(x, y, n_samples=None)
    gaps = []

    def certified(epoch, logs):
        if logs["phase"] == 0:
            gaps.append(kd.certify(model, x, y).gap)

    look = keras.callbacks.LambdaCallback(on_epoch_end=certified)
    history = model.fit(x, y, epochs=4, verbose=0, callbacks=[monitor, look]).history
    np.testing.assert_allclose(history["gap"][:2], gaps, rtol=1e-5)
    assert history["gap"][-1] < 1e-5


@pytest.mark.parametrize("kind", [None, "shared", "learned"])
def test_the_gap_is_the_certificate_s_on_the_samples(kind):
    x, y = digits(90)
    x[60:], y[60:70] = x[:30], (y[:10] + 1) % 10
    y[70:] = y[10:30]
    weight = np.random.default_rng(0).random(90).astype("float32")
    model = mlp() if kind is None else aligned(90, kind)
    found, expected, bounds = [], [], []

    def look(epoch, logs):
        found.append(logs["gap"])
        rows = monitor.samples
        certificate = kd.certify(model, x[rows], y[rows], sample_weight=weight[rows])
        expected.append(certificate.gap)
        bounds.append(certificate.lower_bound)

    monitor = AlignmentMonitor(x, y, n_samples=70, sample_weight=weight, seed=2)
    assert len(set(monitor.samples)) == 70
    callbacks = [monitor, keras.callbacks.LambdaCallback(on_epoch_end=look)]
    if kind is None:
        model.compile("adam", loss=cross_entropy())
    model.fit(x, y, epochs=3, verbose=0, callbacks=callbacks)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert min(bounds) > 1e-3


def test_movement_is_one_minus_the_cosine_between_kernels():
    rng = np.random.default_rng(0)
    now, before = rng.normal(size=(30, 4)), rng.normal(size=(30, 6))
    centre = np.eye(30) - 1 / 30
    kernels = [centre @ z @ z.T @ centre for z in (now, before)]
    cosine = np.sum(kernels[0] * kernels[1])
    cosine /= np.linalg.norm(kernels[0]) * np.linalg.norm(kernels[1])
    movement = feature_movement
    assert movement(now, before) == pytest.approx(1 - cosine)
    assert 0.3 < 1 - cosine < 1
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    assert movement(3 * now @ rotation + 5, now) == pytest.approx(0, abs=1e-12)
    orthogonal = np.zeros((30, 2))
    orthogonal[:2] = [[1, 0], [-1, 0]]
    other = np.zeros((30, 2))
    other[2:4] = [[0, 1], [0, -1]]
    assert movement(orthogonal, other) == 1
    assert movement(np.ones((5, 2)), np.ones((5, 3))) == 0
    assert movement(np.ones((5, 2)), rng.normal(size=(5, 3))) == 1


def test_movement_is_from_the_features_at_the_beginning_of_fit():
    x, y = digits(60)
    model = mlp()
    before = features_of(model, x)
    history, monitor = fitted(model, x, y, epochs=2)
    movement = feature_movement(features_of(model, x), before)
    assert history["feature_movement"][-1] == pytest.approx(movement, abs=1e-6)
    assert movement > 0.01
    middle = features_of(model, x)
    history = model.fit(x, y, verbose=0, callbacks=[monitor]).history
    again = feature_movement(features_of(model, x), middle)
    assert history["feature_movement"] == [pytest.approx(again, abs=1e-6)]
    model.optimizer.learning_rate = 0.0
    history = model.fit(x, y, verbose=0, callbacks=[monitor]).history
    assert history["feature_movement"][0] == pytest.approx(0, abs=1e-12)


# --- a good citizen -------------------------------------------------------------------


class RandomState(keras.callbacks.Callback):
    """The state of all that draws numbers, after each epoch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        state = np.random.get_state()  # noqa: NPY002
        seeds = [to_numpy(v).tolist() for v in self.model.non_trainable_variables]
        self.seen.append((random.getstate(), state[1].tolist(), state[2], seeds))


@pytest.mark.parametrize("gates", [None, "random", "learned"])
def test_training_is_the_same_bit_by_bit(gates):
    x, y = digit_images(96)
    runs = []
    for with_monitor in (False, True):
        base = convnet()
        model = base
        optimizer = keras.optimizers.Adam(1e-2)
        if gates:
            model = kd.align(base, n_samples=96, gates=gates, seed=1)
            optimizer = kd.DAlign(optimizer, None, explore=2)
        model.compile(optimizer, loss=cross_entropy(), metrics=["accuracy"])
        state = RandomState()
        monitor = AlignmentMonitor(x, y, n_samples=50)
        keras.utils.set_random_seed(7)
        history = model.fit(
            x,
            y,
            epochs=4,
            batch_size=20,
            validation_data=(x[:32], y[:32]),
            verbose=0,
            callbacks=[monitor, state] if with_monitor else [state],
        ).history
        added = {*ENTRIES, *HEAD} & set(history)
        assert len(added) == (with_monitor and len(ENTRIES) + len(HEAD) * bool(gates))
        kept = {k: v for k, v in history.items() if k not in added}
        optimizer_state = [to_numpy(v) for v in model.optimizer.variables]
        runs.append((weights(model), optimizer_state, kept, state.seen))
        assert model.predict_function is None
        assert model.name == base.name
    (left, left_state, *left_rest), (right, right_state, *right_rest) = runs
    assert_equal(left, right)
    assert_equal(left_state, right_state)
    assert left_rest == right_rest


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("gates", [None, "random"])
def test_csv_and_history_hold_the_entries(gates, tmp_path):
    x, y = digits(60)
    model = aligned(60) if gates else mlp()
    early = keras.callbacks.CSVLogger(str(tmp_path / "early.csv"))
    late = keras.callbacks.CSVLogger(str(tmp_path / "late.csv"))
    monitor = AlignmentMonitor(x, y)
    if not gates:
        model.compile("adam", loss=cross_entropy())
    history = model.fit(
        x, y, epochs=3, verbose=0, callbacks=[early, monitor, late]
    ).history
    names = ENTRIES + (HEAD if gates else [])
    rows = read(tmp_path / "late.csv")
    for name in names:
        assert len(history[name]) == 3
        assert [float(row[name]) for row in rows] == history[name]
        assert all(math.isfinite(value) for value in history[name])
    # What stands in front of the monitor sees nothing of it.
    assert not set(names) & set(read(tmp_path / "early.csv")[0])


def test_an_entry_that_is_there_already_stays():
    x, y = digits(40)
    model, monitor = mlp(), AlignmentMonitor(x, y)
    model.compile("adam", loss=cross_entropy())
    monitor.set_model(model)
    monitor.on_train_begin()
    logs = {"gap": 7.0}
    monitor.on_epoch_end(0, logs)
    assert logs["gap"] == 7.0
    assert set(logs) == set(ENTRIES)


def measured(history):
    return [not math.isnan(value) for value in history["gap"]]


def test_every_so_many_epochs_the_first_and_the_last():
    x, y = digits(40)
    history, _ = fitted(mlp(), x, y, epochs=9, every=3)
    assert measured(history) == [True, False, False] * 2 + [True, False, True]
    for name in ENTRIES:
        assert [not math.isnan(v) for v in history[name]] == measured(history)


def test_every_counts_from_the_first_epoch_of_the_fit():
    x, y = digits(40)
    model, monitor = mlp(), AlignmentMonitor(x, y, every=4)
    model.compile("adam", loss=cross_entropy())
    history = model.fit(
        x, y, initial_epoch=2, epochs=9, verbose=0, callbacks=[monitor]
    ).history
    assert measured(history) == [True, False, False, False, True, False, True]


def test_the_first_epoch_of_exploitation_is_measured():
    x, y = digits(40)
    history, _ = fitted(aligned(40, explore=2), x, y, epochs=8, every=5)
    expected = [True, False, True, False, False, True, False, True]
    assert measured(history) == expected
    assert [not math.isnan(v) for v in history["head_rank"]] == expected


def test_the_subsample_is_drawn_once_by_its_seed():
    x, y = digits(200)
    first, again, other, all_of_them = (
        AlignmentMonitor(x, y, n_samples=n, seed=seed).samples
        for n, seed in ((50, 1), (50, 1), (50, 2), (None, 0))
    )
    np.testing.assert_array_equal(first, again)
    assert len(set(first)) == 50
    assert (np.diff(first) > 0).all()
    assert set(first) != set(other)
    np.testing.assert_array_equal(all_of_them, np.arange(200))
    assert len(AlignmentMonitor(x, y, n_samples=1000).samples) == 200


def test_more_samples_than_a_batch(monkeypatch):
    x, y = digits(91)
    whole, _ = fitted(mlp(), x, y, n_samples=None)
    monkeypatch.setattr(monitored_model, "_BATCH_SIZE", 40)
    parts, _ = fitted(mlp(), x, y, n_samples=None)
    for name in ENTRIES:
        assert parts[name] == pytest.approx(whole[name], rel=1e-4)


def test_several_inputs():
    x, y = digits(40)
    keras.utils.set_random_seed(0)
    inputs = {name: keras.Input((32,), name=name) for name in ("left", "right")}
    h = keras.layers.Concatenate()([inputs["left"], inputs["right"]])
    h = keras.layers.Dense(8, "relu")(h)
    model = keras.Model(inputs, keras.layers.Dense(10)(h))
    halves = {"left": x[:, :32], "right": x[:, 32:]}
    history, _ = fitted(model, halves, y)
    z = to_numpy(model.layers[-2](x)).astype("float64")
    expected = brute_force(np.kron(np.c_[z, np.ones(40)], np.eye(10)), one_hot(y))
    assert_close(history, "alignment", expected)


@pytest.mark.parametrize(("layer", "lost"), [(0, ENTRIES), (1, ["gap"])])
def test_a_diverged_run_has_no_numbers_and_goes_on(layer, lost):
    x, y = digits(40)
    model = regression(10)
    # Else the gradient takes the output layer's NaN to the other one.
    model.layers[0].trainable = layer == 0

    def diverge(epoch, logs):
        if epoch == 1:
            kernel = model.layers[layer].kernel
            kernel.assign(np.full(kernel.shape, np.nan))

    diverging = keras.callbacks.LambdaCallback(on_epoch_begin=diverge)
    history, _ = fitted(model, x, y, epochs=3, callbacks=[diverging])
    for name in ENTRIES:
        assert [math.isnan(value) for value in history[name]] == [False] + 2 * [
            name in lost
        ]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
def test_under_a_distribution_strategy(mirrored):
    x, y = digits(40)
    with mirrored.scope():
        model = mlp()
        model.compile("sgd", loss=cross_entropy())
    found, _ = fitted(model, x, y)
    alone = mlp()
    alone.compile("sgd", loss=cross_entropy())
    expected, _ = fitted(alone, x, y)
    for name in ENTRIES:
        assert found[name] == pytest.approx(expected[name], rel=1e-3)


# --- bad input ------------------------------------------------------------------------


class Noise(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.generator = keras.random.SeedGenerator(0)

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.generator)


def softmax():
    return mlp(activation="softmax")


def stochastic():
    layers = [keras.Input((64,)), Noise(), keras.layers.Dense(10)]
    return keras.Sequential(layers)


def no_dense():
    return keras.Sequential([keras.Input((64,)), keras.layers.Dense(10), Noise()])


def maps():
    layers = [keras.Input((8, 8)), keras.layers.Dense(10)]
    return keras.Sequential(layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "`every` must be a positive int. Received: every=0"),
        ({"every": 1.5}, "`every` must be a positive int. Received: every=1.5"),
        ({"n_samples": 0}, "`n_samples` must be a positive int"),
        ({"seed": -1}, "`seed` must be a non-negative int. Received: seed=-1"),
        ({"x": iter([1])}, "`x` must be arrays"),
        ({"y": None}, "needs targets `y`. Received: y=None"),
        ({"y": np.zeros(5)}, "same number of samples"),
        ({"x": np.full((20, 64), np.nan)}, "must be finite"),
        ({"sample_weight": np.ones(5)}, "same number of samples.*5"),
        ({"sample_weight": np.ones((20, 2))}, r"one weight per sample, shape \(20,\)"),
        ({"sample_weight": -np.ones(20)}, "finite and at least 0"),
        ({"sample_weight": np.zeros(20)}, "All of `sample_weight` are 0"),
    ],
)
def test_bad_arguments(arguments, message):
    x, y = digits(20)
    with pytest.raises(ValueError, match=message):
        AlignmentMonitor(**{"x": x, "y": y, **arguments})


@pytest.mark.parametrize(
    ("build", "loss", "message"),
    [
        (softmax, cross_entropy(), "must put out logits"),
        (stochastic, cross_entropy(), "must be a function of the inputs"),
        (no_dense, cross_entropy(), "does not end in a Dense layer"),
        (mlp, "sparse_categorical_crossentropy", "convex in the model's outputs"),
        (lambda: mlp(units=3), cross_entropy(), "integers from 0 to 2"),
    ],
)
def test_bad_models(build, loss, message):
    x, y = digits(20)
    model = build()
    model.compile("sgd", loss=loss)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, verbose=0, callbacks=[AlignmentMonitor(x, y)])
    assert_equal(before[:2], weights(model)[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, 1:], r"`x`.*\(n, 64\).*Received: x of shape \(20, 63\)"),
        (lambda x: x + 1j, "`x` must be real"),
    ],
)
def test_inputs_that_do_not_fit_are_found_when_training_begins(change, message):
    x, y = digits(20)
    model = mlp()
    model.compile("sgd", loss=cross_entropy())
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, verbose=0, callbacks=[AlignmentMonitor(change(x), y)])
    assert_equal(before, weights(model))


def test_features_that_are_no_vectors():
    x, y = digits(20)
    x = x.reshape(-1, 8, 8)
    y = np.repeat(y[:, None], 8, axis=1)
    model = maps()
    model.compile("sgd", loss=cross_entropy())
    with pytest.raises(ValueError, match="must work on feature vectors"):
        model.fit(x, y, verbose=0, callbacks=[AlignmentMonitor(x, y)])
