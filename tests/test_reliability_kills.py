"""A part of `python -m reliability kills`, in a process that can be forked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from small import assert_equal, cross_entropy, digits, mlp, weights

import keras_dalign as kd

pytest.importorskip("sklearn")
pytest.importorskip("filelock")
pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
BACKEND = keras.backend.backend()

PROGRAM = """
import argparse, json, pathlib, sys
from reliability import kills

parser = argparse.ArgumentParser()
kills.add_options(parser)
report = kills.measure(parser.parse_args(sys.argv[2:]))
targets = [target.to_dict() for target in report.targets]
pathlib.Path(sys.argv[1]).write_text(json.dumps([targets, report.measurements]))
"""


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the pipelines use TensorFlow")
def test_some_kills(tmp_path):
    found, state = tmp_path / "found.json", tmp_path / "state.jsonl"
    arguments = ["--kills", "6", "--only", "fit", "prepare", "--state", str(state)]
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(found), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"},
            check=True,
        )
        targets, runs = json.loads(found.read_text(encoding="utf-8"))
        assert all(target["met"] for target in targets), runs
        # What was done is not done again.
        assert len(state.read_text(encoding="utf-8").splitlines()) == len(runs)
    assert sum(len(run["kills"]) for run in runs) >= 6


class KilledError(Exception):
    pass


def backup(folder, at=None):
    """Keras's callback; it ends between the weights and the number of an epoch."""

    class Backup(keras.callbacks.BackupAndRestore):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == at:
                self.model.save_weights(self._weights_path, overwrite=True)
                raise KilledError
            super().on_epoch_end(epoch, logs)

    return Backup(folder, delete_checkpoint=False)


@pytest.mark.parametrize("at", [0, 1])
def test_killed_between_the_weights_and_the_number_of_their_epoch(at, tmp_path):
    x, y = digits(64)

    def run(*callbacks):
        model = kd.align(mlp(seed=1), n_samples=64, seed=0)
        optimizer = kd.DAlign("adam", "adam", explore=2)
        model.compile(optimizer, cross_entropy(), run_eagerly=BACKEND != "jax")
        arguments = {"epochs": 3, "shuffle": False, "verbose": 0}
        history = model.fit(x, y, callbacks=list(callbacks), **arguments)
        return model, history

    (tmp_path / "backup").mkdir()
    whole, _ = run()
    with pytest.raises(KilledError):
        run(backup(tmp_path / "backup", at))
    resumed, history = run(backup(tmp_path / "backup"))
    assert history.epoch == list(range(at + 1, 3))
    assert_equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_files_are_whole_or_as_they_were(name, tmp_path, monkeypatch):
    model = kd.align(mlp(), n_samples=64)
    path = tmp_path / name
    save = model.save if name.endswith(".keras") else model.save_weights
    save(path)
    before = path.read_bytes()

    def fails(self, store):
        np.testing.assert_equal(path.read_bytes(), before)
        raise KilledError

    monkeypatch.setattr(type(model.head), "save_own_variables", fails)
    with pytest.raises(KilledError):
        save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [name]
