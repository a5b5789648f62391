"""One view of all the data that `keras.Model.fit` accepts: batches of NumPy arrays.

Arrays, `tf.data.Dataset`, `keras.utils.PyDataset`, torch `DataLoader` and generators
come out alike. TensorFlow and PyTorch objects are recognised by name, never imported:
the core depends on Keras and NumPy alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_dalign.numerics.replicas import replicas_of

Batch = tuple[Any, Any | None, Any | None]

_KINDS = (
    "NumPy arrays, tensors, or nested lists, tuples or dicts of them, a "
    "`tf.data.Dataset`, a `keras.utils.PyDataset`, a torch `DataLoader` or a generator"
)


def is_arrays(x: Any) -> bool:
    """Whether `x` is arrays in memory, as opposed to a stream of batches.

    Args:
        x: What `keras.Model.fit` accepts as `x`: an array, a tensor of any framework, a
            pandas object, a nested structure of them, or a stream.

    Returns:
        `True` if every leaf of the structure has a shape and converts to NumPy; `False`
        for streams, and for everything else.
    """
    leaves = keras.tree.flatten(x)
    return bool(leaves) and all(_is_array(leaf) for leaf in leaves)


def n_samples(x: Any) -> int:
    """The number of samples in arrays: the common length of the first axis.

    Args:
        x: An array or a nested structure of arrays, each of shape `(n, ...)`.

    Returns:
        `n`, at least 1.

    Raises:
        ValueError: If `x` is not made of arrays, if a leaf has no first axis, if the
            leaves disagree, or if there are no samples.
    """
    if not is_arrays(x):
        raise ValueError(
            "The number of samples is known for arrays only. Pass NumPy arrays or "
            f"tensors; convert lists with `np.asarray`. Received: {_describe(x)}"
        )
    shapes = [tuple(leaf.shape) for leaf in keras.tree.flatten(x)]
    if not all(shapes):
        raise ValueError(
            "Every array must have the samples along its first axis; convert lists "
            f"with `np.asarray`. Received: shapes={_shorten(shapes)}"
        )
    sizes = {int(shape[0]) for shape in shapes}
    if len(sizes) > 1:
        raise ValueError(
            "All arrays must hold the same number of samples along their first axis. "
            f"Received: shapes={_shorten(shapes)}"
        )
    (size,) = sizes
    if size == 0:
        raise ValueError(
            "The data are empty: at least one sample is needed. Received: "
            f"shapes={_shorten(shapes)}"
        )
    return size


def batches(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int = 256,
    steps: int | None = None,
    model: keras.Model | None = None,
) -> Iterator[Batch]:
    """One pass over the data, in order, in batches of NumPy arrays.

    Nothing is shuffled. A `PyDataset` is read by index in this process, without its
    workers and without `on_epoch_begin` or `on_epoch_end`: looking at the data leaves
    the user's object as it was.

    Args:
        x: Inputs, or a stream of batches `x`, `(x,)`, `(x, y)` or
            `(x, y, sample_weight)`, as in `keras.Model.fit`.
        y: Targets, for arrays. A stream brings its own.
        sample_weight: Sample weights, for arrays. A stream brings its own.
        batch_size: Most samples in a batch, for arrays; see `even_batch_size`. A
            stream comes batched.
        steps: Number of batches to read. `None` reads everything, which a generator, an
            infinite `tf.data.Dataset` and an infinite `PyDataset` do not allow.
        model: The model that the batches are for. If several processes share it, each
            batch is compared with theirs.

    Returns:
        An iterator over `(x, y, sample_weight)`; the structures are those of the
        arguments, the leaves are writable NumPy arrays of shape `(batch, ...)`.

    Raises:
        ValueError: At once, if the arguments are not data, disagree in length, are
            empty, or never end; while iterating, if the stream is empty, ends before
            `steps`, holds something that is no batch of arrays, or is not what the
            other processes read.
    """
    if steps is not None:
        _check_positive_int("steps", steps)
    if is_arrays(x):
        _check_positive_int("batch_size", batch_size)
        stream = _array_batches(x, y, sample_weight, batch_size)
    else:
        for name, value in (("y", y), ("sample_weight", sample_weight)):
            if value is not None:
                raise ValueError(
                    f"`{name}` cannot be passed beside a stream: include it in the "
                    f"batches, `(x, y, sample_weight)`. Received: {_describe(x)}, "
                    f"{name} of type {type(value).__name__}"
                )
        stream = _stream_batches(x, steps)
    stream = _take(stream, steps)
    replicas = replicas_of(model)
    return stream if replicas.processes == 1 else replicas.alike(stream)


def even_batch_size(n: int, batch_size: int) -> int:
    """The batch size that cuts `n` samples into as many batches, as equal as can be.

    A last batch of another size would be compiled once more, and if it is small, its
    own statistics would be poor.

    Args:
        n: Number of samples.
        batch_size: Most samples in a batch.

    Returns:
        `ceil(n / ceil(n / batch_size))`.
    """
    return -(-n // -(-n // batch_size))


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "__array__")


def _array_batches(x: Any, y: Any, sample_weight: Any, size: int) -> Iterator[Batch]:
    data = [
        # A pandas object's own slicing means something else: it becomes an array first.
        keras.tree.map_structure(
            lambda leaf: np.asarray(leaf) if hasattr(leaf, "iloc") else leaf, part
        )
        for part in (x, y, sample_weight)
    ]
    n = n_samples([part for part in data if part is not None])
    size = even_batch_size(n, size)

    def cut(start: int) -> Batch:
        x, y, sample_weight = (
            None
            if part is None
            else keras.tree.map_structure(
                lambda leaf: _to_numpy(leaf[start : start + size]), part
            )
            for part in data
        )
        return x, y, sample_weight

    return (cut(start) for start in range(0, n, size))


def _stream_batches(x: Any, steps: int | None) -> Iterator[Batch]:
    if _has_base(x, "DatasetV2", "tensorflow.python"):
        # -1 is `tf.data.INFINITE_CARDINALITY`.
        _check_ends(x, int(x.cardinality()) == -1, steps)
        stream = iter(x)
    elif isinstance(x, keras.utils.PyDataset):
        n_batches = x.num_batches
        _check_ends(x, n_batches is None, steps)
        # Not `range(steps)`: asking for a batch beyond the end is undefined.
        last = steps if n_batches is None else n_batches
        stream = (x[i] for i in range(last or 0))
    elif _has_base(x, "DataLoader", "torch.utils.data"):
        stream = iter(x)
    elif isinstance(x, Iterator):
        _check_ends(x, True, steps)
        stream = x
    else:
        raise ValueError(
            f"`x` must be {_KINDS}. Convert lists of numbers with `np.asarray`. "
            f"Received: {_describe(x)}"
        )
    return (_unpack(item) for item in stream)


def _check_ends(x: Any, endless: bool, steps: int | None) -> None:
    if endless and steps is None:
        raise ValueError(
            "This stream may never end: pass `steps`, the number of batches that make "
            f"one pass over the data. Received: {_describe(x)}, steps=None"
        )


def _unpack(item: Any) -> Batch:
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(item)
    parts = [part for part in (x, y, sample_weight) if part is not None]
    n_samples(parts)
    x, y, sample_weight = (
        None if part is None else keras.tree.map_structure(_to_numpy, part)
        for part in (x, y, sample_weight)
    )
    return x, y, sample_weight


def _take(stream: Iterator[Batch], steps: int | None) -> Iterator[Batch]:
    n_taken = 0
    # Never asks for more than `steps`: a generator keeps what it was not asked for.
    while steps is None or n_taken < steps:
        try:
            batch = next(stream)
        except StopIteration:
            break
        n_taken += 1
        yield batch
    if n_taken == 0:
        raise ValueError(
            "The data are empty: the stream ended before its first batch. A generator "
            "that was read before must be created again."
        )
    if steps is not None and n_taken < steps:
        raise ValueError(
            f"The data ended after {n_taken} batches. Pass fewer `steps`, or a stream "
            f"that lasts. Received: steps={steps}"
        )


def _to_numpy(leaf: Any) -> np.ndarray:
    if _has_base(leaf, "Tensor", "torch"):
        leaf = leaf.detach().cpu()
        if str(leaf.dtype) == "torch.bfloat16":
            leaf = leaf.float()  # NumPy has no such dtype.
    array = np.asarray(leaf)
    # PyTorch warns about memory that it may not write to.
    return array if array.flags.writeable else array.copy()


def _has_base(x: Any, name: str, module: str) -> bool:
    return any(
        base.__name__ == name and base.__module__.startswith(module)
        for base in type(x).__mro__
    )


def _check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"`{name}` must be an integer. Received: {name}={value!r}")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}")


def _describe(x: Any) -> str:
    types = sorted({type(leaf).__name__ for leaf in keras.tree.flatten(x)})
    text = f"x of type {type(x).__name__}"
    return text if types == [type(x).__name__] else f"{text} with leaves {types}"


def _shorten(shapes: list[tuple[int, ...]]) -> str:
    shown = ", ".join(str(shape) for shape in shapes[:6])
    return f"[{shown}, ...]" if len(shapes) > 6 else f"[{shown}]"
