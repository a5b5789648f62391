"""The trunk of an aligned model: its shapes, and its features once it is frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from keras_dalign import compat
from keras_dalign.numerics.arguments import shown

if TYPE_CHECKING:
    from keras_dalign.training.aligned_model import AlignedModel


def feature_shape(trunk: keras.Model) -> Any:
    """The shape of a trunk's features.

    Args:
        trunk: The trunk.

    Returns:
        A shape, or a pair of shapes.

    Raises:
        ValueError: If it is not known.
    """
    try:
        return trunk.output_shape
    except AttributeError as error:
        raise ValueError(
            "The head cannot be built from a trunk whose output shape is unknown. "
            f"Received: trunk={shown(trunk)}. Build the head first by calling it once: "
            "`head(trunk(batch))`."
        ) from error


def input_specs(trunk: keras.Model) -> Any:
    """Shapes and dtypes of a trunk's inputs, for any number of samples.

    Args:
        trunk: The trunk.

    Returns:
        A `keras.InputSpec` for each input, in the structure that the trunk takes.

    Raises:
        ValueError: If the shapes are not known.
    """
    ends = compat.graph_ends(trunk)
    if ends is not None or compat.is_functional(trunk):
        inputs = trunk.input if ends is None else ends[0]
        return keras.tree.map_structure(
            lambda tensor: keras.InputSpec(
                shape=(None, *tensor.shape[1:]),
                dtype=tensor.dtype,
                name=tensor.name,
            ),
            inputs,
        )
    shapes = list(compat.build_shapes(trunk).values())
    if len(shapes) != 1 or not compat.is_shape(shapes[0]):
        raise ValueError(
            "The shapes of the model's inputs are unknown. Received: "
            f"input_signature=None for the trunk {shown(trunk)}. Pass "
            "input_signature=[keras.InputSpec(shape=(None, ...), dtype='float32')]."
        )
    return keras.InputSpec(shape=(None, *shapes[0][1:]), dtype=trunk.input_dtype)


def frozen_features(model: AlignedModel, x: Any, state: Any = None) -> Any:
    """Features of a batch in inference mode, without gradients and activations.

    Args:
        model: The model.
        x: Inputs.
        state: On JAX, the state of a training step: values of the model's trainable
            and non-trainable variables, and others.

    Returns:
        What the trunk puts out.
    """
    if state is not None:
        variables = model.trainable_variables + model.non_trainable_variables
        values = list(state[0]) + list(state[1])
        with keras.StatelessScope(
            state_mapping=list(zip(variables, values, strict=True))
        ):
            return model.trunk(x, training=False)
    if keras.backend.backend() == "torch":
        import torch  # noqa: PLC0415  (only where it is the backend)

        with torch.no_grad():
            return model.trunk(x, training=False)
    return model.trunk(x, training=False)
