import errno
import tempfile
import types

import numpy as np
import pytest
from small import maps_in

from keras_dalign.head import row_store
from keras_dalign.head.row_store import RowStore
from keras_dalign.numerics import memory

KINDS = [{"n": 10}, {"n": 12}, {}, {"on_disk": True}, {"n": 10, "on_disk": True}]


def rows(dtype="float32"):
    return np.random.default_rng(0).normal(size=(10, 2, 3)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_out_as_they_went_in(kind, dtype):
    x = rows(dtype)
    store = RowStore(**kind)
    for start in (0, 4, 8):
        # Not contiguous, and not to be relied on afterwards.
        batch = np.asfortranarray(x[start : start + 4])
        store.append(batch.copy(order="F"))
        batch[:] = 0
    array = store.array()
    np.testing.assert_array_equal(array, x)
    assert array.dtype == dtype
    assert isinstance(array, np.memmap) == ("on_disk" in kind)
    assert array.flags.writeable


def test_a_known_number_of_rows_is_copied_once():
    store = RowStore(10)
    store.append(rows()[:4])
    first = store.array()
    store.append(rows()[4:])
    assert np.shares_memory(first, store.array())


def test_batches_of_an_unknown_number_are_dropped_one_by_one():
    store = RowStore()
    for batch in np.split(rows(), 5):
        store.append(batch)
    store.array()
    assert store._parts == []


def test_batches_of_several_dtypes():
    store = RowStore()
    store.append(np.array([1, 2]))
    store.append(np.array([0.5]))
    np.testing.assert_array_equal(store.array(), [1, 2, 0.5])


def test_the_file_has_no_name_and_goes_with_the_array(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = RowStore(on_disk=True)
    store.append(rows())
    array = store.array()
    del store
    assert list(tmp_path.iterdir()) == []
    maps = maps_in(tmp_path)
    assert maps is None or len(maps) == 1
    view = array[3:]
    del array
    np.testing.assert_array_equal(view, rows()[3:])
    del view
    assert not maps_in(tmp_path)


class Full:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, room, number=errno.ENOSPC):
        self.room, self.number, self.closed = room, number, False

    def write(self, data):
        if not self.room:
            raise OSError(self.number, "no space left")
        # As the system does it: what fits is written.
        written = min(self.room, len(data))
        self.room -= written
        return written

    def close(self):
        self.closed = True


@pytest.mark.parametrize(("n", "message"), [(10, "2.24e-07 GiB,"), (None, "or more,")])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(monkeypatch, number, n, message):
    monkeypatch.setattr(memory, "free_disk_gib", lambda: 0.25)
    file = Full(100, number)
    monkeypatch.setattr(
        row_store, "tempfile", types.SimpleNamespace(TemporaryFile=lambda **_: file)
    )
    store = RowStore(n, on_disk=True)
    store.append(rows()[:4])
    match = rf"take .*{message}.*0.25 GiB free in .*TMPDIR"
    with pytest.raises(OSError, match=match) as info:
        store.append(rows()[4:])
    assert info.value.errno == errno.ENOSPC
    assert file.closed


def test_another_error_of_the_disk(monkeypatch):
    file = Full(0, errno.EIO)
    monkeypatch.setattr(
        row_store, "tempfile", types.SimpleNamespace(TemporaryFile=lambda **_: file)
    )
    with pytest.raises(OSError, match="no space left"):
        RowStore(10, on_disk=True).append(rows())
    assert file.closed
