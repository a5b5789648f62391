"""Private names of Keras that the package relies on, each behind a small function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras


@contextmanager
def new_variables(layer: keras.Layer, old: Iterable[Any]) -> Iterator[None]:
    """Lets a built layer replace some of its variables.

    Args:
        layer: The layer.
        old: Variables that it gives up; None is skipped.

    Yields:
        Nothing; within the context `layer.add_weight` works.
    """
    tracker = layer._tracker  # noqa: SLF001
    was_locked = tracker.locked
    tracker.unlock()
    try:
        for variable in old:
            if variable is not None:
                layer._untrack_variable(variable)  # noqa: SLF001
        # Paths of variables begin with that of their layer.
        with layer._open_name_scope():  # noqa: SLF001
            yield
    finally:
        if was_locked:
            tracker.lock()
