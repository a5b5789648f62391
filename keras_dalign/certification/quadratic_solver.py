"""Full-batch training of a quadratic head in float64."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import scipy.optimize

from keras_dalign.certification.quadratic_bound import quadratic_parts, weights_of
from keras_dalign.head import data
from keras_dalign.head.batch_predictor import BatchPredictor
from keras_dalign.head.objective import (
    check_some_weight,
    loss_of,
    sample_weights,
    single_array,
)
from keras_dalign.numerics import quadratic
from keras_dalign.numerics.arguments import integer, number
from keras_dalign.numerics.threads import one_blas_thread

if TYPE_CHECKING:
    from keras_dalign.numerics import Array

# Pairs of steps and gradient changes that L-BFGS keeps.
_PAIRS = 20


@dataclasses.dataclass(frozen=True)
class QuadraticSolveResult:
    """The result of `solve_quadratic`; prints as a sentence.

    Attributes:
        value: The objective, the loss plus the head's penalty: for the weights in the
            dtype of the head, computed in float64 from the features on.
        loss: The loss.
        gradient: Largest entry of the objective's gradient in `w`, in absolute value.
        tol: The requested bound on `gradient`.
        converged: Whether L-BFGS reached `gradient <= tol`, before the weights were
            rounded to the dtype of the head.
        iterations: Number of iterations.
        evaluations: Number of gradients over all samples.
        seconds: Wall time, including the pass over the data.
        message: How it ended.
    """

    value: float
    loss: float
    gradient: float
    tol: float
    converged: bool
    iterations: int
    evaluations: int
    seconds: float
    message: str

    def to_dict(self) -> dict[str, Any]:
        """The result as a dict that `json.dumps` accepts."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.message} after {self.iterations} iterations "
            f"({self.seconds:.1f} s): objective {self.value:.6g}, loss "
            f"{self.loss:.6g}, largest entry of the gradient {self.gradient:.3g}. How "
            "far that is from the global minimum, `keras_dalign.certify` says."
        )


def solve_quadratic(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    loss: Any = None,
    sample_weight: Any = None,
    tol: float = 1e-8,
    max_iterations: int = 2000,
    batch_size: int = 256,
    steps: int | None = None,
) -> QuadraticSolveResult:
    """Minimises the objective of a model that ends in a `QuadraticHead`, full batch.

    Only the head's `w` changes, starting at its current value. The features are
    computed once and kept in memory in float64; L-BFGS runs in NumPy on all backends.
    The problem is not convex, so a small gradient proves nothing; `certify` bounds the
    distance to the global minimum. A head with `dtype="float64"` stores its weights
    more precisely, and so has a smaller gap.

    Cost: a gradient takes `4 n d C m` flop for `n` samples, `d` features, `C` outputs
    and `m` units.

    Args:
        model: A Functional or Sequential model whose last layer is a `QuadraticHead`.
        x: Inputs: arrays, or any stream that `keras.Model.fit` accepts, finite.
        y: Targets, for arrays.
        loss: A loss as in `keras.Model.compile`, convex in the outputs. Defaults to
            that of the model.
        sample_weight: Sample weights `(n,)`, for arrays.
        tol: Positive float: the solver stops when no entry of the gradient is larger. A
            sharp certificate needs 1e-8.
        max_iterations: The most iterations.
        batch_size: Samples per batch of the trunk, for arrays.
        steps: Number of batches to read; a generator needs it.

    Returns:
        The result. If `tol` is not reached, `converged` is False and `message` says
        why.

    Raises:
        ValueError: If the last layer is another one, an argument is out of its range,
            the loss is not known or not convex, the data do not fit, or the objective
            is not finite.
    """
    begin = time.perf_counter()
    parts = quadratic_parts(model)
    if parts is None:
        raise ValueError(
            "`solve_quadratic` needs a Functional or Sequential model whose last layer "
            f"is a keras_dalign.QuadraticHead. Received: model '{model.name}' of type "
            f"{type(model).__name__}"
        )
    number("tol", tol, "a positive number", lambda v: v > 0)
    max_iterations = integer("max_iterations", max_iterations)
    convex = loss_of(model, loss)
    trunk, head = parts
    u, labels, weights = _read(
        trunk, data.batches(x, y, sample_weight, batch_size=batch_size, steps=steps)
    )
    check_some_weight(len(u), float(weights.sum()))
    targets = convex.targets(labels, head.units)
    shares = weights / convex.normalizer(len(u), float(weights.sum()))
    gates = head.gates_exactly(u)
    start = weights_of(head)

    def objective(flat: Array) -> tuple[float, Array]:
        w = flat.reshape(start.shape)
        value, slope = quadratic.value_and_gradient(
            u, gates, w, targets, shares, convex
        )
        squared_lengths = np.square(w).sum(axis=0)
        value += head.penalty * float(np.square(squared_lengths).sum())
        slope += (4.0 * head.penalty) * squared_lengths * w
        return value, slope.ravel()

    if not np.isfinite(objective(start.ravel())[0]):
        raise ValueError(
            "The objective overflows float64 at the head's weights: features, weights "
            "or targets are too large. Received: an infinite objective"
        )
    with one_blas_thread():
        found = scipy.optimize.minimize(
            objective,
            start.ravel(),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxcor": _PAIRS,
                "ftol": 0.0,
                "gtol": tol,
                "maxiter": max_iterations,
                "maxfun": 4 * max_iterations,
            },
        )
        head.w.assign(found.x.reshape(start.shape))
        w = weights_of(head)
        value, slope = objective(w.ravel())
    converged = bool(np.abs(found.jac).max() <= tol)
    message = "The gradient is as small as asked for"
    if not converged:
        message = (
            "The iterations ended (raise `max_iterations` to go on)"
            if found.nit >= max_iterations
            else "The objective cannot be lowered further in float64"
        )
    quartic = head.penalty * float(np.square(np.square(w).sum(axis=0)).sum())
    return QuadraticSolveResult(
        value=value,
        loss=value - quartic,
        gradient=float(np.abs(slope).max()),
        tol=float(tol),
        converged=converged,
        iterations=int(found.nit),
        evaluations=int(found.nfev) + 2,
        seconds=time.perf_counter() - begin,
        message=message,
    )


def _read(
    trunk: keras.Model, batches: Iterator[data.Batch]
) -> tuple[Array, np.ndarray, Array]:
    """Features `(n, d)`, labels and sample weights `(n,)`."""
    predictor = BatchPredictor(trunk)
    features, labels, weights = [], [], []
    for x, y, sample_weight in batches:
        if y is None:
            raise ValueError(
                "Targets are needed: pass `y`, or a stream of (x, y) batches. "
                "Received: y=None"
            )
        features.append(predictor.features(x).astype(np.float64))
        labels.append(single_array(y, "y"))
        weights.append(sample_weights(sample_weight, len(features[-1])))
    return np.concatenate(features), np.concatenate(labels), np.concatenate(weights)
