"""The frozen trunk's features: one pass over the data, kept or only measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.head import data
from keras_dalign.head.batch_predictor import BatchPredictor
from keras_dalign.numerics.losses import convex_loss
from keras_dalign.numerics.memory import free_gib
from keras_dalign.numerics.repeats import digests

if TYPE_CHECKING:
    from keras_dalign.head.alignment_head import AlignmentHead
    from keras_dalign.training.aligned_model import AlignedModel

# Rows kept for the rank check when the features themselves are not.
_SAMPLE_ROWS = 8192

# Inputs under this key are features already. The marker travels with the data, so
# that evaluating raw inputs from a callback works in the middle of exploitation.
_KEY = "keras_dalign_features"


def as_inputs(features: Any) -> dict[str, Any]:
    """Marks features (a tensor, or the pair `[z, u]`) as inputs of the model."""
    return {_KEY: features}


def from_inputs(inputs: Any) -> Any | None:
    """The features among the inputs, or None for raw inputs."""
    if isinstance(inputs, dict) and _KEY in inputs:
        return inputs[_KEY]
    return None


@dataclass(frozen=True)
class FeatureSet:
    """The trunk's features of a data set, in the order of one pass.

    Attributes:
        z: What the head takes: an array `(n, p)`, or a pair of arrays.
        y: Targets, or None.
        sample_weight: Weights `(n,)`, or None.
        batch_size: Samples in the first batch of the pass.
        digests: Of the inputs, in the same order, or None if they were not asked for.
    """

    z: Any
    y: Any
    sample_weight: Any
    batch_size: int
    digests: list[bytes] | None = None


class FeaturePass:
    """One pass over the data: moments, a sample of rows and, if asked, everything.

    Args:
        model: The model whose trunk computes the features, in inference mode.
        keep: Whether all features (and targets, and weights) are kept.
        digest: Whether digests of the inputs are kept with them.
    """

    def __init__(self, model: AlignedModel, keep: bool, digest: bool = False) -> None:
        self.model = model
        self.keep = keep
        self.digests: list[bytes] | None = [] if digest else None
        self.loss = None if model.loss is None else convex_loss(model.loss)
        self.n = 0
        self.mean: Any = 0.0
        self.square: Any = 0.0
        self.kept: list[tuple[Any, Any, Any]] = []
        self.sample: np.ndarray = np.empty((0, 0))
        self.sample_positions: np.ndarray = np.empty(0, np.intp)
        self.rng = np.random.default_rng([model.head.seed, 2])

    def run(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int = 256,
        steps: int | None = None,
    ) -> FeaturePass:
        """Goes over the data once; arguments as `keras_dalign.head.data.batches`.

        Returns:
            This pass, with what it found.

        Raises:
            ValueError: If features are non-finite or targets do not fit the loss.
        """
        predictor = BatchPredictor(self.model.trunk)
        for inputs, targets, weights in data.batches(
            x, y, sample_weight, batch_size=batch_size, steps=steps
        ):
            if self.digests is not None:
                self.digests.extend(digests(inputs))
            z = predictor.predict(inputs)
            self._add(keras.tree.map_structure(_as_float, z), targets, weights)
        return self

    def _add(self, z: Any, y: Any, sample_weight: Any) -> None:
        u = _gated(z)
        if not np.all(np.isfinite(u)):
            raise ValueError(
                "The trunk's features are not finite. Received: NaN or infinity for "
                f"{int(np.sum(~np.isfinite(u).all(axis=1)))} of {len(u)} samples of a "
                "batch. Check the inputs, and that exploration did not diverge."
            )
        if y is not None and self.loss is not None:
            self.loss.targets(np.asarray(y), self.model.head.units)
        # Chan's update of mean and centred sum of squares, in float64.
        count = len(u)
        mean = u.mean(axis=0, dtype="float64")
        square = ((u - mean) ** 2).sum(axis=0, dtype="float64")
        n = self.n + count
        delta = mean - self.mean
        self.square = self.square + square + delta**2 * (self.n * count / n)
        self.mean = self.mean + delta * (count / n)
        if self.keep:
            self.kept.append((z, y, sample_weight))
        else:
            self._sample(u)
        self.n = n

    def _sample(self, u: np.ndarray) -> None:
        """Keeps a uniform sample of the rows seen (reservoir sampling)."""
        if not len(self.sample):
            self.sample = np.empty((0, u.shape[1]), u.dtype)
        free = _SAMPLE_ROWS - len(self.sample)
        seen = self.n + free if free < len(u) else self.n
        self.sample = np.concatenate([self.sample, u[:free]])
        new = self.n + np.arange(len(u[:free]))
        self.sample_positions = np.concatenate([self.sample_positions, new])
        for index, row in enumerate(u[free:] if free > 0 else u):
            place = int(self.rng.integers(seen + index + 1))
            if place < _SAMPLE_ROWS:
                self.sample[place] = row
                self.sample_positions[place] = seen + index

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and population variance of the features, each `(p,)`, float64."""
        variance = self.square / self.n
        if np.all(variance <= 1e-12 * np.maximum(1.0, np.asarray(self.mean) ** 2)):
            raise ValueError(
                "The trunk's features are constant: every sample looks the same to the "
                "head, which then cannot fit any labels. Received: "
                f"{len(variance)} features over {self.n} samples, largest variance "
                f"{np.max(variance):.2g}. Check the inputs, and that exploration did "
                "not kill every unit (a smaller learning rate helps)."
            )
        return self.mean, variance

    def rows(self) -> np.ndarray:
        """Features `(rows, p)` for the rank check."""
        if self.keep:
            return np.concatenate([_gated(z) for z, _, _ in self.kept])
        return self.sample

    def positions(self) -> np.ndarray:
        """Positions in this pass of the samples that `rows` gives, shape `(rows,)`."""
        return np.arange(self.n) if self.keep else self.sample_positions

    def feature_set(self) -> FeatureSet:
        """Everything kept, in the order of the pass."""
        z, y, sample_weight = zip(*self.kept, strict=True)
        first = len(keras.tree.flatten(z[0])[0])
        return FeatureSet(
            _stacked(z), _stacked(y), _stacked(sample_weight), first, self.digests
        )


def _as_float(z: Any) -> np.ndarray:
    z = np.asarray(z)
    # Half-precision features are kept in float32, which NumPy can compute with.
    return z if z.dtype in (np.float32, np.float64) else z.astype("float32")


def _gated(z: Any) -> np.ndarray:
    u = z[1] if isinstance(z, (list, tuple)) else z
    return u.reshape(len(u), -1)


def _stacked(parts: tuple[Any, ...]) -> Any:
    if parts[0] is None:
        return None
    return keras.tree.map_structure(
        lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *parts
    )


@dataclass(frozen=True)
class CachePlan:
    """Whether to keep the features of `n` samples, and why.

    Attributes:
        keep: Whether they are kept.
        gib: What keeping them takes, in GiB (None if `n` is unknown).
        reason: A sentence for the log.
    """

    keep: bool
    gib: float | None
    reason: str


def plan_cache(
    head: AlignmentHead,
    n_samples: int | None,
    wanted: bool | str,
    is_array: bool,
) -> CachePlan:
    """Decides whether features are cached.

    Args:
        head: The head whose features would be kept.
        n_samples: Number of samples, if known.
        wanted: `DAlign`'s `cache_features`: True, False or `"auto"`.
        is_array: Whether the data are arrays (streams may augment, so `"auto"`
            does not cache them).

    Returns:
        The plan.
    """
    gib = None if n_samples is None else n_samples * head.feature_size * 4 / 2**30
    if wanted is False:
        return CachePlan(False, gib, "features are not cached (cache_features=False)")
    if wanted is True:
        return CachePlan(True, gib, "features are cached (cache_features=True)")
    if not is_array:
        return CachePlan(
            False,
            gib,
            "features are not cached, as a stream may augment its data; if it does "
            "not, DAlign(cache_features=True) is faster",
        )
    free = free_gib()
    # Half of what is free: the data and the optimizer need room, too.
    if gib is not None and free is not None and gib > free / 2:
        return CachePlan(
            False,
            gib,
            f"features are not cached: they would take {gib:.3g} GiB of the {free:.3g} "
            "GiB that are free",
        )
    return CachePlan(True, gib, f"features are cached ({gib or 0.0:.3g} GiB)")
