import numpy as np
import pytest

pytest.importorskip("yaml")

from pipelines.stream import FollowEpoch, Stream, augmented


def images(n=10, height=6, width=5, channels=2):
    rng = np.random.default_rng(0)
    return rng.random((n, height, width, channels), dtype="float32") + 1


def epoch(stream, number):
    FollowEpoch(stream).on_epoch_begin(number)
    return [stream[i] for i in range(len(stream))]


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own():
    x, y = images(), np.arange(10)
    stream = Stream(x, y, 4, seed=3)
    assert len(stream) == 3
    orders = []
    for number in range(2):
        batches = epoch(stream, number)
        assert [len(labels) for _, labels in batches] == [4, 4, 2]
        order = np.concatenate([labels for _, labels in batches])
        assert sorted(order) == list(range(10))
        np.testing.assert_array_equal(np.concatenate([b for b, _ in batches]), x[order])
        orders.append(order.tolist())
    assert orders[0] != orders[1]


def test_batches_depend_on_seed_epoch_and_index_alone():
    augment = {"crop": 1, "flip": True}
    one = Stream(images(), np.arange(10), 4, seed=3, augment=augment)
    two = Stream(images(), np.arange(10), 4, seed=3, augment=augment)
    forwards = epoch(one, 5)
    epoch(two, 1)
    FollowEpoch(two).on_epoch_begin(5)
    for index in (2, 0, 1):
        for a, b in zip(two[index], forwards[index], strict=True):
            np.testing.assert_array_equal(a, b)
    other = Stream(images(), np.arange(10), 4, seed=4, augment=augment)
    assert any(
        not np.array_equal(a, b)
        for (a, _), (b, _) in zip(epoch(other, 5), forwards, strict=True)
    )


def test_augmentation_crops_and_mirrors():
    x = images(n=400)
    new = augmented(x, np.random.default_rng(0), crop=2, flip=True)
    assert new.shape == x.shape
    assert new.dtype == x.dtype
    found = set()
    for image, original in zip(new, x, strict=True):
        padded = np.pad(original, ((2, 2), (2, 2), (0, 0)))
        places = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if np.array_equal(
                padded[top : top + 6, left : left + 5][:, :: -1 if mirrored else 1],
                image,
            )
        ]
        assert len(places) == 1
        found |= set(places)
    # Every place, mirrored and not, is drawn: 50 of them, 400 times.
    assert len(found) > 45


def test_nothing_to_augment_leaves_images_as_they_are():
    x = images()
    np.testing.assert_array_equal(augmented(x, np.random.default_rng(0)), x)
