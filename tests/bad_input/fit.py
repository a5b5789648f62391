"""Wrong arguments of `fit`."""

import numpy as np

from bad_input.case import NAN, Case, values
from bad_input.world import N, stream

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
