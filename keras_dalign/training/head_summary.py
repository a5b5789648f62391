"""What `AlignedModel.summary` prints below Keras's table: the phase, and the head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from keras_dalign.head.alignment_head import EXPLOITING

if TYPE_CHECKING:
    from keras_dalign.training.aligned_model import AlignedModel


def head_summary(model: AlignedModel) -> str:
    """Describes the phase, what it trains, and the head.

    Args:
        model: The model.

    Returns:
        Two lines.
    """
    head = model.head
    trained = sum(math.prod(v.shape) for v in model.trainable_variables)
    exploiting = head.phase == EXPLOITING
    number, what = (2, "q and b of the head") if exploiting else (1, "all layers")
    if head.width is None:
        units = (
            "linear; the switch adds gated units, at most "
            f"{head.default_width()} per output"
        )
    else:
        linear = "" if head.replaces_dense or head.dense is None else "linear, and "
        units = f"{linear}{head.width} gated units per output"
    shared = ", shared by all outputs" if head.share_gates and head.units > 1 else ""
    return (
        f" Phase {number} of 2, {head.phase}: {what} are trained ({trained:,} of "
        f"{model.count_params():,} parameters)\n"
        f" Head: {units} ({head.gates} gates{shared}, {head.dim - 1} features, "
        f"{head.units} outputs)"
    )
