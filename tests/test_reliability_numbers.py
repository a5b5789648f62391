"""Some cases of `reliability/numbers.py`, and that it sees what is wrong."""

import argparse
import math

import keras
import pytest

from reliability import numbers

JAX = keras.backend.backend() == "jax"
NAMES = {case.name: case for case in numbers.cases()}
# Case, function, and what must come of it.
FEW = [
    ("inputs times 1e-30", "certify", "right"),
    ("inputs times 1e+30", "certify", "right"),
    ("inputs times 1e+05", "solve", "right"),
    ("float16", "solve", "right"),
    ("mixed_bfloat16", "certify", "right"),
    ("mixed_float16", "check_alignment", "right"),
    ("one sample", "certify", "right"),
    ("one sample", "solve", "refused"),
    ("one class", "solve", "right"),
    ("one class, one output", "certify", "refused"),
    ("1,000 classes", "certify", "right"),
    ("a class for each sample", "solve", "right"),
    ("dead trunk", "solve", "refused"),
    ("dead trunk", "certify", "right"),
    ("NaN trunk", "solve", "refused"),
    ("NaN trunk", "certify", "refused"),
    ("NaN trunk", "check_structure", "refused"),
    ("NaN trunk", "check_alignment", "refused"),
    ("weights times 1e30", "certify", "right"),
    ("targets of size 1e200", "certify", "refused"),
]


@pytest.mark.parametrize(("name", "function", "kind"), FEW)
def test_a_right_answer_or_a_refusal(name, function, kind):
    outcome = numbers.check(NAMES[name], function)
    assert outcome.kind == kind, outcome


def test_the_cases():
    assert len(NAMES) == len(numbers.cases()) >= 40 - 5 * JAX


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (lambda _: {"a": [1.0, {"b": math.nan}]}, "not finite"),
        (lambda _: {"a": math.inf}, "not finite"),
        (lambda _: numbers._expect(False, "1 is not 2"), "wrong"),
        (lambda _: int("x"), "unclear"),
        (lambda _: 1 / 0, "unclear"),
        (lambda _: {"a": 1, "b": None, "c": "nan", "d": (True, 2.0)}, "right"),
    ],
)
def test_every_kind_of_failure_is_seen(made, kind, monkeypatch):
    monkeypatch.setattr(numbers, "FUNCTIONS", {"made": made})
    outcome = numbers.check(numbers.Case("any"), "made")
    assert outcome.kind == kind
    assert outcome.failed == (kind != "right")
    report = numbers.measure(argparse.Namespace(only="one sample"))
    assert all(target.met for target in report.targets) == (kind == "right")
