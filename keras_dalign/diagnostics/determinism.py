"""Checks that a model is deterministic and stateless in inference mode."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops


def check_deterministic(model: keras.Model, x: Any) -> None:
    """Checks that two passes of a batch agree bit for bit and change no variable.

    The model is called twice in inference mode, without compilation. Its state is
    restored afterwards.

    Args:
        model: A built Keras model.
        x: One batch of inputs.

    Raises:
        ValueError: If outputs differ or variables change; the message names them.
    """
    state = [np.array(ops.convert_to_numpy(v)) for v in model.variables]
    batch = keras.tree.map_structure(ops.convert_to_tensor, x)
    try:
        with no_gradients():
            passes = [
                [
                    np.array(ops.convert_to_numpy(leaf))
                    for leaf in keras.tree.flatten(model(batch, training=False))
                ]
                for _ in range(2)
            ]
        changed = [
            variable.path
            for variable, value in zip(model.variables, state, strict=True)
            if not _same(np.asarray(ops.convert_to_numpy(variable)), value)
        ]
    finally:
        for variable, value in zip(model.variables, state, strict=True):
            variable.assign(value)
    differing = [
        f"output {index}: {int(np.sum(a != b))} of {a.size} entries, by up to "
        f"{np.nanmax(np.abs(a.astype('float64') - b.astype('float64'))):.3g}"
        for index, (a, b) in enumerate(zip(*passes, strict=True))
        if not _same(a, b)
    ]
    if not differing and not changed:
        return
    found = []
    if differing:
        found.append("two passes over the same batch differ in " + "; ".join(differing))
    if changed:
        found.append(f"a pass changes the variables {changed[:10]}")
    suspects = _suspects(model, changed)
    if suspects:
        found.append(f"layers that draw numbers or change their state: {suspects[:10]}")
    raise ValueError(
        "The model is not a fixed function in inference mode, so it has no Jacobian. "
        f"Received: model '{model.name}': {'; '.join(found)}. Call layers such as "
        "Dropout without training=True, and draw no random numbers in inference."
    )


def no_gradients() -> Any:
    """A context in which PyTorch records no gradients."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch  # noqa: PLC0415  (only where it is the backend)

    return torch.no_grad()


def _suspects(model: keras.Model, changed: list[str]) -> list[str]:
    """Layers whose variables changed, or else those that draw random numbers."""
    layers = [
        layer
        for layer in model._flatten_layers(include_self=False)
        if not isinstance(layer, keras.Model)
    ]
    owners = [
        layer
        for layer in layers
        if any(v.path in changed for v in _own_variables(layer))
    ]
    drawing = [layer for layer in layers if _seed_states(layer)]
    return [f"{layer.name} ({type(layer).__name__})" for layer in owners or drawing]


def _own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    inner = {
        id(v)
        for child in layer._flatten_layers(include_self=False)
        for v in child.variables
    }
    return [v for v in layer.variables if id(v) not in inner]


def _seed_states(layer: keras.layers.Layer) -> list[keras.Variable]:
    weights = {id(v) for v in layer.weights}
    return [v for v in _own_variables(layer) if id(v) not in weights]


def _same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Whether two arrays are equal bit for bit; NaN equals NaN."""
    return a.shape == b.shape and a.tobytes() == b.tobytes()
