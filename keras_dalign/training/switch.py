"""The switch from exploration to exploitation: statistics, gates, rank check."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keras_dalign.head.batch_norm import reestimate_batch_norm
from keras_dalign.head.features import FeaturePass, FeatureSet
from keras_dalign.numerics.rank import check_rank
from keras_dalign.numerics.threads import in_turn

if TYPE_CHECKING:
    from keras_dalign.head.alignment_head import AlignmentHead
    from keras_dalign.numerics.rank_check import RankCheck
    from keras_dalign.training.aligned_model import AlignedModel
    from keras_dalign.training.weight_average import WeightAverage

logger = logging.getLogger("keras_dalign")

# Up to this number the rank check uses all samples (half a second on two cores).
_COMPLETE_ROWS = 2048
# With more samples it uses so many of them.
_SAMPLED_ROWS = 1024
# Where many outputs have gates of their own, each is checked on fewer samples.
_LEAST_ROWS = 256


@dataclass(frozen=True)
class SwitchReport:
    """Report of the switch.

    Attributes:
        n_samples: Samples seen.
        n_batch_norms: Batch-normalisation layers whose statistics were
            re-estimated, without the head's standardisation.
        rank: The rank check; None where exploitation has an L2 term, which needs none.
        seconds: Wall time of the switch.
        averaged: Whether the weights were set to their average over the last steps.
    """

    n_samples: int
    n_batch_norms: int
    rank: RankCheck | None
    seconds: float
    averaged: bool = False

    def __str__(self) -> str:
        averaged = "weights averaged over the last steps; " if self.averaged else ""
        rank = self.rank or "the L2 term makes the optimum unique at any rank"
        return (
            f"switch: {averaged}{self.n_batch_norms} batch normalisations re-estimated "
            f"over {self.n_samples} samples; {rank} ({self.seconds:.1f} s)"
        )


@in_turn
def switch(
    model: AlignedModel,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int = 256,
    steps: int | None = None,
    noise: float = 1e-3,
    average: WeightAverage | None = None,
    width: int | None = None,
    replace_dense: bool = False,
    rank_matters: bool = True,
    keep_features: bool | str = False,
    digest: bool = False,
    fresh_statistics: bool = True,
) -> tuple[SwitchReport, FeatureSet | None]:
    """Takes a model from exploration to exploitation.

    First the weights are set to their average over the last steps. Two passes over the
    data follow. One re-estimates the trunk's batch-norm statistics. The other computes
    the features in inference mode, for the head's standardisation and the rank check.
    Then the gates are set and the trunk is frozen. On an error, the model is restored
    and still exploring.

    Args:
        model: An exploring `AlignedModel`.
        x: Inputs: arrays or a stream.
        y: Targets for arrays, if the features are kept.
        sample_weight: Weights for arrays, if the features are kept.
        batch_size: Int, samples per batch for arrays.
        steps: Int, batches per pass over an endless stream.
        noise: Float, see `AlignmentHead.start_exploiting`.
        average: The average to set the weights to; None to keep the last weights.
        width: Number of random gates; None for the default.
        replace_dense: Whether gated units replace the output layer.
        rank_matters: Whether to check the rank. An L2 term makes the optimum unique at
            any rank.
        keep_features: Whether to return the features: False, True or `"disk"`, see
            `FeaturePass`.
        digest: Whether to return digests of the inputs with them.
        fresh_statistics: Whether to re-estimate the trunk's batch-norm statistics.

    Returns:
        The report, and the features or None.

    Raises:
        ValueError: If features are non-finite, or constant over the data.
        MemoryError: If the gated units do not fit into memory.
        OSError: If the features are kept on a disk that is too small for them.
    """
    begin = time.perf_counter()
    restore = model.snapshot()
    head = model.head
    try:
        averaged = average is not None and average.apply()
        n_batch_norms = 0
        if fresh_statistics:
            n_batch_norms = reestimate_batch_norm(
                model.trunk, x, batch_size=batch_size, steps=steps
            )
        features = FeaturePass(model, keep=keep_features, digest=digest)
        features.run(x, y, sample_weight, batch_size=batch_size, steps=steps)
        mean, variance = features.moments()
        head.standardize.moving_mean.assign(mean)
        head.standardize.moving_variance.assign(variance)
        model.start_exploiting(noise, width, replace_dense)
        rank = _rank(head, features) if rank_matters else None
    except BaseException:
        restore()
        raise
    seconds = time.perf_counter() - begin
    report = SwitchReport(features.n, n_batch_norms, rank, seconds, averaged)
    model.switch_report = report
    logger.info("%s", report)
    # No reason is given where only repeated inputs reduce the rank, as no width helps.
    if rank is not None and rank.reason is not None:
        warnings.warn(f"The rank check at the switch failed: {rank}", stacklevel=3)
    return report, features.feature_set() if keep_features else None


def _rank(head: AlignmentHead, features: FeaturePass) -> RankCheck:
    """Checks the rank of the head's gates on the samples, or on some of them."""
    rows = features.rows()
    r, w = head.gates_in_use()
    most = _COMPLETE_ROWS if features.n <= _COMPLETE_ROWS else _SAMPLED_ROWS
    return check_rank(
        head.normalize_exactly(rows),
        r,
        w,
        head.slope,
        n_samples=features.n,
        max_rows=max(round(most / len(w) ** (1 / 3)), _LEAST_ROWS),
        seed=head.seed,
        u=rows,
        positions=features.positions(),
    )
