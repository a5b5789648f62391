import keras
import numpy as np
import pytest
from small import assert_equal, cross_entropy, digits, mlp, weights

import keras_dalign as kd
from keras_dalign.training.inner_optimizers import ContinuedSchedule

BACKEND = keras.backend.backend()
optimizers = keras.optimizers

SETTINGS = {
    "adam": lambda: optimizers.Adam(1e-2),
    "sgd_momentum": lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "clipnorm": lambda: optimizers.Adam(1e-2, clipnorm=0.1),
    "global_clipnorm": lambda: optimizers.Adam(1e-2, global_clipnorm=0.1),
    "adamw": lambda: optimizers.AdamW(1e-2, weight_decay=0.05),
    "ema": lambda: optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.9),
    "ema_overwrite": lambda: optimizers.Adam(
        1e-2, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3
    ),
    "accumulation": lambda: optimizers.Adam(1e-2, gradient_accumulation_steps=2),
    "loss_scale": lambda: optimizers.Adam(1e-2, loss_scale_factor=128.0),
    "dynamic_loss_scale": lambda: optimizers.LossScaleOptimizer(optimizers.Adam(1e-2)),
    "schedule": lambda: optimizers.Adam(
        optimizers.schedules.ExponentialDecay(1e-2, 5, 0.5)
    ),
}


def fitted(optimizer, *, aligned, epochs=3, seed=3, average=0.1):
    x, y = digits(96)
    model = mlp(seed)
    if aligned:
        model = kd.align(model, n_samples=len(x))
        optimizer = kd.DAlign(optimizer, None, explore=epochs, average_weights=average)
    model.compile(optimizer=optimizer, loss=cross_entropy())
    keras.utils.set_random_seed(seed)
    history = model.fit(x, y, batch_size=20, epochs=epochs, verbose=0)
    return model, history


@pytest.mark.parametrize("average", [0, 0.1])
@pytest.mark.parametrize("setting", SETTINGS)
def test_exploration_is_the_inner_optimizer_bit_for_bit(setting, average):
    base, history = fitted(SETTINGS[setting](), aligned=False)
    model, aligned_history = fitted(SETTINGS[setting](), aligned=True, average=average)
    explored = model.trunk.get_weights() + model.head.dense.get_weights()
    assert_equal(weights(base), explored)
    assert history.history["loss"] == aligned_history.history["loss"]
    assert model.phase == "exploring"
    inner = model.optimizer.inner_optimizer
    for mine, bare in zip(inner.variables, base.optimizer.variables, strict=True):
        np.testing.assert_array_equal(np.array(mine), np.array(bare))
    # A step carries one number more than a step of the base model, and the average.
    state = (model.trainable_variables, model.non_trainable_variables)
    assert [len(v) for v in state] == [
        len(base.trainable_variables),
        len(base.non_trainable_variables),
    ]
    extra = 1
    if model.optimizer.weight_average is not None:
        extra += 1 + len(base.trainable_variables)
    assert len(model.optimizer.variables) == len(base.optimizer.variables) + extra


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_survives_the_switch(setting):
    x, y = digits(96)
    model = kd.align(mlp(), n_samples=len(x))
    model.compile(
        optimizer=kd.DAlign(SETTINGS[setting](), None, explore=0.5),
        loss=cross_entropy(),
    )
    # The first exploitation after a switch, and a second fit of the same model.
    history = model.fit(x, y, batch_size=20, epochs=4, verbose=0).history
    frozen = weights(model.trunk)
    again = model.fit(x, y, batch_size=20, epochs=2, verbose=0).history
    assert history["phase"] == [0, 0, 1, 1]
    assert again["phase"] == [1, 1]
    assert_equal(frozen, weights(model.trunk))
    assert np.isfinite(history["loss"] + again["loss"]).all()
    assert again["loss"][-1] < history["loss"][0]


def test_mixed_float16_scales_the_losses_of_both_phases():
    x, y = digits(96)
    with_policy = keras.dtype_policies.DTypePolicy("mixed_float16")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(with_policy)
    try:
        base = mlp(dtype="float32")
        model = kd.align(base, n_samples=len(x))
        model.compile(
            kd.DAlign(optimizers.Adam(1e-2), None, explore=0.5), loss=cross_entropy()
        )
    finally:
        keras.config.set_dtype_policy(before)
    optimizer = model.optimizer
    assert isinstance(optimizer, kd.DAlign)
    for phase in (optimizer.inner_optimizer, optimizer.exploit_optimizer):
        assert isinstance(phase, optimizers.LossScaleOptimizer)
    loss = model.fit(x, y, batch_size=20, epochs=4, verbose=0).history["loss"]
    assert np.isfinite(loss).all()
    assert loss[-1] < loss[0]
    assert int(np.array(optimizer.exploit_optimizer.inner_optimizer.iterations)) > 0


def test_learning_rate_is_that_of_the_current_phase():
    optimizer = kd.DAlign(optimizers.Adam(1e-2), optimizers.SGD(0.5))
    assert float(np.array(optimizer.learning_rate)) == pytest.approx(1e-2)
    optimizer.learning_rate = 2e-2
    optimizer.enter("exploiting")
    assert float(np.array(optimizer.learning_rate)) == pytest.approx(0.5)
    optimizer.learning_rate = 0.25
    inner = optimizer.inner_optimizer.learning_rate
    assert float(np.array(inner)) == pytest.approx(2e-2)
    exploit = optimizer.exploit_optimizer.learning_rate
    assert float(np.array(exploit)) == pytest.approx(0.25)


def test_callbacks_change_the_rate_of_the_current_phase():
    x, y = digits(64)
    seen = []

    def schedule(epoch, rate):
        seen.append(rate)
        return 0.1 / (epoch + 1)

    model = kd.align(mlp(), n_samples=len(x))
    model.compile(
        kd.DAlign(optimizers.SGD(0.3), optimizers.SGD(0.7), explore=2),
        loss=cross_entropy(),
    )
    scheduler = keras.callbacks.LearningRateScheduler(schedule)
    model.fit(x, y, epochs=4, verbose=0, callbacks=[scheduler])
    # Each phase comes with its own rate, then keeps what the callback set.
    np.testing.assert_allclose(seen, [0.3, 0.1, 0.7, 0.1 / 3], rtol=1e-6)


def test_a_copied_schedule_goes_on_where_exploration_left_it():
    x, y = digits(64)
    rates = optimizers.schedules.PiecewiseConstantDecay(
        [4, 8, 12], [1e-1, 2e-2, 3e-3, 4e-4]
    )
    model = kd.align(mlp(), n_samples=len(x))
    model.compile(
        kd.DAlign(optimizers.SGD(rates), None, explore=2), loss=cross_entropy()
    )

    seen = []

    class Rates(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(float(np.array(self.model.optimizer.learning_rate)))

    model.fit(x, y, batch_size=16, epochs=4, verbose=0, callbacks=[Rates()])
    # Four steps an epoch; the rate shown is that of the next step.
    np.testing.assert_allclose(seen, [1e-1, 2e-2, 3e-3, 4e-4], rtol=1e-6)
    assert int(np.array(model.optimizer.iterations)) == 16


def test_a_given_exploit_optimizer_starts_its_own_schedule():
    rates = optimizers.schedules.ExponentialDecay(0.5, 1, 0.9)
    optimizer = kd.DAlign(optimizers.Adam(), optimizers.SGD(rates))
    assert optimizer.exploit_optimizer._learning_rate is rates


def test_continued_schedule_round_trip():
    schedule = ContinuedSchedule(optimizers.schedules.CosineDecay(0.1, 100), start=40)
    config = optimizers.schedules.serialize(schedule)
    loaded = optimizers.schedules.deserialize(config)
    for step in (0, 30, 90):
        value = float(np.array(loaded(step)))
        assert value == pytest.approx(float(np.array(schedule(step))))
        assert value == pytest.approx(float(np.array(schedule.schedule(step + 40))))


@pytest.mark.parametrize(
    ("exploit", "cache"), [(None, False), ("given", "disk"), (None, True)]
)
def test_config_round_trip(exploit, cache):
    given = None if exploit is None else optimizers.SGD(0.5, momentum=0.3)
    optimizer = kd.DAlign(
        optimizers.AdamW(3e-3, weight_decay=0.01),
        given,
        explore=7,
        noise=0.01,
        cache_features=cache,
        name="mine",
    )
    config = keras.saving.serialize_keras_object(optimizer)
    loaded = keras.saving.deserialize_keras_object(config)
    assert isinstance(loaded, kd.DAlign)
    assert loaded.cache_features == cache
    assert keras.saving.serialize_keras_object(loaded) == config
    kind = optimizers.AdamW if exploit is None else optimizers.SGD
    assert isinstance(loaded.exploit_optimizer, kind)


def test_set_weights_round_trip():
    model, _ = fitted(optimizers.Adam(1e-2), aligned=True)
    values = [np.array(v) + 1 for v in model.optimizer.variables]
    model.optimizer.set_weights(values)
    assert_equal(values, [np.array(v) for v in model.optimizer.variables])
    with pytest.raises(ValueError, match="one to one"):
        model.optimizer.set_weights(values[:-1])


def test_variables_are_those_of_the_phase_and_no_model_weight():
    model, _ = fitted(optimizers.Adam(1e-2), aligned=True)
    optimizer = model.optimizer
    inner, exploit = optimizer.inner_optimizer, optimizer.exploit_optimizer
    for phase, active in (("exploring", inner), ("exploiting", exploit)):
        optimizer.enter(phase)
        ids = [id(v) for v in optimizer.variables]
        own = [optimizer.iterations]
        if phase == "exploring":
            own += optimizer.weight_average.variables
        assert ids == [id(v) for v in [*own, *active.variables]]
    everything = {id(v) for v in optimizer.all_variables}
    assert everything >= {id(v) for v in inner.variables + exploit.variables}
    assert not everything & {id(v) for v in model.variables}


@pytest.mark.parametrize("epochs", range(1, 12))
@pytest.mark.parametrize("explore", [0.01, 0.3, 0.6, 0.99])
def test_both_phases_get_an_epoch(explore, epochs):
    explored = kd.DAlign("sgd", None, explore=explore).exploration_epochs(epochs)
    assert 1 <= explored <= max(epochs - 1, 1)
    assert abs(explored - explore * epochs) <= 1


@pytest.mark.parametrize(
    "explore", [0.0, -0.5, 1.5, -1, "all", None, True, float("nan")]
)
def test_explore_out_of_range(explore):
    with pytest.raises(ValueError, match=r"`explore`.*Received: explore="):
        kd.DAlign("adam", None, explore=explore)


def test_explore_beyond_the_epochs():
    with pytest.raises(ValueError, match=r"explore=9, epochs=5"):
        kd.DAlign("adam", None, explore=9).exploration_epochs(5)


@pytest.mark.parametrize("noise", [-1, float("nan"), float("inf"), "x", None])
def test_noise_out_of_range(noise):
    with pytest.raises(ValueError, match=r"`noise`.*Received"):
        kd.DAlign("adam", None, noise=noise)


def test_bad_cache_features():
    with pytest.raises(ValueError, match="cache_features='maybe'"):
        kd.DAlign("adam", cache_features="maybe")


@pytest.mark.parametrize(
    "argument", ["clipnorm", "weight_decay", "use_ema", "gradient_accumulation_steps"]
)
def test_what_belongs_on_the_inner_optimizer(argument):
    with pytest.raises(ValueError, match=f"{argument}.*inner_optimizer"):
        kd.DAlign("adam", **{argument: 1})


def test_bad_optimizers():
    with pytest.raises(TypeError, match="unexpected"):
        kd.DAlign("adam", wrong=1)
    with pytest.raises(ValueError, match="must be a Keras optimizer"):
        kd.DAlign(3)
    with pytest.raises(ValueError, match="exploit_optimizer='fastest'"):
        kd.DAlign("adam", "fastest")
    with pytest.raises(ValueError, match="cannot wrap DAlign"):
        kd.DAlign(kd.DAlign("adam"))
    shared = optimizers.Adam()
    with pytest.raises(ValueError, match="both phases"):
        kd.DAlign(shared, shared)
    shared.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="built for other variables"):
        kd.DAlign(shared)


def test_a_model_without_alignment_head_is_told_to_align():
    x, y = digits(32)
    model = mlp()
    before = weights(model)
    model.compile(kd.DAlign("adam"), loss=cross_entropy())
    with pytest.raises(ValueError, match=r"keras_dalign\.align"):
        model.fit(x, y, verbose=0)
    assert_equal(before, weights(model))


def test_one_dalign_serves_one_model():
    x, _ = digits(32)
    optimizer = kd.DAlign("adam")
    kd.align(mlp(), n_samples=len(x)).compile(optimizer, loss=cross_entropy())
    with pytest.raises(ValueError, match="another model"):
        kd.align(mlp(), n_samples=len(x)).compile(optimizer, loss=cross_entropy())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
@pytest.mark.parametrize("exploit", ["adam", "solve", "load"])
def test_mirrored_strategy(exploit, mirrored, tmp_path):
    """Units that come at the switch belong to the strategy, as does their optimizer."""
    import tensorflow as tf

    x, y = digits(96)
    results = []
    for strategy in (None, mirrored):
        scope = strategy.scope() if strategy else tf.device("/cpu:0")
        options = {"explore": 2}
        if exploit == "solve":
            options |= {"exploit_optimizer": "solve", "solve_options": {"l2": 1e-2}}
        with scope:
            model = kd.align(mlp(), n_samples=len(x), seed=5)
            model.compile(
                kd.DAlign(optimizers.Adam(1e-2), **options), loss=cross_entropy()
            )
        if exploit == "load" and strategy:
            model.load_weights(tmp_path / "model.weights.h5")
        arguments = {"batch_size": 32, "verbose": 0, "shuffle": False}
        history = model.fit(x, y, epochs=4, **arguments)
        phases = history.history["phase"]
        assert phases[-2:] == [1, 1]
        if exploit == "load" and not strategy:
            model.save_weights(tmp_path / "model.weights.h5")
            model.fit(x, y, epochs=4, **arguments)
        if strategy:
            made = [*model.head.units_variables, *model.optimizer.variables]
            for variable in made:
                assert isinstance(variable.value, tf.distribute.DistributedValues)
        results.append([*weights(model), model.predict(x, verbose=0)])
    for alone, replicated in zip(*results, strict=True):
        np.testing.assert_allclose(alone, replicated, atol=2e-4)


def test_the_optimizer_of_exploitation_is_built_at_the_switch():
    x, y = digits(96)
    model = kd.align(mlp(), n_samples=len(x))
    model.compile(
        kd.DAlign(optimizers.Adam(1e-2), None, explore=2), loss=cross_entropy()
    )
    optimizer = model.optimizer
    assert optimizer.inner_optimizer.built
    assert not optimizer.exploit_optimizer.built
    model.fit(x, y, epochs=3, verbose=0)
    exploit = optimizer.exploit_optimizer
    shapes = [tuple(v.shape) for v in exploit._trainable_variables]
    assert shapes == [model.head.q.shape, model.head.bias.shape]
    # Other units begin with an optimizer of their own; the same ones go on.
    model.fit(x, y, epochs=1, verbose=0)
    assert optimizer.exploit_optimizer is exploit
    steps = int(np.array(exploit.iterations))
    assert steps == 6
    model.set_width(5)
    assert optimizer.exploit_optimizer is not exploit
    assert int(np.array(optimizer.exploit_optimizer.iterations)) == 0
    assert optimizer.exploit_optimizer.get_config() == exploit.get_config()


def test_the_solver_for_exploitation():
    options = {"tol": 1e-4, "l2": "auto", "method": "lbfgs", "max_iterations": 7}
    optimizer = kd.DAlign(optimizers.Adam(), "solve", solve_options=options)
    assert optimizer.solves
    assert not kd.DAlign("adam", "sgd").solves
    config = keras.saving.serialize_keras_object(optimizer)
    loaded = keras.saving.deserialize_keras_object(config)
    assert loaded.solves
    assert loaded.solve_options == options
    assert keras.saving.serialize_keras_object(loaded) == config
    assert config["config"]["exploit_optimizer"] == "solve"
    # Callbacks read and set a rate in every phase.
    optimizer.enter("exploiting")
    assert float(np.array(optimizer.learning_rate)) == 0.0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"solve_options": {"tol": -1}}, "tol=-1"),
        ({"solve_options": {"rate": 1}}, r"Received: \['rate'\]"),
        ({"solve_options": 3}, "must be a dict"),
        ({"cache_features": False}, "must be kept"),
        (
            {"exploit_optimizer": "sgd", "solve_options": {}},
            "belong to the solver",
        ),
    ],
)
def test_bad_solver_options(arguments, match):
    with pytest.raises(ValueError, match=match):
        kd.DAlign("adam", **{"exploit_optimizer": "solve", **arguments})
