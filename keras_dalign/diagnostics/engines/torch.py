"""Jacobian products on PyTorch."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import keras
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from keras_dalign.diagnostics.engines.base import Engine, sample_as_batch

with warnings.catch_warnings():
    # Forward mode would import it at first use. It warns of deprecated functions that
    # PyTorch itself uses.
    warnings.simplefilter("ignore")
    importlib.import_module("torch._decomp.decompositions_for_jvp")


class BackendEngine(Engine):
    """Jacobian products by `torch.func`, eagerly."""

    def __init__(
        self, model: keras.Model, variables: list[keras.Variable], dtype: str
    ) -> None:
        super().__init__(model, variables, dtype)
        self._vectorises = True

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        # `torch.func` records gradients nevertheless. Only the MATH kernel of attention
        # can be differentiated twice and in forward mode.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return function(*arguments)

    def _jvp(self, theta: Any, x: Any, tangent: Any) -> Any:
        try:
            return torch.func.jvp(lambda t: self._call(t, x), (theta,), (tangent,))[1]
        except (NotImplementedError, RuntimeError):
            # An operation has no forward mode. But J^T u is linear in u, and the
            # transpose of its derivative is J.
            outputs, transposed = torch.func.vjp(lambda t: self._call(t, x), theta)
            zeros = torch.zeros_like(outputs)
            return torch.func.vjp(lambda u: transposed(u)[0], zeros)[1](tangent)[0]

    def _vjp(self, theta: Any, x: Any, cotangents: Any) -> Any:
        return torch.func.vjp(lambda t: self._call(t, x), theta)[1](cotangents)[0]

    def _jvps(self, theta: Any, x: Any, tangents: Any) -> Any:
        return self._mapped(lambda v: self._jvp(theta, x, v), tangents)

    def _vjps(self, theta: Any, x: Any, cotangents: Any) -> Any:
        transposed = torch.func.vjp(lambda t: self._call(t, x), theta)[1]
        return self._mapped(lambda u: transposed(u)[0], cotangents)

    def _rows(self, theta: Any, x: Any) -> Any:
        def of_sample(sample: Any) -> Any:
            batch = sample_as_batch(sample)
            outputs, transposed = torch.func.vjp(
                lambda t: self._call(t, batch)[0], theta
            )
            units = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
            return self._mapped(lambda u: transposed(u)[0], units)

        return self._mapped(of_sample, x)

    def _mapped(self, function: Callable[[Any], Any], stack: Any) -> Any:
        """Applies a function to all entries along the first axis, and stacks."""
        if self._vectorises:
            try:
                with warnings.catch_warnings():
                    # Users need no warning that an operation is not vectorised.
                    warnings.simplefilter("ignore")
                    return torch.func.vmap(function)(stack)
            except RuntimeError:
                # Keras's convolutions, for example, use a memory layout that vmap does
                # not support.
                self._vectorises = False
        entries = [
            keras.tree.map_structure(lambda leaf, i=i: leaf[i], stack)
            for i in range(len(keras.tree.flatten(stack)[0]))
        ]
        return torch.stack([function(entry) for entry in entries])
