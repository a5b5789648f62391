"""One training run of two phases, which callbacks see as one `fit`."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

from keras_dalign.head.alignment_head import EXPLOITING
from keras_dalign.head.features import (
    DISK,
    FeaturePass,
    FeatureSet,
    as_inputs,
    plan_cache,
)
from keras_dalign.head.objective import checked_weights
from keras_dalign.numerics.arguments import integer, number
from keras_dalign.numerics.keras_losses import convex_loss
from keras_dalign.solving.head_solver import HeadSolver, first_width
from keras_dalign.solving.options import VALIDATION, SolveOptions
from keras_dalign.training.file_batches import file_batches, needs_file_batches
from keras_dalign.training.processes import check_batches, check_processes
from keras_dalign.training.run_callbacks import RunCallbacks
from keras_dalign.training.solver_logs import solver_logs
from keras_dalign.training.switch import switch
from keras_dalign.training.training_data import (
    EXPLOIT,
    TrainingData,
    class_weighted,
    given_as,
    split_for_validation,
)
from keras_dalign.training.validation import Validation, as_validation_data

if TYPE_CHECKING:
    from keras_dalign.solving.minimum import Iterate
    from keras_dalign.training.aligned_model import AlignedModel

logger = logging.getLogger("keras_dalign")

# Arguments of `fit` that are positive ints or None.
_SIZES = (
    "batch_size",
    "steps_per_epoch",
    "validation_batch_size",
    "validation_steps",
)


class TrainingRun:
    """Explores, switches and exploits with two loops of Keras's `fit`.

    The phases train different variables on different inputs, so each has its loop, its
    compiled step and its optimizer. They share the callbacks, the history and the count
    of epochs.

    Args:
        model: The `AlignedModel`, compiled with `DAlign`.
        keras_fit: `keras.Model.fit`, bound to the model.
        x, y, sample_weight: Training data, as in Keras.
        exploit_data: The data of exploitation, if they differ; see `AlignedModel.fit`.
        validation_split: Float, as in Keras.
        validation_data: As in Keras.
        callbacks: As in Keras.
        epochs: Int, last epoch of the whole run.
        initial_epoch: Int, epoch to start at.
        **arguments: Further arguments of `fit`, which both loops get.
    """

    def __init__(
        self,
        model: AlignedModel,
        keras_fit: Callable[..., Any],
        x: Any,
        y: Any,
        sample_weight: Any,
        *,
        exploit_data: Any = None,
        validation_split: float,
        validation_data: Any,
        callbacks: Any,
        epochs: int,
        initial_epoch: int,
        **arguments: Any,
    ) -> None:
        integer("epochs", epochs)
        integer("initial_epoch", initial_epoch, 0)
        for name in _SIZES:
            if arguments[name] is not None:
                integer(name, arguments[name])
        self.model = model
        self.keras_fit = keras_fit
        self.epochs = epochs
        self.initial_epoch = initial_epoch
        self.arguments = arguments
        self.batch_size = arguments["batch_size"] or 32
        # Inference keeps two or three activations where training keeps all of them, so
        # a batch four times as large fits, and its statistics are more exact.
        self.pass_batch_size = 4 * self.batch_size
        self.loss = convex_loss(model.loss)
        self.switch_epoch = self._switch_epoch()
        steps = arguments["steps_per_epoch"]
        number(
            "validation_split",
            validation_split,
            "from 0 to below 1",
            lambda v: 0 <= v < 1,
        )
        self.explored = TrainingData(x, y, sample_weight, steps)
        if validation_split and validation_data is None:
            self.explored.check(model, self.loss)
            x, y, sample_weight, validation_data = split_for_validation(
                x, y, sample_weight, validation_split, exploit_data
            )
            self.explored = TrainingData(x, y, sample_weight, steps)
        self.exploited = self.explored
        if exploit_data is not None:
            self.exploited = given_as(EXPLOIT, exploit_data)
        self.options = SolveOptions.from_dict(model.optimizer.solve_options)
        if self.options.judge == VALIDATION and validation_data is None:
            raise ValueError(
                "solve_options={'judge': 'validation'} needs samples for validation. "
                "Received: neither `validation_data` nor `validation_split`. Pass one, "
                "or leave `judge` out."
            )
        for each in dict.fromkeys((self.explored, self.exploited)):
            each.check(model, self.loss)
            each.check_number(model.head)
            if model.optimizer.solves and each.n is not None:
                checked_weights(each.sample_weight, each.n)
            check_processes(
                model,
                each.x,
                each.y,
                each.sample_weight,
                {"epochs": epochs, "batch_size": self.batch_size, "steps": steps},
            )
        self.validation: Validation | None = None
        if validation_data is not None:
            self.validation = Validation(
                model,
                validation_data,
                batch_size=arguments["validation_batch_size"] or self.batch_size,
                steps=arguments["validation_steps"],
                frequency=arguments["validation_freq"],
            )
        self._check_batches()
        if self.validation is not None:
            self.validation = self.validation.checked(self.loss)
        shared = self.exploited is self.explored
        self.explored = self.explored.nonempty()
        self.exploited = self.explored if shared else self.exploited.nonempty()
        self.callbacks = RunCallbacks(
            model,
            callbacks,
            verbose=arguments["verbose"],
            epochs=epochs,
            steps=self.explored.n_batches(self.batch_size),
        )

    def train(self) -> keras.callbacks.History:
        """Runs the remaining epochs and returns the history."""
        model = self.model
        model.optimizer.finished_epochs = 0
        self.callbacks.begin()
        # A callback such as BackupAndRestore may have resumed a run, in any phase.
        epoch = model._initial_epoch or self.initial_epoch
        model._initial_epoch = None
        if self.callbacks.resumes:
            # It writes the epoch after the weights, and may be killed in between.
            epoch = max(epoch, model.optimizer.finished_epochs)
        if model.phase != EXPLOITING:
            stopped = epoch < self.switch_epoch and self._explore(epoch)
            epoch = max(epoch, self.switch_epoch)
        else:
            stopped = False
        if model.optimizer.solves and not stopped:
            epoch = self._solve(epoch)
        # The solver may have fallen back to training steps.
        if not model.optimizer.solves and epoch < self.epochs and not stopped:
            self._exploit(epoch)
        self.callbacks.end()
        return model.history

    def _explore(self, epoch: int) -> bool:
        """Trains the whole model; True if a callback stopped the training."""
        self.keras_fit(
            self.explored.x,
            self.explored.y,
            sample_weight=self.explored.sample_weight,
            validation_data=None if self.validation is None else self.validation.data,
            callbacks=self.callbacks,
            epochs=self.switch_epoch,
            initial_epoch=epoch,
            **self.arguments,
        )
        return bool(self.model.stop_training)

    def _features(
        self,
        wanted: bool | str,
        digest: bool,
        width: int | None = None,
        rank_matters: bool = True,
        replace_dense: bool = False,
    ) -> FeatureSet | None:
        """The features, or None if they are not kept; switches first if need be."""
        model, exploited = self.model, self.exploited
        plan = plan_cache(model.head, exploited.n, wanted, exploited.is_array)
        self._say(plan.reason)
        passes: dict[str, Any] = {
            "batch_size": self.pass_batch_size,
            "steps": None if exploited.is_array else exploited.steps,
        }
        if model.phase != EXPLOITING:
            report, features = switch(
                model,
                exploited.x,
                exploited.y,
                exploited.sample_weight,
                noise=model.optimizer.noise,
                average=model.optimizer.weight_average,
                width=width,
                rank_matters=rank_matters,
                replace_dense=replace_dense,
                keep_features=plan.keep,
                digest=digest,
                **passes,
            )
            self._say(str(report))
            self._warn_if_too_many(report.n_samples)
            return features
        if not plan.keep:
            return None
        everything = FeaturePass(model, keep=plan.keep, digest=digest)
        return everything.run(
            exploited.x, exploited.y, exploited.sample_weight, **passes
        ).feature_set()

    def _exploit(self, epoch: int) -> None:
        """Exploits with training steps, on the features where they are kept."""
        features = self._features(self.model.optimizer.cache_features, digest=False)
        arguments = dict(self.arguments)
        if features is None:
            exploited = self.exploited
            x, y, weight = exploited.x, exploited.y, exploited.sample_weight
            arguments["steps_per_epoch"] = exploited.steps
            validation_data = None if self.validation is None else self.validation.data
        else:
            x, y = as_inputs(features.z), features.y
            weight = features.sample_weight
            validation_data = self._validation_with_features()
            if not self.exploited.is_array:
                # Steps of the same size as the stream's in exploration.
                arguments["batch_size"] = features.batch_size
        with contextlib.ExitStack() as stack:
            if features is not None and needs_file_batches(features):
                x = stack.enter_context(
                    file_batches(
                        features,
                        batch_size=arguments["batch_size"],
                        steps=arguments["steps_per_epoch"],
                        shuffle=arguments["shuffle"],
                        class_weight=arguments["class_weight"],
                    )
                )
                # The batches contain these already.
                y, weight = None, None
                arguments.update(shuffle=False, class_weight=None)
            self.keras_fit(
                x,
                y,
                sample_weight=weight,
                validation_data=validation_data,
                callbacks=self.callbacks,
                epochs=self.epochs,
                initial_epoch=epoch,
                **arguments,
            )

    def _solve(self, epoch: int) -> int:
        """Exploits with the solver; each of its iterations is an epoch.

        The last epoch reports the final model, evaluated by its own outputs.

        Returns:
            The next epoch. It is `epoch` where the features could not be kept, so that
            training steps replace the solver.

        Raises:
            OSError: If the features could not be kept, and nothing may replace the
                solver.
            RuntimeError: If the switch kept no features.
        """
        model = self.model
        options = self.options
        free = first_width(model.head, options) if model.phase != EXPLOITING else None
        wanted = model.optimizer.cache_features
        try:
            features = self._features(
                DISK if wanted == DISK else True,
                digest=True,
                width=free,
                rank_matters=options.l2 == 0,
                replace_dense=options.replaces_dense(model.head.gates),
            )
        except OSError as error:
            # Reading the data may have failed, too.
            if error.errno != errno.ENOSPC or not model.optimizer.may_fall_back:
                raise
            self._fall_back(error, epoch)
            return epoch
        if features is None:
            raise RuntimeError("The switch kept no features.")
        weights = class_weighted(
            features.y, features.sample_weight, self.arguments["class_weight"]
        )
        features = dataclasses.replace(features, sample_weight=weights)
        judges = validation = None
        if options.judge == VALIDATION and self.validation is not None:
            judges = self.validation.features(self.pass_batch_size)
        if judges is None:
            validation = self._validation_with_features()
        else:
            validation = as_validation_data(judges)
        solver = HeadSolver(
            model.head,
            features,
            self.loss,
            options,
            validation=judges,
            set_width=None if free is None else model.set_width,
            say=self._say,
        )
        model.stop_training = False
        self.callbacks.on_epoch_begin(epoch)

        def end_epoch(value: float, gap: float, logits: Any) -> None:
            logs = solver_logs(model, logits, features)
            logs.update(objective=value, gap=gap)
            if self.validation is not None and self.validation.is_due(epoch):
                logs.update(self.validation.logs(validation, self.callbacks))
            self.callbacks.on_epoch_end(epoch, logs)

        def on_iterate(iterate: Iterate) -> bool:
            nonlocal epoch
            if iterate.iteration == 0:
                return False
            solver.problem.assign(model.head, iterate.theta)
            end_epoch(iterate.value, iterate.gap, iterate.logits)
            epoch += 1
            if not model.stop_training:
                self.callbacks.on_epoch_begin(epoch)
            return bool(model.stop_training)

        report = model.switch_report
        solution = solver.solve(on_iterate, None if report is None else report.rank)
        if not model.stop_training:
            end_epoch(solution.value, solution.gap, solver.own_loss.logits())
        self._say(solution.message)
        if not solution.converged and solution.reason != "stopped":
            warnings.warn(solution.message, stacklevel=4)
        return epoch

    def _fall_back(self, error: OSError, epoch: int) -> None:
        """Replaces the solver by training steps, if epochs remain."""
        model = self.model
        left = self.epochs - epoch
        if left > 0:
            with model.variable_scope():
                model.optimizer.fall_back()
            name = type(model.optimizer.exploit_optimizer).__name__
            instead = (
                f"A fresh copy of {name} trains the head for the {left} epochs that "
                "remain, without an L2 term or a certificate."
            )
        else:
            instead = (
                "No epochs remain for training steps, so the model is left exploring, "
                "with its last weights. Make room on the disk and call "
                "`keras_dalign.solve`, or explore fewer epochs."
            )
        warnings.warn(
            "The features cannot be kept, so the solver cannot exploit. "
            f"{instead} Received: {error}",
            stacklevel=5,
        )

    def _switch_epoch(self) -> int:
        """The epoch after which exploitation begins."""
        if self.model.phase == EXPLOITING:
            return 0
        optimizer = self.model.optimizer
        epoch = optimizer.exploration_epochs(self.epochs)
        none_left = isinstance(optimizer.explore, float) and epoch == self.epochs
        if none_left and not optimizer.solves:
            warnings.warn(
                "One epoch leaves none for exploitation: the model only explores. "
                f"Received: epochs={self.epochs}, explore={optimizer.explore}",
                stacklevel=4,
            )
        return int(epoch)

    def _check_batches(self) -> None:
        """Refuses batches that Keras would fail on after some epochs."""
        model = self.model
        trains = model.phase != EXPLOITING or not model.optimizer.solves
        for each in (self.explored, self.exploited):
            if trains and each.n is not None:
                check_batches(model, each.n, self.batch_size)
        validation = self.validation
        if validation is not None and validation.n is not None:
            check_batches(model, validation.n, validation.batch_size)

    def _validation_with_features(self) -> Any:
        """`validation_data` for `fit` on features, or None."""
        if self.validation is None:
            return None
        return self.validation.with_features(self.pass_batch_size)

    def _warn_if_too_many(self, n: int) -> None:
        wanted = self.model.head.n_samples
        if wanted is not None and n > wanted:
            warnings.warn(
                "The alignment head was made for fewer samples than the stream held. "
                f"Received: {n} samples, n_samples={wanted}. Its width may be too "
                f"small: align with n_samples={n}.",
                stacklevel=2,
            )

    def _say(self, text: object) -> None:
        """Logs a text, and prints it below the progress bar."""
        logger.info("%s", text)
        verbose = self.arguments["verbose"]
        if verbose and keras.config.is_interactive_logging_enabled():
            sys.stdout.write(f"{text}\n")
