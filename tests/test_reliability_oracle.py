"""A part of `python -m reliability oracle`, and that it finds what is wrong."""

import argparse
import dataclasses

import mpmath
import numpy as np
import pytest

from reliability import oracle

REGULARISED = next(s for s in range(5, 200, 6) if oracle.random_problem(s).l2)


@pytest.mark.parametrize("seed", [0, 3, 4, 5, 8, 9, 10, 11, 13, 14, 28])
def test_certificates_hold_the_true_optimum(seed):
    outcome = oracle.check(seed)
    assert outcome.proven
    assert outcome.outside == ()
    assert outcome.width <= 1e-19


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.filterwarnings("ignore:The head is too narrow")
def test_so_do_those_of_keras_models(seed):
    outcome = oracle.check(seed, as_model=True)
    assert outcome.proven
    assert outcome.outside == ()


@pytest.mark.parametrize("seed", [1, REGULARISED])
@pytest.mark.parametrize("change", ["gap", "value"])
def test_a_false_certificate_is_found(seed, change, monkeypatch):
    true = list(oracle.claims(oracle.random_problem(seed)))

    def false(_):
        for claim in true:
            if change == "gap":
                # A lower bound that is too high by a thousandth.
                yield dataclasses.replace(
                    claim, value=1.001 * claim.value, gap=1e-9 * claim.value
                )
            else:
                yield dataclasses.replace(claim, value=0.5 * claim.value, gap=0.0)

    monkeypatch.setattr(oracle, "claims", false)
    assert oracle.check(seed).outside


def test_the_oracle_agrees_with_ridge_regression():
    problem = oracle.random_problem(REGULARISED)
    with mpmath.workdps(oracle.DIGITS):
        truth = oracle.Oracle(problem)
        lower, upper = truth.optimum()
        assert 0 <= upper - lower < mpmath.mpf(10) ** -40
    shares = np.repeat([float(share) for share in truth.shares], truth.units)
    scale = np.sqrt(shares / truth.units)[:, None]
    offset = truth.problem.offset[truth.rows] + (truth.matrix @ problem.center).reshape(
        -1, truth.units
    )
    wanted = (problem.targets[truth.rows] - offset).reshape(-1, 1)
    size = truth.matrix.shape[1]
    stacked = np.concatenate(
        [scale * truth.matrix, np.sqrt(problem.l2 / 2) * np.eye(size)]
    )
    right = np.concatenate([scale * wanted, np.zeros((size, 1))])
    found = np.linalg.lstsq(stacked, right, rcond=None)[0]
    expected = np.square(stacked @ found - right).sum()
    assert float(upper) == pytest.approx(expected, rel=1e-10)


def test_the_report():
    report = oracle.measure(argparse.Namespace(problems=6, models=0))
    assert [target.bound for target in report.targets] == [6, 0, 0.02, 10.0]
    assert report.targets[0].measured == 6
    assert len(report.measurements) == 6
    assert report.body[-1] == "Failures: none."
