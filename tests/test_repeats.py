import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_problems import LOSSES, labels

from keras_dalign.numerics.losses import SoftmaxCrossEntropy
from keras_dalign.numerics.repeats import PassRecord, Repeats, digests


def filled(ids, targets, weights, batch):
    repeats = Repeats()
    names = digests(ids)
    for i in range(0, len(ids), batch):
        part = slice(i, i + batch)
        repeats.add(names[part], targets[part], weights[part], i)
    return repeats


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(LOSSES)),
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 25),
    n_ids=st.integers(1, 8),
    batch=st.integers(1, 9),
)
def test_against_a_group_by_in_plain_python(name, seed, n, n_ids, batch):
    rng = np.random.default_rng(seed)
    loss = LOSSES[name]
    ids = rng.integers(0, n_ids, n)
    targets = loss.targets(labels(name, rng, n, 2), 2)
    # Some inputs with one and the same target, some samples without weight.
    targets = np.where((ids % 2 == 0)[:, None], targets[0], targets)
    weights = rng.random(n) * (rng.random(n) > 0.3)
    repeats = filled(ids, targets, weights, batch)
    assert repeats.n_distinct == len(set(ids.tolist()))
    groups = repeats.groups(digests(ids))
    assert ((groups[:, None] == groups) == (ids[:, None] == ids)).all()
    assert set(groups.tolist()) == set(range(repeats.n_distinct))
    expected = 0.0
    conflicts = []
    for one in dict.fromkeys(ids.tolist()):
        own = (ids == one) & (weights > 0)
        if own.any():
            mean = np.average(targets[own], axis=0, weights=weights[own])
            expected += (weights[own] * best_loss(loss, mean, targets[own])).sum()
        first = {}
        for i in np.flatnonzero(own):
            first.setdefault(targets[i].tobytes(), int(i))
        if len(first) > 1:
            conflicts.append(sorted(first.values()))
    assert repeats.lower_bound(loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    n_conflicts, listed = repeats.conflicts()
    assert n_conflicts == len(conflicts)
    assert sorted(sorted(each) for each in listed) == sorted(conflicts)


def best_loss(loss, mean, targets):
    """The loss at the best common output, which is put in as logits."""
    mean = np.clip(mean, 1e-300, None) if loss.name != "squared error" else mean
    if loss.name == "squared error":
        outputs = mean
    elif isinstance(loss, SoftmaxCrossEntropy):
        outputs = np.log(mean)
    else:
        outputs = np.log(mean) - np.log(np.clip(1 - mean, 1e-300, None))
    return loss.value(np.tile(outputs, (len(targets), 1)), targets)


def test_digests_compare_values():
    x = np.array([[0.0, 1.0], [-0.0, 1.0], [0.0, np.nextafter(1.0, 2.0)]])
    first, same, other = digests(x)
    assert first == same != other
    assert len(first) == 16
    assert digests(np.asfortranarray(x)) == digests(x)
    assert digests({"a": x, "b": x[:, 0]}) == digests([x, x[:, 0]])
    assert digests([x, x])[0] != digests(x)[0]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((1, 2), "float32"), np.zeros((1, 1), "float64")),
        (np.zeros((1, 2, 3)), np.zeros((1, 3, 2))),
        (np.zeros((1, 4), "int32"), np.zeros((1, 4), "float32")),
        (np.zeros((1, 4), "int32"), np.zeros((1, 4), "uint32")),
    ],
)
def test_digests_tell_shapes_and_dtypes_apart(a, b):
    assert digests(a) != digests(b)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_digests_of_non_finite_inputs(value):
    with pytest.raises(ValueError, match=r"must be finite.*float32"):
        digests(np.array([[value]], "float32"))


def test_digests_of_strings():
    with pytest.raises(ValueError, match="must be numeric"):
        digests(np.array([["a"]]))


def test_nothing_added():
    repeats = Repeats()
    assert repeats.n_distinct == 0
    assert repeats.lower_bound(SoftmaxCrossEntropy()) == 0
    assert repeats.conflicts() == (0, ())


def test_without_any_weight():
    repeats = filled(np.zeros(3), np.eye(3), np.zeros(3), 2)
    assert repeats.n_distinct == 1
    assert repeats.lower_bound(SoftmaxCrossEntropy()) == 0
    assert repeats.conflicts() == (0, ())


# Passes -----------------------------------------------------------------------------


def record(x, *columns, batch=3):
    result = PassRecord()
    for i in range(0, len(x), batch):
        part = slice(i, i + batch)
        result.add(digests(x[part]), *(None if c is None else c[part] for c in columns))
    return result


X = np.random.default_rng(0).standard_normal((10, 2))
Y = np.arange(10)


def test_the_same_pass_in_other_batches():
    record(X, Y, None).check_same(record(X, Y, None, batch=4))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:9], Y[:9], "changed in size.*10 samples, then 9"),
        (X + 1e-9, Y, "changed in content.*some of which differ"),
        (X, Y[::-1], "changed in content"),
        (X[::-1], Y[::-1], "changed in order.*the same 10 samples"),
    ],
)
def test_a_pass_that_changed(x, y, message):
    with pytest.raises(ValueError, match=message):
        record(X, Y).check_same(record(x, y))


def test_weights_count():
    with pytest.raises(ValueError, match="changed in content"):
        record(X, Y, np.ones(10)).check_same(record(X, Y, np.arange(10.0)))
