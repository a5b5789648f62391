"""Wrong arguments of `solve`, and of other functions that share them."""

from bad_input.case import ARRAY, NAN, Case, data, values
from bad_input.world import stream

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
