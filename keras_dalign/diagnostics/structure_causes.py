"""Finds what breaks the common model structure, from the outputs and the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from keras_dalign.diagnostics.structure_report import StructureCause
from keras_dalign.head.alignment_head import AlignmentHead

if TYPE_CHECKING:
    from keras_dalign.diagnostics.jacobian import Jacobian
    from keras_dalign.diagnostics.output_path import OutputPath
    from keras_dalign.numerics import Array

# Operations without weights that are linear, and so keep the structure.
_LINEAR = (
    "Reshape", "Flatten", "Permute", "Cast", "Identity", "Dropout", "Transpose",
    "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D",
    "AveragePooling1D", "AveragePooling2D", "AveragePooling3D", "Cropping1D",
    "Cropping2D", "ZeroPadding1D", "ZeroPadding2D", "Squeeze", "ExpandDims",
    "GetItem", "Mean", "Sum", "Add", "Subtract", "Average", "Concatenate",
)  # fmt: skip


class StructurePoint:
    """The outputs at some values of the parameters, and `J theta` there.

    Args:
        J: The Jacobian at these values.
        offset: The frozen linear part of a head, 0 without one, shape `(n, C)`.
    """

    def __init__(self, J: Jacobian, offset: Array) -> None:
        self.J = J
        self.offset = offset
        self.theta = J.theta()
        self.outputs = J.outputs()
        self.linear = J.matvec(self.theta).reshape(self.outputs.shape)
        self.reached = self.outputs - offset
        self.scale = max(np.linalg.norm(self.outputs), np.linalg.norm(self.linear))
        self.error = self.relative(self.reached - self.linear)

    def relative(self, difference: Array) -> float:
        """The norm of a difference, relative to that of the outputs or `J theta`."""
        return float(np.linalg.norm(difference) / self.scale) if self.scale else 0.0

    def degree(self, tolerance: float) -> float | None:
        """The degree of homogeneity, if there is one."""
        square = float(np.sum(self.reached**2))
        if not square:
            return None
        degree = float(np.sum(self.linear * self.reached)) / square
        exact = self.relative(self.linear - degree * self.reached) <= tolerance
        return degree if exact else None


class StructureDiagnosis:
    """Finds the causes numerically, and names layers where there is a graph.

    Args:
        point: Parameters for which the structure does not hold.
        tolerance: The largest relative error that counts as rounding.
        path: The end of the model's graph, or None.
    """

    def __init__(
        self, point: StructurePoint, tolerance: float, path: OutputPath | None
    ) -> None:
        self._point = point
        # Differences of outputs at several points add up the rounding of each.
        self._tolerance = 10 * tolerance
        self._path = path
        self._parameter_ids = {id(variable) for variable in point.J.variables}

    def causes(self) -> tuple[StructureCause, ...]:
        """All causes found, the most certain first; at least one."""
        point = self._point
        at_zero = point.J.at(np.zeros_like(point.theta)).outputs()
        at_double = point.J.at(2 * point.theta).outputs()
        bend = point.relative(at_double - 2 * point.outputs + at_zero)
        constant = at_zero - point.offset
        degree = point.degree(self._tolerance)
        found = [self._probabilities(), self._inner()]
        if degree is not None and degree > 0.5:
            # By Euler's theorem the degree is the cause, and the only one.
            found = [self._of_degree(degree)]
        elif found == [None, None]:
            if bend <= self._tolerance:
                found.append(self._constant(constant))
            else:
                if self._repeated():
                    found.append(self._of_degree(None))
                if self._nonlinear() or not self._repeated():
                    found.append(self._nonlinearity(bend))
                if self._skipped() and point.relative(constant) > self._tolerance:
                    found.append(self._constant(constant))
        return tuple(cause for cause in found if cause is not None)

    def _probabilities(self) -> StructureCause | None:
        outputs = self._point.outputs
        change = (
            "Let the model end in logits, and compile it with a loss made with "
            "from_logits=True"
        )
        sums = outputs.sum(axis=1)
        positive = bool(np.all(outputs >= 0))
        if positive and outputs.shape[1] > 1 and np.allclose(sums, 1, atol=1e-6):
            what = "every row of the outputs sums to 1, as behind a softmax"
        elif np.allclose(np.exp(np.minimum(outputs, 1)).sum(axis=1), 1, atol=1e-6):
            what = "the outputs are logarithms of probabilities, as of a log-softmax"
        elif positive and np.all(outputs <= 1) and "sigmoid" in self._nonlinear():
            what = "the outputs lie between 0 and 1, behind a sigmoid"
        else:
            return None
        names = self._nonlinear_names()
        return StructureCause(
            "probabilities", what + (f" ({names})" if names else ""), change
        )

    def _of_degree(self, degree: float | None) -> StructureCause:
        repeated = self._repeated()
        what = (
            "the parameters enter more than once"
            if degree is None
            else f"J theta is {degree:.4g} times the outputs: the parameters enter to "
            f"the power of {degree:.4g}, not 1"
        )
        if repeated:
            what += f"; tied weights: {repeated}"
            change = "Give the last layer separate weights"
        elif len(self._layers()) > 1:
            what += f"; they are those of several layers: {self._names(self._layers())}"
            change = "Take those of the last layer alone: parameters='last'"
        else:
            change = (
                "Look for weights that are used in several places, also within one "
                "layer, and give the last layer separate weights"
            )
        return StructureCause("degree", what, change)

    def _constant(self, constant: Array) -> StructureCause:
        size = self._point.relative(constant)
        spread = self._point.relative(constant - constant[:1])
        same = spread <= self._tolerance
        what = (
            f"a part of the outputs that the parameters do not reach, {size:.2g} of "
            f"their norm, {'the same' if same else 'another'} for every sample"
        )
        missing = self._missing()
        skipped = self._skipped()
        if missing:
            what += f"; not among the parameters are {', '.join(missing)}"
            change = "Add them to `parameters`"
        elif skipped:
            what += f"; a path around the last layer, from {skipped}"
            change = (
                "Let the last layer work on the sum, or put a Dense layer behind it"
            )
        else:
            change = (
                "Add the variables that make it to `parameters`, or subtract it from "
                "outputs and targets"
            )
        return StructureCause("constant", what, change)

    def _nonlinearity(self, bend: float) -> StructureCause:
        names = self._nonlinear_names()
        where = f": {names}" if names else ""
        return StructureCause(
            "nonlinearity",
            "a nonlinearity behind the parameters (doubled, they give outputs that are "
            f"{bend:.2g} of their norm off a straight line){where}",
            "Take it out, or put a Dense layer behind it",
        )

    def _inner(self) -> StructureCause | None:
        if self._path is None:
            return None
        last = {id(v) for end in self._path.last for v in end.layer.weights}
        before = [v.path for v in self._point.J.variables if id(v) not in last]
        if not before:
            return None
        ends = self._names([end.layer for end in self._path.last])
        return StructureCause(
            "inner parameters",
            f"layers with weights come after {', '.join(before[:4])}: {ends}",
            "Take the weights of the last layer alone: parameters='last'",
        )

    def _layers(self) -> list[Any]:
        """The layers of the graph with at least one of the parameters."""
        if self._path is None:
            return []
        return [
            layer
            for layer in self._path.layers
            if any(id(v) in self._parameter_ids for v in layer.weights)
        ]

    def _repeated(self) -> str:
        """The layers with parameters that are called several times, in words."""
        if self._path is None:
            return ""
        return ", ".join(
            f"'{layer.name}' is called {self._path.n_calls[id(layer)]} times"
            for layer in self._layers()
            if self._path.n_calls[id(layer)] > 1
        )

    def _missing(self) -> list[str]:
        """Weights of the same layers that are not among the parameters."""
        return [
            variable.path
            for layer in self._layers()
            for variable in layer.trainable_weights
            if id(variable) not in self._parameter_ids
        ]

    def _skipped(self) -> str:
        if self._path is None:
            return ""
        return self._names([end.layer for end in self._path.skipped])

    def _nonlinear(self) -> dict[str, str]:
        """Nonlinear functions from the last layer on, and the layers that have them."""
        found: dict[str, str] = {}
        for end in self._path.last if self._path else ():
            if isinstance(end.layer, AlignmentHead) and end.layer.gates == "learned":
                name = end.layer.name
                found["gates"] = f"the gates of '{name}', which still explores"
            for operation in (end.layer, *end.behind):
                activation = getattr(operation, "activation", None)
                name = getattr(activation, "__name__", None) or getattr(
                    activation, "name", None
                )
                kind = type(operation).__name__
                if name is not None and name != "linear":
                    found[name] = f"{name} in '{operation.name}'"
                elif name is None and kind not in (*_LINEAR, type(end.layer).__name__):
                    found[kind.lower()] = f"{kind} '{operation.name}'"
        return found

    def _nonlinear_names(self) -> str:
        return ", ".join(self._nonlinear().values())

    @staticmethod
    def _names(layers: list[Any]) -> str:
        return ", ".join(f"'{layer.name}'" for layer in layers[:6])
