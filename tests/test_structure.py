"""The common model structure: where it holds, and what is named where it does not."""

import json

import keras
import numpy as np
import pytest
from keras import ops
from small import digits, mlp

import keras_dalign as kd
from keras_dalign.diagnostics.precision import float64_context, in_float64
from keras_dalign.diagnostics.structure import check_structure

L = keras.layers


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def graph(end, units=3):
    """A model whose end is made by `end(inputs, hidden)`."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    hidden = L.Dense(units, "tanh", name="hidden", bias_initializer="ones")(inputs)
    return keras.Model(inputs, end(inputs, hidden))


def dense(**arguments):
    return L.Dense(3, name="end", bias_initializer="ones", **arguments)


def brute_force(model, x, variables, step=1e-5):
    """`||f - J theta|| / ||f||` by one central difference along theta itself."""
    copy = in_float64(model)
    places = {id(v): i for i, v in enumerate(model.weights)}
    twins = [copy.weights[places[id(v)]] for v in variables]
    values = [np.array(ops.convert_to_numpy(v)) for v in twins]

    def outputs(factor):
        with float64_context():
            for twin, value in zip(twins, values, strict=True):
                twin.assign(factor * value)
            tensor = ops.convert_to_tensor(x.astype("float64"))
            return np.asarray(ops.convert_to_numpy(copy(tensor, training=False)))

    derivative = (outputs(1 + step) - outputs(1 - step)) / (2 * step)
    f = outputs(1.0)
    scale = max(np.linalg.norm(f), np.linalg.norm(derivative))
    return np.linalg.norm(f - derivative) / scale


HOLDS = {
    "dense": lambda x, h: dense()(h),
    "no bias": lambda x, h: L.Dense(2, use_bias=False)(h),
    "one output": lambda x, h: L.Dense(1)(h),
    "reshaped": lambda x, h: L.Flatten()(L.Reshape((3, 1))(dense()(h))),
    "averaged": lambda x, h: L.GlobalAveragePooling1D()(
        L.Reshape((3, 2))(L.Dense(6)(h))
    ),
    "two branches": lambda x, h: L.Add()([dense()(h), L.Dense(3)(x)]),
    "normalised": lambda x, h: L.LayerNormalization()(dense()(h)),
    "relu": lambda x, h: L.Dense(20, "relu")(h),
}


@pytest.mark.parametrize("case", HOLDS)
def test_models_that_end_linearly_have_it(case):
    model, x = graph(HOLDS[case]), normal(6, 5)
    report = check_structure(model, x, batch_size=4)
    assert report.holds
    assert report.error < 1e-14
    assert report.causes == ()
    assert report.degree == pytest.approx(1)
    assert report.dtype == "float64"
    assert (report.n, report.units) == (6, model.output_shape[1])
    assert report.linear == (case != "relu")
    assert ("not linear in theta" in str(report)) == (case == "relu")
    variables = [v for v in model.weights if v.path in report.parameters]
    assert report.n_parameters == sum(int(np.prod(v.shape)) for v in variables)
    assert brute_force(model, x, variables) < 1e-9


def tied(x, h):
    layer = L.Dense(3, name="twice", use_bias=False)
    return layer(layer(h))


def tied_with_bias(x, h):
    layer = dense()
    return layer(L.Activation("tanh")(layer(h)))


class Product(L.Layer):
    """Its kernel acts twice within one call."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]), name="kernel")

    def call(self, x):
        return ops.matmul(ops.matmul(x, self.kernel), self.kernel)


BROKEN = {
    "softmax": (lambda x, h: dense(activation="softmax")(h), "probabilities", "end"),
    "softmax layer": (lambda x, h: L.Softmax()(dense()(h)), "probabilities", "softm"),
    "softmax op": (lambda x, h: ops.softmax(dense()(h)), "probabilities", "Softmax"),
    "softmax of zeros": (
        lambda x, h: L.Dense(4, "softmax", kernel_initializer="zeros")(h),
        "probabilities",
        "softmax in",
    ),
    "log-softmax": (
        lambda x, h: dense(activation="log_softmax")(h),
        "probabilities",
        "logarithms",
    ),
    "sigmoid": (
        lambda x, h: L.Dense(1, "sigmoid", name="end")(h),
        "probabilities",
        "sigmoid in 'end'",
    ),
    "tanh": (
        lambda x, h: dense(activation="tanh")(h),
        "nonlinearity",
        "tanh in 'end'",
    ),
    "tanh of zeros": (
        lambda x, h: L.Dense(3, "tanh", kernel_initializer="zeros")(h),
        "nonlinearity",
        "tanh",
    ),
    "square behind": (
        lambda x, h: ops.square(dense()(h)) + L.Dense(3)(h),
        "nonlinearity",
        "Square",
    ),
    "tied": (tied, "degree", "'twice' is called 2 times"),
    "tied with bias": (tied_with_bias, "degree", "'end' is called 2 times"),
    "kernel twice": (lambda x, h: Product()(h), "degree", "power of 2"),
    "residual": (
        lambda x, h: L.Add()([dense()(h), h]),
        "constant",
        "around the last layer, from 'hidden'",
    ),
    "shifted": (lambda x, h: dense()(h) + 1.0, "constant", "same for every sample"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_it_is_named(case):
    end, kind, text = BROKEN[case]
    model, x = graph(end), normal(6, 5)
    report = check_structure(model, x)
    assert not report.holds
    assert [cause.kind for cause in report.causes] == [kind]
    assert text in report.causes[0].what
    assert "does not hold" in str(report)
    assert text in str(report)
    assert report.causes[0].change in str(report)
    variables = [v for v in model.weights if v.path in report.parameters]
    if not case.endswith("zeros"):
        # At the model's own weights; the report takes the worse of two points.
        assert report.error >= brute_force(model, x, variables) * (1 - 1e-6) > 1e-4


def test_degree_of_tied_weights():
    x = normal(6, 5)
    assert check_structure(graph(tied), x).degree == pytest.approx(2)
    assert check_structure(graph(tied), x).error == pytest.approx(0.5)
    assert check_structure(graph(BROKEN["tanh"][0]), x).degree is None
    layers = [L.Dense(4, "relu", use_bias=False) for _ in range(3)]
    deep = keras.Sequential([keras.Input((5,)), *layers])
    report = check_structure(deep, x, parameters="all")
    assert report.degree == pytest.approx(3)
    (cause,) = report.causes
    assert cause.kind == "degree"
    assert "several layers" in cause.what
    assert "parameters='last'" in cause.change


def test_parameters_that_are_left_out_are_named():
    model, x = graph(HOLDS["dense"]), normal(6, 5)
    end = model.get_layer("end")
    report = check_structure(model, x, parameters=[end.kernel])
    (cause,) = report.causes
    assert cause.kind == "constant"
    assert "end/bias" in cause.what
    assert "Add them" in cause.change
    # The missing part is the bias, and nothing else.
    f = model.predict(x, verbose=0)
    bias = np.broadcast_to(end.get_weights()[1], f.shape)
    assert report.error >= np.linalg.norm(bias) / np.linalg.norm(f) * (1 - 1e-5)
    assert check_structure(model, x, parameters=[end.kernel, end.bias]).holds


def test_parameters_of_inner_layers_are_named():
    model, x = graph(HOLDS["dense"]), normal(6, 5)
    for parameters in ("all", model.get_layer("hidden").weights):
        (cause,) = check_structure(model, x, parameters=parameters).causes
        assert cause.kind == "inner parameters"
        assert "hidden/kernel" in cause.what
        assert "'end'" in cause.what


@pytest.mark.parametrize("gates", ["random", "learned"])
def test_heads_have_it_once_they_exploit(gates):
    x, _ = digits(8)
    model = kd.align(mlp(), n_samples=8, gates=gates, seed=0)
    report = check_structure(model, x)
    assert report.holds == (gates == "random")
    if gates == "learned":
        (cause,) = report.causes
        assert cause.kind == "nonlinearity"
        assert "which still explores" in cause.what
    model.start_exploiting()
    rng = np.random.default_rng(0)
    model.head.q.assign(rng.normal(size=model.head.q.shape))
    report = check_structure(model, x)
    assert report.holds
    assert report.linear
    assert report.parameters == (model.head.q.path, model.head.bias.path)
    if gates == "random":
        f = model.predict(x, verbose=0)
        kernel, bias = model.head.dense.get_weights()
        linear = model.trunk.predict(x, verbose=0) @ kernel + bias
        ratio = np.linalg.norm(linear) / np.linalg.norm(f)
        assert report.offset == pytest.approx(ratio, rel=1e-4)
        assert "less a frozen linear part" in str(report)
        # Given as a list they are ordinary parameters: nothing is subtracted.
        listed = check_structure(model, x, parameters=model.head.exploited_variables)
        assert not listed.holds
        assert listed.causes[0].kind == "constant"
    else:
        assert report.offset == 0


class Subclassed(keras.Model):
    """No graph, and a weight of its own behind the last layer."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift
        self.hidden = L.Dense(4, "tanh")
        self.last = L.Dense(3)

    def call(self, x):
        if isinstance(x, keras.KerasTensor):
            raise TypeError("not to be traced")
        return self.last(self.hidden(x)) + self.shift

    def get_config(self):
        return {"shift": self.shift}


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_models_without_a_graph_are_told_by_numbers(shift):
    model, x = Subclassed(shift), normal(6, 5)
    model(x)
    with pytest.raises(ValueError, match="Pass the variables instead"):
        check_structure(model, x)
    report = check_structure(model, x, parameters=model.last.weights)
    assert report.holds == (shift == 0)
    assert [cause.kind for cause in report.causes] == ["constant"] * (shift != 0)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_is_judged_in_float64(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = graph(HOLDS["dense"])
    finally:
        keras.config.set_dtype_policy("float32")
    report = check_structure(model, normal(6, 5))
    assert report.holds
    assert report.error < 1e-14
    assert report.dtype == "float64"


class Stubborn(Subclassed):
    def call(self, x):
        return self.last(self.hidden(x)) + self.shift

    def get_config(self):
        raise NotImplementedError("no config")


def test_own_precision_is_told_and_has_a_tolerance_of_its_own():
    model, x = Stubborn(), normal(6, 5)
    model(x)
    report = check_structure(model, x)
    assert report.holds
    assert report.dtype == "float32"
    assert report.tolerance == 1e-4
    assert "in float32" in str(report)
    with pytest.raises(ValueError, match="what float32 resolves"):
        check_structure(model, x, tolerance=1e-9)


def test_one_sample_and_streams():
    model, x = graph(HOLDS["dense"]), normal(7, 5)
    assert check_structure(model, x[:1]).holds
    stream = [(x[:4], np.zeros(4)), (x[4:], np.zeros(3))]

    class Stream(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return stream[index]

    report = check_structure(graph(BROKEN["residual"][0]), Stream())
    assert report.n == 7
    assert report.causes[0].kind == "constant"


def test_bad_input_is_an_error():
    model, x = graph(HOLDS["dense"]), normal(6, 5)
    for tolerance in (1e-17, 0.0, -1.0, 1.0, np.nan):
        with pytest.raises(ValueError, match="`tolerance` must be"):
            check_structure(model, x, tolerance=tolerance)
    with pytest.raises(ValueError, match="not finite"):
        check_structure(model, x * np.inf)
    with pytest.raises(ValueError, match="no alignment head"):
        check_structure(model, x, parameters="head")


def test_the_report_as_text_and_data():
    model, x = graph(BROKEN["softmax"][0]), normal(6, 5)
    before = model.get_weights()
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    report = check_structure(model, x)
    for value, weight in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(value, weight)
    assert [len(layer._inbound_nodes) for layer in model.layers] == nodes
    data = json.loads(json.dumps(report.to_dict()))
    assert data["holds"] is False
    assert data["causes"][0]["kind"] == "probabilities"
    assert data["parameters"] == ["end/kernel", "end/bias"]
    html = report._repr_html_()
    assert "broken" in html
    assert "what breaks it (1)" in html
    assert "softmax" in html
    assert "<b>holds</b>" in check_structure(graph(HOLDS["dense"]), x)._repr_html_()
