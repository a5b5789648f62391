"""Where the L2 term is zero: at the origin, or at the function of the base model."""

import keras
import numpy as np
import pytest
import scipy.optimize
from small import assert_equal, cross_entropy, digits, mlp, weights

import keras_dalign as kd
from keras_dalign.head.features import FeaturePass
from keras_dalign.numerics.losses import SoftmaxCrossEntropy
from keras_dalign.solving.options import SolveOptions
from keras_dalign.solving.problem import ConvexProblem
from keras_dalign.solving.width import nested

N, L2 = 60, 0.05

pytestmark = pytest.mark.filterwarnings("ignore:The head is too narrow")


def trained(n=N, **arguments):
    """A trained base model, the aligned model, and the data."""
    x, y = digits(n)
    base = mlp()
    base.compile("adam", loss=cross_entropy())
    base.fit(x, y, epochs=5, verbose=0)
    return base, kd.align(base, n_samples=n, seed=1, **arguments), x, y


def columns(model, x):
    """`[phi, 1]` of the samples in float64, by loops, and what is not trained."""
    head = model.head
    kept = FeaturePass(model, keep=True).run(x).feature_set()
    v = head.normalize_exactly(kept.z)
    r, w = head.gates_in_use()
    blocks = []
    for k in range(w.shape[1]):
        gate = 1 / (1 + np.exp(-head.slope * (v @ r[:, 0, k])))
        blocks.append(w[0, k] * gate[:, None] * v)
    offset = np.zeros((len(x), head.units))
    if not head.replaces_dense:
        kernel, bias = (np.array(a, "float64") for a in head.dense.get_weights())
        offset = np.array(kept.z, "float64") @ kernel + bias
    return np.concatenate([*blocks, np.ones((len(x), 1))], axis=1), offset


@pytest.mark.parametrize("center", ["origin", "base"])
def test_the_optimum_is_that_of_an_independent_minimiser(center):
    _, model, x, y = trained(width=3)
    result = kd.solve(model, x, y, l2=L2, center=center, tol=1e-8, verbose=0)
    phi, offset = columns(model, x)
    one_hot = np.eye(10)[y]

    def objective(flat):
        theta = flat.reshape(phi.shape[1], 10)
        logits = offset + phi @ theta
        shifted = logits - logits.max(axis=1, keepdims=True)
        p = np.exp(shifted)
        p /= p.sum(axis=1, keepdims=True)
        loss = -np.log((p * one_hot).sum(axis=1)).mean()
        gradient = phi.T @ (p - one_hot) / len(x) + L2 * theta
        return loss + L2 / 2 * (theta**2).sum(), gradient.ravel()

    found = scipy.optimize.minimize(
        objective,
        np.zeros(phi.shape[1] * 10),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "gtol": 1e-10, "ftol": 0, "maxfun": 10**6},
    )
    # The model's outputs are those of float32.
    assert result.value - result.gap <= found.fun + 1e-9
    assert result.value == pytest.approx(found.fun, abs=1e-6)
    assert result.certificate.l2_gap <= 1e-6


def test_at_the_origin_units_replace_the_output_layer():
    base, model, x, y = trained()
    before = base.predict(x, verbose=0)
    kd.solve(model, x, y, verbose=0)
    assert model.head.replaces_dense
    # The base model shares the output layer, and keeps it.
    np.testing.assert_array_equal(base.predict(x, verbose=0), before)
    phi, offset = columns(model, x)
    assert not offset.any()
    head = model.head
    q = np.array(head.q, "float64")
    theta = [q[:, :, k] for k in range(head.width)] + [np.array(head.bias)[None]]
    np.testing.assert_allclose(
        model.predict(x, verbose=0), phi @ np.concatenate(theta), atol=1e-4
    )


def test_the_first_gate_is_open_for_every_sample():
    _, model, x, y = trained(width=4)
    kd.solve(model, x, y, l2=L2, verbose=0)
    r, w = model.head.gates_in_use()
    v = model.head.normalize_exactly(model.trunk.predict(x, verbose=0))
    opened = 1 / (1 + np.exp(-model.head.slope * (v @ r[:, 0, 0])))
    np.testing.assert_array_equal(opened, np.ones(N))
    assert w[0, 0] == 1
    np.testing.assert_allclose(np.abs(w[0, 1:]), 1 / np.sqrt(3), rtol=1e-6)


def test_a_width_of_one_is_a_linear_layer_on_the_features():
    _, model, x, y = trained(width=1)
    result = kd.solve(model, x, y, l2=L2, verbose=0)
    assert result.converged
    assert model.head.width == 1


def test_centred_at_the_base_the_plain_loss_does_not_rise():
    base, model, x, y = trained()
    before = base.evaluate(x, y, verbose=0)
    result = kd.solve(model, x, y, center="base", verbose=0)
    assert not model.head.replaces_dense
    assert result.certificate.loss <= before


@pytest.mark.parametrize("l2", [0, 0.1])
def test_learned_gates_and_plain_loss_have_nothing_to_replace(l2):
    x, y = digits(N)
    gates = "learned" if l2 else "random"
    model = kd.align(mlp(), n_samples=N, gates=gates, seed=1)
    kd.solve(model, x, y, l2=l2, loss=cross_entropy(), verbose=0, max_iterations=20)
    assert not model.head.replaces_dense


def test_wider_heads_have_the_same_function():
    _, model, x, y = trained()
    kd.solve(model, x, y, l2=L2, verbose=0)
    features = FeaturePass(model, keep=True).run(x, y).feature_set()
    of = ConvexProblem.from_head(model.head, features, SoftmaxCrossEntropy())
    head = model.head
    narrow, wide = (of.with_gates(*head.gates_at_switch(width=m)) for m in (4, 8))
    theta = np.random.default_rng(0).standard_normal(narrow.size)
    there = nested(theta, of.units, narrow.gates.w, wide.gates.w)
    np.testing.assert_allclose(
        wide.logits(there), narrow.logits(theta), atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize("kind", ["model.keras", "model.weights.h5"])
def test_files_keep_what_replaces_the_output_layer(kind, tmp_path):
    _, model, x, y = trained()
    result = kd.solve(model, x, y, verbose=0)
    wanted = model.predict(x, verbose=0)
    if kind == "model.keras":
        model.save(tmp_path / kind)
        loaded = keras.saving.load_model(tmp_path / kind)
    else:
        model.save_weights(tmp_path / kind)
        loaded = kd.align(mlp(seed=5), n_samples=N, seed=9)
        loaded.load_weights(tmp_path / kind)
    assert loaded.head.replaces_dense
    np.testing.assert_allclose(loaded.predict(x, verbose=0), wanted, atol=1e-6)
    found = kd.certify(loaded, x, y, loss=cross_entropy(), l2=result.l2)
    assert found.l2_gap == pytest.approx(result.certificate.l2_gap, abs=1e-7)
    # Weights in memory, and those of a head that has its output layer.
    other = kd.align(mlp(seed=6), n_samples=N, seed=3)
    other.set_weights(model.get_weights())
    assert other.head.replaces_dense
    _, plain, _, _ = trained()
    kd.solve(plain, x, y, l2=0.1, center="base", verbose=0)
    other.set_weights(plain.get_weights())
    assert not other.head.replaces_dense
    np.testing.assert_allclose(
        other.predict(x, verbose=0), plain.predict(x, verbose=0), atol=1e-6
    )


def test_interrupted_before_it_is_trained_the_output_layer_stays(monkeypatch):
    base, model, x, y = trained()
    before = base.predict(x, verbose=0)

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("keras_dalign.solving.head_solver.choose_l2", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kd.solve(model, x, y, verbose=0)
    assert model.phase == "exploiting"
    assert not model.head.replaces_dense
    np.testing.assert_allclose(model.predict(x, verbose=0), before, atol=1e-5)
    assert kd.solve(model, x, y, verbose=0).converged


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    _, model, x, y = trained()
    before = weights(model)

    def failing(*args, **options):
        raise RuntimeError("no")

    monkeypatch.setattr("keras_dalign.solving.head_solver.minimize", failing)
    with pytest.raises(RuntimeError):
        kd.solve(model, x, y, l2=0.1, verbose=0)
    assert model.phase == "exploring"
    assert_equal(before, weights(model))


def test_solving_again_goes_on_from_there():
    _, model, x, y = trained()
    first = kd.solve(model, x, y, l2=0.1, verbose=0)
    again = kd.solve(model, x, y, l2=0.1, verbose=0)
    assert model.head.replaces_dense
    assert again.value <= first.value + 1e-7
    assert again.iterations <= 2


def test_fit_takes_the_center():
    x, y = digits(N)
    for center in ("origin", "base"):
        model = kd.align(mlp(), n_samples=N, seed=1)
        options = {"center": center}
        model.compile(kd.DAlign("adam", solve_options=options), cross_entropy())
        history = model.fit(x, y, epochs=2, verbose=0).history
        assert history["gap"][-1] <= 1e-6
        assert model.head.replaces_dense == (center == "origin")


def test_a_phase_that_there_is_not():
    _, model, x, y = trained()
    kd.solve(model, x, y, l2=L2, verbose=0)
    store = {}
    model.head.save_own_variables(store)
    before = weights(model)
    with pytest.raises(ValueError, match=r"from 0 to 2\. Received: 7"):
        model.head.load_own_variables({**store, "phase_index": np.array(7)})
    assert_equal(before, weights(model))


def test_bad_centers():
    with pytest.raises(ValueError, match="center='middle'"):
        SolveOptions(center="middle")
    with pytest.raises(ValueError, match="center=0"):
        kd.DAlign("adam", solve_options={"center": 0})
