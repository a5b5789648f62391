"""The variants: ways to train that differ from the default in one lever or two."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from keras_dalign.solving.options import BASE, ORIGIN

# The trunks: with the profile's recipe, with a recipe that ends with exploration, and
# with the profile's recipe on a part of the samples.
WHOLE, ENDED, PART = "whole", "ended", "part"
# The share of the epochs that the default explores.
EXPLORE = 0.6


@dataclass(frozen=True)
class Variant:
    """One way to train. The default is `DAlign(Adam())`.

    Attributes:
        lever: The lever that is changed.
        trunk: `WHOLE`, `ENDED` or `PART`.
        explore: The share of the epochs after which the trunk is taken.
        average: The share of the steps that its weights are averaged over; 0 takes the
            last weights.
        solve: Whether a head is solved; False keeps the base model.
        reestimate: Whether batch-norm statistics are re-estimated.
        center: Where the L2 term is zero.
        unseen: Whether L2 weight and width are chosen on the samples that were left out
            of `PART`; otherwise on a fifth of the training samples.
        refit: Whether the head is then solved on all samples, with the same L2 weight
            and width.
        passes: Number of augmented passes that give the features; 0 for the features
            of the images without augmentation.
        averaged: Whether the features of an image are averaged over the passes;
            otherwise they are stacked, and each pass adds all samples once more.
    """

    lever: str
    trunk: str = WHOLE
    explore: float = EXPLORE
    average: float = 0.1
    solve: bool = True
    reestimate: bool = True
    center: str = ORIGIN
    unseen: bool = False
    refit: bool = False
    passes: int = 0
    averaged: bool = False


base_model = functools.partial(Variant, "base model", explore=1.0, solve=False)
DEFAULT, NONE, BASE_MODEL = "default", "no lever", "base"
VARIANTS = {
    DEFAULT: Variant("default"),
    NONE: Variant("default", average=0.0, center=BASE),
    "last weights": Variant("weights", average=0.0),
    "average over 0.05": Variant("weights", average=0.05),
    "average over 0.2": Variant("weights", average=0.2),
    "centre: base": Variant("centre", center=BASE),
    "trunk of 9/10, judged on seen samples, solved on all": Variant(
        "judge", trunk=PART
    ),
    "trunk of 9/10, judged on the rest, solved on 9/10": Variant(
        "judge", trunk=PART, unseen=True
    ),
    "trunk of 9/10, judged on the rest, solved on all": Variant(
        "judge", trunk=PART, unseen=True, refit=True
    ),
    "1 augmented pass": Variant("passes", passes=1),
    "2 passes, stacked": Variant("passes", passes=2),
    "4 passes, stacked": Variant("passes", passes=4),
    "8 passes, stacked": Variant("passes", passes=8),
    "2 passes, averaged": Variant("passes", passes=2, averaged=True),
    "4 passes, averaged": Variant("passes", passes=4, averaged=True),
    "8 passes, averaged": Variant("passes", passes=8, averaged=True),
    "ends with exploration": Variant("schedule", trunk=ENDED),
    "ends with exploration, last weights": Variant(
        "schedule", trunk=ENDED, average=0.0
    ),
    "explore 0.7": Variant("explore", explore=0.7),
    "explore 0.8": Variant("explore", explore=0.8),
    "explore 1.0": Variant("explore", explore=1.0),
    "explore 1.0, last weights": Variant("together", explore=1.0, average=0.0),
    "explore 1.0, 4 passes, stacked": Variant("together", explore=1.0, passes=4),
    "ends with exploration, 4 passes, stacked": Variant(
        "together", trunk=ENDED, passes=4
    ),
    BASE_MODEL: base_model(average=0.0, reestimate=False),
    "base, re-estimated": base_model(average=0.0),
    "base, averaged and re-estimated": base_model(),
}
