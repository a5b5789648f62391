"""The validation of a training run: its data, their features, and its metrics."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import keras

from keras_dalign.head import data
from keras_dalign.head.features import FeaturePass, FeatureSet, as_inputs
from keras_dalign.training.training_data import VALIDATION_DATA, given_as

if TYPE_CHECKING:
    from keras_dalign.numerics.losses import ConvexLoss
    from keras_dalign.training.aligned_model import AlignedModel


@dataclasses.dataclass(frozen=True, eq=False)
class Validation:
    """The validation of a training run.

    Attributes:
        model: The model.
        data: `validation_data`, as in `keras.Model.fit`, not None.
        batch_size: Samples in a batch of arrays.
        steps: Batches of a stream to read, or None for all.
        frequency: `validation_freq`, as in `keras.Model.fit`.
    """

    model: AlignedModel
    data: Any
    batch_size: int
    steps: int | None
    frequency: Any

    @property
    def n(self) -> int | None:
        """Number of samples in arrays; None for a stream."""
        is_tuple = isinstance(self.data, (list, tuple))
        if not is_tuple or not data.is_arrays(self.data[0]):
            return None
        return data.n_samples(self.data[0])

    def checked(self, loss: ConvexLoss) -> Validation:
        """Checks the data against the model and its loss.

        Args:
            loss: The model's loss.

        Returns:
            This validation. Of an iterator a batch was read, so `data` may be another
            one over the same batches.

        Raises:
            ValueError: If the data do not fit, or there are none.
        """
        given = given_as(VALIDATION_DATA, self.data, self.steps, "validation_steps")
        given.check(self.model, loss)
        if given.is_array:
            return self
        return dataclasses.replace(self, data=given.nonempty().x)

    def is_due(self, epoch: int) -> bool:
        """Whether an epoch, counted from 0, ends with a validation."""
        if isinstance(self.frequency, int):
            return (epoch + 1) % self.frequency == 0
        return epoch + 1 in self.frequency

    def logs(self, inputs: Any, callbacks: Any) -> dict[str, Any]:
        """Evaluates the model.

        Args:
            inputs: `self.data`, or what `with_features` made of them.
            callbacks: The callbacks of the run.

        Returns:
            Loss and metrics, each under its name after "val_".
        """
        x, y, weight = _unpack(inputs)
        found = self.model.evaluate(
            x,
            y,
            sample_weight=weight,
            batch_size=self.batch_size,
            steps=self.steps,
            callbacks=callbacks,
            return_dict=True,
            verbose=0,
        )
        return {f"val_{key}": value for key, value in found.items()}

    def with_features(self, batch_size: int) -> Any:
        """The validation data with features in place of inputs, where they are arrays.

        Args:
            batch_size: Samples in a batch of the pass that computes them.

        Returns:
            A tuple as in `fit`; streams as they are.
        """
        if self.n is None:
            return self.data
        return as_validation_data(self.features(batch_size))

    def features(self, batch_size: int) -> FeatureSet:
        """Features, targets and weights of arrays or of a stream.

        Args:
            batch_size: Samples in a batch of the pass that computes them.

        Returns:
            The features.
        """
        x, y, weight = _unpack(self.data)
        steps = None if data.is_arrays(x) else self.steps
        everything = FeaturePass(self.model, keep=True)
        everything.run(x, y, weight, batch_size=batch_size, steps=steps)
        return everything.feature_set()


def as_validation_data(features: FeatureSet) -> Any:
    """Features as `validation_data` of `fit`: `(x, y)` or `(x, y, sample_weight)`."""
    return keras.utils.pack_x_y_sample_weight(
        as_inputs(features.z), features.y, features.sample_weight
    )


def _unpack(given: Any) -> tuple[Any, Any, Any]:
    """Inputs, targets and weights of a tuple; a stream comes as the inputs."""
    parts = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    x, y, weight = keras.utils.unpack_x_y_sample_weight(parts)
    return x, y, weight
