import dataclasses

import numpy as np
import pytest
import scipy.optimize
from test_problem import LOSSES, dense, problem

from keras_dalign.numerics.losses import SquaredError
from keras_dalign.solving.descent import choose_method, descend
from keras_dalign.solving.options import SolveOptions
from keras_dalign.solving.problem import ConvexProblem

# Every method with every loss that it is for.
METHODS = [(m, loss) for m in ("lbfgs", "newton") for loss in LOSSES]
METHODS.append(("direct", "squared"))


def wide(loss="softmax", n=40, **arguments):
    """More features than samples: the loss can be brought to its lower bound."""
    return problem(loss, n=n, d=6, width=20, **arguments)


def run(of, start=None, **arguments):
    start = np.zeros(of.size) if start is None else start
    return list(descend(of, start, **arguments))


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
    assert way[-1].loss == of.loss_of(of.logits(way[-1].theta))
    values = np.array([iterate.value for iterate in way])
    assert (np.diff(values) < 0).all()
    assert [iterate.iteration for iterate in way] == list(range(len(way)))
    assert all(iterate.reason is None for iterate in way[:-1])
    assert way[-1].evaluations >= way[-1].iteration
    assert (way[-1].hessian_products > 0) == (method == "newton")


@pytest.mark.parametrize("method", ["lbfgs", "newton"])
def test_conflicting_labels_are_allowed_for(method):
    of = wide("softmax", n=30)
    features = of.features.copy()
    features[10:20] = features[:10]
    loss = of.loss
    of = ConvexProblem(
        features, of.r, of.w, of.slope, np.zeros((30, 3)), of.targets, None, loss
    )
    groups = np.r_[:10, :10, 10:20]
    bound = loss.lower_bound(of.targets, of.weights, groups, 20).sum() / 30
    assert bound > 0.05
    last = run(of, method=method, tol=1e-9, lower_bound=bound)[-1]
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
        features, of.r, of.w, of.slope, of.offset, targets, weights, of.loss
    )
    root = np.sqrt(2 / of.units * np.repeat(of.weights, of.units))
    rows = root[:, None] * dense(of)
    right = root * (of.targets - of.offset).ravel()
    rows = np.r_[rows, np.sqrt(l2) * np.eye(of.size)]
    right = np.r_[right, np.zeros(of.size)]
    theta = np.linalg.lstsq(rows, right, rcond=None)[0]
    best = brute(of, theta, l2)
    last = run(of, method="direct", tol=1e-9, l2=l2, max_iterations=20)[-1]
    assert last.value == pytest.approx(best, abs=1e-6)
    reachable = l2 or kind == "weights of 0"
    assert last.reason == ("gap" if reachable else "stalled")


def brute(of, theta, l2):
    residuals = (of.offset.ravel() + dense(of) @ theta).reshape(of.n, -1) - of.targets
    return of.weights @ (residuals**2).mean(axis=1) + l2 / 2 * theta @ theta


@pytest.mark.parametrize("method", ["lbfgs", "newton"])
def test_what_no_head_can_reach_stalls(method):
    of = problem("binary", n=60, d=2, width=2, units=1)
    of.targets = np.random.default_rng(0).integers(0, 2, (60, 1)).astype(float)
    of.center = np.zeros(of.size)
    last = run(of, method=method, tol=1e-9, max_iterations=500)[-1]
    assert last.reason == "stalled"
    assert last.gap > 0.1
    assert last.loss == pytest.approx(scipy_minimum(of, 0.0)[0], rel=1e-3)


@pytest.mark.parametrize("method", ["lbfgs", "newton", "direct"])
def test_a_minimum_above_the_lower_bound_is_left_alone(method):
    # Without features nothing can be fitted but the mean, which is where it starts.
    of = problem("squared", n=4, units=1, weighted=False)
    of.targets = np.array([[1.0], [-1.0], [1.0], [-1.0]])
    of.offset = np.zeros((4, 1))
    of._gates[:] = 0
    of.gram = lambda output: np.ones((4, 4))
    last = run(of, method=method, tol=1e-6)[-1]
    assert last.reason == "stalled"
    assert last.iteration == 0
    assert not last.theta.any()


def test_it_ends_where_the_gap_hardly_falls(monkeypatch):
    of = problem("binary", n=60, d=2, width=2, units=1)
    of.targets = np.random.default_rng(0).integers(0, 2, (60, 1)).astype(float)
    to_rounding = run(of, method="lbfgs", tol=1e-9)[-1]
    monkeypatch.setattr("keras_dalign.solving.descent._STALL_ITERATIONS", 4)
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
        for method in ("lbfgs", "newton"):
            assert run(of, method=method, tol=1e-8)[-1].reason == "gap"


@pytest.fixture
def many_features(monkeypatch):
    """Any number of features counts as many: products may be in single precision."""
    return lambda: monkeypatch.setattr("keras_dalign.solving.problem._MANY_FEATURES", 1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tol", [1e-6, 1e-12])
def test_steps_in_single_precision_reach_the_same_minimum(loss, tol, many_features):
    of = problem(loss, n=60, d=8, width=6)
    start = np.random.default_rng(0).standard_normal(of.size)
    arguments = {"method": "newton", "tol": tol, "l2": 0.01}
    exact = run(of, start, **arguments)
    many_features()
    rough = run(of, start, **arguments)
    assert rough[-1].reason == "gap"
    assert rough[-1].gap <= tol
    assert rough[-1].value == pytest.approx(exact[-1].value, abs=2 * tol)
    assert len(rough) <= len(exact) + 2
    # The last word is in float64.
    value, gradient = of.value_and_gradient(rough[-1].theta, 0.01)
    assert rough[-1].value == pytest.approx(value, rel=1e-14)
    assert gradient @ gradient / 0.02 == pytest.approx(rough[-1].gap, rel=1e-6)
    # Iterates are measured in the precision of the moment; a quadratic in float64.
    for iterate in rough:
        value = of.value_and_gradient(iterate.theta, 0.01)[0]
        accuracy = 1e-9 if loss == "squared" else 1e-4
        assert iterate.value == pytest.approx(value, rel=accuracy)


def test_lbfgs_in_single_precision_takes_as_many_iterations(many_features):
    of = wide()
    exact = run(of, method="lbfgs", tol=1e-10)
    many_features()
    rough = run(of, method="lbfgs", tol=1e-10)
    assert rough[-1].reason == "gap"
    assert abs(len(rough) - len(exact)) <= 2
    assert rough[-1].loss == of.loss_of(of.logits(rough[-1].theta))
    # Not for want of single precision.
    assert (rough[1].logits != exact[1].logits).any()


@pytest.mark.parametrize("method", ["lbfgs", "newton"])
def test_where_single_precision_gets_no_farther_it_goes_on_in_float64(
    method, many_features, monkeypatch
):
    of = wide()
    many_features()
    product = ConvexProblem.transposed_product

    def useless(self, cotangents, dtype=np.float64):
        return (-1.0 if dtype == np.float32 else 1.0) * product(self, cotangents, dtype)

    monkeypatch.setattr(ConvexProblem, "transposed_product", useless)
    way = run(of, method=method, tol=1e-10)
    assert way[-1].reason == "gap"
    assert way[-1].loss <= 1e-10


@pytest.mark.parametrize("kind", ["noise", "nothing"])
def test_a_gradient_that_is_rounding_is_computed_in_float64(
    kind, many_features, monkeypatch
):
    of = problem(n=60, d=8, width=6)
    arguments = {"method": "newton", "tol": 1e-9, "l2": 1e-3}
    exact = run(of, **arguments)
    many_features()
    product = ConvexProblem.transposed_product
    noise = np.random.default_rng(0).standard_normal(of.size)

    def rounded(self, cotangents, dtype=np.float64):
        found = product(self, cotangents, dtype)
        if dtype == np.float32:
            found = found + 1e-4 * noise if kind == "noise" else 0.0 * found
        return found

    monkeypatch.setattr(ConvexProblem, "transposed_product", rounded)
    way = run(of, **arguments)
    assert way[-1].reason == "gap"
    assert way[-1].value == pytest.approx(exact[-1].value, abs=2e-9)
    # Where it gets no farther it soon stops trying.
    assert len(way) <= len(exact) + 4


@pytest.mark.parametrize("method", ["lbfgs", "newton"])
def test_what_stalled_is_measured_from_its_parameters(method, many_features):
    of = problem("binary", n=60, d=2, width=2, units=1)
    of.targets = np.random.default_rng(0).integers(0, 2, (60, 1)).astype(float)
    many_features()
    last = run(of, method=method, tol=1e-9, max_iterations=500)[-1]
    assert last.reason == "stalled"
    np.testing.assert_array_equal(last.logits, of.logits(last.theta))
    assert last.loss == of.loss_of(last.logits)


def test_an_iterate_is_never_changed_later():
    of = wide()
    way = [
        (iterate, iterate.theta.copy(), iterate.logits.copy())
        for iterate in descend(of, np.zeros(of.size), method="lbfgs", tol=1e-8)
    ]
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
    assert choose_method(wide(), "auto", 0.0)[0] == "lbfgs"
    assert choose_method(wide(), "auto", 0.1)[0] == "newton"
    assert choose_method(wide("squared"), "auto", 0.0)[0] == "direct"
    assert choose_method(wide("squared"), "newton", 0.0) == ("newton", "as asked for")
    large = wide("squared", n=4097)
    method, why = choose_method(large, "auto", 0.0)
    assert method == "newton"
    assert "4097" in why
    with pytest.raises(ValueError, match=r"squared error alone.*softmax"):
        choose_method(wide(), "direct", 0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tol", 0.0),
        ("tol", -1e-3),
        ("tol", float("nan")),
        ("tol", "small"),
        ("tol", True),
        ("method", "sgd"),
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
        SolveOptions.of({name: value})


def test_options_from_a_dict():
    assert SolveOptions.of({}) == SolveOptions()
    options = {"tol": 1e-3, "l2": "auto", "method": "newton", "max_iterations": 5}
    assert dataclasses.asdict(SolveOptions.of(options)) == options
    with pytest.raises(ValueError, match=r"Received: \['step'\]"):
        SolveOptions.of({"step": 1})


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_squared_error_by_conjugate_gradients_takes_few_newton_steps(l2):
    of = wide("squared")
    way = run(of, method="newton", tol=1e-9, l2=l2)
    assert isinstance(of.loss, SquaredError)
    assert way[-1].iteration <= 4
    assert way[-1].hessian_products <= 4 * of.n * of.units
