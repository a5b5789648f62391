"""Search for the weights of the layers in a tangent kernel, on validation data.

Tan, Wu, Zhou and Huang (2023): the weights descend on the validation error of the ridge
regression that the weighted kernel gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import minimize

import keras_dalign as kd
from pipelines.studies import sample
from pipelines.studies.kernels.network import mlp

if TYPE_CHECKING:
    from pipelines.studies.kernels.arc_cosine import Array
    from pipelines.studies.sample import Row


def prediction(
    kernels: Array, cross: Array, y: Array, weights: Array, ridge: float
) -> Array:
    """Ridge regression with a weighted kernel.

    Args:
        kernels: Of each variable, between training inputs, shape `(v, n, n)`.
        cross: Of each variable, between other and training inputs, shape `(v, k, n)`.
        y: Targets, shape `(n, c)`.
        weights: Of the variables, shape `(v,)`.
        ridge: What is added to the diagonal, above 0.

    Returns:
        Predictions at the other inputs, shape `(k, c)`.
    """
    gram = np.tensordot(weights, kernels, 1) + ridge * np.eye(len(y))
    return np.tensordot(weights, cross, 1) @ np.linalg.solve(gram, y)


def validation_error(
    kernels: Array,
    cross: Array,
    y: Array,
    held_out: Array,
    weights: Array,
    ridge: float,
) -> tuple[float, Array]:
    """The mean squared error on validation data, halved, and its gradient.

    With `T = K + r I` and `a = T^{-1} y`, the derivative of the predictions `K' a` in
    the weight of `l` is `K'_l a - K' T^{-1} K_l a`.

    Args:
        kernels: As for `prediction`.
        cross: The same, between validation and training inputs.
        y: Targets of the training inputs, shape `(n, c)`.
        held_out: Targets of the validation inputs, shape `(k, c)`.
        weights: Of the variables, shape `(v,)`.
        ridge: `r`.

    Returns:
        The error, and its gradient in the weights, shape `(v,)`.
    """
    gram = np.tensordot(weights, kernels, 1) + ridge * np.eye(len(y))
    between = np.tensordot(weights, cross, 1)
    solved = np.linalg.solve(gram, np.concatenate([y, between.T], axis=1))
    a, back = solved[:, : y.shape[1]], solved[:, y.shape[1] :]
    residual = between @ a - held_out
    slopes = cross @ a - back.T @ (kernels @ a)
    error = (residual**2).mean() / 2.0
    return float(error), (residual * slopes).mean(axis=(1, 2))


def search(
    kernels: Array, cross: Array, y: Array, held_out: Array, ridge: float
) -> Array:
    """Weights with the least validation error, from equal ones, by L-BFGS.

    Weights are squares of what is varied, so that none is negative.

    Args:
        kernels: As for `validation_error`, and so are the others.
        cross: See there.
        y: See there.
        held_out: See there.
        ridge: See there.

    Returns:
        Shape `(v,)`.
    """

    def objective(roots: Array) -> tuple[float, Array]:
        error, slopes = validation_error(kernels, cross, y, held_out, roots**2, ridge)
        return error, 2.0 * roots * slopes

    found = minimize(objective, np.ones(len(kernels)), jac=True, method="L-BFGS-B")
    return found.x**2


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Test error of the equally weighted kernel, and of weights that were searched.

    The ridge is chosen for equal weights on the validation draw. From there the search
    lowers the error on the same draw.

    Args:
        settings: Those of the study.
        cell: With a `seed`.

    Returns:
        A row for `"equal"` and `"searched"` weights: mean squared error and share of
        wrong digits, on validation and test data, the `ridge`, and each weight's share
        of their sum.
    """
    n, tested = settings["search_samples"], settings["search_tested"]
    pixels, digit = sample.pooled_digits(2 * n + tested, cell["seed"])
    targets = np.eye(10)[digit] - 0.1
    network = mlp(
        pixels.shape[1],
        settings["search_width"],
        settings["search_depth"],
        1,
        cell["seed"],
    )
    parts = np.stack(
        [
            kd.tangent_kernel(network.model, pixels, pixels[:n], weights=list(one))
            for one in np.diag(network.variances)
        ]
    )
    # Of mean 1 on the diagonal with equal weights: the scale that the ridge is for.
    parts /= np.trace(parts[:, :n].sum(axis=0)) / n
    own, cross, unseen = parts[:, :n], parts[:, n : 2 * n], parts[:, 2 * n :]
    y, held_out = targets[:n], targets[n : 2 * n]
    equal = np.ones(len(parts))
    ridge = min(
        settings["ridges"],
        key=lambda each: validation_error(own, cross, y, held_out, equal, each)[0],
    )
    found = search(own, cross, y, held_out, ridge)
    rows = []
    for name, weights in (("equal", equal), ("searched", found)):
        row = {**cell, "weights": name, "ridge": ridge}
        for draw, kernel, place in (
            ("validation", cross, slice(n, 2 * n)),
            ("test", unseen, slice(2 * n, None)),
        ):
            outputs = prediction(own, kernel, y, weights, ridge)
            row[draw] = float(((outputs - targets[place]) ** 2).mean())
            row[f"{draw}_wrong"] = float(
                (outputs.argmax(axis=1) != digit[place]).mean()
            )
        for layer, weight in enumerate(weights / weights.sum()):
            row[f"share_{layer}"] = float(weight)
        rows.append(row)
    return rows
