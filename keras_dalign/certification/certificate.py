"""How far a model's training loss is from the global minimum, at most.

The measured loss minus a proven lower bound: samples with identical inputs get one
output from any function, so where their targets differ, no function of the inputs can
go below the loss of their best common output. The gap between the two bounds the
distance to the global minimum from above. It takes no assumption on the model and no
theorem.

Two more certificates on request, and one of quadratic heads
(`quadratic_bound.py`). The loss with an L2 term is strongly convex in what
exploitation trains, so that `||gradient||^2 / (2 l2)` bounds its distance to its own
minimum. And the gradient of the plain loss bounds its distance to the infimum, in any
model, because the loss is convex in the outputs (`gradient_bound.py`).
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_dalign.certification.exploiting_head import exploiting_head
from keras_dalign.certification.quadratic_bound import (
    QuadraticBound,
    QuadraticTally,
    quadratic_parts,
)
from keras_dalign.diagnostics.gradient_bound import GradientBound
from keras_dalign.diagnostics.gradient_bound import gradient_bound as bound_by_gradient
from keras_dalign.diagnostics.jacobian_builder import jacobian
from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.head.batch_predictor import BatchPredictor
from keras_dalign.head.features import FeatureSet, as_inputs
from keras_dalign.head.objective import (
    check_outputs,
    check_some_weight,
    check_targets,
    loss_of,
    sample_weights,
    single_array,
)
from keras_dalign.numerics.arguments import flag, number
from keras_dalign.numerics.html_table import html_table
from keras_dalign.numerics.repeats import PassRecord, Repeats, digests
from keras_dalign.numerics.rounding import EPS, rounded
from keras_dalign.numerics.threads import in_turn
from keras_dalign.solving.problem import ConvexProblem

if TYPE_CHECKING:
    from keras_dalign.numerics.losses import Array, ConvexLoss, Indices
    from keras_dalign.training.aligned_model import AlignedModel

# A gap may come out negative by the rounding of the logits: within this many units in
# the last place of each logit (float accumulation in the layers below), to first order.
_LOGIT_ULPS = 64
_FLOAT64_ROUNDING = 1e-12

_UNITS_IN_LAST_PLACE = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}


@dataclasses.dataclass(frozen=True)
class Certificate:
    """An upper bound on the distance of a training loss to its global minimum.

    `gap` bounds `loss` minus the infimum of the loss over *all* functions of the
    inputs, hence over all parameters of the model. A gap of 0 is one that vanishes to
    rounding.

    Attributes:
        loss: Measured loss over all samples, in inference mode.
        lower_bound: Loss below which no function of the inputs can go.
        gap: `loss - lower_bound`, at least 0.
        n_samples: Number of samples.
        n_distinct: Number of distinct inputs among them.
        n_conflicts: Number of distinct inputs that came with two or more different
            targets, samples of weight 0 aside. Without conflicts (and label smoothing
            or soft labels) the lower bound is 0.
        conflicts: The first 20 of these conflicts: for each, the positions in the data
            of samples that share the input and differ in the target (the first sample
            of each target, 20 at most).
        objective: The loss that the certificate speaks of, in words.
        dtype: The dtype of the model's outputs. Sums are in float64 always.
        l2: Weight of the L2 term that was asked for, or None.
        l2_loss: The loss plus `l2 / 2` times the squared change of the head's `q` and
            `b`, in float64 from the features on.
        l2_gap: Upper bound on `l2_loss` minus its minimum over all `q` and `b`.
        gradient_bound: The bound by the gradient, if it was asked for. It knows the
            gradient alone, so it is never below `gap`, but for rounding.
        quadratic_bound: Of a model that ends in a `QuadraticHead`: the bound on its
            objective above the global minimum over the head's weights.
    """

    loss: float
    lower_bound: float
    gap: float
    n_samples: int
    n_distinct: int
    n_conflicts: int
    conflicts: tuple[tuple[int, ...], ...]
    objective: str
    dtype: str
    l2: float | None = None
    l2_loss: float | None = None
    l2_gap: float | None = None
    gradient_bound: GradientBound | None = None
    quadratic_bound: QuadraticBound | None = None

    @property
    def l2_lower_bound(self) -> float | None:
        """What `l2_loss` cannot go below for any `q` and `b`, None without L2 term."""
        if self.l2_loss is None or self.l2_gap is None:
            return None
        return max(self.l2_loss - self.l2_gap, self.lower_bound)

    def to_dict(self) -> dict[str, Any]:
        """The certificate as a dict that `json.dumps` accepts."""
        fields = dataclasses.asdict(self)
        fields["conflicts"] = [list(conflict) for conflict in self.conflicts]
        return fields

    def __str__(self) -> str:
        gap = rounded(self.gap, up=True) if self.gap else "0 (to rounding)"
        plain = (
            f"The loss is {self.loss:.6g}, at most {gap} above its global "
            "minimum: no function of the inputs can go below "
            f"{rounded(self.lower_bound, up=False)} on these {self.n_samples} samples "
            f"({self.n_distinct} distinct inputs, {self.n_conflicts} of them with "
            f"conflicting targets); objective: {self.objective}; outputs in "
            f"{self.dtype}, sums in float64."
        )
        return " ".join([plain, *self._more()])

    def _more(self) -> Iterator[str]:
        if self.l2_loss is not None and self.l2_gap is not None:
            yield (
                f"Regularised with l2={self.l2:g}, the loss is {self.l2_loss:.6g}, at "
                f"most {rounded(self.l2_gap, up=True)} above its minimum over the "
                "head's q and b; objective: the loss plus l2 / 2 times their squared "
                "change."
            )
        if self.gradient_bound is not None:
            yield str(self.gradient_bound)
        if self.quadratic_bound is not None:
            yield str(self.quadratic_bound)

    def _repr_html_(self) -> str:
        rows = {
            "loss": f"{self.loss:.6g}",
            "lower bound": rounded(self.lower_bound, up=False),
            "gap": f"<b>{rounded(self.gap, up=True)}</b>",
            "samples": str(self.n_samples),
            "distinct inputs": str(self.n_distinct),
            "conflicts": str(self.n_conflicts),
            "objective": html.escape(self.objective),
            "outputs in": html.escape(self.dtype),
        }
        if self.l2_loss is not None and self.l2_gap is not None:
            rows[f"loss with l2={self.l2:g}"] = f"{self.l2_loss:.6g}"
            rows["its gap"] = f"<b>{rounded(self.l2_gap, up=True)}</b>"
        if self.gradient_bound is not None:
            rows["gap by the gradient"] = (
                f"<b>{rounded(self.gradient_bound.gap, up=True)}</b>"
            )
        if self.quadratic_bound is not None:
            bound = self.quadratic_bound
            rows[f"objective with penalty={bound.penalty:g}"] = f"{bound.value:.6g}"
            rows["its global gap"] = f"<b>{rounded(bound.gap, up=True)}</b>"
        return html_table(rows)


@in_turn
def certify(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    loss: Any = None,
    sample_weight: Any = None,
    l2: float | None = None,
    gradient_bound: bool = False,
    parameters: Any = None,
    batch_size: int = 256,
    steps: int | None = None,
) -> Certificate:
    """Measures how far a model's training loss is from its global minimum, at most.

    The loss is that of the data as given, in inference mode (dropout and augmentation
    layers off, batch normalisation with its moving averages), without regularisation,
    `class_weight` and `loss_weights`, its sums in float64. Its lower bound comes from
    the samples with identical inputs, found by content in the same single pass: for a
    group of them the best common output gives the weighted variance of the targets
    (squared error) or the entropy of their weighted mean (cross-entropies). Memory
    grows with the number of distinct inputs, not with their size.

    Inputs are told apart by their bytes, through 128-bit digests, with -0.0 equal to
    0.0. A stream that augments at random is certified for the samples that it drew.

    Of a Functional or Sequential model whose last layer is a `QuadraticHead`, its
    objective, penalty included, is certified, too: that needs the features (the trunk
    is computed twice), `2 n d^2 C m` flop, and `8 d^2 C m` bytes three times.

    Args:
        model: Any Keras model with one output, of logits (or of predictions, for
            squared error), shape `(n, C)`.
        x: Inputs: arrays, or any stream that `keras.Model.fit` accepts, finite.
        y: Targets, for arrays.
        loss: A loss as in `keras.Model.compile`, if not the one that the model was
            compiled with. It must be convex in the outputs.
        sample_weight: Sample weights of shape `(n,)`, for arrays. They and the loss's
            reduction give the objective: the weighted sum, divided by `n`
            (`"sum_over_batch_size"`, Keras's default), by the sum of the weights
            (`"mean_with_sample_weight"`) or by 1 (`"sum"`).
        l2: Positive float: certifies the loss with this L2 weight on the change of `q`
            and `b`, too (the change since the gates were frozen for learned gates,
            from 0 for random ones). Takes an `AlignedModel` that exploits. Features
            are those that the trunk puts out; everything behind them is in float64.
        gradient_bound: Whether to bound the loss by its gradient, too, in float64. For
            outputs `f`, their Jacobian `J` in the parameters and the gradient `g` of
            the loss in the outputs, any outputs `F* = f + J delta + e` have
            `L(f) - L(F*) <= <g, f - F*> = -<J^T g, delta> - <g, e> <=
            ||J^T g|| ||delta|| + ||g|| ||e||`, by convexity and Cauchy-Schwarz. So the
            bound holds for every Keras model and any set of its parameters. It reads
            the data several times, and holds the outputs of all samples. For a head on
            more than 1,500 samples, and for parameters without structure, it takes
            some 300 products with the Jacobian.
        parameters: The parameters that the gradient bound takes the gradient in, any
            will do: `"head"`, `"last"` (the output layer), `"all"` or a list of the
            model's variables. The default is the head of an `AlignedModel` that
            exploits, and the output layer of any other model.
        batch_size: Samples per prediction, for arrays.
        steps: Number of batches to read; a generator needs it.

    Returns:
        The certificate.

    Raises:
        MemoryError: If the bound of a quadratic head does not fit into memory.
        ValueError: If the loss is not convex or not given, if the model has several
            outputs or ends in a softmax or sigmoid, or if inputs, targets, weights or
            outputs are missing, non-finite, out of range or of the wrong shape; if the
            model does not exploit (`l2`) or does not have `parameters`, or the data
            change between passes.
        RuntimeError: If the loss came out below its lower bound by more than rounding.

    Example:

    ```python
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=10)
    print(keras_dalign.certify(model, x, y))
    ```
    """
    flag("gradient_bound", gradient_bound)
    convex = loss_of(model, loss)
    check_outputs(model, convex)
    regularised = None if l2 is None else _Regularised(model, convex, l2)
    if gradient_bound and not data.is_arrays(x) and isinstance(x, Iterator):
        raise ValueError(
            "The gradient bound reads `x` several times, and a generator can be "
            "read once only. Pass arrays, a `tf.data.Dataset` or a "
            f"`keras.utils.PyDataset`. Received: x of type {type(x).__name__}"
        )
    if parameters is not None and not gradient_bound:
        raise ValueError(
            "`parameters` says what the gradient bound speaks of: pass "
            f"gradient_bound=True, too. Received: parameters={parameters!r}"
        )
    parts = quadratic_parts(model)
    quadratic = None if parts is None else QuadraticTally(*parts, convex)
    tally = _Tally(convex, keep=gradient_bound)
    predictor = BatchPredictor(model)
    for x_batch, y_batch, w_batch in data.batches(
        x, y, sample_weight, batch_size=batch_size, steps=steps, model=model
    ):
        check_targets(y_batch)
        # First the inputs: what a model makes of NaN is no clear error.
        names = digests(x_batch)
        inputs = x_batch
        if regularised is not None:
            features = regularised.features(x_batch)
            regularised.add(features, y_batch, w_batch)
            inputs = as_inputs(features)
        tally.add(names, predictor.outputs(inputs), y_batch, w_batch)
        if quadratic is not None:
            quadratic.add(x_batch, y_batch, w_batch)
    certificate = _certificate(tally, regularised)
    if quadratic is not None:
        found = quadratic.bound(tally.normalizer, certificate.lower_bound)
        certificate = dataclasses.replace(certificate, quadratic_bound=found)
    if gradient_bound:
        bound = _gradient_bound(
            model,
            x,
            tally,
            convex,
            certificate.lower_bound,
            parameters,
            batch_size=batch_size,
            steps=steps,
        )
        certificate = dataclasses.replace(certificate, gradient_bound=bound)
    return certificate


def certify_features(
    model: AlignedModel,
    features: FeatureSet,
    *,
    loss: ConvexLoss,
    l2: float | None = None,
    problem: ConvexProblem | None = None,
    batch_size: int = 256,
) -> Certificate:
    """The certificate of the samples whose features were kept, without the trunk.

    Args:
        model: The model that made the features, exploiting.
        features: All of them, with the digests of the inputs.
        loss: The loss.
        l2: As for `certify`.
        problem: The head's problem on these features, which `l2` takes; None to set it
            up batch by batch.
        batch_size: Samples per prediction.

    Returns:
        What `certify` says of the same samples.

    Raises:
        ValueError: If the features came without digests or targets, or as `certify`.
    """
    if features.digests is None or features.y is None:
        raise ValueError(
            "A certificate needs the digests of the inputs and the targets. Received: "
            "features without them. Keep them: FeaturePass(model, keep=True, "
            "digest=True)."
        )
    regularised = None if l2 is None else _Regularised(model, loss, l2)
    tally = _Tally(loss, keep=False)
    predictor = BatchPredictor(model)
    kept = (features.z, features.y, features.sample_weight)
    for start in range(0, len(features.digests), batch_size):
        rows = slice(start, start + batch_size)
        z, y, weights = keras.tree.map_structure(
            lambda leaf, rows=rows: None if leaf is None else leaf[rows], kept
        )
        tally.add(features.digests[rows], predictor.outputs(as_inputs(z)), y, weights)
        if regularised is not None and problem is None:
            regularised.add(z, y, weights)
    if regularised is not None and problem is not None:
        regularised.add_problem(problem)
    return _certificate(tally, regularised)


def _certificate(tally: _Tally, regularised: _Regularised | None) -> Certificate:
    certificate = tally.certificate()
    if regularised is None:
        return certificate
    value, gap = regularised.certificate(tally.normalizer)
    return dataclasses.replace(
        certificate, l2=regularised.l2, l2_loss=value, l2_gap=gap
    )


class _Tally:
    """Sums over the samples seen so far."""

    def __init__(self, loss: ConvexLoss, keep: bool) -> None:
        self._loss = loss
        self._keep = keep
        self._kept: list[tuple[Array, Array, Indices]] = []
        self.repeats = Repeats()
        self.record = PassRecord()
        self._n = 0
        self._weight = 0.0
        self._is_weighted = False
        self._weighted_loss = 0.0
        self._rounding = 0.0
        self._dtype = ""
        self._n_outputs = 0

    def add(
        self, digests: list[bytes], outputs: np.ndarray, y: Any, sample_weight: Any
    ) -> None:
        weights = sample_weights(sample_weight, len(digests))
        self._is_weighted |= sample_weight is not None
        if self._n and outputs.shape[1] != self._n_outputs:
            raise ValueError(
                "The model's number of outputs changed between batches. Received: "
                f"{self._n_outputs} outputs, then {outputs.shape[1]}"
            )
        self._n_outputs = outputs.shape[1]
        self._dtype = outputs.dtype.name
        logits = outputs.astype(np.float64)
        targets = self._loss.targets(single_array(y, "y"), self._n_outputs)
        self.repeats.add(digests, targets, weights, self._n)
        if self._keep:
            self.record.add(digests, targets, weights)
            self._kept.append((targets, weights, self.repeats.groups(digests)))
        self._n += len(digests)
        self._weight += float(weights.sum())
        self._weighted_loss += float(weights @ self._loss.value(logits, targets))
        # First-order effect on the loss of one unit in the last place of every logit.
        slopes = np.abs(self._loss.gradient(logits, targets))
        effect = float(weights @ (slopes * np.abs(logits)).sum(axis=1))
        self._rounding += effect * _UNITS_IN_LAST_PLACE.get(self._dtype, 2.0**-52)

    @property
    def normalizer(self) -> float:
        """What sums over the samples are divided by."""
        return self._loss.normalizer(self._n, self._weight)

    def kept(self) -> tuple[Array, Array, Indices]:
        """Targets `(n, C)`, weights `(n,)` and numbers of the inputs `(n,)`."""
        targets, weights, groups = zip(*self._kept, strict=True)
        return np.concatenate(targets), np.concatenate(weights), np.concatenate(groups)

    def certificate(self) -> Certificate:
        check_some_weight(self._n, self._weight)
        divisor = self.normalizer
        loss = self._weighted_loss / divisor
        lower_bound = self.repeats.lower_bound(self._loss) / divisor
        if not np.isfinite(loss - lower_bound):
            raise ValueError(
                "The loss overflows float64: the outputs or targets are too large. "
                f"Received: loss={loss}, lower_bound={lower_bound}"
            )
        gap = loss - lower_bound
        rounding = _LOGIT_ULPS * self._rounding / divisor
        rounding += _FLOAT64_ROUNDING * lower_bound
        if gap < -rounding:
            raise RuntimeError(
                "The loss came out below the least that any function of the inputs can "
                "reach, so the model is not one function of its inputs: it gave "
                "different outputs for identical inputs. It is probably stochastic in "
                "inference mode, keeps state from call to call, or lets the samples of "
                "a batch influence each other; make it deterministic and certify "
                f"again. Received: loss={loss:.9g}, lower_bound={lower_bound:.9g}"
            )
        n_conflicts, conflicts = self.repeats.conflicts()
        weighting = ", with sample weights" if self._is_weighted else ""
        return Certificate(
            loss=loss,
            lower_bound=lower_bound,
            gap=max(gap, 0.0),
            n_samples=self._n,
            n_distinct=self.repeats.n_distinct,
            n_conflicts=n_conflicts,
            conflicts=conflicts,
            objective=(
                f"{self._loss.objective} as given{weighting}, in inference mode, "
                "without regularisation or augmentation"
            ),
            dtype=self._dtype,
        )


class _Regularised:
    """The gradient of the loss with an L2 term, summed batch by batch."""

    def __init__(self, model: keras.Model, loss: ConvexLoss, l2: Any) -> None:
        wanted = (
            "positive and finite: without it the loss is not strongly convex, and this "
            "certificate says nothing"
        )
        self.l2 = number("l2", l2, wanted, lambda v: v > 0)
        self._head = exploiting_head(model, "A certificate with `l2`")
        self._trunk = BatchPredictor(model.trunk)
        self._loss = loss
        self._sum = 0.0
        self._gradient: Any = 0.0
        self._rounding = 0.0
        self._change: Any = 0.0

    def features(self, x: Any) -> Any:
        return self._trunk.features(x)

    def add(self, z: Any, y: Any, sample_weight: Any) -> None:
        n = data.n_samples(z)
        weights = sample_weights(sample_weight, n)
        if not weights.any():
            return
        features = FeatureSet(z, single_array(y, "y"), weights, n)
        self.add_problem(ConvexProblem.from_head(self._head, features, self._loss))

    def add_problem(self, problem: ConvexProblem) -> None:
        theta = problem.theta_of(self._head)
        found = problem.evaluate(theta)
        self._sum += found.value * problem.normalizer
        self._gradient += found.gradient * problem.normalizer
        self._rounding += problem.gradient_rounding(found) * problem.normalizer
        self._change = theta - problem.center

    def certificate(self, normalizer: float) -> tuple[float, float]:
        """The loss with the L2 term, and the most that it is above its minimum."""
        change = self._change
        value = self._sum / normalizer + 0.5 * self.l2 * float(change @ change)
        gradient = self._gradient / normalizer + self.l2 * change
        norm = float(np.linalg.norm(gradient)) + self._rounding / normalizer
        norm += 4 * EPS * self.l2 * float(np.linalg.norm(change))
        gap = norm**2 / (2.0 * self.l2)
        if not np.isfinite(value + gap):
            raise ValueError(
                "The regularised loss overflows float64: weights, outputs or targets "
                f"are too large. Received: loss={value}, gap={gap}"
            )
        return value, gap


def _gradient_bound(
    model: keras.Model,
    x: Any,
    tally: _Tally,
    loss: ConvexLoss,
    lower_bound: float,
    parameters: Any,
    **reading: Any,
) -> GradientBound:
    if parameters is None:
        head = getattr(model, "head", None)
        exploits = isinstance(head, AlignmentHead) and head.phase == EXPLOITING
        parameters = "head" if exploits else "last"
    operator = jacobian(model, x, parameters, **reading)
    targets, weights, groups = tally.kept()
    if not data.is_arrays(x):
        # The Jacobian read the stream in between: in the same order, if its passes
        # before and after were.
        again = PassRecord()
        for x_batch, y_batch, w_batch in data.batches(x, **reading):
            names = digests(x_batch)
            labels = loss.targets(single_array(y_batch, "y"), targets.shape[1])
            again.add(names, labels, sample_weights(w_batch, len(names)))
        tally.record.check_same(again)
    words = parameters
    if not isinstance(parameters, str):
        words = ", ".join(variable.path for variable in operator.variables)
    return bound_by_gradient(
        operator, loss, targets, weights, groups, lower_bound, parameters=words
    )
