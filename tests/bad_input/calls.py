"""A valid call of each public function."""

from collections.abc import Callable
from typing import Any

import keras_dalign as kd
from bad_input.world import N, network


def fit(world, **given):
    """`fit` of the exploring model, unless another is given."""
    model = given.pop("model", world.exploring)
    arguments = {"x": world.x, "y": world.y, "epochs": 2, "verbose": 0, **given}
    return model.fit(**arguments)


# `CALLS[name](world, **changes)` is the call with some arguments changed.
CALLS: dict[str, Callable[..., Any]] = {
    "align": lambda w, **a: kd.align(**{"model": network(), "n_samples": N, **a}),
    "AlignmentHead": lambda w, **a: kd.AlignmentHead(
        **{"units": 3, "n_samples": N, **a}
    ),
    "AlignedModel": lambda w, **a: kd.AlignedModel(
        **{"trunk": w.exploring.trunk, "head": w.exploring.head, **a}
    ),
    "start_exploiting": lambda w, **a: w.exploring.start_exploiting(**a),
    "set_width": lambda w, **a: w.exploiting.set_width(**a),
    "set_weights": lambda w, **a: w.exploiting.set_weights(**a),
    "fit": fit,
    "DAlign": lambda w, **a: kd.DAlign(**{"inner_optimizer": "sgd", **a}),
    "solve": lambda w, **a: kd.solve(
        **{"model": w.exploring, "x": w.x, "y": w.y, "verbose": 0, **a}
    ),
    "certify": lambda w, **a: kd.certify(
        **{"model": w.exploiting, "x": w.x, "y": w.y, **a}
    ),
    "forecast": lambda w, **a: kd.forecast(
        **{"model": w.exploiting, "x": w.x, "y": w.y, **a}
    ),
    "bound": lambda w, **a: w.forecast.bound(**a),
    "steps_to": lambda w, **a: w.forecast.steps_to(**a),
    "steps_to_gap": lambda w, **a: w.forecast.steps_to_gap(**a),
    "model_card": lambda w, **a: w.certificate.model_card(**{"model": w.base, **a}),
    "check_alignment": lambda w, **a: kd.check_alignment(
        **{"model": w.base, "x": w.x, "y": w.y, **a}
    ),
    "check_structure": lambda w, **a: kd.check_structure(
        **{"model": w.base, "x": w.x, **a}
    ),
    "jacobian": lambda w, **a: kd.jacobian(**{"model": w.base, "x": w.x, **a}),
    "tangent_kernel": lambda w, **a: kd.tangent_kernel(
        **{"model": w.base, "x": w.x, **a}
    ),
    "parametrize": lambda w, **a: kd.parametrize(
        **{"model": network(), "base": network(), **a}
    ),
    "QuadraticHead": lambda w, **a: kd.QuadraticHead(**{"units": 1, "width": 4, **a}),
    "solve_quadratic": lambda w, **a: kd.solve_quadratic(
        **{"model": w.quadratic, "x": w.x, "y": w.x[:, :1], "loss": "mse", **a}
    ),
    "reestimate_batch_norm": lambda w, **a: kd.reestimate_batch_norm(
        **{"model": w.base, "x": w.x, **a}
    ),
    "AlignmentMonitor": lambda w, **a: kd.AlignmentMonitor(**{"x": w.x, "y": w.y, **a}),
    "resnet": lambda w, **a: kd.models.resnet(
        **{"input_shape": (8, 8, 1), "classes": 10, "depth": 8, **a}
    ),
}
