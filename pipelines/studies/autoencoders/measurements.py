"""The measurements of the study: one function for each kind of cell.

Data are digits averaged to 16 pixels, centred, of norm 1, or random directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

import keras_dalign as kd
from pipelines.studies.autoencoders.descent import descend
from pipelines.studies.autoencoders.kernel import limit_kernel, tangent_kernel
from pipelines.studies.autoencoders.network import (
    Array,
    Autoencoder,
    initial,
    keras_model,
)
from pipelines.studies.sample import Row, pooled_digits

# Between these shares of the initial loss, it falls at the rate of the smallest
# eigenvalue.
_TAIL = (1e-6, 1e-12)
# The loss that counts as zero, as a share of the loss of a network that gives zeros.
_FITTED = 1e-10


def least(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """The least of the widths with which gradient descent fits the digits.

    The learning rate is one over the largest eigenvalue of the initial tangent kernel.
    A width fits if the loss falls to `tolerance` times the initial one within `steps`.

    Args:
        settings: Those of the study.
        cell: `trained`, `n` and `seed`.

    Returns:
        One row: `least`, None if no width was enough, and the `steps` that it took.
    """
    x, _ = pooled_digits(cell["n"], cell["seed"])
    for width in sorted(settings["widths"]):
        network = initial(cell["trained"], x.shape[1], width, cell["seed"])
        until = settings["tolerance"] * network.loss(x)
        _, losses = descend(network, x, _rate(network, x), settings["steps"], until)
        if losses[-1] <= until:
            return [{"least": width, "steps": len(losses) - 1}]
    return [{"least": None, "steps": settings["steps"]}]


def limit(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """The distance of the initial tangent kernel to its limit for infinite width.

    Args:
        settings: Those of the study.
        cell: `trained`, `width` and `seed`.

    Returns:
        One row: the `distance`, relative, in the Frobenius norm.
    """
    x, _ = pooled_digits(settings["limit_samples"], cell["seed"])
    network = initial(cell["trained"], x.shape[1], cell["width"], cell["seed"])
    kernel = kd.tangent_kernel(keras_model(network), x)
    target = limit_kernel(cell["trained"], x)
    distance = np.linalg.norm(kernel - target) / np.linalg.norm(target)
    return [{"distance": float(distance)}]


def rate(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """The final rate at which the loss of a wide network falls, on random inputs.

    Gradient descent along a constant kernel `K` multiplies the residual's part in the
    direction of the smallest eigenvalue by `1 - eta lambda_min(K)` a step.

    Args:
        settings: Those of the study.
        cell: `trained` and `seed`.

    Returns:
        One row: the `rate`, minus the slope of the loss's logarithm a step, and its
        ratio to that of the initial kernel (`rate_to_birth`) and of the limit
        (`rate_to_limit`).

    Raises:
        RuntimeError: If the loss did not fall far enough to measure the rate.
    """
    rng = np.random.default_rng(cell["seed"])
    x = rng.standard_normal((settings["rate_samples"], 16))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    network = initial(cell["trained"], x.shape[1], settings["rate_width"], cell["seed"])
    values = np.linalg.eigvalsh(tangent_kernel(network, x))
    smallest = float(np.linalg.eigvalsh(limit_kernel(cell["trained"], x))[0])
    eta = 1.0 / float(values[-1])
    until = _TAIL[1] * network.loss(x)
    _, losses = descend(network, x, eta, settings["steps"], until)
    if losses[-1] > until:
        raise RuntimeError(
            "The loss did not fall far enough to tell its rate. Received: "
            f"{losses[-1] / losses[0]:.2g} of the initial one after "
            f"{settings['steps']} steps, wanted: {_TAIL[1]:g}. Raise `steps` or "
            "`rate_width`, or lower `rate_samples`."
        )
    tail = [math.log(loss) for loss in losses if loss <= _TAIL[0] * losses[0]]
    measured = (tail[0] - tail[-1]) / (len(tail) - 1)
    return [
        {
            "rate": measured,
            "rate_to_birth": measured / _per_step(eta, float(values[0])),
            "rate_to_limit": measured / _per_step(eta, smallest),
        }
    ]


def stall(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """The alignment of a network whose encoder alone is trained, by step.

    At some steps, denser at the beginning, `kd.check_alignment` measures the Jacobian
    in the encoder, and `kd.AlignmentMonitor` that in the output layer, which is not
    trained.

    Args:
        settings: Those of the study.
        cell: `width` and `seed`.

    Returns:
        A row for each measured step: `loss` over the initial one; `residual`,
        `rank` and `n_rows` in the encoder; `last_residual` and `last_rank` in the
        decoder.
    """
    x, _ = pooled_digits(settings["stall_samples"], cell["seed"])
    network = initial("encoder", x.shape[1], cell["width"], cell["seed"])
    model = keras_model(network)
    model.compile(loss="mean_squared_error")
    monitor = kd.AlignmentMonitor(x, x)
    monitor.set_model(model)
    monitor.on_train_begin()
    eta, first = _rate(network, x), network.loss(x)
    last, n_moments = settings["stall_steps"], settings["stall_moments"]
    moments = np.geomspace(1, last + 1, n_moments).round().astype(int) - 1
    rows: list[Row] = []
    done = 0
    for step in dict.fromkeys(moments.tolist()):
        network, _ = descend(network, x, eta, step - done)
        done = step
        kernel = model.get_layer("encoder").kernel
        kernel.assign(network.encoder)
        report = kd.check_alignment(model, x, x, parameters=[kernel])
        logs: dict[str, float] = {}
        monitor.on_epoch_end(len(rows), logs)
        rows.append(
            {
                "step": step,
                "loss": network.loss(x) / first,
                "residual": report.residual,
                "rank": report.rank,
                "n_rows": report.n_rows,
                "last_residual": float(logs["alignment_residual"]),
                "last_rank": int(logs["alignment_rank"]),
            }
        )
    monitor.on_train_end()
    return rows


def unseen(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """The error of reconstructing digits that were not trained on.

    Tied networks have `c = 2 / m`, with which they are initially near the identity map;
    the others have `c = 1 / sqrt(m d)`.

    Args:
        settings: Those of the study.
        cell: `trained`, `width` and `seed`.

    Returns:
        One row: `loss` over that of a network that gives zeros, mean squared error on
        unseen digits `unseen` and `unseen_at_birth`, and `movement` of the encoder,
        relative. For tied networks also the initial loss over its formula, for this `c`
        (`birth_to_formula`) and for `1 / sqrt(m d)` (`large_birth_to_formula`), and the
        smallest initial eigenvalues of tied and joint networks, `least_tied` and
        `least_joint`, for the latter.
    """
    n, seed, width = settings["tied_samples"], cell["seed"], cell["width"]
    images, _ = pooled_digits(n + settings["unseen"], seed)
    x, others = images[:n], images[n:]
    d = x.shape[1]
    scale = 2.0 / width if cell["trained"] == "tied" else None
    network = initial(cell["trained"], d, width, seed, scale)
    zero = 0.5 * n
    trained, losses = descend(
        network, x, _rate(network, x), settings["tied_steps"], _FITTED * zero
    )
    moved = trained.encoder - network.encoder
    row = {
        "loss": losses[-1] / zero,
        "unseen_at_birth": _error(network, others),
        "unseen": _error(trained, others),
        "movement": float(np.linalg.norm(moved) / np.linalg.norm(network.encoder)),
    }
    if cell["trained"] == "tied":
        large = initial("tied", d, width, seed)
        joint = initial("joint", d, width, seed)
        row |= {
            "birth_to_formula": network.loss(x) / birth_loss(n, d, width, 2.0 / width),
            "large_birth_to_formula": (
                large.loss(x) / birth_loss(n, d, width, large.scale)
            ),
            "least_tied": _smallest(large, x),
            "least_joint": _smallest(joint, x),
        }
    return [row]


def birth_loss(n: int, d: int, width: int, scale: float) -> float:
    """The expected initial loss of a tied network, over `n` inputs of norm 1.

    `E[w relu(w.x)] = x / 2` for `w ~ N(0, I)`, hence the mean of `u(x)` is
    `(c m / 2) x`, and the variances of its entries add up to `c^2 m (d + 1.5) / 2`.

    Args:
        n: Number of inputs.
        d: Their dimension.
        width: `m`.
        scale: `c`.

    Returns:
        Half the expected sum of the squared errors.
    """
    bias = (0.5 * scale * width - 1.0) ** 2
    variance = 0.5 * scale**2 * width * (d + 1.5)
    return 0.5 * n * (bias + variance)


def _rate(network: Autoencoder, x: Array) -> float:
    """One over the largest eigenvalue of the initial kernel."""
    return 1.0 / float(np.linalg.eigvalsh(tangent_kernel(network, x))[-1])


def _smallest(network: Autoencoder, x: Array) -> float:
    return float(np.linalg.eigvalsh(tangent_kernel(network, x))[0])


def _per_step(eta: float, eigenvalue: float) -> float:
    """The fall of the loss's logarithm in one step, along an eigenvector."""
    return -2.0 * math.log1p(-eta * eigenvalue)


def _error(network: Autoencoder, x: Array) -> float:
    return float(np.mean(np.sum((network.outputs(x) - x) ** 2, axis=1)))
