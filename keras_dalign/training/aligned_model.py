"""The model that trains in two phases: a trunk and an alignment head.

A Keras model is one class, so this file is long: it overrides all of Keras's methods
that depend on the phase.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras

from keras_dalign import compat
from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead
from keras_dalign.head.features import as_inputs, from_inputs
from keras_dalign.head.saved_state import refuse_hdf5
from keras_dalign.numerics.arguments import rebuilding, shown
from keras_dalign.numerics.replicas import runs_on_hosts
from keras_dalign.training.dalign import DAlign
from keras_dalign.training.head_summary import head_summary
from keras_dalign.training.training_data import check_class_weight
from keras_dalign.training.training_run import TrainingRun
from keras_dalign.training.trunk import feature_shape, frozen_features, input_specs
from keras_dalign.training.whole_file import whole_file

if TYPE_CHECKING:
    from keras_dalign.training.switch import SwitchReport


@keras.saving.register_keras_serializable(package="keras_dalign")
class AlignedModel(keras.Model):
    """A trunk and an `AlignmentHead`, trained in two phases by one `fit`.

    Inputs and outputs (logits) are those of the base model. While exploring, it trains
    as any Keras model. In exploitation the trunk is a fixed function in inference mode,
    and only the head's `q` and `b` are trainable. `keras_dalign.align` makes one from a
    model; the constructor makes one from parts.

    Compiled with `DAlign`, `fit` explores, switches and exploits. Compiled with another
    optimizer, the model trains as an ordinary Keras model in its current phase.

    Args:
        trunk: A built Keras model that maps the inputs to features, shape
            `(batch, p)`, or to a pair of features (see `AlignmentHead`).
        head: The `AlignmentHead`. It is built if necessary.
        **kwargs: Keyword arguments of `keras.Model`.

    Raises:
        ValueError: If trunk or head are of the wrong kind or unbuilt.
    """

    def __init__(self, trunk: keras.Model, head: AlignmentHead, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(trunk, keras.Model) or not trunk.built:
            raise ValueError(
                "`trunk` must be a built keras.Model. Received: "
                f"trunk={shown(trunk)}. Call it once on a batch of data to build it."
            )
        if not isinstance(head, AlignmentHead):
            raise ValueError(
                f"`head` must be an AlignmentHead. Received: head={shown(head)}"
            )
        if not head.built:
            head.build(feature_shape(trunk))
        self.trunk = trunk
        self.head = head
        self.switch_report: SwitchReport | None = None
        # The base model's compiled loss, as a loss of logits; see `align`.
        self.inherited_loss: keras.losses.Loss | None = None
        self._compiled_for = (head.phase, head.generation)
        self.built = True

    def build(self, input_shape: Any = None) -> None:
        """Does nothing: trunk and head are built."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Computes the logits, shape `(batch, units)`."""
        features = from_inputs(inputs)
        if features is None:
            exploring = self.phase != EXPLOITING
            features = self.trunk(inputs, training=bool(training) and exploring)
        return self.head(features, training=training)

    @property
    def phase(self) -> str:
        """`"exploring"` or `"exploiting"`."""
        return self.head.phase

    def start_exploiting(
        self,
        noise: float = 1e-3,
        width: int | None = None,
        replace_dense: bool = False,
    ) -> None:
        """Sets the head's gates and freezes the trunk, without reading data.

        `fit` calls it, after it has re-estimated batch-norm statistics and the head's
        standardisation. Arguments as `AlignmentHead.start_exploiting`.
        """
        with self.variable_scope():
            self.head.start_exploiting(noise, width, replace_dense)
        self._update_for_phase()

    def set_width(self, width: int) -> None:
        """Draws random gates of another width; see `AlignmentHead.set_width`."""
        with self.variable_scope():
            self.head.set_width(width)
        self._update_for_phase()

    def variable_scope(self) -> Any:
        """A context to create variables in: that of TensorFlow's strategy, if any."""
        strategy = getattr(self, "distribute_strategy", None)
        return contextlib.nullcontext() if strategy is None else strategy.scope()

    def snapshot(self) -> Callable[[], None]:
        """Copies weights, phase and switch report; call the result to restore them."""
        units = {id(variable) for variable in self.head.units_variables}
        variables = [v for v in self.variables if id(v) not in units]
        values = [keras.ops.convert_to_numpy(v).copy() for v in variables]
        store: dict[str, Any] = {}
        self.head.save_own_variables(store)
        report = self.switch_report

        def restore() -> None:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
            with self.variable_scope():
                self.head.load_own_variables(store)
            self.switch_report = report
            self._update_for_phase()

        return restore

    def _update_for_phase(self) -> None:
        """Makes optimizer and compiled functions fit the head's phase and units."""
        optimizer = getattr(self, "optimizer", None)
        if isinstance(optimizer, DAlign):
            with self.variable_scope():
                optimizer.build_exploitation(self.head.exploited_variables)
            optimizer.enter(self.phase)
        compiled_for = (self.phase, self.head.generation)
        if self._compiled_for != compiled_for:
            self._compiled_for = compiled_for
            self.train_function = None
            self.test_function = None
            self.predict_function = None

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
        """Configures the model for training, as `keras.Model.compile`."""
        if isinstance(optimizer, DAlign):
            if auto_scale_loss and self.dtype_policy.name == "mixed_float16":
                optimizer.scale_losses()
            optimizer.build_exploration(self._explored_variables())
            optimizer.before_loading = self._update_for_phase
            auto_scale_loss = False
        super().compile(
            optimizer=optimizer,
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=auto_scale_loss,
        )
        self._update_for_phase()

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as it was compiled before it was saved."""
        with rebuilding(type(self).__name__):
            config = compat.of_any_backend(config)
            self.compile(**keras.saving.deserialize_keras_object(config))
            if not self.optimizer.built:
                self.optimizer.build(self.trainable_variables)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int = 1,
        *,
        exploit_data: Any = None,
    ) -> keras.callbacks.History:
        """Trains the model: explore, switch, exploit. Arguments as in Keras.

        Callbacks and `History` see one training run. The log entry `phase` is 0 while
        exploring and 1 in exploitation. A model that exploits already continues to.

        `exploit_data` are the samples of exploitation, where they differ from those of
        exploration: `(x, y)` or `(x, y, sample_weight)` of arrays, or a stream. If `x`
        is a stream that augments its samples, pass them here without augmentation.
        Otherwise exploitation uses the features of one augmented pass. The batch-norm
        statistics are re-estimated over these samples, too.

        Returns:
            The history of the whole run.

        Raises:
            ValueError: If the data are empty, non-finite, of a shape or dtype that the
                model does not take, or more than the head's `n_samples`; if a stream
                has no end or no batch; if labels do not fit the loss; if
                `class_weight` is no dict, or is given with `sample_weight`; if the
                loss is not convex in the logits; or if `exploit_data` is given to a
                model that is not compiled with `DAlign`.
            MemoryError: If the gated units do not fit into memory. The model is then
                still exploring, with its weights as before.
        """
        check_class_weight(class_weight, sample_weight)
        arguments = {
            "batch_size": batch_size,
            "verbose": verbose,
            "shuffle": shuffle,
            "class_weight": class_weight,
            "steps_per_epoch": steps_per_epoch,
            "validation_steps": validation_steps,
            "validation_batch_size": validation_batch_size,
            "validation_freq": validation_freq,
        }
        if isinstance(getattr(self, "optimizer", None), DAlign):
            run = TrainingRun(
                self,
                super().fit,
                x,
                y,
                sample_weight,
                validation_split=validation_split,
                exploit_data=exploit_data,
                validation_data=validation_data,
                callbacks=callbacks,
                epochs=epochs,
                initial_epoch=initial_epoch,
                **arguments,
            )
            return run.train()
        if exploit_data is not None:
            raise ValueError(
                "`exploit_data` is for models that are compiled with DAlign. Received: "
                f"optimizer={getattr(self, 'optimizer', None)!r}"
            )
        if data.is_arrays(x) or isinstance(x, (list, tuple)):
            # Keras's error would show the whole list.
            data.check_data(x, y, sample_weight, model=self)
        return super().fit(
            x,
            y,
            sample_weight=sample_weight,
            epochs=epochs,
            callbacks=callbacks,
            validation_split=validation_split,
            validation_data=validation_data,
            initial_epoch=initial_epoch,
            **arguments,
        )

    def train_step(self, *args: Any) -> Any:
        """One training step, in exploitation on the frozen trunk's features.

        Called with `(data)` on TensorFlow and PyTorch and with `(state, data)` on
        JAX, as Keras defines it.

        Returns:
            The logs; on JAX a pair of the logs and the new state.
        """
        *state, batch = args
        if self.phase == EXPLOITING:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
            if from_inputs(x) is None:
                # Before the differentiated part of the step, so that neither gradients
                # nor activations of the trunk are kept.
                features = frozen_features(self, x, *state)
                batch = (as_inputs(features), y, sample_weight)
        return self._reducible(super().train_step(*state, batch))

    def test_step(self, *args: Any) -> Any:
        """One step of `evaluate`; arguments and result as in `train_step`."""
        return self._reducible(super().test_step(*args))

    def _reducible(self, logs: Any) -> Any:
        """The logs of a step in a form that Keras can average over several hosts.

        Keras averages over hosts along the first axis, which scalar logs do not have.

        Returns:
            The logs; on several hosts of TensorFlow with an axis of length 1 each.
        """
        if not runs_on_hosts(getattr(self, "_distribute_strategy", None)):
            return logs
        expanded: Any = keras.tree.map_structure(
            lambda value: keras.ops.expand_dims(value, 0), logs
        )
        return expanded

    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        """Builds metrics in the scope of the strategy, on the batch of one replica.

        Keras uses the average of the replicas' batches, which fails on several hosts
        and where the batches differ in length. Keras calls this on TensorFlow only.
        """
        strategy = self._distribute_strategy
        if strategy is not None and iterator is not None:
            _, _, batches = next(iter(iterator))
            data_batch = keras.tree.map_structure(
                lambda leaf: strategy.experimental_local_results(leaf)[0], next(batches)
            )
        super()._maybe_symbolic_build(data_batch=data_batch)

    def make_train_function(self, force: bool = False) -> Any:
        """Compiles the training step of the current phase."""
        self._update_for_phase()
        return super().make_train_function(force)

    def make_test_function(self, force: bool = False) -> Any:
        """Compiles the evaluation step of the current phase."""
        self._update_for_phase()
        return super().make_test_function(force)

    def make_predict_function(self, force: bool = False) -> Any:
        """Compiles the prediction step of the current phase."""
        self._update_for_phase()
        return super().make_predict_function(force)

    def _explored_variables(self) -> list[keras.Variable]:
        """The variables that exploration trains, whatever the phase."""
        variables = self.trunk.trainable_variables + self.head.explored_variables
        # The output layer may be part of the trunk, too.
        return list({id(variable): variable for variable in variables}.values())

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """The variables that the current phase trains."""
        if self.phase == EXPLOITING:
            return self.head.exploited_variables if self.trainable else []
        return super().trainable_variables

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        """All other variables that the current phase uses.

        Inactive variables are among the `weights`, but they are no state of a step:
        JAX would pass them through every step without need.
        """
        others = self.trainable_variables + self.head.inactive_variables
        left_out = {id(v) for v in others}
        return [v for v in self.variables if id(v) not in left_out]

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """The variables that the current phase trains."""
        return self.trainable_variables

    @property
    def non_trainable_weights(self) -> list[keras.Variable]:
        """All other weights."""
        trained = {id(v) for v in self.trainable_variables}
        return [v for v in self.weights if id(v) not in trained]

    def summary(
        self,
        line_length: int | None = None,
        positions: Sequence[float] | None = None,
        print_fn: Callable[[str], Any] | None = None,
        expand_nested: bool = False,
        show_trainable: bool = False,
        layer_range: Sequence[str] | None = None,
    ) -> None:
        """Prints Keras's summary and the state of the head; arguments as in Keras."""
        super().summary(
            line_length=line_length,
            positions=positions,
            print_fn=print_fn,
            expand_nested=expand_nested,
            show_trainable=show_trainable,
            layer_range=layer_range,
        )
        (print_fn or compat.print_message)(head_summary(self))

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the model as a `.keras` file; arguments as in Keras.

        The file is whole, or the one that was there is left as it was.

        Raises:
            ValueError: If the file is to have Keras's legacy HDF5 format.
        """
        if str(filepath).endswith((".h5", ".hdf5")):
            # Before Keras truncates an existing file.
            refuse_hdf5()
        with whole_file(filepath, ".keras", args, kwargs) as path:
            super().save(path, *args, **kwargs)

    def save_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Saves all weights as a `.weights.h5` file; arguments as in Keras.

        The file is whole, or the one that was there is left as it was.
        """
        with whole_file(filepath, ".weights.h5", args, kwargs) as path:
            super().save_weights(path, *args, **kwargs)

    def export(
        self,
        filepath: Any,
        format: str = "tf_saved_model",  # noqa: A002  (Keras's name)
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Exports the model in its phase for inference; arguments as in Keras.

        Args:
            filepath: Path of the artifact.
            format: One of Keras's formats, such as `"tf_saved_model"`, `"onnx"` or
                `"litert"`. The backend decides which are available.
            verbose: Whether to print the path.
            input_signature: Shapes and dtypes of the inputs, as in Keras. Default:
                those that the trunk was built with, for any number of samples.
            **kwargs: Options of the format.

        Raises:
            ValueError: If the shapes of the inputs are not known.
        """
        if input_signature is None:
            # Keras finds the inputs only of graphs, and of models that were called.
            input_signature = [input_specs(self.trunk)]
        super().export(
            filepath,
            format=format,
            verbose=verbose,
            input_signature=input_signature,
            **kwargs,
        )

    def set_weights(self, weights: list[Any]) -> None:
        """Sets all weights and, with them, the phase and the width."""
        with self.variable_scope():
            self.head.set_weights_of(self, weights)
        self._update_for_phase()

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Loads all weights and, with them, phase and width; arguments as in Keras.

        On any error, Ctrl-C among them, the model is left as it was.

        Raises:
            ValueError: If they are those of another model; Keras and h5py raise their
                own errors for damaged files.
        """
        before = [keras.ops.convert_to_numpy(v) for v in self._optimizer_variables()]
        restore = self.snapshot()
        try:
            with self.variable_scope():
                super().load_weights(filepath, *args, **kwargs)
        except BaseException as error:
            restore()
            # New units have a new optimizer of exploitation.
            for variable, value in zip(
                self._optimizer_variables(), before, strict=True
            ):
                variable.assign(value)
            if not isinstance(error, ValueError):
                raise
            raise ValueError(
                "The weights do not fit this model, which was left as it was. "
                f"Received: '{filepath}' for a head of {self.head.units} outputs "
                f"on {self.head.dim - 1} features with {self.head.gates} gates. Align "
                f"it as it was when the weights were saved. Keras said: {error}"
            ) from error
        finally:
            self._update_for_phase()

    def _optimizer_variables(self) -> list[keras.Variable]:
        """The variables of the optimizer, with `DAlign` of both phases."""
        optimizer = getattr(self, "optimizer", None)
        if isinstance(optimizer, DAlign):
            return optimizer.all_variables
        return list(optimizer.variables) if optimizer else []

    @property
    def inputs(self) -> Any:
        """The symbolic inputs of the trunk."""
        return self.trunk.inputs

    @property
    def input_shape(self) -> Any:
        """The shape of the inputs."""
        return self.trunk.input_shape

    @property
    def output_shape(self) -> tuple[int | None, int]:
        """The shape of the logits."""
        return (None, self.head.units)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        """The shape of the logits for inputs of the given shape."""
        return self.head.compute_output_shape(
            self.trunk.compute_output_shape(input_shape)
        )

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> keras.KerasTensor:
        """Shape and dtype of the logits for symbolic inputs; arguments of `call`."""
        spec = super().compute_output_spec(*args, **kwargs)
        return keras.KerasTensor(spec.shape, self.head.output_dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild this model (its phase is among the weights)."""
        serialize = keras.saving.serialize_keras_object
        return {
            "trunk": serialize(self.trunk),
            "head": serialize(self.head),
            "name": self.name,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "inherited_loss": serialize(self.inherited_loss),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> AlignedModel:
        """Rebuilds a model from `get_config`."""
        config = dict(config)
        with rebuilding(cls.__name__):
            for key in ("trunk", "head"):
                config[key] = keras.saving.deserialize_keras_object(
                    config[key], custom_objects=custom_objects
                )
            # Files of earlier versions have none.
            loss = config.pop("inherited_loss", None)
            model = cls(**config)
            model.inherited_loss = keras.losses.get(loss)
        return model
