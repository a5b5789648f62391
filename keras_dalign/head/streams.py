"""Streams of batches: which objects are streams, and whether they end.

A stream is a `tf.data.Dataset`, a `keras.utils.PyDataset`, a torch `DataLoader` or an
iterator. TensorFlow and PyTorch objects are recognised by the name of their class and
never imported: the package depends on Keras and NumPy alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, TypeVar

import keras

_Batch = TypeVar("_Batch")

_KINDS = (
    "NumPy arrays, tensors, or nested lists, tuples or dicts of them, a "
    "`tf.data.Dataset`, a `keras.utils.PyDataset`, a torch `DataLoader` or a generator"
)


def check_stream(
    x: Any,
    steps: int | None = None,
    label: str = "`x`",
    steps_name: str | None = "steps",
) -> None:
    """Checks that an object is a stream of batches that ends, without reading it.

    Args:
        x: A `tf.data.Dataset`, a `keras.utils.PyDataset`, a torch `DataLoader` or an
            iterator.
        steps: Number of batches to read, or None for all.
        label: The name of the stream in errors.
        steps_name: The name of `steps` in errors, or None if there is no such argument.

    Raises:
        ValueError: If it is none of these, or may never end.
    """
    if has_base_class(x, "DatasetV2", "tensorflow.python"):
        # -1 is `tf.data.INFINITE_CARDINALITY`.
        endless = int(x.cardinality()) == -1
    elif isinstance(x, keras.utils.PyDataset):
        endless = x.num_batches is None
    elif has_base_class(x, "DataLoader", "torch.utils.data"):
        endless = False
    elif isinstance(x, Iterator):
        endless = True
    else:
        raise ValueError(
            f"{label} must be {_KINDS}. Convert lists of numbers with `np.asarray`. "
            f"Received: {describe(x, label)}"
        )
    if endless and steps is None:
        advice = (
            "pass data that end: arrays, a `tf.data.Dataset`, a `PyDataset` or a "
            "`DataLoader`"
            if steps_name is None
            else f"pass `{steps_name}`, the number of batches that make one pass over "
            "the data"
        )
        received = "" if steps_name is None else f", {steps_name}=None"
        raise ValueError(
            f"{label} may never end: {advice}. Received: {describe(x, label)}{received}"
        )


def nonempty(x: Any, label: str = "`x`") -> Any:
    """Checks that an iterator has a batch.

    Args:
        x: A stream.
        label: The name of the stream in errors.

    Returns:
        The stream. For an iterator, whose first batch has to be read, a generator of
        the same batches.

    Raises:
        ValueError: If an iterator has no batch.
    """
    if not isinstance(x, Iterator):
        return x
    for first in x:
        return (batch for batch in itertools.chain([first], x))
    raise ValueError(
        f"{label} is empty: the stream has no batch. One that was read before must be "
        f"created again. Received: {describe(x, label)}"
    )


def items(x: Any, steps: int | None) -> Iterator[Any]:
    """Iterates over the items of a stream.

    Args:
        x: The stream.
        steps: Number of items, for a `PyDataset` without a length.

    Returns:
        An iterator over the items as they are.
    """
    if isinstance(x, keras.utils.PyDataset):
        # The length comes first: an item beyond the end is undefined.
        last = steps if x.num_batches is None else x.num_batches
        return (x[i] for i in range(last or 0))
    return iter(x)


def take(stream: Iterator[_Batch], steps: int | None, label: str) -> Iterator[_Batch]:
    """Reads batches from an iterator.

    Args:
        stream: The batches.
        steps: How many to read; None reads them all.
        label: The name of the stream in errors.

    Yields:
        The batches.

    Raises:
        ValueError: If there are none, or fewer than `steps`.
    """
    n_taken = 0
    # At most `steps` are requested, so that a generator keeps the others.
    while steps is None or n_taken < steps:
        try:
            batch = next(stream)
        except StopIteration:
            break
        n_taken += 1
        yield batch
    if n_taken == 0:
        raise ValueError(
            f"{label} is empty: the stream ended before its first batch. A generator "
            "that was read before must be created again. Received: no batch"
        )
    if steps is not None and n_taken < steps:
        raise ValueError(
            f"{label} ended after {n_taken} batches. Pass fewer `steps`, or a stream "
            f"that lasts. Received: steps={steps}"
        )


def has_base_class(x: Any, name: str, module: str) -> bool:
    """Whether a class of this name, from this module, is among the bases of `x`.

    Args:
        x: Anything.
        name: Name of the class.
        module: How the name of its module begins.

    Returns:
        True if there is one.
    """
    return any(
        base.__name__ == name and base.__module__.startswith(module)
        for base in type(x).__mro__
    )


def describe(x: Any, label: str) -> str:
    """Names the type of some data and of its leaves, for errors.

    Args:
        x: The data.
        label: Their name, between backquotes.

    Returns:
        For instance "x of type list with leaves ['int']".
    """
    types = sorted({type(leaf).__name__ for leaf in keras.tree.flatten(x)})
    text = f"{label.split('`')[1]} of type {type(x).__name__}"
    return text if types == [type(x).__name__] else f"{text} with leaves {types}"
