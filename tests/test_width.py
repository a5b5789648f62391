import numpy as np
import pytest
from small import cross_entropy, digits, mlp
from test_l2_path import noisy
from test_problem import problem

import keras_dalign as kd
from keras_dalign.solving.held_out import HeldOut, hold_out
from keras_dalign.solving.minimum import minimize
from keras_dalign.solving.width import choose_width, nested


def gates(of, width, seed=0):
    """Nested gates that all outputs share."""
    rng = np.random.default_rng(seed)
    r = rng.standard_normal((width, of.d, 1)).transpose(1, 2, 0) / np.sqrt(of.d)
    return r, np.ones((1, width)) / np.sqrt(width)


def samples_at(of, mask):
    def samples(width):
        return HeldOut.part_of(of.with_gates(*gates(of, width)), mask)

    return samples


def test_twice_the_width_has_the_same_function():
    of = problem(d=6, units=3)
    rng = np.random.default_rng(1)
    for width in (1, 4):
        narrow, wide = (of.with_gates(*gates(of, m)) for m in (width, 2 * width))
        theta = rng.standard_normal(narrow.size)
        there = nested(theta, of.units, narrow.gates.w, wide.gates.w)
        assert there.shape == (wide.size,)
        np.testing.assert_allclose(
            wide.logits(there), narrow.logits(theta), atol=1e-13, rtol=1e-13
        )


def test_the_width_is_doubled_until_that_does_not_help():
    of = noisy(n=400, noise=0.5)
    mask = hold_out(of, 0)
    seen = []
    choice = choose_width(
        samples_at(of, mask),
        np.zeros(of.with_gates(*gates(of, 2)).size),
        first=2,
        largest=1000,
        l2=1e-3,
        tol=1e-7,
        on_trial=seen.append,
    )
    assert tuple(seen) == choice.trials
    widths = [trial.width for trial in choice.trials]
    assert widths == [2 * 2**k for k in range(len(widths))]
    *helped, last = choice.trials[1:]
    assert all(trial.change > trial.standard_error for trial in helped)
    assert not last.change > last.standard_error
    assert choice.width == last.width // 2
    # Every width against a problem that never saw the samples held out.
    for trial in choice.trials:
        wide = of.with_gates(*gates(of, trial.width))
        some, rest = (wide.subset(np.flatnonzero(part)) for part in (~mask, mask))
        theta = minimize(
            some, np.zeros(some.size), method="lbfgs", tol=1e-7, l2=1e-3
        ).theta
        expected = rest.loss_of(rest.logits(theta))
        assert trial.held_out_loss == pytest.approx(expected, rel=2e-2)


def test_no_wider_than_the_largest():
    of = noisy(n=400, noise=0.0)
    choice = choose_width(
        samples_at(of, hold_out(of, 0)),
        np.zeros(of.with_gates(*gates(of, 1)).size),
        first=1,
        largest=3,
        l2=1e-4,
        tol=1e-7,
    )
    assert choice.width == 2
    assert [trial.width for trial in choice.trials] == [1, 2]


def trained(n=300, **arguments):
    x, y = digits(n)
    base = mlp()
    base.compile("adam", loss=cross_entropy())
    base.fit(x, y, epochs=3, verbose=0)
    return kd.align(base, n_samples=n, seed=1, **arguments), x, y


@pytest.mark.parametrize("l2", [1e-2, "auto"])
def test_solve_chooses_the_width_with_an_l2_term(l2):
    model, x, y = trained()
    assert model.head.width is None
    result = kd.solve(model, x, y, l2=l2, verbose=0)
    assert result.converged
    assert result.widths[0].width == 8
    assert result.width == model.head.width
    assert result.width in {trial.width for trial in result.widths}
    assert result.width <= model.head.default_width()
    assert f"The width {result.width} was chosen on held-out samples:\n" in str(result)
    assert result.to_dict()["widths"][0]["width"] == 8
    assert model.switch_report.rank is None
    # The certificate is that of the same problem on the same width.
    assert result.certificate.l2_loss == pytest.approx(result.value, rel=1e-5)
    assert result.certificate.l2_gap <= 2e-6


def test_a_width_that_was_asked_for_wins():
    model, x, y = trained(width=20)
    result = kd.solve(model, x, y, l2="auto", verbose=0)
    assert result.widths is None
    assert result.width == model.head.width == 20


def test_without_an_l2_term_the_width_is_that_of_the_rank():
    model, x, y = trained()
    result = kd.solve(model, x, y, l2=0, verbose=0)
    assert result.widths is None
    assert model.head.width == model.head.default_width()
    assert model.switch_report.rank.full


def test_learned_gates_have_a_width_of_their_own():
    model, x, y = trained(gates="learned")
    width = model.head.width
    result = kd.solve(model, x, y, l2="auto", verbose=0)
    assert result.widths is None
    assert model.head.width == width


def test_validation_data_judge_the_width():
    model, x, y = trained()
    others = digits(500)
    validation = others[0][300:], others[1][300:]
    result = kd.solve(model, x, y, l2=1e-2, validation_data=validation, verbose=0)
    assert result.converged
    assert result.widths[0].held_out_error is not None


def test_fit_chooses_the_width_too(capsys):
    x, y = digits(200)
    model = kd.align(mlp(), n_samples=200, seed=0)
    options = {"l2": "auto"}
    optimizer = kd.DAlign("adam", "solve", solve_options=options)
    model.compile(optimizer, loss=cross_entropy())
    history = model.fit(x, y, epochs=3, verbose=2).history
    assert history["gap"][-1] <= 2e-6
    assert model.head.width <= model.head.default_width()
    text = capsys.readouterr().out
    assert "width 8: held-out loss" in text
    assert "l2=1e+00: held-out loss" in text
    regularised = kd.certify(model, x, y, l2=1e-3)
    assert regularised.l2_loss > 0


def test_a_huge_number_of_samples_needs_no_units_with_an_l2_term():
    x, y = digits(200)
    base = mlp()
    base.compile("adam", loss=cross_entropy())
    model = kd.align(base, n_samples=10**12, seed=0)
    result = kd.solve(model, x, y, l2=1e-2, verbose=0)
    assert result.converged
