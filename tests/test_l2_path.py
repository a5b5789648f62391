import numpy as np
import pytest
from test_problem import problem

from keras_dalign.solving.held_out import HeldOut, hold_out
from keras_dalign.solving.l2_path import choose_l2
from keras_dalign.solving.minimum import minimize
from keras_dalign.solving.principal_components import principal_components
from keras_dalign.solving.problem import ConvexProblem


def noisy(n=120, seed=0, loss="softmax", noise=1.0):
    """Labels that follow the logits of a small `theta`, but for noise."""
    of = problem(loss, n=n, d=6, width=8, weighted=False, seed=seed)
    rng = np.random.default_rng([seed, 1])
    of.center = np.zeros(of.size)
    of.offset = np.zeros_like(of.offset)
    logits = of.product(rng.standard_normal(of.size))
    logits += noise * rng.standard_normal(logits.shape)
    of.targets = np.eye(of.units)[logits.argmax(axis=1)]
    return of


def path(of, start=None, seed=0, validation=None, **arguments):
    """The path judged by a fifth of the samples, or by others."""
    samples = HeldOut.part_of(of, hold_out(of, seed))
    if validation is not None:
        samples = HeldOut.other(of, validation)
    start = np.zeros(of.size) if start is None else start
    return choose_l2(samples, start, **arguments)


def test_a_fifth_of_every_class_is_held_out():
    of = noisy(n=200)
    held_out = hold_out(of, 0)
    classes = of.targets.argmax(axis=1)
    for c in range(of.units):
        of_class = np.count_nonzero(classes == c)
        assert abs(np.count_nonzero(held_out[classes == c]) - of_class / 5) <= 1
    np.testing.assert_array_equal(held_out, hold_out(of, 0))
    assert (held_out != hold_out(of, 1)).any()
    of.weights[:50] = 0
    assert not hold_out(of, 0)[:50].any()
    assert np.count_nonzero(hold_out(of, 0)) == 30


def test_the_weight_of_the_least_held_out_loss_wins():
    of = noisy(noise=2.0)
    seen = []
    choice = path(of, tol=1e-8, seed=3, on_trial=seen.append)
    assert tuple(seen) == choice.trials
    weights = [trial.l2 for trial in choice.trials]
    assert weights == sorted(weights, reverse=True)
    losses = [trial.held_out_loss for trial in choice.trials]
    assert choice.l2 == weights[int(np.argmin(losses))]
    # Neither the strongest nor the weakest: there is noise, and something to learn.
    assert 0 < np.argmin(losses) < len(losses) - 1
    # Every one against a problem that never saw the samples held out.
    held_out = hold_out(of, 3)
    some, rest = (
        of.subset(np.flatnonzero(~held_out)),
        of.subset(np.flatnonzero(held_out)),
    )
    *finished, given_up = choice.trials
    assert given_up.held_out_loss > choice.trials[-2].held_out_loss
    for trial in finished:
        last = minimize(some, np.zeros(of.size), method="lbfgs", tol=1e-7, l2=trial.l2)
        logits = rest.logits(last.theta)
        assert trial.held_out_loss == pytest.approx(rest.loss_of(logits), rel=2e-2)
        assert trial.train_loss == pytest.approx(last.loss, rel=2e-2, abs=2e-3)
        error = np.mean(logits.argmax(axis=1) != rest.targets.argmax(axis=1))
        assert trial.held_out_error == pytest.approx(error, abs=0.05)


def test_a_weight_that_cannot_win_is_given_up():
    of = noisy(noise=2.0)
    choice = path(of, tol=1e-12)
    last = choice.trials[-1]
    some = of.reweighted((~hold_out(of, 0)).astype(float))
    whole = []
    arguments = {"tol": 0.0, "part": 1e-3, "l2": last.l2, "on_iterate": whole.append}
    minimize(some, choice.last.theta, method="lbfgs", **arguments)
    assert last.iterations < len(whole)
    there = whole[last.iterations]
    assert last.train_loss == there.loss
    # What it lacks is more than what is left to gain, and stays so to the end.
    best = choice.trials[-2].held_out_loss
    assert last.held_out_loss - best > there.gap
    rest = of.reweighted(hold_out(of, 0).astype(float))
    assert rest.loss_of(whole[-1].logits) > best


def test_the_path_of_a_sum_is_that_of_the_mean():
    mean = noisy()
    total = noisy()
    total.normalizer = 1.0
    total.loss = type(total.loss)(reduction="sum")
    by_mean = path(mean, tol=1e-8)
    by_sum = path(total, tol=1e-8)
    assert by_sum.l2 == pytest.approx(by_mean.l2 * mean.n)


def test_validation_samples_instead():
    of = noisy(seed=1)
    other = noisy(n=60, seed=1)
    choice = path(of, tol=1e-8, validation=other)
    last = minimize(
        of, np.zeros(of.size), method="lbfgs", tol=1e-7, l2=choice.trials[0].l2
    )
    expected = other.loss_of(other.logits(last.theta))
    assert choice.trials[0].held_out_loss == pytest.approx(expected, rel=1e-2)


def test_samples_the_trunk_has_seen_do_not_vouch_for_weak_weights():
    # No noise: the weaker the weight, the lower the loss of any sample.
    of = noisy(n=600, noise=0.0)
    seen = path(of, tol=1e-10)
    assert seen.l2 == seen.trials[-1].l2 == 1e-3
    new = path(of, tol=1e-10, validation=noisy(n=600, noise=0.0))
    assert new.l2 < 1e-4
    np.testing.assert_array_equal(
        [trial.l2 for trial in new.trials[:4]], [trial.l2 for trial in seen.trials]
    )


def flat(share, seed=0):
    """Ten features of 200 samples, four of which hold only a share of the squares."""
    of = noisy(n=200, seed=seed)
    rng = np.random.default_rng([seed, 2])
    features = rng.standard_normal((200, 10))
    features[:, 6:] *= np.sqrt(share * 6 / 4)
    features[:, -1] = 1.0
    turned = np.linalg.qr(rng.standard_normal((9, 9)))[0]
    features[:, :-1] = features[:, :-1] @ turned
    gates = rng.standard_normal((10, of.units, of.width))
    return ConvexProblem(
        features, gates, of.gates.w, of.slope, of.offset, of.targets, None, of.loss
    )


def test_principal_components_hold_what_they_should():
    of = flat(1e-4)
    features = of.features
    values = np.linalg.svd(features, compute_uv=False) ** 2
    for hold in (0.5, 0.95, 1.0):
        basis = principal_components(of.rows, hold)
        k = basis.shape[1]
        np.testing.assert_allclose(basis.T @ basis, np.eye(k), atol=1e-12)
        held = np.sum((features @ basis) ** 2) / np.sum(features**2)
        assert held >= hold - 1e-6
        # As few as it takes.
        assert values[: k - 1].sum() / values.sum() < hold + 1e-6
    assert principal_components(of.rows, 0.95).shape == (10, 7)


def test_squared_error_has_no_error_rate():
    of = problem("squared", n=50, d=6, width=8)
    choice = path(of, tol=1e-6)
    assert all(trial.held_out_error is None for trial in choice.trials)
    assert "error" not in str(choice.trials[0])


def test_one_output():
    of = problem("binary", n=50, units=1)
    of.targets = np.random.default_rng(0).integers(0, 2, (50, 1)).astype(float)
    trial = path(of, tol=1e-6).trials[0]
    assert 0 < trial.held_out_error < 1


def test_too_few_samples():
    assert hold_out(problem(n=4), seed=0) is None
    assert hold_out(problem(n=5), seed=0).sum() == 1
