"""Derivatives of a model's outputs in its variables, one module for each backend."""

from __future__ import annotations

import importlib
from typing import Any

import keras

from keras_dalign.diagnostics.engines.base import Engine

__all__ = ["Engine", "engine"]


def engine(
    model: keras.Model, variables: list[keras.Variable], dtype: str = "float64"
) -> Engine:
    """The engine of the backend that Keras runs on.

    Args:
        model: A Keras model. Variables other than `variables` are constants.
        variables: Floating variables of the model.
        dtype: `"float64"` or `"float32"`, the dtype of vectors on the device.

    Returns:
        The engine.
    """
    backend = keras.backend.backend()
    module: Any = importlib.import_module(f"keras_dalign.diagnostics.engines.{backend}")
    made: Engine = module.BackendEngine(model, variables, dtype)
    return made
