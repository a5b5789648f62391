"""Some examples of each property of `reliability/properties.py`."""

import argparse
import dataclasses
import json

import pytest

from reliability import properties
from reliability.properties import ARRAYS, EXAMPLES, FAMILIES, PROPERTIES, Example

CASES = [(prop, family) for prop in PROPERTIES for family in prop.families]
OLD = [(prop, e) for prop in PROPERTIES for e in EXAMPLES.get(prop.check.__name__, ())]


@pytest.mark.parametrize(
    ("prop", "family"), CASES, ids=lambda value: getattr(value, "name", value)
)
def test_it_holds(prop, family):
    found = properties.run(prop, family, prop.few, seed=0, variants=range(6))
    assert found.failure is None
    assert found.count >= min(prop.few, 2)


@pytest.mark.parametrize(("prop", "example"), OLD)
def test_what_failed_once_holds(prop, example):
    prop.check(example)


def test_every_family_and_no_more_than_a_few_examples():
    assert {family for _, family in CASES} == {*FAMILIES, *ARRAYS}
    assert sum(prop.few for prop, _ in CASES) <= 300
    assert sum(prop.share for prop in PROPERTIES) == 10_000


def failing(example):
    assert example.n < 7, f"{example.n} samples"


def test_a_failure_is_shrunk_and_reported(tmp_path, monkeypatch):
    good = dataclasses.replace(PROPERTIES[-1], share=5)
    bad = dataclasses.replace(good, name="at most six samples", check=failing)
    monkeypatch.setattr(properties, "PROPERTIES", (good, bad))
    counts = tmp_path / "counts.json"
    options = argparse.Namespace(examples=60, seconds=60, counts=counts)
    report = properties.measure(options)
    assert report.targets[0].measured >= 1
    assert not report.targets[0].met
    assert "n=7," in report.body[-1]
    assert "7 samples" in report.body[-1]
    state = json.loads(counts.read_text(encoding="utf-8"))
    assert state["counts"][f"{good.name} | arrays"] == 30


def test_parts_add_up(tmp_path, monkeypatch):
    seen = []
    prop = dataclasses.replace(PROPERTIES[-1], check=seen.append, share=1)
    monkeypatch.setattr(properties, "PROPERTIES", (prop,))
    counts = tmp_path / "counts.json"
    options = argparse.Namespace(examples=50, seconds=0, counts=counts)
    assert properties.measure(options).targets[1].measured == 0
    options.seconds = 60
    for examples in (30, 50):
        options.examples = examples
        report = properties.measure(options)
        assert report.targets[1].measured == examples
        assert all(target.met for target in report.targets)
    assert len(seen) == 50
    # Parts draw others; some short draws repeat by chance.
    assert len({repr(example) for example in seen}) >= 45
    assert report.measurements["parts"] == 3
    assert all(isinstance(example, Example) for example in seen)
