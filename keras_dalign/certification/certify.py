"""Bounds the distance of a model's training loss to the global minimum from above.

The gap is the measured loss minus a proven lower bound. Any function gives samples with
identical inputs one output. So where their targets differ, no function of the inputs
can go below the loss of their best common output. This needs no assumption on the
model.

Further bounds, on request or for a kind of head:

- `l2_bound.py`: the distance of the loss with an L2 term to its minimum;
- `gradient_bound.py` (in `diagnostics`): the distance of the plain loss to the infimum,
  by its gradient, for any model whose loss is convex in the outputs;
- `quadratic_bound.py`: the distance of a quadratic head's objective to its minimum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras

from keras_dalign.certification.l2_bound import L2Bound
from keras_dalign.certification.loss_tally import LossTally
from keras_dalign.certification.quadratic_bound import QuadraticTally, quadratic_parts
from keras_dalign.diagnostics import gradient_bound as gradient_bounds
from keras_dalign.diagnostics.jacobian_builder import jacobian
from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.head.batch_predictor import BatchPredictor
from keras_dalign.head.features import FeatureSet, as_inputs
from keras_dalign.head.objective import (
    check_outputs,
    check_targets,
    loss_of,
    sample_weights,
    single_array,
)
from keras_dalign.numerics.arguments import flag
from keras_dalign.numerics.repeats import PassRecord, digests
from keras_dalign.numerics.threads import in_turn

if TYPE_CHECKING:
    from keras_dalign.certification.certificate import Certificate
    from keras_dalign.diagnostics.gradient_bound import GradientBound
    from keras_dalign.numerics.losses import ConvexLoss
    from keras_dalign.solving.problem import ConvexProblem
    from keras_dalign.training.aligned_model import AlignedModel


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
    """Bounds the distance of a model's training loss to its global minimum from above.

    The loss is that of the data as given, in inference mode: dropout and augmentation
    layers are off, and batch normalisation uses its moving averages. Regularisation,
    `class_weight` and `loss_weights` are left out. Sums are in float64.

    Its lower bound comes from the samples with identical inputs, found in the same
    single pass over the data. For a group of them, the loss of the best common output
    is the weighted variance of the targets (squared error) or the entropy of their
    weighted mean (cross-entropies). Memory grows with the number of distinct inputs,
    not with their size.

    Inputs are compared by 128-bit digests of their bytes, with -0.0 equal to 0.0. For a
    stream that augments at random, the certificate is about the samples that it drew.

    For a Functional or Sequential model whose last layer is a `QuadraticHead`, the
    objective with its penalty is certified, too. This computes the trunk twice, takes
    `2 n d^2 C m` flop, and holds three arrays of `8 d^2 C m` bytes.

    Args:
        model: Any Keras model with one output, of logits (or of predictions, for
            squared error), shape `(n, C)`.
        x: Inputs: arrays, or any stream that `keras.Model.fit` accepts, finite.
        y: Targets, for arrays.
        loss: A loss as in `keras.Model.compile`, if not the one that the model was
            compiled with. It must be convex in the outputs.
        sample_weight: Sample weights of shape `(n,)`, for arrays. They and the loss's
            reduction define the objective: the weighted sum, divided by `n`
            (`"sum_over_batch_size"`, Keras's default), by the sum of the weights
            (`"mean_with_sample_weight"`) or by 1 (`"sum"`).
        l2: Positive float, the weight of an L2 term: certifies the loss with this term,
            too. It penalises the change of `q` and `b`: since the gates were frozen for
            learned gates, from 0 for random ones. Needs an `AlignedModel` that
            exploits. The trunk computes features in its own dtype, all that follows is
            in float64.
        gradient_bound: Whether to bound the loss by its gradient, too, in float64. For
            outputs `f`, their Jacobian `J` in the parameters and the gradient `g` of
            the loss in the outputs, any outputs `F* = f + J delta + e` have
            `L(f) - L(F*) <= <g, f - F*> = -<J^T g, delta> - <g, e> <=
            ||J^T g|| ||delta|| + ||g|| ||e||`, by convexity and Cauchy-Schwarz. So the
            bound holds for every Keras model and any set of its parameters. It reads
            the data several times, and holds the outputs of all samples. For a head on
            more than 1,500 samples, and for parameters without structure, it takes
            some 300 products with the Jacobian.
        parameters: The parameters that the gradient bound differentiates by. Any set is
            valid: `"head"`, `"last"` (the output layer), `"all"` or a list of the
            model's variables. The default is the head of an `AlignedModel` that
            exploits, and the output layer of any other model.
        batch_size: Samples per prediction, for arrays.
        steps: Number of batches to read; a generator needs it.

    Returns:
        The certificate.

    Raises:
        MemoryError: If the bound of a quadratic head does not fit into memory.
        ValueError: If the loss is not convex or not given; if the model has several
            outputs or ends in a softmax or sigmoid; if inputs, targets, weights or
            outputs are missing, non-finite, out of range or of the wrong shape; if the
            model does not exploit (with `l2`) or does not have `parameters`; or if the
            data change between passes.
        RuntimeError: If the loss is below its lower bound by more than rounding.

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
    l2_bound = None if l2 is None else L2Bound(model, convex, l2)
    if gradient_bound and not data.is_arrays(x) and isinstance(x, Iterator):
        raise ValueError(
            "The gradient bound reads `x` several times, and a generator can be "
            "read once only. Pass arrays, a `tf.data.Dataset` or a "
            f"`keras.utils.PyDataset`. Received: x of type {type(x).__name__}"
        )
    if parameters is not None and not gradient_bound:
        raise ValueError(
            "`parameters` is for the gradient bound: pass "
            f"gradient_bound=True, too. Received: parameters={parameters!r}"
        )
    parts = quadratic_parts(model)
    quadratic = None if parts is None else QuadraticTally(*parts, convex)
    tally = LossTally(convex, keep=gradient_bound)
    predictor = BatchPredictor(model)
    for x_batch, y_batch, w_batch in data.batches(
        x, y, sample_weight, batch_size=batch_size, steps=steps, model=model
    ):
        check_targets(y_batch)
        # Checks the inputs, too: with NaN in them, the model's error would be unclear.
        names = digests(x_batch)
        inputs = x_batch
        if l2_bound is not None:
            features = l2_bound.features(x_batch)
            l2_bound.add(features, y_batch, w_batch)
            inputs = as_inputs(features)
        tally.add(names, predictor.outputs(inputs), y_batch, w_batch)
        if quadratic is not None:
            quadratic.add(x_batch, y_batch, w_batch)
    certificate = _with_l2(tally, l2_bound)
    if quadratic is not None:
        found = quadratic.bound(tally.normalizer, certificate.lower_bound)
        certificate = dataclasses.replace(certificate, quadratic_bound=found)
    if gradient_bound:
        bound = _bound_by_gradient(
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
    """Certifies the samples whose features were kept, without computing the trunk.

    Args:
        model: The model that made the features, exploiting.
        features: All of them, with the digests of the inputs.
        loss: The loss.
        l2: As for `certify`.
        problem: The head's problem on these features, for `l2`; None to set it up batch
            by batch.
        batch_size: Samples per prediction.

    Returns:
        The certificate that `certify` gives for the same samples.

    Raises:
        ValueError: If the features have no digests or targets, or as `certify`.
    """
    if features.digests is None or features.y is None:
        raise ValueError(
            "A certificate needs the digests of the inputs and the targets. Received: "
            "features without them. Keep them: FeaturePass(model, keep=True, "
            "digest=True)."
        )
    l2_bound = None if l2 is None else L2Bound(model, loss, l2)
    tally = LossTally(loss, keep=False)
    predictor = BatchPredictor(model)
    kept = (features.z, features.y, features.sample_weight)
    for start in range(0, len(features.digests), batch_size):
        rows = slice(start, start + batch_size)
        z, y, weights = keras.tree.map_structure(
            lambda leaf, rows=rows: None if leaf is None else leaf[rows], kept
        )
        tally.add(features.digests[rows], predictor.outputs(as_inputs(z)), y, weights)
        if l2_bound is not None and problem is None:
            l2_bound.add(z, y, weights)
    if l2_bound is not None and problem is not None:
        l2_bound.add_problem(problem)
    return _with_l2(tally, l2_bound)


def _with_l2(tally: LossTally, l2_bound: L2Bound | None) -> Certificate:
    """The certificate of the loss, with that of the L2 term where one is given."""
    certificate = tally.certificate()
    if l2_bound is None:
        return certificate
    value, gap = l2_bound.value_and_gap(tally.normalizer)
    return dataclasses.replace(certificate, l2=l2_bound.l2, l2_loss=value, l2_gap=gap)


def _bound_by_gradient(
    model: keras.Model,
    x: Any,
    tally: LossTally,
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
        # The Jacobian read the stream between the tally and this pass. If these two
        # agree, it read the same samples in the same order.
        again = PassRecord()
        for x_batch, y_batch, w_batch in data.batches(x, **reading):
            names = digests(x_batch)
            labels = loss.targets(single_array(y_batch, "y"), targets.shape[1])
            again.add(names, labels, sample_weights(w_batch, len(names)))
        tally.record.check_same(again)
    described = parameters
    if not isinstance(parameters, str):
        described = ", ".join(variable.path for variable in operator.variables)
    return gradient_bounds.gradient_bound(
        operator, loss, targets, weights, groups, lower_bound, parameters=described
    )
