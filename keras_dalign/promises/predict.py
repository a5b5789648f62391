"""Outputs and features of a model, batch by batch, as NumPy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.head.objective import check_single

if TYPE_CHECKING:
    from keras_dalign.training.aligned_model import AlignedModel


class BatchPredictor:
    """Predictions in inference mode, for batches that may differ in size.

    A batch that is shorter than an earlier one is filled up with its last sample, or
    Keras would compile once more.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self._rows = 0

    def outputs(self, x: Any) -> np.ndarray:
        """The model's outputs.

        Args:
            x: Inputs of `n` samples.

        Returns:
            Outputs `(n, C)`, in the dtype of the model.

        Raises:
            ValueError: If there are several outputs, or none per sample, or they are
                not finite.
        """
        outputs, n = self._predict(x)
        leaves = keras.tree.flatten(outputs)
        check_single(len(leaves))
        array = np.asarray(leaves[0])
        if array.ndim != 2 or len(array) != n:
            raise ValueError(
                "The model must give one row of outputs per sample, shape (n, C). "
                f"Received: outputs of shape {array.shape} for {n} samples"
            )
        if not np.isfinite(array).all():
            raise ValueError(
                "The model's outputs must be finite: it has probably diverged, or "
                "overflows its dtype. Received: NaN or infinite outputs of dtype "
                f"{array.dtype}"
            )
        return array

    def features(self, x: Any) -> Any:
        """What a trunk puts out: features for the head.

        Args:
            x: Inputs of `n` samples.

        Returns:
            Features `(n, p)`, or a pair of such.

        Raises:
            ValueError: If they are not finite.
        """
        features, _ = self._predict(x)
        features = keras.tree.map_structure(np.asarray, features)
        if not all(np.isfinite(leaf).all() for leaf in keras.tree.flatten(features)):
            raise ValueError(
                "The trunk's features are not finite. Received: NaN or infinity. Check "
                "the inputs, and that training did not diverge."
            )
        return features

    def _predict(self, x: Any) -> tuple[Any, int]:
        n = data.n_samples(x)
        self._rows = max(self._rows, n)
        rows = self._rows
        outputs = self.model.predict_on_batch(_padded(x, n, rows))
        # Under `tf.distribute`, every replica predicts the whole batch.
        strategy = getattr(self.model, "distribute_strategy", None)
        replicas = getattr(strategy, "num_replicas_in_sync", 1)

        def cut(leaf: Any) -> Any:
            leaf = np.asarray(leaf)
            if leaf.ndim and len(leaf) in {rows, rows * replicas}:
                return leaf[:n]
            return leaf

        return keras.tree.map_structure(cut, outputs), n


def exploiting_head(model: AlignedModel, purpose: str) -> AlignmentHead:
    """The head of a model that exploits.

    Args:
        model: The model.
        purpose: What needs it, for the error.

    Returns:
        The head.

    Raises:
        ValueError: If the model has no alignment head, or still explores.
    """
    head = getattr(model, "head", None)
    if not isinstance(head, AlignmentHead) or not hasattr(model, "trunk"):
        raise ValueError(
            f"{purpose} needs a model with an alignment head: call "
            f"`keras_dalign.align` first. Received: {type(model).__name__} "
            f"'{model.name}'"
        )
    if head.phase != EXPLOITING:
        raise ValueError(
            f"{purpose} needs a model whose gates are set: before the switch there is "
            "no convex problem to speak of. Train it with `DAlign` up to the switch, "
            "or call `keras_dalign.solve`. Received: a model in the phase "
            f"'{head.phase}'"
        )
    return head


def _padded(x: Any, n: int, rows: int) -> Any:
    if n == rows:
        return x

    def pad(leaf: np.ndarray) -> np.ndarray:
        return np.concatenate([leaf, np.repeat(leaf[-1:], rows - n, axis=0)])

    return keras.tree.map_structure(pad, x)
