"""Wrong arguments of `DAlign`."""

import keras_dalign as kd
from bad_input.case import ARRAY, INF, NAN, data, values

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
