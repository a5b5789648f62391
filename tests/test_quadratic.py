import numpy as np
import pytest

from keras_dalign.numerics import quadratic
from keras_dalign.numerics.losses import (
    BinaryCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)

N, D, C, M = 7, 4, 3, 5


def problem(seed=0):
    rng = np.random.default_rng(seed)
    u, gates = rng.standard_normal((N, D)), rng.standard_normal((N, M))
    return u, gates, rng.standard_normal((D, C, M))


@pytest.fixture(params=[False, True], ids=["one block", "rows apart"])
def _blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(quadratic, "_PRODUCTS_AT_ONCE", 1)
        monkeypatch.setattr(quadratic, "_SPLIT_PRODUCTS", 0)


@pytest.mark.usefixtures("_blocks")
def test_outputs_are_linear_in_the_matrices_of_the_weights():
    u, gates, w = problem()
    matrices = np.einsum("icr,jcr->crij", w, w)
    expected = np.einsum("nr,ni,crij,nj->nc", gates, u, matrices, u)
    np.testing.assert_allclose(quadratic.outputs(u, gates, w), expected, rtol=1e-12)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(
    "loss", [SquaredError(), BinaryCrossEntropy(), SoftmaxCrossEntropy(sparse=True)]
)
def test_value_and_gradient(loss):
    u, gates, w = problem()
    rng = np.random.default_rng(1)
    shares = rng.random(N)
    y = np.arange(N) % C if loss.name.startswith("softmax") else rng.random((N, C))
    targets = loss.targets(y, C)

    def value(weights):
        f = quadratic.outputs(u, gates, weights)
        return float(shares @ loss.value(f, targets))

    found, slope = quadratic.value_and_gradient(u, gates, w, targets, shares, loss)
    assert found == pytest.approx(value(w), rel=1e-12)
    for place in [(0, 0, 0), (3, 2, 4), (1, 2, 3)]:
        step = np.zeros_like(w)
        step[place] = 1e-6
        expected = (value(w + step) - value(w - step)) / 2e-6
        assert slope[place] == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_moments_and_their_smallest_eigenvalues():
    u, gates, _ = problem()
    cotangents = np.random.default_rng(2).standard_normal((N, C))
    expected = np.einsum("nc,nr,ni,nj->crij", cotangents, gates, u, u)
    found = quadratic.moments(u, gates, cotangents)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        quadratic.smallest_eigenvalues(found),
        np.linalg.eigvalsh(expected)[..., 0],
        rtol=1e-10,
    )
