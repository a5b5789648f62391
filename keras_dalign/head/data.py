"""One view of all the data that `keras.Model.fit` accepts: batches of NumPy arrays.

Arrays, `tf.data.Dataset`, `keras.utils.PyDataset`, torch `DataLoader` and generators
come out alike. TensorFlow and PyTorch objects are recognised by name, never imported:
the core depends on Keras and NumPy alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_dalign import compat
from keras_dalign.numerics.arguments import integer, shown
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
            f"Received: {_describe(x, label)}"
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
    """Checks data in any form, as far as they show without reading a stream.

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
        ValueError: If the arguments are no data, disagree in length, are empty, never
            end, are of a kind or shape that does not fit, or a size is no positive int.
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
                _check_kind(leaf, _label(key, name), "float32")
        return
    check_stream(x, steps, f"`{name or 'x'}`", steps_name)
    for key, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise ValueError(
                f"`{key}` cannot be passed beside a stream: include it in the batches, "
                f"`(x, y, sample_weight)`. Received: {_describe(x, '`x`')}, {key} of "
                f"type {type(value).__name__}"
            )


def check_inputs(model: keras.Model, x: Any, name: str = "") -> None:
    """Checks that arrays are what a model takes, as far as its graph tells.

    Without it, Keras fails from deep inside a compiled function, and takes the real
    part of complex numbers in silence.

    Args:
        model: The model. Of one that is no graph nothing is known.
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
            _check_kind(leaf, label, "string")
        return
    if isinstance(x, dict) and all(tensor.name in x for tensor in wanted):
        leaves = [x[tensor.name] for tensor in wanted]
    if len(leaves) != len(wanted):
        if isinstance(x, dict):
            return  # Keras picks from a dict what it needs, and says what is missing.
        names = ", ".join(f"'{tensor.name}'" for tensor in wanted)
        raise ValueError(
            f"{label} must hold one array for each input of the model: {names}. "
            f"Received: {len(leaves)} arrays for {len(wanted)} inputs"
        )
    for leaf, tensor in zip(leaves, wanted, strict=True):
        _check_kind(leaf, label, str(tensor.dtype))
        given, shape = tuple(leaf.shape), tuple(tensor.shape)
        if not _fits(given, shape):
            sizes = ["any" if size is None else str(size) for size in shape[1:]]
            raise ValueError(
                f"{label} must hold samples as the model's input '{tensor.name}' "
                f"takes them, in the shape ({', '.join(['n', *sizes])}). Received: x "
                f"of shape {given}"
            )


def _check_lengths(x: Any, y: Any, sample_weight: Any, name: str) -> None:
    """Refuses parts that are no arrays, empty, or of different numbers of samples."""
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
    """Whether Keras takes an array for an input, the batch axis aside."""
    # Keras adds a last axis of length 1 where it is missing, and drops one too many.
    if len(given) == len(wanted) - 1 and wanted[-1] == 1:
        given = (*given, 1)
    elif len(given) == len(wanted) + 1 and given[-1] == 1:
        given = given[:-1]
    return len(given) == len(wanted) and all(
        size is None or size == length
        for length, size in zip(given[1:], wanted[1:], strict=True)
    )


def _check_kind(leaf: Any, label: str, taken: str) -> None:
    """Refuses what a dtype, that of labels or of a model's input, cannot take."""
    # Columns of a pandas table have a dtype each.
    dtype = np.asarray(leaf).dtype if hasattr(leaf, "iloc") else leaf.dtype
    name = str(getattr(dtype, "name", dtype))
    if "complex" in name and not taken.startswith("complex"):
        raise ValueError(
            f"{label} must be real: the imaginary part would be lost. Received: "
            f"{shown(leaf)} and dtype {dtype}. Pass real and imaginary parts side by "
            "side."
        )
    numeric = ("bool", "int", "float", "complex")
    if taken != "string" and not any(kind in name for kind in numeric):
        raise ValueError(
            f"{label} must be numbers: encode names as integers first, and give "
            f"objects a dtype. Received: {shown(leaf)} and dtype {dtype}"
        )


def check_stream(
    x: Any,
    steps: int | None = None,
    label: str = "`x`",
    steps_name: str | None = "steps",
) -> None:
    """Checks that something is a stream of batches, and ends; it is not read.

    Args:
        x: A `tf.data.Dataset`, a `keras.utils.PyDataset`, a torch `DataLoader` or an
            iterator.
        steps: Number of batches to read, or None for all.
        label: What it is called in errors.
        steps_name: What `steps` is called in errors, or None if there is no such
            argument.

    Raises:
        ValueError: If it is none of these, or may never end.
    """
    if _has_base(x, "DatasetV2", "tensorflow.python"):
        # -1 is `tf.data.INFINITE_CARDINALITY`.
        endless = int(x.cardinality()) == -1
    elif isinstance(x, keras.utils.PyDataset):
        endless = x.num_batches is None
    elif _has_base(x, "DataLoader", "torch.utils.data"):
        endless = False
    elif isinstance(x, Iterator):
        endless = True
    else:
        raise ValueError(
            f"{label} must be {_KINDS}. Convert lists of numbers with `np.asarray`. "
            f"Received: {_describe(x, label)}"
        )
    if endless and steps is None:
        way_out = (
            "pass data that end: arrays, a `tf.data.Dataset`, a `PyDataset` or a "
            "`DataLoader`"
            if steps_name is None
            else f"pass `{steps_name}`, the number of batches that make one pass over "
            "the data"
        )
        received = "" if steps_name is None else f", {steps_name}=None"
        raise ValueError(
            f"{label} may never end: {way_out}. Received: {_describe(x, label)}"
            f"{received}"
        )


def begun(x: Any, label: str = "`x`") -> Any:
    """A stream that has at least one batch.

    Args:
        x: A stream.
        label: What it is called in errors.

    Returns:
        The stream; for an iterator, of which the first batch was read to see, a
        generator of the same batches.

    Raises:
        ValueError: If an iterator has no batch.
    """
    if not isinstance(x, Iterator):
        return x
    for first in x:
        return (batch for batch in itertools.chain([first], x))
    raise ValueError(
        f"{label} is empty: the stream has no batch. One that was read before must be "
        f"created again. Received: {_describe(x, label)}"
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
        model: The model that the batches are for, which they must fit. If several
            processes share it, each batch is compared with theirs.
        name: The argument that holds the data, if `x` is no argument itself.

    Returns:
        An iterator over `(x, y, sample_weight)`; the structures are those of the
        arguments, the leaves are writable NumPy arrays of shape `(batch, ...)`.

    Raises:
        ValueError: At once, if the arguments are not data, disagree in length, are
            empty, or never end; while iterating, if the stream is empty, ends before
            `steps`, holds something that is no batch of arrays, or is not what the
            other processes read.
    """
    check_data(
        x, y, sample_weight, batch_size=batch_size, steps=steps, model=model, name=name
    )
    if is_arrays(x):
        stream = _array_batches(x, y, sample_weight, batch_size)
    else:
        stream = _stream_batches(x, steps, model, name)
    stream = _take(stream, steps, f"`{name or 'x'}`")
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


def _stream_batches(
    x: Any, steps: int | None, model: keras.Model | None, name: str
) -> Iterator[Batch]:
    stream: Iterator[Any]
    if isinstance(x, keras.utils.PyDataset):
        # Not `range(steps)`: asking for a batch beyond the end is undefined.
        last = steps if x.num_batches is None else x.num_batches
        stream = (x[i] for i in range(last or 0))
    else:
        stream = iter(x)
    return (_unpack(item, model, name) for item in stream)


def _unpack(item: Any, model: keras.Model | None, name: str) -> Batch:
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


def _take(stream: Iterator[Batch], steps: int | None, label: str) -> Iterator[Batch]:
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
            f"{label} is empty: the stream ended before its first batch. A generator "
            "that was read before must be created again. Received: no batch"
        )
    if steps is not None and n_taken < steps:
        raise ValueError(
            f"{label} ended after {n_taken} batches. Pass fewer `steps`, or a stream "
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


def _describe(x: Any, label: str) -> str:
    types = sorted({type(leaf).__name__ for leaf in keras.tree.flatten(x)})
    text = f"{label.split('`')[1]} of type {type(x).__name__}"
    return text if types == [type(x).__name__] else f"{text} with leaves {types}"


def _label(part: str, name: str) -> str:
    """What a part of the data is called in errors."""
    return f"`{part}` of `{name}`" if name else f"`{part}`"


def _shorten(shapes: list[tuple[int, ...]]) -> str:
    shown = ", ".join(str(shape) for shape in shapes[:6])
    return f"[{shown}, ...]" if len(shapes) > 6 else f"[{shown}]"
