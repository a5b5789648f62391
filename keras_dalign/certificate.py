"""How far a model's training loss is from the global minimum, at most.

The measured loss minus a proven lower bound: samples with identical inputs get one
output from any function, so where their targets differ, no function of the inputs can
go below the loss of their best common output. The gap between the two bounds the
distance to the global minimum from above. It takes no assumption on the model and no
theorem.
"""

from __future__ import annotations

import dataclasses
import decimal
import hashlib
import html
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_dalign import data
from keras_dalign.losses import Array, ConvexLoss, Indices, convex_loss

# Conflicts listed in a certificate, and samples listed in a conflict.
_MAX_LISTED = 20

# A gap may come out negative by the rounding of the logits: within this many units in
# the last place of each logit (float accumulation in the layers below), to first order.
_LOGIT_ULPS = 64
_FLOAT64_ROUNDING = 1e-12

_UNITS_IN_LAST_PLACE = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}


@dataclasses.dataclass(frozen=True)
class Certificate:
    """An upper bound on the distance of a training loss to its global minimum.

    `gap` bounds `loss` minus the infimum of the loss over *all* functions of the
    inputs, hence over all parameters of the model. A gap of 0 is one that vanishes to
    rounding.

    Attributes:
        loss: Measured loss over all samples, in inference mode.
        lower_bound: Loss below which no function of the inputs can go.
        gap: `loss - lower_bound`, at least 0.
        n_samples: Number of samples.
        n_distinct: Number of distinct inputs among them.
        n_conflicts: Number of distinct inputs that came with two or more different
            targets, samples of weight 0 aside. Without conflicts (and label smoothing
            or soft labels) the lower bound is 0.
        conflicts: The first 20 of these conflicts: for each, the positions in the data
            of samples that share the input and differ in the target (the first sample
            of each target, 20 at most).
        objective: The loss that the certificate speaks of, in words.
        dtype: The dtype of the model's outputs. Sums are in float64 always.
    """

    loss: float
    lower_bound: float
    gap: float
    n_samples: int
    n_distinct: int
    n_conflicts: int
    conflicts: tuple[tuple[int, ...], ...]
    objective: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """The certificate as a dict that `json.dumps` accepts."""
        fields = dataclasses.asdict(self)
        fields["conflicts"] = [list(conflict) for conflict in self.conflicts]
        return fields

    def __str__(self) -> str:
        gap = _round(self.gap, up=True) if self.gap else "0 (to rounding)"
        return (
            f"The loss is {self.loss:.6g}, at most {gap} above its global "
            "minimum: no function of the inputs can go below "
            f"{_round(self.lower_bound, up=False)} on these {self.n_samples} samples "
            f"({self.n_distinct} distinct inputs, {self.n_conflicts} of them with "
            f"conflicting targets); objective: {self.objective}; outputs in "
            f"{self.dtype}, sums in float64."
        )

    def _repr_html_(self) -> str:
        rows = {
            "loss": f"{self.loss:.6g}",
            "lower bound": _round(self.lower_bound, up=False),
            "gap": f"<b>{_round(self.gap, up=True)}</b>",
            "samples": str(self.n_samples),
            "distinct inputs": str(self.n_distinct),
            "conflicts": str(self.n_conflicts),
            "objective": html.escape(self.objective),
            "outputs in": html.escape(self.dtype),
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{text}</td></tr>"
            for name, text in rows.items()
        )
        return f"<table>{cells}</table>"


def certify(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    loss: Any = None,
    sample_weight: Any = None,
    batch_size: int = 256,
    steps: int | None = None,
) -> Certificate:
    """Measures how far a model's training loss is from its global minimum, at most.

    The loss is that of the data as given, in inference mode (dropout and augmentation
    layers off, batch normalisation with its moving averages), without regularisation,
    `class_weight` and `loss_weights`, its sums in float64. Its lower bound comes from
    the samples with identical inputs, found by content in the same single pass: for a
    group of them the best common output gives the weighted variance of the targets
    (squared error) or the entropy of their weighted mean (cross-entropies). Memory
    grows with the number of distinct inputs, not with their size.

    Inputs are told apart by their bytes, through 128-bit digests, with -0.0 equal to
    0.0. A stream that augments at random is certified for the samples that it drew.

    Args:
        model: Any Keras model with one output, of logits (or of predictions, for
            squared error), shape `(n, C)`.
        x: Inputs: arrays, or any stream that `keras.Model.fit` accepts, finite.
        y: Targets, for arrays.
        loss: A loss as in `keras.Model.compile`, if not the one that the model was
            compiled with. It must be convex in the outputs.
        sample_weight: Sample weights of shape `(n,)`, for arrays. They and the loss's
            reduction give the objective: the weighted sum, divided by `n`
            (`"sum_over_batch_size"`, Keras's default), by the sum of the weights
            (`"mean_with_sample_weight"`) or by 1 (`"sum"`).
        batch_size: Samples per prediction, for arrays.
        steps: Number of batches to read; a generator needs it.

    Returns:
        The certificate.

    Raises:
        ValueError: If the loss is not convex or not given, if the model has several
            outputs or ends in a softmax or sigmoid, or if inputs, targets, weights or
            outputs are missing, non-finite, out of range or of the wrong shape.
        RuntimeError: If the loss came out below its lower bound by more than rounding.

    Example:

    ```python
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=10)
    print(keras_dalign.certify(model, x, y))
    ```
    """
    convex = _loss_of(model, loss)
    _check_outputs(model, convex)
    tally = _Tally(convex)
    rows = 0
    for x_batch, y_batch, w_batch in data.batches(
        x, y, sample_weight, batch_size=batch_size, steps=steps
    ):
        if y_batch is None:
            raise ValueError(
                "Targets are needed: pass `y`, or a stream of (x, y) batches. "
                "Received: y=None"
            )
        n = data.n_samples(x_batch)
        # First the inputs: what a model makes of NaN is no clear error.
        digests = _digests(x_batch)
        rows = max(rows, n)
        outputs = _predict(model, _padded(x_batch, n, rows), rows)[:n]
        tally.add(digests, outputs, y_batch, w_batch)
    return tally.certificate()


class _Tally:
    """Sums over the samples seen so far."""

    def __init__(self, loss: ConvexLoss) -> None:
        self._loss = loss
        self._repeats = _Repeats()
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
        weights = _weights(sample_weight, len(digests))
        self._is_weighted |= sample_weight is not None
        if self._n and outputs.shape[1] != self._n_outputs:
            raise ValueError(
                "The model's number of outputs changed between batches. Received: "
                f"{self._n_outputs} outputs, then {outputs.shape[1]}"
            )
        self._n_outputs = outputs.shape[1]
        self._dtype = outputs.dtype.name
        logits = outputs.astype(np.float64)
        targets = self._loss.targets(_single_array(y, "y"), self._n_outputs)
        self._repeats.add(digests, targets, weights, self._n)
        self._n += len(digests)
        self._weight += float(weights.sum())
        self._weighted_loss += float(weights @ self._loss.value(logits, targets))
        # First-order effect on the loss of one unit in the last place of every logit.
        slopes = np.abs(self._loss.gradient(logits, targets))
        effect = float(weights @ (slopes * np.abs(logits)).sum(axis=1))
        self._rounding += effect * _UNITS_IN_LAST_PLACE.get(self._dtype, 2.0**-52)

    def certificate(self) -> Certificate:
        if self._weight <= 0:
            raise ValueError(
                "All sample weights are 0: there is nothing to certify. Received: "
                f"{self._n} samples of weight 0"
            )
        divisor = self._loss.normalizer(self._n, self._weight)
        loss = self._weighted_loss / divisor
        lower_bound = self._repeats.lower_bound(self._loss) / divisor
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
        n_conflicts, conflicts = self._repeats.conflicts()
        weighting = ", with sample weights" if self._is_weighted else ""
        return Certificate(
            loss=loss,
            lower_bound=lower_bound,
            gap=max(gap, 0.0),
            n_samples=self._n,
            n_distinct=self._repeats.n_distinct,
            n_conflicts=n_conflicts,
            conflicts=conflicts,
            objective=(
                f"{self._loss.objective} as given{weighting}, in inference mode, "
                "without regularisation or augmentation"
            ),
            dtype=self._dtype,
        )


class _Repeats:
    """The distinct inputs, the targets that each came with, and their weights.

    Stores one entry for each distinct pair of input and target, and each distinct
    target once: for class labels, nothing that grows with the number of classes.
    """

    def __init__(self) -> None:
        self._inputs: dict[bytes, int] = {}
        self._targets: dict[bytes, int] = {}
        self._pairs: dict[tuple[int, int], int] = {}
        self._weights: list[float] = []
        # Position in the data of the first sample of each pair that has weight.
        self._first: list[int] = []

    @property
    def n_distinct(self) -> int:
        return len(self._inputs)

    def add(
        self, digests: list[bytes], targets: Array, weights: Array, start: int
    ) -> None:
        targets = targets + 0.0  # -0.0 and 0.0 are one target.
        for i, digest in enumerate(digests):
            row = targets[i].tobytes()
            pair = (
                self._inputs.setdefault(digest, len(self._inputs)),
                self._targets.setdefault(row, len(self._targets)),
            )
            weight = float(weights[i])
            known = self._pairs.get(pair)
            if known is not None:
                self._weights[known] += weight
            elif weight > 0:
                self._pairs[pair] = len(self._pairs)
                self._weights.append(weight)
                self._first.append(start + i)

    def lower_bound(self, loss: ConvexLoss) -> float:
        """Infimum over all functions of the inputs of the weighted sum of losses."""
        inputs, targets = self._pair_arrays()
        weights = np.array(self._weights)
        table = np.frombuffer(b"".join(self._targets)).reshape(len(self._targets), -1)
        several = self._several(inputs)[inputs]
        # An input with one target needs that target's own infimum only, which spares
        # the targets of the whole data set side by side.
        own = np.arange(len(table))
        each = loss.lower_bound(table, np.ones(len(table)), own, len(table))
        bound = float(weights[~several] @ each[targets[~several]])
        if several.any():
            groups, members = np.unique(inputs[several], return_inverse=True)
            bound += float(
                loss.lower_bound(
                    table[targets[several]], weights[several], members, len(groups)
                ).sum()
            )
        return bound + 0.0  # Not -0.0, which a sum of empty entropies may be.

    def conflicts(self) -> tuple[int, tuple[tuple[int, ...], ...]]:
        """The number of conflicts, and the first of them."""
        inputs, _ = self._pair_arrays()
        conflicting = np.flatnonzero(self._several(inputs))
        first = np.array(self._first)
        listed = tuple(
            tuple(int(i) for i in first[inputs == group][:_MAX_LISTED])
            for group in conflicting[:_MAX_LISTED]
        )
        return len(conflicting), listed

    def _pair_arrays(self) -> tuple[Indices, Indices]:
        pairs = np.array(list(self._pairs), dtype=np.intp).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def _several(self, inputs: Indices) -> npt.NDArray[np.bool_]:
        """Which inputs have several targets, shape `(n_distinct,)`."""
        return np.bincount(inputs, minlength=self.n_distinct) > 1


def _loss_of(model: keras.Model, loss: Any) -> ConvexLoss:
    if loss is None:
        loss = getattr(model, "loss", None)
    if loss is None:
        raise ValueError(
            "The model was compiled without a loss: pass `loss`, or call "
            "`model.compile(loss=...)` first. Received: loss=None"
        )
    return convex_loss(loss)


def _check_outputs(model: keras.Model, loss: ConvexLoss) -> None:
    # A subclassed model shows its outputs only when it predicts.
    _check_single(len(getattr(model, "outputs", None) or [None]))
    layers = getattr(model, "layers", None)
    if not layers or loss.name == "squared error":
        return
    last = layers[-1]
    activation = getattr(last, "activation", None)
    squashing = (keras.activations.softmax, keras.activations.sigmoid)
    if isinstance(last, keras.layers.Softmax) or activation in squashing:
        raise ValueError(
            "The loss takes logits, but the model ends in a softmax or sigmoid. Remove "
            f"it, and keep from_logits=True. Received: last layer '{last.name}'"
        )


def _check_single(n_outputs: int) -> None:
    if n_outputs != 1:
        raise ValueError(
            "A model with one output is needed; make a model of the one that you want "
            f"to certify. Received: {n_outputs} outputs"
        )


def _padded(x: Any, n: int, rows: int) -> Any:
    """Repeats the last sample: for a shorter batch Keras would compile once more."""
    if n == rows:
        return x

    def pad(leaf: np.ndarray) -> np.ndarray:
        return np.concatenate([leaf, np.repeat(leaf[-1:], rows - n, axis=0)])

    return keras.tree.map_structure(pad, x)


def _predict(model: keras.Model, x: Any, n: int) -> np.ndarray:
    leaves = keras.tree.flatten(model.predict_on_batch(x))
    _check_single(len(leaves))
    outputs = np.asarray(leaves[0])
    # Under `tf.distribute`, every replica predicts the whole batch.
    strategy = getattr(model, "distribute_strategy", None)
    replicas = getattr(strategy, "num_replicas_in_sync", 1)
    if outputs.ndim and len(outputs) == n * replicas:
        outputs = outputs[:n]
    if outputs.ndim != 2 or len(outputs) != n:
        raise ValueError(
            "The model must give one row of outputs per sample, shape (n, C). "
            f"Received: outputs of shape {outputs.shape} for {n} samples"
        )
    if not np.isfinite(outputs).all():
        raise ValueError(
            "The model's outputs must be finite: it has probably diverged, or overflows"
            f" its dtype. Received: NaN or infinite outputs of dtype {outputs.dtype}"
        )
    return outputs


def _weights(sample_weight: Any, n: int) -> Array:
    if sample_weight is None:
        return np.ones(n)
    weights = _single_array(sample_weight, "sample_weight")
    if weights.shape not in ((n,), (n, 1)):
        raise ValueError(
            f"`sample_weight` must hold one weight per sample, shape ({n},). "
            f"Received: sample_weight.shape={weights.shape}"
        )
    weights = weights.reshape(n).astype(np.float64)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(
            "Sample weights must be finite and at least 0, or the objective is not "
            f"convex. Received: {weights[~(np.isfinite(weights) & (weights >= 0))][0]}"
        )
    return weights


def _single_array(structure: Any, name: str) -> np.ndarray:
    leaves = keras.tree.flatten(structure)
    if len(leaves) != 1:
        raise ValueError(
            f"`{name}` must be one array, for a model with one output. "
            f"Received: {len(leaves)} arrays"
        )
    return np.asarray(leaves[0])


def _digests(x: Any) -> list[bytes]:
    """A 128-bit digest of each sample's content, all input arrays together."""
    leaves = [_canonical(leaf) for leaf in keras.tree.flatten(x)]
    # Arrays of other shapes or dtypes may have the same bytes.
    header = ";".join(f"{leaf.dtype.name}{leaf.shape[1:]}" for leaf in leaves)
    rows = [leaf.reshape(len(leaf), -1).view(np.uint8) for leaf in leaves]
    start = hashlib.blake2b(header.encode(), digest_size=16)
    digests = []
    for i in range(len(rows[0])):
        digest = start.copy()
        for row in rows:
            digest.update(row[i])
        digests.append(digest.digest())
    return digests


def _canonical(leaf: np.ndarray) -> np.ndarray:
    """The same finite numbers, equal in bytes wherever they are equal in value."""
    if leaf.dtype.kind in "OSTUMm":
        raise ValueError(
            "Inputs must be numeric arrays; encode strings and objects first. "
            f"Received: inputs of dtype {leaf.dtype}"
        )
    if leaf.dtype.kind in "biu":
        return np.ascontiguousarray(leaf)
    if not np.isfinite(leaf).all():
        raise ValueError(
            "Inputs must be finite: remove or repair the samples with missing values. "
            f"Received: NaN or infinite inputs of dtype {leaf.dtype}"
        )
    return np.ascontiguousarray(leaf + leaf.dtype.type(0))  # -0.0 becomes 0.0.


def _round(value: float, *, up: bool) -> str:
    """Three digits, rounded to the safe side: a bound must stay one when printed."""
    rounding = decimal.ROUND_CEILING if up else decimal.ROUND_FLOOR
    context = decimal.Context(prec=3, rounding=rounding)
    return f"{float(context.create_decimal(value)):.3g}"
