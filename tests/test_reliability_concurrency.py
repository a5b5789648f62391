"""A part of `python -m reliability concurrency`, in threads."""

import threading
import time

import keras
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("filelock")
pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

import keras_dalign as kd
from keras_dalign.head import batch_norm
from reliability import concurrency, faults

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the pipelines use TensorFlow"
)


def test_threads():
    with faults.eagerly():
        for case in concurrency.thread_cases():
            outcome = case()
            assert not outcome.wrong
            assert outcome.right >= 4


def test_no_thread_reads_a_trunk_that_another_one_changes(monkeypatch):
    """While `solve` re-estimates, normalisations compute something else."""
    first, second = concurrency._sharing(2)
    x, y = faults.data()
    compute = batch_norm.moments_and_normalized
    inside, found = threading.Event(), []

    def slow(*arguments):
        inside.set()
        time.sleep(0.3)
        return compute(*arguments)

    def certify():
        inside.wait(60)
        found.append(kd.certify(first, x, y).to_dict())

    with faults.eagerly():
        kd.solve(first, x, y, l2=1e-2, tol=1e-3, verbose=0)
        expected = kd.certify(first, x, y).to_dict()
        monkeypatch.setattr(batch_norm, "moments_and_normalized", slow)
        thread = threading.Thread(target=certify)
        thread.start()
        kd.solve(second, x, y, l2=1e-2, tol=1e-3, verbose=0)
        thread.join()
    assert found == [expected]


def test_other_results_are_found(monkeypatch):
    numbers = iter(range(100))
    monkeypatch.setattr(concurrency, "_certified", lambda _: [np.array(next(numbers))])
    with faults.eagerly():
        outcome = concurrency.thread_cases()[0]()
    assert outcome.right == 0
    assert len(outcome.wrong) == 4
