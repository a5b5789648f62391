"""One training run of two phases, which callbacks see as one `fit`."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
from keras.src.trainers.data_adapters.array_slicing import train_validation_split
from keras.src.trainers.data_adapters.data_adapter_utils import (
    class_weight_to_sample_weights,
)

from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING, PHASES
from keras_dalign.head.features import (
    DISK,
    FeaturePass,
    FeatureSet,
    as_inputs,
    plan_cache,
)
from keras_dalign.head.objective import checked_weights
from keras_dalign.numerics.arguments import integer, number, shown
from keras_dalign.numerics.losses import convex_loss
from keras_dalign.solving.head_solver import HeadSolver, first_width
from keras_dalign.solving.options import VALIDATION, SolveOptions
from keras_dalign.training.file_batches import file_batches, needs_file_batches
from keras_dalign.training.processes import check_batches, check_processes
from keras_dalign.training.switch import switch
from keras_dalign.training.training_data import (
    EXPLOIT,
    VALIDATION_DATA,
    TrainingData,
    given_as,
)

if TYPE_CHECKING:
    from keras_dalign.solving.minimum import Iterate
    from keras_dalign.training.aligned_model import AlignedModel

logger = logging.getLogger("keras_dalign")

# Logs that only epochs of the solver have.
_OF_THE_SOLVER = ("objective", "gap")


# Sizes that `fit` takes for the validation.
_OF_VALIDATION = ("validation_batch_size", "validation_steps")


class TrainingRun:
    """Explores, switches and exploits with two of Keras's own `fit` loops.

    Each phase trains other variables on other inputs, so each has a loop, a
    compiled step and an optimizer of its own; what joins them is one list of
    callbacks, one history and one count of epochs.

    Args:
        model: The `AlignedModel`, compiled with `DAlign`.
        keras_fit: `keras.Model.fit`, bound to the model.
        x, y, sample_weight: Training data, as in Keras.
        exploit_data: The data of exploitation, if they are others; see
            `AlignedModel.fit`.
        validation_split: Float, as in Keras.
        validation_data: As in Keras.
        callbacks: As in Keras.
        epochs: Int, last epoch of the whole run.
        initial_epoch: Int, epoch to start at.
        **arguments: What else both loops are given.
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
        for name in ("batch_size", "steps_per_epoch", *_OF_VALIDATION):
            if arguments[name] is not None:
                integer(name, arguments[name])
        self.model = model
        self.keras_fit = keras_fit
        self.epochs = epochs
        self.initial_epoch = initial_epoch
        self.arguments = arguments
        self.batch_size = arguments["batch_size"] or 32
        self.loss = convex_loss(model.loss)
        self.switch_epoch = self._switch_epoch()
        steps = arguments["steps_per_epoch"]
        number("validation_split", validation_split, "from 0 to below 1", _is_share)
        self.explored = TrainingData(x, y, sample_weight, steps)
        if validation_split and validation_data is None:
            self.explored.check(model, self.loss)
            x, y, sample_weight, validation_data = _split(
                x, y, sample_weight, validation_split, exploit_data
            )
            self.explored = TrainingData(x, y, sample_weight, steps)
        self.exploited = self.explored
        if exploit_data is not None:
            self.exploited = given_as(EXPLOIT, exploit_data)
        self.validation_data = validation_data
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
        self._check_batches()
        if validation_data is not None:
            validation = given_as(
                VALIDATION_DATA,
                validation_data,
                arguments["validation_steps"],
                "validation_steps",
            )
            validation.check(model, self.loss)
            if not validation.is_array:
                self.validation_data = validation.begun().x
        shared = self.exploited is self.explored
        self.explored = self.explored.begun()
        self.exploited = self.explored if shared else self.exploited.begun()
        self.callbacks = _OneRun(
            model,
            callbacks,
            verbose=arguments["verbose"],
            epochs=epochs,
            steps=self._steps_per_epoch(),
        )

    def train(self) -> keras.callbacks.History:
        """Runs what is left of the run and returns the history."""
        model = self.model
        model.optimizer.finished_epochs = 0
        self.callbacks.begin()
        # A callback such as BackupAndRestore may have resumed a run, in any phase.
        epoch = model._initial_epoch or self.initial_epoch
        model._initial_epoch = None
        if self.callbacks.resume:
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
            validation_data=self.validation_data,
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
        """The features, if they are to be kept; switches first if that is to come."""
        model, exploited = self.model, self.exploited
        plan = plan_cache(model.head, exploited.n, wanted, exploited.is_array)
        self._say(plan.reason)
        # Inference holds two or three activations where training holds all, so a
        # batch four times as large fits, and its statistics are more exact.
        passes: dict[str, Any] = {
            "batch_size": 4 * self.batch_size,
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
        features = self._features(self.model.optimizer.cache_features, digest=False)
        arguments = dict(self.arguments)
        if features is None:
            exploited = self.exploited
            x, y, weight = exploited.x, exploited.y, exploited.sample_weight
            arguments["steps_per_epoch"] = exploited.steps
            validation_data = self.validation_data
        else:
            x, y = as_inputs(features.z), features.y
            weight = features.sample_weight
            validation_data = self._validation_features()
            if not self.exploited.is_array:
                # Steps of the size that the stream took in exploration.
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
                # What the batches bring, `fit` is not asked for.
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

        The last epoch is that of the model as it is left, measured by its own outputs.

        Returns:
            The epoch that comes next: `epoch` where the features could not be kept, so
            that training steps take the solver's place.

        Raises:
            OSError: If they could not be kept, and nothing may take its place.
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
            # The data may fail to be read, too.
            if error.errno != errno.ENOSPC or not model.optimizer.may_fall_back:
                raise
            self._fall_back(error, epoch)
            return epoch
        if features is None:
            raise RuntimeError("The switch kept no features.")
        weights = self._class_weighted(features)
        features = dataclasses.replace(features, sample_weight=weights)
        judges = validation = None
        if options.judge == VALIDATION:
            judges = self._feature_set_of_validation()
        if judges is None:
            validation = self._validation_features()
        else:
            validation = keras.utils.pack_x_y_sample_weight(
                as_inputs(judges.z), judges.y, judges.sample_weight
            )
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
            logs = self._solver_logs(logits, features)
            logs.update(objective=value, gap=gap)
            if validation is not None and self._validates(epoch):
                logs.update(self._validation_logs(validation))
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
        """Makes training steps take the place of the solver, if epochs remain."""
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

    def _class_weighted(self, features: FeatureSet) -> Any:
        """The sample weights, or those of the classes."""
        class_weight = self.arguments["class_weight"]
        if not class_weight:
            return features.sample_weight
        if features.sample_weight is not None:
            raise ValueError(
                "`class_weight` and the sample weights of a stream cannot be given "
                f"both. Received: class_weight={shown(class_weight)} beside them. "
                "Leave `class_weight` out."
            )
        return class_weight_to_sample_weights(features.y, class_weight)

    def _solver_logs(self, logits: Any, features: FeatureSet) -> dict[str, Any]:
        """The loss and the metrics that the model has."""
        model = self.model
        model.reset_metrics()
        weight = features.sample_weight
        convert = keras.ops.convert_to_tensor
        y, outputs = convert(features.y), convert(logits.astype("float32"))
        weight = None if weight is None else convert(weight)
        loss = model.compute_loss(None, y, outputs, weight)
        found = model.compute_metrics(None, y, outputs, weight)
        logs = {**found, "loss": loss}
        return {key: _as_number(entry) for key, entry in logs.items()}

    def _validates(self, epoch: int) -> bool:
        frequency = self.arguments["validation_freq"]
        if isinstance(frequency, int):
            return (epoch + 1) % frequency == 0
        return epoch + 1 in frequency

    def _validation_logs(self, validation: Any) -> dict[str, Any]:
        is_tuple = isinstance(validation, (list, tuple))
        x, y, weight = keras.utils.unpack_x_y_sample_weight(
            tuple(validation) if is_tuple else (validation,)
        )
        found = self.model.evaluate(
            x,
            y,
            sample_weight=weight,
            batch_size=self.arguments["validation_batch_size"] or self.batch_size,
            steps=self.arguments["validation_steps"],
            callbacks=self.callbacks,
            return_dict=True,
            verbose=0,
        )
        return {f"val_{key}": value for key, value in found.items()}

    def _switch_epoch(self) -> int:
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
        validation = self.validation_data
        if isinstance(validation, (list, tuple)) and data.is_arrays(validation[0]):
            size = self.arguments["validation_batch_size"] or self.batch_size
            check_batches(model, data.n_samples(validation[0]), size)

    def _steps_per_epoch(self) -> int | None:
        explored = self.explored
        if explored.steps is not None:
            return explored.steps
        if explored.n is not None:
            return math.ceil(explored.n / self.batch_size)
        try:
            return len(explored.x)
        except TypeError:
            return None

    def _validation_features(self) -> Any:
        """Validation data with features for inputs, where they are arrays."""
        validation = self.validation_data
        if not isinstance(validation, (list, tuple)):
            return validation
        if not data.is_arrays(validation[0]):
            return validation
        features = self._feature_set_of_validation()
        return keras.utils.pack_x_y_sample_weight(
            as_inputs(features.z), features.y, features.sample_weight
        )

    def _feature_set_of_validation(self) -> FeatureSet:
        """Features, targets and weights of the validation data."""
        given = self.validation_data
        is_tuple = isinstance(given, (list, tuple))
        x, y, weight = keras.utils.unpack_x_y_sample_weight(
            tuple(given) if is_tuple else (given,)
        )
        everything = FeaturePass(self.model, keep=True)
        steps = None if data.is_arrays(x) else self.arguments["validation_steps"]
        everything.run(x, y, weight, batch_size=4 * self.batch_size, steps=steps)
        return everything.feature_set()

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
        logger.info("%s", text)
        verbose = self.arguments["verbose"]
        if verbose and keras.config.is_interactive_logging_enabled():
            sys.stdout.write(f"{text}\n")


def _split(
    x: Any, y: Any, sample_weight: Any, fraction: float, exploit_data: Any
) -> Any:
    """Splits samples for validation off, as Keras does."""
    if not data.is_arrays(x):
        raise ValueError(
            "`validation_split` needs arrays. Received: validation_split="
            f"{fraction} with x of type {type(x).__name__}. Pass validation_data."
        )
    if exploit_data is not None:
        raise ValueError(
            "`validation_split` does not split `exploit_data`, which may hold the "
            f"samples that are split off. Received: both, validation_split={fraction}. "
            "Pass validation_data."
        )
    (x, y, sample_weight), validation_data = train_validation_split(
        (x, y, sample_weight), validation_split=fraction
    )
    return x, y, sample_weight, validation_data


def _is_share(value: float) -> bool:
    return 0 <= value < 1


def _as_number(value: Any) -> Any:
    """A float where the value is a number, as Keras's own logs have it."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


class _OneRun(keras.callbacks.CallbackList):
    """Callbacks that see one run however many loops it takes.

    The loops' own begin and end are swallowed; `begin` and `end` stand for them.
    """

    def __init__(self, model: AlignedModel, callbacks: Any, **params: Any) -> None:
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = callbacks.callbacks
        callbacks = list(keras.tree.flatten(callbacks)) if callbacks else []
        if params["verbose"] and not any(
            isinstance(known, keras.callbacks.ProgbarLogger) for known in callbacks
        ):
            callbacks.append(_ProgressBar())
        super().__init__(callbacks, add_history=True, model=model, **params)
        self._aligned_model = model
        self._last_logs: dict[str, Any] | None = None

    @property
    def resume(self) -> bool:
        """Whether one of them goes on from a backup, if there is one."""
        kind = keras.callbacks.BackupAndRestore
        return any(isinstance(callback, kind) for callback in self.callbacks)

    def begin(self) -> None:
        """The run begins."""
        super().on_train_begin()

    def end(self) -> None:
        """The run ends."""
        super().on_train_end(self._last_logs)

    def on_train_begin(self, logs: Any = None) -> None:
        """A loop begins."""

    def on_train_end(self, logs: Any = None) -> None:
        """A loop ends."""

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """An epoch ends: its logs say in which phase."""
        model = self._aligned_model
        model.optimizer.finished_epochs = epoch + 1
        self._last_logs = {**(logs or {}), "phase": PHASES.index(model.phase)}
        if model.optimizer.solves:
            # Loggers take their columns from the first epoch, where there are none.
            for name in _OF_THE_SOLVER:
                self._last_logs.setdefault(name, math.nan)
        super().on_epoch_end(epoch, self._last_logs)


class _ProgressBar(keras.callbacks.ProgbarLogger):
    """Keras's own, without the phase, which the lines between the phases tell.

    Nor is a gap shown where there is none. The solver's iterations, which have no steps
    to count, get a line each.
    """

    # As Keras's own, which it adds itself: steps need not wait for it.
    async_safe = True

    def __init__(self) -> None:
        super().__init__()
        self._solver_begin: float | None = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """An epoch begins."""
        model = self.model
        if model.phase == EXPLOITING and model.optimizer.solves:
            self._solver_begin = time.perf_counter()
        else:
            super().on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """An epoch ends."""
        shown = {key: value for key, value in (logs or {}).items() if key != "phase"}
        if self._solver_begin is None:
            for name in _OF_THE_SOLVER:
                shown.pop(name, None)
            super().on_epoch_end(epoch, shown)
            return
        seconds = time.perf_counter() - self._solver_begin
        numbers = "".join(f" - {key}: {value:.4g}" for key, value in shown.items())
        if keras.config.is_interactive_logging_enabled():
            sys.stdout.write(f"Epoch {epoch + 1} (solve) - {seconds:.2f}s{numbers}\n")
