"""Models on a hub, with a card that states their certificate."""

import re
from importlib.metadata import version

import fake_hub
import keras
import numpy as np
import pytest

import keras_dalign as kd

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def aligned():
    base = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.Dense(2),
        ]
    )
    return kd.align(base, n_samples=len(X), seed=0)


@pytest.mark.parametrize("phase", ["exploring", "exploiting"])
def test_models_come_back_from_the_hub(phase, tmp_path, monkeypatch):
    hub = fake_hub.installed(tmp_path, monkeypatch)
    model = aligned()
    model.compile(kd.DAlign("adam", solve_options={"l2": 1e-2}), LOSS)
    if phase == "exploiting":
        model.fit(X, Y, epochs=2, verbose=0)
    model.save("hf://someone/model")
    # Keras reads remote paths by a function of TensorFlow.
    remote = keras.backend.backend() == "tensorflow"
    path = "hf://someone/model" if remote else hub.snapshot_download("someone/model")
    loaded = keras.saving.load_model(path)
    assert isinstance(loaded, kd.AlignedModel)
    assert loaded.phase == phase
    np.testing.assert_array_equal(loaded.predict_on_batch(X), model.predict_on_batch(X))
    assert kd.certify(loaded, X, Y).to_dict() == kd.certify(model, X, Y).to_dict()


def test_the_fake_hub_has_the_arguments_of_the_real_one():
    real = pytest.importorskip("huggingface_hub")
    assert fake_hub.differences(real) == []


def test_the_card_states_objective_gap_data_and_versions():
    model = aligned()
    kd.solve(model, X, Y, l2=1e-2, loss=LOSS, verbose=0)
    certificate = kd.certify(model, X, Y, loss=LOSS, l2=1e-2)
    card = certificate.model_card(model)
    head, _, rest = card.removeprefix("---\n").partition("\n---\n")
    assert head.splitlines()[0] == "library_name: keras"
    assert f"# {model.name}" in rest
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", rest, re.MULTILINE))
    assert rows["objective"] == certificate.objective
    assert float(rows["loss"]) == pytest.approx(certificate.loss, rel=1e-5)
    assert float(rows["gap, at most"]) >= certificate.gap
    assert float(rows["its gap, at most"]) >= certificate.l2_gap
    assert rows["digest of the samples"] == f"`{certificate.data_digest}`"
    assert rows["samples"] == "40"
    assert rows["keras_dalign"] == version("keras-dalign")
    assert rows["Keras"] == keras.version()
    backend = keras.backend.backend()
    assert rows[f"backend: {backend}"] == __import__(backend).__version__
    assert "l2=0.01)" in rest


def test_the_card_without_an_l2_term_has_no_rows_for_it():
    model = aligned()
    card = kd.certify(model, X, Y, loss=LOSS).model_card(model)
    assert "l2" not in card
    assert "its gap" not in card


def test_the_digest_is_of_the_samples_in_any_order():
    model = aligned()

    def digest(x=X, y=Y, weights=None):
        certificate = kd.certify(model, x, y, loss=LOSS, sample_weight=weights)
        return certificate.data_digest

    order = RNG.permutation(len(X))
    assert re.fullmatch(r"[0-9a-f]{32}", digest())
    assert digest(X[order], Y[order]) == digest()
    assert digest(X, Y.astype("int64")) == digest()
    assert digest(X, Y, np.ones(40)) == digest()
    assert digest(X[:-1], Y[:-1]) != digest()
    assert digest(X + 1e-3) != digest()
    assert digest(X, 1 - Y) != digest()
    assert digest(X, Y, np.arange(40.0)) != digest()


def test_a_weight_of_two_is_a_sample_twice_and_zero_is_none():
    model = aligned()
    weights = np.ones(40)
    weights[3], weights[5] = 2.0, 0.0
    rows = [*range(5), 3, *range(6, 40)]
    weighted = kd.certify(model, X, Y, loss=LOSS, sample_weight=weights)
    repeated = kd.certify(model, X[rows], Y[rows], loss=LOSS)
    assert weighted.data_digest == repeated.data_digest
