import functools
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from small import (
    assert_equal,
    convnet,
    cross_entropy,
    digit_images,
    digits,
    mlp,
    weights,
)

import keras_dalign as kd

BACKEND = keras.backend.backend()


def aligned(base=None, n=96, gates="random", explore=2, compiled=True, **options):
    head = {key: options.pop(key) for key in ("width", "share_gates") if key in options}
    model = kd.align(base or mlp(), n_samples=n, gates=gates, seed=1, **head)
    if compiled:
        model.compile(
            kd.DAlign(
                keras.optimizers.Adam(1e-2),
                explore=explore,
                **{"exploit_optimizer": None, "average_weights": 0, **options},
            ),
            loss=cross_entropy(),
            metrics=["accuracy"],
        )
    return model


def exploiting(gates="random", **options):
    x, y = digit_images(96)
    model = aligned(convnet(), gates=gates, **options)
    model.fit(x, y, epochs=3, batch_size=20, verbose=0)
    return model, x, y


@pytest.mark.parametrize("gates", ["random", "learned"])
@pytest.mark.parametrize("cache", [True, False])
def test_exploitation_trains_q_and_b_alone(gates, cache):
    model, x, y = exploiting(gates, cache_features=cache)
    before = {v.path: np.array(v) for v in model.variables}
    inner = [np.array(v) for v in model.optimizer.inner_optimizer.variables]
    model.fit(x, y, epochs=2, batch_size=20, verbose=0)
    changed = {
        v.path
        for v in model.variables
        if not np.array_equal(before[v.path], np.array(v))
    }
    assert changed == {model.head.q.path, model.head.bias.path}
    assert_equal(
        inner, [np.array(v) for v in model.optimizer.inner_optimizer.variables]
    )


@pytest.mark.parametrize("gates", ["random", "learned"])
def test_cached_and_streamed_exploitation_are_equal(gates):
    results = []
    for cache in (True, False):
        x, y = digit_images(96)
        model = aligned(convnet(), gates=gates, cache_features=cache)
        history = model.fit(x, y, epochs=5, batch_size=20, verbose=0, shuffle=False)
        results.append((weights(model), history.history["loss"]))
    (cached, loss), (streamed, streamed_loss) = results
    for a, b in zip(cached, streamed, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_allclose(loss, streamed_loss, rtol=1e-4)


def test_trained_variables_by_phase():
    model = aligned(convnet(), n=96, compiled=False)
    base = convnet()
    shapes = [v.shape for v in base.trainable_variables]
    assert [v.shape for v in model.trainable_variables] == shapes
    assert model.trainable_weights == model.trainable_variables
    model.start_exploiting()
    ids = [id(v) for v in model.trainable_variables]
    assert ids == [id(model.head.q), id(model.head.bias)]
    everything = model.trainable_weights + model.non_trainable_weights
    assert {id(v) for v in everything} == {id(v) for v in model.weights}
    assert len(everything) == len(model.weights)
    model.trainable = False
    assert model.trainable_variables == []


@pytest.mark.parametrize("gates", ["random", "learned"])
def test_base_layers_are_left_trainable(gates):
    base = convnet()
    x, y = digit_images(96)
    model = aligned(base, gates=gates)
    model.fit(x, y, epochs=3, verbose=0)
    assert all(layer.trainable for layer in base.layers)
    assert len(base.trainable_variables) == len(convnet().trainable_variables)


def test_exploitation_leaves_the_base_model_as_it_was_at_the_switch():
    base = mlp()
    x, y = digits(96)
    model = aligned(base)
    model.fit(x, y, epochs=2, verbose=0)
    explored = weights(base)
    model.fit(x, y, initial_epoch=2, epochs=5, verbose=0)
    assert model.phase == "exploiting"
    assert_equal(explored, weights(base))


@pytest.mark.parametrize("gates", ["random", "learned"])
@pytest.mark.parametrize("epochs", [2, 4])
def test_saved_and_loaded_in_every_phase(gates, epochs, tmp_path):
    x, y = digit_images(96)
    model = aligned(convnet(), gates=gates)
    model.fit(x, y, epochs=epochs, batch_size=20, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, kd.AlignedModel)
    assert isinstance(loaded.optimizer, kd.DAlign)
    assert loaded.phase == model.phase == ("exploring", "exploiting")[epochs > 2]
    assert_equal(weights(model), weights(loaded))
    for saved, new in zip(
        model.optimizer.all_variables, loaded.optimizer.all_variables, strict=True
    ):
        np.testing.assert_array_equal(np.array(saved), np.array(new))
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), loaded.predict(x, verbose=0)
    )


# The last batch of an epoch is smaller than the others.
IN_ORDER = {"batch_size": 20, "shuffle": False, "verbose": 0}


@functools.cache
def uninterrupted(gates):
    """The weights after six epochs, three of them exploration, in one go."""
    x, y = digits(96)
    model = aligned(gates=gates, explore=3)
    model.fit(x, y, epochs=6, **IN_ORDER)
    return weights(model)


@pytest.mark.parametrize("gates", ["random", "learned"])
@pytest.mark.parametrize("saved_at", [3, 5])
def test_resumed_from_a_file_is_the_run_that_would_have_been(gates, saved_at, tmp_path):
    x, y = digits(96)
    part = aligned(gates=gates, explore=3)
    part.fit(x, y, epochs=saved_at, **IN_ORDER)
    # Just before the switch, or in the middle of exploitation.
    assert part.phase == ("exploring" if saved_at == 3 else "exploiting")
    part.save(tmp_path / "model.keras")
    del part
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.fit(x, y, initial_epoch=saved_at, epochs=6, **IN_ORDER)
    assert_equal(uninterrupted(gates), weights(loaded))


@pytest.mark.parametrize("gates", ["random", "learned"])
@pytest.mark.parametrize("killed_in", range(6))
def test_backup_and_restore_resumes_anywhere(gates, killed_in, tmp_path):
    x, y = digits(96)

    class Kill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == killed_in:
                raise KeyboardInterrupt

    arguments = {"epochs": 6, **IN_ORDER}
    backup = keras.callbacks.BackupAndRestore
    killed = aligned(gates=gates, explore=3)
    with pytest.raises(KeyboardInterrupt):
        killed.fit(x, y, callbacks=[backup(tmp_path / "backup"), Kill()], **arguments)
    resumed = aligned(mlp(seed=7), gates=gates, explore=3)
    if killed_in == 0:
        resumed.set_weights(aligned(gates=gates, explore=3).get_weights())
    history = resumed.fit(x, y, callbacks=[backup(tmp_path / "backup")], **arguments)
    assert history.epoch == list(range(killed_in, 6))
    assert history.history["phase"] == [int(e >= 3) for e in range(killed_in, 6)]
    assert_equal(uninterrupted(gates), weights(resumed))
    assert not Path(tmp_path / "backup").exists()


def test_killed_within_the_switch(tmp_path, monkeypatch):
    import keras_dalign.training.switch as switch_module

    x, y = digits(96)
    arguments = {"epochs": 5, **IN_ORDER}
    whole = aligned()
    whole.fit(x, y, **arguments)
    killed = aligned()

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    backup = keras.callbacks.BackupAndRestore
    with monkeypatch.context() as patch:
        patch.setattr(switch_module, "check_rank", kill)
        with pytest.raises(KeyboardInterrupt):
            killed.fit(x, y, callbacks=[backup(tmp_path / "backup")], **arguments)
    resumed = aligned(mlp(seed=7))
    resumed.fit(x, y, callbacks=[backup(tmp_path / "backup")], **arguments)
    assert_equal(weights(whole), weights(resumed))


def test_load_weights_brings_the_phase_along(tmp_path):
    model, x, _ = exploiting()
    model.save_weights(tmp_path / "model.weights.h5")
    other = aligned(convnet(seed=8))
    assert other.predict(x, verbose=0).shape == (96, 10)
    other.load_weights(tmp_path / "model.weights.h5")
    assert other.phase == "exploiting"
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), other.predict(x, verbose=0)
    )
    assert other.optimizer.phase == "exploiting"


def test_set_weights_brings_the_phase_back():
    x, y = digits(96)
    model = aligned()
    explored = model.get_weights()
    before = model.predict(x, verbose=0)
    model.fit(x, y, epochs=3, verbose=0)
    model.set_weights(explored)
    assert model.phase == "exploring"
    np.testing.assert_array_equal(before, model.predict(x, verbose=0))
    history = model.fit(x, y, epochs=3, verbose=0)
    assert history.history["phase"] == [0, 0, 1]


def test_lists_of_weights_bring_the_width_along():
    model, x, _ = exploiting(width=10)
    before = model.predict(x, verbose=0)
    for other in (aligned(convnet(seed=8)), exploiting(width=14)[0]):
        assert other.predict(x, verbose=0).shape == (96, 10)
        other.set_weights(model.get_weights())
        assert other.phase == "exploiting"
        assert other.head.width == 10
        np.testing.assert_array_equal(before, other.predict(x, verbose=0))


def test_weights_of_another_width_load(tmp_path):
    """The head takes over the width, the optimizer of exploitation its state."""
    model, x, y = exploiting(width=10)
    model.save_weights(tmp_path / "model.weights.h5")
    other, _, _ = exploiting(width=14)
    other.load_weights(tmp_path / "model.weights.h5")
    assert other.head.width == 10
    for each in (model, other):
        each.fit(x, y, epochs=2, **IN_ORDER)
    assert_equal(weights(model), weights(other))


@pytest.fixture(scope="module")
def wrong_weights(tmp_path_factory):
    """Files of weights by what does not fit a head of `aligned`, or its trunk."""
    folder = tmp_path_factory.mktemp("wrong")

    @functools.cache
    def file(what):
        options, base = {"width": 13}, None
        if what == "trunk":
            keras.utils.set_random_seed(0)
            base = keras.Sequential(
                [
                    keras.Input((64,)),
                    keras.layers.Dense(20, "relu", name="hidden"),
                    keras.layers.Dense(16, "relu", name="features"),
                    keras.layers.Dense(10, name="logits"),
                ]
            )
        elif what == "head":
            options["gates"] = "learned"
        else:
            options["share_gates"] = what == "shared"
        model = aligned(base, **options)
        model.fit(*digits(96), epochs=3, **IN_ORDER)
        path = folder / f"{what}.weights.h5"
        model.save_weights(path)
        return path

    return file


@functools.cache
def undisturbed(share_gates, epochs):
    """The weights after some epochs, and after six, fitted in two calls."""
    x, y = digits(96)
    model = aligned(share_gates=share_gates)
    model.fit(x, y, epochs=epochs, **IN_ORDER)
    then = weights(model)
    model.fit(x, y, initial_epoch=epochs, epochs=6, **IN_ORDER)
    return then, weights(model)


# Keras's, after a failure.
@pytest.mark.filterwarnings("ignore:Skipping nested container")
@pytest.mark.parametrize("phase", ["exploring", "exploiting"])
@pytest.mark.parametrize("what", ["shared", "separate", "trunk", "head"])
def test_weights_that_do_not_fit_leave_the_model_as_it_was(what, phase, wrong_weights):
    x, y = digits(96)
    share_gates = what != "shared"
    epochs = 2 if phase == "exploring" else 4
    then, at_the_end = undisturbed(share_gates, epochs)
    model = aligned(share_gates=share_gates)
    model.fit(x, y, epochs=epochs, **IN_ORDER)
    with pytest.raises(ValueError, match=r"do not fit this model.*left as it was"):
        model.load_weights(wrong_weights(what))
    assert model.phase == phase
    assert_equal(then, weights(model))
    # The optimizers, too, go on where they were.
    model.fit(x, y, initial_epoch=epochs, epochs=6, **IN_ORDER)
    assert_equal(at_the_end, weights(model))


def test_gates_of_the_other_kind_are_named(tmp_path):
    model, _, _ = exploiting()
    model.save_weights(tmp_path / "model.weights.h5")
    other = aligned(convnet(), share_gates=False)
    with pytest.raises(ValueError, match=r"share_gates=False.*Received.*'r'.*\(1, 1"):
        other.load_weights(tmp_path / "model.weights.h5")


def test_the_steps_are_those_of_the_units_there_are():
    """Compiled functions hold on to variables, which another width replaces."""
    x, y = digits(96)
    model = aligned()
    model.fit(x, y, epochs=3, **IN_ORDER)
    model.evaluate(x, y, verbose=0)
    model.set_width(9)
    assert model.head.width == 9
    start = model.predict(x, verbose=0)
    model.fit(x, y, epochs=1, **IN_ORDER)
    assert np.abs(np.array(model.head.q)).max() > 0
    trained = model.predict(x, verbose=0)
    assert np.abs(trained - start).max() > 1e-3
    np.testing.assert_allclose(trained, keras.ops.convert_to_numpy(model(x)), atol=1e-5)
    everything = {id(v) for v in model.optimizer.exploit_optimizer._trainable_variables}
    assert everything == {id(model.head.q), id(model.head.bias)}


def test_back_in_exploration_nothing_of_the_units_is_left(tmp_path):
    x, y = digits(96)
    model = aligned()
    explored = model.get_weights()
    model.fit(x, y, epochs=3, verbose=0)
    model.set_weights(explored)
    assert model.head.width is None
    assert not model.optimizer.exploit_optimizer.built
    # So that it can be saved and loaded like any other.
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.fit(x, y, epochs=3, shuffle=False, verbose=0)
    assert_equal(weights(model), weights(loaded))


OLD = Path(__file__).parent / "files" / "0.1.0"
OLD_FILES = [
    f"{gates}-{phase}"
    for gates in ("random", "learned")
    for phase in ("exploring", "exploiting")
]


def old(name):
    """A model of version 0.1.0, and the data that it was trained on."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)).astype("float32"), rng.integers(0, 3, 20)
    if name != "random-exploring":
        return keras.saving.load_model(OLD / f"{name}.keras"), x, y
    # Units had an optimizer from the beginning on; its state is not needed.
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        return keras.saving.load_model(OLD / f"{name}.keras"), x, y


@pytest.mark.parametrize("name", OLD_FILES)
def test_files_of_version_0_1_0_load(name):
    model, x, y = old(name)
    gates, phase = name.split("-")
    assert (model.head.gates, model.phase) == (gates, phase)
    assert not model.head.share_gates
    if name != "random-exploring":
        assert model.head.r.shape == (17, 3, 3)
    expected = np.load(OLD / "logits.npz")[name]
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)
    # They go on, and are files of this version from then on.
    model.fit(x, y, epochs=4, verbose=0)
    assert model.phase == "exploiting"
    assert model.head.r.shape[:2] == (17, 3)


@pytest.mark.parametrize("name", OLD_FILES[1:])
def test_files_of_version_0_1_0_become_new_ones(name, tmp_path):
    model, x, y = old(name)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal(weights(model), weights(again))
    for each in (model, again):
        each.fit(x, y, epochs=4, verbose=0, shuffle=False)
    assert_equal(weights(model), weights(again))


def test_weights_of_version_0_1_0_load_by_number():
    """Such as `save_own_variables` wrote them, whatever the file."""
    model, _, _ = old("random-exploiting")
    names = ("bias", "q", "r", "w", "phase_index")
    store = {}
    model.head.save_own_variables(store)
    numbered = {str(index): store[name] for index, name in enumerate(names)}
    head = kd.AlignmentHead(3, n_samples=20, share_gates=False)
    head.build((None, 16))
    head.load_own_variables(numbered)
    assert head.phase == "exploiting"
    assert head.width == 3
    for name in names[:-1]:
        np.testing.assert_array_equal(np.array(getattr(head, name)), store[name])


@pytest.mark.parametrize("gates", ["random", "learned"])
def test_a_plain_optimizer_trains_an_ordinary_model(gates):
    x, y = digits(96)
    model = aligned(gates=gates, compiled=False)
    model.compile("adam", loss=cross_entropy(), metrics=["accuracy"])
    loss = model.fit(x, y, epochs=3, batch_size=20, verbose=0).history["loss"]
    assert loss[-1] < loss[0]
    assert model.phase == "exploring"
    model.start_exploiting()
    model.compile("adam", loss=cross_entropy())
    frozen = weights(model.trunk)
    model.fit(x, y, epochs=2, batch_size=20, verbose=0)
    assert_equal(frozen, weights(model.trunk))


def test_train_on_batch_follows_the_phase():
    x, y = digits(96)
    model = aligned()
    model.train_on_batch(x, y)
    frozen = weights(model.trunk)
    model.train_on_batch(x, y)
    assert any(
        (a != b).any() for a, b in zip(frozen, weights(model.trunk), strict=True)
    )
    model.start_exploiting()
    frozen = weights(model.trunk)
    first = model.train_on_batch(x, y)
    for _ in range(5):
        last = model.train_on_batch(x, y)
    assert_equal(frozen, weights(model.trunk))
    assert float(last[0]) < float(first[0])


def test_a_training_call_in_exploitation_runs_the_trunk_in_inference_mode():
    model, x, _ = exploiting()
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(model(x[:8], training=True)),
        keras.ops.convert_to_numpy(model(x[:8], training=False)),
        rtol=1e-6,
    )


def test_the_same_inputs_and_outputs():
    model = aligned(convnet(), compiled=False)
    assert model.input_shape == (None, 8, 8, 1)
    assert model.output_shape == (None, 10)
    assert model.compute_output_shape((5, 8, 8, 1)) == (5, 10)
    assert model(np.zeros((3, 8, 8, 1), "float32")).shape == (3, 10)
    assert [t.shape for t in model.inputs] == [(None, 8, 8, 1)]


def test_the_summary_ends_with_phase_and_head():
    model = aligned(convnet(), compiled=False)
    total = model.count_params()

    def printed():
        lines = []
        model.summary(print_fn=lambda text, **_kwargs: lines.append(text))
        return "\n".join(lines)

    before = printed()
    assert f"{model.head.name} (AlignmentHead)" in before
    trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert f"Phase 1 of 2, exploring: all layers are trained ({trained:,} of" in before
    assert f"of {total:,} parameters)" in before
    assert "Head: linear; the switch adds gated units, at most" in before
    model.start_exploiting(width=3)
    after = printed()
    trained = 10 + 3 * 10 * model.head.dim
    assert f"exploiting: q and b of the head are trained ({trained:,} of" in after
    assert "Head: linear, and 3 gated units per output (random gates, shared" in after
    model = aligned(convnet(), compiled=False)
    model.start_exploiting(width=3, replace_dense=True)
    assert "Head: 3 gated units per output" in printed()


def test_the_summary_is_printed_as_keras_prints(capsys):
    keras.config.enable_interactive_logging()
    aligned(convnet(), compiled=False).summary()
    assert "Phase 1 of 2, exploring" in capsys.readouterr().out


def test_several_inputs_and_another_feature_tensor():
    keras.utils.set_random_seed(0)
    left, right = keras.Input((32,), name="left"), keras.Input((32,), name="right")
    both = keras.layers.Concatenate()([left, right])
    wide = keras.layers.Dense(20, "relu", name="wide")(both)
    narrow = keras.layers.Dense(8, "relu")(wide)
    base = keras.Model({"left": left, "right": right}, keras.layers.Dense(10)(narrow))
    x, y = digits(96)
    inputs = {"left": x[:, :32], "right": x[:, 32:]}
    model = kd.align(base, n_samples=96, features="wide", seed=0)
    model.compile(
        kd.DAlign(keras.optimizers.Adam(1e-2), None, explore=2), loss=cross_entropy()
    )
    history = model.fit(inputs, y, epochs=12, batch_size=16, verbose=0)
    assert model.head.q.shape == (21, 10, 10)
    assert history.history["loss"][-1] < history.history["loss"][1]
    certificate = kd.certify(model, inputs, y)
    assert certificate.gap < history.history["loss"][0]


def test_an_output_layer_that_the_trunk_uses_too():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    shared = keras.layers.Dense(64)
    hidden = keras.layers.ReLU()(shared(inputs))
    base = keras.Model(inputs, shared(hidden))
    x, y = digits(96)
    model = aligned(base, n=400)
    model.fit(x, y, epochs=2, verbose=0)
    frozen = weights(model.trunk)
    history = model.fit(x, y, initial_epoch=2, epochs=4, verbose=0).history
    assert history["phase"] == [1, 1]
    assert_equal(frozen, weights(model.trunk))


def test_regression_with_one_unit_reaches_the_minimum():
    rng = np.random.default_rng(0)
    x, _ = digits(64)
    y = rng.standard_normal((64, 1)).astype("float32")
    model = kd.align(mlp(units=1), n_samples=64, seed=0)
    model.compile(
        kd.DAlign(keras.optimizers.Adam(1e-2), keras.optimizers.Adam(1e-1), explore=1),
        loss="mse",
    )
    model.fit(x, y, epochs=100, batch_size=64, verbose=0)
    assert kd.certify(model, x, y).gap < 0.05 * y.var()


def test_wrong_parts():
    with pytest.raises(ValueError, match="`trunk` must be a built"):
        kd.AlignedModel(keras.Sequential([keras.layers.Dense(3)]), None)
    trunk = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="`head` must be an AlignmentHead"):
        kd.AlignedModel(trunk, keras.layers.Dense(3))


def test_parts_by_hand():
    class Trunk(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(12, "relu")

        def call(self, x):
            return self.dense(x)

    x, y = digits(96)
    trunk = Trunk()
    features = trunk(x[:2])
    head = kd.AlignmentHead(10, n_samples=96, seed=0)
    head(features)
    model = kd.AlignedModel(trunk, head)
    model.compile(kd.DAlign("adam", None, explore=1), loss=cross_entropy())
    history = model.fit(x, y, epochs=3, verbose=0).history
    assert history["phase"] == [0, 1, 1]


BACKENDS_FILE = Path(__file__).parent / "backends.json"


def test_three_backends_agree():
    """Each backend is compared with what the reference backend recorded."""
    rng = np.random.default_rng(0)
    x, y = digits(64)
    model = kd.align(mlp(), n_samples=64, seed=4)
    shared = [0.2 * rng.standard_normal(w.shape) for w in mlp().get_weights()]
    model.trunk.set_weights(shared[:4])
    model.head.dense.set_weights(shared[4:])
    adam = keras.optimizers.Adam(1e-2)
    model.compile(
        kd.DAlign(adam, None, explore=3, average_weights=0), loss=cross_entropy()
    )
    history = model.fit(x, y, epochs=6, batch_size=16, shuffle=False, verbose=0)
    expected = json.loads(BACKENDS_FILE.read_text())
    np.testing.assert_allclose(history.history["loss"], expected["loss"], rtol=2e-4)
    outputs = model.predict(x[:5], verbose=0)
    np.testing.assert_allclose(outputs, expected["logits"], rtol=2e-3, atol=2e-3)
