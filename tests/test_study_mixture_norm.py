"""Mixture normalisation against batch normalisation and sums by hand."""

import keras
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from keras import ops
from matplotlib.figure import Figure

from pipelines.studies import mixture_norm, settings
from pipelines.studies.mixture_norm.layer import MixtureNormalization
from pipelines.studies.mixture_norm.network import adapt, network

TINY = {
    "n": 40,
    "validation": 20,
    "test": 20,
    "components": [1, 2],
    "learning_rates": [0.1],
    "batch_size": 20,
    "epochs": 2,
    "every": 2,
    "target": 0.9,
    "seeds": 1,
}


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(1.0, 2.0, shape).astype("float32")


def test_the_study_at_a_tiny_size():
    assert set(settings.load()["mixture_norm"]) == set(TINY)
    rows = []
    for cell in mixture_norm.cells(TINY):
        found = mixture_norm.measure(TINY, cell)
        assert [row["updates"] for row in found] == [2, 4]
        for row in found:
            assert cell.items() <= row.items()
            assert 0 <= row["validation"] <= 1
        rows += found
    claims = mixture_norm.claims(rows, TINY)
    assert len({claim.name for claim in claims}) == len(claims) == 4
    assert all(len(claim.values) == 1 for claim in claims)
    axes = Figure().subplots(1, mixture_norm.PANELS)
    mixture_norm.draw(axes, rows)
    assert all(len(panel.lines) == 2 for panel in axes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"component": 3}, "no key 'component'; the nearest is 'components'"),
        ({"components": [1, 0]}, r"norm.components` must be .*components=\[1, 0\]"),
        ({"components": [2, 3]}, "first of `components` must be 1"),
        ({"learning_rates": [-0.1]}, "norm.learning_rates` must be a list of numbers"),
        ({"n": 1797}, "There are 1797 digits. Received: 1837"),
    ],
)
def test_settings_that_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        mixture_norm.cells({**TINY, **changes})


def test_arguments_that_are_refused():
    with pytest.raises(ValueError, match=r"`components` .*Received: components=0"):
        MixtureNormalization(0)
    with pytest.raises(ValueError, match=r"`steps` .*Received: steps=0"):
        MixtureNormalization(1, steps=0)


@pytest.mark.parametrize("shape", [(50, 3), (5, 4, 4, 3)])
def test_one_component_is_batch_normalisation(shape):
    x = images(*shape)
    mixture = MixtureNormalization(1, momentum=0.9, epsilon=1e-3)
    batch = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-3)
    for layer in (mixture, batch):
        layer.build((None, *shape[1:]))
        layer.gamma.assign([0.5, 1.0, 2.0])
        layer.beta.assign([-1.0, 0.0, 1.0])
    for training in (False, True, True, False):
        found, expected = (layer(x, training=training) for layer in (mixture, batch))
        np.testing.assert_allclose(
            ops.convert_to_numpy(found), ops.convert_to_numpy(expected), atol=1e-5
        )
    for average, expected in (
        (mixture.means, batch.moving_mean),
        (mixture.variances, batch.moving_variance),
    ):
        np.testing.assert_allclose(
            ops.convert_to_numpy(average)[0],
            ops.convert_to_numpy(expected),
            rtol=1e-5,
        )


def test_networks_of_one_component_train_as_with_batch_normalisation():
    x, y = images(40, 8, 8, 1), np.arange(40) % 10
    ends = []
    for kind in (MixtureNormalization, keras.layers.BatchNormalization):
        keras.utils.set_random_seed(0)
        norm = kind(1) if kind is MixtureNormalization else kind(momentum=0.9)
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Conv2D(4, 3, use_bias=False),
                norm,
                keras.layers.ReLU(),
                keras.layers.Flatten(),
                keras.layers.Dense(10),
            ]
        )
        model.compile(
            "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        model.fit(x, y, batch_size=20, epochs=3, shuffle=False, verbose=0)
        ends.append(model.predict(x, verbose=0))
    np.testing.assert_allclose(*ends, atol=1e-4)


def by_hand(rows, shares, means, variances, epsilon):
    """The layer, row by row and component by component, in float64."""
    out, responsibilities = np.zeros_like(rows), []
    for place, row in enumerate(rows):
        densities = [
            share
            * np.exp(-0.5 * ((row - mean) ** 2 / (variance + epsilon)).sum())
            / np.sqrt((variance + epsilon).prod())
            for share, mean, variance in zip(shares, means, variances, strict=True)
        ]
        responsibilities.append(np.array(densities) / sum(densities))
        for k, r in enumerate(responsibilities[-1]):
            factor = r / np.sqrt(shares[k] * (variances[k] + epsilon))
            out[place] += factor * (row - means[k])
    return out, np.array(responsibilities)


def test_three_components_by_hand():
    x = images(30, 2).astype("float64")
    layer = MixtureNormalization(3, momentum=0.8, epsilon=0.01, steps=1)
    layer.build((None, 2))
    shares = np.array([0.2, 0.3, 0.5])
    means, variances = images(3, 2, seed=1), np.abs(images(3, 2, seed=2)) + 0.5
    layer.shares.assign(shares)
    layer.means.assign(means)
    layer.variances.assign(variances)
    expected, r = by_hand(x, shares, means, variances, 0.01)
    found = ops.convert_to_numpy(layer(x.astype("float32"), training=False))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)

    # In training, one step of expectation maximisation from there.
    batch_shares = r.mean(axis=0)
    batch_means = np.stack([np.average(x, axis=0, weights=w) for w in r.T])
    batch_variances = np.stack(
        [
            np.average((x - mean) ** 2, axis=0, weights=w)
            for w, mean in zip(r.T, batch_means, strict=True)
        ]
    )
    expected = sum(
        r[:, [k]]
        / np.sqrt(batch_shares[k])
        * (x - batch_means[k])
        / np.sqrt(batch_variances[k] + 0.01)
        for k in range(3)
    )
    found = ops.convert_to_numpy(layer(x.astype("float32"), training=True))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    for average, before, batch in (
        (layer.shares, shares, batch_shares),
        (layer.means, means, batch_means),
        (layer.variances, variances, batch_variances),
    ):
        np.testing.assert_allclose(
            ops.convert_to_numpy(average), 0.8 * before + 0.2 * batch, rtol=1e-3
        )


def test_clusters_that_are_apart_are_found_and_have_variance_k():
    centres = np.array([[-50.0, 0.0], [50.0, 20.0]])
    x = (np.repeat(centres, [30, 90], axis=0) + images(120, 2)).astype("float32")
    layer = MixtureNormalization(2, epsilon=1e-6)
    layer.build((None, 2))
    layer.adapt(x, seed=0)
    assert sorted(np.round(ops.convert_to_numpy(layer.shares), 6)) == [0.25, 0.75]
    found = ops.convert_to_numpy(layer(x, training=True))
    np.testing.assert_allclose(found.mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(found.var(axis=0), 2.0, rtol=1e-4)


def test_a_component_that_has_lost_all_rows():
    layer = MixtureNormalization(2)
    layer.build((None, 2))
    layer.means.assign([[0.0, 0.0], [1e6, 1e6]])
    found = ops.convert_to_numpy(layer(images(20, 2), training=True))
    assert np.isfinite(found).all()
    assert all(np.isfinite(ops.convert_to_numpy(w)).all() for w in layer.weights)


def test_no_derivative_goes_through_responsibilities():
    # Of the outputs' sum it would: constant responsibilities make it zero.
    tf = pytest.importorskip("tensorflow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("The gradient is taken with TensorFlow.")
    x = tf.constant(images(30, 2))
    layer = MixtureNormalization(2, steps=1)
    layer.build((None, 2))
    layer.means.assign([[0.0, 0.0], [2.0, 2.0]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(layer(x, training=True))
    assert float(tf.reduce_max(tf.abs(tape.gradient(total, x)))) < 1e-4


@pytest.mark.parametrize("kind", ["convolution", "dense"])
def test_all_layers_are_adapted_to_what_they_see(kind):
    model = network(kind, 2, seed=0)
    x = images(30, 8, 8, 1)
    adapt(model, x, seed=0)
    layers = [each for each in model.layers if isinstance(each, MixtureNormalization)]
    assert len(layers) == 3
    for layer in layers:
        first, second = ops.convert_to_numpy(layer.means)
        assert np.abs(first - second).max() > 0.1
    assert tuple(model(x).shape) == (30, 10)


def row(rate, seed, updates, validation, test):
    return {
        "learning_rate": rate,
        "seed": seed,
        "updates": updates,
        "validation": validation,
        "test": test,
    }


def test_the_rate_is_chosen_on_the_validation_draw():
    rows = [
        row(0.1, 0, 5, 0.2, 0.9),
        row(0.1, 0, 10, 0.1, 0.9),
        row(1.0, 0, 5, 0.4, 0.0),
        row(1.0, 0, 10, 0.0, 0.0),
    ]
    assert mixture_norm.best(rows) == rows[:2]


def test_updates_until_the_target():
    rows = [
        row(0.1, seed, updates, 0.0, test)
        for seed, tests in enumerate([(0.3, 0.05, 0.2), (0.3, 0.2, 0.1)])
        for updates, test in zip((5, 10, 15), tests, strict=True)
    ]
    assert mixture_norm.updates_to(rows, 0.05) == {0: 10, 1: 15}
