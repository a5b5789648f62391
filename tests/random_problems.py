"""Random convex problems of a head, with repeated inputs and conflicting labels."""

import dataclasses

import numpy as np

from keras_dalign.numerics.losses import (
    BinaryCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)
from keras_dalign.solving.problem import ConvexProblem

REDUCTIONS = ("sum_over_batch_size", "mean_with_sample_weight", "sum")
LOSSES = {
    "sparse": SoftmaxCrossEntropy(),
    "smoothed": SoftmaxCrossEntropy(sparse=False, label_smoothing=0.1),
    "soft": SoftmaxCrossEntropy(sparse=False),
    "binary": BinaryCrossEntropy(),
    "binary smoothed": BinaryCrossEntropy(label_smoothing=0.2),
    "squared": SquaredError(),
}


@dataclasses.dataclass
class Case:
    problem: ConvexProblem
    theta: np.ndarray
    groups: np.ndarray  # The number of each sample's input.
    lower_bound: float


def labels(name, rng, n, outputs):
    if name == "sparse":
        return rng.integers(0, outputs, n)
    if name == "smoothed":
        return np.eye(outputs)[rng.integers(0, outputs, n)]
    if name == "soft":
        return rng.dirichlet(np.full(outputs, 0.3), n)
    if name == "squared":
        return rng.standard_normal((n, outputs))
    return rng.integers(0, 2, (n, outputs)).astype(float)


def random_case(
    name,
    seed,
    *,
    n=12,
    outputs=3,
    repeats=0,
    weighted=False,
    reduction=None,
    width=6,
    share=False,
):
    """A head on `n` samples, of which the last `repeats` repeat earlier inputs."""
    rng = np.random.default_rng(seed)
    if outputs == 1 and name in {"sparse", "smoothed", "soft"}:
        outputs = 2
    loss = LOSSES[name]
    if reduction is not None:
        loss = dataclasses.replace(loss, reduction=reduction)
    p = 4
    u = rng.standard_normal((n, p))
    groups = np.arange(n)
    if repeats:
        groups[n - repeats :] = rng.integers(0, n - repeats, repeats)
    u = u[groups]
    u *= np.sqrt(p) / np.linalg.norm(u, axis=1, keepdims=True)
    features = np.concatenate([u, np.ones((n, 1))], axis=1)
    offset = rng.standard_normal((n, outputs))[groups]
    targets = loss.targets(labels(name, rng, n, outputs), outputs)
    weights = None
    if weighted:
        weights = rng.random(n) * 3
        weights[: n // 4] = 0.0
    gates = 1 if share else outputs
    problem = ConvexProblem(
        features,
        rng.standard_normal((p + 1, gates, width)) / np.sqrt(p + 1),
        rng.choice([-1.0, 1.0], (gates, width)) / np.sqrt(width),
        20.0,
        offset,
        targets,
        weights,
        loss,
    )
    theta = rng.standard_normal(problem.size) * rng.choice([0.0, 0.3, 3.0])
    bound = loss.lower_bound(targets, problem.weights, groups, n).sum()
    return Case(problem, theta, groups, float(bound) / problem.normalizer)


def minimised(case, iterations=300):
    """The same problem near its minimum."""
    from scipy.optimize import minimize

    result = minimize(
        case.problem.value_and_gradient,
        case.theta,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "ftol": 0.0, "gtol": 0.0},
    )
    return dataclasses.replace(case, theta=result.x)
