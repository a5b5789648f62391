"""Small real data and models that many tests share."""

from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits


def digits(n=200, seed=0):
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))[:n]
    return (x[order] / 16).astype("float32"), y[order].astype("int32")


def digit_images(n=128, seed=0):
    x, y = digits(n, seed)
    return x.reshape(-1, 8, 8, 1), y


def mlp(seed=0, units=10, **last):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(24, "relu", name="hidden"),
            keras.layers.Dense(16, "relu", name="features"),
            keras.layers.Dense(units, name="logits", **last),
        ]
    )


def convnet(seed=0, units=10):
    """Batch norm and dropout: what a frozen trunk must not move."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((8, 8, 1))
    h = keras.layers.Conv2D(6, 3, padding="same", name="conv")(inputs)
    h = keras.layers.BatchNormalization(name="bn")(h)
    h = keras.layers.ReLU()(h)
    h = keras.layers.Dropout(0.2)(h)
    h = keras.layers.Flatten()(keras.layers.AveragePooling2D(4)(h))
    return keras.Model(inputs, keras.layers.Dense(units, name="logits")(h))


def fit_with_backup(model, x, y, folder, *callbacks):
    """Four epochs of one batch each, which go on from the backup that there is."""
    backup = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
    model.fit(
        x,
        y,
        batch_size=len(x),
        shuffle=False,
        epochs=4,
        callbacks=[backup, *callbacks],
        verbose=0,
    )


def cross_entropy(**arguments):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **arguments)


# The kinds of gates that a head may have.
KINDS = {
    "shared": {},
    "separate": {"share_gates": False},
    "learned": {"gates": "learned"},
}


def gates_of(head, output):
    """Gates `(d, width)` and output weights `(width,)` of one output, float64."""
    r, w = head.gates_in_use()
    group = 0 if head.share_gates else output
    return r[:, group], w[group]


def weights(model):
    return [np.array(w) for w in model.get_weights()]


def assert_equal(left, right):
    """Bit for bit."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def maps_in(folder):
    """The files in a folder that are mapped into memory, if the system tells."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    return [line for line in maps.read_text().splitlines() if str(folder) in line]
