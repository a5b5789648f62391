import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from small import mlp

from keras_dalign.numerics.replicas import Replicas, replicas_of

BACKEND = keras.backend.backend()


class Threads(Replicas):
    """Threads in place of processes."""

    processes = 3

    def __init__(self, process, given, barrier):
        self.process = process
        self._given = given
        self._barrier = barrier

    def from_all(self, array):
        self._given[self.process] = array
        self._barrier.wait(30)
        found = np.stack([self._given[process] for process in range(3)])
        self._barrier.wait(30)
        return found


def in_three_processes(function):
    """What a function of its replicas returns in each of three processes."""
    given, barrier = {}, threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        replicas = [Threads(process, given, barrier) for process in range(3)]
        return list(pool.map(function, replicas))


def refusal(replicas, facts):
    try:
        replicas.check_alike(facts)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_shares_are_filled_up_with_zeros(count):
    replicas = Replicas()
    replicas.count = count
    asked = []

    def values(rows):
        asked.extend(range(rows.start, rows.stop))
        return np.arange(rows.start, rows.stop)[:, None] * np.ones((1, 2))

    shares = [replicas._share(slice(10, 17), i, (2,), values) for i in range(count)]
    assert {share.shape for share in shares} == {(-(-7 // count), 2)}
    rows = np.concatenate(shares)
    np.testing.assert_array_equal(rows[:7, 1], np.arange(10, 17))
    assert not rows[7:].any()
    assert asked == list(range(10, 17))


def test_what_is_alike_passes():
    x = np.arange(6.0).reshape(2, 3)
    facts = {"samples": 2, "inputs": {"a": x, "b": [None, "c"]}, "seed": 1.5}
    assert in_three_processes(lambda replicas: refusal(replicas, facts)) == [None] * 3


@pytest.mark.parametrize(
    ("common", "other", "received"),
    [
        (3, 4, r"different n \(n {} in"),
        ("a", "b", r"different n \(n {} in"),
        (np.zeros(4), np.zeros((2, 2)), r"different n \(n shape .* in"),
        (np.zeros(4, "int32"), np.zeros(4, "float32"), r"different n \(n shape .* in"),
        ([np.zeros(4), None], [np.zeros(4)], r"different n \(n \[.*\] in"),
    ],
)
def test_all_are_told_of_one_that_differs(common, other, received):
    def told(replicas):
        own = other if replicas.process == 2 else common
        with pytest.raises(ValueError, match=received.format(own)) as caught:
            replicas.check_alike({"same": 1, "n": own})
        return str(caught.value)

    for process, message in enumerate(in_three_processes(told)):
        assert f"in process {process})" in message
        assert "same 1" not in message


def test_streams_that_end_at_different_batches_are_told_everywhere():
    def read(replicas):
        batches = iter([np.full(2, batch) for batch in range(3 + replicas.process)])
        got = []
        with pytest.raises(ValueError, match="different batches") as caught:
            got.extend(replicas.alike(batches))
        return len(got), str(caught.value)

    found = in_three_processes(read)
    assert [got for got, _ in found] == [3, 3, 3]
    assert "batches at their end in process 0" in found[0][1]


def test_a_stream_that_fails_in_one_process_is_told_everywhere():
    def stream(replicas):
        yield 1
        if replicas.process == 1:
            raise OSError("unplugged")
        yield 2

    def read(replicas):
        with pytest.raises(ValueError, match="different batches") as caught:
            list(replicas.alike(stream(replicas)))
        return caught.value

    found = in_three_processes(read)
    assert isinstance(found[1].__context__, OSError)


def test_alike_streams_pass():
    assert in_three_processes(lambda r: list(r.alike(iter([1, 2])))) == [[1, 2]] * 3


def test_one_device_compares_nothing():
    replicas = replicas_of(mlp())
    assert type(replicas) is Replicas
    replicas.check_alike({"not looked at": object()})
    assert replicas.any(flag=True)
    assert not replicas.any(flag=None)


@pytest.mark.skipif(BACKEND != "torch", reason="torch.distributed")
def test_pytorch_without_distributed(monkeypatch):
    import torch

    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    assert type(replicas_of(mlp())) is Replicas
