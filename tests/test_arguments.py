import keras
import numpy as np
import pytest

from keras_dalign.numerics.arguments import (
    choice,
    flag,
    integer,
    is_number,
    keras_model,
    number,
    shown,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        ("word", "'word'"),
        (None, "None"),
        (np.float32(0.5), repr(np.float32(0.5))),
        (np.zeros((1000, 3)), "ndarray of shape (1000, 3)"),
        (np.array(1.0), "ndarray of shape ()"),
        ([1, 2], "[1, 2]"),
        ([[1.0] * 100] * 100, "list of 100 entries"),
        (dict.fromkeys(range(9), "x" * 50), "dict of 9 entries"),
        ("x" * 1000, "'" + "x" * 76 + "..."),
        ([np.zeros(1000)], "[array([0., 0., 0., "),
    ],
)
def test_what_errors_show_is_short(value, text):
    assert shown(value).startswith(text)
    assert len(shown(value)) <= 80


def test_tensors_and_layers_are_shown_without_their_numbers():
    tensor = keras.ops.zeros((50, 2))
    assert shown(tensor) == f"{type(tensor).__name__} of shape (50, 2)"
    assert shown(keras.layers.Dense(3, name="end")) == "Dense 'end'"
    assert shown(keras.Sequential(name="net")) == "Sequential 'net'"


@pytest.mark.parametrize("value", [1, 7, np.int64(3), np.uint8(2)])
def test_integers(value):
    found = integer("count", value)
    assert found == value
    assert type(found) is int


@pytest.mark.parametrize(
    "value", [0, -1, 1.0, True, np.bool_(True), "1", None, np.ones(1)]
)
def test_what_is_no_positive_int(value):
    with pytest.raises(
        ValueError, match=r"`count` must be a positive int\. Received: count="
    ):
        integer("count", value)


def test_the_least_and_the_advice():
    assert integer("seed", 0, 0) == 0
    with pytest.raises(ValueError, match=r"a non-negative int\. Received: seed=-1$"):
        integer("seed", -1, 0)
    with pytest.raises(ValueError, match=r"an int of at least 3\. .*n=2\. Pass more"):
        integer("n", 2, 3, "Pass more.")


@pytest.mark.parametrize(
    "value", ["1", None, True, np.nan, -np.inf, 2.0, -0.1, np.ones(1), 1j]
)
def test_what_is_no_number_of_the_kind(value):
    with pytest.raises(ValueError, match=r"`share` must be a share\. Received: share="):
        number("share", value, "a share", lambda v: 0 <= v <= 1)


def test_numbers():
    found = number("share", np.float32(0.5), "a share", lambda v: 0 <= v <= 1)
    assert found == 0.5
    assert type(found) is float
    assert is_number(np.int8(1))
    assert not is_number(np.bool_(True))


def test_words_flags_and_models():
    assert choice("mode", "a", ("a", "b")) == "a"
    for value in ("c", None, ["a"], np.zeros(2)):
        with pytest.raises(ValueError, match=r"`mode` must be one of \('a', 'b'\)\."):
            choice("mode", value, ("a", "b"))
    with pytest.raises(ValueError, match="`mode` must be this or that"):
        choice("mode", "c", ("a", "b"), "this or that")
    assert flag("on", np.bool_(True)) is True
    for value in (1, "yes", None, np.ones(1, bool)):
        with pytest.raises(ValueError, match="`on` must be True or False"):
            flag("on", value)
    model = keras.Sequential()
    assert keras_model(model) is model
    with pytest.raises(ValueError, match=r"`trunk` must be a keras\.Model.*type int"):
        keras_model(3, "trunk")
