"""Bounds the loss after any number of gradient steps in exploitation.

The exploitation problem is convex and smooth. For full-batch gradient descent with a
step `eta <= 1 / Ls`, `Ls` the Lipschitz constant of the gradient, and *any* parameters
`theta*`,

    L_t <= L(theta*) + ||theta_0 - theta*||^2 / (2 eta t).

A forecast holds several `theta*`, each with its loss and its distance. For each `t` it
takes the one with the smallest right side `B`.

The inequality holds in exact arithmetic, but losses are computed in float64. So the
reported bound is `(sqrt(B) + rho)^2`, with an allowance `rho` for the rounding of the
logits; see `rounding_allowances` in `forecast_candidates.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.certification.exploiting_head import exploiting_head
from keras_dalign.certification.forecast_candidates import (
    envelope,
    path_candidates,
    rounding_allowances,
    smoothness_bound,
    spectra_of,
)
from keras_dalign.certification.forecast_result import Forecast
from keras_dalign.head import data
from keras_dalign.head.batch_predictor import BatchPredictor
from keras_dalign.head.features import FeatureSet
from keras_dalign.head.objective import (
    check_some_weight,
    check_targets,
    loss_of,
    sample_weights,
    single_array,
)
from keras_dalign.numerics.arguments import flag, integer, number
from keras_dalign.numerics.repeats import Repeats, digests
from keras_dalign.solving.problem import ConvexProblem

if TYPE_CHECKING:
    from keras_dalign.numerics import Array, Indices
    from keras_dalign.training.aligned_model import AlignedModel

# The most samples for the default `exact=True`: one n x n eigendecomposition per output
# then takes seconds on two cores.
_EXACT_SAMPLES = 1500


def forecast(
    model: AlignedModel,
    x: Any,
    y: Any = None,
    *,
    loss: Any = None,
    sample_weight: Any = None,
    step_size: float | None = None,
    exact: bool | None = None,
    iterations: int = 60,
    batch_size: int = 256,
    steps: int | None = None,
) -> Forecast:
    """Bounds the loss after any number of first-order exploitation steps.

    The bound is for full-batch gradient descent on the head's `q` and `b`, from their
    current values, with a step of at most `1 / Ls`. Other optimizers are usually
    faster, and have no such bound. Features are computed once and kept; all that
    follows is in float64.

    For squared error and `exact`, the bound is the loss itself, to rounding: the error
    along each eigenvector of the Gram matrix shrinks by a known factor in each step.

    Args:
        model: An `AlignedModel` that exploits. Before the switch there are no gates to
            forecast with.
        x: Inputs: arrays, or any stream that `keras.Model.fit` accepts, finite.
        y: Targets, for arrays.
        loss: A loss as in `keras.Model.compile`, if not the one that the model was
            compiled with.
        sample_weight: Sample weights of shape `(n,)`, for arrays.
        step_size: The step of gradient descent, at most `1 / Ls`, which is the
            default.
        exact: Whether to use eigendecompositions of one `n x n` matrix per output.
            The default is to do so up to 1,500 samples.
        iterations: The most iterations of L-BFGS to search for `theta*`.
        batch_size: Samples per prediction, for arrays.
        steps: Number of batches to read; a generator needs it.

    Returns:
        The forecast.

    Raises:
        ValueError: If the model does not exploit, the step is too long, an argument is
            out of its range, or for data and losses as `keras_dalign.certify`.

    Example:

    ```python
    prospect = keras_dalign.forecast(model, x, y)
    prospect.bound([100, 1000])  # the loss after so many steps, at most
    prospect.steps_to_gap(1e-3)  # steps to within 0.001 of the global minimum
    ```
    """
    _check_arguments(step_size, exact, iterations)
    head = exploiting_head(model, "A forecast")
    convex = loss_of(model, loss)
    trunk = BatchPredictor(model.trunk)
    numbers: dict[bytes, int] = {}
    kept: list[tuple[Any, Any, Array, list[int]]] = []
    weighted = False
    for x_batch, y_batch, w_batch in data.batches(
        x, y, sample_weight, batch_size=batch_size, steps=steps, model=model
    ):
        check_targets(y_batch)
        groups = [numbers.setdefault(name, len(numbers)) for name in digests(x_batch)]
        labels = single_array(y_batch, "y")
        convex.targets(labels, head.units)
        weights = sample_weights(w_batch, len(groups))
        kept.append((trunk.features(x_batch), labels, weights, groups))
        weighted |= w_batch is not None
    features, all_labels, all_weights, all_groups = zip(*kept, strict=True)
    joined = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *features)
    weights = np.concatenate(all_weights)
    check_some_weight(len(weights), float(weights.sum()))
    labels = np.concatenate(all_labels)
    problem = ConvexProblem.from_head(
        head, FeatureSet(joined, labels, weights, batch_size), convex
    )
    weighting = ", with sample weights" if weighted else ""
    return forecast_problem(
        problem,
        problem.theta_of(head),
        np.concatenate(all_groups),
        step_size=step_size,
        exact=exact,
        iterations=iterations,
        objective=(
            f"{convex.objective} as given{weighting}, in inference mode, without "
            "regularisation or augmentation"
        ),
    )


def _check_arguments(step_size: Any, exact: Any, iterations: Any) -> None:
    if step_size is not None:
        number("step_size", step_size, "positive and finite", lambda v: v > 0)
    if exact is not None:
        flag("exact", exact)
    integer("iterations", iterations)


def forecast_problem(
    problem: ConvexProblem,
    theta: Array,
    groups: Indices,
    *,
    objective: str,
    step_size: float | None = None,
    exact: bool | None = None,
    iterations: int = 60,
) -> Forecast:
    """`forecast` for a given convex problem.

    Args:
        problem: The problem.
        theta: Where gradient descent starts, shape `(size,)`.
        groups: Number of each sample's input, shape `(n,)`.
        objective: The loss in words.
        step_size: See `forecast`.
        exact: See `forecast`.
        iterations: See `forecast`.

    Returns:
        The forecast.

    Raises:
        ValueError: If an argument is out of its range.
    """
    _check_arguments(step_size, exact, iterations)
    if exact is None:
        exact = problem.n <= _EXACT_SAMPLES
    loss = problem.loss_of(problem.logits(theta))
    if not math.isfinite(loss):
        raise ValueError(
            "The loss is not finite, so there is nothing to forecast: training has "
            f"probably diverged. Received: loss={loss}"
        )
    spectra = spectra_of(problem, theta, groups) if exact else None
    smoothness = smoothness_bound(problem) if spectra is None else spectra.smoothness
    if step_size is None:
        step_size = 1.0 / smoothness
    elif step_size * smoothness > 1.0 + 1e-12:
        raise ValueError(
            "Gradient descent is only known to converge with steps of at most 1 / Ls = "
            f"{1 / smoothness:.6g}. Received: step_size={step_size}. Leave it out to "
            "use the longest."
        )
    candidates = path_candidates(problem, theta, smoothness, iterations)
    if spectra is not None:
        candidates += spectra.candidates
    candidates = [candidates[i] for i in envelope(candidates)]
    squared_distances = np.array([distance for _, distance in candidates])
    repeats = Repeats()
    names = [int(group).to_bytes(8, "little") for group in groups]
    repeats.add(names, problem.targets, problem.weights, 0)
    seen = len(np.unique(groups[problem.weights > 0]))
    return Forecast(
        loss=loss,
        lower_bound=repeats.lower_bound(problem.loss) / problem.normalizer,
        step_size=step_size,
        smoothness=smoothness,
        exact=exact,
        contraction=None if spectra is None else spectra.contraction(step_size),
        rank=None if spectra is None else spectra.rank,
        deficit=None if spectra is None else max(seen - spectra.rank, 0),
        n_samples=problem.n,
        n_distinct=repeats.n_distinct,
        n_conflicts=repeats.conflicts()[0],
        distance=None if spectra is None else spectra.distance,
        losses=np.array([loss for loss, _ in candidates]),
        squared_distances=squared_distances,
        rounding=rounding_allowances(problem, theta, squared_distances),
        objective=objective,
        _modes=None if spectra is None else spectra.modes,
    )
