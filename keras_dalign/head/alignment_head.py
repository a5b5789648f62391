"""The alignment head: the layer that makes a model able to fit any labels."""

from __future__ import annotations

import math
import random
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dalign.head.pointwise_dense import PointwiseDense
from keras_dalign.numerics.rank import default_width

EXPLORING = "exploring"
EXPLOITING = "exploiting"
PHASES = (EXPLORING, EXPLOITING)
GATES = ("random", "learned")


@keras.saving.register_keras_serializable(package="keras_dalign")
class AlignmentHead(keras.layers.Layer):
    """Output layer whose exploitation problem is convex and can fit any labels.

    For a feature vector `z` of length `p` and class `c` the head computes

        f_c = a_c . z + b0_c + b_c + sum_k w_ck * s(slope * r_ck . v) * (q_ck . v)

    with `s` the logistic sigmoid and `v = [sqrt(p) * u / ||u||, 1]` the
    standardised, then normalised feature with a constant appended
    (`d = p + 1`). `w = +-1 / sqrt(width)` never changes.

    The head has two phases:

    - *exploring*. With `gates="random"` the head **is** the linear layer
      `a . z + b0`; the gated units sleep (`q = b = 0`, not even computed). With
      `gates="learned"` there is no linear layer and the gates are tied to the
      units (`r = q`), which makes every unit `t * s(slope * t)`; `q` and `b` are
      trained like any other weight.
    - *exploiting*. The gates `r` are frozen and only `q` and `b` are trained.
      The output is then linear in what is trained and the training problem is
      convex. For almost every `r` every label vector can be reached, provided
      that features are distinct and no more than `width * k` samples lie in any
      subspace of `k` dimensions (for all of them: `width * d >= n`).

    The step from the first to the second is `start_exploiting`, which
    `AlignedModel` calls at the switch. In a model of another kind, freeze everything
    else yourself (`head.dense` included), and compile the model again whenever the
    phase has changed, also by loading weights: compiled functions are of one phase.

    Memory of the forward pass for a batch of `B`: `B * units * width` numbers.

    Args:
        units: Positive int, number of outputs (classes; 1 for binary problems).
        width: Number of gated units per output. Defaults to
            `ceil(2 * n_samples / (p + 1))`.
        n_samples: Number of training samples that the head must be able to fit.
            Needed unless `width` is given.
        gates: `"random"` (gates are drawn at the switch) or `"learned"` (gates
            are the units' own weights, frozen at the switch).
        slope: Positive float, slope of the gate's sigmoid. Steep gates condition
            the exploitation problem better.
        seed: Int that determines gates, signs and noise, the same on every
            backend. Defaults to a value derived from Python's global random
            state, which is left as it was.
        dense: The `keras.layers.Dense` to take over as linear part
            (`gates="random"` only); its activation is ignored. Or a
            `PointwiseDense`, to take over a convolution. Defaults to a fresh
            `Dense`.
        output_dtype: String, dtype of the logits. Defaults to the dtype that the head
            computes in, which is a half-precision one under mixed precision.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Features `z`, shape `(batch, p)`; or a pair `[z, u]` with `u`
            of shape `(batch, ...)` the features that feed the gated units
            (flattened; `p` is then the length of `u`).
        training: Bool, whether the standardisation in front of learned gates
            uses the batch's own statistics while exploring.

    Output shape:
        `(batch, units)`.

    Raises:
        ValueError: If an argument is out of its range, or if neither `width`
            nor `n_samples` is given.

    Reference:
        - Two-phase training under the data-architecture alignment condition:
          Kawaguchi, Zhang & Deng, Neural Computation 34(4), 2022.
    """

    def __init__(
        self,
        units: int,
        width: int | None = None,
        n_samples: int | None = None,
        gates: str = "random",
        slope: float = 20.0,
        seed: int | None = None,
        dense: keras.layers.Dense | PointwiseDense | None = None,
        output_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.units = _positive_int("units", units)
        self.n_samples = (
            None if n_samples is None else _positive_int("n_samples", n_samples)
        )
        if width is None and n_samples is None:
            raise ValueError(
                "AlignmentHead must know how many training samples it has to fit. "
                "Received: n_samples=None, width=None. Pass `n_samples=len(x)`, or "
                "a `width`."
            )
        self._requested_width = None if width is None else _positive_int("width", width)
        if gates not in GATES:
            raise ValueError(f"`gates` must be one of {GATES}. Received: gates={gates}")
        self.gates = gates
        if not (_is_finite(slope) and slope > 0):
            raise ValueError(
                f"`slope` must be a positive number. Received: slope={slope}"
            )
        self.slope = float(slope)
        if gates == "learned" and dense is not None:
            raise ValueError(
                "Learned gates have no linear part to share. Received: "
                "gates='learned' together with a `dense` layer. Drop `dense`, or use "
                "gates='random'."
            )
        if not isinstance(dense, (keras.layers.Dense, PointwiseDense, type(None))):
            raise ValueError(
                "`dense` must be a keras.layers.Dense or a PointwiseDense. Received: "
                f"dense={dense}"
            )
        if dense is not None and dense.units != units:
            raise ValueError(
                "`dense` must have as many units as the head. Received: "
                f"units={units}, dense.units={dense.units}"
            )
        self.seed = _peek_seed() if seed is None else _seed(seed)
        self.dense: Any = None
        if gates == "random":
            self.dense = dense or keras.layers.Dense(
                self.units, dtype=self.dtype_policy, name="dense"
            )
        self.output_dtype = keras.backend.standardize_dtype(
            output_dtype or self.compute_dtype
        )
        # Statistics move by a tenth per batch while learned gates explore; at the
        # switch they are replaced by those of the whole training set.
        self.standardize = keras.layers.BatchNormalization(
            momentum=0.9,
            epsilon=1e-6,
            center=False,
            scale=False,
            dtype=self.dtype_policy,
            name="standardize",
        )
        self.width: Any = self._requested_width
        self._phase = EXPLORING
        # As Dense: a mask of the features is one of the logits, and of the loss.
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        """Creates the weights for features of shape `(batch, p)` or a pair."""
        linear_shape, gated_shape = _split_shapes(input_shape)
        if len(linear_shape) != 2:
            raise ValueError(
                "AlignmentHead works on feature vectors. Received: features of shape "
                f"{tuple(linear_shape)}. Pool or flatten them first."
            )
        if None in gated_shape[1:]:
            raise ValueError(
                "The features of AlignmentHead must have a known length. Received: "
                f"shape {tuple(gated_shape)}"
            )
        p = math.prod(gated_shape[1:])
        pair = isinstance(input_shape[0], (list, tuple))
        self.feature_size = p + (linear_shape[-1] if pair else 0)
        if self.width is None and self.n_samples is not None:
            self.width = default_width(self.n_samples, p + 1)
        if self.dense is not None and not self.dense.built:
            self.dense.build(linear_shape)
        self.standardize.build((None, p))
        rng = np.random.default_rng([self.seed, 0])
        shape = (p + 1, self.units, self.width)
        learned = self.gates == "learned"
        self.bias = self.add_weight(
            name="bias", shape=(self.units,), initializer="zeros", trainable=True
        )
        self.q = self.add_weight(
            name="q",
            shape=shape,
            initializer=_Values(rng.standard_normal(shape) / math.sqrt(p + 1))
            if learned
            else "zeros",
            trainable=True,
        )
        self.r = self.add_weight(
            name="r", shape=shape, initializer="zeros", trainable=False
        )
        signs = rng.choice([-1.0, 1.0], size=shape[1:])
        self.w = self.add_weight(
            name="w",
            shape=shape[1:],
            initializer=_Values(signs / math.sqrt(self.width)),
            trainable=False,
        )
        self._phase_index = self.add_weight(
            name="phase",
            shape=(),
            initializer="zeros",
            dtype="int32",
            trainable=False,
            autocast=False,
        )
        self.built = True
        self._set_trainable()

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Computes the logits, shape `(batch, units)`."""
        linear, gated = _split(inputs)
        exploring = self._phase == EXPLORING
        if exploring and self.gates == "random":
            return self._linear(linear)
        v = self.normalize(gated, training=bool(training) and exploring)
        t = _project(v, self.q)
        gate = ops.sigmoid(self.slope * (t if exploring else _project(v, self.r)))
        # Half-precision sums over a thousand units would lose the small ones.
        dtype = keras.backend.result_type(t.dtype, "float32")
        units = ops.cast(gate * t, dtype) * ops.cast(self.w, dtype)
        outputs = ops.sum(units, axis=-1) + ops.cast(self.bias, dtype)
        outputs = ops.cast(outputs, self.output_dtype)
        if self.dense is not None:
            outputs = self._linear(linear) + outputs
        return outputs

    def normalize(self, features: Any, training: bool = False) -> Any:
        """Standardises, normalises and appends the constant.

        Args:
            features: Features `u`, shape `(batch, ...)`, flattened to `(batch, p)`.
            training: Whether to standardise by the batch's own statistics.

        Returns:
            `[sqrt(p) * u / ||u||, 1]`, shape `(batch, p + 1)`.
        """
        p = self.q.shape[0] - 1
        features = ops.reshape(features, (-1, p))
        u = self.standardize(features, training=training)
        dtype = keras.backend.result_type(u.dtype, "float32")
        u = ops.cast(u, dtype)
        square = ops.sum(ops.square(u), axis=-1, keepdims=True)
        # A sample whose features are all at their mean maps to [0, ..., 0, 1].
        u = u * (math.sqrt(p) * ops.rsqrt(ops.maximum(square, 1e-12)))
        u = ops.concatenate([u, ops.ones_like(u[:, :1])], axis=-1)
        return ops.cast(u, self.compute_dtype)

    def normalize_exactly(
        self,
        features: np.ndarray,
        moments: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> np.ndarray:
        """`normalize` in NumPy float64, for rank checks and as a reference.

        Args:
            features: Array `(n, ...)`.
            moments: Mean and variance `(p,)` to standardise by; those that the head
                holds by default.

        Returns:
            Array `(n, p + 1)`, float64.
        """
        if moments is None:
            held = (self.standardize.moving_mean, self.standardize.moving_variance)
            moments = ops.convert_to_numpy(held[0]), ops.convert_to_numpy(held[1])
        mean, variance = (moment.astype("float64") for moment in moments)
        u = np.asarray(features, dtype="float64").reshape(len(features), -1)
        u = (u - mean) / np.sqrt(variance + self.standardize.epsilon)
        square = np.sum(u**2, axis=1, keepdims=True)
        u *= np.sqrt(u.shape[1] / np.maximum(square, 1e-12))
        return np.concatenate([u, np.ones((len(u), 1))], axis=1)

    def gates_of(self, output: int) -> tuple[np.ndarray, np.ndarray]:
        """Gates `(d, width)` and weights `(width,)` of one output, float64."""
        r = ops.convert_to_numpy(self.r)[:, output, :]
        w = ops.convert_to_numpy(self.w)[output]
        return r.astype("float64"), w.astype("float64")

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:  # noqa: ARG002
        """The mask of the features `z`."""
        return _split(previous_mask)[0]

    def _linear(self, z: Any) -> Any:
        if isinstance(self.dense, PointwiseDense):
            return ops.cast(self.dense(z), self.output_dtype)
        if self.dense.quantization_mode is not None:
            raise ValueError(
                "The linear part of an alignment head cannot be quantized. Received: "
                f"'{self.dense.name}' with "
                f"quantization_mode={self.dense.quantization_mode}"
            )
        # What Dense.call does, less its activation: aligned models end in logits.
        z = ops.matmul(z, self.dense.kernel)
        if self.dense.bias is not None:
            z = ops.add(z, self.dense.bias)
        return ops.cast(z, self.output_dtype)

    @property
    def phase(self) -> str:
        """`"exploring"` or `"exploiting"`."""
        return self._phase

    @property
    def exploited_variables(self) -> list[keras.Variable]:
        """The variables trained in exploitation: `q` and the bias `b`."""
        return [self.q, self.bias]

    @property
    def sleeping_variables(self) -> list[keras.Variable]:
        """The variables that the current phase does not compute with."""
        if self._phase == EXPLOITING:
            return [self._phase_index]
        if self.gates == "learned":
            return [self._phase_index, self.r]
        own = [self._phase_index, self.bias, self.q, self.r, self.w]
        return own + self.standardize.variables

    @property
    def explored_variables(self) -> list[keras.Variable]:
        """The variables trained in exploration, in Keras's order."""
        if self.dense is not None:
            return self.dense.trainable_variables
        return [self.bias, self.q] if self._trainable else []

    def start_exploiting(self, noise: float = 1e-3) -> None:
        """Sets and freezes the gates; from here on only `q` and `b` are trained.

        Random gates are drawn from N(0, I / d), and `q = b = 0`: the function
        does not change by a bit. Learned gates are set to `q` after Gaussian
        noise is added to it.

        Args:
            noise: Non-negative float, standard deviation of the noise for learned
                gates in units of `q`'s root mean square.

        Raises:
            ValueError: If the head is unbuilt or exploiting already, or if `noise` is
                negative.
        """
        if not self.built:
            raise ValueError(
                "The head is not built, so it has no gates to set. Received: a call of "
                "`start_exploiting` on an unbuilt head. Call it once on features."
            )
        if not (_is_finite(noise) and noise >= 0):
            raise ValueError(
                f"`noise` must be a non-negative number. Received: noise={noise}"
            )
        if self._phase == EXPLOITING:
            raise ValueError(
                "The head's gates are set and frozen already. Received: a call of "
                "`start_exploiting` in the phase 'exploiting'."
            )
        gates = self.gates_at_switch(noise)
        if self.gates == "random":
            self.q.assign(np.zeros(self.q.shape))
            self.bias.assign(np.zeros(self.bias.shape))
        else:
            self.q.assign(gates)
            # As q holds them, which may be rounded.
            gates = ops.convert_to_numpy(self.q)
        self.r.assign(gates)
        self._phase_index.assign(PHASES.index(EXPLOITING))
        self.sync_phase()

    def gates_at_switch(self, noise: float = 1e-3) -> np.ndarray:
        """The gates that `start_exploiting` would set now; changes nothing.

        Args:
            noise: See `start_exploiting`.

        Returns:
            Gates `r`, shape `(d, units, width)`, float64.
        """
        rng = np.random.default_rng([self.seed, 1])
        gaussian = rng.standard_normal(self.q.shape)
        if self.gates == "random":
            return gaussian / math.sqrt(self.q.shape[0])
        q = np.asarray(ops.convert_to_numpy(self.q), dtype="float64")
        return q + noise * np.sqrt(np.mean(q**2)) * gaussian

    def sync_phase(self) -> None:
        """Makes the phase that of the saved weights (after they were assigned)."""
        self._phase = PHASES[int(ops.convert_to_numpy(self._phase_index))]
        self._set_trainable()

    def _set_trainable(self) -> None:
        sleeping = self._phase == EXPLORING and self.gates == "random"
        for variable in self.exploited_variables:
            variable.trainable = self._trainable and not sleeping

    @property
    def trainable(self) -> bool:
        """Whether the head is trained at all; sleeping units never are."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.fset(self, value)
        if self.built:
            self._set_trainable()

    def get_build_config(self) -> dict[str, Any] | None:
        """The shapes that rebuild the weights, and the phase."""
        config = super().get_build_config()
        return None if config is None else {**config, "phase": self._phase}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds a head in the phase of the saved one.

        A model that is loaded builds its optimizer before it loads weights: what is
        trained must be known by then.
        """
        config = dict(config)
        phase = config.pop("phase", EXPLORING)
        super().build_from_config(config)
        if phase == EXPLOITING:
            self.start_exploiting()

    def load_own_variables(self, store: Any) -> None:
        """Loads the head's weights and, with them, its phase."""
        super().load_own_variables(store)
        self.sync_phase()

    def set_weights(self, weights: list[Any]) -> None:
        """Sets the head's weights and, with them, its phase."""
        super().set_weights(weights)
        self.sync_phase()

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        """Shape of the logits for features of the given shape."""
        return (_split_shapes(input_shape)[0][0], self.units)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> keras.KerasTensor:
        """Shape and dtype of the logits for symbolic features; arguments of `call`."""
        spec = super().compute_output_spec(*args, **kwargs)
        return keras.KerasTensor(spec.shape, self.output_dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild this head (its phase is among the weights)."""
        config = super().get_config()
        config.update(
            units=self.units,
            width=self._requested_width,
            n_samples=self.n_samples,
            gates=self.gates,
            slope=self.slope,
            seed=self.seed,
            dense=keras.saving.serialize_keras_object(self.dense),
            output_dtype=self.output_dtype,
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AlignmentHead:
        """Rebuilds a head from `get_config`."""
        config = dict(config)
        config["dense"] = keras.saving.deserialize_keras_object(config["dense"])
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_dalign")
class _Values(keras.initializers.Initializer):
    """Gives a variable values computed by NumPy: equal on every backend."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        return ops.convert_to_tensor(self.values.reshape(shape), dtype=dtype)


def _project(v: Any, weights: Any) -> Any:
    """`(batch, d)` times `(d, units, width)` gives `(batch, units, width)`."""
    d, units, width = weights.shape
    product = ops.matmul(v, ops.reshape(weights, (d, units * width)))
    return ops.reshape(product, (-1, units, width))


def _split(inputs: Any) -> tuple[Any, Any]:
    if isinstance(inputs, (list, tuple)):
        linear, gated = inputs
        return linear, gated
    return inputs, inputs


def _split_shapes(input_shape: Any) -> tuple[Any, Any]:
    if isinstance(input_shape[0], (list, tuple)):
        linear, gated = input_shape
        return linear, gated
    return input_shape, input_shape


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"`{name}` must be a positive int. Received: {name}={value}")
    if value <= 0:
        raise ValueError(f"`{name}` must be a positive int. Received: {name}={value}")
    return int(value)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float, np.number))
    return is_number and not isinstance(value, bool) and bool(np.isfinite(value))


def _seed(value: Any) -> int:
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int or value < 0:
        raise ValueError(f"`seed` must be a non-negative int. Received: seed={value}")
    return int(value)


def _peek_seed() -> int:
    """A seed that follows the global one without moving the global stream."""
    # Keras shuffles some data with Python's global generator: moving it would make
    # the exploration differ from the base model's own run.
    state = random.getstate()
    seed = random.randint(0, 2**31 - 1)  # noqa: S311  (no secret)
    random.setstate(state)
    return seed
