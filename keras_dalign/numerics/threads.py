"""Threads of NumPy's and SciPy's linear algebra.

NumPy, SciPy and the backend each have their own pool of threads. Idle threads keep a
core busy for a while, so libraries that are called in turns slow each other down, by a
factor of four for short vectors. Here BLAS is limited to one thread, and large work is
split by rows over threads instead. The operations between two matrix products then use
all cores as well.

Public functions that several threads call run one after the other (`in_turn`): one may
change what another reads, such as the batch-norm statistics of a shared trunk.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import scipy.linalg.blas  # noqa: F401  (loads the library that is to be limited)
from threadpoolctl import ThreadpoolController

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

# Of the thread whose turn it is, which may call further such functions.
_turn = threading.RLock()


def in_turn(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorates functions of which one thread at a time may run one."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with _turn:
            return function(*args, **kwargs)

    return call


@functools.cache
def controller() -> ThreadpoolController:
    """The object that counts and limits the threads of BLAS."""
    return ThreadpoolController().select(user_api="blas")


@functools.cache
def blas_threads() -> int:
    """Number of threads to use: that of BLAS at the first call."""
    return max((each["num_threads"] for each in controller().info()), default=1)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(blas_threads(), thread_name_prefix="keras_dalign")


def one_blas_thread() -> AbstractContextManager[Any]:
    """A context that limits BLAS to one thread."""
    blas_threads()
    limit: AbstractContextManager[Any] = controller().limit(limits=1)
    return limit


def over_rows(
    function: Callable[[slice], Result], n: int, *, split: bool = True
) -> list[Result]:
    """Calls a function for parts of `n` rows, each in its own thread.

    Args:
        function: Takes a slice of rows. Most of its time must be in NumPy or SciPy,
            which release the interpreter's lock.
        n: Number of rows.
        split: Whether the work is worth several threads.

    Returns:
        The results, in the order of the rows.
    """
    parts = min(blas_threads(), n) if split else 1
    bounds = [n * part // parts for part in range(parts + 1)]
    slices = [slice(*pair) for pair in itertools.pairwise(bounds)]
    if parts == 1:
        return [function(slices[0])]
    with one_blas_thread():
        return list(_pool().map(function, slices))
