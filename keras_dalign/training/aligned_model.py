"""The model that trains in two phases: a trunk and an alignment head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

from keras_dalign import compat
from keras_dalign.head import data
from keras_dalign.head.alignment_head import EXPLOITING, AlignmentHead, refuse_hdf5
from keras_dalign.head.features import as_inputs, from_inputs
from keras_dalign.numerics.arguments import rebuilding, shown
from keras_dalign.numerics.replicas import runs_on_hosts
from keras_dalign.training.dalign import DAlign
from keras_dalign.training.training_data import check_class_weight
from keras_dalign.training.training_run import TrainingRun

if TYPE_CHECKING:
    from keras_dalign.training.switch import SwitchReport


@keras.saving.register_keras_serializable(package="keras_dalign")
class AlignedModel(keras.Model):
    """A trunk and an `AlignmentHead`, trained in two phases by one `fit`.

    Inputs and outputs (logits) are those of the base model. While exploring,
    training is Keras's own; in exploitation the trunk is a fixed function in
    inference mode and the only trainable variables are the head's `q` and `b`.
    `keras_dalign.align` makes one from a model; the constructor makes one from
    parts.

    Compiled with `DAlign`, `fit` explores, switches and exploits. Compiled with any
    other optimizer, the model trains as an ordinary Keras model in the phase that
    it is in.

    Args:
        trunk: A built Keras model that maps the inputs to features, shape
            `(batch, p)`, or to a pair of features (see `AlignmentHead`).
        head: The `AlignmentHead`. It is built here if it is not yet.
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
            head.build(_feature_shape(trunk))
        self.trunk = trunk
        self.head = head
        self.switch_report: SwitchReport | None = None
        # What the base model was compiled with, as a loss of logits; see `align`.
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
        """Sets the head's gates and freezes the trunk, without looking at data.

        `fit` does this, after re-estimating batch-norm statistics and the head's
        standardisation. Arguments as `AlignmentHead.start_exploiting`.
        """
        with self.variable_scope():
            self.head.start_exploiting(noise, width, replace_dense)
        self._follow_phase()

    def set_width(self, width: int) -> None:
        """Draws other random gates; see `AlignmentHead.set_width`."""
        with self.variable_scope():
            self.head.set_width(width)
        self._follow_phase()

    def variable_scope(self) -> Any:
        """Where new variables belong: on TensorFlow, to the model's strategy."""
        strategy = getattr(self, "distribute_strategy", None)
        return contextlib.nullcontext() if strategy is None else strategy.scope()

    def snapshot(self) -> Callable[[], None]:
        """Records weights, phase and switch report; call the result to restore them."""
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
            self._follow_phase()

        return restore

    def _follow_phase(self) -> None:
        """Forgets functions that were compiled in another phase or for other units."""
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
            optimizer.before_loading = self._follow_phase
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
        self._follow_phase()

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as it was compiled when saved."""
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

        Callbacks and `History` see one training run; the log entry `phase` is 0
        while exploring and 1 in exploitation. A model that exploits already goes
        on exploiting.

        `exploit_data` are the samples of exploitation, where they differ from those of
        exploration: `(x, y)` or `(x, y, sample_weight)` of arrays, or a stream. If `x`
        is a stream that augments its samples, give them without augmentation here:
        otherwise exploitation keeps the features of one augmented pass. The batch-norm
        statistics are re-estimated over them, too.

        Returns:
            The history of the whole run.

        Raises:
            ValueError: If the data are empty, non-finite, of a shape or kind that the
                model does not take, or more than the head's `n_samples`, if a stream
                has no end or no batch, if labels do not fit the loss, if
                `class_weight` is no dict or stands beside `sample_weight`, if the loss
                is not convex in the logits, or if `exploit_data` is given to a model
                that is not compiled with `DAlign`.
            MemoryError: If the gated units do not fit into memory: the model explores
                on, as it was.
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
            # Keras would put all of a list into its message.
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
        """One step: Keras's own, in exploitation on the frozen trunk's features.

        Called with `(data)` on TensorFlow and PyTorch and with `(state, data)` on
        JAX, as Keras defines it.

        Returns:
            The logs, and on JAX the new state beside them.
        """
        *state, batch = args
        if self.phase == EXPLOITING:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
            if from_inputs(x) is None:
                # Outside of the differentiated part of the step: no gradient and
                # no activation of the trunk is ever kept.
                batch = (as_inputs(self._frozen_features(x, *state)), y, sample_weight)
        return self._reducible(super().train_step(*state, batch))

    def test_step(self, *args: Any) -> Any:
        """One step of `evaluate`; arguments and result as in `train_step`."""
        return self._reducible(super().test_step(*args))

    def _reducible(self, logs: Any) -> Any:
        """Logs of a step as Keras can average them over the hosts of TensorFlow.

        It does so along an axis that the logs, which are numbers, do not have.

        Returns:
            The logs, on several hosts with an axis of length 1 each.
        """
        if not runs_on_hosts(getattr(self, "_distribute_strategy", None)):
            return logs
        expanded: Any = keras.tree.map_structure(
            lambda value: keras.ops.expand_dims(value, 0), logs
        )
        return expanded

    def _frozen_features(self, x: Any, state: Any = None) -> Any:
        if state is not None:
            variables = self.trainable_variables + self.non_trainable_variables
            values = list(state[0]) + list(state[1])
            with keras.StatelessScope(
                state_mapping=list(zip(variables, values, strict=True))
            ):
                return self.trunk(x, training=False)
        if keras.backend.backend() == "torch":
            import torch  # noqa: PLC0415  (only where it is the backend)

            with torch.no_grad():
                return self.trunk(x, training=False)
        return self.trunk(x, training=False)

    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        """Builds metrics in the scope of the strategy, on the share of one replica.

        Keras averages the shares for it, which fails where they differ in length, and
        on several hosts. Called by Keras on TensorFlow alone.
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
        self._follow_phase()
        return super().make_train_function(force)

    def make_test_function(self, force: bool = False) -> Any:
        """Compiles the evaluation step of the current phase."""
        self._follow_phase()
        return super().make_test_function(force)

    def make_predict_function(self, force: bool = False) -> Any:
        """Compiles the prediction step of the current phase."""
        self._follow_phase()
        return super().make_predict_function(force)

    def _explored_variables(self) -> list[keras.Variable]:
        """What exploration trains, also when the model exploits already."""
        variables = self.trunk.trainable_variables + self.head.explored_variables
        # The output layer may be one of the trunk's, called a second time.
        return list({id(variable): variable for variable in variables}.values())

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """What the current phase trains."""
        if self.phase == EXPLOITING:
            return self.head.exploited_variables if self.trainable else []
        return super().trainable_variables

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        """All other variables that the current phase computes with.

        Inactive variables are among the `weights`, but no state of a step: JAX would
        hand them around for nothing.
        """
        others = self.trainable_variables + self.head.inactive_variables
        left_out = {id(v) for v in others}
        return [v for v in self.variables if id(v) not in left_out]

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """What the current phase trains."""
        return self.trainable_variables

    @property
    def non_trainable_weights(self) -> list[keras.Variable]:
        """All other weights."""
        trained = {id(v) for v in self.trainable_variables}
        return [v for v in self.weights if id(v) not in trained]

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the model as a `.keras` file; arguments as in Keras.

        Raises:
            ValueError: If the file is to have Keras's legacy HDF5 format.
        """
        if str(filepath).endswith((".h5", ".hdf5")):
            # Before Keras empties a file that is there.
            refuse_hdf5()
        super().save(filepath, *args, **kwargs)

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
            format: One of Keras's formats: `"tf_saved_model"`, `"onnx"`, `"litert"`,
                ...; which of them there are depends on the backend.
            verbose: Whether to print where it was saved.
            input_signature: Shapes and dtypes of the inputs, as in Keras. Default:
                those that the trunk was built with, for any number of samples.
            **kwargs: What the format takes.

        Raises:
            ValueError: If the shapes of the inputs are not known.
        """
        if input_signature is None:
            # Keras knows the inputs of graphs, and of models that were called.
            input_signature = [self._input_specs()]
        super().export(
            filepath,
            format=format,
            verbose=verbose,
            input_signature=input_signature,
            **kwargs,
        )

    def _input_specs(self) -> Any:
        """Shapes and dtypes of the inputs, in the structure that the trunk takes."""
        trunk = self.trunk
        ends = compat.graph_ends(trunk)
        if ends is not None or compat.is_functional(trunk):
            inputs = trunk.input if ends is None else ends[0]
            return keras.tree.map_structure(
                lambda tensor: keras.InputSpec(
                    shape=(None, *tensor.shape[1:]),
                    dtype=tensor.dtype,
                    name=tensor.name,
                ),
                inputs,
            )
        shapes = list(compat.build_shapes(trunk).values())
        if len(shapes) != 1 or not compat.is_shape(shapes[0]):
            raise ValueError(
                "The shapes of the model's inputs are unknown. Received: "
                f"input_signature=None for the trunk {shown(trunk)}. Pass "
                "input_signature=[keras.InputSpec(shape=(None, ...), dtype='float32')]."
            )
        return keras.InputSpec(shape=(None, *shapes[0][1:]), dtype=trunk.input_dtype)

    def set_weights(self, weights: list[Any]) -> None:
        """Sets all weights and, with them, the phase and the width."""
        with self.variable_scope():
            self.head.set_weights_of(self, weights)
        self._follow_phase()

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Loads all weights and, with them, phase and width; arguments as in Keras.

        Raises:
            ValueError: If they are those of another model. The model is then left as it
                was, as it is after the errors of Keras and h5py for damaged files.
        """
        before = [keras.ops.convert_to_numpy(v) for v in self._optimizer_variables()]
        restore = self.snapshot()
        try:
            with self.variable_scope():
                super().load_weights(filepath, *args, **kwargs)
        except Exception as error:
            restore()
            # The optimizer of exploitation begins anew wherever units do.
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
            self._follow_phase()

    def _optimizer_variables(self) -> list[keras.Variable]:
        optimizer = getattr(self, "optimizer", None)
        if isinstance(optimizer, DAlign):
            return optimizer.all_variables
        return list(optimizer.variables) if optimizer else []

    @property
    def inputs(self) -> Any:
        """The symbolic inputs, those of the trunk."""
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


def _feature_shape(trunk: keras.Model) -> Any:
    try:
        return trunk.output_shape
    except AttributeError as error:
        raise ValueError(
            "The head cannot be built from a trunk whose output shape is unknown. "
            f"Received: trunk={shown(trunk)}. Build the head first by calling it once: "
            "`head(trunk(batch))`."
        ) from error
