import csv
import errno
import gc
import math
import shutil
import tempfile

import keras
import numpy as np
import pytest
from small import (
    assert_equal,
    convnet,
    cross_entropy,
    digit_images,
    digits,
    maps_in,
    mlp,
    weights,
)

import keras_dalign as kd
from keras_dalign.head import features

BACKEND = keras.backend.backend()


def compiled(
    base=None,
    n=96,
    gates="random",
    explore=2,
    compile_with=None,
    width=None,
    **options,
):
    model = kd.align(base or mlp(), n_samples=n, gates=gates, width=width, seed=1)
    model.compile(
        kd.DAlign(
            keras.optimizers.Adam(1e-2),
            explore=explore,
            **{"exploit_optimizer": None, "average_weights": 0, **options},
        ),
        loss=cross_entropy(),
        metrics=["accuracy"],
        **(compile_with or {}),
    )
    return model


class Events(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_begin(self, logs=None):
        self.seen.append("begin")

    def on_train_end(self, logs=None):
        self.seen.append(("end", dict(logs or {})))

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append(epoch)

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(("epoch", dict(logs or {})))


def test_the_progress_bar_is_that_of_keras(capsys):
    x, y = digits(96)
    model = compiled()
    model.fit(x, y, epochs=3, verbose=1)
    shown = capsys.readouterr().out
    assert [f"Epoch {epoch}/3" in shown for epoch in (1, 2, 3)] == [True] * 3
    assert shown.count("accuracy: ") >= 3
    assert "switch: " in shown
    assert "phase: " not in shown
    # One that the user brings is not doubled.
    bar = keras.callbacks.ProgbarLogger()
    model.fit(x, y, epochs=3, initial_epoch=2, verbose=2, callbacks=[bar])
    assert capsys.readouterr().out.count("accuracy: ") == 1


def test_callbacks_see_one_run(tmp_path):
    x, y = digits(96)
    events = Events()
    model = compiled()
    history = model.fit(
        x,
        y,
        epochs=5,
        verbose=0,
        validation_data=(x[:20], y[:20]),
        callbacks=[events, keras.callbacks.CSVLogger(tmp_path / "log.csv")],
    )
    assert history is model.history
    assert events.seen[0] == "begin"
    assert events.seen.count("begin") == 1
    assert [e for e in events.seen if isinstance(e, int)] == [0, 1, 2, 3, 4]
    assert [e[0] for e in events.seen if isinstance(e, tuple)] == ["epoch"] * 5 + [
        "end"
    ]
    assert events.seen[-1][1] == events.seen[-2][1]
    assert history.epoch == [0, 1, 2, 3, 4]
    assert history.history["phase"] == [0, 0, 1, 1, 1]
    names = {"loss", "accuracy", "val_loss", "val_accuracy", "phase"}
    assert set(history.history) == names
    assert all(len(values) == 5 for values in history.history.values())
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["phase"]) for row in rows] == [0, 0, 1, 1, 1]


def test_the_reported_loss_is_the_model_s_loss():
    x, y = digit_images(96)
    model = compiled(convnet(), cache_features=True)
    validation = (x[:40], y[:40])
    history = model.fit(x, y, epochs=5, verbose=0, validation_data=validation).history
    loss, accuracy = model.evaluate(*validation, verbose=0)
    assert history["val_loss"][-1] == pytest.approx(loss, rel=1e-4)
    assert history["val_accuracy"][-1] == pytest.approx(accuracy)


def test_random_gates_start_exploitation_at_the_explored_function():
    x, y = digits(96)
    model = compiled()
    model.fit(x, y, epochs=2, verbose=0)
    before = model.predict(x, verbose=0)
    model.optimizer.exploit_optimizer.learning_rate = 0.0
    model.fit(x, y, initial_epoch=2, epochs=3, verbose=0)
    assert model.phase == "exploiting"
    np.testing.assert_array_equal(before, model.predict(x, verbose=0))


@pytest.mark.parametrize("cache", [True, False])
def test_evaluating_raw_inputs_from_a_callback(cache):
    x, y = digits(96)
    seen = []

    class Evaluate(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            assert self.model.predict(x[:8], verbose=0).shape == (8, 10)
            seen.append((self.model.evaluate(x, y, verbose=0)[0], logs["val_loss"]))

    compiled(cache_features=cache).fit(
        x, y, epochs=4, verbose=0, validation_data=(x, y), callbacks=[Evaluate()]
    )
    assert len(seen) == 4
    for evaluated, logged in seen:
        assert evaluated == pytest.approx(logged, rel=1e-4)


def test_validation_split_is_keras_s_own():
    x, y = digits(120)
    base = mlp()
    base.compile("sgd", loss=cross_entropy())
    expected = base.fit(x, y, validation_split=0.25, epochs=2, verbose=0).history
    model = kd.align(mlp(), n_samples=90)
    model.compile(kd.DAlign("sgd", None, explore=2), loss=cross_entropy())
    history = model.fit(x, y, validation_split=0.25, epochs=3, verbose=0).history
    assert history["val_loss"][:2] == expected["val_loss"]
    assert len(history["val_loss"]) == 3
    with pytest.raises(ValueError, match="needs arrays"):
        model.fit(generator(x, y), validation_split=0.2, steps_per_epoch=2)


def test_sample_and_class_weights_act_in_both_phases():
    x, y = digits(96)
    y = y % 2
    results = []
    for weighting in (
        {},
        {"class_weight": {0: 1.0, 1: 3.0}},
        {"sample_weight": np.where(y == 1, 3.0, 1.0).astype("float32")},
    ):
        model = compiled(mlp(units=2))
        model.fit(x, y, epochs=4, verbose=0, shuffle=False, **weighting)
        results.append(weights(model))
    plain, by_class, by_sample = results
    for a, b in zip(by_class, by_sample, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    q = [w.shape for w in plain].index((17, 2, 12))
    assert np.abs(plain[q] - by_class[q]).max() > 1e-3


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has it for TensorFlow and JAX")
@pytest.mark.parametrize("cache", [True, False, "disk"])
def test_steps_per_execution_across_the_switch(cache):
    x, y = digits(96)
    results = []
    for steps in (1, 3):
        model = compiled(
            cache_features=cache, compile_with={"steps_per_execution": steps}
        )
        model.fit(x, y, batch_size=16, epochs=4, verbose=0, shuffle=False)
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.skipif(BACKEND == "torch", reason="needs a C++ compiler at run time")
@pytest.mark.parametrize("cache", [True, False, "disk"])
def test_jit_compile(cache):
    x, y = digit_images(96)
    model = compiled(
        convnet(), cache_features=cache, compile_with={"jit_compile": True}
    )
    loss = model.fit(x, y, batch_size=32, epochs=4, verbose=0).history["loss"]
    assert loss[-1] < loss[0]


def test_run_eagerly():
    x, y = digit_images(64)
    model = compiled(
        convnet(), cache_features=False, compile_with={"run_eagerly": True}
    )
    loss = model.fit(x, y, batch_size=32, epochs=4, verbose=0).history["loss"]
    assert loss[-1] < loss[0]


def generator(x, y, size=16):
    while True:
        for start in range(0, len(x) - size + 1, size):
            yield x[start : start + size], y[start : start + size]


class Dataset(keras.utils.PyDataset):
    def __init__(self, x, y, size=16):
        super().__init__()
        self.x, self.y, self.size = x, y, size

    def __len__(self):
        return math.ceil(len(self.x) / self.size)

    def __getitem__(self, index):
        rows = slice(index * self.size, (index + 1) * self.size)
        return self.x[rows], self.y[rows]


def streams(kind, x, y):
    """A stream and the arguments of fit that it needs."""
    if kind == "generator":
        return generator(x, y), {"steps_per_epoch": 6}
    if kind == "pydataset":
        return Dataset(x, y), {}
    if kind == "tf.data":
        tf = pytest.importorskip("tensorflow")
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(16), {}
    if kind == "tf.data, endless":
        tf = pytest.importorskip("tensorflow")
        endless = tf.data.Dataset.from_tensor_slices((x, y)).batch(16).repeat()
        return endless, {"steps_per_epoch": 6}
    torch = pytest.importorskip("torch")
    pairs = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    return torch.utils.data.DataLoader(pairs, batch_size=16), {}


KINDS = ["generator", "pydataset", "tf.data", "tf.data, endless", "torch"]


@pytest.mark.parametrize("cache", ["auto", True])
@pytest.mark.parametrize("kind", KINDS)
def test_streams_give_the_weights_that_arrays_give(kind, cache):
    x, y = digit_images(96)
    stream, arguments = streams(kind, x, y)
    streamed = compiled(convnet(), cache_features=cache)
    history = streamed.fit(stream, epochs=4, verbose=0, shuffle=False, **arguments)
    assert history.history["phase"] == [0, 0, 1, 1]
    arrays = compiled(convnet(), cache_features=cache)
    arrays.fit(x, y, batch_size=16, epochs=4, verbose=0, shuffle=False)
    # Keras reads ahead of an endless stream, so later passes begin somewhere else.
    tolerance = 0.1 if "steps_per_epoch" in arguments else 1e-4
    for a, b in zip(weights(streamed), weights(arrays), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)
    assert streamed.switch_report.n_samples == 96


def test_a_stream_may_augment_in_exploitation():
    x, y = digits(96)
    drawn = []

    def augmented():
        rng = np.random.default_rng(0)
        for xb, yb in generator(x, y):
            drawn.append(1)
            yield xb + rng.normal(0, 0.05, xb.shape).astype("float32"), yb

    model = compiled()
    model.fit(augmented(), steps_per_epoch=6, epochs=4, verbose=0, shuffle=False)
    # Two epochs explored, one pass of features (no batch norm), two epochs exploited.
    assert len(drawn) >= 5 * 6


def test_a_stream_with_more_samples_than_the_head_was_made_for():
    x, y = digits(96)
    model = compiled(n=60)
    with pytest.warns(UserWarning, match="96 samples, n_samples=60"):
        model.fit(Dataset(x, y), epochs=3, verbose=0, shuffle=False)


def test_a_stream_that_ends_too_early_leaves_the_model_exploring():
    x, y = digits(96)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 96, 16)]
    model = compiled(explore=1)
    with pytest.raises(ValueError, match="stream ended"):
        model.fit(
            (batch for batch in batches),
            steps_per_epoch=6,
            epochs=3,
            verbose=0,
            shuffle=False,
        )
    assert model.phase == "exploring"


def test_integer_explore_and_initial_epoch():
    x, y = digits(96)
    model = compiled(explore=3)
    with pytest.raises(ValueError, match="explore=3, epochs=2"):
        model.fit(x, y, epochs=2, verbose=0)
    history = model.fit(x, y, epochs=5, initial_epoch=2, verbose=0)
    assert history.epoch == [2, 3, 4]
    assert history.history["phase"] == [0, 1, 1]
    history = model.fit(x, y, epochs=2, verbose=0)
    assert history.history["phase"] == [1, 1]


def test_explore_zero_exploits_at_once():
    x, y = digits(96)
    model = compiled(explore=0)
    frozen = weights(model.trunk)
    history = model.fit(x, y, epochs=2, verbose=0)
    assert history.history["phase"] == [1, 1]
    assert_equal(frozen, weights(model.trunk))


def test_one_epoch_leaves_none_to_exploit():
    x, y = digits(96)
    with pytest.warns(UserWarning, match="none for exploitation"):
        history = compiled(explore=0.6).fit(x, y, epochs=1, verbose=0)
    assert history.history["phase"] == [0]


@pytest.mark.parametrize("stop_at", [0, 3])
def test_stop_training_stops_the_run(stop_at):
    x, y = digits(96)

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == stop_at

    events = Events()
    model = compiled()
    history = model.fit(x, y, epochs=5, verbose=0, callbacks=[events, Stop()])
    assert history.epoch == list(range(stop_at + 1))
    assert events.seen[-1][0] == "end"
    assert model.phase == ("exploring" if stop_at < 2 else "exploiting")
    # The next run is not stopped by the last one's flag.
    assert model.fit(x, y, epochs=5, initial_epoch=4, verbose=0).epoch == [4]


def test_early_stopping_may_go_back_to_the_explored_weights():
    x, y = digits(96)
    stopping = keras.callbacks.EarlyStopping(
        "phase", mode="min", patience=2, restore_best_weights=True
    )
    model = compiled(explore=1)
    model.fit(x, y, epochs=6, verbose=0, callbacks=[stopping])
    assert model.phase == "exploring"
    assert model.predict(x, verbose=0).shape == (96, 10)


def test_same_seed_same_weights():
    x, y = digit_images(96)
    results = []
    for _ in range(2):
        keras.utils.set_random_seed(11)
        model = kd.align(convnet(seed=11), n_samples=96)
        model.compile(kd.DAlign("adam", None, explore=2), loss=cross_entropy())
        model.fit(x, y, epochs=4, batch_size=16, verbose=0)
        results.append(weights(model))
    assert_equal(*results)


def test_progress_is_shown_as_keras_shows_it(capsys):
    x, y = digits(96)
    compiled().fit(x, y, epochs=4, verbose=2)
    out = capsys.readouterr().out
    assert [f"Epoch {i}/4" in out for i in (1, 2, 3, 4)] == [True] * 4
    assert "features are cached" in out
    assert "switch: 0 batch normalisations re-estimated over 96 samples" in out
    assert out.index("Epoch 2/4") < out.index("switch:") < out.index("Epoch 3/4")
    compiled().fit(x, y, epochs=4, verbose=0)
    assert capsys.readouterr().out == ""


def test_a_cache_that_fits_nowhere_is_streamed(monkeypatch, capsys):
    x, y = digits(96)
    monkeypatch.setattr(features, "free_gib", lambda: 1e-6)
    monkeypatch.setattr(features, "free_disk_gib", lambda: 1e-7)
    model = compiled()
    history = model.fit(x, y, epochs=4, verbose=2).history
    said = "take 5.72e-06 GiB, 1e-06 GiB of memory and 1e-07 GiB in"
    assert said in capsys.readouterr().out
    assert history["loss"][-1] < history["loss"][0]


def test_a_cache_that_does_not_fit_into_memory_goes_to_disk(monkeypatch, capsys):
    x, y = digits(96)
    results = []
    for free in (1.0, 1e-6):
        monkeypatch.setattr(features, "free_gib", lambda free=free: free)
        keras.utils.set_random_seed(0)
        model = compiled()
        model.fit(x, y, epochs=4, verbose=2)
        results.append(weights(model))
    assert "features are cached on disk, in" in capsys.readouterr().out
    assert_equal(*results)


def pooling_net():
    """Its trunk gives a pair of features, of which one goes to disk."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    h = keras.layers.Conv2D(3, 3, activation="relu")(inputs)
    h = keras.layers.GlobalAveragePooling2D()(h)
    return keras.Model(inputs, keras.layers.Dense(10)(h))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"shuffle": False, "weights": True},
        {"batch_size": None, "class_weight": {i: 1.0 + i for i in range(10)}},
        {"batch_size": None, "steps_per_epoch": 3},
        {"batch_size": 16, "steps_per_epoch": 3},
    ],
    ids=["shuffled", "weighted", "class_weight", "steps", "fewer steps"],
)
@pytest.mark.parametrize("base", [convnet, pooling_net])
def test_disk_and_memory_give_the_same_weights(base, arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x, y = digit_images(96)
    arguments = {"batch_size": 20, **arguments}
    if arguments.pop("weights", False):
        arguments["sample_weight"] = np.linspace(0.5, 2.0, 96).astype("float32")
    results = []
    for cache in (True, "disk"):
        model = compiled(base(), cache_features=cache)
        keras.utils.set_random_seed(7)
        history = model.fit(
            x, y, epochs=5, verbose=0, validation_data=(x[:30], y[:30]), **arguments
        ).history
        results.append([*weights(model), *map(np.array, history.values())])
    assert_equal(*results)
    # TensorFlow leaves Python files there.
    assert [path for path in tmp_path.iterdir() if path.suffix != ".py"] == []
    gc.collect()
    assert not maps_in(tmp_path)


@pytest.mark.parametrize("kind", ["pydataset"])
def test_a_stream_may_be_kept_on_disk(kind):
    x, y = digit_images(96)
    results = []
    for cache in (True, "disk"):
        stream, arguments = streams(kind, x, y)
        model = compiled(convnet(), cache_features=cache)
        keras.utils.set_random_seed(7)
        model.fit(stream, epochs=4, verbose=0, shuffle=False, **arguments)
        results.append(weights(model))
    assert_equal(*results)


@pytest.mark.parametrize("solve", [False, True])
@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_full_disk_leaves_the_model_exploring(when, solve, monkeypatch, tmp_path):
    x, y = digit_images(96)
    make, files = tempfile.TemporaryFile, []

    class Full:
        """A file that takes one batch; the disk is full then."""

        def __init__(self, **arguments):
            self.file, self.written = make(**arguments), 0
            files.append(self.file)

        def write(self, data):
            if self.written:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.written = self.file.write(data)
            return self.written

        def close(self):
            self.file.close()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if when == "before":
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    else:
        monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    exploit = {"exploit_optimizer": "solve"} if solve else {}
    model = compiled(convnet(), cache_features="disk", **exploit)
    explored = []

    class Explored(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            explored[:] = weights(self.model)

    match = r"take .* GiB.*GiB free in .*Free some space, or set.*TMPDIR"
    with pytest.raises(OSError, match=match) as info:
        model.fit(x, y, batch_size=8, epochs=4, verbose=0, callbacks=[Explored()])
    assert info.value.errno == errno.ENOSPC
    assert model.phase == "exploring"
    assert model.switch_report is None
    assert_equal(explored, weights(model))
    assert [file.closed for file in files] == [True] * (when != "before")
    assert [path for path in tmp_path.iterdir() if path.suffix != ".py"] == []
    # With room on the disk the run goes on.
    monkeypatch.undo()
    model.fit(x, y, epochs=4, initial_epoch=2, verbose=0)
    assert model.phase == "exploiting"


def test_solving_from_disk():
    x, y = digits(96)
    results = []
    for cache in ("auto", "disk"):
        keras.utils.set_random_seed(0)
        model = solving(cache_features=cache)
        history = model.fit(x, y, epochs=4, verbose=0).history
        results.append([*weights(model), np.array(history["gap"])])
    assert_equal(*results)


@pytest.mark.parametrize("exploit", [None, "solve"])
def test_the_noise_at_the_switch_is_that_of_the_optimizer(exploit):
    x, y = digits(96)
    for noise in (0.0, 0.4):
        model = compiled(gates="learned", noise=noise, exploit_optimizer=exploit)
        expected = []

        class Explored(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None, noise=noise, expected=expected):
                if self.model.phase == "exploring":
                    expected[:] = [self.model.head.gates_at_switch(noise)[0]]

        model.fit(x, y, epochs=3, verbose=0, callbacks=[Explored()])
        gates = keras.ops.convert_to_numpy(model.head.r)
        np.testing.assert_array_equal(gates, expected[0].astype("float32"))


def test_a_narrow_head_is_told_what_width_would_do():
    x, y = digits(96)
    with pytest.warns(UserWarning, match="too narrow"):
        model = kd.align(mlp(), n_samples=96, width=2)
    model.compile(kd.DAlign("adam", None, explore=1), loss=cross_entropy())
    with pytest.warns(UserWarning, match=r"rank check at the switch failed.*width"):
        model.fit(x, y, epochs=2, verbose=0)
    report = model.switch_report.rank
    assert not report.full
    assert report.needed_width > 2


def test_repeated_inputs_alone_do_not_warn():
    x, y = digits(90)
    x, y = np.concatenate([x, x[:6]]), np.concatenate([y, y[:6]])
    model = compiled()
    model.fit(x, y, epochs=3, verbose=0)
    assert not model.switch_report.rank.full
    assert kd.certify(model, x, y).n_distinct == 90


# Bad input: each an error before anything is trained.


def refused(match, x=None, y=None, model=None, **arguments):
    x0, y0 = digits(96)
    model = model or compiled()
    before = weights(model)
    with pytest.raises(ValueError, match=match):
        model.fit(
            x0 if x is None else x,
            y0 if y is None else y,
            verbose=0,
            epochs=4,
            **arguments,
        )
    assert model.phase == "exploring"
    assert_equal(before, weights(model))


def test_more_samples_than_the_head_was_made_for():
    refused("96 samples, n_samples=95", model=compiled(n=95))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_inputs(bad):
    x, _ = digits(96)
    x[3, 5] = bad
    refused(r"must be finite.*1 of 6144", x=x)


def test_non_finite_targets():
    y = np.zeros((96, 1), "float32")
    y[7] = np.nan
    model = kd.align(mlp(units=1), n_samples=96)
    model.compile(kd.DAlign("adam"), loss="mse")
    refused("finite", y=y, model=model)


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range(label):
    _, y = digits(96)
    y[4] = label
    refused(f"{label}", y=y)


def test_labels_out_of_range_behind_those_that_are_checked_at_once():
    """Labels are looked at 8,192 at a time: the last of them must be seen, too."""
    x, y = digits(100)
    x, y = np.tile(x, (83, 1)), np.tile(y, 83)
    y[-1] = 12
    refused("12", x, y, compiled(n=8300))


def test_empty_data():
    refused(
        "(?i)empty|no samples", x=np.zeros((0, 64), "float32"), y=np.zeros(0, "int")
    )


def test_missing_targets():
    x, _ = digits(96)
    with pytest.raises(ValueError, match="y=None"):
        compiled().fit(x, epochs=4, verbose=0)


@pytest.mark.parametrize(
    "loss",
    [
        "sparse_categorical_crossentropy",
        keras.losses.SparseCategoricalCrossentropy(),
        keras.losses.MeanAbsoluteError(),
        lambda t, p: keras.ops.mean(keras.ops.square(p), axis=-1),
    ],
)
def test_losses_that_are_not_convex_in_the_logits(loss):
    model = kd.align(mlp(), n_samples=96)
    model.compile(kd.DAlign("adam"), loss=loss)
    refused("from_logits=True|convex", model=model)


def test_a_trunk_with_constant_features():
    x, y = digits(96)
    base = mlp()
    dead = base.get_layer("features")
    dead.set_weights([np.zeros((24, 16)), -np.ones(16)])
    model = compiled(base, explore=0)
    before = weights(model)
    with pytest.raises(ValueError, match="features are constant"):
        model.fit(x, y, epochs=2, verbose=0)
    assert model.phase == "exploring"
    assert_equal(before, weights(model))


def test_a_trunk_with_non_finite_features():
    x, y = digit_images(96)
    base = convnet()
    conv = base.get_layer("conv")
    conv.set_weights([np.full(conv.kernel.shape, np.inf), np.zeros(6)])
    model = compiled(base, explore=0)
    with pytest.raises(ValueError, match="finite"):
        model.fit(x, y, epochs=2, verbose=0)
    assert model.phase == "exploring"


def test_bad_labels_in_a_stream_are_found_at_the_switch():
    x, y = digits(96)
    y = keras.utils.to_categorical(y, 10)
    y[3] = np.nan
    model = kd.align(mlp(), n_samples=96)
    model.compile(
        kd.DAlign("sgd", None, explore=0),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
    )
    with pytest.raises(ValueError, match="finite"):
        model.fit(Dataset(x, y), epochs=2, verbose=0)
    assert model.phase == "exploring"


def test_an_iterator_is_as_good_as_a_generator():
    x, y = digits(96)
    batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 96, 32)]
    logs = []
    for stream in (iter(batches * 5), (batch for batch in batches * 5)):
        # Not held-out samples: how far Keras reads ahead decides which these would be.
        model = solving(explore=1, options={"l2": 1e-2})
        history = model.fit(
            stream, steps_per_epoch=3, epochs=2, verbose=0, shuffle=False
        )
        logs.append(history.history)
    assert logs[0]["loss"][0] == logs[1]["loss"][0]
    assert logs[0]["objective"][-1] == pytest.approx(logs[1]["objective"][-1], abs=2e-6)


def solving(base=None, n=96, explore=2, options=None, **arguments):
    return compiled(
        base,
        n,
        explore=explore,
        exploit_optimizer="solve",
        solve_options={"l2": 0, **({"tol": 1e-6} if options is None else options)},
        **arguments,
    )


def test_fit_solves_to_the_gap(tmp_path):
    x, y = digits(96)
    model = solving()
    events = Events()
    history = model.fit(
        x,
        y,
        epochs=4,
        verbose=0,
        validation_data=(x[:20], y[:20]),
        callbacks=[events, keras.callbacks.CSVLogger(tmp_path / "log.csv")],
    ).history
    assert kd.certify(model, x, y).gap <= 1.01e-6
    assert history["gap"][-1] <= 1e-6
    # More iterations than epochs, as it ends by the gap.
    n = len(history["loss"])
    assert n > 6
    assert history["phase"] == [0, 0] + [1] * (n - 2)
    assert model.history.epoch == list(range(n))
    assert [e for e in events.seen if isinstance(e, int)] == list(range(n))
    assert events.seen.count("begin") == 1
    assert events.seen[-1][0] == "end"
    logs = events.seen[-1][1]
    assert set(logs) == {
        "loss",
        "objective",
        "gap",
        "accuracy",
        "val_loss",
        "val_accuracy",
        "phase",
    }
    assert (np.diff(history["loss"][2:]) < 0).all()
    loss, accuracy = model.evaluate(x, y, verbose=0)
    assert logs["loss"] == pytest.approx(loss, rel=1e-2)
    assert logs["accuracy"] == pytest.approx(accuracy)
    loss, accuracy = model.evaluate(x[:20], y[:20], verbose=0)
    assert logs["val_loss"] == pytest.approx(loss, rel=1e-2)
    assert logs["val_accuracy"] == pytest.approx(accuracy)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [math.isnan(float(row["gap"])) for row in rows] == [True] * 2 + [False] * (
        n - 2
    )


def test_the_logged_numbers_are_those_of_the_weights_at_that_epoch():
    x, y = digits(96)
    seen = []

    class Evaluate(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if logs["phase"]:
                loss, accuracy = self.model.evaluate(x, y, verbose=0)
                seen.append((loss, logs["loss"], accuracy, logs["accuracy"]))

    solving().fit(x, y, epochs=3, verbose=0, callbacks=[Evaluate()])
    assert len(seen) > 4
    for loss, logged_loss, accuracy, logged_accuracy in seen:
        assert logged_loss == pytest.approx(loss, rel=1e-2)
        assert logged_accuracy == pytest.approx(accuracy)


def test_solving_changes_nothing_but_q_and_b():
    x, y = digit_images(96)
    model = solving(convnet(), options={"tol": 1e-6, "l2": 1e-3})
    before = []

    class AtTheSwitch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if logs["phase"]:
                before.append(weights(self.model))

    history = model.fit(x, y, epochs=3, verbose=0, callbacks=[AtTheSwitch()]).history
    paths = [weight.path for weight in model.weights]
    changed = {
        path
        for path, old, new in zip(paths, before[0], weights(model), strict=True)
        if (old != new).any()
    }
    assert changed == {model.head.q.path, model.head.bias.path}
    assert history["gap"][-1] <= 1e-6


def test_solving_a_stream_of_one_pass():
    x, y = digits(96)
    model = solving()
    history = model.fit(
        generator(x, y), epochs=3, steps_per_epoch=6, verbose=0, shuffle=False
    ).history
    assert history["gap"][-1] <= 1e-6
    assert kd.certify(model, x, y).gap <= 1.01e-6


def test_solving_with_sample_and_class_weights():
    x, y = digits(96)
    y = y % 2
    results = []
    for weighting in (
        {},
        {"class_weight": {0: 1.0, 1: 3.0}},
        {"sample_weight": np.where(y == 1, 3.0, 1.0).astype("float32")},
    ):
        model = solving(mlp(units=2), options={"tol": 1e-9, "l2": 1e-2})
        model.fit(x, y, epochs=3, verbose=0, shuffle=False, **weighting)
        results.append(np.array(model.head.q))
    plain, by_class, by_sample = results
    np.testing.assert_allclose(by_class, by_sample, atol=1e-4)
    assert np.abs(plain - by_class).max() > 1e-3
    with pytest.raises(ValueError, match="class_weight"):
        model.fit(
            x, y, epochs=3, verbose=0, class_weight={0: 2.0}, sample_weight=np.ones(96)
        )


def test_early_stopping_ends_the_solver():
    x, y = digits(96)
    model = solving(options={"tol": 1e-12})

    class StopAt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 5

    history = model.fit(x, y, epochs=3, verbose=0, callbacks=[StopAt()]).history
    assert len(history["loss"]) == 6
    loss = model.evaluate(x, y, verbose=0)[0]
    assert history["loss"][-1] == pytest.approx(loss, rel=1e-2)
    assert history["gap"][-1] > 1e-12


def test_a_solver_that_fails_warns():
    x, y = digits(96)
    model = solving(options={"tol": 1e-12, "max_iterations": 2})
    with pytest.warns(UserWarning, match="Raise `max_iterations`"):
        history = model.fit(x, y, epochs=3, verbose=0).history
    assert history["phase"] == [0, 0, 1, 1]


def test_a_second_fit_goes_on_solving(tmp_path):
    x, y = digits(96)
    model = solving(options={"tol": 1e-3})
    first = model.fit(x, y, epochs=4, verbose=0).history
    again = model.fit(x, y, epochs=4, verbose=0).history
    # It was solved: one epoch, so that there are logs, in which nothing moves.
    assert again["phase"] == [1]
    assert again["loss"][0] == pytest.approx(first["loss"][-1], rel=1e-3)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.solves
    assert loaded.optimizer.solve_options == {"tol": 1e-3, "l2": 0}
    assert_equal(weights(model), weights(loaded))
    loaded.optimizer.solve_options["tol"] = 1e-6
    on = loaded.fit(x, y, epochs=4, verbose=0).history
    assert on["gap"][-1] <= 1e-6
    assert len(on["gap"]) > 1


def test_backup_and_restore_while_solving(tmp_path):
    x, y = digits(96)

    class KilledError(Exception):
        pass

    class Kill(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 7:
                raise KilledError

    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    model = solving(options={"tol": 1e-8})
    with pytest.raises(KilledError):
        model.fit(x, y, epochs=3, verbose=0, callbacks=[backup, Kill()])
    resumed = solving(options={"tol": 1e-8})
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    history = resumed.fit(x, y, epochs=3, verbose=0, callbacks=[backup])
    # Beyond `epochs`, and from the weights that were kept.
    assert history.epoch[0] == 8
    assert history.history["gap"][-1] <= 1e-8
    assert history.history["loss"][0] < model.history.history["loss"][-1]


def test_l2_auto_in_fit(capsys):
    x, y = digits(96)
    model = solving(options={"l2": "auto"})
    model.fit(x, y, epochs=3, verbose=1)
    shown = capsys.readouterr().out
    assert "held-out loss" in shown
    assert "width 8: held-out loss" in shown
    assert "Epoch 3 (solve)" in shown
    assert "gap: " in shown
    assert "L-BFGS" in shown
    # No rank is needed, and none was looked at.
    assert model.switch_report.rank is None
    assert model.head.width in (8, 16)


def test_the_width_is_chosen_before_the_epochs_of_the_solver():
    x, y = digits(96)
    options = {"l2": 1e-3, "tol": 1e-8}
    model = solving(n=10**12, options=options)
    widths, frozen = [], []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            widths.append(self.model.head.width)
            frozen.append(weights(self.model.trunk))

    history = model.fit(x, y, epochs=3, verbose=0, callbacks=[Look()]).history
    assert widths[:2] == [None, None]
    assert set(widths[2:]) == {model.head.width}
    assert 8 <= model.head.width <= 64
    for later in frozen[2:]:
        assert_equal(frozen[1], later)
    assert history["gap"][-1] <= 1e-7
    # The solution is that of a head which had the width from the beginning.
    given = compiled(
        n=96,
        width=model.head.width,
        exploit_optimizer="solve",
        solve_options=options,
    )
    given.fit(x, y, epochs=3, verbose=0)
    np.testing.assert_array_equal(np.array(given.head.r), np.array(model.head.r))
    np.testing.assert_allclose(
        given.predict(x, verbose=0), model.predict(x, verbose=0), atol=2e-2
    )


def test_a_width_that_the_user_asked_for_is_kept():
    x, y = digits(96)
    model = solving(width=11, options={"l2": 1e-3})
    model.fit(x, y, epochs=3, verbose=0)
    assert model.head.width == 11


def chosen_width(base=None, **options):
    """Solves at a width that the samples choose, far from the default."""
    return solving(base, n=10**12, options={"l2": 1e-5, "tol": 1e-7, **options})


@pytest.fixture(scope="module")
def solved_at_a_chosen_width():
    x, y = digits(96)
    model = chosen_width()
    model.fit(x, y, epochs=3, verbose=0, shuffle=False)
    assert 8 <= model.head.width <= 64 < model.head.default_width()
    return model


def test_a_chosen_width_survives_a_file(solved_at_a_chosen_width, tmp_path):
    x, y = digits(96)
    model = solved_at_a_chosen_width
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.head.width == model.head.width
    assert loaded.head.requested_width is None
    assert loaded.phase == "exploiting"
    assert_equal(weights(model), weights(loaded))
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), loaded.predict(x, verbose=0)
    )
    # It was solved: the width is not chosen again, and nothing moves.
    again = loaded.fit(x, y, epochs=3, verbose=0).history
    assert loaded.head.width == model.head.width
    assert set(again["phase"]) == {1}
    assert again["gap"][-1] <= 1e-7


def test_backup_and_restore_at_a_chosen_width(solved_at_a_chosen_width, tmp_path):
    x, y = digits(96)
    whole = solved_at_a_chosen_width

    class Kill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 6:
                raise KeyboardInterrupt

    arguments = {"epochs": 3, "verbose": 0, "shuffle": False}
    backup = keras.callbacks.BackupAndRestore
    killed = chosen_width()
    with pytest.raises(KeyboardInterrupt):
        killed.fit(x, y, callbacks=[backup(tmp_path / "backup"), Kill()], **arguments)
    resumed = chosen_width(base=mlp(seed=7))
    history = resumed.fit(x, y, callbacks=[backup(tmp_path / "backup")], **arguments)
    assert history.epoch[0] == 6
    assert resumed.head.width == whole.head.width
    assert_equal(weights(whole.trunk), weights(resumed.trunk))
    np.testing.assert_array_equal(np.array(whole.head.r), np.array(resumed.head.r))
    # One minimum, from wherever the solver goes on.
    assert history.history["gap"][-1] <= 1e-7
    assert history.history["objective"][-1] == pytest.approx(
        whole.history.history["objective"][-1], abs=2e-7
    )
    np.testing.assert_allclose(
        # A gap of 1e-7 at a weight of 1e-5 leaves some room.
        whole.predict(x, verbose=0),
        resumed.predict(x, verbose=0),
        atol=0.2,
    )


def test_solving_without_metrics_or_with_a_dict_of_them():
    x, y = digits(64)
    model = kd.align(mlp(), n_samples=64)
    model.compile(
        kd.DAlign("adam", "solve", explore=1, solve_options={"tol": 1e-3, "l2": 0}),
        loss=cross_entropy(),
    )
    history = model.fit(x, y, epochs=2, verbose=0, validation_split=0.25).history
    assert set(history) == {"loss", "objective", "gap", "phase", "val_loss"}
    assert len(history["val_loss"]) == len(history["loss"])


def test_no_training_step_while_solving():
    x, y = digits(96)
    model = solving(options={"tol": 1e-1})
    model.fit(x, y, epochs=3, verbose=0)
    with pytest.raises(ValueError, match="there are no training steps"):
        model.train_on_batch(x[:8], y[:8])
