"""Every call of `bad_input` raises the documented error and changes nothing."""

import re

import pytest
from bad_input.calls import CALLS
from bad_input.cases import CASES
from bad_input.world import World
from small import assert_equal

import keras_dalign as kd
import keras_dalign.models

# A message that holds the data is longer.
LONGEST = 900


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_refused_and_nothing_is_changed(case, world):
    before = world.weights()
    phases = [model.phase for model in (world.exploring, world.exploiting)]
    with pytest.raises(case.exception) as caught:
        case.call(world)
    message = str(caught.value)
    assert re.search(case.words, message, re.DOTALL), message
    assert "Received" in message
    assert len(message) <= LONGEST, message
    assert type(caught.value) is case.exception
    assert phases == [model.phase for model in (world.exploring, world.exploiting)]
    assert_equal(before, world.weights())


def test_there_are_enough_cases_and_none_twice():
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names) >= 400


def test_every_public_function_is_in_the_table():
    # Reports are results: nobody makes them.
    results = {
        "AlignmentReport",
        "Certificate",
        "Forecast",
        "Jacobian",
        "QuadraticBound",
        "QuadraticSolveResult",
        "SolveResult",
        "StructureReport",
    }
    public = set(kd.__all__) - results - {"models"}
    public |= set(keras_dalign.models.__all__)
    assert public <= set(CALLS)
    assert set(CALLS) == {case.function for case in CASES}
