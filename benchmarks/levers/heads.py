"""Heads of the variants: solved on a trunk's features, and measured on test samples."""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks.levers.trunks import LOSS, Trunks, part_of
from keras_dalign.numerics.losses import SoftmaxCrossEntropy
from keras_dalign.solving.head_solver import HeadSolver, first_width
from keras_dalign.solving.options import SolveOptions
from keras_dalign.training.switch import switch
from pipelines.calibration import brier, ece, nll
from pipelines.evaluate import error_rate
from pipelines.stream import augmented

if TYPE_CHECKING:
    from benchmarks.levers.variants import Variant
    from keras_dalign.head.features import FeatureSet
    from pipelines.exploration import Job

Measured = dict[str, Any]


def finished(job: Job, variant: Variant, trunks: Trunks) -> Measured:
    """Finishes the run of a variant on its trunk, and measures it.

    Args:
        job: What to train on, and how.
        variant: The way to train.
        trunks: The trunks of the job.

    Returns:
        On the test samples `error` and `ece` in percent, `nll` and `brier`; `seconds`,
        exploration included; and, if a head was solved, `l2`, `width` and `gap`.
    """
    model = trunks.model(variant)
    begin = time.perf_counter()
    found: Measured = {}
    if variant.passes:
        model, found = solved_on_passes(job, variant, model)
    elif variant.solve:
        model, found = solved(job, variant, model)
    elif variant.reestimate:
        kd.reestimate_batch_norm(model, job.data.x_train)
    seconds = trunks.seconds(variant) + time.perf_counter() - begin
    logits = np.asarray(model.predict(job.data.x_test, batch_size=256, verbose=0))
    labels = job.data.y_test
    return {
        "error": 100.0 * error_rate(logits, labels),
        "nll": nll(logits, labels),
        "ece": 100.0 * ece(logits, labels),
        "brier": brier(logits, labels),
        "seconds": seconds,
        **found,
    }


def solved(
    job: Job, variant: Variant, trunk: keras.Model
) -> tuple[keras.Model, Measured]:
    """Solves a head with `kd.solve`, on the images without augmentation."""
    whole = job.data
    data = part_of(job).data if variant.unseen else whole
    judges = (data.x_test, data.y_test) if variant.unseen else None
    settings: dict[str, Any] = {"loss": LOSS, "center": variant.center, "verbose": 0}
    model = _aligned(job, trunk)
    found = kd.solve(
        model, data.x_train, data.y_train, validation_data=judges, **settings
    )
    if variant.refit:
        with warnings.catch_warnings():
            # With an L2 term, the head need not be wide enough to fit any labels.
            warnings.filterwarnings("ignore", message="The head is too narrow")
            model = _aligned(job, trunk, width=found.width)
        found = kd.solve(model, whole.x_train, whole.y_train, l2=found.l2, **settings)
    return model, {"l2": found.l2, "width": found.width, "gap": found.gap}


def solved_on_passes(
    job: Job, variant: Variant, trunk: keras.Model
) -> tuple[keras.Model, Measured]:
    """Solves a head on the features of several augmented passes.

    If the passes are stacked, L2 weight and width are chosen on the first pass alone.
    Otherwise the samples held out would be copies of those that are trained on.

    Args:
        job: What to train on, and how.
        variant: The way to train, with one pass or more.
        trunk: The base model to start from.

    Returns:
        The model, and `l2`, `width` and `gap`.

    Raises:
        RuntimeError: If the switch kept no features.
    """
    n = len(job.data.x_train)
    x = np.concatenate(
        [
            augmented(
                job.data.x_train,
                np.random.default_rng([job.run.seed, index]),
                **job.train.augment,
            )
            for index in range(variant.passes)
        ]
    )
    y = np.tile(job.data.y_train, variant.passes)
    model, options = _aligned(job, trunk), SolveOptions(center=variant.center)
    _, features = switch(
        model,
        x,
        y,
        width=first_width(model.head, options),
        rank_matters=False,
        replace_dense=options.replaces_dense(model.head.gates),
        keep_features=True,
        digest=True,
    )
    if features is None:
        raise RuntimeError("The switch kept no features.")
    per_image = merged(features, n, averaged=variant.averaged)
    loss = SoftmaxCrossEntropy()
    solution = HeadSolver(
        model.head, per_image, loss, options, set_width=model.set_width
    ).solve()
    if variant.passes > 1 and not variant.averaged:
        options = dataclasses.replace(options, l2=solution.l2)
        solution = HeadSolver(model.head, features, loss, options).solve()
    return model, {
        "l2": solution.l2,
        "width": model.head.width,
        "gap": solution.gap,
    }


def merged(features: FeatureSet, n: int, *, averaged: bool) -> FeatureSet:
    """Merges the features of several passes into one row for each image.

    Args:
        features: The features of all passes, one pass after the other.
        n: Number of images.
        averaged: Whether to average over the passes; otherwise the first pass is taken.

    Returns:
        The features of `n` samples.
    """

    def of_image(leaf: np.ndarray) -> np.ndarray:
        passes = leaf.reshape(-1, n, *leaf.shape[1:])
        return passes.mean(axis=0) if averaged else passes[0]

    return dataclasses.replace(
        features,
        z=keras.tree.map_structure(of_image, features.z),
        y=features.y[:n],
        digests=(features.digests or [])[:n],
    )


def _aligned(job: Job, trunk: keras.Model, **head: Any) -> kd.AlignedModel:
    n = len(job.data.x_train)
    return kd.align(trunk, n_samples=n, seed=job.run.seed, copy=True, **head)
