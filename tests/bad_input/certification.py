"""Wrong arguments of `certify`, `forecast`, the monitor and `solve_quadratic`."""

from bad_input.case import INF, NAN, data, values
from bad_input.world import stream

CERTIFICATION = [
    *values("certify", "l2", r"`l2` must be positive.*Received: l2=", 0, -1, NAN, "x"),
    *values(
        "certify",
        "gradient_bound",
        r"`gradient_bound` must be True or False.*Received: gradient_bound=",
        "yes",
        1,
        None,
    ),
    *values(
        "certify",
        "parameters",
        r"`parameters`.*pass gradient_bound=True.*Received: parameters=",
        "all",
    ),
    *values(
        "forecast",
        "step_size",
        r"`step_size` must be.*Received: step_size=",
        0,
        -1,
        NAN,
        "x",
    ),
    *values("forecast", "exact", r"`exact` must be True or.*Received: exact=", "yes"),
    *values(
        "forecast",
        "iterations",
        r"`iterations` must be a positive int.*Received: iterations=",
        0,
        1.5,
        "x",
    ),
    *values(
        "model_card",
        "model",
        r"`model` must be a keras\.Model.*Received: model=",
        None,
        "x",
    ),
    *values("bound", "steps", r"`steps` must be.*Received", -1, NAN, "x", None),
    *values("steps_to", "loss", r"`loss` must be.*Received: loss=", NAN, INF, "x"),
    *values("steps_to_gap", "gap", r"`gap` must be.*Received: gap=", 0, -1, NAN, "x"),
    *values(
        "AlignmentMonitor",
        "every",
        r"`every` must be a positive int.*Received: every=",
        0,
        "x",
        1.5,
    ),
    *values(
        "AlignmentMonitor",
        "n_samples",
        r"`n_samples` must be a positive int.*Received: n_samples=",
        0,
        "x",
    ),
    *values(
        "AlignmentMonitor",
        "seed",
        r"`seed` must be a non-negative int.*Received: seed=",
        -1,
        "x",
    ),
    *data(
        "AlignmentMonitor",
        "y",
        "two arrays",
        lambda w: [w.y, w.y],
        r"`y` must be one array.*Received: 2 arrays",
    ),
    *data("AlignmentMonitor", "x", "a stream", stream, r"`x` must be.*Received: x of"),
    *values(
        "solve_quadratic", "tol", r"`tol` must be a positive.*Received: tol=", 0, NAN
    ),
    *values(
        "solve_quadratic",
        "max_iterations",
        r"`max_iterations` must be a positive int.*Received: max_iterations=",
        0,
        "x",
    ),
]
