"""Wrong arguments of `resnet`, `parametrize`, `QuadraticHead` and batch norm."""

from bad_input.case import NAN, values

MODEL_PARTS = [
    *values(
        "reestimate_batch_norm",
        "passes",
        r"`passes` must be a positive int.*Received: passes=",
        0,
        1.5,
        "x",
    ),
    *values("resnet", "depth", r"`depth` must be.*Received: depth=", 9, 0, "x", None),
    *values("resnet", "classes", r"`classes` must.*Received: classes=", 0, "x"),
    *values("resnet", "width", r"`width` must.*Received: width=", 0, 1.5),
    *values(
        "resnet",
        "input_shape",
        r"`input_shape` must be.*Received: input_shape=",
        (8, 8),
        (8, 8, 0),
        "x",
        None,
    ),
    *values("parametrize", "kind", r"`kind` must be one of.*Received: kind=", "x", 3),
    *values(
        "parametrize",
        "optimizer",
        r"`optimizer` must be one of.*Received: optimizer=",
        "x",
        None,
    ),
    *values("parametrize", "base", r"`base` must be a built.*Received: base=", None),
    *values(
        "QuadraticHead",
        "units",
        r"`units` must be a positive int.*Received: units=",
        0,
        1.5,
        "x",
    ),
    *values(
        "QuadraticHead",
        "width",
        r"`width` must be a positive int.*Received: width=",
        0,
        None,
    ),
    *values(
        "QuadraticHead",
        "penalty",
        r"`penalty` must be a positive number.*Received: penalty=",
        0.0,
        NAN,
        "x",
    ),
    *values(
        "QuadraticHead",
        "second_derivative",
        r"`second_derivative` must be one of.*Received: second_derivative=",
        "tanh",
    ),
]
