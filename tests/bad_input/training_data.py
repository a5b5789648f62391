"""Wrong inputs, targets and sample weights, for all functions that read data."""

import numpy as np

from bad_input.case import NAN, data
from bad_input.world import N

# The functions that read inputs, targets and sample weights.
READERS = (
    "fit solve certify forecast check_alignment check_structure reestimate_batch_norm "
    "AlignmentMonitor"
)
LABELLED = "fit solve certify forecast check_alignment AlignmentMonitor"
WEIGHTED = "fit solve certify forecast AlignmentMonitor"
# Without the monitor, which gets its model in `fit`.
WITH_MODEL = " ".join(READERS.split()[:-1])
LABELLED_WITH_MODEL = " ".join(LABELLED.split()[:-1])

INPUTS = [
    *data(
        READERS,
        "x",
        "a list",
        lambda w: w.x.tolist(),
        r"`x` must be.*(np\.asarray|arrays\. ).*Received: x of type list",
    ),
    *data(READERS, "x", "None", lambda w: None, r"`x` must be.*Received.*NoneType"),
    *data(READERS, "x", "a word", lambda w: "x", r"`x` must be.*Received.*str"),
    *data(READERS, "x", "empty", lambda w: w.x[:0], r"`x` is empty.*\(0, 64\)"),
    *data(
        READERS, "x", "NaN", lambda w: w.x * NAN, r"(?=.*`x`).*Received.*(NaN|infinit)"
    ),
    *data(READERS, "x", "words", lambda w: w.x.astype(str), r"`x`.*encode.*Received"),
    *data(READERS, "x", "a number", lambda w: np.float32(1), r"`x`.*samples.*Received"),
    *data(
        WITH_MODEL,
        "x",
        "one-dimensional",
        lambda w: w.x[:, 0],
        r"`x`.*'pixels'.*\(n, 64\).*Received: x of shape \(40,\)",
    ),
    *data(
        WITH_MODEL,
        "x",
        "too narrow",
        lambda w: w.x[:, 1:],
        r"`x`.*'pixels'.*\(n, 64\).*Received: x of shape \(40, 63\)",
    ),
    *data(
        WITH_MODEL,
        "x",
        "complex",
        lambda w: w.x + 1j,
        r"`x` must be real.*Received: ndarray of shape \(40, 64\).*complex",
    ),
    *data(
        WITH_MODEL,
        "x",
        "twice",
        lambda w: [w.x, w.x],
        r"`x`.*one array for each input.*'pixels'.*Received: 2 arrays",
    ),
]

LABELS = [
    *data(
        LABELLED,
        "y",
        "a list",
        lambda w: w.y.tolist(),
        r"`y` must be.*np\.asarray.*Received: y of type list",
    ),
    *data(LABELLED, "y", "None", lambda w: None, r"(?i)targets.*`y`.*Received: y=None"),
    *data(LABELLED, "y", "words", lambda w: w.y.astype(str), r"`y`.*encode.*Received"),
    *data(LABELLED, "y", "objects", lambda w: w.y.astype(object), r"`y`.*a dtype"),
    *data(LABELLED, "y", "complex", lambda w: w.y + 0j, r"`y` must be real.*complex"),
    *data(
        LABELLED,
        "y",
        "too short",
        lambda w: w.y[:-1],
        r"`x` and `y`.*same number.*Received.*\(40, 64\), \(39,\)",
    ),
    *data(LABELLED, "y", "empty", lambda w: w.y[:0], r"`y` is empty.*Received.*\(0,\)"),
    *data(
        LABELLED_WITH_MODEL,
        "y",
        "beyond the outputs",
        lambda w: w.y + 5,
        r"`y` must be integers from 0 to 9.*Received: label 1\d",
    ),
    *data(
        LABELLED_WITH_MODEL,
        "y",
        "halves",
        lambda w: w.y / 2,
        r"`y` must be integers from 0 to 9.*Received: label \d\.5",
    ),
    *data(
        LABELLED_WITH_MODEL,
        "y",
        "one-hot",
        lambda w: np.eye(10)[w.y],
        r"`y`.*CategoricalCrossentropy.*Received.*\(40, 10\)",
    ),
    *data(
        LABELLED_WITH_MODEL,
        "y",
        "NaN",
        lambda w: w.y * NAN,
        r"`y` must be finite.*remove or repair.*Received: nan in row 0",
    ),
]


def _weights(make):
    return lambda w: make(np.ones(N))


WEIGHTS = [
    *data(
        WEIGHTED,
        "sample_weight",
        "a list",
        _weights(np.ndarray.tolist),
        r"`sample_weight` must be.*np\.asarray.*Received: sample_weight of type list",
    ),
    *data(
        WEIGHTED,
        "sample_weight",
        "negative",
        _weights(np.negative),
        r"`sample_weight` must be finite and at least 0.*Received: -1",
    ),
    *data(
        WEIGHTED,
        "sample_weight",
        "NaN",
        _weights(lambda v: v * NAN),
        r"`sample_weight` must be finite.*Received: nan",
    ),
    *data(
        WEIGHTED,
        "sample_weight",
        "too long",
        _weights(lambda v: np.append(v, 1.0)),
        r"`x` and `sample_weight`.*same number.*Received.*\(41,\)",
    ),
    *data(
        WEIGHTED,
        "sample_weight",
        "two columns",
        _weights(lambda v: np.stack([v, v], axis=1)),
        r"`sample_weight` must hold one weight per sample.*\(40, 2\)",
    ),
    *data(
        WEIGHTED,
        "sample_weight",
        "zeros",
        _weights(np.zeros_like),
        r"All of `sample_weight` are 0.*Received: 40 samples",
    ),
    *data(
        WEIGHTED,
        "sample_weight",
        "words",
        _weights(lambda v: v.astype(str)),
        r"`sample_weight` must be numbers.*Received",
    ),
]
