import numpy as np
import pytest
from random_problems import LOSSES, labels

from keras_dalign.numerics.target_logits import target_logits


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("seed", range(4))
def test_the_loss_falls_to_its_infimum(name, seed):
    rng = np.random.default_rng(seed)
    loss = LOSSES[name]
    targets = loss.targets(labels(name, rng, 30, 3), 3)
    weights = rng.random(30)
    weights[:6] = 0
    # Not every number occurs.
    groups = 2 * rng.integers(0, 9, 30)
    infimum = loss.lower_bound(targets, weights, groups, 18).sum()
    family = target_logits(loss, targets, weights, groups)
    losses = [weights @ loss.value(family.at(1.0, psi), targets) for psi in (1, 9, 50)]
    assert losses[0] >= losses[1] >= losses[2] >= infimum * (1 - 1e-12)
    assert losses[2] == pytest.approx(infimum, rel=1e-9, abs=1e-15)
    for group in set(groups.tolist()):
        assert np.ptp(family.at(1.0, 3.0)[groups == group], axis=0).max() == 0


def test_hard_labels_are_the_modified_targets():
    for name in ("sparse", "binary"):
        rng = np.random.default_rng(0)
        loss = LOSSES[name]
        targets = loss.targets(labels(name, rng, 8, 4), 4)
        family = target_logits(loss, targets, np.ones(8), np.arange(8))
        np.testing.assert_array_equal(family.direction, 2 * targets - 1)
        assert not family.finite.any()


def test_smoothed_labels_have_finite_logits_only():
    for name in ("smoothed", "binary smoothed"):
        rng = np.random.default_rng(0)
        loss = LOSSES[name]
        targets = loss.targets(labels(name, rng, 8, 4), 4)
        family = target_logits(loss, targets, np.ones(8), np.arange(8))
        assert not family.direction.any()
        # The minimum is there: the gradient vanishes.
        assert np.abs(loss.gradient(family.finite, targets)).max() < 1e-14


def test_squared_error_and_conflicts():
    loss = LOSSES["squared"]
    targets = np.array([[1.0], [4.0], [7.0]])
    family = target_logits(
        loss, targets, np.array([2.0, 1.0, 0.0]), np.array([0, 0, 1])
    )
    np.testing.assert_allclose(family.finite, [[2.0], [2.0], [7.0]])
    assert not family.direction.any()


def test_labels_that_agree_stay_hard_whatever_the_weights():
    targets = np.tile([[0.0, 1.0]], (10, 1))
    for name in ("sparse", "binary"):
        for seed in range(20):
            weights = np.random.default_rng(seed).random(10)
            family = target_logits(LOSSES[name], targets, weights, np.zeros(10, int))
            np.testing.assert_array_equal(family.direction, 2 * targets - 1)
            assert not family.finite.any()
