"""`DAlign(Adam())` alone: the solver, with an L2 term that the data choose."""

import warnings

import keras
import numpy as np
import pytest
from small import (
    assert_equal,
    convnet,
    cross_entropy,
    digit_images,
    digits,
    fit_with_backup,
    mlp,
    weights,
)

import keras_dalign as kd
from keras_dalign.head import features
from keras_dalign.solving.options import SolveOptions

BACKEND = keras.backend.backend()


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, size=32):
        super().__init__()
        self.x, self.y, self.size = x, y, size

    def __len__(self):
        return len(self.x) // self.size

    def __getitem__(self, index):
        part = slice(index * self.size, (index + 1) * self.size)
        return self.x[part], self.y[part]


def data_of(kind, x, y):
    """The data as `fit` takes them, and what else it takes."""
    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": 32, "shuffle": False}
    if kind == "dataset":
        tf = pytest.importorskip("tensorflow")
        return {
            "x": tf.data.Dataset.from_tensor_slices((x, y)).batch(32),
            "shuffle": False,
        }
    if kind == "pydataset":
        return {"x": Batches(x, y), "shuffle": False}

    def forever():
        while True:
            for start in range(0, len(x), 32):
                yield x[start : start + 32], y[start : start + 32]

    return {"x": forever(), "steps_per_epoch": len(x) // 32, "shuffle": False}


def compiled(base=None, n=96, loss=None, **options):
    model = kd.align(base or mlp(), n_samples=n, seed=1)
    model.compile(
        kd.DAlign(keras.optimizers.Adam(1e-2), **options), loss=loss or cross_entropy()
    )
    return model


@pytest.mark.parametrize("kind", ["arrays", "dataset", "pydataset", "generator"])
def test_the_default_solves_with_l2(kind, capsys):
    x, y = digits(96)
    model = compiled()
    history = model.fit(**data_of(kind, x, y), epochs=3, verbose=2).history
    assert model.phase == "exploiting"
    assert history["phase"][:2] == [0, 0]
    assert history["gap"][-1] <= 1e-6
    assert history["objective"][-1] > history["loss"][-1] > 0
    shown = capsys.readouterr().out
    assert "with its L2 term" in shown
    assert "The plain loss is" in shown
    assert "l2=1e-0" in shown
    # What was logged last is the model as it is, and its certificate agrees.
    loss = model.evaluate(x, y, verbose=0)
    assert history["loss"][-1] == pytest.approx(loss, rel=1e-4)


def test_the_default_for_regression():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((96, 64)).astype("float32")
    y = np.sin(x[:, :1]) + 0.1 * rng.standard_normal((96, 1))
    model = compiled(mlp(units=1), loss="mse")
    history = model.fit(x, y, epochs=3, verbose=0).history
    assert history["gap"][-1] <= 1e-6
    assert history["objective"][-1] > history["loss"][-1]


def test_the_default_is_explore_average_solve():
    x, y = digits(96)
    one = compiled()
    one.fit(x, y, epochs=3, shuffle=False, verbose=0)
    explored = compiled(exploit_optimizer=None, explore=2)
    explored.fit(x, y, epochs=2, shuffle=False, verbose=0)
    assert explored.optimizer.weight_average.apply()
    kd.solve(explored, x, y, batch_size=128, verbose=0)
    for found, wanted in zip(weights(one), weights(explored), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_exploring_all_epochs_and_then_solving():
    x, y = digits(96)
    model = compiled(explore=1.0)
    history = model.fit(x, y, epochs=3, verbose=0).history
    assert history["phase"][:3] == [0, 0, 0]
    assert history["phase"][3:]
    assert set(history["phase"][3:]) == {1}
    assert history["gap"][-1] <= 1e-6


def test_one_epoch_is_enough_for_the_solver():
    x, y = digits(96)
    model = compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = model.fit(x, y, epochs=1, verbose=0).history
    assert history["phase"][:2] == [0, 1]


@pytest.mark.parametrize("exploit", [None, "sgd"])
def test_all_epochs_leave_none_to_an_optimizer(exploit):
    with pytest.raises(ValueError, match=r"explore=1\.0 leaves no epochs"):
        kd.DAlign("adam", exploit, explore=1.0)
    with pytest.raises(ValueError, match=r"explore=1\.0 leaves no epochs"):
        kd.DAlign("adam", explore=1.0, cache_features=False)
    # An int is a number of epochs.
    assert kd.DAlign("adam", exploit, explore=1).exploration_epochs(3) == 1


def test_features_that_are_not_to_be_kept_are_trained_on():
    x, y = digits(96)
    model = compiled(cache_features=False)
    assert not model.optimizer.solves
    history = model.fit(x, y, epochs=3, verbose=0).history
    assert history["phase"] == [0, 0, 1]
    assert "gap" not in history
    with pytest.raises(ValueError, match="cache_features=False"):
        kd.DAlign("adam", "solve", cache_features=False)
    with pytest.raises(ValueError, match="belong to the solver"):
        kd.DAlign("adam", cache_features=False, solve_options={"l2": 0.1})


def test_features_that_fit_nowhere_are_trained_on(monkeypatch, tmp_path):
    x, y = digits(96)
    monkeypatch.setattr(features, "free_gib", lambda: 0.0)
    monkeypatch.setattr(features, "free_disk_gib", lambda: 0.0)
    model = compiled()
    with pytest.warns(UserWarning, match=r"cannot be kept.*fresh copy of Adam"):
        history = model.fit(x, y, epochs=4, verbose=0).history
    assert history["phase"] == [0, 0, 1, 1]
    assert model.phase == "exploiting"
    assert not model.optimizer.solves
    # A model that fell back is saved as one that does not solve.
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config()["exploit_optimizer"] is None
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6
    )
    loaded.fit(x, y, epochs=1, verbose=0)
    strict = compiled(exploit_optimizer="solve")
    with pytest.raises(OSError, match="GiB"):
        strict.fit(x, y, epochs=4, verbose=0)
    assert strict.phase == "exploring"


def test_without_epochs_left_the_model_stays_as_it_explored(monkeypatch, tmp_path):
    x, y = digits(96)
    model = compiled(explore=1.0)
    with monkeypatch.context() as full:
        full.setattr(features, "free_gib", lambda: 0.0)
        full.setattr(features, "free_disk_gib", lambda: 0.0)
        with pytest.warns(UserWarning, match="left exploring"):
            history = model.fit(x, y, epochs=2, verbose=0).history
    assert history["phase"] == [0, 0]
    assert model.phase == "exploring"
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert kd.solve(loaded, x, y, verbose=0).converged


def test_data_that_cannot_be_read_are_no_reason_to_fall_back():
    x, y = digits(96)

    class Lost(Batches):
        """Reads two epochs of three batches, and then no more."""

        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > 6 + 3:
                raise FileNotFoundError("the images are gone")
            return super().__getitem__(index)

    model = compiled()
    with pytest.raises(FileNotFoundError, match="images are gone"):
        model.fit(Lost(x, y), epochs=3, shuffle=False, verbose=0)
    assert model.optimizer.solves


def test_judged_by_validation_is_the_choice_made_by_hand():
    x, y = digits(160)
    judges = (x[96:], y[96:])
    x, y = x[:96], y[:96]
    options = {"judge": "validation"}
    model = compiled(solve_options=options)
    model.fit(
        x, y, epochs=3, shuffle=False, validation_data=judges, verbose=0, batch_size=32
    )
    explored = compiled(exploit_optimizer=None, explore=2)
    explored.fit(x, y, epochs=2, shuffle=False, verbose=0, batch_size=32)
    assert explored.optimizer.weight_average.apply()
    kd.solve(explored, x, y, validation_data=judges, batch_size=128, verbose=0)
    assert model.head.width == explored.head.width
    for found, wanted in zip(weights(model), weights(explored), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_judged_by_a_validation_split():
    x, y = digits(160)
    model = compiled(n=160, solve_options={"judge": "validation"})
    history = model.fit(x, y, epochs=3, validation_split=0.3, verbose=0).history
    assert history["gap"][-1] <= 1e-6
    assert np.isfinite(history["val_loss"][-1])


def test_judged_by_a_stream():
    x, y = digits(160)
    model = compiled(solve_options={"judge": "validation"})
    judges = Batches(x[96:], y[96:])
    history = model.fit(
        x[:96], y[:96], epochs=3, validation_data=judges, verbose=0
    ).history
    assert history["gap"][-1] <= 1e-6


def test_a_class_that_no_judge_has():
    x, y = digits(160)
    there = y[96:] != 3
    model = compiled(solve_options={"judge": "validation"})
    judges = (x[96:][there], y[96:][there])
    history = model.fit(x[:96], y[:96], epochs=3, validation_data=judges, verbose=0)
    assert history.history["gap"][-1] <= 1e-6


def test_judges_that_are_not_given():
    x, y = digits(96)
    model = compiled(solve_options={"judge": "validation"})
    before = weights(model)
    with pytest.raises(ValueError, match=r"validation_data.*validation_split"):
        model.fit(x, y, epochs=3, verbose=0)
    assert_equal(before, weights(model))
    with pytest.raises(ValueError, match="judge='test'"):
        kd.DAlign("adam", solve_options={"judge": "test"})
    with pytest.raises(ValueError, match="with l2=0"):
        SolveOptions(judge="validation", l2=0)


@pytest.mark.parametrize("n", [2, 4])
def test_too_few_samples_to_hold_some_out(n, capsys):
    x, y = digits(n)
    model = compiled(n=n)
    history = model.fit(x, y, epochs=3, verbose=2).history
    assert history["gap"][-1] <= 1e-6
    assert "too few samples to hold some out" in capsys.readouterr().out


def test_plain_interpolation_is_one_argument_away():
    x, y = digits(96)
    model = compiled(solve_options={"l2": 0})
    history = model.fit(x, y, epochs=3, verbose=0).history
    assert history["loss"][-1] <= 1e-5
    assert history["objective"][-1] == pytest.approx(history["loss"][-1], abs=1e-6)
    assert model.head.width == model.head.default_width()


def test_a_convolutional_network():
    x, y = digit_images(96)
    model = compiled(convnet())
    history = model.fit(x, y, epochs=3, verbose=0).history
    assert history["gap"][-1] <= 1e-6


def test_a_killed_run_of_the_default_goes_on(tmp_path):
    x, y = digits(96)

    class Stop(keras.callbacks.Callback):
        def __init__(self, at):
            super().__init__()
            self.at = at

        def on_epoch_end(self, epoch, logs=None):
            if epoch == self.at:
                raise KeyboardInterrupt

    def run(folder, *callbacks):
        model = compiled()
        fit_with_backup(model, x, y, folder, *callbacks)
        return model

    whole = run(tmp_path / "whole")
    for at in (0, 1, 3):
        folder = tmp_path / f"killed-{at}"
        with pytest.raises(KeyboardInterrupt):
            run(folder, Stop(at))
        resumed = run(folder)
        # Both are within a gap of 1e-6 of one optimum, with a weight of 1e-2.
        np.testing.assert_allclose(
            resumed.predict(x, verbose=0), whole.predict(x, verbose=0), atol=0.05
        )
        assert_equal(weights(whole.trunk), weights(resumed.trunk))


def test_the_default_survives_its_configuration():
    optimizer = kd.DAlign("adam", average_weights=0.3, explore=1.0)
    again = kd.DAlign.from_config(optimizer.get_config())
    assert again.solves
    assert again.may_fall_back
    assert again.average_weights == 0.3
    assert again.explore == 1.0
    assert isinstance(again.explore, float)
    assert SolveOptions().l2 == "auto"
