import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from keras_dalign.numerics import threads


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_parts_cover_the_rows_in_order(n, monkeypatch):
    monkeypatch.setattr(threads, "blas_threads", lambda: 3)
    found = threads.over_rows(lambda rows: list(range(n))[rows], n)
    assert len(found) == min(n, 3)
    assert [row for part in found for row in part] == list(range(n))
    assert threads.over_rows(lambda rows: rows, n, split=False) == [slice(0, n)]


def test_parts_run_in_threads_where_blas_has_one(monkeypatch):
    monkeypatch.setattr(threads, "blas_threads", lambda: 2)
    before = of_blas()
    names = set()

    def compute(rows):
        del rows
        names.add(threading.current_thread().name)
        time.sleep(0.02)
        return of_blas()

    found = threads.over_rows(compute, 100)
    assert found == [[1] * len(before)] * 2
    assert threading.current_thread().name not in names
    assert of_blas() == before


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(threads, "blas_threads", lambda: 2)
    before = of_blas()
    with pytest.raises(ZeroDivisionError):
        threads.over_rows(lambda rows: 1 / rows.start, 100)
    assert of_blas() == before


def test_the_limit_lasts_as_long_as_the_context():
    before = of_blas()
    with threads.one_blas_thread():
        assert of_blas() == [1] * len(before)
        with threads.one_blas_thread():
            np.ones((50, 50)) @ np.ones((50, 50))
        assert of_blas() == [1] * len(before)
    assert of_blas() == before
    assert threads.blas_threads() == max(before)


def of_blas():
    return [
        each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"
    ]
