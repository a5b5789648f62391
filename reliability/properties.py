"""What must hold for any model and any data, on random ones.

Models of seven families are built once per variant, and see many data sets with weights
drawn anew, so that most examples are cheap; what concerns arrays alone needs no model.
Data have 1 to 60 samples with repeated inputs, conflicting labels, constant features
and sample weights, 1 to 6 outputs, and any loss of the package.

`tests/test_properties.py` takes some examples of each property. The full measurement
takes 10,000, in parts if it must: it goes on from its file of counts. An example that
fails is shrunk and reported; it belongs into `EXAMPLES`, so that the tests repeat it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import keras
import numpy as np
from hypothesis import strategies as st
from keras import layers

import keras_dalign as kd
from benchmarks.common import Target, table
from keras_dalign.diagnostics.gradient_bound import gradient_bound
from keras_dalign.diagnostics.structured_jacobian import HeadJacobian
from keras_dalign.numerics.gram import explicit_features
from keras_dalign.numerics.keras_losses import convex_loss
from keras_dalign.numerics.union import union_rank
from keras_dalign.solving.minimum import minimize
from keras_dalign.solving.problem import ConvexProblem
from pipelines import files
from reliability.report import ROOT, Report

if TYPE_CHECKING:
    from keras_dalign.numerics.losses import ConvexLoss

Array = np.ndarray[Any, Any]

COUNTS = ROOT / ".hypothesis" / "reliability-properties.json"
PIXELS = 16
FAMILIES = (
    "dense",
    "convolutional",
    "residual",
    "batch norm",
    "dropout",
    "attention",
    "recurrent",
)
ARRAYS = ("arrays",)
REDUCTIONS = ("sum_over_batch_size", "mean_with_sample_weight", "sum")

# What the order of float32 sums may change in a loss, relative to its size.
FLOAT32 = 2e-5
# The same in float64.
FLOAT64 = 1e-11


@dataclasses.dataclass(frozen=True)
class Example:
    """A model and its data, or data alone.

    Attributes:
        family: One of `FAMILIES`, or `"arrays"`.
        variant: Which model of the family: depth, widths, activation, outputs.
        seed: Of the weights and the data.
        n: Number of samples.
        repeats: Share of samples that repeat the input of another.
        constant: Number of input features that are constant.
        loss: A key of `LOSSES`.
        reduction: How the samples' losses become one.
        weighted: Whether samples have weights, zeros among them.
        scale: Size of the weights of the model.
        l2: Weight of the L2 term where something is minimised.
    """

    family: str
    variant: int
    seed: int
    n: int
    repeats: float
    constant: int
    loss: str
    reduction: str
    weighted: bool
    scale: float
    l2: float


_CROSS_ENTROPY = keras.losses.CategoricalCrossentropy
LOSSES: dict[str, Callable[[str], Any]] = {
    "sparse": lambda how: keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction=how
    ),
    "smoothed": lambda how: _CROSS_ENTROPY(
        from_logits=True, label_smoothing=0.1, reduction=how
    ),
    "soft": lambda how: _CROSS_ENTROPY(from_logits=True, reduction=how),
    "binary": lambda how: keras.losses.BinaryCrossentropy(
        from_logits=True, reduction=how
    ),
    "binary smoothed": lambda how: keras.losses.BinaryCrossentropy(
        from_logits=True, label_smoothing=0.2, reduction=how
    ),
    "squared": lambda how: keras.losses.MeanSquaredError(reduction=how),
}


def examples(family: str, variants: range = range(2)) -> st.SearchStrategy[Example]:
    """Random examples of a family.

    Args:
        family: One of `FAMILIES`, or `"arrays"`.
        variants: The variants to draw from.

    Returns:
        A strategy.
    """
    return st.builds(
        Example,
        family=st.just(family),
        variant=st.sampled_from(variants),
        seed=st.integers(0, 2**32 - 1),
        n=st.integers(1, 60),
        repeats=st.sampled_from([0.0, 0.3, 0.9]),
        constant=st.sampled_from([0, 1, PIXELS - 1]),
        loss=st.sampled_from(list(LOSSES)),
        reduction=st.sampled_from(REDUCTIONS),
        weighted=st.booleans(),
        scale=st.sampled_from([0.3, 1.0, 3.0]),
        l2=st.sampled_from([0.0, 1e-3, 0.1]),
    )


# Models and data ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A model twice with the same weights, and the second one aligned.

    Attributes:
        base: The model.
        twin: The same, whose variables the aligned model shares.
        aligned: Of the twin.
        restore: Takes the aligned model back to exploration.
        states: Values of all variables when they were made, dropout's among them.
    """

    base: keras.Model
    twin: keras.Model
    aligned: kd.AlignedModel
    restore: Callable[[], None]
    states: list[tuple[Any, Any, Array]]

    def start(self, example: Example) -> None:
        """Draws weights, and sets everything else as it was in the beginning."""
        self.restore()
        rng = np.random.default_rng(example.seed)
        for mine, other, value in self.states:
            drawn = value
            if value.dtype.kind == "f":
                fan = math.prod(value.shape[:-1]) or 1
                drawn = np.asarray(rng.standard_normal(value.shape))
                drawn = drawn * (example.scale / math.sqrt(fan))
                if "variance" in mine.path:
                    drawn = 0.1 + np.abs(drawn)
            mine.assign(drawn)
            other.assign(drawn)


def outputs_of(variant: int) -> int:
    """Number of outputs of a variant, 1 to 6."""
    return (5 * variant + 2) % 6 + 1


def build(family: str, variant: int) -> keras.Model:
    """A small model on 16 features.

    Args:
        family: One of `FAMILIES`.
        variant: Decides about depth, widths, activation and number of outputs.

    Returns:
        The model, which outputs logits.
    """
    rng = np.random.default_rng([variant, FAMILIES.index(family)])
    width, depth = int(rng.integers(2, 8)), int(rng.integers(1, 3))
    activation = str(rng.choice(["relu", "tanh", "gelu", "linear"]))
    h = inputs = keras.Input((PIXELS,))
    if family == "convolutional":
        h = layers.Reshape((4, 4, 1))(h)
        for _ in range(depth):
            h = layers.Conv2D(width, 2, activation=activation)(h)
        h = layers.GlobalAveragePooling2D()(h) if variant % 2 else layers.Flatten()(h)
    elif family == "attention":
        h = layers.Reshape((4, 4))(h)
        h = h + layers.MultiHeadAttention(2, width)(h, h)
        h = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(h))
    elif family == "recurrent":
        kinds = (layers.LSTM, layers.GRU, layers.SimpleRNN)
        h = layers.Reshape((4, 4))(h)
        h = kinds[variant % 3](width)(h)
    else:
        for _ in range(depth):
            before = h
            h = layers.Dense(PIXELS if family == "residual" else width)(h)
            if family == "batch norm":
                h = layers.BatchNormalization()(h)
            h = layers.Activation(activation)(h)
            if family == "dropout":
                h = layers.Dropout(0.3)(h)
            if family == "residual":
                h = h + before
    return keras.Model(inputs, layers.Dense(outputs_of(variant), name="logits")(h))


@functools.lru_cache(maxsize=24)
def pair_of(family: str, variant: int) -> Pair:
    """The models of a variant, built once."""
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(variant)
        models.append(build(family, variant))
    base, twin = models
    states = [
        (mine, other, keras.ops.convert_to_numpy(mine).copy())
        for mine, other in zip(base.variables, twin.variables, strict=True)
    ]
    with _quiet():
        aligned = kd.align(twin, n_samples=61, seed=variant)
    # One by one: that takes less time than to compile for every number of samples.
    base.compile(loss="mse", run_eagerly=True)
    aligned.compile(loss="mse", run_eagerly=True)
    return Pair(base, twin, aligned, aligned.snapshot(), states)


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """What `fit` and `certify` take.

    Attributes:
        x: Inputs, `(n, 16)`, float32.
        y: Labels in the form that the loss takes.
        weight: Sample weights, or None.
        loss: The Keras loss.
        groups: Number of each sample's input.
    """

    x: Array
    y: Array
    weight: Array | None
    loss: Any
    groups: Array

    def take(self, rows: Array) -> dict[str, Any]:
        """Some of the samples, in any order, as arguments."""
        weight = None if self.weight is None else self.weight[rows]
        return {"x": self.x[rows], "y": self.y[rows], "sample_weight": weight}

    def everything(self) -> dict[str, Any]:
        """All of the samples, as arguments."""
        return self.take(np.arange(len(self.x)))


def samples(example: Example, outputs: int) -> Samples:
    """The data of an example.

    Args:
        example: The example.
        outputs: Number of outputs of the model.

    Returns:
        The data; a softmax over one output becomes a sigmoid.
    """
    rng = np.random.default_rng([example.seed, 1])
    n, name = example.n, example.loss
    if outputs == 1 and name in {"sparse", "smoothed", "soft"}:
        name = "binary"
    x = rng.standard_normal((n, PIXELS)).astype(np.float32)
    x[:, : example.constant] = x[0, : example.constant]
    groups = np.arange(n)
    repeats = int(example.repeats * (n - 1))
    if repeats:
        groups[n - repeats :] = rng.integers(0, n - repeats, repeats)
    y: Array = rng.integers(0, 2, (n, outputs)).astype(np.float32)
    if name == "sparse":
        y = rng.integers(0, outputs, n)
    elif name == "smoothed":
        y = np.eye(outputs, dtype=np.float32)[rng.integers(0, outputs, n)]
    elif name == "soft":
        y = rng.dirichlet(np.full(outputs, 0.3), n).astype(np.float32)
    elif name == "squared":
        y = rng.standard_normal((n, outputs)).astype(np.float32)
    weight = None
    if example.weighted:
        weight = (3.0 * rng.random(n)).astype(np.float32)
        weight[1 : 1 + n // 4] = 0.0
    loss = LOSSES[name](example.reduction)
    return Samples(x[groups], y, weight, loss, groups)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings about too narrow heads, which random data deserve."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _values(variables: list[Any]) -> list[Array]:
    return [keras.ops.convert_to_numpy(variable).copy() for variable in variables]


# Properties of models ----------------------------------------------------------------


def aligning_keeps_the_function(example: Example) -> None:
    """The aligned model puts out what the base model does, bit for bit."""
    pair = pair_of(example.family, example.variant)
    pair.start(example)
    x = samples(example, outputs_of(example.variant)).x
    np.testing.assert_array_equal(
        pair.base.predict_on_batch(x), pair.aligned.predict_on_batch(x)
    )


def exploration_is_the_bases_training(example: Example) -> None:
    """The same weights and losses after some steps, bit for bit."""
    pair = pair_of(example.family, example.variant)
    pair.start(example)
    data = samples(example, outputs_of(example.variant))
    rng = np.random.default_rng(example.seed)
    kind = int(rng.integers(3))
    batch_size, epochs = max(int(rng.integers(1, 61)), -(-example.n // 4)), 2

    def optimizer() -> keras.optimizers.Optimizer:
        if kind == 0:
            return keras.optimizers.SGD(0.01, momentum=0.9)
        if kind == 1:
            return keras.optimizers.AdamW(1e-2, clipnorm=1.0)
        return keras.optimizers.Adam(1e-2)

    histories = []
    for model, chosen in (
        (pair.base, optimizer()),
        (pair.aligned, kd.DAlign(optimizer(), None, explore=epochs)),
    ):
        model.compile(chosen, data.loss, run_eagerly=True)
        keras.utils.set_random_seed(example.seed)
        fitted = model.fit(
            **data.everything(), batch_size=batch_size, epochs=epochs, verbose=0
        )
        histories.append(fitted.history["loss"])
    np.testing.assert_array_equal(*histories)
    for mine, other, _ in pair.states:
        left, right = _values([mine, other])
        np.testing.assert_array_equal(left, right, err_msg=mine.path)
    assert pair.aligned.phase == "exploring"


def exploitation_moves_the_head_alone(example: Example) -> None:
    """Only `q` and `b` change, and the loss is no higher than at the base model."""
    pair = pair_of(example.family, example.variant)
    pair.start(example)
    data = samples(example, outputs_of(example.variant))
    given, model = data.everything(), pair.aligned
    before = kd.certify(pair.base, **given, loss=data.loss).loss
    options: dict[str, Any] = {
        "loss": data.loss,
        "center": "base",
        "reestimate_batch_norm": False,
        "verbose": 0,
    }
    try:
        with _quiet():
            kd.solve(model, **given, **options, l2=0, max_iterations=1)
    except ValueError as error:
        if "features are constant" in str(error):
            # All samples look the same to the head: refused, and said so.
            assert model.phase == "exploring"
            return
        raise
    first = kd.certify(model, **given, loss=data.loss).loss
    assert first <= before + FLOAT32 * (1.0 + abs(before))
    own = {model.head.q.path, model.head.bias.path}
    kept = [variable for variable in model.variables if variable.path not in own]
    values = _values(kept)
    if example.seed % 2:
        with _quiet():
            found = kd.solve(model, **given, **options, l2=0, max_iterations=30)
        assert found.value <= first + FLOAT32 * (1.0 + abs(first))
    else:
        model.compile(
            kd.DAlign(keras.optimizers.SGD(1e-3), keras.optimizers.SGD(1e-3)),
            data.loss,
            run_eagerly=True,
        )
        model.fit(**given, epochs=1, batch_size=20, verbose=0)
    for variable, old, new in zip(kept, values, _values(kept), strict=True):
        np.testing.assert_array_equal(old, new, err_msg=variable.path)


def gap_is_below_the_gradient_bound(example: Example) -> None:
    """`0 <= gap <= gradient bound` for any model, trained or not."""
    pair = pair_of(example.family, example.variant)
    pair.start(example)
    data = samples(example, outputs_of(example.variant))
    found = kd.certify(
        pair.base, **data.everything(), loss=data.loss, gradient_bound=True
    )
    assert found.gap >= 0
    bound = found.gradient_bound
    assert bound is not None
    assert found.gap <= bound.gap + FLOAT32 * (1.0 + found.loss)


def order_does_not_matter(example: Example) -> None:
    """A certificate of permuted samples is the same, to the rounding of float32."""
    pair = pair_of(example.family, example.variant)
    pair.start(example)
    data = samples(example, outputs_of(example.variant))
    order = np.random.default_rng(example.seed).permutation(example.n)
    first = kd.certify(pair.base, **data.everything(), loss=data.loss)
    second = kd.certify(
        pair.base, **data.take(order), loss=data.loss, batch_size=max(example.n // 2, 1)
    )
    _close(first.loss, second.loss, FLOAT32)
    _close(first.lower_bound, second.lower_bound, FLOAT64)
    assert first.n_distinct == second.n_distinct == len(set(data.groups))
    assert first.n_conflicts == second.n_conflicts


def weight_two_is_the_sample_twice(example: Example) -> None:
    """A certificate with a weight of 2 is that of the sample twice."""
    pair = pair_of(example.family, example.variant)
    pair.start(example)
    data = samples(example, outputs_of(example.variant))
    n = example.n
    chosen = example.seed % n
    doubled = np.ones(n) if data.weight is None else data.weight.astype(float)
    twice = data.take(np.append(np.arange(n), chosen))
    twice["sample_weight"] = np.append(doubled, doubled[chosen])
    doubled[chosen] *= 2.0
    once = {**data.everything(), "sample_weight": doubled}
    first = kd.certify(pair.base, **once, loss=data.loss)
    second = kd.certify(pair.base, **twice, loss=data.loss)
    factor = (n + 1) / n if example.reduction == "sum_over_batch_size" else 1.0
    _close(first.loss, factor * second.loss, FLOAT32)
    _close(first.lower_bound, factor * second.lower_bound, FLOAT64)


def _close(a: float, b: float, tolerance: float) -> None:
    assert abs(a - b) <= tolerance * (1.0 + max(abs(a), abs(b))), (a, b)


# Properties of arrays ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class HeadProblem:
    """A convex problem and what it was made of.

    Attributes:
        features: `(n, d)`.
        gates: `(d, G, m)`.
        signs: `(G, m)`.
        offset: `(n, C)`.
        targets: `(n, C)`.
        weights: `(n,)`.
        loss: The loss.
        theta: A point.
        groups: Number of each sample's input.
    """

    features: Array
    gates: Array
    signs: Array
    offset: Array
    targets: Array
    weights: Array
    loss: ConvexLoss
    theta: Array
    groups: Array

    def of(self, rows: Array, weights: Array | None = None) -> ConvexProblem:
        """The problem of some samples, in any order."""
        return ConvexProblem(
            self.features[rows],
            self.gates,
            self.signs,
            20.0,
            self.offset[rows],
            self.targets[rows],
            self.weights[rows] if weights is None else weights,
            self.loss,
        )

    def lower_bound(self, problem: ConvexProblem, rows: Array) -> float:
        """What no function of the inputs can go below."""
        groups = self.groups[rows]
        bounds = self.loss.lower_bound(
            problem.targets, problem.weights, groups, int(self.groups.max()) + 1
        )
        return float(bounds.sum()) / problem.normalizer


def head_problem(example: Example) -> HeadProblem:
    """The convex problem of an example."""
    outputs = outputs_of(example.variant)
    data = samples(example, outputs)
    rng = np.random.default_rng([example.seed, 2])
    d, width = int(rng.integers(1, 6)), int(rng.integers(1, 6))
    u = data.x[:, -d:].astype(np.float64)
    u *= np.sqrt(d) / np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-12)
    shared = 1 if rng.random() < 0.5 else outputs
    loss = convex_loss(data.loss)
    size = (d + 1) * outputs * width + outputs
    return HeadProblem(
        features=np.concatenate([u, np.ones((example.n, 1))], axis=1),
        gates=rng.standard_normal((d + 1, shared, width)) / np.sqrt(d + 1),
        signs=rng.choice([-1.0, 1.0], (shared, width)) / np.sqrt(width),
        offset=rng.standard_normal((example.n, outputs))[data.groups] * example.scale,
        targets=loss.targets(data.y, outputs),
        weights=np.ones(example.n)
        if data.weight is None
        else data.weight.astype(np.float64),
        loss=loss,
        theta=rng.standard_normal(size) * example.scale,
        groups=data.groups,
    )


def gradient_bound_of_a_head(example: Example) -> None:
    """`0 <= gap <= gradient bound` for a head, and for its minimum."""
    head = head_problem(example)
    rows = np.arange(example.n)
    problem = head.of(rows)
    bound = head.lower_bound(problem, rows)
    theta = head.theta
    if example.seed % 2:
        theta = _minimised(problem, theta, example.l2, bound).theta
    logits = problem.logits(theta)
    loss = problem.loss_of(logits)
    jacobian = HeadJacobian([], theta, logits, "float64", "", problem)
    found = gradient_bound(
        jacobian,
        head.loss,
        head.targets,
        head.weights,
        head.groups,
        bound,
        parameters="head",
    )
    size = FLOAT64 * (1.0 + loss)
    assert loss - bound >= -size
    assert loss - bound <= found.gap + size


def minimising_never_raises(example: Example) -> None:
    """Neither a minimum's value nor any gap's lower bound passes the start's value."""
    head = head_problem(example)
    problem = head.of(np.arange(example.n))
    bound = head.lower_bound(problem, np.arange(example.n))
    start = problem.value_and_gradient(head.theta, example.l2)[0]
    last = _minimised(problem, head.theta, example.l2, bound)
    assert last.value <= start
    assert last.value == problem.value_and_gradient(last.theta, example.l2)[0]
    assert last.gap >= 0
    assert last.lower_bound <= start
    zero = problem.value_and_gradient(np.zeros(problem.size), example.l2)[0]
    assert last.lower_bound <= zero + FLOAT64 * (1.0 + zero)


def rank_formula_is_the_rank(example: Example) -> None:
    """The matroid union's rank is the rank by SVD, of the best of three draws."""
    rng = np.random.default_rng(example.seed)
    n, d = min(example.n, 14), int(rng.integers(1, 6))
    width = int(rng.integers(1, 5))
    u = rng.standard_normal((n, d))
    u[:, : example.constant] = 0.0
    crowd = int(rng.integers(0, n + 1))
    u[:crowd, int(rng.integers(0, d + 1)) :] = 0.0
    repeats = int(example.repeats * (n - 1))
    if repeats:
        u[n - repeats :] = u[rng.integers(0, n - repeats, repeats)]
    norms = np.linalg.norm(u, axis=1, keepdims=True)
    # Rounded: rows in one direction are equal, and not a unit in the last place apart.
    u = np.round(u * np.sqrt(d) / np.where(norms > 0, norms, 1.0), 9)
    rows = np.concatenate([u, np.ones((n, 1))], axis=1)
    found = union_rank(rows, width)
    assert found.exact
    best = 0
    for _ in range(3):
        gates = rng.standard_normal((d + 1, width)) / np.sqrt(d + 1)
        signs = rng.choice([-1.0, 1.0], width)
        values = np.linalg.svd(
            explicit_features(rows, gates, signs, 4.0), compute_uv=False
        )
        above = int((values > 1e-12 * values[0]).sum())
        assert above <= found.rank
        best = max(best, above)
    assert best == found.rank


def order_does_not_matter_to_a_head(example: Example) -> None:
    """Value, gradient, lower bound, rank and minimum of permuted samples are equal."""
    head = head_problem(example)
    rows = np.arange(example.n)
    order = np.random.default_rng(example.seed).permutation(example.n)
    l2 = example.l2 or 1e-3
    ends = []
    for chosen in (rows, order):
        problem = head.of(chosen)
        bound = head.lower_bound(problem, chosen)
        at = problem.evaluate(head.theta, l2)
        last = _minimised(problem, head.theta, l2, bound)
        rank = union_rank(head.features[chosen], head.signs.shape[1]).rank
        ends.append((at, bound, last, rank))
    (at, bound, last, rank), (other_at, other_bound, other, other_rank) = ends
    _close(at.value, other_at.value, FLOAT64)
    _close(bound, other_bound, FLOAT64)
    size = FLOAT64 * (1.0 + float(np.abs(at.gradient).max()))
    np.testing.assert_allclose(at.gradient, other_at.gradient, rtol=0, atol=size)
    assert rank == other_rank
    _same_minimum(last, other)


def weight_two_is_the_sample_twice_to_a_head(example: Example) -> None:
    """Value, gradient, lower bound and minimum with a weight of 2."""
    head = head_problem(example)
    n = example.n
    chosen = example.seed % n
    rows, twice = np.arange(n), np.append(np.arange(n), chosen)
    weights = head.weights.copy()
    weights[chosen] *= 2.0
    heavy, double = head.of(rows, weights), head.of(twice)
    # A mean over the samples has one more of them.
    factor = (n + 1) / n if example.reduction == "sum_over_batch_size" else 1.0
    l2 = example.l2 or 1e-3
    at = heavy.evaluate(head.theta, factor * l2)
    other = double.evaluate(head.theta, l2)
    _close(at.value, factor * other.value, FLOAT64)
    size = FLOAT64 * (1.0 + float(np.abs(at.gradient).max()))
    np.testing.assert_allclose(at.gradient, factor * other.gradient, rtol=0, atol=size)
    bound, other_bound = head.lower_bound(heavy, rows), head.lower_bound(double, twice)
    _close(bound, factor * other_bound, FLOAT64)
    last = _minimised(heavy, head.theta, factor * l2, bound)
    again = _minimised(double, head.theta, l2, other_bound)
    scaled = dataclasses.replace(
        again, value=factor * again.value, gap=factor * again.gap
    )
    _same_minimum(last, scaled)


def _minimised(problem: ConvexProblem, start: Array, l2: float, bound: float) -> Any:
    quadratic = problem.loss.name == "squared error"
    return minimize(
        problem,
        start,
        method="direct" if quadratic else "lbfgs",
        tol=1e-9 * (1.0 + bound),
        lower_bound=bound,
        l2=l2,
        max_iterations=200,
    )


def _same_minimum(a: Any, b: Any) -> None:
    """Each value is at least the other one's lower bound."""
    size = FLOAT64 * (1.0 + max(abs(a.value), abs(b.value)))
    assert a.value >= b.lower_bound - size
    assert b.value >= a.lower_bound - size


# All of them -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Property:
    """A property, and how many of 10,000 examples it gets.

    Attributes:
        name: In words.
        check: Raises where an example does not have it.
        families: What it is checked on.
        share: Number of examples of the full measurement, all families together.
        few: Number of examples in the tests, of each family.
    """

    name: str
    check: Callable[[Example], None]
    families: tuple[str, ...]
    share: int
    few: int


PROPERTIES = (
    Property(
        "aligning keeps the function", aligning_keeps_the_function, FAMILIES, 1050, 4
    ),
    Property(
        "exploration is the base's training, bit for bit",
        exploration_is_the_bases_training,
        FAMILIES,
        350,
        2,
    ),
    Property(
        "exploitation moves q and b alone, and raises no loss",
        exploitation_moves_the_head_alone,
        FAMILIES,
        525,
        3,
    ),
    Property(
        "0 <= gap <= gradient bound", gap_is_below_the_gradient_bound, FAMILIES, 350, 2
    ),
    Property(
        "the order of the samples changes no certificate",
        order_does_not_matter,
        FAMILIES,
        875,
        4,
    ),
    Property(
        "a weight of 2 is the sample twice to a certificate",
        weight_two_is_the_sample_twice,
        FAMILIES,
        875,
        4,
    ),
    Property(
        "0 <= gap <= gradient bound of a head",
        gradient_bound_of_a_head,
        ARRAYS,
        1000,
        25,
    ),
    Property("minimising never raises", minimising_never_raises, ARRAYS, 1475, 30),
    Property(
        "the rank formula is the rank", rank_formula_is_the_rank, ARRAYS, 1500, 40
    ),
    Property(
        "the order of the samples changes no minimum",
        order_does_not_matter_to_a_head,
        ARRAYS,
        1000,
        25,
    ),
    Property(
        "a weight of 2 is the sample twice to a minimum",
        weight_two_is_the_sample_twice_to_a_head,
        ARRAYS,
        1000,
        25,
    ),
)

# Examples that failed once, by the name of the property's function.
EXAMPLES: dict[str, tuple[Example, ...]] = {}


@dataclasses.dataclass(frozen=True)
class Run:
    """Some examples of a property in a family.

    Attributes:
        count: How many there were, those of shrinking left out.
        failure: The smallest example that fails and its error, or None.
    """

    count: int
    failure: str | None


def run(
    prop: Property,
    family: str,
    count: int,
    seed: int,
    variants: range = range(2),
) -> Run:
    """Takes some examples.

    Args:
        prop: The property.
        family: The family.
        count: How many.
        seed: Seed of hypothesis.
        variants: The variants to draw from.

    Returns:
        How it went.
    """
    seen = 0
    failed: tuple[Example, BaseException] | None = None
    # Hypothesis begins with the simplest example each time; it is taken once.
    skipped = 1 if seed else 0
    drawn = 0

    def check(example: Example) -> None:
        nonlocal seen, drawn, failed
        drawn += 1
        if drawn <= skipped:
            return
        if failed is None:
            seen += 1
        try:
            prop.check(example)
        except Exception as error:
            failed = example, error
            raise

    everything = tuple(hypothesis.HealthCheck)
    test = hypothesis.given(examples(family, variants))(check)
    test = hypothesis.seed(seed)(test)
    test = hypothesis.settings(
        max_examples=count + skipped,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=everything,
        verbosity=hypothesis.Verbosity.quiet,
    )(test)
    with contextlib.suppress(Exception):
        test()
    if failed is None:
        return Run(seen, None)
    example, error = failed
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Run(seen, f"{example}: {text}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds number of examples, time limit, and the file of counts."""
    parser.add_argument(
        "--examples", type=int, default=10_000, help="examples of all properties"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop after so long"
    )
    parser.add_argument(
        "--counts", type=Path, default=COUNTS, help="what earlier parts counted"
    )


def measure(options: argparse.Namespace) -> Report:
    """Goes on from the file of counts until all examples or the time are used up."""
    end = time.monotonic() + options.seconds
    state: dict[str, Any] = {"counts": {}, "failures": [], "parts": 0}
    if options.counts.exists():
        state = json.loads(options.counts.read_text(encoding="utf-8"))
    total = sum(prop.share for prop in PROPERTIES)
    wanted = {
        (prop, family): math.ceil(
            prop.share * options.examples / total / len(prop.families)
        )
        for prop in PROPERTIES
        for family in prop.families
    }

    def done(key: tuple[Property, str]) -> int:
        return int(state["counts"].get(f"{key[0].name} | {key[1]}", 0))

    while time.monotonic() < end:
        key = min(wanted, key=lambda key: done(key) / wanted[key])
        prop, family = key
        if done(key) >= wanted[key]:
            break
        # Other variants each time, and few of a family, so that models are used again.
        first = 2 * (done(key) // 20)
        found = run(
            prop,
            family,
            min(5, wanted[key] - done(key)),
            seed=done(key),
            variants=range(first, first + 2) if family in FAMILIES else range(6),
        )
        state["counts"][f"{prop.name} | {family}"] = done(key) + found.count
        if found.failure is not None:
            state["failures"].append([prop.name, found.failure])
        options.counts.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(options.counts, json.dumps(state))
    state["parts"] += 1
    files.write_text(options.counts, json.dumps(state))
    return _report(state, options)


def _report(state: dict[str, Any], options: argparse.Namespace) -> Report:
    counts = {tuple(key.split(" | ")): n for key, n in state["counts"].items()}
    families = [*FAMILIES, *ARRAYS]
    rows = []
    for prop in PROPERTIES:
        numbers = [counts.get((prop.name, family), 0) for family in families]
        failures = sum(name == prop.name for name, _ in state["failures"])
        rows.append([prop.name, *map(str, numbers), str(sum(numbers)), str(failures)])
    sums = [
        sum(n for (_, own), n in counts.items() if own == family) for family in families
    ]
    rows.append(["all", *map(str, sums), str(sum(sums)), str(len(state["failures"]))])
    failed = [f"- {name}: `{text}`" for name, text in state["failures"]]
    header = ["property", *families, "examples", "failures"]
    targets = [
        Target("examples that fail", len(state["failures"]), 0.0),
        Target("examples in all", sum(sums), options.examples, at_least=True),
    ]
    described = (
        "Random models and data by hypothesis: 1 to 6 outputs, 1 to 60 samples with "
        "repeated inputs, conflicting labels, constant features and sample weights, "
        "all losses and reductions. Numbers of examples by property and family, in "
        f"{state['parts']} parts:"
    )
    tolerances = (
        f"Bit for bit where the table says so; sums in float32 to {FLOAT32:.0e}, in "
        f"float64 to {FLOAT64:.0e}, of one plus their size."
    )
    return Report(
        title="Properties of random models and data",
        body=[
            described,
            table(header, rows),
            tolerances,
            "Failures:" if failed else "Failures: none.",
            *(["\n".join(failed)] if failed else []),
        ],
        targets=targets,
        settings={"examples": options.examples},
        measurements=state,
    )
