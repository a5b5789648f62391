"""Wrong `validation_data` and `exploit_data`."""

import numpy as np

from bad_input.case import Case, data


def pair(change):
    """Makes an argument from the world's `x` and `y`."""
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
