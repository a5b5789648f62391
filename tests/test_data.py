import types

import keras
import numpy as np
import pytest

from keras_dalign.head import data, streams

X = np.arange(20.0).reshape(10, 2)
Y = np.arange(10)
W = np.linspace(0, 1, 10)


class Numbers(keras.utils.PyDataset):
    """Ten samples in batches of four; remembers what it was asked for."""

    def __init__(self, n_batches=3, **kwargs):
        super().__init__(**kwargs)
        self.n_batches = n_batches
        self.asked = []

    @property
    def num_batches(self):
        return self.n_batches

    def __getitem__(self, index):
        self.asked.append(index)
        cut = slice(4 * index, 4 * index + 4)
        return X[cut], Y[cut]

    def on_epoch_begin(self):
        self.asked.append("begin")

    def on_epoch_end(self):
        self.asked.append("end")


class Frame:
    """What a pandas DataFrame looks like from here; slicing it is by label."""

    iloc = None
    shape = X.shape

    def __array__(self, dtype=None, copy=None):
        return np.array(X, dtype=dtype)

    def __getitem__(self, key):
        raise KeyError(key)


def generator(n=3):
    for start in range(0, 4 * n, 4):
        yield X[start : start + 4], Y[start : start + 4]


def joined(batches):
    parts = list(zip(*batches, strict=True))
    return [
        None
        if part[0] is None
        else keras.tree.map_structure(lambda *leaves: np.concatenate(leaves), *part)
        for part in parts
    ]


@pytest.mark.parametrize(
    ("n", "most", "sizes"),
    [
        (10, 4, [4, 4, 2]),
        (10, 5, [5, 5]),
        (10, 9, [5, 5]),
        (10, 10, [10]),
        (10, 99, [10]),
        (7, 6, [4, 3]),
        (1, 1, [1]),
    ],
)
def test_arrays_are_cut_evenly(n, most, sizes):
    batches = list(data.batches(X[:n], batch_size=most))
    assert [len(x) for x, _, _ in batches] == sizes


def test_arrays_come_in_order_with_a_ragged_last_batch():
    batches = list(data.batches(X, Y, W, batch_size=4))
    assert [len(x) for x, _, _ in batches] == [4, 4, 2]
    for got, expected in zip(joined(batches), (X, Y, W), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype


def test_missing_parts_are_none():
    assert all(y is None and w is None for _, y, w in data.batches(X))
    assert all(y is not None and w is None for _, y, w in data.batches(X, Y))


def test_nested_arrays_keep_their_structure():
    x = {"a": X, "b": [X[:, 0], (X * 2,)]}
    (batch, _, _) = next(data.batches(x, batch_size=3))
    keras.tree.assert_same_structure(batch, x)
    np.testing.assert_array_equal(batch["b"][1][0], 2 * X[:3])
    assert data.is_arrays(x)
    assert data.n_samples(x) == 10


def test_steps_cut_arrays_short():
    batches = list(data.batches(X, Y, batch_size=4, steps=2))
    np.testing.assert_array_equal(joined(batches)[1], Y[:8])


def test_backend_tensors_are_arrays():
    tensor = keras.ops.convert_to_tensor(X.astype("float32"))
    assert data.is_arrays(tensor)
    assert data.n_samples(tensor) == 10
    batches = list(data.batches(tensor, batch_size=4))
    assert all(type(x) is np.ndarray for x, _, _ in batches)
    np.testing.assert_array_equal(joined(batches)[0], X)


def test_pandas_like_objects_become_arrays():
    assert data.is_arrays(Frame())
    batches = list(data.batches(Frame(), Y, batch_size=4))
    np.testing.assert_array_equal(joined(batches)[0], X)


def test_batches_are_writable():
    x = X.copy()
    x.flags.writeable = False
    (batch, _, _) = next(data.batches(x))
    assert batch.flags.writeable
    batch[:] = 0
    assert x[1, 1] == 3


def test_a_pydataset_is_read_by_index_without_its_machinery():
    stream = Numbers(workers=4, use_multiprocessing=True)
    assert not data.is_arrays(stream)
    x, y, w = joined(data.batches(stream))
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    assert w is None
    assert stream.asked == [0, 1, 2]


def test_a_pydataset_with_len_alone():
    class Lengthy(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return X[4 * index : 4 * index + 4]

    np.testing.assert_array_equal(joined(data.batches(Lengthy()))[0], X)


def test_an_infinite_pydataset_needs_steps():
    with pytest.raises(ValueError, match=r"pass `steps`.*Numbers, steps=None"):
        data.batches(Numbers(n_batches=None))
    stream = Numbers(n_batches=None)
    assert len(list(data.batches(stream, steps=2))) == 2
    assert stream.asked == [0, 1]


def test_a_generator_gives_steps_batches_and_keeps_the_rest():
    stream = generator()
    assert not data.is_arrays(stream)
    x, y, _ = joined(data.batches(stream, steps=2))
    np.testing.assert_array_equal(x, X[:8])
    np.testing.assert_array_equal(y, Y[:8])
    np.testing.assert_array_equal(next(stream)[0], X[8:])


def test_a_generator_needs_steps():
    with pytest.raises(ValueError, match=r"pass `steps`.*generator, steps=None"):
        data.batches(generator())


def test_a_batch_may_be_inputs_alone_or_have_weights():
    x, y, w = next(data.batches((item for item in [X]), steps=1))
    np.testing.assert_array_equal(x, X)
    assert y is None
    assert w is None
    _, _, w = next(data.batches((item for item in [(X, Y, W)]), steps=1))
    np.testing.assert_array_equal(w, W)


@pytest.mark.parametrize(
    "stream", [lambda: (generator(2), 3), lambda: (Numbers(), 4), lambda: (X, 2)]
)
def test_data_that_end_before_steps(stream):
    x, steps = stream()
    with pytest.raises(ValueError, match=rf"ended after {steps - 1} batches.*={steps}"):
        list(data.batches(x, steps=steps))


@pytest.mark.parametrize("stream", [lambda: generator(0), lambda: Numbers(0)])
def test_an_empty_stream(stream):
    x = stream()
    steps = 1 if isinstance(x, types.GeneratorType) else None
    with pytest.raises(ValueError, match=r"`x` is empty.*before its first batch"):
        list(data.batches(x, steps=steps))


def test_tf_data():
    tf = pytest.importorskip("tensorflow")
    stream = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    assert not data.is_arrays(stream)
    batches = list(data.batches(stream))
    assert all(type(x) is np.ndarray for x, _, _ in batches)
    x, y, _ = joined(batches)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    assert len(list(data.batches(stream.repeat(), steps=7))) == 7
    with pytest.raises(ValueError, match="pass `steps`"):
        data.batches(stream.repeat())
    with pytest.raises(ValueError, match="ended after 3 batches"):
        list(data.batches(stream, steps=4))


def test_torch_data_loader_and_tensors():
    torch = pytest.importorskip("torch")
    x = torch.tensor(X, requires_grad=True)
    assert data.is_arrays(x)
    np.testing.assert_array_equal(joined(data.batches(x, batch_size=4))[0], X)
    half = torch.tensor(X, dtype=torch.bfloat16)
    np.testing.assert_array_equal(joined(data.batches(half))[0], X)
    dataset = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    assert not data.is_arrays(loader)
    got_x, got_y, _ = joined(data.batches(loader))
    np.testing.assert_array_equal(got_x, X)
    np.testing.assert_array_equal(got_y, Y)


@pytest.mark.parametrize("x", [[1.0, 2.0], "data", 3, [], None, object()])
def test_what_is_no_data(x):
    assert not data.is_arrays(x)
    with pytest.raises(ValueError, match=r"must be NumPy arrays.*Received: x of type"):
        data.batches(x)
    with pytest.raises(ValueError, match=r"made of arrays.*Received: x of type"):
        data.n_samples(x)


def test_arrays_that_disagree():
    with pytest.raises(ValueError, match=r"same number.*\(10, 2\), \(9,\)"):
        data.n_samples([X, Y[:9]])
    with pytest.raises(ValueError, match="same number"):
        data.batches(X, Y[:9])
    with pytest.raises(ValueError, match="same number"):
        data.batches(X, Y, W[:9])
    stream = (item for item in [(X, Y[:9])])
    with pytest.raises(ValueError, match="same number"):
        list(data.batches(stream, steps=1))


def test_labels_in_a_list():
    with pytest.raises(ValueError, match=r"`y`.*convert lists.*=\[\(\), .*, \.\.\."):
        data.batches(X, list(Y))


def test_empty_arrays():
    with pytest.raises(ValueError, match=r"`x` is empty.*\(0, 2\)"):
        data.n_samples(X[:0])
    with pytest.raises(ValueError, match="`x` is empty"):
        data.batches(X[:0], Y[:0])


def test_an_array_without_axes():
    with pytest.raises(ValueError, match="first axis"):
        data.n_samples(np.array(1.0))


@pytest.mark.parametrize("name", ["y", "sample_weight"])
def test_a_stream_brings_its_own(name):
    with pytest.raises(
        ValueError, match=rf"`{name}` cannot.*include it in the batches"
    ):
        data.batches(Numbers(), **{name: Y})


@pytest.mark.parametrize("name", ["batch_size", "steps"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3"])
def test_bad_counts(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be.*Received: {name}="):
        data.batches(X, **{name: value})


def test_a_batch_with_too_many_parts():
    stream = (item for item in [(X, Y, W, W)])
    with pytest.raises(ValueError, match=r"\(x, y, sample_weight\)"):
        list(data.batches(stream, steps=1))


# What a model takes ------------------------------------------------------------------


def graph(*shapes, **options):
    """A model of inputs with these shapes, samples aside."""
    tensors = [
        keras.Input(shape, name=f"part{i}", **options) for i, shape in enumerate(shapes)
    ]
    flat = [keras.layers.Flatten()(tensor) for tensor in tensors]
    joined = keras.layers.Concatenate()(flat) if len(flat) > 1 else flat[0]
    outputs = keras.layers.Dense(2)(joined)
    return keras.Model(tensors if len(tensors) > 1 else tensors[0], outputs)


@pytest.mark.parametrize(
    ("shape", "given"),
    [
        ((4,), (5, 4)),
        ((4,), (5, 4, 1)),
        ((1,), (5,)),
        ((3, 4, 1), (5, 3, 4)),
        ((3, 4, 1), (5, 3, 4, 1)),
    ],
)
def test_shapes_that_keras_takes(shape, given):
    model, x = graph(shape), np.ones(given, "float32")
    data.check_inputs(model, x)
    assert model(x).shape == (5, 2)


@pytest.mark.parametrize(
    ("shape", "given"),
    [((4,), (5,)), ((4,), (5, 3)), ((4,), (5, 2, 2)), ((3, 4, 1), (5, 4, 3))],
)
def test_shapes_that_keras_does_not_take(shape, given):
    model, x = graph(shape), np.ones(given, "float32")
    with pytest.raises(ValueError, match=r"`x` of `held_out`.*'part0'.*Received: x of"):
        data.check_inputs(model, x, "held_out")


def test_lengths_that_are_not_fixed():
    inputs = keras.Input((None, 3))
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling1D()(inputs))
    model = keras.Model(inputs, outputs)
    for length in (2, 7):
        data.check_inputs(model, np.ones((5, length, 3)))
    with pytest.raises(ValueError, match=r"\(n, any, 3\)"):
        data.check_inputs(model, np.ones((5, 2, 4)))


def test_several_inputs():
    model = graph((2,), (3,))
    first, second = np.ones((5, 2)), np.ones((5, 3))
    data.check_inputs(model, [first, second])
    data.check_inputs(model, {"part1": second, "part0": first, "more": first})
    for x in ([second, first], {"part0": second, "part1": first}):
        with pytest.raises(ValueError, match="'part0'"):
            data.check_inputs(model, x)
    with pytest.raises(ValueError, match=r"'part0', 'part1'.*1 arrays for 2 inputs"):
        data.check_inputs(model, first)


def test_kinds_of_numbers():
    model = graph((2,))
    for dtype in ("float16", "float64", "int8", "uint8", "bool"):
        data.check_inputs(model, np.ones((5, 2), dtype))
    for dtype in ("complex64", "complex128"):
        with pytest.raises(ValueError, match=r"must be real.*imaginary"):
            data.check_inputs(model, np.ones((5, 2), dtype))
    for dtype in (str, object, "datetime64[s]"):
        with pytest.raises(ValueError, match="must be numbers"):
            data.check_inputs(model, np.ones((5, 2)).astype(dtype))
    tensor = keras.ops.ones((5, 2))
    data.check_inputs(model, tensor)


class Anything(keras.Model):
    def call(self, x):
        return x


def test_of_a_model_that_is_no_graph_nothing_is_known():
    model = Anything()
    model(np.ones((2, 3), "float32"))
    data.check_inputs(model, np.ones((5, 7)))
    with pytest.raises(ValueError, match="must be real"):
        data.check_inputs(model, np.ones((5, 7), "complex64"))


def test_batches_of_a_stream_must_fit_the_model():
    model = graph((2,))
    stream = (item for item in [(X, Y), (X[:, :1], Y)])
    batches = data.batches(stream, steps=2, model=model)
    next(batches)
    with pytest.raises(ValueError, match=r"`x`.*'part0'.*\(10, 1\)"):
        next(batches)


def test_targets_of_another_kind_do_not_matter_to_who_ignores_them():
    stream = (item for item in [(X, Y.astype(str))])
    ((x, _, _),) = data.batches(stream, steps=1)
    np.testing.assert_array_equal(x, X)


def test_a_stream_is_known_to_have_a_batch():
    started = streams.nonempty(iter([1, 2, 3]))
    assert isinstance(started, types.GeneratorType)
    assert list(started) == [1, 2, 3]
    numbers = Numbers()
    assert streams.nonempty(numbers) is numbers
    with pytest.raises(ValueError, match=r"`y` is empty.*created again.*y of type"):
        streams.nonempty(iter([]), "`y`")
