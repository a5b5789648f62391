"""The weight of the L2 term, chosen by the loss on samples held out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg

from keras_dalign.numerics.losses import SquaredError
from keras_dalign.solving.descent import descend

if TYPE_CHECKING:
    from keras_dalign.numerics.gram import Array
    from keras_dalign.solving.problem import ConvexProblem
    from keras_dalign.solving.walk import Iterate

# From strong to weak, for a loss that is a mean; for a sum they are as many times
# larger as there are samples.
_WEIGHTS = tuple(10.0**-k for k in range(8))
# Samples that the trunk was trained on cannot speak for weaker ones: their loss still
# falls where that of new samples rises (`benchmarks.solve_tradeoff` shows test loss).
_WEAKEST_BY_SEEN = 1e-3
_HELD_OUT = 0.2
# A point of the path need not be as exact as the last one: a part of the first loss.
_PATH_TOLERANCE = 1e-3
# From so many features on, weights are tried on principal components of them. These
# hold so much of their squares: what is left over, an L2 term of these weights keeps
# small in any case.
_MANY_FEATURES = 256
_COMPONENTS_HOLD = 0.95


@dataclasses.dataclass(frozen=True)
class L2Trial:
    """One weight that was tried.

    Attributes:
        l2: The weight.
        train_loss: Loss of the samples trained on, without the L2 term.
        held_out_loss: Loss of the samples held out; all these numbers are those of the
            minimum, or of where it was given up.
        held_out_error: Fraction of them that are misclassified; None for squared error.
        iterations: Iterations it took, from the weight before.
    """

    l2: float
    train_loss: float
    held_out_loss: float
    held_out_error: float | None
    iterations: int

    def __str__(self) -> str:
        error = (
            ""
            if self.held_out_error is None
            else f", error {100 * self.held_out_error:.2f} %"
        )
        return f"l2={self.l2:.0e}: held-out loss {self.held_out_loss:.4g}{error}"


@dataclasses.dataclass(frozen=True, eq=False)
class L2Choice:
    """The weight of the least held-out loss.

    Attributes:
        l2: The weight.
        theta: The minimum for it on the samples trained on, to start from.
        trials: Every weight tried, from strong to weak.
    """

    l2: float
    theta: Array
    trials: tuple[L2Trial, ...]


def choose_l2(
    problem: ConvexProblem,
    start: Array,
    *,
    tol: float,
    max_iterations: int = 1000,
    validation: ConvexProblem | None = None,
    seed: int = 0,
    watch: Callable[[L2Trial], Any] | None = None,
) -> L2Choice:
    """Goes along a path of L2 weights, from strong to weak, and takes the best one.

    Each weight starts at the minimum of the one before, and is given up on the way if
    the held-out loss is above the best one by more than the gap. One fifth of the
    samples is held out, at random, the same part of every class; their features stay
    where they are, with a weight of 0, so that nothing is computed twice. The trunk
    that made the features has seen these samples, which flatters weak weights, all the
    more the better it has learned them: with them the path ends at 1e-3 (times the
    number of samples for a loss that is a sum), with `validation` at 1e-7.

    Of 256 features and more, a path to 1e-3 takes the principal components that hold
    95 % of their squares: an L2 term of such weights leaves little of the others, and
    the path takes a third of the time. Whatever it finds, the weight is what is chosen
    here; the minimum of all features is for the caller to find.

    Args:
        problem: The problem of all samples.
        start: Parameters to start at, shape `(size,)`; on principal components it is
            the problem's center.
        tol: Gap of each minimum, if it is more than a thousandth of the first loss.
        max_iterations: Most iterations for one weight.
        validation: Samples to hold against the path instead of a fifth of the problem.
        seed: Seed of the choice of samples.
        watch: Called with each trial.

    Returns:
        The weight, where to start with it, and all trials.

    Raises:
        ValueError: If there are too few samples to hold some out.
    """
    basis = None
    if validation is None:
        held_out = hold_out(problem, seed)
        tried = problem
        if problem.d >= _MANY_FEATURES:
            basis = principal_components(problem.features, _COMPONENTS_HOLD)
            tried = problem.restricted(basis)
            start = tried.center
        trained = tried.reweighted((~held_out).astype(np.float64))
        validation = tried.reweighted(held_out.astype(np.float64))
        weights = tuple(w for w in _WEIGHTS if w >= _WEAKEST_BY_SEEN)
        at: Callable[[Iterate], Array] = _kept_logits
    else:
        trained, weights = problem, _WEIGHTS
        at = functools.partial(_new_logits, validation)
    unit = float(problem.weights.sum()) / problem.normalizer
    loss = trained.loss_of(trained.logits(start))
    tol = max(tol, _PATH_TOLERANCE * loss)
    trials: list[L2Trial] = []
    best = 0
    theta = best_theta = start
    for weight in weights:
        l2 = weight * unit
        for last in descend(
            trained,
            theta,
            method="newton",
            tol=tol,
            l2=l2,
            max_iterations=max_iterations,
        ):
            theta, logits = last.theta, at(last)
            # What is still to be gained is less than what the held-out loss lacks.
            if trials and last.gap < (
                validation.loss_of(logits) - trials[best].held_out_loss
            ):
                break
        trials.append(_trial(l2, last, logits, validation))
        if watch is not None:
            watch(trials[-1])
        if trials[-1].held_out_loss <= trials[best].held_out_loss:
            best, best_theta = len(trials) - 1, theta
        else:
            # Weaker weights take ever more iterations, and fit what is held out less.
            break
    if basis is not None:
        best_theta = problem.unrestricted(basis, best_theta)
    return L2Choice(trials[best].l2, best_theta, tuple(trials))


def principal_components(features: Array, hold: float) -> Array:
    """Directions that hold most of the features' squares, not centred.

    Args:
        features: Shape `(n, d)`.
        hold: The share of the squares to hold, at most 1.

    Returns:
        Orthonormal columns, as few as it takes, `(d, k)`.
    """
    values, vectors = scipy.linalg.eigh(features.T @ features, driver="evd")
    left_out = np.cumsum(np.maximum(values, 0.0))
    basis: Array = vectors[:, left_out > (1.0 - hold) * left_out[-1]]
    return basis


def hold_out(problem: ConvexProblem, seed: int) -> np.ndarray:
    """Which samples to hold out: a fifth of every class, at random.

    Args:
        problem: The problem.
        seed: Seed of the choice.

    Returns:
        Shape `(n,)`, bool; samples of weight 0 are never held out.

    Raises:
        ValueError: If there are fewer than five samples.
    """
    counted = np.flatnonzero(problem.weights)
    if len(counted) < 5:
        raise ValueError(
            "There are too few samples to hold some out. Received: l2='auto' with "
            f"{len(counted)} samples. Pass `validation_data`, or a number for `l2`."
        )
    order = np.random.default_rng(seed).permutation(counted)
    if not isinstance(problem.loss, SquaredError):
        # Sorted by class, every fifth one is a fifth of each.
        _, classes = np.unique(problem.targets[order], axis=0, return_inverse=True)
        order = order[np.argsort(classes.ravel(), kind="stable")]
    held_out = np.zeros(problem.n, dtype=bool)
    held_out[order[2 :: round(1 / _HELD_OUT)]] = True
    return held_out


def _kept_logits(iterate: Iterate) -> Array:
    return iterate.logits


def _new_logits(validation: ConvexProblem, iterate: Iterate) -> Array:
    return validation.logits(iterate.theta)


def _trial(
    l2: float, last: Iterate, logits: Array, validation: ConvexProblem
) -> L2Trial:
    error = None
    if not isinstance(validation.loss, SquaredError):
        if validation.units == 1:
            wrong = ((logits > 0) != (validation.targets > 0.5)).ravel()
        else:
            wrong = logits.argmax(axis=1) != validation.targets.argmax(axis=1)
        error = float(validation.weights @ wrong / validation.weights.sum())
    return L2Trial(
        l2=l2,
        train_loss=last.loss,
        held_out_loss=validation.loss_of(logits),
        held_out_error=error,
        iterations=last.iteration,
    )
