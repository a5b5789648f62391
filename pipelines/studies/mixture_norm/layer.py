"""Mixture normalisation: batch normalisation by the components of a mixture.

Kalayeh and Shah (IEEE TPAMI 2019).
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops
from sklearn.cluster import KMeans


class MixtureNormalization(keras.layers.Layer):
    """Normalises channels by the statistics of a mixture of Gaussians.

    The rows, `(N, C)`, are the channels of all samples and places of a batch. With the
    responsibilities `r_k` of `K` Gaussians with diagonal covariances, and the weights
    `p_k`, means `m_k` and variances `v_k` that they give,

        sum over k of  r_k(x) / sqrt(p_k) * (x - m_k) / sqrt(v_k + epsilon),

    times a scale, plus a shift. In training the moments are those of the batch, after
    some steps of expectation maximisation from the moving averages; derivatives go
    through means and variances, and not through responsibilities. In inference all are
    the moving averages. One component is batch normalisation.

    Where each row belongs to one component the outputs have the variance `K`, not 1.

    Args:
        components: Number of Gaussians, `K`.
        momentum: Of the moving averages.
        epsilon: What is added to variances.
        steps: Steps of expectation maximisation in a batch.
        **kwargs: Those of a Keras layer.

    Raises:
        ValueError: If there is no component or no step.
    """

    def __init__(
        self,
        components: int,
        momentum: float = 0.9,
        epsilon: float = 1e-3,
        steps: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("components", components), ("steps", steps)):
            if value < 1:
                raise ValueError(
                    f"`{name}` must be at least 1. Received: {name}={value}"
                )
        self.components = components
        self.momentum = momentum
        self.epsilon = epsilon
        self.steps = steps

    def build(self, input_shape: Any) -> None:
        """Makes the weights.

        Args:
            input_shape: Ends with the channels.
        """
        channels, moments = (input_shape[-1],), (self.components, input_shape[-1])
        self.gamma = self.add_weight(shape=channels, initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=channels, initializer="zeros", name="beta")
        equal = keras.initializers.Constant(1.0 / self.components)
        self.shares, self.means, self.variances = (
            self.add_weight(
                shape=shape, initializer=initializer, trainable=False, name=name
            )
            for shape, initializer, name in (
                (moments[:1], equal, "moving_shares"),
                (moments, "zeros", "moving_means"),
                (moments, "ones", "moving_variances"),
            )
        )

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Normalises.

        Args:
            inputs: Shape `(batch, ..., C)`.
            training: Whether by the moments of this batch.

        Returns:
            The same shape.
        """
        rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
        averages = (self.shares, self.means, self.variances)
        mixture = [ops.convert_to_tensor(average) for average in averages]
        responsibilities = self._responsibilities(rows, *mixture)
        if training:
            mixture = self._moments(rows, responsibilities)
            for _ in range(self.steps - 1):
                responsibilities = self._responsibilities(rows, *mixture)
                mixture = self._moments(rows, responsibilities)
            for average, value in zip(averages, mixture, strict=True):
                new = (1.0 - self.momentum) * ops.stop_gradient(value)
                average.assign(self.momentum * average + new)
        shares, means, variances = mixture
        factors = responsibilities / ops.sqrt(shares)
        deviations = (rows[:, None] - means) / ops.sqrt(variances + self.epsilon)
        normalised = ops.sum(factors[:, :, None] * deviations, axis=1)
        return ops.reshape(self.gamma * normalised + self.beta, ops.shape(inputs))

    def adapt(self, inputs: npt.NDArray[Any], seed: int) -> None:
        """Sets the moving averages to a clustering of some inputs (k-means++).

        Components that are alike at the start would stay alike.

        Args:
            inputs: Shape `(batch, ..., C)`, of a layer that is built.
            seed: Seed of the clustering.
        """
        rows = np.asarray(inputs, "float64").reshape(-1, inputs.shape[-1])
        labels = KMeans(self.components, n_init=1, random_state=seed).fit(rows).labels_
        members = [rows[labels == k] for k in range(self.components)]
        self.shares.assign([len(each) / len(rows) for each in members])
        self.means.assign(np.stack([each.mean(axis=0) for each in members]))
        self.variances.assign(np.stack([each.var(axis=0) for each in members]))

    def _responsibilities(
        self, rows: Any, shares: Any, means: Any, variances: Any
    ) -> Any:
        """The components' probabilities given each row, `(N, K)`, as constants."""
        variances = variances + self.epsilon
        squares = ops.square(rows[:, None] - means) / variances
        logits = ops.log(shares) - 0.5 * ops.sum(squares + ops.log(variances), axis=-1)
        return ops.stop_gradient(ops.softmax(logits, axis=-1))

    def _moments(self, rows: Any, responsibilities: Any) -> list[Any]:
        """Weights `(K,)`, means and variances `(K, C)` of the components."""
        # A component that has lost all rows gets no infinite factor.
        totals = ops.maximum(ops.sum(responsibilities, axis=0), self.epsilon)
        shares = totals / ops.cast(ops.shape(rows)[0], totals.dtype)
        memberships = responsibilities / totals
        means = ops.matmul(ops.transpose(memberships), rows)
        squares = ops.square(rows[:, None] - means)
        variances = ops.sum(memberships[:, :, None] * squares, axis=0)
        return [shares, means, variances]
