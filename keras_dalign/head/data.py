"""Checks the data that `keras.Model.fit` accepts, and reads them as NumPy batches.

Arrays and streams (see `streams`) give batches of the same form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_dalign import compat
from keras_dalign.head.streams import (
    check_stream,
    describe,
    has_base_class,
    items,
    take,
)
from keras_dalign.numerics.arguments import integer, shown
from keras_dalign.numerics.replicas import replicas_of

Batch = tuple[Any, Any | None, Any | None]


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


def n_samples(x: Any, label: str = "`x`") -> int:
    """The number of samples in arrays: the common length of the first axis.

    Args:
        x: An array or a nested structure of arrays, each of shape `(n, ...)`.
        label: What it is called in errors.

    Returns:
        `n`, at least 1.

    Raises:
        ValueError: If `x` is not made of arrays, if a leaf has no first axis, if the
            leaves disagree, or if there are no samples.
    """
    if not is_arrays(x):
        raise ValueError(
            f"{label} must be made of arrays: NumPy arrays, tensors, or nested lists, "
            "tuples or dicts of them. Convert lists of numbers with `np.asarray`. "
            f"Received: {describe(x, label)}"
        )
    shapes = [tuple(leaf.shape) for leaf in keras.tree.flatten(x)]
    if not all(shapes):
        raise ValueError(
            f"{label} must have the samples along the first axis of every array; "
            f"convert lists with `np.asarray`. Received: shapes={_shorten(shapes)}"
        )
    sizes = {int(shape[0]) for shape in shapes}
    if len(sizes) > 1:
        raise ValueError(
            f"All arrays of {label} must hold the same number of samples along their "
            f"first axis. Received: shapes={_shorten(shapes)}"
        )
    (size,) = sizes
    if size == 0:
        raise ValueError(
            f"{label} is empty: at least one sample is needed. Received: "
            f"shapes={_shorten(shapes)}"
        )
    return size


def check_data(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int = 256,
    steps: int | None = None,
    steps_name: str | None = "steps",
    model: keras.Model | None = None,
    name: str = "",
) -> None:
    """Checks data of any kind, without reading a stream.

    Args:
        x: As for `batches`.
        y: As for `batches`.
        sample_weight: As for `batches`.
        batch_size: As for `batches`.
        steps: As for `batches`.
        steps_name: What `steps` is called in errors, or None if there is no such
            argument.
        model: The model that arrays must fit.
        name: As for `batches`.

    Raises:
        ValueError: If the arguments are no data, differ in length, are empty, never
            end, have the wrong dtype or shape, or if a size is no positive int.
    """
    if steps is not None:
        integer(steps_name or "steps", steps)
    if is_arrays(x):
        integer("batch_size", batch_size)
        _check_lengths(x, y, sample_weight, name)
        if model is not None:
            check_inputs(model, x, name)
        for key, part in (("y", y), ("sample_weight", sample_weight)):
            for leaf in [] if part is None else keras.tree.flatten(part):
                _check_dtype(leaf, _label(key, name), "float32")
        return
    check_stream(x, steps, f"`{name or 'x'}`", steps_name)
    for key, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise ValueError(
                f"`{key}` cannot be passed beside a stream: include it in the batches, "
                f"`(x, y, sample_weight)`. Received: {describe(x, '`x`')}, {key} of "
                f"type {type(value).__name__}"
            )


def check_inputs(model: keras.Model, x: Any, name: str = "") -> None:
    """Checks that arrays fit the inputs of a model.

    Keras would fail inside of a compiled function, and would drop the imaginary part of
    complex numbers without a warning.

    Args:
        model: The model. If it is no graph of layers, only complex numbers are refused.
        x: Arrays of shape `(n, ...)`, in a structure that the model takes.
        name: The argument that holds them, if they are no argument themselves.

    Raises:
        ValueError: If they are more or fewer than the model's inputs, differ from them
            in shape, or are no real numbers where the model takes such.
    """
    label = _label("x", name)
    wanted = compat.inputs_of(model)
    leaves = keras.tree.flatten(x)
    if wanted is None:
        for leaf in leaves:
            _check_dtype(leaf, label, "string")
        return
    if isinstance(x, dict) and all(tensor.name in x for tensor in wanted):
        leaves = [x[tensor.name] for tensor in wanted]
    if len(leaves) != len(wanted):
        if isinstance(x, dict):
            return  # Keras picks the entries it needs, and names those missing.
        names = ", ".join(f"'{tensor.name}'" for tensor in wanted)
        raise ValueError(
            f"{label} must hold one array for each input of the model: {names}. "
            f"Received: {len(leaves)} arrays for {len(wanted)} inputs"
        )
    for leaf, tensor in zip(leaves, wanted, strict=True):
        _check_dtype(leaf, label, str(tensor.dtype))
        given, shape = tuple(leaf.shape), tuple(tensor.shape)
        if not _fits(given, shape):
            sizes = ["any" if size is None else str(size) for size in shape[1:]]
            raise ValueError(
                f"{label} must hold samples as the model's input '{tensor.name}' "
                f"takes them, in the shape ({', '.join(['n', *sizes])}). Received: x "
                f"of shape {given}"
            )


def _check_lengths(x: Any, y: Any, sample_weight: Any, name: str) -> None:
    """Refuses parts that are no arrays, empty, or of different lengths."""
    n = n_samples(x, _label("x", name))
    for key, part in (("y", y), ("sample_weight", sample_weight)):
        if part is not None and n_samples(part, _label(key, name)) != n:
            shapes = [tuple(leaf.shape) for leaf in keras.tree.flatten([x, part])]
            raise ValueError(
                f"{_label('x', name)} and {_label(key, name)} must hold the same "
                "number of samples along their first axis. Received: shapes="
                f"{_shorten(shapes)}"
            )


def _fits(given: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    """Whether an array's shape fits a model's input, without the batch axis."""
    # Keras adds a missing last axis of length 1, and drops a superfluous one.
    if len(given) == len(wanted) - 1 and wanted[-1] == 1:
        given = (*given, 1)
    elif len(given) == len(wanted) + 1 and given[-1] == 1:
        given = given[:-1]
    return len(given) == len(wanted) and all(
        size is None or size == length
        for length, size in zip(given[1:], wanted[1:], strict=True)
    )


def _check_dtype(leaf: Any, label: str, wanted: str) -> None:
    """Refuses an array that cannot be cast to a dtype without loss of meaning."""
    # The columns of a pandas table may differ in dtype.
    dtype = np.asarray(leaf).dtype if hasattr(leaf, "iloc") else leaf.dtype
    name = str(getattr(dtype, "name", dtype))
    if "complex" in name and not wanted.startswith("complex"):
        raise ValueError(
            f"{label} must be real: the imaginary part would be lost. Received: "
            f"{shown(leaf)} and dtype {dtype}. Pass real and imaginary parts side by "
            "side."
        )
    numeric = ("bool", "int", "float", "complex")
    if wanted != "string" and not any(kind in name for kind in numeric):
        raise ValueError(
            f"{label} must be numbers: encode names as integers first, and give "
            f"objects a dtype. Received: {shown(leaf)} and dtype {dtype}"
        )


def batches(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int = 256,
    steps: int | None = None,
    model: keras.Model | None = None,
    name: str = "",
) -> Iterator[Batch]:
    """One pass over the data, in order, in batches of NumPy arrays.

    Nothing is shuffled. A `PyDataset` is read by index in this process, without its
    workers and without `on_epoch_begin` or `on_epoch_end`, so reading does not change
    the user's object.

    Args:
        x: Inputs, or a stream of batches `x`, `(x,)`, `(x, y)` or
            `(x, y, sample_weight)`, as in `keras.Model.fit`.
        y: Targets, for arrays. A stream contains its targets.
        sample_weight: Sample weights, for arrays. A stream contains its weights.
        batch_size: Most samples in a batch, for arrays; see `even_batch_size`. A
            stream is batched already.
        steps: Number of batches to read. `None` reads everything, which a generator, an
            infinite `tf.data.Dataset` and an infinite `PyDataset` do not allow.
        model: The model that the batches are for, which they must fit. If several
            processes share it, each batch is compared with theirs.
        name: The argument that holds the data, if `x` is no argument itself.

    Returns:
        An iterator over `(x, y, sample_weight)`; the structures are those of the
        arguments, the leaves are writable NumPy arrays of shape `(batch, ...)`.

    Raises:
        ValueError: At once, if the arguments are not data, differ in length, are
            empty, or never end. While iterating, if the stream is empty, ends before
            `steps`, holds something that is no batch of arrays, or differs from what
            the other processes read.
    """
    check_data(
        x, y, sample_weight, batch_size=batch_size, steps=steps, model=model, name=name
    )
    if is_arrays(x):
        stream = _array_batches(x, y, sample_weight, batch_size)
    else:
        stream = (_unpack(item, model, name) for item in items(x, steps))
    stream = take(stream, steps, f"`{name or 'x'}`")
    replicas = replicas_of(model)
    return stream if replicas.processes == 1 else replicas.alike(stream)


def even_batch_size(n: int, batch_size: int) -> int:
    """The batch size that gives the same number of batches, of nearly equal size.

    Keras compiles once more for a last batch of another size, and the batch statistics
    of a small one are poor.

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
        # Slicing a pandas object selects by label, so it is converted first.
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


def _unpack(item: Any, model: keras.Model | None, name: str) -> Batch:
    """One item of a stream as a checked batch of NumPy arrays."""
    if isinstance(item, (list, tuple)) and not 1 <= len(item) <= 3:
        raise ValueError(
            f"The batches of `{name or 'x'}` must be `x`, `(x,)`, `(x, y)` or "
            f"`(x, y, sample_weight)`. Received: a {type(item).__name__} of "
            f"{len(item)} parts"
        )
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(item)
    _check_lengths(x, y, sample_weight, name)
    if model is not None:
        check_inputs(model, x, name)
    x, y, sample_weight = (
        None if part is None else keras.tree.map_structure(_to_numpy, part)
        for part in (x, y, sample_weight)
    )
    return x, y, sample_weight


def _to_numpy(leaf: Any) -> np.ndarray:
    if has_base_class(leaf, "Tensor", "torch"):
        leaf = leaf.detach().cpu()
        if str(leaf.dtype) == "torch.bfloat16":
            leaf = leaf.float()  # NumPy has no such dtype.
    array = np.asarray(leaf)
    # PyTorch warns about memory that it may not write to.
    return array if array.flags.writeable else array.copy()


def _label(part: str, name: str) -> str:
    """The name of a part of the data in errors."""
    return f"`{part}` of `{name}`" if name else f"`{part}`"


def _shorten(shapes: list[tuple[int, ...]]) -> str:
    shown = ", ".join(str(shape) for shape in shapes[:6])
    return f"[{shown}, ...]" if len(shapes) > 6 else f"[{shown}]"
