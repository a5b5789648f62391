"""The story of alignment over a training run, as curves in the logs.

Once an epoch, on a fixed subsample: how far the targets are from the column space of
the Jacobian, its rank and conditioning, how far the loss is from its global minimum,
and how far the features have moved.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.head.objective import (
    check_some_weight,
    loss_of,
    sample_weights,
    single_array,
)
from keras_dalign.numerics.arguments import integer
from keras_dalign.numerics.gram import gram_matrix
from keras_dalign.numerics.repeats import Repeats, digests
from keras_dalign.numerics.rounding import EPS
from keras_dalign.solving.head_solver import first_width
from keras_dalign.solving.options import SolveOptions
from keras_dalign.training.aligned_model import AlignedModel
from keras_dalign.training.dalign import DAlign
from keras_dalign.training.output_layer import output_layer

if TYPE_CHECKING:
    from keras_dalign.numerics import Array, Indices

_BATCH_SIZE = 256

# Two passes over the same samples must agree up to this much of the largest feature.
_SAME = 1e-3


class AlignmentMonitor(keras.callbacks.Callback):
    """Logs residual, rank, conditioning, gap and feature movement after each epoch.

    Works on any Keras model that `align` accepts, and on `AlignedModel` in both
    phases. The entries go into the epoch's logs, hence to `History`, `CSVLogger`,
    `TensorBoard`, `EarlyStopping` and every other callback **that stands behind the
    monitor** in the list of callbacks (Keras itself puts `History` and the progress bar
    last): put the monitor first.

    - `alignment_residual`: `norm(Y_l - P Y_l) / norm(Y_l)`, `P` the projection on the
      column space of `J`; 0 for aligned targets, 1 if nothing of them is in reach.
    - `alignment_rank`: the rank of `J`. It is full at `n * C`, for `n` samples and `C`
      outputs, and then all targets are aligned.
    - `alignment_condition`: smallest over largest singular value of `J`, of those that
      are not zero.
    - `gap`: the loss less the lowest that any function of the inputs can have; the
      gap that `certify` finds on these samples. Exploitation by the solver logs the
      gap of all samples itself, and that one stays.
    - `feature_movement`: how far features are from those at the beginning of `fit`.
    - `head_residual`, `head_rank`, `head_condition`: the first three, of the alignment
      head. For `AlignedModel` only.

    `J` is the Jacobian of the logits in the weights that they are linear in, and `Y_l`
    the targets of the alignment condition (`2 Y - 1` for the cross-entropies, `Y` for
    squared error; Kawaguchi, Zhang & Deng 2022):

    - the output layer's kernel and bias, for a plain model and while random gates
      explore: `J = [z, 1] (x) I_C` for features `z`, the input of that layer;
    - the head's `q` and `b` in exploitation, and while learned gates explore.

    While exploring, the entries `head_...` are of the head as it would be if the switch
    came now: with the very gates that it will have (with those that the solver begins
    with, where it chooses the width), but with batch-norm statistics as they are and
    standardised by the subsample. In exploitation they are those of the head, and
    `alignment_...` repeats them. Trunk and gates being frozen, they are then computed
    once. A head that is wide enough for all samples has full rank on a few of
    them by a wide margin, so this is necessary for full rank on all, not sufficient:
    the switch checks that. How the condition falls shows what is on its way.

    `feature_movement` is `1 - CKA`, with Kornblith et al.'s (2019) linear centred
    kernel alignment: for centred features `A` (now) and `B` (at the beginning)

        1 - norm(A^T B)^2 / (norm(A^T A) * norm(B^T B)),    Frobenius norms,

    that is one minus the cosine of the angle between the kernels `A A^T` and `B B^T`.
    It is 0 for the same features and for any rotation, shift or scaling of them, which
    the next layer undoes without effort, and 1 for unrelated ones: it sees a change in
    how samples lie to one another, and nothing else. A trunk that only stays near its
    initialisation, as in the linear regime of very wide networks, stays near 0.

    Everything is in inference mode, as in `certify`, and without regularisation,
    augmentation and `class_weight`. The trunk computes features in its own dtype; what
    follows is in float64, where singular values up to `sqrt(max(J.shape) * eps)` times
    the largest, among them the rounding of float32 features, count as zero. In epochs
    that are not measured, and where features or logits are not finite, entries are NaN.

    The training is the same, bit by bit, with and without a monitor. An epoch's entries
    take two inference passes over the subsample and, for `n` of its samples, some
    `C n^3` multiply-adds while there is a head.

    Args:
        x: Inputs, as in `fit`: finite arrays, or a nested structure of them.
        y: Targets, as in `fit`.
        every: Positive int: measure the first epoch, every so many epochs from there,
            the last one, and the first one of exploitation.
        n_samples: Number of samples to look at, chosen at random, once. `rank` and
            `gap` speak of these samples. `None` takes all; this needs two `n x n`
            matrices.
        sample_weight: Sample weights as in `fit`, shape `(n,)`, for the gap; see
            `certify`.
        seed: Non-negative int, for the choice of samples.

    Attributes:
        samples: Positions of the samples looked at, ascending.

    Raises:
        ValueError: If an argument is out of its range or the data are no arrays, differ
            in length or are not finite; when `fit` begins, if the model cannot be
            aligned, its loss is not convex in the logits, the targets do not fit it, or
            the model is stochastic in inference mode.

    Example:

    ```python
    monitor = keras_dalign.AlignmentMonitor(x, y)
    to_file = keras.callbacks.CSVLogger("log.csv")
    history = model.fit(x, y, epochs=30, callbacks=[monitor, to_file]).history
    ```
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        every: int = 1,
        *,
        n_samples: int | None = 256,
        sample_weight: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.every = integer("every", every)
        if not data.is_arrays(x):
            raise ValueError(
                "The monitor looks at the same samples again and again, so `x` must be "
                "arrays. Take some batches from a stream, and pass their samples. "
                f"Received: x of type {type(x).__name__}"
            )
        if y is None:
            raise ValueError("The monitor needs targets `y`. Received: y=None")
        data.check_data(x, y, sample_weight)
        single_array(y, "y")
        n = data.n_samples(x)
        if n_samples is not None:
            n_samples = integer("n_samples", n_samples)
        integer("seed", seed, 0)
        self.samples: Indices = np.arange(n)
        if n_samples is not None and n_samples < n:
            rng = np.random.default_rng(seed)
            self.samples = np.sort(rng.choice(n, n_samples, replace=False))
        self._x = keras.tree.map_structure(self._taken, x)
        self._y = self._taken(y)
        self._weights = sample_weights(sample_weight, n)[self.samples]
        check_some_weight(len(self.samples), float(self._weights.sum()))
        self._digests = digests(self._x)
        self._view: _View | None = None

    def _taken(self, leaf: Any) -> np.ndarray:
        return keras.ops.convert_to_numpy(leaf)[self.samples]

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Builds what is needed to look at the model, and looks at its features."""
        view = _View(self.model, self._x)
        data.check_inputs(self.model, self._x)
        loss = loss_of(self.model)
        targets = loss.targets(self._y, view.units)
        repeats = Repeats()
        repeats.add(self._digests, targets, self._weights, 0)
        self._loss, self._targets = loss, targets
        self._lower_bound = repeats.lower_bound(loss)
        self._reference = _first(view.checked_features())
        self._aligned_targets = loss.aligned_targets(targets)
        self._frozen: dict[str, float] | None = None
        self._next: int | None = None
        self._view = view

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Lets go of what was built."""
        self._view = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the entries to the logs."""
        if logs is None or self._view is None:
            return
        switched = self._view.follow_phase()
        if self._next is None:
            self._next = epoch
        last = epoch + 1 == (self.params or {}).get("epochs")
        if epoch >= self._next or switched or last:
            entries = self._measured(self._view)
            self._next += self.every * (epoch >= self._next)
        else:
            entries = dict.fromkeys(self._names(self._view), math.nan)
        for name, value in entries.items():
            logs.setdefault(name, value)

    @staticmethod
    def _names(view: _View) -> list[str]:
        names = [*_entries("alignment"), "gap", "feature_movement"]
        return [*names, *_entries("head")] if view.head is not None else names

    def _measured(self, view: _View) -> dict[str, float]:
        if view.exploiting and self._frozen is not None:
            entries = dict(self._frozen)
        else:
            features = view.features()
            if not _all_finite(features):
                return dict.fromkeys(self._names(view), math.nan)
            entries = self._alignment(view, features)
            entries["feature_movement"] = _movement(_first(features), self._reference)
            if view.exploiting:
                self._frozen = dict(entries)
        entries["gap"] = self._gap(view.logits())
        return {name: entries[name] for name in self._names(view)}

    def _alignment(self, view: _View, features: Any) -> dict[str, float]:
        targets = self._aligned_targets
        entries = {}
        if view.head is not None:
            gates = _gates(self.model)
            head = _head_space(view.head, features, targets, gates)
            entries.update(head.entries("head"))
            if view.exploiting or view.head.dense is None:
                return {**entries, **head.entries("alignment")}
        last = _output_space(view.dense, _first(features), targets)
        return {**entries, **last.entries("alignment")}

    def _gap(self, logits: Array) -> float:
        if not np.isfinite(logits).all():
            return math.nan
        loss = float(self._weights @ self._loss.value(logits, self._targets))
        total = float(self._weights.sum())
        divisor = self._loss.normalizer(len(logits), total)
        return max(loss - self._lower_bound, 0.0) / divisor


class _View:
    """A model's features and logits on a fixed batch, without touching the model."""

    def __init__(self, model: keras.Model, x: Any) -> None:
        self._model = model
        self.head: AlignmentHead | None = None
        if isinstance(model, AlignedModel):
            self.head = model.head
            self.dense = model.head.dense
            trunk, self.units = model.trunk, model.head.units
        else:
            trunk, self.dense = output_layer(model)
            self.units = self.dense.units
        self._trunk = self._inference(trunk)
        self._x = x
        self._features: Any = None
        self._phase: str | None = None
        self.follow_phase()

    def _inference(self, layer: keras.layers.Layer) -> _Inference:
        strategy = getattr(self._model, "distribute_strategy", None)
        if strategy is None:
            return _Inference(layer)
        with strategy.scope():
            return _Inference(layer)

    @property
    def exploiting(self) -> bool:
        """Whether the trunk is frozen."""
        return self.head is not None and self.head.phase == EXPLOITING

    def follow_phase(self) -> bool:
        """Looks at the head in its phase; True if that is another one."""
        phase = "plain" if self.head is None else self.head.phase
        changed = phase != self._phase
        if changed:
            # What was compiled is of the other phase.
            output = self.dense if self.head is None else self.head
            self._output = self._inference(output)
            self._phase = phase
        return changed

    def features(self) -> Any:
        """What the output layer takes, an array `(n, p)` or a pair of them."""
        self._features = self._trunk.of(self._x)
        return self._features

    def checked_features(self) -> Any:
        """`features`, computed twice.

        Returns:
            The features.

        Raises:
            ValueError: If the two passes do not agree.
        """
        first, second = (keras.tree.flatten(self.features()) for _ in range(2))
        for before, after in zip(first, second, strict=True):
            scale = np.max(np.abs(before), initial=0.0)
            if np.isfinite(scale) and np.abs(after - before).max() > _SAME * scale:
                raise ValueError(
                    "The model's features must be a function of the inputs. Received: "
                    f"model '{self._model.name}', which gave other features for the "
                    "same inputs in inference mode, different by up to "
                    f"{np.abs(after - before).max():.3g}. Make its layers "
                    "deterministic for training=False."
                )
        return self._features

    def logits(self) -> Array:
        """The logits `(n, C)` for the features computed last."""
        return self._output.of(self._features).astype(np.float64)


class _Inference(keras.Model):
    """A layer in inference mode, compiled apart from the model that it belongs to."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        # Without a name Keras would count it, and name other models differently.
        super().__init__(dtype=layer.dtype_policy, name="alignment_monitor")
        self.layer = layer
        self.built = True

    def build(self, input_shape: Any = None) -> None:
        """Does nothing: the layer is built."""

    def call(self, inputs: Any) -> Any:
        """What the layer puts out."""
        return self.layer(inputs)

    def of(self, x: Any) -> Any:
        """The outputs for all samples, float32 at least, as `(n, ...)` arrays."""
        n = data.n_samples(x)
        size = data.even_batch_size(n, _BATCH_SIZE)
        parts = []
        for start in range(0, n, size):
            rows = np.minimum(np.arange(start, start + size), n - 1)
            batch = keras.tree.map_structure(lambda leaf, rows=rows: leaf[rows], x)
            count = min(size, n - start)
            # Replicas of a distribution strategy each predict the whole batch.
            part = keras.tree.map_structure(
                lambda leaf, count=count: _as_float(leaf[:count]),
                self.predict_on_batch(batch),
            )
            parts.append(part)
        return keras.tree.map_structure(lambda *leaves: np.concatenate(leaves), *parts)


@dataclasses.dataclass(frozen=True)
class _ColumnSpace:
    """What the column space of a Jacobian does for the targets."""

    residual: float
    rank: int
    condition: float

    def entries(self, prefix: str) -> dict[str, float]:
        values = (self.residual, self.rank, self.condition)
        return dict(zip(_entries(prefix), values, strict=True))


def _entries(prefix: str) -> tuple[str, str, str]:
    return f"{prefix}_residual", f"{prefix}_rank", f"{prefix}_condition"


def _output_space(
    dense: keras.layers.Dense, features: Array, targets: Array
) -> _ColumnSpace:
    """Of `J = [z, 1] (x) I_C`, or `z (x) I_C` without a bias.

    Args:
        dense: The output layer.
        features: `z`, shape `(n, p)`.
        targets: `Y_l`, shape `(n, C)`.

    Returns:
        Residual, rank and condition of `J`.
    """
    matrix: Array = features.astype(np.float64)
    if dense.use_bias:
        matrix = np.concatenate([matrix, np.ones((len(matrix), 1))], axis=1)
    rows, columns = matrix.shape
    if columns >= rows:
        squares, basis = np.linalg.eigh(matrix @ matrix.T)
        values = np.sqrt(np.maximum(squares, 0.0))
    else:
        basis, values, _ = np.linalg.svd(matrix, full_matrices=False)
    outputs = targets.shape[1]
    seen = values > _cut(rows * outputs, columns * outputs) * values.max()
    error = targets - basis[:, seen] @ (basis[:, seen].T @ targets)
    # A column space that is all of R^n leaves nothing, and rounding shows.
    full = np.count_nonzero(seen) == rows
    return _ColumnSpace(
        0.0 if full else _relative(float(np.linalg.norm(error)), targets),
        int(np.count_nonzero(seen)) * outputs,
        _condition(values[seen]),
    )


def _head_space(
    head: AlignmentHead, features: Any, targets: Array, gates: tuple[Array, Array]
) -> _ColumnSpace:
    """Of the head's `J = blockdiag([Phi_1, 1], ..., [Phi_C, 1])`, as it is or would be.

    Args:
        head: The head, in either phase.
        features: What it takes.
        targets: `Y_l`, shape `(n, C)`.
        gates: `r` and `w`, see `AlignmentHead.gates_in_use`.

    Returns:
        Residual, rank and condition of `J`.
    """
    r, w = gates
    gated = features[1] if isinstance(features, (list, tuple)) else features
    gated = gated.reshape(len(gated), -1).astype(np.float64)
    moments = None
    if head.phase != EXPLOITING:
        moments = gated.mean(axis=0), gated.var(axis=0)
    rows = head.normalize_exactly(gated, moments)

    n, outputs = targets.shape
    groups = len(w)

    def gram(c: int) -> Array:
        group = c % groups  # Shared gates are those of every output.
        return gram_matrix(rows, r[:, group], w[group], head.slope) + 1.0

    squares = np.stack([np.linalg.eigvalsh(gram(c)) for c in range(groups)])
    squares = np.repeat(np.maximum(squares, 0.0), outputs // groups, axis=0)
    columns = r.shape[0] * r.shape[2] + 1
    seen = squares > _cut(n * outputs, columns * outputs) ** 2 * squares.max()
    left = 0.0
    # Only where the rank falls short is anything out of reach.
    for c in np.flatnonzero(~seen.all(axis=1)).tolist():
        _, vectors = np.linalg.eigh(gram(c))
        left += float(np.sum((vectors[:, ~seen[c]].T @ targets[:, c]) ** 2))
    return _ColumnSpace(
        _relative(math.sqrt(left), targets),
        int(np.count_nonzero(seen)),
        _condition(np.sqrt(squares[seen])),
    )


def _relative(error: float, targets: Array) -> float:
    """The error relative to the targets; zero targets leave none."""
    norm = float(np.linalg.norm(targets))
    return min(error / norm, 1.0) if norm else 0.0


def _cut(*shape: int) -> float:
    """Relative size below which a direction of `J` is lost in its Gram matrix."""
    return math.sqrt(max(shape) * EPS)


def _condition(values: Array) -> float:
    return float(values.min() / values.max()) if values.size else 0.0


def _movement(features: Array, reference: Array) -> float:
    """One minus the cosine of the angle between the centred kernels of two features."""
    now, before = (
        rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
        for rows in (features, reference)
    )
    norms = np.linalg.norm(now.T @ now) * np.linalg.norm(before.T @ before)
    if not norms:
        # Features that are the same for all samples have no direction.
        return float(now.any() or before.any())
    cosine = np.linalg.norm(now.T @ before) ** 2 / norms
    return float(np.clip(1.0 - cosine, 0.0, 1.0))


def _gates(model: AlignedModel) -> tuple[Array, Array]:
    """The gates that the head has, or that `fit` would set at the switch."""
    if model.phase == EXPLOITING:
        return model.head.gates_in_use()
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(optimizer, DAlign):
        return model.head.gates_at_switch()
    width, replaced = None, False
    if optimizer.solves:
        options = SolveOptions.from_dict(optimizer.solve_options)
        width = first_width(model.head, options)
        replaced = options.replaces_dense(model.head.gates)
    return model.head.gates_at_switch(optimizer.noise, width, replaced)


def _first(features: Any) -> Array:
    """The features that feed the linear layer."""
    return features[0] if isinstance(features, (list, tuple)) else features


def _all_finite(features: Any) -> bool:
    return all(np.isfinite(leaf).all() for leaf in keras.tree.flatten(features))


def _as_float(values: Any) -> np.ndarray:
    array = np.asarray(values)
    return array if array.dtype == np.float64 else array.astype(np.float32)
