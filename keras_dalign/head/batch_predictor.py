"""Outputs and features of a model, batch by batch, as NumPy arrays."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_dalign.head import data
from keras_dalign.head.objective import check_single
from keras_dalign.numerics.replicas import replicas_of


class BatchPredictor:
    """Predictions in inference mode, for batches that may differ in size.

    Devices and processes that share the model share the rows of each batch.

    A batch that is shorter than an earlier one is padded with its last sample, since
    Keras would compile once more for the new size.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self._rows = 0
        self._replicas = replicas_of(model)

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
        leaves = keras.tree.flatten(self.predict(x))
        check_single(len(leaves))
        array, n = leaves[0], data.n_samples(x)
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
        """The outputs of a trunk: features for the head.

        Args:
            x: Inputs of `n` samples.

        Returns:
            Features `(n, p)`, or a pair of such.

        Raises:
            ValueError: If they are not finite.
        """
        features = self.predict(x)
        if not all(np.isfinite(leaf).all() for leaf in keras.tree.flatten(features)):
            raise ValueError(
                "The trunk's features are not finite. Received: NaN or infinity. Check "
                "the inputs, and that training did not diverge."
            )
        return features

    def predict(self, x: Any) -> Any:
        """The outputs of a model, in any structure.

        It does not use `keras.Model.predict`: on TensorFlow, ending its iterator takes
        up to half a second.

        Args:
            x: Inputs of `n` samples.

        Returns:
            The outputs, arrays in the model's structure; where they have a row per
            sample, `n` of them.
        """
        n = data.n_samples(x)
        count = self._replicas.count
        self._rows = max(self._rows, -(-n // count) * count)
        rows = self._rows
        outputs = self._replicas.predict(self.model, _padded(x, n, rows))
        # With other strategies of TensorFlow every replica predicts the whole batch.
        strategy = getattr(self.model, "distribute_strategy", None)
        replicas = getattr(strategy, "num_replicas_in_sync", 1)

        def cut(leaf: Any) -> Any:
            leaf = np.asarray(leaf)
            if leaf.ndim and len(leaf) in {rows, rows * replicas}:
                return leaf[:n]
            return leaf

        return keras.tree.map_structure(cut, outputs)


def _padded(x: Any, n: int, rows: int) -> Any:
    if n == rows:
        return x

    def pad(leaf: np.ndarray) -> np.ndarray:
        return np.concatenate([leaf, np.repeat(leaf[-1:], rows - n, axis=0)])

    return keras.tree.map_structure(pad, x)
