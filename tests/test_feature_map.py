"""The feature map that gated units see where a model pools it over all places."""

import keras
import numpy as np
import pytest
from keras import layers
from small import cross_entropy

import keras_dalign as kd
from keras_dalign.certification.certify import certify_features
from keras_dalign.head.features import FeaturePass
from keras_dalign.head.objective import loss_of
from keras_dalign.numerics.default_width import least_gates
from keras_dalign.training.feature_map import pooled_less

N = 120


def pooling_net(size=(6, 6), channels=3, behind=(), name="pool", units=4, **options):
    """A feature map, its average over all places, and an output layer."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((*size, 2))
    h = layers.Conv2D(channels, 3, padding="same", activation="relu", name="map")(
        inputs
    )
    h = layers.GlobalAveragePooling2D(name=name, **options)(h)
    for layer in behind:
        h = layer(h)
    return keras.Model(inputs, layers.Dense(units, name="logits")(h))


def samples(size=(6, 6), n=N):
    rng = np.random.default_rng(0)
    return rng.random((n, *size, 2), "float32"), rng.integers(0, 4, n)


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


@pytest.mark.parametrize(
    ("size", "n_samples", "cells"),
    [
        ((6, 6), 27 * 3, (3, 3)),
        ((6, 6), 12 * 3, (2, 2)),
        # One sample fewer does not feed four cells of three channels.
        ((6, 6), 12 * 3 - 1, None),
        # The whole map, as it is.
        ((6, 6), 6 * 6 * 3 * 3, (6, 6)),
        # Cells overlap where they do not divide the map, by less than a half.
        ((7, 5), 3 * 2 * 3 * 3, (3, 2)),
        ((7, 5), 7 * 5 * 3 * 3 - 1, (3, 5)),
        ((8, 8), 5 * 5 * 3 * 3, (4, 4)),
        ((9, 1), 3 * 3 * 3, (3, 1)),
        ((1, 1), 10**6, None),
        ((None, 6), 10**6, None),
        ((6, None), 10**6, None),
    ],
)
def test_the_grid_is_as_fine_as_the_samples_can_feed(size, n_samples, cells):
    inputs = keras.Input((*size, 3))
    features = layers.GlobalAveragePooling2D()(inputs)
    found = pooled_less(features, n_samples)
    assert (None if found is None else found[1].shape) == (cells and (None, *cells, 3))


def test_there_is_a_most_of_features():
    features = layers.GlobalAveragePooling2D()(keras.Input((4, 4, 512)))
    assert pooled_less(features, 10**7)[1].shape == (None, 2, 2, 512)
    features = layers.GlobalAveragePooling2D()(keras.Input((4, 4, 1024)))
    assert pooled_less(features, 10**7) is None


def test_maps_of_other_layouts():
    inputs = keras.Input((3, 6, 6))
    features = layers.GlobalAveragePooling2D(data_format="channels_first")(inputs)
    assert pooled_less(features, 81)[1].shape == (None, 3, 3, 3)
    features = layers.GlobalAveragePooling3D()(keras.Input((4, 4, 4, 3)))
    assert pooled_less(features, 8 * 3 * 3)[1].shape == (None, 2, 2, 2, 3)


@pytest.mark.parametrize("behind", [None, "Dropout", "Flatten"])
def test_the_units_see_averages_of_cells(behind):
    x, _ = samples((7, 5))
    between = {
        None: list,
        "Dropout": lambda: [layers.Dropout(0.5)],
        "Flatten": lambda: [layers.Flatten()],
    }
    base = pooling_net((7, 5), behind=between[behind](), keepdims=behind == "Flatten")
    model = kd.align(base, n_samples=3 * 2 * 3 * 3, seed=0)
    z, u = (numpy(part) for part in model.trunk(x))
    feature_map = numpy(keras.Model(base.input, base.get_layer("map").output)(x))
    np.testing.assert_allclose(z, feature_map.mean(axis=(1, 2)), rtol=1e-5)
    rows, columns = ((0, 3), (2, 5), (4, 7)), ((0, 3), (2, 5))
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            cell = feature_map[:, top:bottom, left:right].mean(axis=(1, 2))
            np.testing.assert_allclose(u[:, i, j], cell, rtol=1e-5)
    assert model.head.dim == 3 * 2 * 3 + 1


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (pooling_net, {"features": None}),
        (pooling_net, {"gates": "learned"}),
        (lambda: pooling_net(behind=[layers.Dense(3)]), {}),
        (lambda: pooling_net(behind=[layers.Activation("relu")]), {}),
        (lambda: pooling_net(behind=[layers.Rescaling(0.5, offset=1.0)]), {}),
        (lambda: pooling_net(behind=[layers.Rescaling([1.0, 2.0, 3.0])]), {}),
    ],
)
def test_else_they_see_what_the_output_layer_sees(make, options):
    model = kd.align(make(), N, **options)
    assert model.head.dim == 3 + 1
    assert model.trunk.output_shape == (None, 3)


@pytest.mark.parametrize("kind", ["mup", "ntk"])
def test_a_multiplier_of_parametrize_is_no_obstacle(kind):
    """The units see the map as it is, the output layer the multiplied average."""
    x, _ = samples()
    base = kd.parametrize(
        pooling_net(channels=3), pooling_net(channels=1), kind=kind, optimizer="sgd"
    )
    multipliers = [
        layer.scale for layer in base.layers if isinstance(layer, layers.Rescaling)
    ]
    assert any(scale != 1 for scale in multipliers)
    model = kd.align(base, n_samples=12 * 3, seed=0)
    assert model.head.dim == 2 * 2 * 3 + 1
    np.testing.assert_array_equal(numpy(model(x)), numpy(base(x)))
    z, u = (numpy(part) for part in model.trunk(x))
    pooled = numpy(keras.Model(base.input, base.get_layer("pool").output)(x))
    np.testing.assert_allclose(u.mean(axis=(1, 2)), pooled, rtol=1e-5)
    scale = z.max() / pooled.max()
    assert not np.isclose(scale, 1.0)
    np.testing.assert_allclose(z, scale * pooled, rtol=1e-5)


def test_no_name_is_taken_twice():
    inputs = h = keras.Input((6, 6, 2))
    for name in ("pool_less", "pool_less_"):
        h = layers.ReLU(name=name)(h)
    h = layers.GlobalAveragePooling2D(name="pool")(h)
    model = kd.align(keras.Model(inputs, layers.Dense(4)(h)), N)
    names = [layer.name for layer in model.trunk.layers]
    assert names[1:3] == ["pool_less", "pool_less_"]
    assert set(names[3:]) == {"pool", "pool_less__"}


def test_a_layer_of_the_name_auto_is_meant():
    inputs = keras.Input((6,))
    h = layers.Dense(5, name="auto")(inputs)
    base = keras.Model(inputs, layers.Dense(4)(layers.Dense(3)(h)))
    assert kd.align(base, N, features="auto").head.dim == 5 + 1


def test_exploration_is_the_base_models(tmp_path):
    """Bit for bit, though the trunk has a second output; files keep it."""
    x, y = samples()

    def trained(model, optimizer):
        model.compile(optimizer, cross_entropy())
        keras.utils.set_random_seed(1)
        model.fit(x, y, batch_size=32, epochs=2, verbose=0)
        return model

    base = trained(pooling_net(), keras.optimizers.Adam())
    other = pooling_net()
    model = kd.align(other, n_samples=N, seed=0)
    trained(model, kd.DAlign(keras.optimizers.Adam(), None, explore=2))
    assert model.head.dim == 3 * 3 * 3 + 1
    for a, b in zip(base.weights, other.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b), err_msg=a.path)
    before = model.predict(x, verbose=0)
    np.testing.assert_array_equal(before, base.predict(x, verbose=0))
    model.fit(x, y, initial_epoch=2, epochs=4, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0)
    )


def backbone(name="backbone", pooling=True, **options):
    """What `keras.applications` gives with `include_top=False` and `pooling="avg"`."""
    inputs = h = keras.Input((6, 6, 2))
    h = layers.Conv2D(3, 3, padding="same", name="map")(h)
    h = layers.BatchNormalization()(h)
    h = layers.Dropout(0.2)(layers.ReLU()(h))
    if pooling:
        h = layers.GlobalAveragePooling2D(name="pool")(h)
    return keras.Model(inputs, h, name=name, **options)


def in_sequential():
    return keras.Sequential(
        [keras.Input((6, 6, 2)), backbone(), layers.Dropout(0.5), layers.Dense(4)]
    )


def inner_sequential():
    inputs = keras.Input((6, 6, 2))
    inner = [layers.Conv2D(3, 3, name="map"), layers.GlobalAveragePooling2D()]
    return keras.Model(inputs, layers.Dense(4)(keras.Sequential(inner)(inputs)))


def three_deep():
    inputs = keras.Input((6, 6, 2))
    h = layers.Dropout(0.3)(backbone("deep")(layers.Rescaling(2.0)(inputs)))
    middle = keras.Model(inputs, h, name="middle")
    outer = keras.Sequential([keras.Input((6, 6, 2)), layers.ReLU(), middle])
    inputs = keras.Input((6, 6, 2))
    h = layers.Dropout(0.5)(inputs=outer(inputs, training=False))
    return keras.Model(inputs, layers.Dense(4)(h))


def many_ends():
    """Two inputs and two outputs, by name; the grid is that of the second."""
    a, b = keras.Input((6, 6, 2), name="a"), keras.Input((6, 6, 2), name="b")
    both = backbone(pooling=False)(layers.Add()([a, b]))
    pooled = layers.GlobalAveragePooling2D()(both)
    ends = {"map": both, "pooled": pooled}
    inner = keras.Model({"a": a, "b": b}, ends, name="inner")
    inputs = keras.Input((6, 6, 2))
    h = inner({"a": inputs, "b": layers.Rescaling(0.5)(inputs)})["pooled"]
    return keras.Model(inputs, layers.Dense(4)(h))


def called_by_others():
    """The inner model's first and last calls are those of other models."""
    inner = backbone()
    first, inputs, last = (keras.Input((6, 6, 2)) for _ in range(3))
    inner(first)
    base = keras.Model(inputs, layers.Dense(4)(inner(layers.ReLU()(inputs))))
    inner(last)
    return base


def of_any_size():
    """The size of the map is known only where the inner model is called."""
    inputs = h = keras.Input((None, None, 2))
    h = layers.GlobalAveragePooling2D()(layers.Conv2D(3, 3, padding="same")(h))
    inner = keras.Model(inputs, h)
    return keras.Sequential([keras.Input((6, 6, 2)), inner, layers.Dense(4)])


def frozen():
    base = in_sequential()
    base.layers[0].trainable = False
    return base


NESTED = [
    in_sequential,
    inner_sequential,
    three_deep,
    many_ends,
    called_by_others,
    of_any_size,
    frozen,
]


@pytest.mark.parametrize("make", NESTED)
def test_a_map_pooled_inside_of_a_nested_model(make, tmp_path):
    """Exploration is the base's bit for bit: the nested model is computed once."""
    x, y = samples()

    def made():
        keras.utils.set_random_seed(0)
        return make()

    def trained(model, optimizer):
        model.compile(optimizer, cross_entropy())
        keras.utils.set_random_seed(1)
        model.fit(x, y, batch_size=40, epochs=2, verbose=0)
        return model

    base = trained(made(), keras.optimizers.Adam())
    other = made()
    model = kd.align(other, n_samples=N, seed=0)
    grid = model.trunk.output_shape[1]
    assert len(grid) == 4
    assert grid[1] > 1
    assert model.head.dim == np.prod(grid[1:]) + 1
    trained(model, kd.DAlign(keras.optimizers.Adam(), None, explore=2))
    for a, b in zip(base.variables, other.variables, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b), err_msg=a.path)
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), base.predict(x, verbose=0)
    )
    model.fit(x, y, initial_epoch=2, epochs=3, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0)
    )


def test_the_grid_of_a_nested_model_is_that_of_its_map():
    x, _ = samples()
    keras.utils.set_random_seed(0)
    inner = backbone(pooling=False)
    inputs = keras.Input((6, 6, 2))
    pooled = keras.Model(inputs, layers.GlobalAveragePooling2D()(inner(inputs)))
    base = keras.Sequential([keras.Input((6, 6, 2)), pooled, layers.Dense(4)])
    z, u = (numpy(part) for part in kd.align(base, N).trunk(x))
    cells = numpy(inner(x)).reshape(N, 3, 2, 3, 2, 3)
    np.testing.assert_allclose(u, cells.mean(axis=(2, 4)), rtol=1e-5)
    np.testing.assert_array_equal(z, numpy(pooled(x)))


def called_twice():
    inner = backbone()
    inputs = keras.Input((6, 6, 2))
    gate = layers.Reshape((1, 1, 3))(inner(inputs))
    h = inner(layers.Multiply()([inputs, layers.Conv2D(2, 1)(gate)]))
    return keras.Model(inputs, layers.Dense(4)(h))


def with_its_own_call():
    class Mine(keras.Model):
        def call(self, inputs, training=None, mask=None):
            return super().call(2.0 * inputs, training=training, mask=mask)

    inner = backbone()
    inner = Mine(inner.input, inner.output)
    return keras.Sequential([keras.Input((6, 6, 2)), inner, layers.Dense(4)])


@pytest.mark.parametrize("make", [called_twice, with_its_own_call])
def test_nested_models_without_a_grid(make):
    x, _ = samples()
    base = make()
    model = kd.align(base, N)
    assert model.trunk.output_shape == (None, 3)
    np.testing.assert_array_equal(
        numpy(model(x, training=False)), numpy(base(x, training=False))
    )


def test_a_finer_map_fits_with_fewer_units():
    x, y = samples()
    fine, coarse = (
        kd.align(pooling_net(), N, seed=0, features=features)
        for features in ("auto", None)
    )
    assert fine.head.default_width() == least_gates(N, 20.0) == 10
    assert coarse.head.default_width() == 60
    for model in (fine, coarse):
        # Four features make an ill-conditioned problem.
        result = kd.solve(
            model, x, y, loss=cross_entropy(), l2=0, max_iterations=5000, verbose=0
        )
        assert result.converged
        assert model.switch_report.rank.full


@pytest.mark.parametrize("l2", [None, 1e-3])
@pytest.mark.parametrize("features", ["auto", None])
def test_a_certificate_by_kept_features_is_that_of_the_inputs(l2, features):
    x, y = samples()
    x[5], y[5], y[7] = x[7], 0, 1
    weight = np.linspace(0.5, 2.0, N).astype("float32")
    model = kd.align(pooling_net(), N, seed=0, features=features)
    kd.solve(model, x, y, loss=cross_entropy(), l2=1e-3, verbose=0)
    kept = FeaturePass(model, keep=True, digest=True)
    kept = kept.run(x, y, weight, batch_size=50).feature_set()
    loss = kd.certify(model, x, y, loss=cross_entropy(), sample_weight=weight, l2=l2)
    convex = loss_of(model, cross_entropy())
    found = certify_features(model, kept, loss=convex, l2=l2, batch_size=50)
    assert found.n_distinct == loss.n_distinct == N - 1
    assert found.conflicts == loss.conflicts
    assert found.objective == loss.objective
    assert found.dtype == loss.dtype
    assert found.lower_bound == loss.lower_bound
    assert found.loss == pytest.approx(loss.loss, rel=1e-6)
    if l2:
        assert found.l2 == l2
        assert found.l2_loss == pytest.approx(loss.l2_loss, rel=1e-6)
        assert found.l2_gap == pytest.approx(loss.l2_gap, rel=1e-3)


def test_a_certificate_by_features_needs_digests():
    x, y = samples()
    model = kd.align(pooling_net(), N, seed=0)
    kept = FeaturePass(model, keep=True).run(x, y).feature_set()
    with pytest.raises(ValueError, match="needs the digests"):
        certify_features(model, kept, loss=loss_of(model, cross_entropy()))
