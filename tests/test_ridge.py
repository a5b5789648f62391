import numpy as np
import pytest

from keras_dalign.numerics.ridge import GramFactor


@pytest.mark.parametrize("shape", [(6, 9), (9, 4)])
@pytest.mark.parametrize("kind", ["gram", "features"])
def test_against_the_normal_equations(shape, kind):
    rng = np.random.default_rng(0)
    features = rng.standard_normal(shape)
    rhs = rng.standard_normal((shape[0], 2))
    gram = features @ features.T
    factor = (
        GramFactor.of_gram(gram) if kind == "gram" else GramFactor.of_features(features)
    )
    assert factor.rank() == min(shape)
    assert factor.largest == pytest.approx(np.linalg.norm(features, 2) ** 2)
    for penalty in (1e-3, 1.0, 30.0):
        alpha, attained = factor.solve(rhs, penalty)
        normal = features.T @ features + penalty * np.eye(shape[1])
        delta = np.linalg.solve(normal, features.T @ rhs)
        np.testing.assert_allclose(features.T @ alpha, delta, atol=1e-9)
        np.testing.assert_allclose(attained, features @ delta, atol=1e-9)
