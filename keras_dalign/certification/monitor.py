"""A callback that logs the alignment condition during training.

It measures a fixed subsample after an epoch: the distance of the targets to the column
space of the Jacobian, its rank and condition, the distance of the loss to its global
minimum, and how far the features have moved.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.certification.column_space_summary import (
    entry_names,
    head_space,
    output_layer_space,
)
from keras_dalign.certification.feature_movement import feature_movement
from keras_dalign.certification.monitored_model import MonitoredModel
from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING
from keras_dalign.head.objective import (
    check_some_weight,
    loss_of,
    sample_weights,
    single_array,
)
from keras_dalign.numerics.arguments import integer
from keras_dalign.numerics.repeats import Repeats, digests
from keras_dalign.solving.head_solver import first_width
from keras_dalign.solving.options import SolveOptions
from keras_dalign.training.dalign import DAlign

if TYPE_CHECKING:
    from keras_dalign.numerics import Array, Indices
    from keras_dalign.training.aligned_model import AlignedModel


class AlignmentMonitor(keras.callbacks.Callback):
    """Logs residual, rank, conditioning, gap and feature movement after each epoch.

    Works on any Keras model that `align` accepts, and on `AlignedModel` in both
    phases. Put it **first in the list of callbacks**: its entries go into the epoch's
    logs, where `CSVLogger`, `TensorBoard`, `EarlyStopping` and all other callbacks
    after it find them, and so do `History` and the progress bar.

    - `alignment_residual`: `norm(Y_l - P Y_l) / norm(Y_l)`, `P` the projection on the
      column space of `J`; 0 for aligned targets, 1 for targets orthogonal to it.
    - `alignment_rank`: the rank of `J`. It is full at `n * C`, for `n` samples and `C`
      outputs, and then all targets are aligned.
    - `alignment_condition`: smallest over largest nonzero singular value of `J`.
    - `gap`: the loss minus its lower bound over all functions of the inputs, the gap
      that `certify` finds on these samples. Where exploitation by the solver has
      logged the gap of all samples, that one stays.
    - `feature_movement`: distance of the features to those at the beginning of `fit`.
    - `head_residual`, `head_rank`, `head_condition`: the first three, for the alignment
      head. For `AlignedModel` only.

    `Y_l` are the targets of the alignment condition: `2 Y - 1` for the cross-entropies,
    `Y` for squared error (Kawaguchi, Zhang & Deng 2022). `J` is the Jacobian of the
    logits in the weights that they are linear in:

    - for a plain model, and while random gates explore: the output layer's kernel and
      bias, so that `J = [z, 1] (x) I_C` for features `z`, the input of that layer;
    - in exploitation, and while learned gates explore: the head's `q` and `b`.

    During exploration, the entries `head_...` are those of the head if the switch were
    made now. It has the gates that it will have then; where the solver chooses the
    width, those that it starts with. Only batch-norm statistics are as they are, and
    the subsample standardises the features. In exploitation the entries are those of
    the head, and `alignment_...` repeats them; trunk and gates are frozen, so they are
    computed once.

    Full rank on the subsample is necessary for full rank on all samples, but not
    sufficient; the switch checks all. A falling condition warns of a loss of rank.

    `feature_movement` is `1 - CKA`, with Kornblith et al.'s (2019) linear centred
    kernel alignment: for centred features `A` (now) and `B` (at the beginning)

        1 - norm(A^T B)^2 / (norm(A^T A) * norm(B^T B)),    Frobenius norms,

    that is one minus the cosine of the angle between the kernels `A A^T` and `B B^T`.
    It is 0 for the same features and for any rotation, shift or scaling of them, which
    the next layer can undo, and 1 for unrelated ones. A trunk that stays near its
    initialisation, as in the linear regime of very wide networks, stays near 0.

    Everything is in inference mode, as in `certify`, and without regularisation,
    augmentation and `class_weight`. The trunk computes features in its own dtype, all
    that follows is in float64. Singular values up to `sqrt(max(J.shape) * eps)` times
    the largest count as zero; this covers the rounding of float32 features. In epochs
    that are not measured, and where features or logits are not finite, entries are NaN.

    The training is the same, bit by bit, with and without a monitor. An epoch's entries
    take two inference passes over the subsample. With a head, they take some `C n^3`
    multiply-adds, too, for `n` samples.

    Args:
        x: Inputs, as in `fit`: finite arrays, or a nested structure of them.
        y: Targets, as in `fit`.
        every: Positive int: measure the first epoch, then one in so many, and also the
            last one and the first one of exploitation.
        n_samples: Number of samples to measure, drawn at random once. All entries are
            about these samples. `None` takes all; this needs two `n x n` matrices.
        sample_weight: Sample weights as in `fit`, shape `(n,)`, for the gap; see
            `certify`.
        seed: Non-negative int, seed of the draw of samples.

    Attributes:
        samples: Positions of the measured samples, ascending.

    Raises:
        ValueError: If an argument is out of its range, or the data are no arrays,
            differ in length or are not finite. When `fit` begins: if the model cannot
            be aligned, its loss is not convex in the logits, the targets do not fit it,
            or the model is stochastic in inference mode.

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
                "The monitor measures the same samples in several epochs, so `x` must "
                "be arrays. Take some batches from a stream, and pass their samples. "
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
        self._x = keras.tree.map_structure(self._selected, x)
        self._y = self._selected(y)
        self._weights = sample_weights(sample_weight, n)[self.samples]
        check_some_weight(len(self.samples), float(self._weights.sum()))
        self._digests = digests(self._x)
        self._monitored: MonitoredModel | None = None

    def _selected(self, leaf: Any) -> np.ndarray:
        return keras.ops.convert_to_numpy(leaf)[self.samples]

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Keeps the initial features, and what measuring needs."""
        monitored = MonitoredModel(self.model, self._x)
        data.check_inputs(self.model, self._x)
        loss = loss_of(self.model)
        targets = loss.targets(self._y, monitored.units)
        repeats = Repeats()
        repeats.add(self._digests, targets, self._weights, 0)
        self._loss, self._targets = loss, targets
        self._lower_bound = repeats.lower_bound(loss)
        self._reference = _linear_inputs(monitored.checked_features())
        self._aligned_targets = loss.aligned_targets(targets)
        self._frozen: dict[str, float] | None = None
        self._next: int | None = None
        self._monitored = monitored

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Frees the models that measured."""
        self._monitored = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the entries to the logs, except those that have a number already."""
        if logs is None or self._monitored is None:
            return
        switched = self._monitored.follow_phase()
        if self._next is None:
            self._next = epoch
        last = epoch + 1 == (self.params or {}).get("epochs")
        if epoch >= self._next or switched or last:
            entries = self._measured(self._monitored)
            self._next += self.every * (epoch >= self._next)
        else:
            entries = dict.fromkeys(self._names(self._monitored), math.nan)
        for name, value in entries.items():
            # Before the solver runs, its `gap` is logged as NaN.
            if math.isnan(logs.get(name, math.nan)):
                logs[name] = value

    @staticmethod
    def _names(monitored: MonitoredModel) -> list[str]:
        names = [*entry_names("alignment"), "gap", "feature_movement"]
        return [*names, *entry_names("head")] if monitored.head is not None else names

    def _measured(self, monitored: MonitoredModel) -> dict[str, float]:
        if monitored.exploiting and self._frozen is not None:
            entries = dict(self._frozen)
        else:
            features = monitored.features()
            if not _all_finite(features):
                return dict.fromkeys(self._names(monitored), math.nan)
            entries = self._alignment(monitored, features)
            inputs = _linear_inputs(features)
            entries["feature_movement"] = feature_movement(inputs, self._reference)
            if monitored.exploiting:
                self._frozen = dict(entries)
        entries["gap"] = self._gap(monitored.logits())
        return {name: entries[name] for name in self._names(monitored)}

    def _alignment(self, monitored: MonitoredModel, features: Any) -> dict[str, float]:
        targets = self._aligned_targets
        entries = {}
        if monitored.head is not None:
            gates = _gates(self.model)
            head = head_space(monitored.head, features, targets, gates)
            entries.update(head.entries("head"))
            if monitored.exploiting or monitored.head.dense is None:
                return {**entries, **head.entries("alignment")}
        inputs = _linear_inputs(features)
        last = output_layer_space(monitored.dense, inputs, targets)
        return {**entries, **last.entries("alignment")}

    def _gap(self, logits: Array) -> float:
        if not np.isfinite(logits).all():
            return math.nan
        loss = float(self._weights @ self._loss.value(logits, self._targets))
        total = float(self._weights.sum())
        divisor = self._loss.normalizer(len(logits), total)
        return max(loss - self._lower_bound, 0.0) / divisor


def _gates(model: AlignedModel) -> tuple[Array, Array]:
    """The gates of the head, or those that `fit` would set at a switch now."""
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


def _linear_inputs(features: Any) -> Array:
    """The features that feed the linear layer."""
    return features[0] if isinstance(features, (list, tuple)) else features


def _all_finite(features: Any) -> bool:
    return all(np.isfinite(leaf).all() for leaf in keras.tree.flatten(features))
