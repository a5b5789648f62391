import numpy as np
import pytest

pytest.importorskip("yaml")

from pipelines.reporting import comparison


def test_difference_is_what_the_hand_computes():
    # Differences 0.01, 0.02, 0.03: mean 0.02, deviation 0.01, error 0.01 / sqrt(3);
    # the t quantile of 2 degrees of freedom is 4.302653.
    found = comparison.difference([0.11, 0.22, 0.33], [0.10, 0.20, 0.30])
    assert (found.n, found.value) == (3, pytest.approx(0.02))
    assert found.standard_error == pytest.approx(0.01 / np.sqrt(3))
    half = 4.302653 * 0.01 / np.sqrt(3)
    assert found.low == pytest.approx(0.02 - half, rel=1e-6)
    assert found.high == pytest.approx(0.02 + half, rel=1e-6)


def test_ratio_is_paired_and_the_geometric_mean():
    found = comparison.ratio([1.0, 8.0], [2.0, 4.0])
    # Logarithms -log 2 and log 2: mean 0, error log 2; the quantile is 12.7062.
    assert found.value == pytest.approx(1.0)
    assert found.standard_error == pytest.approx(np.log(2))
    assert found.high == pytest.approx(np.exp(12.7062 * np.log(2)), rel=1e-3)
    assert found.low == pytest.approx(1 / found.high)


def test_other_seeds_are_expected_in_the_prediction_interval():
    low, high = comparison.expected([0.02, 0.03, 0.04], 3)
    # Wider than the mean's confidence interval by the square root of two.
    half = 4.302653 * 0.01 * np.sqrt(2 / 3)
    assert (low, high) == pytest.approx((0.03 - half, 0.03 + half), rel=1e-6)
    assert comparison.expected([0.03], 3) is None


def test_one_seed_has_no_interval():
    found = comparison.difference([0.3], [0.1])
    assert found == comparison.Estimate(1, pytest.approx(0.2))
    assert comparison.spread([0.3]) == comparison.Spread(1, 0.3, None)
    assert comparison.spread([0.02, 0.04]).std == pytest.approx(0.02 / np.sqrt(2))


def test_points_have_signs_but_zero_has_none():
    values = [0.0012, -0.0012, -0.00001, 0.0]
    assert [comparison.points(each) for each in values] == [
        "+0.12",
        "-0.12",
        "0.00",
        "0.00",
    ]


@pytest.mark.parametrize(
    ("values", "reference", "message"),
    [
        ([], [], "one number of each method"),
        ([1.0], [1.0, 2.0], "1 and 2 numbers"),
        ([1.0], [0.0], "positive"),
    ],
)
def test_what_cannot_be_compared(values, reference, message):
    with pytest.raises(ValueError, match=message):
        comparison.ratio(values, reference)
