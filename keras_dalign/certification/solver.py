"""Full-batch exploitation: minimises the convex problem of a model's head."""

from __future__ import annotations

import dataclasses
import html
import logging
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras

from keras_dalign.certification.certify import certify_features
from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.head.features import FeaturePass, FeatureSet, plan_cache
from keras_dalign.head.objective import check_targets, checked_weights, loss_of
from keras_dalign.numerics.arguments import flag, keras_model, shown
from keras_dalign.numerics.html_table import html_table
from keras_dalign.numerics.rounding import rounded
from keras_dalign.numerics.threads import in_turn
from keras_dalign.solving.head_solver import HeadSolver, first_width
from keras_dalign.solving.options import ORIGIN, TRAINING, VALIDATION, SolveOptions
from keras_dalign.training.processes import check_processes
from keras_dalign.training.switch import switch
from keras_dalign.training.training_data import VALIDATION_DATA, given_as

if TYPE_CHECKING:
    from keras_dalign.certification.certificate import Certificate
    from keras_dalign.numerics.losses import ConvexLoss
    from keras_dalign.solving.l2_path import L2Trial
    from keras_dalign.solving.minimum import Iterate
    from keras_dalign.solving.width import WidthTrial
    from keras_dalign.training.aligned_model import AlignedModel

logger = logging.getLogger("keras_dalign")


@dataclasses.dataclass(frozen=True)
class SolveResult:
    """The result of `solve`; prints as a summary in words.

    Attributes:
        value: The minimised objective, the loss with its L2 term: for the solved model,
            with weights and outputs in its own dtype.
        gap: Upper bound on the distance of `value` to its infimum.
        tol: The requested gap.
        converged: Whether `gap <= tol`, up to the rounding of the outputs.
        certificate: The certificate of the solved model, in its own dtype: for the
            plain loss, and with an L2 term for the regularised loss, too.
        iterations: Number of iterations.
        evaluations: Number of gradients over all samples.
        seconds: Wall time, including all passes over the data.
        method: `"lbfgs"` or `"direct"`.
        why: Why this method.
        reason: Why it stopped: `"gap"`, `"stalled"`, `"max_iterations"`, or
            `"rounding"` if rounding the solver's float64 weights to the dtype of the
            model made them worse.
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
        lines = [f"{self.message} ({self.seconds:.1f} s.)"]
        chosen = {
            f"L2 weight {self.l2:g}": self.path,
            f"width {self.width}": self.widths,
        }
        for name, trials in chosen.items():
            if trials is not None:
                lines.append(f"The {name} was chosen on held-out samples:")
                lines.extend(f"  {trial}" for trial in trials)
        return "\n".join([*lines, str(self.certificate)])

    def _repr_html_(self) -> str:
        rows = {
            "value": f"{self.value:.6g}",
            "gap": f"<b>{rounded(self.gap, up=True)}</b> (requested: {self.tol:.3g})",
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
    """Trains a model's head to the global minimum of its training loss, full batch.

    Works on any trained Keras model, which need not be compiled:

    ```python
    result = keras_dalign.solve(keras_dalign.align(trained, n_samples=len(x)), x, y)
    print(result)
    ```

    A model that explores is switched first: batch-norm statistics are re-estimated,
    gates set, the trunk frozen, the rank checked. The trunk's features are computed
    once. Then only the head's `q` and `b` change, starting at their current values,
    until the gap is at most `tol`. Interrupting (Ctrl-C) keeps the best weights so far.
    After an error the model is restored. The objective, computed from the model's
    outputs in its own dtype, is never higher than at the switch, and the result reports
    this value.

    By default the objective has an L2 term: `loss + l2 / 2 * ||(q, b)||^2`. At the
    switch the units then replace the output layer; one of them has a gate that is
    always open. So the term covers all of the last layer, and the optimum does not
    depend on how the output layer was trained. With `center="base"` the output layer
    stays, and the term covers what is added to it; the plain loss is then never above
    that before. For learned gates the term is 0 at the gates. The optimum is unique,
    and certified by strong convexity. The certificate also bounds the distance of the
    plain loss to its infimum. With little or noisy data, the minimum of the plain loss,
    `l2=0`, has a larger test error.

    `l2="auto"` follows a path of weights from strong to weak, takes the one with the
    least loss on held-out samples, and refits on all samples. By default a fifth of the
    samples are held out. The trunk was trained on them, so their loss is optimistic.
    Therefore the path ends at 1e-3, and of 256 features and more it uses the principal
    components with 95 % of the variance. With `validation_data` these are held out, all
    features are used, and the path ends at 1e-7. With fewer than five samples the
    weight is 1e-3.

    With an L2 term and random gates the width is chosen, too, unless `align` was given
    one. It starts at 8 gates and is doubled until the loss on the held-out samples
    falls by less than its standard error.

    Cost: one gradient takes `4 n d C m` flop for `n` samples, `d` features,
    `C` outputs and width `m`, and some 20 to 40 gradients reach a gap of 1e-6.
    Gradients of a large problem are computed in float32: by the backend on its
    accelerator, or on the devices and processes that share the model, otherwise by
    NumPy. Memory in addition to the features: the gates, `n m` numbers for gates that
    outputs share (computed block by block beyond 0.5 GiB), logits, `n C` numbers a few
    times, and some 25 vectors of the size of the parameters, `d C m`. Features that
    take more than half of the free memory go to a temporary file, in the folder that
    the environment variable `TMPDIR` names.

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
        max_iterations: The most iterations.
        center: Where the L2 term is zero for random gates, if the model explores:
            `"origin"` or `"base"`, see above.
        validation_data: `(x, y)`, `(x, y, sample_weight)` or a stream, for the choice
            of L2 weight and width.
        reestimate_batch_norm: Whether the switch re-estimates batch-norm statistics
            over `x`.
        batch_size: Samples per batch of the trunk, for arrays.
        steps: Batches per pass, for streams that do not end.
        verbose: 0 for no output; otherwise a line is written for each iteration.

    Returns:
        The result. If `tol` is not reached, `converged` is False and `message` says
        why.

    Raises:
        ValueError: If an argument is out of its range, the model has no alignment head,
            the loss is not known or not convex, the data do not fit, or several
            processes were given different arguments.
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
    held_out = None
    if validation_data is not None:
        held_out = given_as(VALIDATION_DATA, validation_data)
        held_out.check(model, convex)
    say = _LineWriter(verbose)
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
        if held_out is not None:
            everything = FeaturePass(model, keep=True)
            validation = everything.run(
                held_out.x,
                held_out.y,
                held_out.sample_weight,
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
    say: _LineWriter,
) -> FeatureSet:
    """The trunk's features, after a switch if the model explores."""
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


class _LineWriter:
    """Writes lines to standard output, as Keras does, unless `verbose` is 0."""

    def __init__(self, verbose: int | str) -> None:
        self._writes = bool(verbose) and keras.config.is_interactive_logging_enabled()

    def __call__(self, line: object) -> None:
        if self._writes:
            sys.stdout.write(f"{line}\n")
