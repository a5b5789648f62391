import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("filelock")
pytest.importorskip("yaml")

import grids

import keras_dalign as kd
from pipelines import (
    datasets,
    exploration,
    explore,
    methods,
    prepare,
    train,
)
from pipelines.exploration import Exploration, Job, objective
from pipelines.layout import Layout
from pipelines.locks import locked
from pipelines.optimizers import optimizer
from pipelines.params import EXPLORATION, Recipe, Run
from pipelines.recording import Recorder
from pipelines.stream import FollowEpoch, Stream

# XLA fuses the average into the compiled step of `DAlign`.
ROUNDS_OTHERWISE = keras.backend.backend() == "jax"


@pytest.fixture
def params(tmp_path):
    return grids.tiny(tmp_path / "params.yaml")


@pytest.fixture
def layout(params, tmp_path):
    prepare.main("digits", params=params, root=tmp_path)
    return Layout(tmp_path)


def job_of(params, layout, augmentation="none", method=EXPLORATION):
    data, _ = datasets.read(layout, "digits")
    return Job.of(Run("digits", augmentation, method, 0), params, data)


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    """Two explorations of one job: without, and with, a running average beside them."""
    folder = tmp_path_factory.mktemp("explored")
    params = grids.tiny(folder / "params.yaml")
    prepare.main("digits", params=params, root=folder)
    job = job_of(params, Layout(folder))
    return [
        exploration.explore(job, folder / name, shares=(0.5, 1.0), average=average)
        for name, average in (("plain", False), ("beside", True))
    ]


def weights(folder):
    return {
        path.name: [array for _, array in sorted(np.load(path).items())]
        for path in sorted(folder.glob("epoch-*"))
    }


@pytest.mark.parametrize("augmentation", ["none", "standard"])
def test_a_killed_exploration_goes_on_and_gives_the_same(
    params, layout, tmp_path, monkeypatch, augmentation
):
    job = job_of(params, layout, augmentation)
    shares = (0.25, 0.5, 1.0)
    whole = exploration.explore(job, tmp_path / "whole", shares=shares, average=True)

    backup = tmp_path / "backup.npz"
    noted = Recorder.on_epoch_end

    def killed(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt
        noted(self, epoch, logs)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_epoch_end", killed)
        with pytest.raises(KeyboardInterrupt):
            exploration.explore(job, tmp_path / "first", backup, shares, average=True)
    epochs = []
    with monkeypatch.context() as patch:
        begin = FollowEpoch.on_epoch_begin

        def watched(self, epoch, logs=None):
            epochs.append(epoch)
            begin(self, epoch, logs)

        patch.setattr(FollowEpoch, "on_epoch_begin", watched)
        again = exploration.explore(
            job, tmp_path / "again", backup, shares, average=True
        )

    # It did not begin anew.
    assert epochs == [2, 3]
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "again")
    kinds = ("-average.npz", ".npz")
    assert list(expected) == [f"epoch-00{e}{k}" for e in (1, 2, 4) for k in kinds]
    assert list(found) == list(expected)
    for name, arrays in expected.items():
        for a, b in zip(arrays, found[name], strict=True):
            np.testing.assert_array_equal(a, b)
    none = {"seconds": 0, "average_seconds": 0}
    for one, two in zip(whole.epochs, again.epochs, strict=True):
        assert {**one, **none} == {**two, **none}
    exploration.discard(backup)
    assert not list(tmp_path.glob("backup*"))


def explored_with_dalign(job):
    """An aligned model after two epochs of exploration by `fit`."""
    model = kd.align(job.base(), n_samples=150, gates="random", seed=0)
    adam = optimizer(job.recipe, job.steps, job.train.epochs)
    model.compile(optimizer=kd.DAlign(adam, None, explore=2), **objective())
    stream = job.stream()
    model.fit(
        stream, epochs=2, verbose=0, callbacks=[FollowEpoch(stream)], shuffle=False
    )
    return model


def test_the_shared_exploration_is_that_of_random_gates(explored):
    shared, _ = explored

    model = explored_with_dalign(shared.job)

    assert model.phase == "exploring"
    base = shared.model(0.5)
    *trunk, kernel, bias = base.weights
    assert kernel is base.layers[-1].kernel
    linear = model.head.explored_variables
    for variable, own in zip(
        [*trunk, kernel, bias], [*model.trunk.weights, *linear], strict=True
    ):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(variable),
            keras.ops.convert_to_numpy(own),
            err_msg=variable.path,
        )


def test_averaging_changes_nothing_in_the_training(explored):
    plain, beside = explored
    expected, found = weights(plain.folder), weights(beside.folder)
    assert set(found) - set(expected) == {f"epoch-00{e}-average.npz" for e in (2, 4)}
    for name, arrays in expected.items():
        for a, b in zip(arrays, found[name], strict=True):
            np.testing.assert_array_equal(a, b)
    assert [e["train_loss"] for e in plain.epochs] == [
        e["train_loss"] for e in beside.epochs
    ]
    # What it takes stands apart.
    assert plain.seconds(1.0, average=True) == plain.seconds(1.0)
    assert beside.seconds(1.0, average=True) > beside.seconds(1.0)


def test_the_average_is_that_of_dalign(explored):
    _, shared = explored

    model = explored_with_dalign(shared.job)
    wanted = model.optimizer.weight_average.averages
    base = shared.model(0.5, average=True)
    for variable, average in zip(base.trainable_variables, wanted, strict=True):
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(variable),
            keras.ops.convert_to_numpy(average),
            rtol=1e-5 if ROUNDS_OTHERWISE else 0,
            atol=1e-6 if ROUNDS_OTHERWISE else 0,
        )
    # Statistics are those of the last step, for whoever re-estimates them.
    last = shared.model(0.5)
    for one, two in zip(
        base.non_trainable_variables, last.non_trainable_variables, strict=True
    ):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(two)
        )


def test_what_was_not_kept_is_named(explored):
    shared, _ = explored
    with pytest.raises(ValueError, match=r"epoch 3 no weights .* kept are .* \[2, 4\]"):
        shared.model(0.75)
    with pytest.raises(ValueError, match=r"epoch 2 no averaged weights .* after \[\]"):
        shared.model(0.5, average=True)
    assert len(shared.until(0.5)) == 2
    assert 0 < shared.seconds(0.5) < shared.seconds(1.0)


def test_a_stage_writes_what_is_read(params, layout, tmp_path):
    folder = explore.main("digits", "none", 0, params=params, root=tmp_path)
    shared = Exploration.read(job_of(params, layout, method="base"), layout)
    assert shared.folder == folder
    assert [entry["epoch"] for entry in shared.epochs] == [1, 2, 3, 4]
    assert all(entry["seconds"] > 0 for entry in shared.epochs)
    assert all(entry["average_seconds"] > 0 for entry in shared.epochs)
    before = weights(folder)
    explore.main("digits", "none", 0, params=params, root=tmp_path)
    for name, arrays in weights(folder).items():
        for a, b in zip(arrays, before[name], strict=True):
            np.testing.assert_array_equal(a, b)


def test_two_processes_do_not_share_a_run(params, layout, tmp_path):
    run = Run("digits", "none", "base", 0)
    explore.main("digits", "none", 0, params=params, root=tmp_path)
    with (
        locked(layout.backup(run)),
        pytest.raises(RuntimeError, match="Another process works on this run"),
    ):
        train.main("digits", "none", "base", 0, params=params, root=tmp_path)
    train.main("digits", "none", "base", 0, params=params, root=tmp_path)


def test_the_test_error_takes_none_of_the_time(params, layout, monkeypatch):
    job = job_of(params, layout)
    model = job.base()
    model.compile(optimizer(job.recipe, job.steps, 2), **objective())
    predict, now = model.predict, [0.0]

    def slow(*args, **kwargs):
        now[0] += 100.0
        return predict(*args, **kwargs)

    monkeypatch.setattr(model, "predict", slow)
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("pipelines.recording.time", clock)
    train_only = replace(job, train=replace(job.train, epochs=2))
    recorder = exploration.fit(train_only, model, 2)
    assert all("test_error_rate" in entry for entry in recorder.epochs)
    assert [entry["seconds"] for entry in recorder.epochs] == [0.0, 0.0]
    assert recorder.own_seconds == 200.0


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [0.1] * 3), ("cosine", [0.1, 0.05, 0.0])]
)
def test_schedules(schedule, expected):
    made = optimizer(Recipe(0.1, schedule), 5, 2)
    made.build([keras.Variable([0.0])])
    found = []
    for step in (0, 5, 10):
        made.iterations.assign(step)
        found.append(float(made.learning_rate))
    assert found == pytest.approx(expected, abs=1e-7)
    # It goes on where another one ended.
    later = optimizer(Recipe(0.1, schedule), 5, 2, start=1)
    assert float(later.learning_rate) == pytest.approx(expected[1])


def test_unknown_optimizers_and_schedules_are_listed():
    with pytest.raises(ValueError, match=r"no such schedule.*constant, cosine"):
        optimizer(Recipe(0.1, "linear"), 5, 2)
    with pytest.raises(ValueError, match=r"no such optimizer.*adam, sgd"):
        optimizer(Recipe(0.1, optimizer="adamm"), 5, 2)


def test_a_killed_run_with_learned_gates_goes_on(params, layout, tmp_path, monkeypatch):
    job = job_of(params, layout, method="letter")
    settings = params.methods["letter"]

    def finished(backup):
        trained = methods.finish(job, settings, lambda: None, backup)
        assert trained.switch["epoch"] == 2
        assert trained.switch["full"]
        assert trained.phases["switch"] > 0
        return trained.model.get_weights(), trained.epochs

    expected, whole = finished(tmp_path / "whole.npz")
    noted = Recorder.on_epoch_end
    for moment in (1, 3):

        def killed(self, epoch, logs=None, moment=moment):
            if epoch == moment:
                raise KeyboardInterrupt
            noted(self, epoch, logs)

        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "on_epoch_end", killed)
            with pytest.raises(KeyboardInterrupt):
                finished(tmp_path / "killed.npz")
    found, epochs = finished(tmp_path / "killed.npz")
    assert not list(tmp_path.glob("killed*"))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [entry["train_loss"] for entry in epochs] == [
        entry["train_loss"] for entry in whole
    ]


@pytest.mark.skipif(ROUNDS_OTHERWISE, reason="the averages differ in their last bits")
@pytest.mark.parametrize("explore", [0.5, 1.0])
def test_the_default_is_that_of_fit(params, layout, tmp_path, monkeypatch, explore):
    # `fit` on arrays shuffles by itself; without shuffles both see the same batches.
    def in_order(stream, index):
        these = slice(index * stream.batch_size, (index + 1) * stream.batch_size)
        return stream.x[these], stream.y[these]

    monkeypatch.setattr(Stream, "__getitem__", in_order)
    job = job_of(params, layout, method="dalign")
    shared = exploration.explore(job, tmp_path / "w", shares=(0.5, 1.0), average=True)
    settings = {**params.methods["dalign"], "explore": explore}
    trained = methods.finish(job, settings, lambda: shared, tmp_path / "b.npz")

    model = kd.align(job.base(), n_samples=150, seed=0)
    adam = optimizer(job.recipe, job.steps, job.train.epochs)
    model.compile(kd.DAlign(adam, explore=explore), **objective())
    model.fit(
        job.data.x_train,
        job.data.y_train,
        batch_size=job.train.batch_size,
        epochs=job.train.epochs,
        shuffle=False,
        verbose=0,
    )
    assert trained.l2 > 0
    assert model.switch_report.averaged
    for variable, found in zip(model.weights, trained.model.weights, strict=True):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(variable),
            keras.ops.convert_to_numpy(found),
            err_msg=variable.path,
        )


def test_killed_after_the_last_epoch_it_has_its_weights(params, layout, tmp_path):
    job, backup = job_of(params, layout), tmp_path / "backup.npz"
    first = exploration.explore(job, tmp_path / "first", backup, (0.5, 1.0))
    expected = weights(first.folder)
    # The folder in which a stage gathers its files is gone.
    shutil.rmtree(first.folder)
    again = exploration.explore(job, tmp_path / "again", backup, (0.5, 1.0))
    found = weights(again.folder)
    assert list(found) == list(expected) == ["epoch-002.npz", "epoch-004.npz"]
    for name, arrays in expected.items():
        for a, b in zip(arrays, found[name], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("moment", ["weights", "epoch"])
def test_a_backup_that_a_kill_left_half_written_is_not_used(
    params, layout, tmp_path, monkeypatch, moment
):
    job, backup = job_of(params, layout), tmp_path / "backup.npz"
    whole = exploration.explore(job, tmp_path / "whole").model(1.0).get_weights()
    save, calls = keras.Model.save_weights, []

    def killed(self, filepath, *args, **kwargs):
        calls.append(filepath)
        if moment == "weights" and len(calls) == 2:
            Path(filepath).write_bytes(b"half")
            raise KeyboardInterrupt
        save(self, filepath, *args, **kwargs)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "save_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            exploration.explore(job, tmp_path / "killed", backup)
    again = exploration.explore(job, tmp_path / "again", backup)
    for a, b in zip(whole, again.model(1.0).get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_second_model_of_a_method_has_a_backup_of_its_own(
    params, layout, tmp_path, monkeypatch
):
    job = job_of(params, layout, method="twice")
    settings = {"kind": "base", "epochs": 0.5, "temperature": 0.2}

    def finished(backup):
        trained = methods.finish(job, settings, lambda: None, backup)
        return [*trained.model.get_weights(), np.array(trained.temperature)]

    expected = finished(tmp_path / "whole.npz")
    noted, ended = Recorder.on_epoch_end, []

    def killed(self, epoch, logs=None):
        ended.append(epoch)
        if len(ended) == 4:
            # In the second epoch of the second model.
            raise KeyboardInterrupt
        noted(self, epoch, logs)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_epoch_end", killed)
        with pytest.raises(KeyboardInterrupt):
            finished(tmp_path / "killed.npz")
    found = finished(tmp_path / "killed.npz")
    assert not list(tmp_path.glob("killed*"))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
