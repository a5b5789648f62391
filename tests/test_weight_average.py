import keras
import numpy as np
import pytest
from small import (
    assert_equal,
    convnet,
    cross_entropy,
    digit_images,
    digits,
    fit_with_backup,
    mlp,
    weights,
)

import keras_dalign as kd
from keras_dalign.training.switch import switch

SHARE = 0.2


class Noted(keras.callbacks.Callback):
    """The explored weights after every step, and their average computed outside."""

    def __init__(self, share=SHARE):
        super().__init__()
        self.fade = 1 / share - 1
        self.steps = 0
        self.average = None

    def on_train_batch_end(self, batch, logs=None):
        # JAX's trainer hands its state around, and syncs when asked.
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        if self.model.phase != "exploring":
            return
        now = [np.array(v, "float64") for v in self.model.trainable_variables]
        self.steps += 1
        rate = (self.fade + 1) / (self.steps + self.fade)
        before = now if self.average is None else self.average
        self.average = [a + rate * (w - a) for a, w in zip(before, now, strict=True)]


def compiled(base=None, n=96, optimizer=None, **options):
    model = kd.align(base or mlp(), n_samples=n, seed=1)
    inner = optimizer or keras.optimizers.Adam(1e-2)
    options = {"explore": 2, "average_weights": SHARE, **options}
    model.compile(kd.DAlign(inner, **options), loss=cross_entropy())
    return model


def averages(model):
    return [np.array(v) for v in model.optimizer.weight_average.averages]


@pytest.mark.parametrize("make", [mlp, convnet])
def test_the_average_is_that_computed_outside(make):
    x, y = digits(96) if make is mlp else digit_images(96)
    model = compiled(make(), exploit_optimizer=None, explore=3)
    noted = Noted()
    model.fit(x, y, batch_size=20, epochs=3, callbacks=[noted], verbose=0)
    assert noted.steps == 15
    assert model.phase == "exploring"
    for found, wanted in zip(averages(model), noted.average, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exploit", ["auto", None])
def test_the_switch_goes_on_from_the_average(exploit):
    x, y = digits(96)
    model = compiled(exploit_optimizer=exploit)
    noted = Noted()
    model.fit(x, y, batch_size=20, epochs=3, callbacks=[noted], verbose=0)
    assert model.phase == "exploiting"
    assert model.switch_report.averaged
    assert "weights averaged" in str(model.switch_report)
    kept = [*model.trunk.trainable_variables, *model.head.dense.trainable_variables]
    for found, wanted in zip(kept, noted.average, strict=True):
        np.testing.assert_allclose(np.array(found), wanted, rtol=1e-5, atol=1e-6)


def test_batch_norm_is_re_estimated_for_the_averaged_weights():
    x, y = digit_images(96)
    model = compiled(convnet())
    model.fit(x, y, epochs=2, verbose=0)
    before = weights(model.trunk)
    kd.reestimate_batch_norm(model.trunk, x)
    for found, wanted in zip(weights(model.trunk), before, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_without_an_average_the_switch_goes_on_from_the_last_weights():
    x, y = digits(96)
    explored = compiled(average_weights=0, exploit_optimizer=None)
    explored.fit(x, y, epochs=2, verbose=0)
    model = compiled(average_weights=0)
    model.fit(x, y, epochs=2, verbose=0)
    assert model.optimizer.weight_average is None
    assert not model.switch_report.averaged
    assert_equal(weights(explored.trunk), weights(model.trunk))


def test_an_optimizer_with_its_own_average_keeps_it():
    x, y = digits(96)
    adam = keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.9)
    model = compiled(optimizer=adam)
    model.fit(x, y, epochs=2, verbose=0)
    assert model.optimizer.weight_average is None


def test_no_step_no_average():
    x, y = digits(96)
    model = compiled(explore=0)
    before = weights(model.trunk)
    model.fit(x, y, epochs=1, verbose=0)
    assert not model.switch_report.averaged
    assert_equal(before, weights(model.trunk))


def test_a_failing_switch_leaves_the_last_weights():
    x, y = digits(96)
    model = compiled(explore=2, exploit_optimizer=None)
    model.fit(x, y, epochs=2, verbose=0)
    before = weights(model)
    with pytest.raises(ValueError, match="constant"):
        switch(model, 0 * x, average=model.optimizer.weight_average)
    assert_equal(before, weights(model))
    assert model.phase == "exploring"


def test_a_resumed_run_has_the_same_average(tmp_path):
    x, y = digits(96)

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(folder, *callbacks):
        model = compiled(exploit_optimizer=None, explore=4)
        fit_with_backup(model, x, y, folder, *callbacks)
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Stop())
    resumed = run(tmp_path / "killed")
    assert_equal(averages(whole), averages(resumed))
    assert_equal(weights(whole), weights(resumed))


def test_a_saved_model_has_its_average(tmp_path):
    x, y = digits(96)
    model = compiled(exploit_optimizer=None, explore=2)
    model.fit(x, y, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal(averages(model), averages(loaded))
    assert loaded.optimizer.average_weights == SHARE


def test_a_file_without_an_average_is_loaded(tmp_path):
    x, y = digits(96)
    model = compiled(exploit_optimizer=None, explore=2)
    model.fit(x, y, epochs=2, verbose=0)
    store = {}
    model.optimizer.save_own_variables(store)
    # Version 0.2.0 kept the number of steps alone.
    fresh = compiled(exploit_optimizer=None, explore=2)
    fresh.optimizer.load_own_variables({"0": store["0"]})
    assert not int(np.array(fresh.optimizer.weight_average.steps))
    assert int(np.array(fresh.optimizer.iterations)) == 6
    noted = Noted()
    fresh.fit(x, y, epochs=2, callbacks=[noted], verbose=0)
    for found, wanted in zip(averages(fresh), noted.average, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [-0.1, 1.0, 2, "half", True, None])
def test_bad_shares(share):
    with pytest.raises(ValueError, match="average_weights="):
        kd.DAlign("adam", average_weights=share)
