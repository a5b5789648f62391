import dataclasses

import numpy as np
import pytest

from keras_dalign.numerics.losses import (
    BinaryCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)
from keras_dalign.solving import device_products, products
from keras_dalign.solving.device_products import DeviceProducts
from keras_dalign.solving.feature_rows import FeatureRows, Normalisation
from keras_dalign.solving.gates import Gates
from keras_dalign.solving.products import NumpyProducts, SampleLoss

LOSSES = [SoftmaxCrossEntropy(), BinaryCrossEntropy(), SquaredError()]
KINDS = ["normalised", "plain", "kept gates", "memory-mapped"]


def case(kind, share, tmp_path, n=300, p=6, units=3, width=5, seed=0):
    """Rows and gates of a kind, and the dense features `(n, C, size)` in float64."""
    rng = np.random.default_rng(seed)
    raw = (3.0 + 2.0 * rng.standard_normal((n, p))).astype("float32")
    raw[7] = raw[3]
    if kind == "memory-mapped":
        np.save(tmp_path / "u.npy", raw)
        raw = np.load(tmp_path / "u.npy", mmap_mode="r")
    moments = raw.mean(axis=0, dtype=float), 1 / raw.std(axis=0, dtype=float)
    rows = FeatureRows(raw, Normalisation(*moments))
    if kind == "plain":
        rows = FeatureRows(rows.dense())
    groups = 1 if share else units
    r = rng.standard_normal((rows.d, groups, width)) / np.sqrt(rows.d)
    w = rng.choice([-1.0, 1.0], (groups, width)) / np.sqrt(width)
    gates = Gates(r, w, 20.0)
    values = np.broadcast_to(gates.values(rows.dense()), (n, units, width))
    if kind == "kept gates":
        kept = values[:, :groups]
        gates = dataclasses.replace(gates, r=np.zeros((0, 0, 0)), kept=kept)
    phi = np.zeros((n, units, rows.d, units, width))
    for c in range(units):
        phi[:, c, :, c] = rows.dense()[:, :, None] * values[:, c, None, :]
    bias = np.broadcast_to(np.eye(units), (n, units, units))
    return rows, gates, np.concatenate([phi.reshape(n, units, -1), bias], axis=2)


def close(found, expected, tolerance):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=tolerance * scale)
    assert found.dtype == np.float64


def kinds_of_products(rows, gates):
    return [
        (NumpyProducts(rows, gates, 3), 1e-13),
        (NumpyProducts(rows, gates, 3, np.float32), 2e-6),
        (DeviceProducts(rows, gates, 3), 2e-6),
    ]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_with_the_dense_features(kind, share, tmp_path):
    rows, gates, phi = case(kind, share, tmp_path)
    rng = np.random.default_rng(1)
    theta = rng.standard_normal(phi.shape[2])
    u = rng.standard_normal(phi.shape[:2])
    logits = phi @ theta
    for of, tolerance in kinds_of_products(rows, gates):
        assert of.size == len(theta)
        close(of.product(theta), logits, tolerance)
        close(of.transposed_product(u), np.einsum("icp,ic->p", phi, u), tolerance)


def samples_of(loss, n, units, seed=2):
    """Random offsets, targets and shares of `n` samples."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, units, n)
    if not isinstance(loss, SoftmaxCrossEntropy):
        y = rng.integers(0, 2, (n, units))
    shares = rng.random(n) * (rng.random(n) < 0.9) / n
    offset = rng.standard_normal((n, units))
    return SampleLoss(loss, offset, loss.targets(y, units), shares)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_in_one_pass(kind, share, loss, tmp_path):
    rows, gates, phi = case(kind, share, tmp_path)
    theta = np.random.default_rng(1).standard_normal(phi.shape[2])
    samples = samples_of(loss, *phi.shape[:2])
    logits = samples.offset + phi @ theta
    values, slopes = loss.value_and_gradient(logits, samples.targets)
    slopes *= samples.shares[:, None]
    gradient = np.einsum("icp,ic->p", phi, slopes)
    for of, tolerance in kinds_of_products(rows, gates):
        for _ in range(2):  # What is kept for a loss is used again.
            found = of.loss_and_gradient(theta, samples)
            close(found[0], logits, tolerance)
            assert found[1] == pytest.approx(samples.shares @ values, rel=2e-6)
            close(found[2], gradient, 10 * tolerance)
        other = samples_of(loss, *phi.shape[:2], seed=3)
        values = loss.value(other.offset + phi @ theta, other.targets)
        found = of.loss_and_gradient(theta, other)
        assert found[1] == pytest.approx(other.shares @ values, rel=2e-6)
        values = loss.value(logits, samples.targets)


@pytest.mark.parametrize("share", [True, False])
def test_blocks_and_gates_computed_again_change_nothing(share, tmp_path, monkeypatch):
    rows, gates, phi = case("normalised", share, tmp_path)
    theta = np.random.default_rng(1).standard_normal(phi.shape[2])
    samples = samples_of(LOSSES[0], *phi.shape[:2])
    u = np.random.default_rng(2).standard_normal(phi.shape[:2])

    def everything(of):
        logits, loss, gradient = of.loss_and_gradient(theta, samples)
        return of.product(theta), of.transposed_product(u), logits, [loss], gradient

    whole = [everything(of) for of, _ in kinds_of_products(rows, gates)]
    for module in ("products", "gates", "device_products"):
        monkeypatch.setattr(f"keras_dalign.solving.{module}._BLOCK_BYTES", 1)
    monkeypatch.setattr(products, "_KEPT_GATES_BYTES", 1)
    for (of, tolerance), one in zip(kinds_of_products(rows, gates), whole, strict=True):
        assert of.kept_gates is None
        assert len(list(rows.blocks(1, 1))) == 5
        for found, expected in zip(everything(of), one, strict=True):
            close(np.asarray(found), np.asarray(expected), 10 * tolerance)


def test_rows_that_threads_share(tmp_path, monkeypatch):
    rows, gates, phi = case("normalised", True, tmp_path, n=1000)
    samples = samples_of(LOSSES[0], *phi.shape[:2])
    theta = np.random.default_rng(1).standard_normal(phi.shape[2])
    alone = NumpyProducts(rows, gates, 3).loss_and_gradient(theta, samples)
    monkeypatch.setattr(products, "_THREADED", 1)
    monkeypatch.setattr(products.threads, "blas_threads", lambda: 3)
    found = NumpyProducts(rows, gates, 3).loss_and_gradient(theta, samples)
    for one, other in zip(found, alone, strict=True):
        close(np.asarray(one), np.asarray(other), 1e-13)


class FullError(Exception):
    """As a backend reports it."""

    def __str__(self):
        return "RESOURCE_EXHAUSTED: Out of memory while trying to allocate"


def test_a_device_without_memory_gets_less_at_a_time(tmp_path, monkeypatch, caplog):
    rows, gates, phi = case("normalised", True, tmp_path, n=900)
    theta = np.random.default_rng(1).standard_normal(phi.shape[2])
    of = DeviceProducts(rows, gates, 3)
    of._holds = True
    forward, sizes = of._forward, []

    def limited(rows, *rest):
        sizes.append(len(rows[0]))
        if len(rows[0]) > 300:
            raise FullError
        return forward(rows, *rest)

    monkeypatch.setattr(of, "_forward", limited)
    monkeypatch.setattr(device_products, "_LEAST_BLOCK_BYTES", 1)
    with caplog.at_level("WARNING", logger="keras_dalign"):
        close(of.product(theta), phi @ theta, 2e-6)
    assert sizes[0] == 900
    assert not of._holds
    assert "ran out of memory" in caplog.text
    assert "blocks of" in caplog.text
    # Later products begin with what works.
    sizes.clear()
    of.product(theta)
    assert max(sizes) <= 300


def test_other_errors_of_a_device_are_raised(tmp_path, monkeypatch):
    rows, gates, phi = case("plain", True, tmp_path)
    of = DeviceProducts(rows, gates, 3)

    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(of, "_forward", broken)
    with pytest.raises(RuntimeError, match="no such kernel"):
        of.product(np.zeros(phi.shape[2]))


def test_a_device_that_cannot_hold_one_small_block(tmp_path, monkeypatch):
    rows, gates, phi = case("plain", True, tmp_path)
    of = DeviceProducts(rows, gates, 3)

    def full(*_):
        raise FullError

    monkeypatch.setattr(of, "_forward", full)
    with pytest.raises(FullError):
        of.product(np.zeros(phi.shape[2]))


def test_what_is_held_on_an_accelerator_is_put_there_once(tmp_path, monkeypatch):
    rows, gates, phi = case("normalised", True, tmp_path)
    theta = np.random.default_rng(1).standard_normal(phi.shape[2])
    of = DeviceProducts(rows, gates, 3)
    of._holds = True
    put, sizes = device_products.device.put, []

    def counted(array, *rest):
        sizes.append(np.size(array))
        return put(array, *rest)

    monkeypatch.setattr(device_products.device, "put", counted)
    first = of.product(theta)
    assert rows.raw.size in sizes
    sizes.clear()
    np.testing.assert_array_equal(of.product(theta), first)
    assert rows.raw.size not in sizes
