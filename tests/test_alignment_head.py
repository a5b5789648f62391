"""The head against explicit features in float64, and through both of its phases."""

import math
import random

import keras
import numpy as np
import pytest
from keras import ops
from small import KINDS, gates_of

from keras_dalign import AlignmentHead
from keras_dalign.head import gate_initialization
from keras_dalign.numerics.default_width import default_width, least_gates
from keras_dalign.numerics.gram import explicit_features, gram_matrix

BACKEND = keras.backend.backend()
GATES = ["random", "learned"]
PHASES = ["exploring", "exploiting"]
POLICIES = ["float32", "mixed_bfloat16", "mixed_float16"]
# Keras computes in float64 on TensorFlow alone: its `result_type` maps float64 to
# float32 on the other two, whatever a layer's policy.
EXACT, TOLERANCE = ("float64", 1e-11) if BACKEND == "tensorflow" else ("float32", 2e-5)
if BACKEND == "tensorflow":
    POLICIES.append("float64")


def array(value):
    return np.array(ops.convert_to_numpy(value), dtype="float64")


def assert_close(actual, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * scale)


def features(n=9, p=4, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(0.5, 2.0, size=(n, p)).astype(dtype)


def sigmoid(t):
    return np.exp(-np.logaddexp(0.0, -t))


def set_statistics(head, u):
    head.standardize.moving_mean.assign(u.reshape(len(u), -1).mean(axis=0))
    head.standardize.moving_variance.assign(u.reshape(len(u), -1).var(axis=0))


def randomize(head, seed=1):
    """Gives every weight that is trained, in either phase, a value of its own."""
    rng = np.random.default_rng(seed)
    trained = [head.q, head.bias, *(head.dense.weights if head.dense else [])]
    for variable in trained:
        variable.assign(rng.normal(size=variable.shape))


def exploiting(kind="shared", units=3, z=None, u=None, seed=5, **options):
    """A built head in its second phase, with weights that are all in use."""
    z = features(dtype="float64") if z is None else z
    head = AlignmentHead(units, seed=seed, **{"width": 5, **KINDS[kind], **options})
    head.build(z.shape if u is None else [z.shape, u.shape])
    set_statistics(head, z if u is None else u)
    if head.gates == "random":
        head.start_exploiting()
        randomize(head)
    else:
        randomize(head)
        head.start_exploiting(noise=0.3)
        head.q.assign_add(np.random.default_rng(2).normal(size=head.q.shape))
    return head


def reference(head, z, u=None):
    """`a . z + b0 + b + Phi q`, from the explicit features of every class."""
    zh = head.normalize_exactly(z if u is None else u)
    out = np.zeros((len(z), head.units))
    for c in range(head.units):
        phi = explicit_features(zh, *gates_of(head, c), head.slope)
        out[:, c] = phi @ array(head.q)[:, c].T.ravel()
    out += array(head.bias)
    if head.dense is not None:
        out += z @ array(head.dense.kernel)
        if head.dense.use_bias:
            out += array(head.dense.bias)
    return out


class TestExploiting:
    @pytest.mark.parametrize("units", [1, 3])
    @pytest.mark.parametrize("kind", KINDS)
    def test_is_the_explicit_features_times_q(self, kind, units):
        z = features(dtype="float64")
        head = exploiting(kind, units, dtype=EXACT)
        result = array(head(z))
        assert result.shape == (9, units)
        assert_close(result, reference(head, z))

    @pytest.mark.parametrize("slope", [0.5, 4.0, 100.0])
    def test_uses_its_slope(self, slope):
        z = features(dtype="float64")
        head = exploiting(slope=slope, dtype=EXACT)
        assert_close(array(head(z)), reference(head, z))

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_pair_feeds_the_units_with_the_second_tensor(self, kind):
        z = features(dtype="float64")
        u = np.random.default_rng(3).normal(size=(9, 2, 3, 2))
        head = exploiting(kind, z=z, u=u, dtype=EXACT)
        assert head.q.shape == (2 * 3 * 2 + 1, 3, 5)
        result = array(head([z, u]))
        assert_close(result, reference(head, z, u))

    def test_shared_gates_are_separate_ones_that_are_equal(self):
        z = features(dtype="float64")
        shared = exploiting("shared", dtype=EXACT)
        assert shared.r.shape == (5, 1, 5)
        assert shared.w.shape == (1, 5)
        separate = exploiting("separate", dtype=EXACT)
        assert separate.r.shape == (5, 3, 5)
        assert separate.w.shape == (3, 5)
        separate.r.assign(np.repeat(array(shared.r), 3, axis=1))
        separate.w.assign(np.repeat(array(shared.w), 3, axis=0))
        for name in ("q", "bias"):
            getattr(separate, name).assign(array(getattr(shared, name)))
        separate.dense.set_weights(shared.dense.get_weights())
        assert_close(array(separate(z)), array(shared(z)))

    @pytest.mark.parametrize("kind", KINDS)
    def test_jacobian_times_its_transpose_is_the_gram_matrix(self, kind):
        """Linear probing: the output's change for every single entry of q."""
        z = features(n=6, dtype="float64")
        head = exploiting(kind, units=2, z=z, width=4, dtype=EXACT)
        zero = np.zeros(head.q.shape)
        head.q.assign(zero)
        constant = array(head(z))
        for c in range(2):
            jacobian = []
            for j, k in np.ndindex(head.q.shape[0], head.width):
                unit = zero.copy()
                unit[j, c, k] = 1.0
                head.q.assign(unit)
                jacobian.append(array(head(z)) - constant)
            jacobian = np.stack(jacobian, axis=-1)
            np.testing.assert_array_equal(jacobian[:, 1 - c], 0.0)
            zh = head.normalize_exactly(z)
            gram = gram_matrix(zh, *gates_of(head, c), head.slope)
            assert_close(jacobian[:, c] @ jacobian[:, c].T, gram)

    @pytest.mark.parametrize("kind", KINDS)
    def test_ignores_the_batch_it_is_given(self, kind):
        z = features()
        head = exploiting(kind)
        mean = array(head.standardize.moving_mean)
        trained = array(head(z, training=True))
        np.testing.assert_array_equal(trained, array(head(z, training=False)))
        np.testing.assert_array_equal(array(head.standardize.moving_mean), mean)

    def test_cannot_start_twice(self):
        with pytest.raises(ValueError, match="in the phase 'exploiting'"):
            exploiting().start_exploiting()


class TestNormalize:
    def test_is_standardised_and_has_one_length(self):
        z = features(n=50, dtype="float64") * [1, 10, 100, 1000]
        head = exploiting(z=z, dtype=EXACT)
        zh = array(head.normalize(z))
        u = (z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + 1e-6)
        u *= 2.0 / np.linalg.norm(u, axis=1, keepdims=True)
        assert_close(zh[:, :4], u)
        np.testing.assert_array_equal(zh[:, 4], 1.0)
        np.testing.assert_allclose(head.normalize_exactly(z)[:, :4], u, rtol=1e-4)
        assert_close(head.normalize_exactly(z), zh)

    def test_features_at_their_mean_leave_the_constant(self):
        z = np.stack([np.ones(4), np.arange(4.0), 2 - np.arange(4.0)]).astype("float32")
        head = exploiting(z=z)
        expected = [0, 0, 0, 0, 1]
        np.testing.assert_array_equal(array(head.normalize(z))[0], expected)
        np.testing.assert_array_equal(head.normalize_exactly(z)[0], expected)
        assert np.all(np.isfinite(array(head(z))))


class TestExploring:
    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("use_bias", [True, False])
    def test_random_gates_are_the_dense_layer_bit_for_bit(self, use_bias, policy):
        z = features(n=33, p=17)
        dense = keras.layers.Dense(
            3, use_bias=use_bias, bias_initializer="normal", dtype=policy
        )
        expected = dense(z)
        head = AlignmentHead(3, width=5, dense=dense, dtype=policy)
        result = head(z, training=True)
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(array(result), array(expected))
        assert head.dense is dense
        # There are no units yet, and nothing is reserved for them.
        assert head.width is None
        assert head.q is head.r is head.w is head.bias is None
        assert head.units_variables == head.exploited_variables == []
        assert len(head.weights) == len(dense.weights) + 3

    def test_the_shared_dense_layers_activation_is_ignored(self):
        z = features()
        dense = keras.layers.Dense(3, "softmax")
        dense(z)
        expected = z.astype("float64") @ array(dense.kernel)
        result = array(AlignmentHead(3, width=5, dense=dense)(z))
        np.testing.assert_allclose(result, expected, atol=1e-5)

    @pytest.mark.parametrize("training", [True, False])
    def test_learned_gates_are_a_silu_layer(self, training):
        z = features(dtype="float64")
        head = AlignmentHead(3, width=5, gates="learned", slope=2.5, dtype=EXACT)
        head.build(z.shape)
        randomize(head)
        head.standardize.moving_mean.assign([1.0, 0.0, -1.0, 2.0])
        u = z if training else z - [1.0, 0.0, -1.0, 2.0]
        if training:
            u = (u - u.mean(axis=0)) / np.sqrt(u.var(axis=0) + 1e-6)
        u *= 2.0 / np.linalg.norm(u, axis=1, keepdims=True)
        v = np.concatenate([u, np.ones((9, 1))], axis=1)
        t = np.einsum("nd,dck->nck", v, array(head.q))
        expected = np.einsum("nck,ck->nc", t * sigmoid(2.5 * t), array(head.w))
        expected += array(head.bias)
        assert_close(array(head(z, training=training)), expected)

    def test_learned_gates_move_the_statistics_in_training_alone(self):
        z = features()
        head = AlignmentHead(2, width=3, gates="learned")
        head(z, training=False)
        np.testing.assert_array_equal(array(head.standardize.moving_mean), 0.0)
        head(z, training=True)
        np.testing.assert_allclose(
            array(head.standardize.moving_mean), 0.1 * z.mean(axis=0), rtol=1e-5
        )


class TestSwitch:
    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("use_bias", [True, False])
    def test_random_gates_do_not_change_the_output_by_a_bit(self, use_bias, policy):
        z = features(n=33, p=17)
        dense = keras.layers.Dense(
            3, use_bias=use_bias, bias_initializer="normal", dtype=policy
        )
        head = AlignmentHead(3, width=50, dense=dense, dtype=policy)
        head.build(z.shape)
        before = head(z)
        head.start_exploiting()
        after = head(z)
        assert head.phase == "exploiting"
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(array(after), array(before))

    def test_random_gates_are_gaussian_with_mean_square_one_over_d(self):
        head = AlignmentHead(8, width=200, seed=3)
        head.build((None, 24))
        head.start_exploiting()
        assert head.r.shape == (25, 1, 200)
        head = AlignmentHead(8, width=200, seed=3, share_gates=False)
        head.build((None, 24))
        head.start_exploiting()
        r = array(head.r)
        assert r.shape == (25, 8, 200)
        assert abs(r.mean()) < 5 * 0.2 / math.sqrt(r.size)
        assert r.var() == pytest.approx(1 / 25, rel=0.05)
        assert np.mean(np.abs(r) < 0.2) == pytest.approx(0.6827, abs=0.02)
        np.testing.assert_array_equal(array(head.q), 0.0)
        np.testing.assert_array_equal(array(head.bias), 0.0)

    def test_learned_gates_are_the_units_own_weights(self):
        z = features()
        head = AlignmentHead(3, width=50, gates="learned", seed=4)
        head.build(z.shape)
        head.q.assign(array(head.q) * 7)
        set_statistics(head, z)
        q, before = array(head.q), array(head(z))
        head.start_exploiting()
        np.testing.assert_array_equal(array(head.r), array(head.q))
        moved = array(head.q) - q
        # Noise of 1e-3 in units of q's own scale, drawn independently of q.
        assert np.std(moved) / np.sqrt(np.mean(q**2)) == pytest.approx(1e-3, rel=0.15)
        assert abs(np.corrcoef(moved.ravel(), q.ravel())[0, 1]) < 0.2
        after = array(head(z))
        assert 0 < np.abs(after - before).max() < 0.05 * np.abs(before).max()

    def test_without_noise_learned_gates_keep_the_output(self):
        z = features()
        head = AlignmentHead(3, width=7, gates="learned")
        before = array(head(z))
        head.start_exploiting(noise=0.0)
        np.testing.assert_array_equal(array(head(z)), before)

    def test_gates_do_not_follow_q_any_more(self):
        head = exploiting("learned")
        r = array(head.r)
        head.q.assign(array(head.q) + 1)
        np.testing.assert_array_equal(array(head.r), r)

    @pytest.mark.parametrize("noise", [-1e-3, math.nan, math.inf, "1", True, None])
    def test_bad_noise(self, noise):
        head = AlignmentHead(2, width=3, gates="learned")
        head.build((None, 4))
        with pytest.raises(ValueError, match=f"non-negative number.*noise={noise!r}"):
            head.start_exploiting(noise)
        assert head.phase == "exploring"

    def test_an_unbuilt_head_has_no_gates_to_set(self):
        with pytest.raises(ValueError, match="not built"):
            AlignmentHead(2, width=3).start_exploiting()


class TestWidth:
    @pytest.mark.parametrize(
        ("n", "p", "width"), [(100, 4, 40), (101, 4, 41), (60000, 64, 1847)]
    )
    def test_the_default_has_twice_the_columns_it_needs(self, n, p, width):
        head = AlignmentHead(1, n_samples=n)
        head.build((None, p))
        assert head.default_width() == width == math.ceil(2 * n / (p + 1))
        head.start_exploiting()
        assert head.width == width
        assert head.q.shape == head.r.shape == (p + 1, 1, width)

    def test_the_default_has_an_open_gate_for_every_sample(self):
        head = AlignmentHead(1, n_samples=1000, slope=20.0)
        head.build((None, 2000))
        assert head.default_width() == least_gates(1000, 20.0) == 12
        gentle = AlignmentHead(1, n_samples=1000, slope=4.0)
        gentle.build((None, 2000))
        assert gentle.default_width() == least_gates(1000, 4.0) < 12

    def test_counts_the_gated_features(self):
        head = AlignmentHead(2, n_samples=100)
        head.build([(None, 4), (None, 3, 3, 1)])
        assert head.default_width() == 20

    @pytest.mark.parametrize("gates", GATES)
    def test_an_explicit_width_wins(self, gates):
        head = AlignmentHead(2, width=3, n_samples=100, gates=gates)
        head.build((None, 4))
        assert head.requested_width == head.default_width() == 3
        head.start_exploiting()
        assert head.width == 3

    def test_the_switch_may_ask_for_another(self):
        head = AlignmentHead(2, width=3)
        head.build((None, 4))
        head.start_exploiting(width=7)
        assert head.width == 7
        assert head.requested_width == 3

    @pytest.mark.parametrize("share_gates", [True, False])
    def test_gates_are_nested(self, share_gates):
        """The first ones are the same at every width."""
        head = AlignmentHead(2, width=3, share_gates=share_gates, seed=2)
        head.build((None, 4))
        head.start_exploiting()
        narrow = array(head.r), array(head.w)
        head.q.assign(np.ones(head.q.shape))
        head.set_width(12)
        assert head.q.shape == (5, 2, 12)
        np.testing.assert_array_equal(array(head.q), 0.0)
        np.testing.assert_array_equal(array(head.r)[..., :3], narrow[0])
        signs = np.sign(array(head.w))
        np.testing.assert_array_equal(signs[:, :3], np.sign(narrow[1]))
        np.testing.assert_allclose(np.abs(array(head.w)), 1 / math.sqrt(12), rtol=1e-6)

    def test_what_the_switch_would_draw_is_what_it_draws(self):
        for options in KINDS.values():
            head = AlignmentHead(2, width=3, seed=4, **options)
            head.build((None, 4))
            r, w = head.gates_at_switch(noise=0.1)
            head.start_exploiting(noise=0.1)
            for drawn, held in zip((r, w), head.gates_in_use(), strict=True):
                assert drawn.shape == held.shape
                np.testing.assert_allclose(held, drawn, rtol=1e-6)

    def test_replaced_units_are_gone(self):
        head = exploiting()
        old = [id(v) for v in head.units_variables]
        head.set_width(9)
        for variables in (head.weights, head.variables, head.trainable_variables):
            assert not {id(v) for v in variables} & set(old)
        assert [v.path.rpartition("/")[2] for v in head.units_variables] == [
            "bias",
            "q",
            "r",
            "w",
        ]
        # Layers take no new weights once they are built, but here.
        with pytest.raises(ValueError, match="cannot add new elements of state"):
            head.extra = keras.Variable(np.zeros(3))

    @pytest.mark.parametrize("width", [0, -2, 2.0, True, "4", None])
    def test_bad_width(self, width):
        head = exploiting()
        with pytest.raises(ValueError, match=f"`width` must be a .*width={width!r}"):
            head.set_width(width)
        assert head.width == 5

    def test_learned_gates_keep_theirs(self):
        with pytest.raises(ValueError, match=r"learned gates is set when.*width=4"):
            exploiting("learned").set_width(4)


class TestMemory:
    """Units that cannot fit are refused before anything is allocated."""

    def test_a_huge_width_at_the_switch(self):
        z = features()
        head = AlignmentHead(10, n_samples=10**12)
        before = array(head(z))
        needed = 8 * 5 * 10 * default_width(10**12, 5, 20.0) / 2**30
        with pytest.raises(MemoryError) as caught:
            head.start_exploiting()
        assert f"would take {needed:.3g} GiB, of " in str(caught.value)
        assert "d * units * width = 5 * 10 * 400000000000 weights" in str(caught.value)
        assert "solve with an L2 term" in str(caught.value)
        assert head.phase == "exploring"
        assert head.width is None
        np.testing.assert_array_equal(array(head(z)), before)
        head.start_exploiting(width=4)
        assert head.width == 4

    def test_a_huge_width_later(self):
        head = exploiting()
        q = array(head.q)
        with pytest.raises(MemoryError, match="GiB"):
            head.set_width(10**12)
        assert head.width == 5
        np.testing.assert_array_equal(array(head.q), q)

    def test_learned_gates_are_made_when_the_head_is_built(self):
        head = AlignmentHead(10, n_samples=10**12, gates="learned")
        with pytest.raises(MemoryError, match="GiB"):
            head.build((None, 4))

    def test_gates_that_are_only_looked_at(self):
        head = AlignmentHead(10, n_samples=10**12)
        head.build((None, 4))
        with pytest.raises(MemoryError, match="GiB"):
            head.gates_at_switch()

    def test_what_fits_is_what_is_free(self, monkeypatch):
        """As many weights of four bytes as `q` has, and as much to train them."""
        head = AlignmentHead(2, width=16)
        head.build((None, 7))
        needed = 8 * 8 * 2 * 16 / 2**30
        monkeypatch.setattr(gate_initialization, "free_gib", lambda: 0.99 * needed)
        with pytest.raises(MemoryError):
            head.start_exploiting()
        monkeypatch.setattr(gate_initialization, "free_gib", lambda: 1.01 * needed)
        head.start_exploiting()


class TestDtypes:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("policy", "compute", "tolerance"),
        [
            pytest.param(
                "float64",
                "float64",
                TOLERANCE,
                marks=pytest.mark.skipif(BACKEND == "jax", reason="no float64 on JAX"),
            ),
            ("float32", "float32", 1e-5),
            ("mixed_float16", "float16", 0.03),
            ("mixed_bfloat16", "bfloat16", 0.2),
        ],
    )
    def test_policies(self, policy, compute, tolerance, kind):
        z = features(n=40, p=6, dtype="float64")
        # Gentle slope: half precision loses the sign of what is nearly closed.
        head = exploiting(kind, z=z, dtype=policy, slope=1.0)
        result = head(z)
        assert keras.backend.standardize_dtype(result.dtype) == compute
        assert head.q.dtype == ("float64" if policy == "float64" else "float32")
        error = np.abs(array(result) - reference(head, z)).max()
        assert error < tolerance * np.abs(reference(head, z)).max()

    def test_half_precision_sums_over_many_units_in_float32(self):
        """The sum is 2049, which float16 does not have; with the bias it is 1."""
        head = AlignmentHead(1, width=4098, dtype="mixed_float16")
        head.build((None, 1))
        head.start_exploiting()
        head.w.assign(np.ones(head.w.shape, "float32"))
        head.r.assign(np.zeros(head.r.shape, "float32"))
        head.q.assign(
            np.eye(2, dtype="float32")[1][:, None, None] * np.ones((1, 1, 4098))
        )
        head.bias.assign([-2048.0])
        head.dense.kernel.assign([[0.0]])
        assert array(head(np.ones((1, 1), "float32"))).item() == 1.0


class TestShapes:
    def test_compute_output_shape(self):
        head = AlignmentHead(3, width=5)
        assert head.compute_output_shape((None, 4)) == (None, 3)
        assert head.compute_output_shape([(7, 4), (7, 2, 2, 8)]) == (7, 3)

    @pytest.mark.parametrize("gates", GATES)
    def test_symbolic_and_real_shapes_agree(self, gates):
        head = AlignmentHead(1, width=5, gates=gates)
        symbolic = head(keras.Input((4,)))
        assert symbolic.shape == (None, 1)
        assert head(features(6)).shape == (6, 1)
        head.start_exploiting()
        assert head(keras.Input((4,))).shape == (None, 1)
        assert head(features(6)).shape == (6, 1)

    @pytest.mark.parametrize("shape", [(None, 3, 4), (None, 2, 2, 8), (4,)])
    def test_feature_maps_are_refused(self, shape):
        with pytest.raises(ValueError, match="Pool or flatten them first"):
            AlignmentHead(3, width=5).build(shape)

    def test_a_known_length_is_needed(self):
        with pytest.raises(ValueError, match=r"known length.*None"):
            AlignmentHead(3, width=5).build([(None, 4), (None, None, 2)])


@pytest.mark.parametrize("kind", KINDS)
def test_no_intermediate_is_larger_than_batch_x_units_x_width(kind):
    """`B * m * d` would be the explicit features; a call must never make them."""
    if BACKEND != "jax":
        pytest.skip("The intermediates of a computation are listed by JAX alone.")
    import jax

    n, p, units, width = 64, 31, 2, 16
    z = features(n, p)
    head = exploiting(kind, units, z=z, width=width)

    def loss(q, z):
        values = {id(v): v.value for v in head.variables} | {id(head.q): q}
        mapping = [(v, values[id(v)]) for v in head.variables]
        with keras.StatelessScope(state_mapping=mapping):
            return ops.sum(ops.square(head(z)))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (var.aval.size for var in equation.outvars)
            for value in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    found = list(sizes(jax.make_jaxpr(jax.value_and_grad(loss))(head.q.value, z).jaxpr))
    # Forward, and backward to q: nothing beyond what goes in or comes out.
    assert n * units * width in found
    assert max(found) == max(n * units * width, n * (p + 1))


class TestTrainable:
    @staticmethod
    def trained(head):
        names = {v.path.rpartition("/")[2] for v in head.trainable_variables}
        return names, len(head.trainable_variables)

    def test_random_gates_train_the_dense_layer_and_then_q(self):
        head = AlignmentHead(2, width=3)
        head.build((None, 4))
        assert {id(v) for v in head.trainable_variables} == {
            id(v) for v in head.dense.trainable_variables
        }
        assert [id(v) for v in head.explored_variables] == [
            id(v) for v in head.trainable_variables
        ]
        head.start_exploiting()
        assert head.q.trainable
        assert head.bias.trainable
        assert [id(v) for v in head.exploited_variables] == [id(head.q), id(head.bias)]

    def test_learned_gates_train_q_and_bias_throughout(self):
        head = AlignmentHead(2, width=3, gates="learned")
        head.build((None, 4))
        expected = [id(head.bias), id(head.q)]
        assert [id(v) for v in head.trainable_variables] == expected
        assert [id(v) for v in head.explored_variables] == expected
        head.start_exploiting()
        assert [id(v) for v in head.trainable_variables] == expected

    def test_gates_signs_and_phase_never_train(self):
        for kind in KINDS:
            head = exploiting(kind)
            for variable in (head.r, head.w, head._phase_index):
                assert not variable.trainable
                assert not any(variable is v for v in head.trainable_variables)

    @pytest.mark.parametrize("by_model", [True, False])
    def test_thawed_before_there_are_units(self, by_model):
        inputs = keras.Input((4,))
        head = AlignmentHead(2, width=3)
        model = keras.Model(inputs, head(inputs))
        owner = model if by_model else head
        owner.trainable = False
        assert model.trainable_variables == []
        assert head.explored_variables == []
        owner.trainable = True
        assert {id(v) for v in model.trainable_variables} == {
            id(v) for v in head.dense.variables
        }
        head.start_exploiting()
        assert head.q.trainable
        assert head.bias.trainable

    @pytest.mark.parametrize("gates", GATES)
    def test_a_frozen_head_stays_frozen(self, gates):
        head = AlignmentHead(2, width=3, gates=gates)
        head.build((None, 4))
        head.trainable = False
        assert head.explored_variables == []
        head.start_exploiting()
        assert head.trainable_variables == []
        assert not head.q.trainable
        head.trainable = True
        assert head.q.trainable

    def test_frozen_before_it_is_built(self):
        head = AlignmentHead(2, width=3, gates="learned", trainable=False)
        head.build((None, 4))
        assert head.trainable_variables == []


class TestSeeds:
    @staticmethod
    def drawn(kind="shared", seed=7):
        head = AlignmentHead(2, width=3, seed=seed, **KINDS[kind])
        head.build((None, 2))
        q = None if head.q is None else array(head.q)
        head.start_exploiting()
        return q, array(head.r), array(head.w)

    @pytest.mark.parametrize(("kind", "groups"), [("shared", 1), ("separate", 2)])
    def test_gates_are_equal_on_every_backend(self, kind, groups):
        _, r, w = self.drawn(kind)
        rng = np.random.default_rng([7, 1])
        expected = rng.standard_normal((3, 3, groups)) / math.sqrt(3)
        np.testing.assert_array_equal(r, expected.transpose(1, 2, 0).astype("float32"))
        np.testing.assert_array_equal(np.abs(w), np.float32(1 / math.sqrt(3)))

    def test_learned_gates_are_equal_on_every_backend(self):
        q, _, _ = self.drawn("learned")
        rng = np.random.default_rng([7, 0])
        expected = rng.standard_normal((3, 2, 3)) / math.sqrt(3)
        np.testing.assert_array_equal(q, expected.astype("float32"))

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_seed_determines_everything(self, kind):
        for a, b in zip(self.drawn(kind), self.drawn(kind), strict=True):
            np.testing.assert_array_equal(a, b)
        assert not np.array_equal(self.drawn(kind)[1], self.drawn(kind, seed=8)[1])

    def test_signs_are_balanced(self):
        head = AlignmentHead(4, width=1000, seed=0, share_gates=False)
        head.build((None, 2))
        head.start_exploiting()
        w = array(head.w) * math.sqrt(1000)
        np.testing.assert_allclose(np.abs(w), 1.0, rtol=1e-6)
        assert np.all(np.abs(w.mean(axis=1)) < 4 / math.sqrt(1000))
        assert len(np.unique(w, axis=0)) == 4

    def test_the_default_seed_follows_the_global_one(self):
        seeds = []
        for value in (1, 1, 2):
            keras.utils.set_random_seed(value)
            seeds.append(AlignmentHead(2, width=3).seed)
        assert seeds[0] == seeds[1] != seeds[2]

    def test_pythons_generator_does_not_move(self):
        random.seed(3)
        state = random.getstate()
        head = AlignmentHead(
            2, width=3, dense=keras.layers.Dense(2, kernel_initializer="ones")
        )
        head.build((None, 4))
        head.start_exploiting()
        assert random.getstate() == state


class TestConfig:
    @pytest.mark.parametrize("kind", KINDS)
    def test_round_trip(self, kind):
        head = AlignmentHead(
            3,
            n_samples=20,
            **KINDS[kind],
            slope=3.5,
            seed=11,
            dtype="mixed_bfloat16",
            activity_regularizer=keras.regularizers.L2(0.25),
            name="top",
            trainable=False,
        )
        twin = AlignmentHead.from_config(head.get_config())
        assert twin.get_config() == head.get_config()
        for name in (
            "units",
            "n_samples",
            "gates",
            "share_gates",
            "slope",
            "seed",
            "name",
            "trainable",
        ):
            assert getattr(twin, name) == getattr(head, name)
        assert twin.dtype_policy == head.dtype_policy
        assert twin.activity_regularizer.l2 == 0.25
        for layer in (head, twin):
            layer.build((None, 4))
            layer.start_exploiting()
        assert twin.width == head.width == 8
        np.testing.assert_array_equal(array(twin.w), array(head.w))

    def test_the_default_width_is_derived_anew(self):
        """What a head was built with must not be taken for what was asked for."""
        head = AlignmentHead(3, n_samples=20)
        head.build((None, 4))
        assert head.get_config()["width"] is None
        assert AlignmentHead(3, width=6).get_config()["width"] == 6

    def test_the_dense_layer_survives(self):
        dense = keras.layers.Dense(
            3, use_bias=False, kernel_regularizer="l2", name="out"
        )
        head = AlignmentHead(3, width=4, dense=dense)
        twin = AlignmentHead.from_config(head.get_config())
        assert twin.dense is not dense
        assert twin.dense.get_config() == dense.get_config()

    def test_from_config_does_not_eat_the_config(self):
        config = AlignmentHead(3, width=4).get_config()
        copy = dict(config)
        AlignmentHead.from_config(config)
        assert config == copy

    def test_a_rebuilt_exploiting_head_exploits_with_the_same_gates(self):
        """As in `model_from_json`: the weights are new, the gates are the seed's."""
        head = exploiting()
        config = keras.saving.serialize_keras_object(head)
        twin = keras.saving.deserialize_keras_object(config)
        assert twin.phase == "exploiting"
        np.testing.assert_array_equal(array(twin.r), array(head.r))
        assert AlignmentHead.from_config(head.get_config()).phase == "exploring"


def functional(kind="shared", pair=False):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(6, "relu")(inputs)
    # Without weights of its own, as learned gates have no use for the first one.
    z = [keras.layers.ReLU()(hidden), hidden] if pair else hidden
    head = AlignmentHead(2, n_samples=20, seed=3, name="head", **KINDS[kind])
    return keras.Model(inputs, head(z)), head


def trained(kind, phase, pair=False, width=None):
    x, y = features(20), features(20, 2, seed=1)
    model, head = functional(kind, pair)
    model.compile("adam", "mse")
    model.fit(x, y, epochs=2, verbose=0)
    if phase == "exploiting":
        set_statistics(head, x[:, :1] * np.ones((1, head.dim - 1), "float32"))
        head.start_exploiting(width=width)
        model.compile("adam", "mse")
        model.fit(x, y, epochs=2, verbose=0)
        assert np.any(array(head.q) != array(head.r))
    return model, head, x, y


class TestInAFunctionalModel:
    @pytest.mark.parametrize("pair", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("phase", PHASES)
    def test_saves_and_loads(self, phase, kind, pair, tmp_path):
        # At a width that no config tells, where the gates are drawn at the switch.
        width = None if kind == "learned" else 4
        model, _, x, y = trained(kind, phase, pair, width)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert loaded.get_layer("head").phase == phase
        np.testing.assert_array_equal(
            loaded.predict(x, verbose=0), model.predict(x, verbose=0)
        )
        # The optimizer goes on where it was: the next epoch is the same, too.
        assert [v.name for v in loaded.trainable_variables] == [
            v.name for v in model.trainable_variables
        ]
        for m in (model, loaded):
            m.fit(x, y, shuffle=False, verbose=0)
        for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("kind", KINDS)
    def test_weights_bring_the_phase_along(self, kind, tmp_path):
        x = features(20)
        models = {phase: trained(kind, phase)[0] for phase in PHASES}
        for phase, model in models.items():
            model.save_weights(tmp_path / f"{phase}.weights.h5")
        by_file, by_head = functional(kind), functional(kind)
        # There and back.
        for phase in ("exploiting", "exploring"):
            by_file[0].load_weights(tmp_path / f"{phase}.weights.h5")
            for ours, theirs in zip(
                by_head[0].layers, models[phase].layers, strict=True
            ):
                ours.set_weights(theirs.get_weights())
            for model, head in (by_file, by_head):
                assert head.phase == phase
                units = phase == "exploiting" or kind == "learned"
                assert (head.q is not None) is units
                if units:
                    assert head.q.trainable
                    assert head.bias.trainable
                np.testing.assert_array_equal(array(model(x)), array(models[phase](x)))

    def test_sync_phase_after_a_models_set_weights(self):
        """Which assigns variable by variable, so that no layer is told."""
        model, _, x, _ = trained("learned", "exploiting")
        other, head = functional("learned")
        other.set_weights(model.get_weights())
        assert head.phase == "exploring"
        head.sync_phase()
        assert head.phase == "exploiting"
        np.testing.assert_array_equal(array(other(x)), array(model(x)))

    @pytest.mark.parametrize("by", ["file", "list"])
    def test_weights_bring_the_width_along(self, by, tmp_path):
        x = features(20)
        model, _, _, _ = trained("shared", "exploiting", width=4)
        wide = functional()
        wide[1].start_exploiting()
        for other, head in (functional(), wide):
            if by == "file":
                model.save_weights(tmp_path / "model.weights.h5")
                other.load_weights(tmp_path / "model.weights.h5")
            else:
                for ours, theirs in zip(other.layers, model.layers, strict=True):
                    ours.set_weights(theirs.get_weights())
            assert head.width == 4
            np.testing.assert_array_equal(array(other(x)), array(model(x)))

    @pytest.mark.parametrize("by", ["file", "list"])
    @pytest.mark.parametrize(
        ("kind", "other"), [("shared", "separate"), ("separate", "shared")]
    )
    def test_gates_of_the_other_kind_are_refused(self, kind, other, by):
        head, theirs = exploiting(kind), exploiting(other, width=7)
        before = [array(weight) for weight in head.weights]
        take, weights = head.set_weights, theirs.get_weights()
        if by == "file":
            take, weights = head.load_own_variables, {}
            theirs.save_own_variables(weights)
        with pytest.raises(ValueError, match=r"another head.*share_gates=.*Received"):
            take(weights)
        assert head.width == 5
        for weight, value in zip(head.weights, before, strict=True):
            np.testing.assert_array_equal(array(weight), value)

    def test_learned_gates_of_another_width_are_refused(self):
        """Exploration trains them: its optimizer knows their shapes."""
        head = exploiting("learned")
        with pytest.raises(ValueError, match="another head"):
            head.set_weights(exploiting("learned", width=7).get_weights())

    def test_lists_that_do_not_fit_are_refused(self):
        head = exploiting()
        before = head.get_weights()
        wrong = [*before[:-1], np.zeros(7)]
        for weights in (before[:-1], wrong, []):
            with pytest.raises(ValueError, match=r"weights are not those of.*Received"):
                head.set_weights(weights)
        for old, new in zip(before, head.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)

    def test_variables_of_no_head_are_refused(self):
        head = exploiting()
        for store in ({"0": np.zeros(3)}, {"gamma": np.zeros(3)}):
            with pytest.raises(ValueError, match="not those of an alignment head"):
                head.load_own_variables(store)
        with pytest.raises(ValueError, match="No variables of a head were found"):
            head.load_own_variables({})
        assert head.phase == "exploiting"

    def test_a_mask_of_the_features_is_one_of_the_logits(self):
        """As with Dense: the loss then leaves masked samples out."""
        inputs = keras.Input((3, 4))
        z = keras.layers.Masking()(inputs)
        head = AlignmentHead(2, width=3)
        z = keras.layers.Lambda(
            lambda t: t[:, 0], mask=lambda _, mask: mask[:, 0], output_shape=(4,)
        )(z)
        outputs = head(z)
        dense = keras.layers.Dense(2)
        dense(z)
        assert head.supports_masking is dense.supports_masking is True
        assert keras.src.backend.get_keras_mask(outputs) is not None
        assert head.compute_mask([0, 1], ["mask of z", None]) == "mask of z"
        assert head.compute_mask(0, None) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": 0}, "`units` must be a positive int.*units=0"),
        ({"units": 2.0}, "`units` must be a positive int.*units=2.0"),
        ({"units": True}, "`units` must be a positive int.*units=True"),
        ({"width": 0}, "`width` must be a positive int.*width=0"),
        ({"width": "4"}, "`width` must be a positive int.*width='4'"),
        ({"width": None}, "Pass `n_samples=len"),
        ({"share_gates": None}, "`share_gates` must be True or False.*None"),
        ({"n_samples": -1}, "`n_samples` must be a positive int.*n_samples=-1"),
        ({"n_samples": 1.5}, "`n_samples` must be a positive int.*n_samples=1.5"),
        ({"gates": "Random"}, "`gates` must be one of.*gates='Random'"),
        ({"slope": 0}, "`slope` must be a positive number.*slope=0"),
        ({"slope": -1.0}, "`slope` must be a positive number.*slope=-1.0"),
        ({"slope": math.nan}, "`slope` must be a positive number.*slope=nan"),
        ({"slope": math.inf}, "`slope` must be a positive number.*slope=inf"),
        ({"slope": "steep"}, "`slope` must be a positive number.*slope='steep'"),
        ({"slope": True}, "`slope` must be a positive number.*slope=True"),
        ({"seed": -1}, "`seed` must be a non-negative int.*seed=-1"),
        ({"seed": 0.5}, "`seed` must be a non-negative int.*seed=0.5"),
        ({"dense": "logits"}, "`dense` must be a keras.layers.Dense.*dense='logits'"),
        ({"dense": 3}, "units=2, dense.units=3"),
        ({"dense": 2, "gates": "learned"}, "no linear part to share.*gates='learned'"),
    ],
)
def test_bad_arguments(change, message):
    if isinstance(change.get("dense"), int):
        change = {**change, "dense": keras.layers.Dense(change["dense"])}
    with pytest.raises(ValueError, match=message):
        AlignmentHead(**{"units": 2, "width": 4, **change})


def test_numpy_numbers_are_numbers():
    head = AlignmentHead(
        np.int64(2), np.int32(4), np.int64(9), slope=np.float32(2.0), seed=np.uint8(3)
    )
    head.build((None, 4))
    assert head(features()).shape == (9, 2)
    config = head.get_config()
    assert [type(config[k]) for k in ("units", "width", "n_samples", "seed")] == [
        int
    ] * 4


def test_a_quantized_linear_part_is_refused():
    dense = keras.layers.Dense(2)
    dense.build((None, 4))
    head = AlignmentHead(2, width=3, dense=dense)
    head.build((None, 4))
    dense.quantize("int8")
    with pytest.raises(
        ValueError, match=r"cannot be quantized.*quantization_mode=int8"
    ):
        head(features())


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("wanted", [None, "float32"])
def test_the_dtype_of_the_logits(gates, phase, wanted):
    head = AlignmentHead(
        2, width=3, gates=gates, dtype="mixed_float16", output_dtype=wanted
    )
    head.build((None, 4))
    if phase == "exploiting":
        head.start_exploiting()
    dtype = wanted or "float16"
    twin = AlignmentHead.from_config(head.get_config())
    for layer in (head, twin):
        assert layer.output_dtype == dtype
        assert keras.backend.standardize_dtype(layer(features()).dtype) == dtype
        spec = layer(keras.Input((4,)))
        assert (spec.shape, spec.dtype) == ((None, 2), dtype)
