import dataclasses

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("filelock")
pytest.importorskip("yaml")

from small import assert_equal, cross_entropy

import keras_dalign as kd
from benchmarks.cells import PARAMS
from benchmarks.levers import heads, measurement, tables
from benchmarks.levers.trunks import AVERAGES, Trunks, ended, part_of
from benchmarks.levers.variants import DEFAULT, PART, VARIANTS, Variant
from keras_dalign.head.features import FeatureSet
from pipelines import datasets
from pipelines.exploration import Job
from pipelines.optimizers import optimizer
from pipelines.params import DataParams, Recipe, Run, TrainParams, load
from pipelines.stream import FollowEpoch

TAU, EPOCHS = 3, 5


@pytest.fixture(scope="module")
def job():
    """A small cell whose augmentation changes nothing."""
    return Job(
        Run("digits", "standard", "levers", 0),
        datasets.load_digits(DataParams(n_train=150, n_test=100)),
        TrainParams(
            {"name": "resnet", "depth": 8, "width": 4},
            EPOCHS,
            32,
            {},
            augment={"crop": 0, "flip": False},
        ),
        Recipe(0.003, "cosine"),
    )


@pytest.fixture(scope="module")
def trunks(job, tmp_path_factory):
    return Trunks(job, tmp_path_factory.mktemp("trunks"))


@pytest.fixture(scope="module")
def default(job, trunks):
    return heads.finished(job, VARIANTS[DEFAULT], trunks)


def test_the_default_goes_on_from_the_weights_that_dalign_goes_on_from(job, trunks):
    model = kd.align(job.base(), n_samples=len(job.data.x_train), seed=0)
    model.compile(
        kd.DAlign(
            optimizer(job.recipe, job.steps, EPOCHS),
            explore=TAU,
            solve_options={"l2": 1.0},
        ),
        loss=cross_entropy(),
    )
    stream = job.stream()
    model.fit(
        stream, epochs=TAU, shuffle=False, callbacks=[FollowEpoch(stream)], verbose=0
    )
    trunk = trunks.model(VARIANTS[DEFAULT])
    expected = {v.path: np.array(v) for v in model.trunk.weights}
    kept = [v for v in trunk.trainable_weights if v.path in expected]
    assert len(kept) == len(trunk.trainable_weights) - 2
    for variable in kept:
        np.testing.assert_allclose(
            np.array(variable), expected[variable.path], rtol=1e-4, atol=1e-6
        )


def test_last_weights_and_averages_differ(trunks):
    def kernel(average):
        variant = Variant("", average=average)
        return np.array(trunks.model(variant).trainable_weights[0])

    kernels = [kernel(share) for share in (0.0, *AVERAGES)]
    assert len({each.tobytes() for each in kernels}) == len(kernels)


def test_passes_that_change_no_image_give_the_default(job, trunks, default):
    for count, averaged in ((1, False), (2, False), (2, True)):
        variant = Variant("", passes=count, averaged=averaged)
        found = heads.finished(job, variant, trunks)
        assert found["l2"] == default["l2"]
        assert found["width"] == default["width"]
        assert found["nll"] == pytest.approx(default["nll"], rel=0.01)


def test_a_head_refitted_on_all_samples_keeps_what_the_rest_chose(job, trunks):
    variant = Variant("", trunk=PART, unseen=True)
    refit = dataclasses.replace(variant, refit=True)
    chosen, found = (heads.finished(job, each, trunks) for each in (variant, refit))
    assert (found["l2"], found["width"]) == (chosen["l2"], chosen["width"])
    assert found["nll"] != chosen["nll"]
    assert max(found["gap"], chosen["gap"]) <= 1e-6


def test_the_part_is_nine_tenths_of_the_samples_and_none_of_the_test(job):
    part = part_of(job).data
    assert len(part.x_train) + len(part.x_test) == len(job.data.x_train)
    assert len(part.x_test) == pytest.approx(15, abs=5)
    every = np.concatenate([part.x_train, part.x_test]).reshape(150, -1)
    known = {each.tobytes() for each in job.data.x_train.reshape(150, -1)}
    assert {each.tobytes() for each in every} == known


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_schedule_ends_with_exploration(schedule):
    how = ended(Recipe(0.01, schedule), steps=10, epochs=6)
    rates = [float(how._learning_rate(step)) for step in (0, 30, 40, 50, 60)]
    expected = {
        "constant": [0.01, 0.01, 0.01, 0.005, 0.0],
        "cosine": [0.01, 0.005, 0.0025, 0.00067, 0.0],
    }
    np.testing.assert_allclose(rates, expected[schedule], atol=1e-5)


def test_features_of_passes_become_one_row_for_each_image():
    z = [np.arange(12.0).reshape(6, 2), np.arange(6.0).reshape(6, 1, 1)]
    digests = [bytes([index]) for index in range(6)]
    features = FeatureSet(z, np.array([0, 1, 2] * 2), None, 6, digests)
    first = heads.merged(features, 3, averaged=False)
    assert_equal(first.z, [z[0][:3], z[1][:3]])
    mean = heads.merged(features, 3, averaged=True)
    assert_equal(mean.z, [(part[:3] + part[3:]) / 2 for part in z])
    assert mean.y.tolist() == [0, 1, 2]
    assert mean.digests == digests[:3]


def test_rows_that_were_measured_are_not_measured_again(job, tmp_path, monkeypatch):
    monkeypatch.setattr(measurement, "VARIANTS", {"base": VARIANTS["base"]})
    measured = measurement._rows(job, tmp_path)
    monkeypatch.setattr(measurement, "finished", None)
    assert measurement._rows(job, tmp_path) == measured
    assert measured["base"]["seconds"] > 0


def row(error, nll=1.0, seconds=10.0):
    return {"error": error, "nll": nll, "ece": 1, "brier": 0.1, "seconds": seconds}


CELLS = [
    {
        "data": "mnist",
        "augmentation": augmentation,
        "seed": seed,
        DEFAULT: row(5.0 + seed),
        "base": row(6.0, seconds=20.0),
        "last weights": row(5.5 + 3 * seed, nll=2.0 * 4**seed),
        **({"1 augmented pass": row(4.0)} if augmentation == "standard" else {}),
    }
    for augmentation in ("none", "standard")
    for seed in range(2)
]


def test_variants_are_compared_with_the_default_in_pairs():
    error, spread = tables.difference(CELLS, "last weights", "error")
    assert error == pytest.approx(1.5)
    assert spread == pytest.approx(np.std([0.5, 2.5, 0.5, 2.5], ddof=1) / 2)
    assert tables.ratio(CELLS, "last weights", "nll") == pytest.approx(4.0)
    assert tables.ratio(CELLS, DEFAULT, "seconds", "base") == pytest.approx(0.5)
    assert tables.difference(CELLS, "1 augmented pass", "error")[0] == -1.5


def test_tables_hold_what_was_measured_and_no_more():
    text = tables.summary(CELLS)
    assert "| weights | last weights | 4 | +1.50 ± 0.58 | 4.000 |" in text
    assert "| passes | 1 augmented pass | 2 | -1.50 ± 0.50 |" in text
    assert "explore 0.8" not in text
    text = tables.by_cell(CELLS, "error", 2)
    assert "| row | mnist-none | mnist-standard |" in text
    assert "| default | 5.50 | 5.50 |" in text
    assert "| 1 augmented pass |  | -1.50 |" in text


def test_cells_that_were_left_out_are_named():
    text = tables.missing([("mnist", "none"), ("semeion", "none")], seeds=2)
    assert text.startswith("Measured: 2 of 8 cells, seeds 0 to 1. Not measured: ")
    assert "mnist-standard" in text
    assert "mnist-none" not in text
    every = tables.cells_of(load(PARAMS))
    assert tables.missing(every, seeds=3).endswith("cells, seeds 0 to 2.")
