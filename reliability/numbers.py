"""What the public functions make of low precision, huge and tiny numbers, and NaN.

Every case is one model and one data set: a dtype policy, inputs scaled by 1e-30 to
1e30, one sample, one class, 1,000 classes, a trunk that is dead or NaN, weights or
targets that are huge. On each of them `fit` with `DAlign`, `solve`, `certify`,
`forecast`, `check_structure` and `check_alignment` must give a right answer, checked
against NumPy in float64 where there is something to compare with, or refuse it: with a
`ValueError` that says what was received. A result with a NaN or an infinity in it, and
any other exception, is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import scipy.special

import keras_dalign as kd
from benchmarks.common import Target, table
from reliability.report import Report

Array = np.ndarray[Any, Any]

POLICIES = ("float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16")
SCALES = tuple(10.0**k for k in (-30, -20, -10, -5, 5, 10, 20, 30))
# Relative error of outputs in a dtype, some layers deep.
_ROUNDING = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 1e-4, "float64": 1e-4}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its data.

    Attributes:
        name: In words.
        policy: Dtype policy of all layers.
        scale: What the inputs are multiplied by.
        n: Number of samples.
        outputs: Number of outputs.
        trunk: What the weights of the hidden layer are multiplied by.
        labels: `"random"`, `"one"` (all 0), `"own"` (a class for each sample), or a
            float: regression on targets of this size.
    """

    name: str
    policy: str = "float32"
    scale: float = 1.0
    n: int = 24
    outputs: int = 3
    trunk: float = 1.0
    labels: str | float = "random"

    def base(self) -> keras.Model:
        """A model with one hidden layer."""
        keras.utils.set_random_seed(0)
        policy = keras.dtype_policies.DTypePolicy(self.policy)
        hidden = keras.layers.Dense(5, "relu", name="hidden", dtype=policy)
        last = keras.layers.Dense(self.outputs, name="logits", dtype=policy)
        inputs = keras.Input((6,), dtype=policy.compute_dtype)
        model = keras.Model(inputs, last(hidden(inputs)))
        with np.errstate(over="ignore", invalid="ignore"):
            hidden.set_weights([w * self.trunk for w in hidden.get_weights()])
        return model

    def data(self) -> tuple[Array, Array]:
        """Inputs in float32, or float64 where the model is, and labels."""
        rng = np.random.default_rng(0)
        dtype = np.float64 if self.policy == "float64" else np.float32
        x = (self.scale * rng.standard_normal((self.n, 6))).astype(dtype)
        y: Array = rng.integers(0, self.outputs, self.n)
        if self.labels == "one":
            y = np.zeros_like(y)
        elif self.labels == "own":
            y = np.arange(self.n)
        elif not isinstance(self.labels, str):
            y = self.labels * rng.standard_normal((self.n, self.outputs))
        return x, y

    @property
    def loss(self) -> keras.losses.Loss:
        """The Keras loss."""
        if isinstance(self.labels, str):
            return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return keras.losses.MeanSquaredError()

    def own_loss(self, logits: Array, y: Array) -> float:
        """The loss of a model's outputs by NumPy, in float64."""
        logits = np.asarray(logits).astype(np.float64)
        if isinstance(self.labels, str):
            top = scipy.special.logsumexp(logits, axis=1)
            return float(np.mean(top - logits[np.arange(len(y)), y]))
        return float(np.mean(np.square(logits - y)))


def cases() -> list[Case]:
    """All of them; float64 is left out where the backend has none."""
    found = [Case(f"inputs times {scale:.0e}", scale=scale) for scale in SCALES]
    for policy in POLICIES:
        if policy == "float64" and keras.backend.backend() == "jax":
            continue
        found.append(Case(policy, policy))
        found += [
            Case(f"{policy}, inputs times {scale:.0e}", policy, scale)
            for scale in (1e-30, 1e-6, 1e4, 1e30)
        ]
    return [
        *found,
        Case("one sample", n=1),
        Case("two samples", n=2),
        Case("one class", labels="one"),
        Case("one class, one output", labels="one", outputs=1),
        Case("1,000 classes", outputs=1000, n=60),
        Case("a class for each sample", outputs=24, labels="own"),
        Case("dead trunk", trunk=0.0),
        Case("NaN trunk", trunk=math.nan),
        Case("infinite trunk", trunk=math.inf),
        Case("weights times 1e30", trunk=1e30),
        Case("weights times 1e-30", trunk=1e-30),
        Case("float16, weights times 1e4", "float16", trunk=1e4),
        Case("targets of size 1e30", labels=1e30),
        Case("targets of size 1e-30", labels=1e-30),
        Case("targets of size 1e200", labels=1e200),
        Case("inputs times 1e30, regression", scale=1e30, labels=1.0),
    ]


# The functions -----------------------------------------------------------------------


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise _WrongError(what)


class _WrongError(Exception):
    """A result that is not right."""


def _agree(case: Case, found: float, own: float, what: str) -> None:
    """Two losses are equal to the rounding of the model's outputs."""
    tolerance = _ROUNDING[case.policy.removeprefix("mixed_")]
    _expect(
        abs(found - own) <= tolerance * (1.0 + abs(own)), f"{what} {found}, not {own}"
    )


def _predict(model: keras.Model, x: Array) -> Array:
    outputs = np.asarray(keras.ops.convert_to_numpy(model.predict_on_batch(x)))
    _expect(bool(np.isfinite(outputs.astype(np.float64)).all()), "outputs not finite")
    return outputs


def _aligned(case: Case) -> kd.AlignedModel:
    return kd.align(case.base(), n_samples=case.n, seed=0)


def _fit(case: Case) -> Mapping[str, Any]:
    x, y = case.data()
    model = _aligned(case)
    optimizer = kd.DAlign(
        keras.optimizers.Adam(1e-3), solve_options={"l2": 1e-3, "max_iterations": 50}
    )
    model.compile(optimizer, case.loss, run_eagerly=True)
    history: dict[str, Any] = model.fit(x, y, epochs=2, verbose=0).history
    own = case.own_loss(_predict(model, x), y)
    _agree(case, history["loss"][-1], own, "loss in the history")
    # While it explores there is no gap, and its place in the history is NaN.
    exploits = [phase == 1 for phase in history["phase"]]
    return {
        name: [value for value, keep in zip(values, exploits, strict=True) if keep]
        for name, values in history.items()
    }


def _solve(case: Case) -> Mapping[str, Any]:
    x, y = case.data()
    model = _aligned(case)
    found = kd.solve(model, x, y, loss=case.loss, l2=1e-3, max_iterations=50, verbose=0)
    _expect(0 <= found.gap <= found.value, "gap out of range")
    model.compile(loss=case.loss, run_eagerly=True)
    own = case.own_loss(_predict(model, x), y)
    _agree(case, found.certificate.loss, own, "certified loss")
    fields = found.to_dict()
    for trial in (fields["widths"] or [])[:1]:
        # The first width has nothing to be compared with: NaN, as documented.
        del trial["change"], trial["standard_error"]
    return fields


def _certify(case: Case) -> Mapping[str, Any]:
    x, y = case.data()
    model = case.base()
    model.compile(loss=case.loss, run_eagerly=True)
    found = kd.certify(model, x, y, gradient_bound=True)
    own = case.own_loss(_predict(model, x), y)
    _agree(case, found.loss, own, "loss")
    # Inputs differ, so nothing stands in the way of a loss of 0.
    _expect(found.lower_bound == 0, f"lower bound {found.lower_bound}")
    _expect(found.gap == found.loss, f"gap {found.gap}")
    bound = found.gradient_bound
    _expect(bound is not None and bound.gap >= 0.99 * found.gap, "gradient bound")
    return found.to_dict()


def _forecast(case: Case) -> Mapping[str, Any]:
    x, y = case.data()
    model = _aligned(case)
    kd.solve(model, x, y, loss=case.loss, l2=1e-3, max_iterations=1, verbose=0)
    model.compile(loss=case.loss, run_eagerly=True)
    found = kd.forecast(model, x, y)
    bounds = found.bound([0, 1, 10, 1000])
    _agree(case, found.loss, case.own_loss(_predict(model, x), y), "loss")
    _expect(bool(bounds[0] == found.loss), f"bounds {bounds}")
    _expect(bool((np.diff(bounds[1:]) <= 0).all()), f"bounds {bounds}")
    return {**found.to_dict(), "bounds": bounds.tolist()}


def _structure(case: Case) -> Mapping[str, Any]:
    x, _ = case.data()
    found = kd.check_structure(case.base(), x)
    _expect(found.holds, f"the structure of a Dense layer: error {found.error}")
    return found.to_dict()


def _alignment(case: Case) -> Mapping[str, Any]:
    x, y = case.data()
    model = case.base()
    found = kd.check_alignment(model, x, y, loss=case.loss, parameters="last")
    kernel, bias = (np.asarray(w, np.float64) for w in model.layers[1].get_weights())
    rows = np.maximum(x.astype(np.float64) @ kernel + bias, 0.0)
    if np.isfinite(rows).all() and rows.max(initial=0.0) < 1e6:
        rows = np.concatenate([rows, np.ones((len(x), 1))], axis=1)
        wanted = y.astype(np.float64)
        if isinstance(case.labels, str):
            wanted = 2.0 * np.eye(case.outputs)[y] - 1.0
        left = wanted - rows @ np.linalg.lstsq(rows, wanted, rcond=None)[0]
        # In the scale of the targets: their squares may underflow.
        size = float(np.abs(wanted).max())
        own = float(np.linalg.norm(left / size) / np.linalg.norm(wanted / size))
        _expect(abs(found.residual - own) <= 1e-3, f"residual {found.residual}: {own}")
    _expect(0 <= found.residual <= 1 + 1e-6, f"residual {found.residual}")
    return found.to_dict()


FUNCTIONS: dict[str, Callable[[Case], Mapping[str, Any]]] = {
    "fit": _fit,
    "solve": _solve,
    "certify": _certify,
    "forecast": _forecast,
    "check_structure": _structure,
    "check_alignment": _alignment,
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a function made of a case.

    Attributes:
        case: The case's name.
        function: The function's name.
        kind: `"right"`, `"refused"`, `"not finite"`, `"wrong"` or `"unclear"`.
        words: The message, or what is wrong.
    """

    case: str
    function: str
    kind: str
    words: str = ""

    @property
    def failed(self) -> bool:
        """Whether it is neither right nor refused."""
        return self.kind not in {"right", "refused"}


def check(case: Case, function: str) -> Outcome:
    """Calls a function on a case, and judges what it does."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            values = FUNCTIONS[function](case)
        except _WrongError as error:
            return Outcome(case.name, function, "wrong", str(error))
        except ValueError as error:
            kind = "refused" if "Received:" in str(error) else "unclear"
            return Outcome(case.name, function, kind, _short(error))
        except Exception as error:
            return Outcome(case.name, function, "unclear", _short(error))
    bad = sorted(set(_not_finite(values, "")))
    if bad:
        return Outcome(case.name, function, "not finite", ", ".join(bad))
    return Outcome(case.name, function, "right")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _not_finite(value: Any, name: str) -> Iterator[str]:
    """The names of all numbers that are not finite."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _not_finite(inner, name)
    else:
        with contextlib.suppress(TypeError, ValueError):
            if not isinstance(value, str) and not math.isfinite(value):
                yield name


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of cases."""
    parser.add_argument(
        "--only", default="", help="take the cases whose names hold this text"
    )


def measure(options: argparse.Namespace) -> Report:
    """Calls every function on every case."""
    chosen = [case for case in cases() if options.only in case.name]
    outcomes = [check(case, function) for case in chosen for function in FUNCTIONS]
    failed = [outcome for outcome in outcomes if outcome.failed]
    marks = {(o.case, o.function): o for o in outcomes}
    rows = [
        [case.name]
        + [
            f"**{marks[case.name, function].kind}**"
            if marks[case.name, function].failed
            else marks[case.name, function].kind
            for function in FUNCTIONS
        ]
        for case in chosen
    ]
    refusals = Counter(o.words for o in outcomes if o.kind == "refused")
    failures = [f"- {o.case}: `{o.function}` {o.kind}: {o.words}" for o in failed]
    silent = sum(outcome.kind == "not finite" for outcome in outcomes)
    return Report(
        title="Low precision, huge and tiny numbers, NaN",
        body=[
            f"{len(outcomes)} calls: what each function made of each case.",
            table(["case", *FUNCTIONS], rows),
            "Failures:" if failures else "Failures: none.",
            *(["\n".join(failures)] if failures else []),
            "Refusals, and how often:",
            "\n".join(f"- {count}: {text}" for text, count in refusals.most_common()),
        ],
        targets=[
            Target("results with a NaN or infinity", silent, 0.0),
            Target("wrong results and unclear errors", len(failed) - silent, 0.0),
            Target("calls", len(outcomes), 1.0, at_least=True),
        ],
        settings={"only": options.only},
        measurements=[dataclasses.asdict(outcome) for outcome in outcomes],
    )
