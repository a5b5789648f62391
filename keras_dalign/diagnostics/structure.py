"""Whether a model's outputs are `J theta` in some of its parameters, and if not, why.

The common model structure (Kawaguchi, Zhang & Deng 2022): there is a set `S` of
parameters with

    f_X(theta) = sum_{k in S} theta_k * d f_X / d theta_k   for all theta.

A model that ends in a layer which is linear in its own weights has it. By Euler's
theorem it says that the outputs are positively homogeneous of degree 1 in `theta_S`.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.diagnostics.jacobian_builder import exploiting_head, jacobian
from keras_dalign.diagnostics.output_path import (
    OutputPath,
    output_path,
    untouched_graph,
)
from keras_dalign.diagnostics.reread_data import RereadData
from keras_dalign.head.alignment_head import AlignmentHead
from keras_dalign.numerics.arguments import number
from keras_dalign.numerics.html_table import html_table

if TYPE_CHECKING:
    from keras_dalign.diagnostics.jacobian import Array, Jacobian

_TOLERANCES = {"float64": 1e-8, "float32": 1e-4, "float16": 0.03, "bfloat16": 0.1}
_EPSILONS = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}

# Operations without weights that are linear, so that they break nothing.
_LINEAR = (
    "Reshape", "Flatten", "Permute", "Cast", "Identity", "Dropout", "Transpose",
    "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D",
    "AveragePooling1D", "AveragePooling2D", "AveragePooling3D", "Cropping1D",
    "Cropping2D", "ZeroPadding1D", "ZeroPadding2D", "Squeeze", "ExpandDims",
    "GetItem", "Mean", "Sum", "Add", "Subtract", "Average", "Concatenate",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StructureCause:
    """Something that breaks the common model structure.

    Attributes:
        kind: `"probabilities"`, `"nonlinearity"`, `"degree"` (tied weights, or those of
            several layers in a row), `"constant"` (a part of the outputs that the
            parameters do not reach) or `"inner parameters"`.
        what: What was found, in words.
        change: What to change.
    """

    kind: str
    what: str
    change: str


@dataclasses.dataclass(frozen=True)
class StructureReport:
    """Whether `f = f0 + J theta`, with `f0` the frozen linear part of a head.

    Attributes:
        holds: Whether `error <= tolerance`.
        error: The larger of `||f - f0 - J theta|| / ||f||` at the model's weights and
            at weights moved at random: at weights of 0, say, one point proves nothing.
        tolerance: The largest error that is put down to rounding.
        parameters: Paths of the variables that make up `theta`.
        n_parameters: Number of parameters, `P`.
        n: Number of samples.
        units: Number of outputs, `C`.
        offset: `||f0|| / ||f||`.
        degree: The `k` for which `J theta = k (f - f0)`, the degree of homogeneity in
            the parameters; None if there is none.
        linear: Whether `J` is the same at both weights. Behind a ReLU, say, the
            structure holds, and the outputs are not linear.
        causes: What breaks it, if it does not hold.
        dtype: What it was computed in.
    """

    holds: bool
    error: float
    tolerance: float
    parameters: tuple[str, ...]
    n_parameters: int
    n: int
    units: int
    offset: float
    degree: float | None
    linear: bool
    causes: tuple[StructureCause, ...]
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict that `json.dumps` accepts."""
        fields = dataclasses.asdict(self)
        fields["parameters"] = list(self.parameters)
        fields["causes"] = [dataclasses.asdict(cause) for cause in self.causes]
        return fields

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "does not hold"
        constant = " less a frozen linear part" if self.offset else ""
        text = (
            f"The common model structure {verdict}: the outputs{constant} differ from "
            f"J theta in {self._names()} by {self.error:.2g} of their norm (tolerance "
            f"{self.tolerance:.0e}; {self.n_parameters} parameters, {self.n} samples, "
            f"{self.units} outputs; in {self.dtype})."
        )
        if self.holds and not self.linear:
            text += (
                " They are not linear in theta, only homogeneous: J itself changes "
                "with it, and training by these parameters alone is not convex."
            )
        for cause in self.causes:
            text += f" What breaks it: {cause.what}. {cause.change}."
        return text

    def _names(self) -> str:
        shown = ", ".join(self.parameters[:4])
        more = len(self.parameters) - 4
        return f"{shown} and {more} more variables" if more > 0 else shown

    def _repr_html_(self) -> str:
        rows = {
            "common model structure": f"<b>{'holds' if self.holds else 'broken'}</b>",
            "relative error": f"{self.error:.2g}",
            "tolerance": f"{self.tolerance:.0e}",
            "parameters": html.escape(self._names()),
            "samples": str(self.n),
            "outputs": str(self.units),
            "computed in": html.escape(self.dtype),
        }
        for place, cause in enumerate(self.causes, start=1):
            text = html.escape(f"{cause.what}. {cause.change}.")
            rows[f"what breaks it ({place})"] = text
        return html_table(rows)


def check_structure(
    model: keras.Model,
    x: Any,
    *,
    parameters: str | Sequence[keras.Variable] | None = None,
    tolerance: float | None = None,
    batch_size: int = 256,
    steps: int | None = None,
) -> StructureReport:
    """Checks numerically that a model's outputs are `J theta` in some parameters.

    What is promised about convergence rests on it. Evaluated by differentiation of a
    float64 copy at the model's weights and at others near them; a few samples are
    enough, as it depends on the architecture, not on the data. A model that fails is a
    result, with what breaks it and what to change, found by further evaluations: at
    parameters of 0 and twice as large.

    Args:
        model: A built Keras model with one output of shape `(batch, C)`.
        x: Inputs: arrays, or a stream that can be read again.
        parameters: As in `jacobian`. Defaults to `"head"` for an `AlignedModel` that
            exploits, whose frozen linear part is then subtracted, and to `"last"`.
        tolerance: The largest relative error that is put down to rounding. Defaults to
            1e-8, and to more for models that cannot be rebuilt in float64.
        batch_size: Samples per batch, for arrays.
        steps: Batches that make one pass, for streams that do not end.

    Returns:
        The report.

    Raises:
        ValueError: If the tolerance is below what the dtype resolves, or if there is no
            Jacobian (see `jacobian`).

    Example:

    ```python
    print(check_structure(model, x[:64]))
    ```
    """
    if parameters is None:
        parameters = "last" if exploiting_head(model) is None else "head"
    J = jacobian(model, x, parameters, batch_size=batch_size, steps=steps)
    tolerance = _checked_tolerance(tolerance, J.dtype)
    # By differentiation, whatever structure was found.
    G = J
    if J.kind != "generic":
        G = jacobian(model, x, J.variables, batch_size=batch_size, steps=steps)
    offset = J.offset()
    here = _Point(G, offset)
    elsewhere = _Point(G.at(_moved(G.theta())), offset)
    error = max(here.error, elsewhere.error)
    holds = error <= tolerance
    causes: tuple[StructureCause, ...] = ()
    if not holds:
        # At parameters of 0 every degree looks alike.
        worst = here if here.error > tolerance and np.any(here.theta) else elsewhere
        with untouched_graph(model):
            path = output_path(model, RereadData(x, batch_size, steps, model).first())
            causes = _Diagnosis(worst, tolerance, path).causes()
    degree = elsewhere.degree(tolerance)
    change = elsewhere.J.matvec(elsewhere.theta) - here.J.matvec(elsewhere.theta)
    norm = float(np.linalg.norm(here.outputs))
    return StructureReport(
        holds=holds,
        error=error,
        tolerance=tolerance,
        parameters=tuple(variable.path for variable in J.variables),
        n_parameters=J.shape[1],
        n=J.n,
        units=J.units,
        offset=float(np.linalg.norm(offset)) / norm if norm else 0.0,
        degree=degree,
        linear=elsewhere.relative(change) <= tolerance,
        causes=causes,
        dtype=J.dtype,
    )


class _Point:
    """The outputs at some values of the parameters, and `J theta` there."""

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
        """The norm of a difference in units of the outputs'."""
        return float(np.linalg.norm(difference) / self.scale) if self.scale else 0.0

    def degree(self, tolerance: float) -> float | None:
        """The degree of homogeneity, if there is one."""
        square = float(np.sum(self.reached**2))
        if not square:
            return None
        degree = float(np.sum(self.linear * self.reached)) / square
        exact = self.relative(self.linear - degree * self.reached) <= tolerance
        return degree if exact else None


class _Diagnosis:
    """What breaks the structure, by numbers, and by the graph where there is one.

    Args:
        point: Where it is broken.
        tolerance: The largest relative error that is put down to rounding.
        path: The end of the model's graph, or None.
    """

    def __init__(
        self, point: _Point, tolerance: float, path: OutputPath | None
    ) -> None:
        self._point = point
        # Differences of outputs at several points: some times the rounding of one.
        self._tolerance = 10 * tolerance
        self._path = path
        self._own = {id(variable) for variable in point.J.variables}

    def causes(self) -> tuple[StructureCause, ...]:
        """All that was found, the surest first; at least one."""
        point = self._point
        at_zero = point.J.at(np.zeros_like(point.theta)).outputs()
        at_double = point.J.at(2 * point.theta).outputs()
        bend = point.relative(at_double - 2 * point.outputs + at_zero)
        constant = at_zero - point.offset
        degree = point.degree(self._tolerance)
        found = [self._probabilities(), self._inner()]
        if degree is not None and degree > 0.5:
            # Euler's theorem: no other reason is needed.
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
            change = "Give the last layer weights of its own"
        elif len(self._layers()) > 1:
            what += f"; they are those of several layers: {self._names(self._layers())}"
            change = "Take those of the last layer alone: parameters='last'"
        else:
            change = (
                "Look for weights that are used in several places, also within one "
                "layer, and give the last layer weights of its own"
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
            f"layers with weights stand behind {', '.join(before[:4])}: {ends}",
            "Take the weights of the last layer alone: parameters='last'",
        )

    def _layers(self) -> list[Any]:
        """The layers of the graph that hold parameters."""
        if self._path is None:
            return []
        return [
            layer
            for layer in self._path.layers
            if any(id(v) in self._own for v in layer.weights)
        ]

    def _repeated(self) -> str:
        """Layers with parameters that are called several times."""
        if self._path is None:
            return ""
        return ", ".join(
            f"'{layer.name}' is called {self._path.n_calls[id(layer)]} times"
            for layer in self._layers()
            if self._path.n_calls[id(layer)] > 1
        )

    def _missing(self) -> list[str]:
        """Weights of the parameters' layers that are not among them."""
        return [
            variable.path
            for layer in self._layers()
            for variable in layer.trainable_weights
            if id(variable) not in self._own
        ]

    def _skipped(self) -> str:
        if self._path is None:
            return ""
        return self._names([end.layer for end in self._path.skipped])

    def _nonlinear(self) -> dict[str, str]:
        """Nonlinear functions from the last layer on, and what applies them."""
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


def _moved(theta: Array) -> Array:
    """Parameters at some distance, of their own size, the same ones each time."""
    size = float(np.sqrt(np.mean(theta**2))) or 1.0
    moves = np.random.default_rng(0).standard_normal(theta.shape)
    return theta + 0.5 * size * moves


def _checked_tolerance(tolerance: float | None, dtype: str) -> float:
    if tolerance is None:
        return _TOLERANCES[dtype]
    epsilon = _EPSILONS[dtype]
    wanted = f"a number below 1 and at least {epsilon:.2g}, what {dtype} resolves"
    return number("tolerance", tolerance, wanted, lambda v: epsilon <= v < 1)
