"""A head's loss as the head itself computes it, in its own dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.numerics import device

if TYPE_CHECKING:
    from keras_dalign.head.alignment_head import AlignmentHead
    from keras_dalign.head.features import FeatureSet
    from keras_dalign.solving.problem import ConvexProblem

_ROWS_AT_ONCE = 4096

# How far a logit may be off by the rounding of the output's dtype, in units in the last
# place.
_ULPS = 4
_ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


class OwnLoss:
    """Evaluates a head on kept features.

    Args:
        head: The head, which exploits.
        features: What it takes.
    """

    def __init__(self, head: AlignmentHead, features: FeatureSet) -> None:
        self.head = head
        self.features = features

    def logits(self) -> np.ndarray:
        """The head's outputs for all samples, shape `(n, C)`, float64."""
        z = self.features.z
        n = len(keras.tree.flatten(z)[0])
        out = np.empty((n, self.head.units))
        for start in range(0, n, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            part = keras.tree.map_structure(
                lambda leaf, rows=rows: device.put(leaf[rows], leaf.dtype.name), z
            )
            out[rows] = device.fetch(_call(self.head, part)).astype(np.float64)
        return out

    def measure(self, problem: ConvexProblem) -> tuple[float, float]:
        """The loss, and how far the rounding of the outputs may move it.

        Args:
            problem: The problem of these samples.

        Returns:
            The loss without an L2 term, summed in float64, and to first order the
            effect of some units in the last place of every logit.
        """
        logits = self.logits()
        loss = problem.loss_of(logits)
        effect = np.abs(problem.loss_gradient(logits) * logits).sum()
        unit = _ROUNDING.get(str(self.head.compute_dtype), 2.0**-52)
        return loss, _ULPS * unit * (float(effect) + loss)


def _call(head: AlignmentHead, features: Any) -> Any:
    if keras.backend.backend() == "torch":
        import torch  # noqa: PLC0415  (only where it is the backend)

        with torch.no_grad():
            return head(features, training=False)
    return head(features, training=False)
