"""Builds the Jacobian of a model, with structure where it has some."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.diagnostics.determinism import check_deterministic
from keras_dalign.diagnostics.engines import Engine, engine
from keras_dalign.diagnostics.generic_jacobian import GenericJacobian
from keras_dalign.diagnostics.output_path import (
    OutputPath,
    output_path,
    untouched_graph,
)
from keras_dalign.diagnostics.precision import (
    RebuildError,
    agreeing_copy,
    as_float64,
    close_to,
    float64_context,
    narrow_operations,
)
from keras_dalign.diagnostics.reread_data import RereadData
from keras_dalign.diagnostics.structured_jacobian import HeadJacobian, LastLayerJacobian
from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.head.features import FeatureSet
from keras_dalign.numerics.arguments import shown
from keras_dalign.numerics.losses import SquaredError
from keras_dalign.numerics.memory import check_memory
from keras_dalign.solving.problem import ConvexProblem

if TYPE_CHECKING:
    from keras_dalign.diagnostics.jacobian import Jacobian
    from keras_dalign.numerics import Array
    from keras_dalign.training.aligned_model import AlignedModel


_PARAMETERS = ("head", "last", "all")
# Samples that a structure is verified on by differentiation.
_FEW = 8
# Outputs of one function, computed in two ways in one dtype: the largest difference,
# relative to the largest output, that counts as rounding.
_ROUNDING = {"float64": 1e-9, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.1}


def jacobian(
    model: keras.Model,
    x: Any,
    parameters: str | Sequence[keras.Variable] = "all",
    *,
    batch_size: int = 256,
    steps: int | None = None,
    dtype: str | None = "float64",
) -> Jacobian:
    """Makes the Jacobian of a model's outputs on given data, in inference mode.

    One pass over the data computes the outputs, and checks that the model is
    deterministic and computes each sample separately. A float64 copy of the model is
    differentiated (see `precision.in_float64`), whatever dtype the model trains in. A
    model that cannot be rebuilt is differentiated in its own dtype; `dtype` and
    `dtype_reason` of the result report this. The model is not changed.

    Args:
        model: A built Keras model with one output of shape `(batch, C)`.
        x: Inputs: arrays, or a stream that can be read several times, in the same order
            each time, with or without targets (`tf.data.Dataset`, `PyDataset`,
            `DataLoader`).
        parameters: The columns of the Jacobian.

            - `"head"`: `q` and `b` of an `AlignedModel` that exploits.
            - `"last"`: the weights of the last layer that has any, and of all such
              layers if their outputs are merged. For an `AlignedModel` that exploits,
              its head's `q` and `b`.
            - `"all"`: `model.trainable_variables`. For an `AlignedModel` that exploits,
              all that either phase trains: the trunk, the linear part and `(q, b)`, not
              the frozen gates.
            - a list of floating variables of the model.
        batch_size: Samples per batch, for arrays.
        steps: Batches that make one pass, for streams that do not end.
        dtype: `"float64"`; or None for the model's own.

    Returns:
        The Jacobian.

    Raises:
        ValueError: If the parameters are not the model's, the model is stochastic,
            changes when it is called, mixes samples or does not have one output of
            shape `(batch, C)`, or if data or outputs are empty, non-finite or cannot be
            read again.
        MemoryError: If the features of a last layer do not fit into memory.

    Example:

    ```python
    from scipy.sparse.linalg import lsmr

    J = keras_dalign.jacobian(model, x).to_scipy()  # A LinearOperator, (n C, P).
    step = lsmr(J, (targets - model.predict(x)).ravel(), damp=1e-3)[0]
    ```
    """
    _check_arguments(model, parameters, dtype)
    stream = RereadData(x, batch_size, steps, model)
    first = stream.first()
    dtype_reason = ""
    copy = model
    check_deterministic(model, first)
    if dtype == "float64":
        try:
            copy = agreeing_copy(model, first)
            dtype_reason = narrow_operations(copy, first)
        except RebuildError as error:
            dtype_reason = str(error)
    else:
        dtype_reason = "the model's own dtype was requested"
    wide = copy is not model
    stream.wide = wide
    with untouched_graph(model):
        return _Builder(model, copy, stream, wide, dtype_reason).build(parameters)


class _Builder:
    """Builds a Jacobian from a model, its float64 copy and the data.

    Args:
        model: The model.
        copy: The copy that is differentiated, or the model itself.
        stream: The data.
        wide: Whether `copy` is a float64 copy.
        dtype_reason: Why the computation is not in float64; empty if it is.
    """

    def __init__(
        self,
        model: keras.Model,
        copy: keras.Model,
        stream: RereadData,
        wide: bool,
        dtype_reason: str,
    ) -> None:
        self.model = model
        self.copy = copy
        self.stream = stream
        self.wide = wide
        self.dtype = "float32" if wide else str(model.compute_dtype)
        if wide and not dtype_reason:
            self.dtype = "float64"
        self.dtype_reason = dtype_reason
        self.device_dtype = "float64" if wide else "float32"
        if not wide and model.variable_dtype == "float64":
            self.device_dtype = "float64"

    def build(self, parameters: str | Sequence[keras.Variable]) -> Jacobian:
        head = exploiting_head(self.copy)
        if parameters in ("head", "last") and head is not None:
            built: Jacobian | None = self.of_head(head)
            if built is not None:
                return built
            parameters = self.originals([head.q, head.bias])
        elif parameters == "head":
            raise ValueError(
                "There is no alignment head that exploits, and whose outputs are "
                "linear in its parameters. Received: parameters='head' for model "
                f"'{self.model.name}' of type {type(self.model).__name__}. Use 'last' "
                "or 'all', or let the model explore and switch first."
            )
        elif parameters == "last":
            path = self.last_path()
            built = None if path.dense is None else self.of_last(path, path.dense)
            if built is not None:
                return built
            parameters = self.originals(path.variables())
        elif parameters == "all":
            parameters = _all_variables(self.model)
        return self.generic(_checked_variables(self.model, parameters))

    def context(self) -> Any:
        return float64_context() if self.wide else contextlib.nullcontext()

    def generic(self, variables: list[keras.Variable]) -> Jacobian:
        derivatives = engine(self.copy, self.copies(variables), self.device_dtype)
        outputs = np.concatenate(
            [
                self.outputs_of(derivatives, batch, index)
                for index, (_, batch) in enumerate(self.stream)
            ]
        )
        theta = _flat(self.copies(variables))
        fixed = None if self.wide else self.model
        return GenericJacobian(
            variables, theta, outputs, self.dtype, self.dtype_reason, derivatives,
            self.stream, fixed,
        )  # fmt: skip

    def last_path(self) -> OutputPath:
        with self.context():
            path = output_path(self.copy, self.stream.first())
        if path is None or not path.last or not path.variables():
            raise ValueError(
                "The last layer with weights cannot be found: the model's `call` must "
                "be made of Keras layers and keras.ops. Received: parameters='last' "
                f"for model '{self.model.name}' of type {type(self.model).__name__}. "
                "Pass the variables instead: parameters=[layer.kernel, layer.bias]."
            )
        return path

    def of_last(self, path: OutputPath, dense: Any) -> Jacobian | None:
        tensor = path.last[0].tensor
        if len(tensor.shape) != 2:
            return None
        with self.context():
            features = keras.Model(path.inputs, tensor)
        p = int(tensor.shape[1])
        variables = [v for v in (dense.kernel, dense.bias) if v is not None]
        weights = np.concatenate(
            [
                np.asarray(as_float64(variable)).reshape(-1, dense.units)
                for variable in variables
            ]
        )
        whole = engine(self.copy, [], self.device_dtype)
        trunk = engine(features, [], self.device_dtype)
        blocks: list[Array] = []
        for index, (_, batch) in enumerate(self.stream):
            z = self.stream.cut(trunk.outputs(self.stream.padded(batch)), batch)
            if dense.bias is not None:
                z = np.concatenate([z, np.ones((len(z), 1))], axis=1)
            # They differ if the model does more than this layer on the features.
            outputs = self.outputs_of(whole, batch, index)
            if not close_to(outputs, z @ weights, self.rounding):
                return None
            if index == 0:
                if not self.is_linear(self.originals(variables), batch, z):
                    return None
                n_bytes = 8 * self.stream.n_hint * (p + 1)
                check_memory(n_bytes, "The features of the last layer")
            blocks.append(z)
        return LastLayerJacobian(
            self.originals(variables),
            weights,
            np.concatenate(blocks),
            self.dtype,
            self.dtype_reason,
        )

    def is_linear(
        self, variables: list[keras.Variable], batch: Any, features: Array
    ) -> bool:
        """Whether the features do not depend on the weights, as with tied weights."""
        few = keras.tree.map_structure(lambda leaf: leaf[:_FEW], batch)
        derivatives = engine(self.copy, self.copies(variables), self.device_dtype)
        direction = np.random.default_rng(0).standard_normal(derivatives.size)
        product = features[:_FEW] @ direction.reshape(features.shape[1], -1)
        return close_to(product, derivatives.jvp(few, direction), self.rounding)

    def of_head(self, head: AlignmentHead) -> Jacobian | None:
        whole = engine(self.copy, [], self.device_dtype)
        trunk = engine(_trunk(self.copy), [], self.device_dtype)
        features: list[Any] = []
        outputs: list[Array] = []
        for index, (_, batch) in enumerate(self.stream):
            z = trunk.outputs(self.stream.padded(batch))
            features.append(self.stream.cut(z, batch))
            outputs.append(self.outputs_of(whole, batch, index))
        z = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *features)
        n = self.stream.n
        problem = ConvexProblem.from_head(
            head,
            FeatureSet(z, np.zeros((n, head.units)), None, n),
            SquaredError(),
        )
        theta = problem.theta_of(head)
        logits = problem.logits(theta)
        if not close_to(np.concatenate(outputs), logits, self.rounding):
            return None
        return HeadJacobian(
            self.originals([head.q, head.bias]),
            theta,
            logits,
            self.dtype,
            self.dtype_reason,
            problem,
        )

    @property
    def rounding(self) -> float:
        return _ROUNDING[self.dtype]

    def outputs_of(self, derivatives: Engine, batch: Any, index: int) -> Array:
        """The outputs of one batch, checked."""
        padded = self.stream.padded(batch)
        raw = derivatives.outputs(padded)
        if not isinstance(raw, np.ndarray) or raw.ndim != 2:
            shapes = [leaf.shape for leaf in keras.tree.flatten(raw)]
            raise ValueError(
                "The model must have one output of shape (batch, C). Received: model "
                f"'{self.model.name}' with outputs of shapes {shapes}"
            )
        outputs: Array = self.stream.cut(raw, batch)
        if not np.all(np.isfinite(outputs)):
            bad = int(np.sum(~np.isfinite(outputs).all(axis=1)))
            raise ValueError(
                "The model's outputs are not finite. Received: NaN or infinity for "
                f"{bad} of {len(outputs)} samples of batch {index}. Check the model's "
                "weights."
            )
        if index == 0 and len(raw) > 1:
            self.check_separate(derivatives, padded, raw)
        return outputs

    def check_separate(self, derivatives: Engine, batch: Any, outputs: Array) -> None:
        """Checks that a sample's outputs do not depend on the rest of its batch."""
        half = len(outputs) - len(outputs) // 2
        order = np.arange(len(outputs)) % half
        repeated = keras.tree.map_structure(lambda leaf: leaf[order], batch)
        again = derivatives.outputs(repeated)
        if not close_to(outputs[:half], again[:half], self.rounding):
            difference = np.max(np.abs(outputs[:half] - again[:half]))
            raise ValueError(
                "The outputs of a sample depend on the other samples of its batch, so "
                "the Jacobian is not one of the data alone. Received: model "
                f"'{self.model.name}', whose outputs change by up to {difference:.3g} "
                "with the rest of the batch. Call batch normalisation without "
                "training=True, and let no layer mix samples in inference."
            )

    def copies(self, variables: list[keras.Variable]) -> list[keras.Variable]:
        known = {
            id(v): twin
            for v, twin in zip(self.model.weights, self.copy.weights, strict=True)
        }
        return [known[id(v)] for v in variables]

    def originals(self, variables: list[keras.Variable]) -> list[keras.Variable]:
        known = {
            id(twin): v
            for v, twin in zip(self.model.weights, self.copy.weights, strict=True)
        }
        return [known[id(v)] for v in variables]


def _check_arguments(model: Any, parameters: Any, dtype: Any) -> None:
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            "`model` must be a built keras.Model. Received: "
            f"model={shown(model)}. Call it once on a batch of data to build it."
        )
    if isinstance(parameters, str):
        if parameters not in _PARAMETERS:
            raise ValueError(
                f"`parameters` must be one of {_PARAMETERS}, or a list of variables. "
                f"Received: parameters={parameters!r}"
            )
    elif not isinstance(parameters, (list, tuple)):
        raise ValueError(
            f"`parameters` must be one of {_PARAMETERS}, or a list of variables. "
            f"Received: parameters={shown(parameters)}"
        )
    else:
        _checked_variables(model, parameters)
    if dtype not in ("float64", None):
        raise ValueError(
            "`dtype` must be 'float64', or None for the model's own. Received: "
            f"dtype={dtype!r}"
        )


def _checked_variables(
    model: keras.Model, variables: Sequence[Any]
) -> list[keras.Variable]:
    known = {id(v) for v in model.weights}
    foreign = [
        getattr(v, "path", repr(v)[:60]) for v in variables if id(v) not in known
    ]
    if foreign:
        raise ValueError(
            "All of `parameters` must be variables of the model (layer.kernel, not its "
            f"values). Received: {foreign[:10]}, unknown to model '{model.name}'"
        )
    if len({id(v) for v in variables}) < len(variables):
        paths = [v.path for v in variables]
        raise ValueError(
            f"`parameters` must not name a variable twice. Received: {paths[:10]}"
        )
    integer = [v.path for v in variables if "float" not in str(v.dtype)]
    if integer:
        raise ValueError(
            "Outputs have no derivative in variables that are not floating. Received: "
            f"{integer[:10]}"
        )
    if not variables:
        raise ValueError(
            "There are no parameters to differentiate by. Received: an empty list, or "
            f"model '{model.name}' without trainable variables. Unfreeze layers, or "
            "pass a list of variables."
        )
    return list(variables)


def _all_variables(model: keras.Model) -> list[keras.Variable]:
    head = exploiting_head(model)
    if head is None:
        return list(model.trainable_variables)
    candidates = [
        *_trunk(model).trainable_variables,
        *head.explored_variables,
        *head.exploited_variables,
    ]
    return list({id(variable): variable for variable in candidates}.values())


def exploiting_head(model: keras.Model) -> AlignmentHead | None:
    """The head of an `AlignedModel` that exploits, None for any other model."""
    head = getattr(model, "head", None)
    if isinstance(head, AlignmentHead) and isinstance(
        getattr(model, "trunk", None), keras.Model
    ):
        return head if head.phase == EXPLOITING else None
    return None


def _trunk(model: AlignedModel) -> keras.Model:
    return model.trunk


def _flat(variables: list[keras.Variable]) -> Array:
    return np.concatenate([as_float64(variable).ravel() for variable in variables])
