"""The switch from exploration to exploitation: statistics, gates, rank check."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keras_dalign.head.batch_norm import reestimate_batch_norm
from keras_dalign.head.features import FeaturePass, FeatureSet
from keras_dalign.numerics.rank import RankCheck, check_rank

if TYPE_CHECKING:
    from keras_dalign.training.aligned_model import AlignedModel

logger = logging.getLogger("keras_dalign")

# The rank check is complete up to so many samples (half a second on two cores), and
# looks at a sample beyond.
_COMPLETE_ROWS = 2048
_SAMPLED_ROWS = 1024


@dataclass(frozen=True)
class SwitchReport:
    """What happened at the switch.

    Attributes:
        n_samples: Samples seen.
        n_batch_norms: Batch-normalisation layers whose statistics were
            re-estimated (the head's standardisation not counted).
        rank: The rank check.
        seconds: Wall time of the switch.
    """

    n_samples: int
    n_batch_norms: int
    rank: RankCheck
    seconds: float

    def __str__(self) -> str:
        return (
            f"switch: {self.n_batch_norms} batch normalisations re-estimated over "
            f"{self.n_samples} samples; {self.rank} ({self.seconds:.1f} s)"
        )


def switch(
    model: AlignedModel,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int = 256,
    steps: int | None = None,
    noise: float = 1e-3,
    keep_features: bool | str = False,
    digest: bool = False,
    fresh_statistics: bool = True,
) -> tuple[SwitchReport, FeatureSet | None]:
    """Takes a model from exploration to exploitation.

    Two passes over the data: one re-estimates the trunk's batch-norm statistics,
    one computes the features in inference mode, which give the head's
    standardisation and the rank check. Then the gates are set and the trunk is
    frozen. On an error the model is left exploring, as it was.

    Args:
        model: An exploring `AlignedModel`.
        x: Inputs: arrays or a stream.
        y: Targets for arrays, if the features are kept.
        sample_weight: Weights for arrays, if the features are kept.
        batch_size: Int, samples per batch for arrays.
        steps: Int, batches per pass over an endless stream.
        noise: Float, see `AlignmentHead.start_exploiting`.
        keep_features: Whether to return the features: False, True or `"disk"`, see
            `FeaturePass`.
        digest: Whether to return digests of the inputs with them.
        fresh_statistics: Whether to re-estimate the trunk's batch-norm statistics.

    Returns:
        The report, and the features or None.

    Raises:
        ValueError: If features are non-finite, or constant over the data.
        OSError: If the features are kept on a disk that is too small for them.
    """
    begin = time.perf_counter()
    before = model.trunk.get_weights()
    try:
        n_batch_norms = 0
        if fresh_statistics:
            n_batch_norms = reestimate_batch_norm(
                model.trunk, x, batch_size=batch_size, steps=steps
            )
        features = FeaturePass(model, keep=keep_features, digest=digest)
        features.run(x, y, sample_weight, batch_size=batch_size, steps=steps)
        mean, variance = features.moments()
    except Exception:
        model.trunk.set_weights(before)
        raise
    head = model.head
    head.standardize.moving_mean.assign(mean)
    head.standardize.moving_variance.assign(variance)
    model.start_exploiting(noise)
    rows = features.rows()
    rank = check_rank(
        head.normalize_exactly(rows),
        *head.gates_of(0),
        head.slope,
        n_samples=features.n,
        max_rows=_COMPLETE_ROWS if features.n <= _COMPLETE_ROWS else _SAMPLED_ROWS,
        seed=head.seed,
        u=rows,
        positions=features.positions(),
    )
    seconds = time.perf_counter() - begin
    report = SwitchReport(features.n, n_batch_norms, rank, seconds)
    model.switch_report = report
    logger.info("%s", report)
    # Repeated inputs alone cost rank, too, but no width could change that.
    if rank.reason is not None:
        warnings.warn(f"The rank check at the switch failed: {rank}", stacklevel=2)
    return report, features.feature_set() if keep_features else None
