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

from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.head.features import FeaturePass, FeatureSet, plan_cache
from keras_dalign.head.objective import loss_of
from keras_dalign.numerics.html_table import html_table
from keras_dalign.promises.certificate import Certificate, certify_features
from keras_dalign.solving.head_solver import HeadSolver
from keras_dalign.solving.options import SolveOptions
from keras_dalign.solving.problem import ConvexProblem
from keras_dalign.training.switch import switch

if TYPE_CHECKING:
    from keras_dalign.numerics.losses import ConvexLoss
    from keras_dalign.solving.l2_path import L2Trial
    from keras_dalign.solving.walk import Iterate
    from keras_dalign.training.aligned_model import AlignedModel

logger = logging.getLogger("keras_dalign")


@dataclasses.dataclass(frozen=True)
class SolveResult:
    """What `solve` found; prints as a sentence.

    Attributes:
        value: What was minimised, at the end: the loss with its L2 term, computed from
            the trunk's features.
        gap: Upper bound on the distance of `value` to its infimum.
        tol: The gap that was asked for.
        converged: Whether `gap <= tol`.
        certificate: `certify` of the model as it is now, in its own dtype: of the plain
            loss, and with an L2 term of the regularised loss, too.
        iterations: Number of iterations.
        evaluations: Number of gradients over all samples.
        hessian_products: Number of products with the Hessian.
        seconds: Wall time, all passes over the data included.
        method: `"lbfgs"`, `"newton"` or `"direct"`.
        why: Why this method.
        reason: Why it stopped: `"gap"`, `"stalled"` or `"max_iterations"`.
        message: How it ended, and after a failure, what to change.
        l2: Weight of the L2 term.
        path: For `l2="auto"` every weight tried; None otherwise.
        dtype: The precision in which `value` and `gap` were computed. On the way there
            products are in single precision where features are many.
    """

    value: float
    gap: float
    tol: float
    converged: bool
    certificate: Certificate
    iterations: int
    evaluations: int
    hessian_products: int
    seconds: float
    method: str
    why: str
    reason: str
    message: str
    l2: float
    path: tuple[L2Trial, ...] | None
    dtype: str = "float64"

    def to_dict(self) -> dict[str, Any]:
        """The result as a dict that `json.dumps` accepts."""
        path = None
        if self.path is not None:
            path = [dataclasses.asdict(trial) for trial in self.path]
        fields = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        return {**fields, "certificate": self.certificate.to_dict(), "path": path}

    def __str__(self) -> str:
        text = f"{self.message} ({self.seconds:.1f} s.)"
        if self.path is not None:
            text += f" {self._path_words()}"
        return f"{text} {self.certificate}"

    def _path_words(self) -> str:
        trials = "; ".join(str(trial) for trial in self.path or ())
        return f"The L2 weight was chosen on held-out samples ({trials})."

    def _repr_html_(self) -> str:
        rows = {
            "value": f"{self.value:.6g}",
            "gap": f"<b>{self.gap:.3g}</b> (asked for: {self.tol:.3g})",
            "L2 weight": f"{self.l2:.3g}",
            "method": html.escape(f"{self.method} ({self.why})"),
            "iterations": (
                f"{self.iterations} ({self.evaluations} gradients, "
                f"{self.hessian_products} Hessian products)"
            ),
            "seconds": f"{self.seconds:.1f}",
            "stopped by": html.escape(self.reason),
        }
        note = "" if self.converged else f"<p>{html.escape(self.message)}</p>"
        return f"{html_table(rows)}{note}{self.certificate._repr_html_()}"


def solve(
    model: AlignedModel,
    x: Any,
    y: Any = None,
    *,
    loss: Any = None,
    sample_weight: Any = None,
    tol: float = 1e-6,
    method: str = "auto",
    l2: float | str = 0.0,
    max_iterations: int = 1000,
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
    error the model is as it was.

    With `l2` the objective is `loss + l2 / 2 * ||change of (q, b)||^2`, where the
    change counts from the model at the switch: its optimum is unique, and certified by
    strong convexity. With little or noisy data the plain minimum costs test error that
    this one does not. `l2="auto"` follows a path of weights from strong to weak, takes
    the one with the least loss on samples held out, and refits on all samples. By
    default these are a fifth of the samples, which the trunk was trained on: an
    optimistic judge, so that the path ends at 1e-3, and of 256 features and more it
    takes the principal components that hold 95 %. With `validation_data` these are the
    judge, of all features, and it ends at 1e-7.

    Memory: the gates, `n * C * m` floats in float64 for `C` outputs of width `m`, the
    features, and no more than that again for the method. The trunk's features by
    themselves, in its own precision, go to a temporary file (in the folder that the
    environment variable `TMPDIR` names) where they take more than half of the memory
    that is free.

    Args:
        model: An `AlignedModel` in either phase.
        x: Inputs: arrays, or a stream that can be read several times.
        y: Targets, for arrays.
        loss: A loss as in `keras.Model.compile`, convex in the logits. Defaults to that
            of the model, else to that of the base model that was aligned.
        sample_weight: Sample weights `(n,)`, for arrays.
        tol: The gap to reach, positive.
        method: `"lbfgs"`, `"newton"` (by conjugate gradients), `"direct"` (for squared
            error: a Cholesky factorisation) or `"auto"`.
        l2: Non-negative weight of the L2 term, or `"auto"`.
        max_iterations: Most iterations.
        validation_data: `(x, y)`, `(x, y, sample_weight)` or a stream, for `l2="auto"`.
        reestimate_batch_norm: Whether the switch re-estimates batch-norm statistics
            over `x`.
        batch_size: Samples per batch of the trunk, for arrays.
        steps: Batches per pass, for streams that do not end.
        verbose: 0 for silence; else a line is written for each iteration.

    Returns:
        The result. Not to reach `tol` is a result, too: see `converged`, `message`.

    Raises:
        ValueError: If an argument is out of its range, the model has no alignment head,
            the loss is not known or not convex, or the data do not fit.
        OSError: If the features fit neither into memory nor on the disk.
    """
    begin = time.perf_counter()
    options = SolveOptions(tol=tol, method=method, l2=l2, max_iterations=max_iterations)
    _check(model, x, validation_data, options)
    convex = loss_of(model, loss)
    say = _Speaker(verbose)
    passes: dict[str, Any] = {"batch_size": batch_size, "steps": steps}
    before, report_before = model.get_weights(), model.switch_report
    try:
        features = _features(
            model, x, y, sample_weight, convex, reestimate_batch_norm, passes, say
        )
        problem = ConvexProblem.of_head(model.head, features, convex)
        validation = None
        if validation_data is not None:
            validation = _validation_problem(model, validation_data, convex, batch_size)
        solver = HeadSolver(
            problem, options, features.digests or [], validation, model.head.seed
        )
        say(f"solve by {solver.method}: {solver.why}")
        last = _follow(model, solver, say)
        rank = None if model.switch_report is None else model.switch_report.rank
        certificate = certify_features(
            model,
            features,
            loss=convex,
            l2=solver.l2 or None,
            problem=problem,
            batch_size=batch_size,
        )
    except Exception:
        model.set_weights(before)
        model.switch_report = report_before
        raise
    message = solver.message(last, rank)
    rounded = certificate.gap if certificate.l2_gap is None else certificate.l2_gap
    if last.gap <= tol and rounded > 2 * tol:
        message += (
            f" With the model's own weights and outputs, in {certificate.dtype}, the "
            f"gap is {rounded:.3g}."
        )
    logger.info("%s", message)
    return SolveResult(
        value=last.value,
        gap=last.gap,
        tol=float(tol),
        converged=last.gap <= tol,
        certificate=certificate,
        iterations=last.iteration,
        evaluations=last.evaluations,
        hessian_products=last.hessian_products,
        seconds=time.perf_counter() - begin,
        method=solver.method,
        why=solver.why,
        reason=last.reason or "stopped",
        message=message,
        l2=solver.l2,
        path=solver.path,
    )


def _check(model: Any, x: Any, validation_data: Any, options: SolveOptions) -> None:
    head = getattr(model, "head", None)
    if not isinstance(head, AlignmentHead) or not hasattr(model, "trunk"):
        raise ValueError(
            "`solve` needs a model with an alignment head. Received: "
            f"model={model} (of type {type(model).__name__}). Pass "
            "keras_dalign.align(model, n_samples=len(x))."
        )
    if isinstance(x, Iterator):
        raise ValueError(
            "`solve` reads the data several times, and a generator can be read once. "
            f"Received: x of type {type(x).__name__}. Pass arrays, a tf.data.Dataset, "
            "a PyDataset or a DataLoader."
        )
    if data.is_arrays(x):
        n = data.n_samples(x)
        if head.n_samples is not None and n > head.n_samples:
            raise ValueError(
                "The alignment head was made for fewer samples. Received: "
                f"{n} samples, n_samples={head.n_samples}. Call "
                f"keras_dalign.align(model, n_samples={n})."
            )
    if validation_data is not None and options.l2 != "auto":
        raise ValueError(
            "`validation_data` serves to choose the L2 weight. Received: "
            f"validation_data with l2={options.l2}. Pass l2='auto', or leave it out."
        )


def _features(
    model: AlignedModel,
    x: Any,
    y: Any,
    sample_weight: Any,
    loss: ConvexLoss,
    fresh_statistics: bool,
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
    before = model.get_weights()
    try:
        _, features = switch(
            model,
            x,
            y,
            sample_weight,
            keep_features=plan.keep,
            digest=True,
            fresh_statistics=fresh_statistics,
            **({} if noise is None else {"noise": noise}),
            **passes,
        )
    except KeyboardInterrupt:
        model.set_weights(before)
        raise
    if features is None:
        raise RuntimeError("The switch kept no features.")
    return features


def _validation_problem(
    model: AlignedModel, validation_data: Any, loss: ConvexLoss, batch_size: int
) -> ConvexProblem:
    given = validation_data
    parts = given if isinstance(given, (list, tuple)) else (given,)
    x, y, weight = keras.utils.unpack_x_y_sample_weight(tuple(parts))
    everything = FeaturePass(model, keep=True)
    features = everything.run(x, y, weight, batch_size=batch_size).feature_set()
    return ConvexProblem.of_head(model.head, features, loss)


def _follow(model: AlignedModel, solver: HeadSolver, say: _Speaker) -> Iterate:
    """Goes to the last iterate and assigns it, or the last one before Ctrl-C."""
    problem = solver.problem
    last = None
    try:
        for last in solver.iterates(problem.theta_of(model.head), watch=say):
            l2 = f" - value: {last.value:.4e}" if solver.l2 else ""
            say(
                f"iteration {last.iteration} - loss: {last.loss:.4e}{l2} - "
                f"gap: {last.gap:.4e}"
            )
    except KeyboardInterrupt:
        if last is not None:
            problem.assign(model.head, last.theta)
        raise
    if last is None:
        raise RuntimeError("The solver gave no iterate.")
    problem.assign(model.head, last.theta)
    return last


class _Speaker:
    """Writes lines, as Keras does, unless it is to be silent."""

    def __init__(self, verbose: int | str) -> None:
        self.loud = bool(verbose) and keras.config.is_interactive_logging_enabled()

    def __call__(self, line: object) -> None:
        if self.loud:
            sys.stdout.write(f"{line}\n")
