"""Wrong arguments of the checks, `jacobian` and `tangent_kernel`."""

from bad_input.case import ARRAY, NAN, data, values

DIAGNOSTICS = [
    *values(
        "check_alignment check_structure",
        "parameters",
        r"`parameters` must be one of.*Received: parameters=",
        "none",
        3,
        ARRAY,
    ),
    *values(
        "check_alignment", "method", r"`method` must be one of.*Received", "x", None
    ),
    *values(
        "check_alignment check_structure",
        "tolerance",
        r"`tolerance` must be.*Received: tolerance=",
        0,
        1,
        NAN,
        "x",
    ),
    *values(
        "check_alignment",
        "rank_tolerance",
        r"`rank_tolerance` must be.*Received: rank_tolerance=",
        0,
        2,
        "x",
    ),
    *values(
        "check_alignment",
        "max_memory",
        r"`max_memory` must be a positive int.*Received: max_memory=",
        0,
        "x",
    ),
    *values(
        "jacobian tangent_kernel",
        "parameters",
        r"`parameters` must be one of.*Received: parameters=",
        "none",
    ),
    *data("jacobian tangent_kernel", "x", "empty", lambda w: w.x[:0], r"empty.*Rec"),
    *values("jacobian", "dtype", r"`dtype` must be.*Received: dtype=", "float16"),
    *values(
        "tangent_kernel",
        "weights",
        r"`weights` must be.*Received",
        [1.0],
        [-1.0] * 6,
        [NAN] * 6,
    ),
]
