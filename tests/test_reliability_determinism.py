"""The measurement of determinism in small: one backend, one thread."""

import json
import sys

import keras
import numpy as np
import pytest

pytest.importorskip("sklearn")

from reliability import backends, determinism

BACKEND = keras.backend.backend()


def test_two_processes_give_the_same_bits(tmp_path):
    task = {"samples": 64, "epochs": 2, "seed": 0}
    task["features"] = str(tmp_path / "features.npz")
    first, second = (
        backends.run("reliability.determinism", task, BACKEND, sys.executable)
        for _ in range(2)
    )
    assert first == second
    assert len(first["losses"]) == 2
    loss, bound, least = first["certificate"]
    assert 0 <= least <= bound <= loss < 10.0
    assert json.dumps(first)


def test_spread():
    assert determinism._spread([[1.0, 2.0], [1.0, 2.0]]) == 0
    assert determinism._spread([[1.0, 2.0], [1.0, 3.0]]) == pytest.approx(1 / 3)


def test_the_problem_depends_on_the_seed_alone():
    a, b, c = (determinism.problem(20, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])
    assert not np.array_equal(a[0], c[0])


def test_pythons():
    assert backends.pythons(["jax=/x"]) == {"jax": "/x"}
    assert backends.pythons([])[BACKEND] == sys.executable
    with pytest.raises(ValueError, match="Received: mxnet"):
        backends.pythons(["mxnet=/x"])
