"""One table of what users pass by mistake to the public functions, and the errors.

`CASES` lists the calls; `World` holds the models and data that they share, so that next
to nothing is compiled. A call that is wrong in one argument must raise the documented
exception, which names the argument, shows what was received and says what to do, and
leave the models as they were.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from small import cross_entropy, digits, weights

import keras_dalign as kd

N = 40
NAN, INF = float("nan"), float("inf")


def network(**last):
    """Batch norm, a feature layer, ten outputs."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((64,), name="pixels"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(12, "relu", name="features"),
            keras.layers.Dense(10, name="logits", **last),
        ]
    )


class World:
    """What the calls share.

    Attributes:
        x, y: Digits, `(40, 64)` and `(40,)`.
        base: A plain model, compiled.
        exploring: An aligned model, compiled with `DAlign`.
        exploiting: An aligned model whose gates are set, compiled with SGD.
        quadratic: A quadratic head with one output.
    """

    def __init__(self):
        self.x, self.y = digits(N)
        self.base = network()
        self.base.compile("sgd", cross_entropy())
        self.exploring = kd.align(network(), n_samples=N, seed=0)
        self.exploring.compile(kd.DAlign("sgd"), cross_entropy())
        self.exploiting = kd.align(network(), n_samples=N, seed=0)
        self.exploiting.start_exploiting(width=3)
        self.exploiting.compile("sgd", cross_entropy())
        self.quadratic = keras.Sequential(
            [keras.Input((64,)), kd.QuadraticHead(1, width=4, seed=0)]
        )
        self._forecast = None

    def weights(self):
        """All weights of all models."""
        models = (self.base, self.exploring, self.exploiting, self.quadratic)
        return [array for model in models for array in weights(model)]

    @property
    def forecast(self):
        if self._forecast is None:
            self._forecast = kd.forecast(self.exploiting, self.x, self.y)
        return self._forecast


def stream(world):
    """Batches that never end."""
    return iter(lambda: (world.x, world.y), None)


def fit(world, **given):
    """`fit` of the exploring model, unless another is given."""
    model = given.pop("model", world.exploring)
    arguments = {"x": world.x, "y": world.y, "epochs": 2, "verbose": 0, **given}
    return model.fit(**arguments)


# How each function is called where all is right: `CALLS[name](world, **changes)`.
CALLS: dict[str, Callable[..., Any]] = {
    "align": lambda w, **a: kd.align(**{"model": network(), "n_samples": N, **a}),
    "AlignmentHead": lambda w, **a: kd.AlignmentHead(
        **{"units": 3, "n_samples": N, **a}
    ),
    "AlignedModel": lambda w, **a: kd.AlignedModel(
        **{"trunk": w.exploring.trunk, "head": w.exploring.head, **a}
    ),
    "start_exploiting": lambda w, **a: w.exploring.start_exploiting(**a),
    "set_width": lambda w, **a: w.exploiting.set_width(**a),
    "set_weights": lambda w, **a: w.exploiting.set_weights(**a),
    "fit": fit,
    "DAlign": lambda w, **a: kd.DAlign(**{"inner_optimizer": "sgd", **a}),
    "solve": lambda w, **a: kd.solve(
        **{"model": w.exploring, "x": w.x, "y": w.y, "verbose": 0, **a}
    ),
    "certify": lambda w, **a: kd.certify(
        **{"model": w.exploiting, "x": w.x, "y": w.y, **a}
    ),
    "forecast": lambda w, **a: kd.forecast(
        **{"model": w.exploiting, "x": w.x, "y": w.y, **a}
    ),
    "bound": lambda w, **a: w.forecast.bound(**a),
    "steps_to": lambda w, **a: w.forecast.steps_to(**a),
    "steps_to_gap": lambda w, **a: w.forecast.steps_to_gap(**a),
    "check_alignment": lambda w, **a: kd.check_alignment(
        **{"model": w.base, "x": w.x, "y": w.y, **a}
    ),
    "check_structure": lambda w, **a: kd.check_structure(
        **{"model": w.base, "x": w.x, **a}
    ),
    "jacobian": lambda w, **a: kd.jacobian(**{"model": w.base, "x": w.x, **a}),
    "tangent_kernel": lambda w, **a: kd.tangent_kernel(
        **{"model": w.base, "x": w.x, **a}
    ),
    "parametrize": lambda w, **a: kd.parametrize(
        **{"model": network(), "base": network(), **a}
    ),
    "QuadraticHead": lambda w, **a: kd.QuadraticHead(**{"units": 1, "width": 4, **a}),
    "solve_quadratic": lambda w, **a: kd.solve_quadratic(
        **{"model": w.quadratic, "x": w.x, "y": w.x[:, :1], "loss": "mse", **a}
    ),
    "reestimate_batch_norm": lambda w, **a: kd.reestimate_batch_norm(
        **{"model": w.base, "x": w.x, **a}
    ),
    "AlignmentMonitor": lambda w, **a: kd.AlignmentMonitor(**{"x": w.x, "y": w.y, **a}),
    "resnet": lambda w, **a: kd.models.resnet(
        **{"input_shape": (8, 8, 1), "classes": 10, "depth": 8, **a}
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call that is wrong in one argument.

    Attributes:
        function: Name in `CALLS`.
        what: What is wrong, for the name of the test.
        change: The arguments that are not as they should be, made of the world.
        words: Regular expression that the message matches: the name of the argument,
            what was received, and what to do.
        exception: The documented exception.
    """

    function: str
    what: str
    change: Callable[[World], dict[str, Any]]
    words: str
    exception: type[Exception] = ValueError

    def __str__(self):
        return f"{self.function}: {self.what}"

    def call(self, world):
        return CALLS[self.function](world, **self.change(world))


def values(functions, argument, words, *bad):
    """Cases of one argument with plain values, which the message repeats."""
    for function in functions.split():
        for value in bad:
            yield Case(
                function,
                f"{argument}={_short(value)}",
                lambda _, value=value: {argument: value},
                words,
            )


def data(functions, argument, what, make, words):
    """Cases of one argument that is made of the world's data."""
    for function in functions.split():
        yield Case(
            function, f"{argument}, {what}", lambda w: {argument: make(w)}, words
        )


def _short(value):
    shape = getattr(value, "shape", None)
    return f"array{shape}" if shape else repr(value)[:30]


ARRAY = np.zeros((30, 30))
READERS = (
    "fit solve certify forecast check_alignment check_structure reestimate_batch_norm "
    "AlignmentMonitor"
)
LABELLED = "fit solve certify forecast check_alignment AlignmentMonitor"
WEIGHTED = "fit solve certify forecast AlignmentMonitor"
# All but the monitor, which does not know the model yet.
WITH_MODEL = " ".join(READERS.split()[:-1])
LABELLED_WITH_MODEL = " ".join(LABELLED.split()[:-1])

INPUTS = [
    *data(
        READERS,
        "x",
        "a list",
        lambda w: w.x.tolist(),
        r"`x` must be.*(np\.asarray|arrays\. ).*Received: x of type list",
    ),
    *data(READERS, "x", "None", lambda w: None, r"`x` must be.*Received.*NoneType"),
    *data(READERS, "x", "a word", lambda w: "x", r"`x` must be.*Received.*str"),
    *data(READERS, "x", "empty", lambda w: w.x[:0], r"`x` is empty.*\(0, 64\)"),
    *data(
        READERS, "x", "NaN", lambda w: w.x * NAN, r"(?=.*`x`).*Received.*(NaN|infinit)"
    ),
    *data(READERS, "x", "words", lambda w: w.x.astype(str), r"`x`.*encode.*Received"),
    *data(READERS, "x", "a number", lambda w: np.float32(1), r"`x`.*samples.*Received"),
    *data(
        WITH_MODEL,
        "x",
        "one-dimensional",
        lambda w: w.x[:, 0],
        r"`x`.*'pixels'.*\(n, 64\).*Received: x of shape \(40,\)",
    ),
    *data(
        WITH_MODEL,
        "x",
        "too narrow",
        lambda w: w.x[:, 1:],
        r"`x`.*'pixels'.*\(n, 64\).*Received: x of shape \(40, 63\)",
    ),
    *data(
        WITH_MODEL,
        "x",
        "complex",
        lambda w: w.x + 1j,
        r"`x` must be real.*Received: ndarray of shape \(40, 64\).*complex",
    ),
    *data(
        WITH_MODEL,
        "x",
        "twice",
        lambda w: [w.x, w.x],
        r"`x`.*one array for each input.*'pixels'.*Received: 2 arrays",
    ),
]

LABELS = [
    *data(
        LABELLED,
        "y",
        "a list",
        lambda w: w.y.tolist(),
        r"`y` must be.*np\.asarray.*Received: y of type list",
    ),
    *data(LABELLED, "y", "None", lambda w: None, r"(?i)targets.*`y`.*Received: y=None"),
    *data(LABELLED, "y", "words", lambda w: w.y.astype(str), r"`y`.*encode.*Received"),
    *data(LABELLED, "y", "objects", lambda w: w.y.astype(object), r"`y`.*a dtype"),
    *data(LABELLED, "y", "complex", lambda w: w.y + 0j, r"`y` must be real.*complex"),
    *data(
        LABELLED,
        "y",
        "too short",
        lambda w: w.y[:-1],
        r"`x` and `y`.*same number.*Received.*\(40, 64\), \(39,\)",
    ),
    *data(LABELLED, "y", "empty", lambda w: w.y[:0], r"`y` is empty.*Received.*\(0,\)"),
    *data(
        LABELLED_WITH_MODEL,
        "y",
        "beyond the outputs",
        lambda w: w.y + 5,
        r"`y` must be integers from 0 to 9.*Received: label 1\d",
    ),
    *data(
        LABELLED_WITH_MODEL,
        "y",
        "halves",
        lambda w: w.y / 2,
        r"`y` must be integers from 0 to 9.*Received: label \d\.5",
    ),
    *data(
        LABELLED_WITH_MODEL,
        "y",
        "one-hot",
        lambda w: np.eye(10)[w.y],
        r"`y`.*CategoricalCrossentropy.*Received.*\(40, 10\)",
    ),
    *data(
        LABELLED_WITH_MODEL,
        "y",
        "NaN",
        lambda w: w.y * NAN,
        r"`y` must be finite.*remove or repair.*Received: nan in row 0",
    ),
]


def _weights(make):
    return lambda w: make(np.ones(N))


WEIGHTS = [
    *data(
        WEIGHTED,
        "sample_weight",
        "a list",
        _weights(np.ndarray.tolist),
        r"`sample_weight` must be.*np\.asarray.*Received: sample_weight of type list",
    ),
    *data(
        WEIGHTED,
        "sample_weight",
        "negative",
        _weights(np.negative),
        r"`sample_weight` must be finite and at least 0.*Received: -1",
    ),
    *data(
        WEIGHTED,
        "sample_weight",
        "NaN",
        _weights(lambda v: v * NAN),
        r"`sample_weight` must be finite.*Received: nan",
    ),
    *data(
        WEIGHTED,
        "sample_weight",
        "too long",
        _weights(lambda v: np.append(v, 1.0)),
        r"`x` and `sample_weight`.*same number.*Received.*\(41,\)",
    ),
    *data(
        WEIGHTED,
        "sample_weight",
        "two columns",
        _weights(lambda v: np.stack([v, v], axis=1)),
        r"`sample_weight` must hold one weight per sample.*\(40, 2\)",
    ),
    *data(
        WEIGHTED,
        "sample_weight",
        "zeros",
        _weights(np.zeros_like),
        r"All of `sample_weight` are 0.*Received: 40 samples",
    ),
    *data(
        WEIGHTED,
        "sample_weight",
        "words",
        _weights(lambda v: v.astype(str)),
        r"`sample_weight` must be numbers.*Received",
    ),
]

MODELS = [
    *values(
        f"align {READERS.replace('fit', '').replace('AlignmentMonitor', '')}",
        "model",
        r"`model` must be a (built )?keras\.Model.*Received: model=",
        None,
        "model",
        3,
        ARRAY,
        keras.layers.Dense(3),
    ),
    *data(
        "solve forecast",
        "model",
        "without a head",
        lambda w: w.base,
        r"`model` with an alignment head.*Received.*keras_dalign\.align"
        r"|`model` with an alignment head.*keras_dalign\.align.*Received",
    ),
    *data(
        "forecast",
        "model",
        "exploring",
        lambda w: w.exploring,
        r"`model` whose gates are set.*keras_dalign\.solve.*Received.*'exploring'",
    ),
    Case(
        "certify",
        "l2 of an exploring model",
        lambda w: {"model": w.exploring, "l2": 1.0},
        r"`model` whose gates are set.*Received.*'exploring'",
    ),
    *data(
        "reestimate_batch_norm",
        "model",
        "exploiting",
        lambda w: w.exploiting,
        r"frozen since.*Received.*Re-estimate before the switch",
    ),
    *data(
        "align",
        "model",
        "aligned already",
        lambda w: w.exploring,
        r"has an alignment head already.*Received.*base model",
    ),
    *data(
        "align",
        "model",
        "with an aligned one at its end",
        lambda w: keras.Sequential([keras.Input((64,)), w.exploring]),
        r"`model` ends in an alignment head already.*Received.*base model",
    ),
    *data(
        "align",
        "model",
        "unbuilt",
        lambda w: keras.Sequential([keras.layers.Dense(3)]),
        r"not built.*Received: model.*model\.build",
    ),
    *data(
        "check_structure check_alignment",
        "parameters",
        "of another model",
        lambda w: [w.exploring.head.dense.kernel],
        r"`parameters` must be variables of the model.*Received",
    ),
]

LOSSES = [
    *values(
        "solve certify forecast check_alignment",
        "loss",
        r"(?i)loss.*Received: (loss=)?",
        "nothing",
        3,
        "mae",
        "hinge",
        keras.losses.SparseCategoricalCrossentropy(),
    ),
]

HEAD = [
    *values(
        "align AlignmentHead",
        "n_samples",
        r"`n_samples` must be a positive int.*Received: n_samples=",
        0,
        -1,
        2.5,
        True,
        "3",
        ARRAY,
    ),
    *values(
        "align AlignmentHead",
        "gates",
        r"`gates` must be one of.*Received: gates=",
        "soft",
        None,
        3,
        ARRAY,
    ),
    *values(
        "align AlignmentHead",
        "width",
        r"`width` must be a positive int.*Received: width=",
        0,
        -2,
        1.5,
        "4",
        True,
    ),
    *values(
        "align AlignmentHead",
        "slope",
        r"`slope` must be a positive number.*Received: slope=",
        0,
        -1.0,
        NAN,
        INF,
        "steep",
        None,
    ),
    *values(
        "align AlignmentHead",
        "share_gates",
        r"`share_gates` must be True or False.*Received: share_gates=",
        "yes",
        None,
        1,
    ),
    *values(
        "align AlignmentHead",
        "seed",
        r"`seed` must be a non-negative int.*Received: seed=",
        -1,
        1.5,
        "seed",
    ),
    *values(
        "align",
        "layer",
        r"`layer`.*Received: layer=",
        "nothing",
        3,
        ARRAY,
        keras.layers.ReLU(),
    ),
    *values("align", "features", r"`features`.*Received: features=", "no", 3, ARRAY),
    *values("align", "copy", r"`copy` must be True or False.*Received: copy=", 1, "no"),
    *values(
        "AlignmentHead",
        "units",
        r"`units` must be a positive int.*Received: units=",
        0,
        None,
        "3",
        1.5,
    ),
    *values(
        "AlignmentHead",
        "dense",
        r"`dense` must.*Received.*dense",
        3,
        ARRAY,
        keras.layers.Dense(4),
        keras.layers.ReLU(),
    ),
    Case(
        "AlignmentHead",
        "neither width nor n_samples",
        lambda _: {"n_samples": None},
        r"Received: n_samples=None, width=None.*Pass `n_samples=len\(x\)`",
    ),
    *values(
        "AlignedModel",
        "trunk",
        r"`trunk` must be a built keras\.Model.*Received: trunk=.*Call it once",
        None,
        ARRAY,
        keras.Sequential([keras.layers.Dense(3)]),
    ),
    *values(
        "AlignedModel",
        "head",
        r"`head` must be an AlignmentHead.*Received: head=",
        None,
        ARRAY,
        keras.layers.Dense(3),
    ),
    *values(
        "start_exploiting",
        "noise",
        r"`noise` must be a non-negative number.*Received: noise=",
        -1,
        NAN,
        "loud",
    ),
    *values(
        "start_exploiting set_width",
        "width",
        r"`width` must be a positive int.*Received: width=",
        0,
        1.5,
        "wide",
    ),
    Case(
        "start_exploiting",
        "width=0 with units for the output layer",
        lambda _: {"width": 0, "replace_dense": True},
        r"`width` must be a positive int.*Received: width=0",
    ),
    *data(
        "set_weights",
        "weights",
        "too few",
        lambda w: w.exploiting.get_weights()[:-1],
        r"weights are not those of.*Received",
    ),
]

OPTIMIZER = [
    *values(
        "DAlign",
        "inner_optimizer",
        r"`inner_optimizer` must be a Keras optimizer.*Received: inner_optimizer=",
        None,
        3,
        "nothing",
        ARRAY,
    ),
    *values(
        "DAlign",
        "exploit_optimizer",
        r"`exploit_optimizer` must be a Keras optimizer.*Received: exploit_optimizer=",
        3,
        "nothing",
        ARRAY,
    ),
    *data(
        "DAlign",
        "inner_optimizer",
        "DAlign",
        lambda _: kd.DAlign("sgd"),
        r"DAlign cannot wrap DAlign.*Received: inner_optimizer=",
    ),
    *values(
        "DAlign",
        "explore",
        r"`explore` must be.*Received: explore=",
        -1,
        1.5,
        0.0,
        NAN,
        True,
        "half",
        ARRAY,
    ),
    *values(
        "DAlign", "noise", r"`noise` must be.*Received: noise=", -1, NAN, INF, "loud"
    ),
    *values(
        "DAlign",
        "cache_features",
        r"`cache_features` must be True, False.*Received: cache_features=",
        "yes",
        2,
        None,
        ARRAY,
    ),
    *values(
        "DAlign",
        "average_weights",
        r"`average_weights` must be.*Received: average_weights=",
        1,
        -0.1,
        NAN,
        "half",
    ),
    *values(
        "DAlign",
        "solve_options",
        r"`solve_options` must be a dict.*Received: solve_options=",
        [],
        "fast",
        3,
    ),
    *values(
        "DAlign",
        "solve_options",
        r"`\w+` must.*Received: \w+=|Options of the solver are.*Received: \['step'\]",
        {"step": 1},
        {"tol": 0},
        {"tol": "small"},
        {"method": "newton"},
        {"l2": -1},
        {"max_iterations": 0},
        {"judge": "jury"},
        {"center": "middle"},
    ),
    *values(
        "DAlign",
        "learning_rate",
        r"`learning_rate`: set it on `inner_optimizer`.*Received: learning_rate=",
        0.1,
    ),
]

SOLVER = [
    *values("solve", "tol", r"`tol` must be.*Received: tol=", 0, -1, NAN, "x", None),
    *values(
        "solve", "method", r"`method` must be one of.*Received: method=", "x", None, 3
    ),
    *values("solve", "l2", r"`l2` must be.*Received: l2=", -1, NAN, "x", None, ARRAY),
    *values(
        "solve check_alignment",
        "max_iterations",
        r"`max_iterations` must be a positive int.*Received: max_iterations=",
        0,
        1.5,
        "x",
    ),
    *values("solve", "center", r"`center` must be one of.*Received: center=", "x", 3),
    *values(
        "solve",
        "reestimate_batch_norm",
        r"`reestimate_batch_norm` must be True or False.*Received",
        "yes",
        None,
    ),
    *values(
        "fit solve certify forecast check_alignment check_structure "
        "reestimate_batch_norm",
        "batch_size",
        r"`batch_size` must be a positive int.*Received: batch_size=",
        0,
        -1,
        2.5,
        "x",
    ),
    *values(
        "solve certify forecast check_structure reestimate_batch_norm",
        "steps",
        r"`steps` must be a positive int.*Received: steps=",
        0,
        -1,
        2.5,
        "x",
    ),
    *data(
        "solve check_alignment check_structure",
        "x",
        "a generator",
        stream,
        r"`x`.*(several times|a generator).*Received.*(callable_iterator|type)",
    ),
    Case(
        "certify",
        "a generator without steps",
        lambda w: {"x": stream(w), "y": None},
        r"`x` may never end: pass `steps`.*Received: x of type",
    ),
    Case(
        "certify",
        "y beside a stream",
        lambda w: {"x": stream(w), "steps": 1},
        r"`y` cannot be passed beside a stream.*Received",
    ),
]

CHECKS = [
    *values("certify", "l2", r"`l2` must be positive.*Received: l2=", 0, -1, NAN, "x"),
    *values(
        "certify",
        "gradient_bound",
        r"`gradient_bound` must be True or False.*Received: gradient_bound=",
        "yes",
        1,
        None,
    ),
    *values(
        "certify",
        "parameters",
        r"`parameters`.*pass gradient_bound=True.*Received: parameters=",
        "all",
    ),
    *values(
        "check_alignment check_structure",
        "parameters",
        r"`parameters` must be one of.*Received: parameters=",
        "none",
        3,
        ARRAY,
    ),
    *values(
        "forecast",
        "step_size",
        r"`step_size` must be.*Received: step_size=",
        0,
        -1,
        NAN,
        "x",
    ),
    *values("forecast", "exact", r"`exact` must be True or.*Received: exact=", "yes"),
    *values(
        "forecast",
        "iterations",
        r"`iterations` must be a positive int.*Received: iterations=",
        0,
        1.5,
        "x",
    ),
    *values("bound", "steps", r"`steps` must be.*Received", -1, NAN, "x", None),
    *values("steps_to", "loss", r"`loss` must be.*Received: loss=", NAN, INF, "x"),
    *values("steps_to_gap", "gap", r"`gap` must be.*Received: gap=", 0, -1, NAN, "x"),
    *values(
        "check_alignment", "method", r"`method` must be one of.*Received", "x", None
    ),
    *values(
        "check_alignment check_structure",
        "tolerance",
        r"`tolerance` must be.*Received: tolerance=",
        0,
        1,
        NAN,
        "x",
    ),
    *values(
        "check_alignment",
        "rank_tolerance",
        r"`rank_tolerance` must be.*Received: rank_tolerance=",
        0,
        2,
        "x",
    ),
    *values(
        "check_alignment",
        "max_memory",
        r"`max_memory` must be a positive int.*Received: max_memory=",
        0,
        "x",
    ),
    *values(
        "reestimate_batch_norm",
        "passes",
        r"`passes` must be a positive int.*Received: passes=",
        0,
        1.5,
        "x",
    ),
    *values(
        "AlignmentMonitor",
        "every",
        r"`every` must be a positive int.*Received: every=",
        0,
        "x",
        1.5,
    ),
    *values(
        "AlignmentMonitor",
        "n_samples",
        r"`n_samples` must be a positive int.*Received: n_samples=",
        0,
        "x",
    ),
    *values(
        "AlignmentMonitor",
        "seed",
        r"`seed` must be a non-negative int.*Received: seed=",
        -1,
        "x",
    ),
    *data(
        "AlignmentMonitor",
        "y",
        "two arrays",
        lambda w: [w.y, w.y],
        r"`y` must be one array.*Received: 2 arrays",
    ),
    *data("AlignmentMonitor", "x", "a stream", stream, r"`x` must be.*Received: x of"),
    *values("resnet", "depth", r"`depth` must be.*Received: depth=", 9, 0, "x", None),
    *values("resnet", "classes", r"`classes` must.*Received: classes=", 0, "x"),
    *values("resnet", "width", r"`width` must.*Received: width=", 0, 1.5),
    *values(
        "resnet",
        "input_shape",
        r"`input_shape` must be.*Received: input_shape=",
        (8, 8),
        (8, 8, 0),
        "x",
        None,
    ),
]


def pair(change):
    """Both of `(x, y)`, one of them changed."""
    return lambda w: change(w.x, w.y)


HELD_OUT = [
    *data(
        "fit solve",
        "validation_data",
        "inputs alone",
        pair(lambda x, y: x),
        r"`validation_data` must be `\(x, y\)`.*Received: ndarray of shape",
    ),
    *data(
        "fit solve",
        "validation_data",
        "a tuple of one",
        pair(lambda x, y: (x,)),
        r"`validation_data` must be `\(x, y\)`.*Received: tuple of 1",
    ),
    *data(
        "fit solve",
        "validation_data",
        "lists",
        pair(lambda x, y: (x.tolist(), y.tolist())),
        r"`validation_data` must be.*np\.asarray.*Received: tuple of 2",
    ),
    *data(
        "fit solve",
        "validation_data",
        "labels in a list",
        pair(lambda x, y: (x, y.tolist())),
        r"`y` of `validation_data` must be.*np\.asarray.*Received: y of type list",
    ),
    *data(
        "fit solve",
        "validation_data",
        "a word",
        lambda w: "some",
        r"`validation_data` must be.*Received: validation_data of type str",
    ),
    *data(
        "fit solve",
        "validation_data",
        "too narrow",
        pair(lambda x, y: (x[:, 1:], y)),
        r"`x` of `validation_data`.*\(n, 64\).*Received: x of shape \(40, 63\)",
    ),
    *data(
        "fit solve",
        "validation_data",
        "labels too short",
        pair(lambda x, y: (x, y[1:])),
        r"`y` of `validation_data`.*same number.*Received.*\(39,\)",
    ),
    *data(
        "fit solve",
        "validation_data",
        "labels beyond the outputs",
        pair(lambda x, y: (x, y + 5)),
        r"`y` must be integers from 0 to 9.*Received",
    ),
    *data(
        "fit solve",
        "validation_data",
        "an iterator",
        pair(lambda x, y: iter([(x, y)])),
        r"`validation_data` may never end: pass.*Received: validation_data of type",
    ),
    Case(
        "fit",
        "validation_data, an empty generator",
        lambda w: {"validation_data": (b for b in []), "validation_steps": 1},
        r"`validation_data` is empty.*created again.*Received.*generator",
    ),
    *data(
        "fit",
        "exploit_data",
        "inputs alone",
        pair(lambda x, y: x),
        r"`exploit_data` must be `\(x, y\)`.*Received: ndarray of shape",
    ),
    *data(
        "fit",
        "exploit_data",
        "too narrow",
        pair(lambda x, y: (x[:, 1:], y)),
        r"`x` of `exploit_data`.*\(n, 64\).*Received: x of shape \(40, 63\)",
    ),
    *data(
        "fit",
        "exploit_data",
        "an iterator",
        pair(lambda x, y: iter([(x, y)])),
        r"`exploit_data` may never end: pass data that end.*Received",
    ),
    *data(
        "fit solve",
        "x",
        "more samples than the head is made for",
        lambda w: np.concatenate([w.x, w.x]),
        r"same number.*Received|fewer samples.*Received: 80 samples",
    ),
]

FIT = [
    *values("fit", "epochs", r"`epochs` must be a positive int.*Received", 0, "x", 1.5),
    *values("fit", "initial_epoch", r"`initial_epoch` must be a non-neg.*Rec", -1, "x"),
    *values(
        "fit",
        "validation_split",
        r"`validation_split` must be.*Received: validation_split=",
        1,
        -0.1,
        NAN,
        "x",
    ),
    *values(
        "fit",
        "steps_per_epoch",
        r"`steps_per_epoch` must be a positive int.*Received: steps_per_epoch=",
        0,
        "x",
    ),
    *values(
        "fit",
        "validation_steps",
        r"`validation_steps` must be a positive int.*Received: validation_steps=",
        0,
        "x",
    ),
    *values(
        "fit",
        "class_weight",
        r"`class_weight` must be a dict.*dict\(enumerate.*Received: class_weight=",
        [1.0] * 10,
        np.ones(10),
        "balanced",
        2.0,
    ),
    *values(
        "fit",
        "class_weight",
        r"class_weight.*must be.*Received",
        {0: -1.0},
        {0: NAN},
        {0: "x"},
        {"cat": 1.0},
        {0.5: 1.0},
    ),
    Case(
        "fit",
        "class_weight beside sample_weight",
        lambda w: {"class_weight": {0: 1.0}, "sample_weight": np.ones(N)},
        r"`class_weight` and `sample_weight` cannot be given both.*Received.*Multiply",
    ),
    Case(
        "fit",
        "an iterator that never ends",
        lambda w: {"x": stream(w), "y": None},
        r"`x` may never end: pass `steps_per_epoch`.*Received: x of type",
    ),
    Case(
        "fit",
        "an empty generator",
        lambda w: {"x": (b for b in []), "y": None, "steps_per_epoch": 1},
        r"`x` is empty.*created again.*Received.*generator",
    ),
    Case(
        "fit",
        "y beside a stream",
        lambda w: {"x": stream(w), "steps_per_epoch": 1},
        r"`y` cannot be passed beside a stream.*in the batches.*Received",
    ),
    Case(
        "fit",
        "exploit_data without DAlign",
        lambda w: {"model": w.exploiting, "exploit_data": (w.x, w.y)},
        r"`exploit_data` is for models that are compiled with DAlign.*Received",
    ),
    Case(
        "fit",
        "x in a list without DAlign",
        lambda w: {"model": w.exploiting, "x": w.x.tolist()},
        r"`x` must be.*np\.asarray.*Received: x of type list",
    ),
    Case(
        "fit",
        "y in a list without DAlign",
        lambda w: {"model": w.exploiting, "y": w.y.tolist()},
        r"`y` must be.*np\.asarray.*Received: y of type list",
    ),
    Case(
        "fit",
        "complex x without DAlign",
        lambda w: {"model": w.exploiting, "x": w.x + 1j},
        r"`x` must be real.*Received: ndarray of shape \(40, 64\).*complex",
    ),
    Case(
        "fit",
        "class_weight in a list without DAlign",
        lambda w: {"model": w.exploiting, "class_weight": [1.0] * 10},
        r"`class_weight` must be a dict.*Received: class_weight=",
    ),
]

NEIGHBOURS = [
    *values(
        "jacobian tangent_kernel",
        "parameters",
        r"`parameters` must be one of.*Received: parameters=",
        "none",
    ),
    *data("jacobian tangent_kernel", "x", "empty", lambda w: w.x[:0], r"empty.*Rec"),
    *values("jacobian", "dtype", r"`dtype` must be.*Received: dtype=", "float16"),
    *values(
        "tangent_kernel",
        "weights",
        r"`weights` must be.*Received",
        [1.0],
        [-1.0] * 6,
        [NAN] * 6,
    ),
    *values("parametrize", "kind", r"`kind` must be one of.*Received: kind=", "x", 3),
    *values(
        "parametrize",
        "optimizer",
        r"`optimizer` must be one of.*Received: optimizer=",
        "x",
        None,
    ),
    *values("parametrize", "base", r"`base` must be a built.*Received: base=", None),
    *values(
        "QuadraticHead",
        "units",
        r"`units` must be a positive int.*Received: units=",
        0,
        1.5,
        "x",
    ),
    *values(
        "QuadraticHead",
        "width",
        r"`width` must be a positive int.*Received: width=",
        0,
        None,
    ),
    *values(
        "QuadraticHead",
        "penalty",
        r"`penalty` must be a positive number.*Received: penalty=",
        0.0,
        NAN,
        "x",
    ),
    *values(
        "QuadraticHead",
        "second_derivative",
        r"`second_derivative` must be one of.*Received: second_derivative=",
        "tanh",
    ),
    *values(
        "solve_quadratic", "tol", r"`tol` must be a positive.*Received: tol=", 0, NAN
    ),
    *values(
        "solve_quadratic",
        "max_iterations",
        r"`max_iterations` must be a positive int.*Received: max_iterations=",
        0,
        "x",
    ),
]

CASES = [
    *INPUTS,
    *LABELS,
    *WEIGHTS,
    *MODELS,
    *LOSSES,
    *HEAD,
    *OPTIMIZER,
    *SOLVER,
    *CHECKS,
    *NEIGHBOURS,
    *HELD_OUT,
    *FIT,
]
