"""The study of autoencoders, and its formulas against dense and random references."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
yaml = pytest.importorskip("yaml")

from matplotlib.figure import Figure  # noqa: E402

import keras_dalign as kd  # noqa: E402
from pipelines.studies import autoencoders, settings  # noqa: E402
from pipelines.studies.autoencoders import kernel, measurements  # noqa: E402
from pipelines.studies.autoencoders.descent import descend  # noqa: E402
from pipelines.studies.autoencoders.network import (  # noqa: E402
    TRAINED,
    Autoencoder,
    TiedLayer,
    initial,
    keras_model,
)

TINY = {
    "samples": [3, 5],
    "widths": [2, 16, 64],
    "steps": 400,
    "tolerance": 0.1,
    "limit_samples": 3,
    "limit_widths": [8, 32],
    "rate_samples": 3,
    "rate_width": 256,
    "stall_samples": 4,
    "stall_widths": [3, 16],
    "stall_steps": 20,
    "stall_moments": 2,
    "tied_samples": 4,
    "tied_widths": [16, 64],
    "tied_steps": 50,
    "unseen": 5,
    "seeds": 1,
}


def directions(n, d, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def in_float32(network):
    """The network with weights that Keras can hold."""
    encoder, decoder = (
        w.astype("float32").astype("float64")
        for w in (network.encoder, network.decoder)
    )
    return dataclasses.replace(network, encoder=encoder, decoder=decoder)


def moved(network, which, direction):
    """The network with a step of the encoder or of the decoder."""
    return network.step(*(direction if k == which else None for k in (0, 1)))


def dense_jacobian(network, x, step=1e-6):
    """Column by column, by central differences."""
    places = {"encoder": [0], "decoder": [1], "joint": [0, 1], "tied": [0]}
    columns = []
    for which in places[network.trained]:
        for k in range(network.encoder.size):
            direction = np.zeros(network.encoder.shape)
            direction.flat[k] = step
            plus, minus = (
                moved(network, which, sign * direction).outputs(x) for sign in (1, -1)
            )
            columns.append((plus - minus).ravel() / (2 * step))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("trained", TRAINED)
def test_kernels_and_gradients_agree_with_a_dense_jacobian(trained):
    x, network = directions(4, 3), initial(trained, 3, 6, seed=1)
    J = dense_jacobian(network, x)
    expected = J @ J.T
    found = kernel.tangent_kernel(network, x)
    np.testing.assert_allclose(found, expected, atol=1e-8 * np.abs(expected).max())
    loss, *gradients = network.loss_and_gradients(x)
    error = network.outputs(x) - x
    assert loss == pytest.approx(0.5 * np.sum(error**2))
    assert loss == pytest.approx(network.loss(x))
    if trained == "tied":
        assert gradients[0] is gradients[1]
        gradients = gradients[:1]
    flat = np.concatenate([g.ravel() for g in gradients if g is not None])
    np.testing.assert_allclose(flat, J.T @ error.ravel(), atol=1e-8)


@pytest.mark.parametrize("trained", TRAINED)
def test_keras_computes_the_same(trained):
    # Keras rounds the scale to float32, too: one eighth is left as it is.
    x, network = directions(4, 5), in_float32(initial(trained, 5, 8, 2, scale=0.125))
    model = keras_model(network)
    J = kd.jacobian(model, x)
    np.testing.assert_allclose(J.outputs(), network.outputs(x), rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        kd.tangent_kernel(model, x),
        kernel.tangent_kernel(network, x),
        rtol=0,
        atol=1e-12,
    )
    _, encoder, decoder = network.loss_and_gradients(x)
    own = [encoder] if trained == "tied" else [encoder, decoder]
    # Keras's kernel of the decoder is its transpose.
    own = [g if k == 0 else g.T for k, g in enumerate(own) if g is not None]
    gradient = J.rmatvec((J.outputs() - x).ravel())
    np.testing.assert_allclose(
        gradient, np.concatenate([g.ravel() for g in own]), rtol=0, atol=1e-12
    )


def test_limits_are_expectations():
    draws = np.random.default_rng(0).standard_normal((10**6, 2))
    for cosine in (-0.8, 0.0, 0.3, 1.0):
        other = draws @ [cosine, np.sqrt(1 - cosine**2)]
        both = (draws[:, 0] > 0) & (other > 0)
        products = np.maximum(draws[:, 0], 0) * np.maximum(other, 0)
        assert kernel.k0(np.array(cosine)) == pytest.approx(both.mean(), abs=3e-3)
        assert kernel.k1(np.array(cosine)) == pytest.approx(products.mean(), abs=5e-3)


def test_wide_kernels_are_near_their_limits():
    x = directions(3, 4)
    for trained in ("encoder", "decoder", "joint"):
        wide = kernel.tangent_kernel(initial(trained, 4, 20_000, seed=0), x)
        limit = kernel.limit_kernel(trained, x)
        assert np.linalg.norm(wide - limit) < 0.05 * np.linalg.norm(limit)
    with pytest.raises(ValueError, match=r"A limit is known for.*'tied'"):
        kernel.limit_kernel("tied", x)


def test_descent_along_a_constant_kernel_is_a_power_of_it():
    # The decoder alone: least squares, whose kernel does not move.
    x, network = directions(4, 3), initial("decoder", 3, 6, seed=1)
    K = kernel.tangent_kernel(network, x)
    eta = 1.0 / np.linalg.eigvalsh(K)[-1]
    end, losses = descend(network, x, eta, 7)
    step = np.eye(len(K)) - eta * K
    residual = np.linalg.matrix_power(step, 7) @ (network.outputs(x) - x).ravel()
    np.testing.assert_allclose((end.outputs(x) - x).ravel(), residual, atol=1e-13)
    assert len(losses) == 8
    assert losses[0] == pytest.approx(network.loss(x))
    assert losses[-1] == pytest.approx(0.5 * residual @ residual)


def test_descent_ends_early_where_it_fits_or_diverges():
    x, network = directions(4, 3), initial("joint", 3, 30, seed=1)
    eta = measurements._rate(network, x)
    until = 0.1 * network.loss(x)
    end, losses = descend(network, x, eta, 1000, until)
    assert losses[-1] == end.loss(x) <= until < losses[-2]
    _, losses = descend(network, x, 1e3 * eta, 1000)
    assert len(losses) < 20


def test_loss_of_tied_networks_at_birth():
    x, d, width = directions(2, 4), 4, 50
    for scale in (2.0 / width, 1.0 / np.sqrt(width * d)):
        losses = [initial("tied", d, width, k, scale).loss(x) for k in range(2000)]
        expected = measurements.birth_loss(2, d, width, scale)
        assert np.mean(losses) == pytest.approx(expected, rel=0.05)
    # As the page writes it.
    assert measurements.birth_loss(30, 16, 4096, 2 / 4096) == pytest.approx(
        30 * 17.5 / 4096
    )
    scale, large = 1 / np.sqrt(16 * 4096), (np.sqrt(4096 / 16) / 2 - 1) ** 2
    assert measurements.birth_loss(30, 16, 4096, scale) == pytest.approx(
        15 * large + 30 * 17.5 / 64
    )


def test_all_cells_and_claims(tmp_path):
    committed = settings.load()["autoencoders"]
    assert set(committed) == set(TINY)
    assert autoencoders.cells(committed)
    rows = [
        row
        for cell in autoencoders.cells(TINY)
        for row in autoencoders.measure(TINY, cell)
    ]
    claims = {claim.name: claim for claim in autoencoders.claims(rows, TINY)}
    assert len(claims) == len(autoencoders.claims(rows, TINY)) > 15
    assert all(len(claim.values) == 1 for claim in claims.values())
    by_kind = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row)
    assert set(by_kind) == {"least", "limit", "rate", "stall", "unseen"}
    for row in by_kind["least"]:
        assert row["least"] in {*TINY["widths"], None}
    for row in by_kind["stall"]:
        assert row["n_rows"] == 4 * 16
        assert 0 <= row["rank"] <= 64
    births = [row for row in by_kind["stall"] if row["step"] == 0]
    assert [row["loss"] for row in births] == [1.0, 1.0]
    # A constant kernel: the rate is exactly that of its smallest eigenvalue.
    (decoder,) = (row for row in by_kind["rate"] if row["trained"] == "decoder")
    assert decoder["rate_to_birth"] == pytest.approx(1.0, rel=0.1)
    drawing = Figure()
    autoencoders.draw(list(drawing.subplots(1, autoencoders.PANELS)), rows)
    drawing.savefig(tmp_path / "figure.png")


def test_a_width_that_does_not_fit_is_counted_as_beyond_the_widest():
    cells = autoencoders.cells(TINY)
    cell = next(c for c in cells if c["kind"] == "least" and c["trained"] == "encoder")
    narrow = {**TINY, "widths": [1], "steps": 3}
    (row,) = autoencoders.measure(narrow, cell)
    assert row == {**cell, "least": None, "steps": 3}


def test_seeds_and_what_is_trained_share_their_start():
    encoder, joint = (initial(each, 4, 6, seed=3) for each in ("encoder", "joint"))
    np.testing.assert_array_equal(encoder.encoder, joint.encoder)
    np.testing.assert_array_equal(encoder.decoder, joint.decoder)
    assert set(np.unique(encoder.decoder)) == {-1.0, 1.0}


def test_bad_networks_are_errors():
    W, other = np.ones((4, 6)), np.ones((4, 5))
    with pytest.raises(ValueError, match=r"tied ones are one matrix.*\(4, 6\).*\(4, 5"):
        Autoencoder("tied", W, other, 1.0)
    with pytest.raises(ValueError, match="decoder must equal the encoder"):
        Autoencoder("tied", W, 2 * W, 1.0)
    with pytest.raises(ValueError, match="Encoder and decoder"):
        Autoencoder("joint", W, W.T, 1.0)
    with pytest.raises(ValueError, match="`trained` must be one of"):
        Autoencoder("both", W, W, 1.0)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"wdiths": [3]}, "no key 'wdiths'; the nearest is 'widths'"),
        ({"widths": [8, 0]}, "encoders.widths` must be a list of integers between 1 "),
        ({"widths": []}, "encoders.widths` must be a list"),
        ({"widths": 8}, "encoders.widths` must be a list"),
        ({"samples": [1]}, "encoders.samples` must be a list of integers between 2 "),
        ({"steps": 2.5}, "encoders.steps` must be one integer between 1 "),
        ({"seeds": 0}, "encoders.seeds` must be one integer between 1 "),
        ({"limit_widths": [8, 8]}, "two different widths or more"),
        ({"tolerance": 2.0}, "encoders.tolerance` must be one number"),
    ],
)
def test_bad_settings_are_errors(changed, match):
    with pytest.raises(ValueError, match=match):
        autoencoders.cells({**TINY, **changed})


def test_a_missing_setting_is_an_error():
    less = {name: value for name, value in TINY.items() if name != "unseen"}
    with pytest.raises(ValueError, match=r"must have the keys .*, without unseen"):
        autoencoders.cells(less)


def test_a_rate_that_cannot_be_told_is_an_error():
    with pytest.raises(RuntimeError, match="did not fall far enough"):
        measurements.rate({**TINY, "steps": 5}, {"trained": "joint", "seed": 0})


def test_the_tied_layer_is_rebuilt_from_its_configuration():
    layer = TiedLayer.from_config(TiedLayer(3, 0.5).get_config())
    assert (layer.width, layer.scale) == (3, 0.5)
