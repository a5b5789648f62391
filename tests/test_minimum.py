import dataclasses
import itertools

import numpy as np
import pytest
import scipy.optimize
from test_problem import LOSSES, dense, problem

from keras_dalign.solving.minimum import choose_method, minimize
from keras_dalign.solving.options import SolveOptions
from keras_dalign.solving.problem import ConvexProblem

# Every method with every loss that it is for.
METHODS = [("lbfgs", loss) for loss in LOSSES]
METHODS.append(("direct", "squared"))


def wide(loss="softmax", n=40, **arguments):
    """More features than samples: the loss can be brought to its lower bound."""
    return problem(loss, n=n, d=6, width=20, **arguments)


def run(of, start=None, **arguments):
    """All iterates, the last one included."""
    start = np.zeros(of.size) if start is None else start
    way = []
    last = minimize(of, start, on_iterate=way.append, **arguments)
    return [*way, last]


def scipy_minimum(of, l2):
    """The minimum on the explicit features, by another program."""
    phi, shape = dense(of), (of.n, of.units)

    def value_and_gradient(theta):
        logits = of.offset + (phi @ theta).reshape(shape)
        slopes = of.weights[:, None] * of.loss.gradient(logits, of.targets)
        value = of.weights @ of.loss.value(logits, of.targets) / of.normalizer
        change = theta - of.center
        gradient = phi.T @ slopes.ravel() / of.normalizer + l2 * change
        return value + l2 / 2 * change @ change, gradient

    found = scipy.optimize.minimize(
        value_and_gradient,
        of.center,
        jac=True,
        method="BFGS",
        options={"gtol": 1e-9, "maxiter": 5000},
    )
    return found.fun, found.x


@pytest.mark.parametrize(("method", "loss"), METHODS)
@pytest.mark.parametrize("l2", [0.05, 2.0])
def test_with_an_l2_term_there_is_one_minimum(method, loss, l2):
    of = problem(loss, n=12, d=4, units=2, width=3)
    rng = np.random.default_rng(0)
    way = run(of, rng.standard_normal(of.size), method=method, tol=1e-12, l2=l2)
    last = way[-1]
    value, theta = scipy_minimum(of, l2)
    assert last.reason == "gap"
    assert last.value == pytest.approx(value, abs=1e-9)
    np.testing.assert_allclose(last.theta, theta, atol=1e-4)
    # The gap is an upper bound on the way, too.
    for iterate in way:
        assert iterate.value - value <= iterate.gap + 1e-9
        assert iterate.value == pytest.approx(
            of.value_and_gradient(iterate.theta, l2)[0], rel=1e-9
        )


@pytest.mark.parametrize(
    ("method", "loss"), [case for case in METHODS if case[1] != "soft labels"]
)
def test_full_rank_reaches_the_lower_bound(method, loss):
    of = wide(loss)
    way = run(of, method=method, tol=1e-10)
    assert way[-1].reason == "gap"
    assert way[-1].loss <= 1e-10
    assert way[-1].loss == pytest.approx(
        of.value_and_gradient(way[-1].theta)[0], rel=1e-9
    )
    # Of the parameters themselves, not of logits summed up on the way.
    again = of.loss_of(of.logits(way[-1].theta))
    assert way[-1].loss == pytest.approx(again, rel=1e-12)
    values = np.array([iterate.value for iterate in way])
    assert (np.diff(values) < 0).all()
    assert [iterate.iteration for iterate in way] == list(range(len(way)))
    assert all(iterate.reason is None for iterate in way[:-1])
    assert way[-1].evaluations >= way[-1].iteration


def test_conflicting_labels_are_allowed_for():
    of = wide("softmax", n=30)
    features = of.features.copy()
    features[10:20] = features[:10]
    loss = of.loss
    of = ConvexProblem(
        features,
        of.gates.r,
        of.gates.w,
        of.slope,
        np.zeros((30, 3)),
        of.targets,
        None,
        loss,
    )
    groups = np.r_[:10, :10, 10:20]
    bound = loss.lower_bound(of.targets, of.weights, groups, 20).sum() / 30
    assert bound > 0.05
    last = run(of, method="lbfgs", tol=1e-9, lower_bound=bound)[-1]
    assert last.reason == "gap"
    assert 0 <= last.loss - bound <= 1e-9


@pytest.mark.parametrize("weighted", [True, False])
def test_closed_form_interpolates_with_the_least_change(weighted):
    of = wide("squared", weighted=weighted)
    start = np.random.default_rng(1).standard_normal(of.size)
    last = run(of, start, method="direct", tol=1e-14)[-1]
    assert last.reason == "gap"
    assert last.iteration <= 2
    rest = (of.targets - of.logits(start)).ravel()
    expected = start + np.linalg.lstsq(dense(of), rest, rcond=None)[0]
    np.testing.assert_allclose(last.theta, expected, atol=1e-8)


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["duplicates", "low rank", "weights of 0"])
def test_closed_form_of_deficient_rank(kind, l2):
    of = problem("squared", n=30, d=6, width=2 if kind == "low rank" else 20)
    features, weights = of.features.copy(), of.weights.copy()
    targets = of.targets.copy()
    if kind == "duplicates":
        features[10:20] = features[:10]
    elif kind == "low rank":
        features[:, 1:-1] = 0
    else:
        weights[::3] = 0
        targets[::3] = 1e6
    of = ConvexProblem(
        features,
        of.gates.r,
        of.gates.w,
        of.slope,
        of.offset,
        targets,
        weights,
        of.loss,
    )
    root = np.sqrt(2 / of.units * np.repeat(of.weights, of.units))
    rows = root[:, None] * dense(of)
    right = root * (of.targets - of.offset).ravel()
    rows = np.r_[rows, np.sqrt(l2) * np.eye(of.size)]
    right = np.r_[right, np.zeros(of.size)]
    theta = np.linalg.lstsq(rows, right, rcond=None)[0]
    best = brute(of, theta, l2)
    last = run(of, method="direct", tol=1e-9, l2=l2, max_iterations=20)[-1]
    # What takes eigenvalues at the rounding of the largest is out of its reach.
    assert last.value == pytest.approx(best, abs=1e-6, rel=0.02 if not l2 else 0.0)
    assert last.iteration <= 4
    reachable = l2 or kind == "weights of 0"
    assert last.reason == ("gap" if reachable else "stalled")


def brute(of, theta, l2):
    residuals = (of.offset.ravel() + dense(of) @ theta).reshape(of.n, -1) - of.targets
    return of.weights @ (residuals**2).mean(axis=1) + l2 / 2 * theta @ theta


def test_what_no_head_can_reach_stalls():
    of = problem("binary", n=60, d=2, width=2, units=1)
    of.targets = np.random.default_rng(0).integers(0, 2, (60, 1)).astype(float)
    of.center = np.zeros(of.size)
    last = run(of, method="lbfgs", tol=1e-9, max_iterations=500)[-1]
    assert last.reason == "stalled"
    assert last.gap > 0.1
    assert last.loss == pytest.approx(scipy_minimum(of, 0.0)[0], rel=1e-3)


@pytest.mark.parametrize("method", ["lbfgs", "direct"])
def test_a_minimum_above_the_lower_bound_is_left_alone(method):
    # Without features nothing can be fitted but the mean, which is where it starts.
    of = ConvexProblem(
        np.zeros((4, 2)),
        np.ones((2, 1, 3)),
        np.ones((1, 3)),
        20.0,
        np.zeros((4, 1)),
        np.array([[1.0], [-1.0], [1.0], [-1.0]]),
        None,
        LOSSES["squared"],
    )
    last = run(of, method=method, tol=1e-6)[-1]
    assert last.reason == "stalled"
    assert last.gap == last.loss > 0.5
    assert not last.theta.any()


def test_it_ends_where_the_gap_hardly_falls(monkeypatch):
    of = problem("binary", n=60, d=2, width=2, units=1)
    of.targets = np.random.default_rng(0).integers(0, 2, (60, 1)).astype(float)
    to_rounding = run(of, method="lbfgs", tol=1e-9)[-1]
    monkeypatch.setattr("keras_dalign.solving.minimum._STALL_ITERATIONS", 4)
    early = run(of, method="lbfgs", tol=1e-9)[-1]
    assert early.reason == "stalled"
    assert early.iteration < to_rounding.iteration
    assert early.loss < 1.02 * to_rounding.loss


def test_iterations_are_limited_and_a_good_start_is_left_alone():
    of = wide()
    way = run(of, method="lbfgs", tol=1e-12, max_iterations=3)
    assert way[-1].reason == "max_iterations"
    assert way[-1].iteration == 3
    done = run(of, method="lbfgs", tol=1e-8)[-1].theta
    (only,) = run(of, done, method="lbfgs", tol=1e-8)
    assert only.reason == "gap"
    assert only.iteration == 0
    np.testing.assert_array_equal(only.theta, done)


def test_one_sample_and_one_output():
    for loss in ("binary", "squared"):
        of = problem(loss, n=1, units=1)
        assert run(of, method="lbfgs", tol=1e-8)[-1].reason == "gap"


@pytest.fixture
def large(monkeypatch):
    """Any problem counts as large: products may be in float32 on the device."""
    monkeypatch.setattr("keras_dalign.solving.problem._LARGE", 1)
    monkeypatch.setattr("keras_dalign.solving.problem.has_accelerator", lambda: True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tol", [1e-6, 1e-12])
def test_products_in_float32_lead_to_the_same_minimum(loss, tol, large):
    of = problem(loss, n=60, d=8, width=6)
    start = np.random.default_rng(0).standard_normal(of.size)
    # Line searches end at the rounding of the value, which is large for this one.
    method = "direct" if loss == "squared" and tol < 1e-9 else "lbfgs"
    last = run(of, start, method=method, tol=tol, l2=0.01)[-1]
    assert last.reason == "gap"
    assert last.gap <= tol
    # The last iterate is measured in float64, and its gap allows for rounding.
    value, gradient = of.value_and_gradient(last.theta, 0.01)
    assert last.value == pytest.approx(value, rel=1e-14)
    assert last.gap >= gradient @ gradient / 0.02
    assert last.gap <= gradient @ gradient / 0.02 + 1e-13 + 0.1 * tol
    best = scipy_minimum(of, 0.01)[0]
    assert last.value - last.gap <= best + 1e-12
    assert best - 1e-12 <= last.value <= best + 2 * tol + 1e-9


def test_float32_takes_about_as_many_iterations(monkeypatch):
    exact = run(wide(), method="lbfgs", tol=1e-10)
    monkeypatch.setattr("keras_dalign.solving.problem._LARGE", 1)
    of = wide()
    rough = run(of, method="lbfgs", tol=1e-10)
    assert rough[-1].reason == "gap"
    assert abs(len(rough) - len(exact)) <= 3
    assert rough[-1].loss == pytest.approx(of.loss_of(of.logits(rough[-1].theta)))
    # Not for want of float32.
    assert (rough[1].logits != exact[1].logits).any()


@pytest.mark.parametrize("kind", ["wrong", "noise", "nothing"])
def test_where_float32_gets_no_farther_it_goes_on_in_float64(kind, large, monkeypatch):
    of = problem(n=60, d=8, width=6)
    exact = minimize(of, np.zeros(of.size), method="lbfgs", tol=1e-9, l2=1e-3)
    right = type(of.fast).loss_and_gradient
    noise = np.random.default_rng(0).standard_normal(of.size)

    def spoilt(self, theta, samples):
        *rest, found = right(self, theta, samples)
        wrong = {"wrong": -found, "noise": found + 1e-4 * noise, "nothing": 0 * found}
        return *rest, wrong[kind]

    monkeypatch.setattr(type(of.fast), "loss_and_gradient", spoilt)
    last = run(of, method="lbfgs", tol=1e-9, l2=1e-3)[-1]
    assert last.reason == "gap"
    assert last.value == pytest.approx(exact.value, abs=2e-9)


def test_a_path_need_not_end_in_float64(large, monkeypatch):
    of = problem(n=60, d=8, width=6)

    def refused(*_):
        raise RuntimeError("float64")

    monkeypatch.setattr(type(of.exact), "loss_and_gradient", refused)
    last = minimize(
        of, np.zeros(of.size), method="lbfgs", tol=0, part=1e-3, l2=0.1, exact=False
    )
    assert last.reason == "gap"
    assert last.gap <= 1e-3 * of.loss_of(of.offset)


def test_the_caller_can_stop_it():
    of = wide()
    seen = []

    def stop(iterate):
        seen.append(iterate)
        return iterate.iteration == 3

    last = minimize(of, np.zeros(of.size), method="lbfgs", tol=1e-12, on_iterate=stop)
    assert last.reason == "stopped"
    assert last.iteration == 3
    np.testing.assert_array_equal(last.theta, seen[-1].theta)


def test_steps_decrease_the_value_enough():
    # Armijo's condition, without which a line search may creep.
    of = problem("binary", n=60, d=4, width=3)
    way = run(of, method="lbfgs", tol=1e-9, l2=1e-4)
    for before, after in itertools.pairwise(way):
        slope = of.value_and_gradient(before.theta, 1e-4)[1]
        slope = float(slope @ (after.theta - before.theta))
        assert after.value <= before.value + 1e-4 * slope + 1e-15


def singular(n=200, rank=60, outputs=2):
    """Squared error on a Gram matrix of deficient rank, targets out of reach."""
    rng = np.random.default_rng(0)
    features = np.c_[rng.standard_normal((rank // 2, 3)), np.ones(rank // 2)]
    features = features[rng.integers(0, rank // 2, n)]
    return ConvexProblem(
        features,
        rng.standard_normal((4, 1, 40)),
        rng.choice([-1.0, 1.0], (1, 40)) / np.sqrt(40),
        20.0,
        np.zeros((n, outputs)),
        rng.standard_normal((n, outputs)),
        None,
        LOSSES["squared"],
    )


def test_a_singular_gram_matrix_ends_in_a_few_steps():
    of = singular()
    way = run(of, method="direct", tol=1e-8)
    assert way[-1].iteration <= 4
    assert way[-1].reason == "stalled"
    least = np.linalg.lstsq(dense(of), of.targets.ravel(), rcond=None)
    residual = (dense(of) @ least[0]).reshape(of.n, -1) - of.targets
    assert way[-1].loss == pytest.approx(np.sum(residual**2) / of.units, rel=1e-9)
    rank = np.linalg.matrix_rank(dense(of)[:: of.units])
    assert way[-1].dropped == of.n - rank
    assert way[-1].cutoff == of.n * np.finfo(float).eps


def test_an_iterate_is_never_changed_later():
    of = wide()
    way = []
    minimize(
        of,
        np.zeros(of.size),
        method="lbfgs",
        tol=1e-8,
        on_iterate=lambda it: way.append((it, it.theta.copy(), it.logits.copy())),
    )
    assert len(way) > 3
    for iterate, theta, logits in way:
        np.testing.assert_array_equal(iterate.theta, theta)
        np.testing.assert_array_equal(iterate.logits, logits)


def test_a_tolerance_below_machine_precision():
    of = wide()
    with pytest.raises(ValueError, match="below machine precision"):
        run(of, method="lbfgs", tol=1e-15, lower_bound=10.0)
    with pytest.raises(ValueError, match="machine precision"):
        SolveOptions(tol=1e-17)


def test_a_loss_that_overflows():
    of = wide("squared")
    with pytest.raises(ValueError, match="overflows"), np.errstate(over="ignore"):
        run(of, np.full(of.size, 1e200), method="lbfgs", tol=1e-3)


def test_method_auto():
    assert choose_method(wide(), "auto")[0] == "lbfgs"
    assert choose_method(wide("squared"), "auto")[0] == "direct"
    assert choose_method(wide("squared"), "lbfgs") == ("lbfgs", "as asked for")
    assert choose_method(wide("squared", n=4097), "auto")[0] == "lbfgs"
    with pytest.raises(ValueError, match=r"squared error alone.*softmax"):
        choose_method(wide(), "direct")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tol", 0.0),
        ("tol", -1e-3),
        ("tol", float("nan")),
        ("tol", "small"),
        ("tol", True),
        ("method", "sgd"),
        ("method", "newton"),
        ("l2", -1.0),
        ("l2", "much"),
        ("l2", float("inf")),
        ("l2", None),
        ("max_iterations", 0),
        ("max_iterations", 2.5),
    ],
)
def test_bad_options(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must.*Received: {name}="):
        SolveOptions.from_dict({name: value})


def test_options_from_a_dict():
    assert SolveOptions.from_dict({}) == SolveOptions()
    options = {
        "tol": 1e-3,
        "l2": "auto",
        "method": "lbfgs",
        "max_iterations": 5,
        "judge": "validation",
        "center": "base",
    }
    assert dataclasses.asdict(SolveOptions.from_dict(options)) == options
    with pytest.raises(ValueError, match=r"Received: \['step'\]"):
        SolveOptions.from_dict({"step": 1})
