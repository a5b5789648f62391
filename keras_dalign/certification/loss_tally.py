"""Sums over the samples, of which `certify` makes its certificate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from keras_dalign.certification.certificate import Certificate
from keras_dalign.head.objective import check_some_weight, sample_weights, single_array
from keras_dalign.numerics.repeats import PassRecord, Repeats

if TYPE_CHECKING:
    from keras_dalign.numerics import Array, Indices
    from keras_dalign.numerics.losses import ConvexLoss

# Rounding may make a gap negative. Allowed are so many units in the last place of each
# logit, for accumulation in the layers below, to first order.
_LOGIT_ULPS = 64
_FLOAT64_ROUNDING = 1e-12

_UNITS_IN_LAST_PLACE = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}


class LossTally:
    """Loss, weights and groups of identical inputs of the samples seen so far.

    Args:
        loss: The loss.
        keep: Whether to keep targets and weights, for the gradient bound.
    """

    def __init__(self, loss: ConvexLoss, keep: bool) -> None:
        self._loss = loss
        self._keep = keep
        self._kept: list[tuple[Array, Array, Indices]] = []
        self.repeats = Repeats()
        self.record = PassRecord()
        self._n = 0
        self._weight = 0.0
        self._is_weighted = False
        self._weighted_loss = 0.0
        self._rounding = 0.0
        self._dtype = ""
        self._n_outputs = 0

    def add(
        self, digests: list[bytes], outputs: np.ndarray, y: Any, sample_weight: Any
    ) -> None:
        """Adds a batch.

        Args:
            digests: Of the inputs, one for each sample.
            outputs: Of the model, shape `(batch, C)`.
            y: Targets.
            sample_weight: Weights of shape `(batch,)`, or None.

        Raises:
            ValueError: If the number of outputs differs from that of earlier batches,
                or the targets or weights do not fit.
        """
        weights = sample_weights(sample_weight, len(digests))
        self._is_weighted |= sample_weight is not None
        if self._n and outputs.shape[1] != self._n_outputs:
            raise ValueError(
                "The model's number of outputs changed between batches. Received: "
                f"{self._n_outputs} outputs, then {outputs.shape[1]}"
            )
        self._n_outputs = outputs.shape[1]
        self._dtype = outputs.dtype.name
        logits = outputs.astype(np.float64)
        targets = self._loss.targets(single_array(y, "y"), self._n_outputs)
        self.repeats.add(digests, targets, weights, self._n)
        if self._keep:
            self.record.add(digests, targets, weights)
            self._kept.append((targets, weights, self.repeats.groups(digests)))
        self._n += len(digests)
        self._weight += float(weights.sum())
        self._weighted_loss += float(weights @ self._loss.value(logits, targets))
        # First-order effect on the loss of one unit in the last place of every logit.
        slopes = np.abs(self._loss.gradient(logits, targets))
        effect = float(weights @ (slopes * np.abs(logits)).sum(axis=1))
        self._rounding += effect * _UNITS_IN_LAST_PLACE.get(self._dtype, 2.0**-52)

    @property
    def normalizer(self) -> float:
        """What sums over the samples are divided by."""
        return self._loss.normalizer(self._n, self._weight)

    def kept(self) -> tuple[Array, Array, Indices]:
        """Targets `(n, C)`, weights `(n,)` and numbers of the inputs `(n,)`."""
        targets, weights, groups = zip(*self._kept, strict=True)
        return np.concatenate(targets), np.concatenate(weights), np.concatenate(groups)

    def certificate(self) -> Certificate:
        """The certificate of the plain loss.

        Returns:
            The certificate, without any of the bounds on request.

        Raises:
            ValueError: If all weights are 0, or the loss overflows.
            RuntimeError: If the loss is below its lower bound by more than rounding.
        """
        check_some_weight(self._n, self._weight)
        divisor = self.normalizer
        loss = self._weighted_loss / divisor
        lower_bound = self.repeats.lower_bound(self._loss) / divisor
        if not np.isfinite(loss - lower_bound):
            raise ValueError(
                "The loss overflows float64: the outputs or targets are too large. "
                f"Received: loss={loss}, lower_bound={lower_bound}"
            )
        gap = loss - lower_bound
        rounding = _LOGIT_ULPS * self._rounding / divisor
        rounding += _FLOAT64_ROUNDING * lower_bound
        if gap < -rounding:
            raise RuntimeError(
                "The loss came out below the least that any function of the inputs can "
                "reach, so the model is not one function of its inputs: it gave "
                "different outputs for identical inputs. It is probably stochastic in "
                "inference mode, keeps state from call to call, or lets the samples of "
                "a batch influence each other; make it deterministic and certify "
                f"again. Received: loss={loss:.9g}, lower_bound={lower_bound:.9g}"
            )
        n_conflicts, conflicts = self.repeats.conflicts()
        weighting = ", with sample weights" if self._is_weighted else ""
        return Certificate(
            loss=loss,
            lower_bound=lower_bound,
            gap=max(gap, 0.0),
            n_samples=self._n,
            n_distinct=self.repeats.n_distinct,
            n_conflicts=n_conflicts,
            conflicts=conflicts,
            objective=(
                f"{self._loss.objective} as given{weighting}, in inference mode, "
                "without regularisation or augmentation"
            ),
            dtype=self._dtype,
            data_digest=self.repeats.digest(),
        )
