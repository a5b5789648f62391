"""The frozen trunk's features: one pass over the data, kept or only measured."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import keras
import numpy as np

from keras_dalign.head import data
from keras_dalign.head.batch_predictor import BatchPredictor
from keras_dalign.head.row_store import RowStore
from keras_dalign.numerics.keras_losses import convex_loss
from keras_dalign.numerics.memory import free_disk_gib, free_gib, raise_disk_full
from keras_dalign.numerics.repeats import digests

if TYPE_CHECKING:
    from keras_dalign.head.alignment_head import AlignmentHead

# The value of `cache_features`, and of `keep`, for features in a file.
DISK = "disk"

# Rows that the rank check is given.
_SAMPLE_ROWS = 8192

# Moments are summed in float64 over blocks of rows that stay in the processor's cache.
_BLOCK_BYTES = 2**20

# Inputs under this key are features already. The mark is part of the data, so a
# callback can evaluate raw inputs during exploitation.
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
        z: What the head takes: an array `(n, p)`, or a pair of arrays. What feeds the
            gated units is a `numpy.memmap` if it was kept on disk; its space is free
            again as soon as nothing refers to it.
        y: Targets, or None.
        sample_weight: Weights `(n,)`, or None.
        batch_size: Samples in the first batch of the pass.
        digests: Digests of the inputs, in the same order, or None if not requested.
    """

    z: Any
    y: Any
    sample_weight: Any
    batch_size: int
    digests: list[bytes] | None = None


class HasTrunkAndHead(Protocol):
    """A model of a trunk and an alignment head, such as `AlignedModel`.

    Attributes:
        trunk: Maps inputs to features.
        head: Maps features to logits.
        loss: The loss that the model was compiled with, or None.
    """

    trunk: keras.Model
    head: AlignmentHead
    loss: Any


class FeaturePass:
    """One pass over the data: moments, a sample of rows and, on request, all features.

    Args:
        model: The model whose trunk computes the features, in inference mode.
        keep: Whether all features (and targets, and weights) are kept: False, True or
            `"disk"`, which puts those that feed the gated units into a file.
        digest: Whether digests of the inputs are kept with them.
    """

    def __init__(
        self, model: HasTrunkAndHead, keep: bool | str, digest: bool = False
    ) -> None:
        self.model = model
        self.keep = keep
        self.digests: list[bytes] | None = [] if digest else None
        self.loss = None if model.loss is None else convex_loss(model.loss)
        self.n = 0
        self.first_batch = 0
        # Sums over the samples of their difference from the first one, and of its
        # square. No sample is farther than sqrt(n) standard deviations from the mean,
        # so the rounding error of the variance is at most n times that of float64.
        self.shift: Any = 0.0
        self.total: Any = 0.0
        self.square: Any = 0.0
        self.structure: Any = None
        self.stores: list[RowStore | None] = []
        self.kept: FeatureSet | None = None
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
        name: str = "",
    ) -> FeaturePass:
        """Reads the data once; arguments as `keras_dalign.head.data.batches`.

        Returns:
            This pass, which then holds the results.

        Raises:
            ValueError: If features are non-finite or targets do not fit the loss.
            OSError: If the features are kept on a disk that is too small for them.
        """
        predictor = BatchPredictor(self.model.trunk)
        batches = data.batches(
            x,
            y,
            sample_weight,
            batch_size=batch_size,
            steps=steps,
            model=self.model,
            name=name,
        )
        n = data.n_samples(x) if data.is_arrays(x) and steps is None else None
        try:
            for inputs, targets, weights in batches:
                if self.digests is not None:
                    self.digests.extend(digests(inputs))
                z = keras.tree.map_structure(_as_float, predictor.predict(inputs))
                self._add(z, targets, weights, n)
            if self.keep:
                self.kept = self._collected()
        finally:
            for store in self.stores:
                if store is not None:
                    store.close()
            self.stores = []
        return self

    def _add(
        self, z: Any, y: Any, sample_weight: Any, n_samples: int | None = None
    ) -> None:
        u = _gated(z)
        if y is not None and self.loss is not None:
            self.loss.targets(np.asarray(y), self.model.head.units)
        self._sum(u)
        if self.keep:
            self._keep(z, y, sample_weight, n_samples)
        else:
            self._sample(u)
        self.n += len(u)

    def _sum(self, u: np.ndarray) -> None:
        """Adds a batch to the moments."""
        if self.n == 0:
            self.shift = u[0].astype("float64")
            self.first_batch = len(u)
        step = max(_BLOCK_BYTES // (8 * u.shape[1]), 1)
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, len(u), step):
                change = u[start : start + step] - self.shift
                self.total = self.total + change.sum(axis=0)
                self.square = self.square + np.einsum("ij,ij->j", change, change)
        # A value that is not finite makes the sum of squares so.
        if not np.isfinite(self.square).all():
            raise ValueError(
                "The trunk's features are not finite. Received: NaN or infinity for "
                f"{int(np.sum(~np.isfinite(u).all(axis=1)))} of {len(u)} samples of a "
                "batch. Check the inputs, and that exploration did not diverge."
            )

    def _keep(self, z: Any, y: Any, sample_weight: Any, n: int | None) -> None:
        parts = (z, y, sample_weight)
        leaves = keras.tree.flatten(parts)
        if not self.stores:
            self.structure = keras.tree.map_structure(lambda _: None, parts)
            gated = len(keras.tree.flatten(z)) - 1
            self.stores = [
                None
                if leaf is None
                else RowStore(n, on_disk=self.keep == DISK and index == gated)
                for index, leaf in enumerate(leaves)
            ]
        for store, leaf in zip(self.stores, leaves, strict=True):
            if store is not None:
                store.append(np.asarray(leaf))

    def _sample(self, u: np.ndarray) -> None:
        """Keeps a uniform sample of the rows seen (reservoir sampling)."""
        if not len(self.sample):
            self.sample = np.empty((0, u.shape[1]), u.dtype)
        free = _SAMPLE_ROWS - len(self.sample)
        new = self.n + np.arange(len(u))
        self.sample = np.concatenate([self.sample, u[:free]])
        self.sample_positions = np.concatenate([self.sample_positions, new[:free]])
        # The k-th row, from 0, takes a place with probability _SAMPLE_ROWS / (k + 1).
        for row, position in zip(u[free:], new[free:], strict=True):
            place = int(self.rng.integers(position + 1))
            if place < _SAMPLE_ROWS:
                self.sample[place] = row
                self.sample_positions[place] = position

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and population variance of the features, each `(p,)`, float64."""
        change = self.total / self.n
        mean = self.shift + change
        variance = np.maximum(self.square / self.n - change**2, 0.0)
        if np.all(variance <= 1e-12 * np.maximum(1.0, mean**2)):
            raise ValueError(
                "The trunk's features are constant: every sample looks the same to the "
                "head, which then cannot fit any labels. Received: "
                f"{len(variance)} features over {self.n} samples, largest variance "
                f"{np.max(variance):.2g}. Check the inputs, and that exploration did "
                "not kill every unit (a smaller learning rate helps)."
            )
        return mean, variance

    def _collected(self) -> FeatureSet:
        arrays = [None if store is None else store.array() for store in self.stores]
        z, y, sample_weight = keras.tree.pack_sequence_as(self.structure, arrays)
        if self.n <= _SAMPLE_ROWS:
            self.sample_positions = np.arange(self.n)
            self.sample = _gated(z)
        else:
            chosen = self.rng.choice(self.n, _SAMPLE_ROWS, replace=False)
            self.sample_positions = np.sort(chosen)
            self.sample = _gated(z)[self.sample_positions]
        return FeatureSet(z, y, sample_weight, self.first_batch, self.digests)

    def rows(self) -> np.ndarray:
        """Features of at most 8,192 samples, `(rows, p)`, for the rank check."""
        return self.sample

    def positions(self) -> np.ndarray:
        """Positions in this pass of the samples of `rows`, shape `(rows,)`."""
        return self.sample_positions

    def feature_set(self) -> FeatureSet:
        """All features that were kept, in the order of the pass.

        Returns:
            The features.

        Raises:
            ValueError: If nothing was kept.
        """
        if self.kept is None:
            raise ValueError(
                "This pass kept no features. Received: a pass with "
                f"keep={self.keep!r} over {self.n} samples"
            )
        return self.kept


def _as_float(z: Any) -> np.ndarray:
    z = np.asarray(z)
    # Half-precision features are kept in float32, which NumPy can compute with.
    return z if z.dtype in (np.float32, np.float64) else z.astype("float32")


def _gated(z: Any) -> np.ndarray:
    u = z[1] if isinstance(z, (list, tuple)) else z
    return u.reshape(len(u), -1)


@dataclass(frozen=True)
class CachePlan:
    """Whether to keep the features of `n` samples, and why.

    Attributes:
        keep: Whether they are kept, as `FeaturePass` takes it.
        gib: What keeping them takes, in GiB (None if `n` is unknown).
        reason: A sentence for the log.
    """

    keep: bool | str
    gib: float | None
    reason: str


def plan_cache(
    head: AlignmentHead,
    n_samples: int | None,
    wanted: bool | str,
    is_array: bool,
) -> CachePlan:
    """Decides whether features are cached, and where.

    Args:
        head: The head whose features would be kept.
        n_samples: Number of samples, if known.
        wanted: `DAlign`'s `cache_features`: True, False, `"disk"` or `"auto"`.
        is_array: Whether the data are arrays (streams may augment, so `"auto"`
            does not cache them).

    Returns:
        The plan.

    Raises:
        OSError: If they are wanted, and fit neither into memory nor on the disk.
    """
    gib = None
    if n_samples is not None:
        itemsize = 8 if head.compute_dtype == "float64" else 4
        gib = n_samples * head.feature_size * itemsize / 2**30
    if wanted is False:
        return CachePlan(False, gib, "features are not cached (cache_features=False)")
    if wanted == "auto" and not is_array:
        return CachePlan(
            False,
            gib,
            "features are not cached, as a stream may augment its data; if it does "
            "not, DAlign(cache_features=True) is faster",
        )
    size = "" if gib is None else f" ({gib:.3g} GiB)"
    free = free_gib()
    # Half of what is free: the data and the optimizer need room, too.
    fits = gib is None or free is None or gib <= free / 2
    if fits and wanted != DISK:
        return CachePlan(True, gib, f"features are cached in memory{size}")
    reason = f"features are cached on disk, in {tempfile.gettempdir()}{size}"
    if not fits:
        reason += f", as {free:.3g} GiB of memory are free"
    if gib is None or gib <= free_disk_gib():
        return CachePlan(DISK, gib, reason)
    if wanted != "auto":
        raise_disk_full(gib)
    return CachePlan(
        False,
        gib,
        f"features are not cached: they would take {gib:.3g} GiB, {free:.3g} GiB of "
        f"memory and {free_disk_gib():.3g} GiB in {tempfile.gettempdir()} are free",
    )
