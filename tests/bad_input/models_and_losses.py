"""Wrong models and losses, for all functions that take one."""

import keras

from bad_input.case import ARRAY, Case, data, values
from bad_input.training_data import READERS

MODELS = [
    *values(
        f"align {READERS.replace('fit', '').replace('AlignmentMonitor', '')}",
        "model",
        r"`model` must be a (built )?keras\.Model.*Received: model=",
        None,
        "model",
        3,
        ARRAY,
        keras.layers.Dense(3),
    ),
    *data(
        "solve forecast",
        "model",
        "without a head",
        lambda w: w.base,
        r"`model` with an alignment head.*Received.*keras_dalign\.align"
        r"|`model` with an alignment head.*keras_dalign\.align.*Received",
    ),
    *data(
        "forecast",
        "model",
        "exploring",
        lambda w: w.exploring,
        r"`model` whose gates are set.*keras_dalign\.solve.*Received.*'exploring'",
    ),
    Case(
        "certify",
        "l2 of an exploring model",
        lambda w: {"model": w.exploring, "l2": 1.0},
        r"`model` whose gates are set.*Received.*'exploring'",
    ),
    *data(
        "reestimate_batch_norm",
        "model",
        "exploiting",
        lambda w: w.exploiting,
        r"frozen since.*Received.*Re-estimate before the switch",
    ),
    *data(
        "align",
        "model",
        "aligned already",
        lambda w: w.exploring,
        r"has an alignment head already.*Received.*base model",
    ),
    *data(
        "align",
        "model",
        "with an aligned one at its end",
        lambda w: keras.Sequential([keras.Input((64,)), w.exploring]),
        r"`model` ends in an alignment head already.*Received.*base model",
    ),
    *data(
        "align",
        "model",
        "unbuilt",
        lambda w: keras.Sequential([keras.layers.Dense(3)]),
        r"not built.*Received: model.*model\.build",
    ),
    *data(
        "check_structure check_alignment",
        "parameters",
        "of another model",
        lambda w: [w.exploring.head.dense.kernel],
        r"`parameters` must be variables of the model.*Received",
    ),
]

LOSSES = [
    *values(
        "solve certify forecast check_alignment",
        "loss",
        r"(?i)loss.*Received: (loss=)?",
        "nothing",
        3,
        "mae",
        "hinge",
        keras.losses.SparseCategoricalCrossentropy(),
    ),
]
