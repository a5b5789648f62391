"""Full-batch exploitation: a model's head at the minimum of its convex problem."""

from __future__ import annotations

import dataclasses
import html
import logging
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras

from keras_dalign.certification.certificate import Certificate, certify_features
from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.head.features import FeaturePass, FeatureSet, plan_cache
from keras_dalign.head.objective import check_targets, checked_weights, loss_of
from keras_dalign.numerics.arguments import flag, keras_model, shown
from keras_dalign.numerics.html_table import html_table
from keras_dalign.numerics.threads import in_turn
from keras_dalign.solving.head_solver import HeadSolver, first_width
from keras_dalign.solving.options import ORIGIN, TRAINING, VALIDATION, SolveOptions
from keras_dalign.training.processes import check_processes
from keras_dalign.training.switch import switch
from keras_dalign.training.training_data import VALIDATION_DATA, given_as

if TYPE_CHECKING:
    from keras_dalign.numerics.losses import ConvexLoss
    from keras_dalign.solving.l2_path import L2Trial
    from keras_dalign.solving.minimum import Iterate
    from keras_dalign.solving.width import WidthTrial
    from keras_dalign.training.aligned_model import AlignedModel

logger = logging.getLogger("keras_dalign")


@dataclasses.dataclass(frozen=True)
class SolveResult:
    """What `solve` found; prints as a sentence.

    Attributes:
        value: What was minimised: the loss with its L2 term, of the model as it is,
            with its weights and outputs in its own dtype.
        gap: Upper bound on the distance of `value` to its infimum.
        tol: The gap that was asked for.
        converged: Whether `gap <= tol`, but for the rounding of the outputs.
        certificate: `certify` of the model as it is now, in its own dtype: of the plain
            loss, and with an L2 term of the regularised loss, too.
        iterations: Number of iterations.
        evaluations: Number of gradients over all samples.
        seconds: Wall time, all passes over the data included.
        method: `"lbfgs"` or `"direct"`.
        why: Why this method.
        reason: Why it stopped: `"gap"`, `"stalled"`, `"max_iterations"`, or
            `"rounding"` if the solver's point in float64 is better than what the dtype
            of the model can hold.
        message: How it ended, and after a failure, what to change.
        l2: Weight of the L2 term.
        path: For `l2="auto"` every weight tried; None otherwise.
        width: Number of gated units per output.
        widths: Every width tried, where the width was chosen; None otherwise.
        dtype: The dtype of the model's outputs. Their loss is summed in float64.
    """

    value: float
    gap: float
    tol: float
    converged: bool
    certificate: Certificate
    iterations: int
    evaluations: int
    seconds: float
    method: str
    why: str
    reason: str
    message: str
    l2: float
    path: tuple[L2Trial, ...] | None
    width: int
    widths: tuple[WidthTrial, ...] | None
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """The result as a dict that `json.dumps` accepts."""
        fields = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        for name in ("path", "widths"):
            if fields[name] is not None:
                fields[name] = [dataclasses.asdict(trial) for trial in fields[name]]
        return {**fields, "certificate": self.certificate.to_dict()}

    def __str__(self) -> str:
        text = f"{self.message} ({self.seconds:.1f} s.)"
        for noun, trials in (("L2 weight", self.path), ("width", self.widths)):
            if trials is not None:
                listed = "; ".join(str(trial) for trial in trials)
                text += f" The {noun} was chosen on held-out samples ({listed})."
        return f"{text} {self.certificate}"

    def _repr_html_(self) -> str:
        rows = {
            "value": f"{self.value:.6g}",
            "gap": f"<b>{self.gap:.3g}</b> (asked for: {self.tol:.3g})",
            "L2 weight": f"{self.l2:.3g}",
            "width": str(self.width),
            "method": html.escape(f"{self.method} ({self.why})"),
            "iterations": (f"{self.iterations} ({self.evaluations} gradients)"),
            "seconds": f"{self.seconds:.1f}",
            "stopped by": html.escape(self.reason),
        }
        note = "" if self.converged else f"<p>{html.escape(self.message)}</p>"
        return f"{html_table(rows)}{note}{self.certificate._repr_html_()}"


@in_turn
def solve(
    model: AlignedModel,
    x: Any,
    y: Any = None,
    *,
    loss: Any = None,
    sample_weight: Any = None,
    tol: float = 1e-6,
    method: str = "auto",
    l2: float | str = "auto",
    max_iterations: int = 1000,
    center: str = ORIGIN,
    validation_data: Any = None,
    reestimate_batch_norm: bool = True,
    batch_size: int = 256,
    steps: int | None = None,
    verbose: int | str = "auto",
) -> SolveResult:
    """Takes a model's head to the global minimum of its training loss, full batch.

    Works on any trained Keras model, with nothing to compile:

    ```python
    result = keras_dalign.solve(keras_dalign.align(trained, n_samples=len(x)), x, y)
    print(result)
    ```

    A model that explores is switched first: batch-norm statistics are re-estimated,
    gates set, the trunk frozen, the rank checked. The trunk's features are computed
    once. From there only the head's `q` and `b` change, from where they are, until the
    gap is at most `tol`. Interrupting (Ctrl-C) keeps the best weights so far; after an
    error the model is as it was. What is minimised is never higher than at the switch,
    by the model's own outputs in its own dtype, and the result speaks of those.

    By default an L2 term is minimised, too: the objective is
    `loss + l2 / 2 * ||(q, b)||^2`. At the switch the units then replace the output
    layer, with one whose gate is always open among them, so that the term holds all of
    the last layer and the optimum does not depend on how the output layer was trained.
    With `center="base"` it stays as it is, and the term holds what is added to it: the
    plain loss is then never above that before. (For learned gates the term counts from
    the gates.) The optimum is unique, and certified by strong convexity; the
    certificate says as well how far the plain loss is from its own infimum. With little
    or noisy data the minimum of the plain loss, `l2=0`, costs test error that this one
    does not. `l2="auto"` follows a path of weights from strong to weak, takes
    the one with the least loss on samples held out, and refits on all samples. By
    default these are a fifth of the samples, which the trunk was trained on: an
    optimistic judge, so that the path ends at 1e-3, and of 256 features and more it
    takes the principal components that hold 95 %. With `validation_data` these are the
    judge, of all features, and it ends at 1e-7. With fewer than five samples the weight
    is 1e-3.

    With an L2 term and random gates the width is chosen, too, unless `align` was given
    one: it starts at 8 gates and is doubled until the loss of the samples held out
    falls by less than its standard error.

    Cost: one gradient takes `4 n d C m` flop for `n` samples, `d` features,
    `C` outputs and width `m`, and some 20 to 40 gradients reach a gap of 1e-6. Those of
    a large problem are computed in float32: by the backend on its accelerator, or on
    the devices and processes that share the model, otherwise by NumPy. Memory
    beside the features: the gates, `n m` numbers for gates that outputs share (computed
    block by block beyond 0.5 GiB), logits, `n C` numbers a few times, and some 25
    vectors of the size of the parameters, `d C m`. The features go to a temporary file
    (in the folder that the environment variable `TMPDIR` names) where they take more
    than half of the memory that is free.

    Args:
        model: An `AlignedModel` in either phase.
        x: Inputs: arrays, or a stream that can be read several times.
        y: Targets, for arrays.
        loss: A loss as in `keras.Model.compile`, convex in the logits. Defaults to that
            of the model, else to that of the base model that was aligned.
        sample_weight: Sample weights `(n,)`, for arrays.
        tol: The gap to reach, positive.
        method: `"lbfgs"`, `"direct"` (for squared error: a factorisation of the `n x n`
            Gram matrix) or `"auto"`.
        l2: Non-negative weight of the L2 term, or `"auto"`. 0 minimises the plain
            loss.
        max_iterations: Most iterations.
        center: Where the L2 term is zero for random gates, if the model explores:
            `"origin"` or `"base"`, see above.
        validation_data: `(x, y)`, `(x, y, sample_weight)` or a stream, for the choice
            of L2 weight and width.
        reestimate_batch_norm: Whether the switch re-estimates batch-norm statistics
            over `x`.
        batch_size: Samples per batch of the trunk, for arrays.
        steps: Batches per pass, for streams that do not end.
        verbose: 0 for silence; else a line is written for each iteration.

    Returns:
        The result. Not to reach `tol` is a result, too: see `converged`, `message`.

    Raises:
        ValueError: If an argument is out of its range, the model has no alignment head,
            the loss is not known or not convex, the data do not fit, or several
            processes were given different things.
        OSError: If the features fit neither into memory nor on the disk.
    """
    begin = time.perf_counter()
    options = SolveOptions(
        tol=tol,
        method=method,
        l2=l2,
        max_iterations=max_iterations,
        judge=TRAINING if validation_data is None else VALIDATION,
        center=center,
    )
    _check(model, x)
    flag("reestimate_batch_norm", reestimate_batch_norm)
    convex = loss_of(model, loss)
    check_processes(
        model,
        x,
        y,
        sample_weight,
        {**dataclasses.asdict(options), "batch_size": batch_size, "steps": steps},
    )
    data.check_data(
        x, y, sample_weight, batch_size=batch_size, steps=steps, model=model
    )
    if data.is_arrays(x):
        check_targets(y)
        checked_weights(sample_weight, data.n_samples(x))
    judges = None
    if validation_data is not None:
        judges = given_as(VALIDATION_DATA, validation_data)
        judges.check(model, convex)
    say = _Speaker(verbose)
    passes: dict[str, Any] = {"batch_size": batch_size, "steps": steps}
    restore = model.snapshot()
    try:
        free = first_width(model.head, options) if model.phase != EXPLOITING else None
        features = _features(
            model,
            x,
            y,
            sample_weight,
            convex,
            {
                "fresh_statistics": reestimate_batch_norm,
                "width": free,
                "rank_matters": options.l2 == 0,
                "replace_dense": options.replaces_dense(model.head.gates),
            },
            passes,
            say,
        )
        validation = None
        if judges is not None:
            everything = FeaturePass(model, keep=True)
            validation = everything.run(
                judges.x,
                judges.y,
                judges.sample_weight,
                batch_size=batch_size,
                name=VALIDATION_DATA,
            ).feature_set()
        solver = HeadSolver(
            model.head,
            features,
            convex,
            options,
            validation=validation,
            set_width=None if free is None else model.set_width,
            say=say,
        )
        say(f"solve by {solver.method}: {solver.why}")
        report = model.switch_report
        solution = solver.solve(
            on_iterate=lambda iterate: say(_progress(iterate, solver.l2)),
            rank=None if report is None else report.rank,
        )
        say(_progress(solution.last, solver.l2))
        certificate = certify_features(
            model,
            features,
            loss=convex,
            l2=solver.l2 or None,
            problem=solver.problem,
            batch_size=batch_size,
        )
    except Exception:
        restore()
        raise
    logger.info("%s", solution.message)
    return SolveResult(
        value=solution.value,
        gap=solution.gap,
        tol=float(tol),
        converged=solution.converged,
        certificate=certificate,
        iterations=solution.last.iteration,
        evaluations=solution.last.evaluations,
        seconds=time.perf_counter() - begin,
        method=solver.method,
        why=solver.why,
        reason=solution.reason,
        message=solution.message,
        l2=solver.l2,
        path=solution.path,
        width=solver.problem.width,
        widths=solution.widths,
        dtype=model.head.output_dtype,
    )


def _progress(iterate: Iterate, l2: float) -> str:
    value = f" - value: {iterate.value:.4e}" if l2 else ""
    return (
        f"iteration {iterate.iteration} - loss: {iterate.loss:.4e}{value} - "
        f"gap: {iterate.gap:.4e}"
    )


def _check(model: Any, x: Any) -> None:
    keras_model(model)
    head = getattr(model, "head", None)
    if not isinstance(head, AlignmentHead) or not hasattr(model, "trunk"):
        raise ValueError(
            "`solve` needs a `model` with an alignment head. Received: "
            f"model={shown(model)} (of type {type(model).__name__}). Pass "
            "keras_dalign.align(model, n_samples=len(x))."
        )
    if isinstance(x, Iterator):
        raise ValueError(
            "`solve` reads `x` several times, and a generator can be read once. "
            f"Received: x of type {type(x).__name__}. Pass arrays, a tf.data.Dataset, "
            "a PyDataset or a DataLoader."
        )
    if data.is_arrays(x):
        n = data.n_samples(x)
        if head.n_samples is not None and n > head.n_samples:
            raise ValueError(
                "The alignment head was made for fewer samples than `x` has. Received: "
                f"{n} samples, n_samples={head.n_samples}. Call "
                f"keras_dalign.align(model, n_samples={n})."
            )


def _features(
    model: AlignedModel,
    x: Any,
    y: Any,
    sample_weight: Any,
    loss: ConvexLoss,
    switching: dict[str, Any],
    passes: dict[str, Any],
    say: _Speaker,
) -> FeatureSet:
    """The trunk's features, after the switch."""
    if y is not None:
        loss.targets(keras.ops.convert_to_numpy(y), model.head.units)
    is_array = data.is_arrays(x)
    n = data.n_samples(x) if is_array else None
    plan = plan_cache(model.head, n, True, is_array)
    say(plan.reason)
    if model.phase == EXPLOITING:
        everything = FeaturePass(model, keep=plan.keep, digest=True)
        return everything.run(x, y, sample_weight, **passes).feature_set()
    noise = getattr(getattr(model, "optimizer", None), "noise", None)
    _, features = switch(
        model,
        x,
        y,
        sample_weight,
        keep_features=plan.keep,
        digest=True,
        **switching,
        **({} if noise is None else {"noise": noise}),
        **passes,
    )
    if features is None:
        raise RuntimeError("The switch kept no features.")
    return features


class _Speaker:
    """Writes lines, as Keras does, unless it is to be silent."""

    def __init__(self, verbose: int | str) -> None:
        self.loud = bool(verbose) and keras.config.is_interactive_logging_enabled()

    def __call__(self, line: object) -> None:
        if self.loud:
            sys.stdout.write(f"{line}\n")
