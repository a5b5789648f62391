import json
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_dalign as kd
from keras_dalign.certification import quadratic_bound
from keras_dalign.certification.quadratic_bound import QuadraticTally, quadratic_parts
from keras_dalign.head.objective import loss_of
from keras_dalign.numerics import quadratic

L = keras.losses
BACKEND = keras.backend.backend()
# JAX has no float64 unless it is told before it starts.
PRECISE = "float32" if BACKEND == "jax" else "float64"


def model_of(d=3, units=1, width=4, kind="step", penalty=0.05, seed=0, dtype=PRECISE):
    head = kd.QuadraticHead(units, width, kind, penalty, seed=seed, dtype=dtype)
    return keras.Sequential([keras.Input((d,), dtype=dtype), head])


def points(n=20, d=3, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def objective(model, x, y, w, weights=None, loss="mse"):
    """The objective at any weights, with explicit matrices."""
    head = model.layers[-1]
    convex = loss_of(model, loss)
    weights = np.ones(len(x)) if weights is None else weights
    matrices = np.einsum("icr,jcr->crij", w, w)
    x = x.astype(PRECISE).astype("float64")
    f = np.einsum("nr,ni,crij,nj->nc", head.gates_exactly(x), x, matrices, x)
    values = convex.value(f, convex.targets(y, head.units))
    total = weights @ values / convex.normalizer(len(x), weights.sum())
    return total + head.penalty * np.sum(np.trace(matrices, axis1=2, axis2=3) ** 2)


def relaxed_minimum(gates, x, y, penalty, steps=6000):
    """The minimum of mean squared error over positive semi-definite matrices.

    By accelerated projected gradient, started anew wherever the objective rises.
    """
    d, m = x.shape[1], gates.shape[1]
    design = np.einsum("nr,ni,nj->nrij", gates, x, x).reshape(len(x), -1)
    eye = np.eye(d)

    def value(matrices):
        residual = design @ matrices.ravel() - y
        traces = np.trace(matrices, axis1=1, axis2=2)
        return residual @ residual / len(x) + penalty * traces @ traces

    step = 1 / (2 * np.linalg.norm(design, 2) ** 2 / len(x) + 2 * penalty * d)
    matrices = ahead = np.zeros((m, d, d))
    momentum, least = 1.0, value(matrices)
    for _ in range(steps):
        residual = design @ ahead.ravel() - y
        slope = (2 / len(x) * residual @ design).reshape(m, d, d)
        slope += 2 * penalty * np.trace(ahead, axis1=1, axis2=2)[:, None, None] * eye
        values, vectors = np.linalg.eigh(ahead - step * slope)
        new = (vectors * np.maximum(values, 0)[:, None, :]) @ vectors.swapaxes(1, 2)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / following * (new - matrices)
        matrices, momentum = new, following
        reached = value(matrices)
        if reached > least:
            ahead, momentum = matrices, 1.0
        least = min(least, reached)
    return least


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_bound_meets_the_convex_problem_solved_otherwise(seed):
    x, y = points(seed=seed), points(d=1, seed=seed + 10)
    model = model_of(kind="one", seed=seed)
    head = model.layers[-1]
    result = kd.solve_quadratic(model, x, y, loss="mse", tol=1e-11)
    x = x.astype(PRECISE).astype("float64")
    least = relaxed_minimum(head.gates_exactly(x), x, y[:, 0], head.penalty)
    bound = kd.certify(model, x, y, loss="mse").quadratic_bound
    precision = 1e-6 if PRECISE == "float32" else 1e-10
    assert result.value == pytest.approx(least, abs=precision)
    assert bound.value == pytest.approx(result.value, rel=1e-12)
    assert 0 < bound.gap < 100 * precision
    assert bound.lower_bound <= least + 1e-10
    assert bound.rounding < 1e-13
    # Away from the minimum it is an upper bound, and no idle one.
    w = keras.ops.convert_to_numpy(head.w)
    for scale in (1e-3, 0.1, 1.0):
        rng = np.random.default_rng(seed)
        head.w.assign(w + scale * rng.standard_normal(w.shape))
        bound = kd.certify(model, x, y, loss="mse").quadratic_bound
        assert bound.gap >= bound.value - least - 1e-10
        assert bound.gap <= bound.value * (1 + 1e-12)


CASES = {
    "squared error": ("mse", lambda rng, n: rng.standard_normal((n, 2))),
    "binary": (
        L.BinaryCrossentropy(from_logits=True),
        lambda rng, n: rng.integers(2, size=(n, 2)).astype("float32"),
    ),
    "softmax, a sum": (
        L.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"),
        lambda rng, n: rng.integers(2, size=n),
    ),
}


@pytest.fixture(scope="module")
def models():
    return {kind: model_of(units=2, kind=kind) for kind in ("step", "relu", "one")}


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    kind=st.sampled_from(["step", "relu", "one"]),
    penalty=st.floats(1e-4, 10.0),
    size=st.floats(0.0, 10.0),
    other=st.floats(0.0, 3.0),
    weighted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_no_other_weights_are_better_by_more(
    models, case, kind, penalty, size, other, weighted, seed
):
    model, (loss, labels) = models[kind], CASES[case]
    head = model.layers[-1]
    head.penalty = penalty
    rng = np.random.default_rng(seed)
    x, y = points(n=11, seed=seed), labels(rng, 11)
    weights = rng.random(11) * rng.integers(2, size=11) if weighted else np.ones(11)
    weights[0] = 1.0
    convex = loss_of(model, loss)
    head.w.assign(size * rng.standard_normal(head.w.shape))
    tally = QuadraticTally(*quadratic_parts(model), convex)
    for rows in (slice(0, 4), slice(4, 11)):
        tally.add(x[rows].astype(PRECISE), y[rows], weights[rows])
    bound = tally.bound(convex.normalizer(11, weights.sum()), 0.0)
    w = keras.ops.convert_to_numpy(head.w).astype("float64")
    here = objective(model, x, y, w, weights, loss)
    assert bound.value == pytest.approx(here, rel=1e-10)
    assert bound.value == pytest.approx(bound.loss + here - bound.loss, rel=1e-10)
    rivals = [0 * w, other * w, w + 0.1 * rng.standard_normal(w.shape)]
    rivals += [other * rng.standard_normal(w.shape) for _ in range(4)]
    for rival in rivals:
        there = objective(model, x, y, rival, weights, loss)
        assert here - there <= bound.gap + 1e-12 * here


def test_the_allowance_covers_the_rounding():
    # Features and weights of very different sizes, whose products cancel.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 6)) * np.logspace(-3, 3, 6)
    y = rng.standard_normal((40, 1))
    model = model_of(d=6, kind="relu", width=5, penalty=1e-3)
    head = model.layers[-1]
    kd.solve_quadratic(model, x, y, loss="mse", tol=1e-12)
    bound = kd.certify(model, x, y, loss="mse").quadratic_bound
    u, w, gates, targets = (
        np.asarray(array, dtype=np.longdouble)
        for array in (
            x.astype(PRECISE),
            keras.ops.convert_to_numpy(head.w),
            head.gates_exactly(x.astype(PRECISE)),
            y,
        )
    )
    f = np.einsum("nr,nr->n", gates, (u @ w[:, 0]) ** 2)
    slopes = 2 * (f - targets[:, 0]) / 40
    moments = np.einsum("n,nr,ni,nj->rij", slopes, gates, u, u)
    mu = np.minimum(quadratic.smallest_eigenvalues(moments.astype("float64")), 0)
    quartic = head.penalty * np.sum(np.sum(w**2, axis=0) ** 2)
    gap = quartic + slopes @ f + np.sum(mu**2) / (4 * head.penalty)
    gap = min(gap, quartic + np.mean((f - targets[:, 0]) ** 2))
    assert abs(float(bound.gap - bound.rounding - max(gap, 0))) < bound.rounding


def test_the_bound_closes_with_the_number_of_units():
    x, y = points(60, 12), points(60, 1, seed=1)
    gaps = []
    for width in (4, 32, 256):
        model = model_of(12, width=width)
        kd.solve_quadratic(model, x, y, loss="mse", tol=1e-7)
        bound = kd.certify(model, x, y, loss="mse").quadratic_bound
        gaps.append(bound.gap / bound.value)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.05
    assert gaps[-1] < 1e-3


def test_the_penalty_counts_as_data_do_in_batches_of_any_size():
    x, y = points(), points(d=1, seed=1)
    model = model_of(dtype="float32")
    model.compile(loss="mse")
    whole, parts = (
        kd.certify(model, x, y, batch_size=size).quadratic_bound for size in (20, 3)
    )
    assert parts.value == pytest.approx(whole.value, rel=1e-12)
    assert parts.gap == pytest.approx(whole.gap, rel=1e-9)
    assert whole.value == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)
    assert whole.penalty == model.layers[-1].penalty
    assert whole.lower_bound == whole.value - whole.gap


def test_no_bound_is_below_that_of_any_function():
    x = np.zeros((4, 3)) + points(1)
    y = np.array([[0.0], [1.0], [0.0], [1.0]])
    certificate = kd.certify(model_of(kind="one", penalty=1e-9), x, y, loss="mse")
    assert certificate.lower_bound == pytest.approx(0.25)
    bound = certificate.quadratic_bound
    assert bound.lower_bound == pytest.approx(0.25, rel=1e-12)
    assert bound.lower_bound <= 0.25


def test_certificates_say_it():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    features = keras.layers.Dense(3, activation="softplus")(inputs)
    model = keras.Model(inputs, kd.QuadraticHead(1, 8, seed=0)(features))
    x, y = points(d=5).astype("float32"), points(d=1, seed=1)
    certificate = kd.certify(model, x, y, loss="mse")
    bound = certificate.quadratic_bound
    assert bound.loss == pytest.approx(certificate.loss, rel=1e-5)
    assert "penalty 0.001 of its quadratic head, the objective is" in str(certificate)
    assert json.loads(json.dumps(certificate.to_dict()))["quadratic_bound"]["gap"] > 0
    assert bound.to_dict()["value"] == bound.value
    assert "its global gap" in certificate._repr_html_()
    assert len(inputs._keras_history.operation._outbound_nodes) == 1


def test_other_models_have_none():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    behind = keras.layers.Rescaling(2.0)(kd.QuadraticHead(1, 2, seed=0)(inputs))
    x, y = points().astype("float32"), points(d=1, seed=1)
    for model in (
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]),
        keras.Model(inputs, behind),
    ):
        assert kd.certify(model, x, y, loss="mse").quadratic_bound is None
        assert quadratic_parts(model) is None


def test_overflow_and_memory(monkeypatch):
    model = model_of()
    x, y = points(), points(d=1, seed=1)
    tally = QuadraticTally(*quadratic_parts(model), loss_of(model, "mse"))
    tally.add(x.astype(PRECISE), 1e300 * y, None)
    with pytest.raises(ValueError, match="quadratic head overflows float64"):
        tally.bound(20.0, 0.0)
    monkeypatch.setattr(quadratic_bound, "free_gib", lambda: 1e-9)
    with pytest.raises(MemoryError, match="Use fewer units or features"):
        kd.certify(model, x, y, loss="mse")
