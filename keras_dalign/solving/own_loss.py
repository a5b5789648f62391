"""A head's loss, computed by the head itself in its dtype."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.numerics import device
from keras_dalign.numerics.losses import SquaredError
from keras_dalign.numerics.replicas import replicas_of

if TYPE_CHECKING:
    from keras_dalign.head.alignment_head import AlignmentHead
    from keras_dalign.head.features import FeatureSet
    from keras_dalign.solving.problem import ConvexProblem

_ROWS_AT_ONCE = 4096

# Bound on the rounding error of a logit, in units in the last place of its dtype.
_ULPS = 4
_UNIT = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@dataclasses.dataclass(frozen=True)
class OwnMeasure:
    """A head's loss, and estimates of the effect of rounding on it.

    Attributes:
        loss: Loss of the head's outputs, without an L2 term, summed in float64.
        outputs: The effect of an error of some units in the last place of every logit,
            to first order.
        cancellation: The effect of large parameters whose terms cancel, to second
            order. The loss then depends on the order of sums, which differs between
            compiled functions.
        drift: The same effect to first order, with errors of all samples in the worst
            direction.
    """

    loss: float
    outputs: float
    cancellation: float
    drift: float


class OwnLoss:
    """Evaluates a head on kept features.

    Args:
        head: The head, which exploits.
        features: The features that it takes.
    """

    def __init__(self, head: AlignmentHead, features: FeatureSet) -> None:
        self.head = head
        self.features = features
        self.replicas = replicas_of(head)

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
        return self.replicas.from_first(out)

    def measure(self, problem: ConvexProblem) -> OwnMeasure:
        """The head's loss, and estimates of the effect of rounding on it.

        Args:
            problem: The convex problem of the head on these features.

        Returns:
            The measure.
        """
        logits = self.logits()
        loss = problem.loss_of(logits)
        sizes, moved = np.empty(problem.n), 0.0
        shares = problem.samples.shares
        for part in problem.rows.blocks(64 * problem.units, 2**22):
            slopes = problem.loss.gradient(logits[part], problem.targets[part])
            slopes *= shares[part, None]
            sizes[part] = np.linalg.norm(slopes, axis=1)
            moved += float(np.abs(slopes * logits[part]).sum())
        unit = _UNIT.get(str(self.head.output_dtype), 2.0**-52)
        outputs = _ULPS * unit * (moved + loss)
        # Terms of size ||phi|| ||theta|| are rounded before they are summed.
        theta = problem.theta_of(self.head)
        unit = _UNIT.get(str(self.head.compute_dtype), 2.0**-52)
        error = unit * problem.row_lengths() * float(np.linalg.norm(theta))
        curvature = problem.loss.max_curvature(problem.units)
        bends = shares * curvature
        if not isinstance(problem.loss, SquaredError):
            # A sample with a small gradient has a small curvature, too.
            bends = np.minimum(bends, sizes)
        return OwnMeasure(loss, outputs, float(bends @ error**2), float(sizes @ error))


def _call(head: AlignmentHead, features: Any) -> Any:
    if keras.backend.backend() == "torch":
        import torch  # noqa: PLC0415  (only where it is the backend)

        with torch.no_grad():
            return head(features, training=False)
    return head(features, training=False)
