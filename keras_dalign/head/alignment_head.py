"""The alignment head: the layer that makes a model able to fit any labels."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dalign import compat
from keras_dalign.head.pointwise_dense import PointwiseDense
from keras_dalign.numerics.arguments import (
    choice,
    flag,
    integer,
    number,
    rebuilding,
    seed_or_peeked,
    shown,
)
from keras_dalign.numerics.memory import free_gib
from keras_dalign.numerics.rank import default_width

EXPLORING = "exploring"
EXPLOITING = "exploiting"
PHASES = (EXPLORING, EXPLOITING)
# What the saved index of the phase says beside it: that gated units take the place of
# the output layer.
_REPLACED = 2
# Where the sigmoid of an always-open gate is 1 in every dtype.
_OPEN = 40.0
GATES = ("random", "learned")

# The variables of the gated units.
_UNITS = ("bias", "q", "r", "w")
# The head's own variables in the order of Keras: trainable ones first.
_OWN = ("bias", "q", "phase_index", "r", "w")
# Rows that are converted to float64 at once.
_ROWS_AT_ONCE = 8192

_ATTRIBUTES = {"phase_index": "_phase_index"}


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
      `a . z + b0`; there are no gated units yet. With `gates="learned"` there is no
      linear layer and the gates are tied to the units (`r = q`), which makes every
      unit `t * s(slope * t)`; `q` and `b` are trained like any other weight.
    - *exploiting*. The gates `r` are frozen and only `q` and `b` are trained.
      The output is then linear in what is trained and the training problem is
      convex. With `replace_dense` the units take the place of the linear layer
      (`a = b0 = 0`), and the first gate is always open (`s = w = 1`): a linear layer
      on `v`, which is trained, too. An L2 term then holds all of the last layer.

    The step from the first to the second is `start_exploiting`, which
    `AlignedModel` calls at the switch. In a model of another kind, freeze everything
    else yourself (`head.dense` included), and compile the model again whenever the
    phase has changed, also by loading weights: compiled functions are of one phase.

    What is promised depends on the number of gated units, `width`:

    - *Any labels can be fitted.* For almost every `r` every label vector is reached
      if features are distinct, no more than `width * k` samples lie in any subspace of
      `k` dimensions (for all of them: `width * d >= n`), and every sample has an open
      gate. The default width, `numerics.rank.default_width`, gives this promise, and
      exploitation without an L2 term needs it.
    - *The optimum with an L2 term is certified* at every width, since the problem is
      strongly convex. The solver then chooses a smaller width by held-out samples.

    Memory: `d * units * width` numbers for `q`, `d * width` for shared gates, and in
    the forward pass `batch * units * width`.

    Args:
        units: Positive int, number of outputs (classes; 1 for binary problems).
        width: Number of gated units per output. By default it is chosen when the gates
            are set: `ceil(2 * n_samples / (p + 1))`, but enough gates that one is open
            for every sample; the solver chooses a smaller one with an L2 term.
        n_samples: Number of training samples that the head must be able to fit.
            Needed unless `width` is given.
        gates: `"random"` (gates are drawn at the switch) or `"learned"` (gates
            are the units' own weights, frozen at the switch).
        slope: Positive float, slope of the gate's sigmoid. Steep gates condition
            the exploitation problem better.
        share_gates: Whether all outputs have the same random gates, `r_k` instead of
            `r_ck`. Gates then take the memory of one output. Learned gates are never
            shared.
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
        share_gates: bool = True,
        seed: int | None = None,
        dense: keras.layers.Dense | PointwiseDense | None = None,
        output_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.units = integer("units", units)
        self.n_samples = None if n_samples is None else integer("n_samples", n_samples)
        if width is None and n_samples is None:
            raise ValueError(
                "AlignmentHead must know how many training samples it has to fit. "
                "Received: n_samples=None, width=None. Pass `n_samples=len(x)`, or "
                "a `width`."
            )
        self._requested_width = None if width is None else integer("width", width)
        self.gates = choice("gates", gates, GATES)
        self.slope = number("slope", slope, "a positive number", lambda v: v > 0)
        self.share_gates = flag("share_gates", share_gates) and gates == "random"
        if gates == "learned" and dense is not None:
            raise ValueError(
                "Learned gates have no linear part to share. Received: "
                "gates='learned' together with a `dense` layer. Drop `dense`, or use "
                "gates='random'."
            )
        if not isinstance(dense, (keras.layers.Dense, PointwiseDense, type(None))):
            raise ValueError(
                "`dense` must be a keras.layers.Dense or a PointwiseDense. Received: "
                f"dense={shown(dense)}"
            )
        if dense is not None and dense.units != units:
            raise ValueError(
                "`dense` must have as many units as the head. Received: "
                f"units={units}, dense.units={dense.units}"
            )
        self.seed = seed_or_peeked(seed)
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
        self.q: Any = None
        self.r: Any = None
        self.w: Any = None
        self.bias: Any = None
        # How often units were made or removed: a step compiled before is of others.
        self.generation = 0
        self._replaced = False
        # Why the last units that were to be loaded were not.
        self._refusal: str | None = None
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
        self.dim = p + 1
        if self.dense is not None and not self.dense.built:
            self.dense.build(linear_shape)
        self.standardize.build((None, p))
        self._phase_index = self.add_weight(
            name="phase",
            shape=(),
            initializer="zeros",
            dtype="int32",
            trainable=False,
            autocast=False,
        )
        if self.gates == "learned":
            self._make_units(self.default_width())
            rng = np.random.default_rng([self.seed, 0])
            q = rng.standard_normal(self.q.shape)
            self.q.assign(q / math.sqrt(self.dim))
        self.built = True
        self._set_trainable()

    @property
    def width(self) -> int | None:
        """Number of gated units per output; None while there are none."""
        return None if self.q is None else int(self.q.shape[2])

    @property
    def requested_width(self) -> int | None:
        """The width that was asked for, if any."""
        return self._requested_width

    def default_width(self) -> int:
        """The width that was asked for, or one that can fit any labels."""
        if self._requested_width is not None:
            return self._requested_width
        return default_width(int(self.n_samples or 1), self.dim, self.slope)

    def _make_units(self, width: int) -> None:
        """Creates the variables of `width` gated units, in place of any there are."""
        _check_memory(self.dim, self.units, width)
        groups = 1 if self.share_gates else self.units
        self.generation += 1
        with compat.new_variables(self, [self.q, self.r, self.w, self.bias]):
            self.bias = self.add_weight(
                name="bias", shape=(self.units,), initializer="zeros", trainable=True
            )
            self.q = self.add_weight(
                name="q",
                shape=(self.dim, self.units, width),
                initializer="zeros",
                trainable=True,
            )
            self.r = self.add_weight(
                name="r",
                shape=(self.dim, groups, width),
                initializer="zeros",
                trainable=False,
            )
            self.w = self.add_weight(
                name="w",
                shape=(groups, width),
                initializer="zeros",
                trainable=False,
            )
        self.w.assign(self._signs(width) / math.sqrt(width))

    def _drop_units(self) -> None:
        """Removes the variables of the gated units."""
        self.generation += 1
        with compat.new_variables(self, [self.q, self.r, self.w, self.bias]):
            self.q = self.r = self.w = self.bias = None

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Computes the logits, shape `(batch, units)`."""
        linear, gated = _split(inputs)
        exploring = self._phase == EXPLORING
        if exploring and self.gates == "random":
            return self._linear(linear)
        v = self.normalize(gated, training=bool(training) and exploring)
        t = _project(v, self.q)
        # Shared gates, (batch, 1, width), stand for those of every output.
        gate = ops.sigmoid(self.slope * (t if exploring else _project(v, self.r)))
        # Half-precision sums over a thousand units would lose the small ones.
        dtype = keras.backend.result_type(t.dtype, "float32")
        units = ops.cast(gate * t, dtype) * ops.cast(self.w, dtype)
        outputs = ops.sum(units, axis=-1) + ops.cast(self.bias, dtype)
        outputs = ops.cast(outputs, self.output_dtype)
        if self.dense is not None and not self._replaced:
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
        p = self.dim - 1
        features = ops.reshape(features, (-1, p))
        dtype = keras.backend.result_type(self.compute_dtype, "float32")
        if self._phase == EXPLORING:
            # A call of the layer, whose statistics may be looked at and set anew.
            u = ops.cast(self.standardize(features, training=training), dtype)
        else:
            # Batch normalisation computes x / s - mean / s, which cancels where a
            # feature varies little around a large mean.
            moments = (self.standardize.moving_mean, self.standardize.moving_variance)
            mean, variance = (ops.cast(moment, dtype) for moment in moments)
            u = ops.cast(features, dtype) - mean
            u = u * ops.rsqrt(variance + self.standardize.epsilon)
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
        mean, variance = self.standardisation() if moments is None else moments
        u = np.asarray(features, dtype="float64").reshape(len(features), -1)
        u = (u - mean) / np.sqrt(variance + self.standardize.epsilon)
        square = np.sum(u**2, axis=1, keepdims=True)
        u *= np.sqrt(u.shape[1] / np.maximum(square, 1e-12))
        return np.concatenate([u, np.ones((len(u), 1))], axis=1)

    def standardisation(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance that features are standardised by, `(p,)`, float64."""
        mean, variance = (
            ops.convert_to_numpy(moment).astype("float64")
            for moment in (
                self.standardize.moving_mean,
                self.standardize.moving_variance,
            )
        )
        return mean, variance

    def linear_part(self, z: np.ndarray) -> np.ndarray:
        """`a . z + b0` in NumPy float64.

        Args:
            z: The output layer's features, shape `(n, p)`.

        Returns:
            Array `(n, units)`; 0 without a linear part, or where it is replaced.
        """
        outputs = np.zeros((len(z), self.units))
        if self.dense is None or self._replaced:
            return outputs
        kernel = ops.convert_to_numpy(self.dense.kernel).astype("float64")
        for start in range(0, len(z), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            outputs[rows] = np.asarray(z[rows], "float64") @ kernel
        if self.dense.bias is not None:
            outputs += ops.convert_to_numpy(self.dense.bias).astype("float64")
        return outputs

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
        return [] if self.q is None else [self.q, self.bias]

    @property
    def units_variables(self) -> list[keras.Variable]:
        """The variables of the gated units: none while exploring with random gates."""
        return [] if self.q is None else [self.bias, self.q, self.r, self.w]

    @property
    def inactive_variables(self) -> list[keras.Variable]:
        """The variables that the current phase does not compute with."""
        if self._phase == EXPLOITING:
            return [self._phase_index]
        if self.gates == "learned":
            return [self._phase_index, self.r]
        return [self._phase_index, *self.standardize.variables]

    @property
    def explored_variables(self) -> list[keras.Variable]:
        """The variables trained in exploration, in Keras's order."""
        if self.dense is not None:
            return self.dense.trainable_variables
        return [self.bias, self.q] if self._trainable else []

    @property
    def replaces_dense(self) -> bool:
        """Whether gated units have taken the place of the output layer."""
        return self._replaced

    def start_exploiting(
        self,
        noise: float = 1e-3,
        width: int | None = None,
        replace_dense: bool = False,
    ) -> None:
        """Sets and freezes the gates; from here on only `q` and `b` are trained.

        Random gates are drawn from N(0, I / d), and `q = b = 0`: the function of the
        head does not change, unless the output layer is replaced, which makes it 0.
        Learned gates are set to `q` after Gaussian noise is added to it.

        Args:
            noise: Non-negative float, standard deviation of the noise for learned
                gates in units of `q`'s root mean square.
            width: Positive int, number of random gates, instead of the default.
            replace_dense: Whether gated units take the place of the output layer, for
                random gates. The first of them is always open then.

        Raises:
            ValueError: If the head is unbuilt or exploiting already, or if an argument
                is out of its range.
            MemoryError: If the units do not fit into memory.
        """
        if not self.built:
            raise ValueError(
                "The head is not built, so it has no gates to set. Received: a call of "
                "`start_exploiting` on an unbuilt head. Call it once on features."
            )
        number("noise", noise, "a non-negative number", lambda v: v >= 0)
        if self._phase == EXPLOITING:
            raise ValueError(
                "The head's gates are set and frozen already. Received: a call of "
                "`start_exploiting` in the phase 'exploiting'."
            )
        if self.gates == "random":
            width = self.default_width() if width is None else integer("width", width)
            self._replaced = replace_dense
            self.set_width(width)
        else:
            self.q.assign(self.gates_at_switch(noise)[0])
            # As q holds them, which may be rounded.
            self.r.assign(ops.convert_to_numpy(self.q))
        index = _REPLACED if self._replaced else PHASES.index(EXPLOITING)
        self._phase_index.assign(index)
        self.sync_phase()

    def keep_dense(self) -> None:
        """Goes back to the output layer and `q = b = 0`: the function before."""
        self.generation += 1
        self._phase_index.assign(PHASES.index(EXPLOITING))
        self.sync_phase()
        for variable in self.exploited_variables:
            variable.assign(np.zeros(variable.shape))

    def set_width(self, width: int) -> None:
        """Draws `width` random gates and sets `q = b = 0`.

        Gates are nested: the first of them are the same at every width. Where units
        replace the output layer, the first one is always open.

        Args:
            width: Positive int.

        Raises:
            ValueError: If gates are learned, or `width` is no positive int.
            MemoryError: If the units do not fit into memory.
        """
        if self.gates == "learned":
            raise ValueError(
                "The width of learned gates is set when the head is built. Received: "
                f"width={width}"
            )
        self._make_units(integer("width", width))
        r, w = self.gates_at_switch(width=width)
        self.r.assign(r)
        self.w.assign(w)
        self._set_trainable()

    def gates_in_use(self) -> tuple[np.ndarray, np.ndarray]:
        """`r` and `w` as they are, float64; shapes as those of `gates_at_switch`."""
        r, w = (ops.convert_to_numpy(v).astype("float64") for v in (self.r, self.w))
        return r, w

    def gates_at_switch(
        self,
        noise: float = 1e-3,
        width: int | None = None,
        replace_dense: bool | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The gates that `start_exploiting` would set now; changes nothing.

        Args:
            noise: See `start_exploiting`.
            width: Number of random gates, instead of the default.
            replace_dense: See `start_exploiting`; by default as the head has it.

        Returns:
            Gates `r` and output weights `w`, float64, of shapes `(d, units, width)` and
            `(units, width)`; `(d, 1, width)` and `(1, width)` if they are shared.

        Raises:
            MemoryError: If they do not fit into memory.
        """
        rng = np.random.default_rng([self.seed, 1])
        if self.gates == "learned":
            q = np.asarray(ops.convert_to_numpy(self.q), dtype="float64")
            r = q + noise * np.sqrt(np.mean(q**2)) * rng.standard_normal(q.shape)
            return r, ops.convert_to_numpy(self.w).astype("float64")
        width = width or self.default_width()
        groups = 1 if self.share_gates else self.units
        _check_memory(self.dim, groups, width)
        replaced = self._replaced if replace_dense is None else replace_dense
        drawn = width - replaced
        # Unit by unit, so that the first ones are the same at every width.
        r = rng.standard_normal((drawn, self.dim, groups)).transpose(1, 2, 0)
        r /= math.sqrt(self.dim)
        w = self._signs(drawn) / math.sqrt(max(drawn, 1))
        if replaced:
            opened = np.zeros((self.dim, groups, 1))
            opened[-1] = _OPEN / self.slope
            r = np.concatenate([opened, r], axis=2)
            w = np.concatenate([np.ones((groups, 1)), w], axis=1)
        return r, w

    def _signs(self, width: int) -> np.ndarray:
        """Signs of the output weights, shape `(units or 1, width)`, nested as gates."""
        groups = 1 if self.share_gates else self.units
        rng = np.random.default_rng([self.seed, 3])
        return rng.choice([-1.0, 1.0], size=(width, groups)).T

    def sync_phase(self) -> None:
        """Makes the phase that of the saved weights (after they were assigned)."""
        index = int(ops.convert_to_numpy(self._phase_index))
        self._phase = EXPLORING if index == 0 else EXPLOITING
        self._replaced = index == _REPLACED
        self._set_trainable()

    def _set_trainable(self) -> None:
        for variable in self.exploited_variables:
            variable.trainable = self._trainable

    @property
    def trainable(self) -> bool:
        """Whether the head is trained at all."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.fset(self, value)
        if self.built:
            self._set_trainable()

    def get_build_config(self) -> dict[str, Any] | None:
        """The shapes that rebuild the weights, and the phase."""
        config = super().get_build_config()
        if config is None:
            return None
        return {
            **config,
            "phase": self._phase,
            "width": self.width,
            "replace_dense": self._replaced,
        }

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds a head in the phase of the saved one.

        A model that is loaded builds its optimizer before it loads weights: what is
        trained must be known by then.
        """
        with rebuilding(type(self).__name__, TypeError):
            self._build_from(dict(config))

    def _build_from(self, config: dict[str, Any]) -> None:
        phase = config.pop("phase", EXPLORING)
        replaced = config.pop("replace_dense", False)
        old = "width" not in config
        width = config.pop("width", None)
        super().build_from_config(config)
        if old:
            # Version 0.1.0 had units in both phases, and this default.
            width = self._requested_width or -(
                -2 * int(self.n_samples or 1) // self.dim
            )
        if self.gates == "learned" and width != self.width:
            self._make_units(width)
        if phase == EXPLOITING:
            self.start_exploiting(width=width, replace_dense=replaced)

    def save_own_variables(self, store: Any) -> None:
        """Saves the phase and, if there are any, the gated units."""
        for name in ("phase_index", *_UNITS):
            variable = getattr(self, _ATTRIBUTES.get(name, name))
            if variable is not None:
                store[name] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store: Any) -> None:
        """Loads the phase and the gated units; random gates of any width.

        Args:
            store: A mapping from names to arrays, as `save_own_variables` fills it.
                Files of version 0.1.0, whose names are numbers, are read, too.

        Raises:
            ValueError: If they are those of another head, which is left as it was.
        """
        found = {name: np.asarray(store[name]) for name in store.keys()}  # noqa: SIM118
        if not found:
            # Keras comes back with nothing after a failure: that one is to be told.
            raise ValueError(self._refusal or "No variables of a head were found.")
        if "phase_index" not in found:
            found = _named(found)
        phase = found["phase_index"]
        if phase.shape or phase.item() not in {*range(len(PHASES)), _REPLACED}:
            received = shown(phase) if phase.shape else phase.item()
            self._refusal = (
                f"The saved phase of a head must be from 0 to {_REPLACED}. Received: "
                f"{received}. The file is damaged, or of a later version."
            )
            raise ValueError(self._refusal)
        index = int(phase)
        if index == PHASES.index(EXPLORING) and self.gates == "random":
            if self.q is not None:
                self._drop_units()
        else:
            self._check_units(found)
            width = found["q"].shape[2]
            if width != self.width:
                self._make_units(width)
            for name in _UNITS:
                getattr(self, name).assign(found[name])
        self._phase_index.assign(index)
        self.sync_phase()

    def _check_units(self, found: dict[str, np.ndarray]) -> None:
        """Refuses units whose shapes are not those of this head."""
        groups = 1 if self.share_gates else self.units
        shapes = {name: array.shape for name, array in found.items() if name in _UNITS}
        q = shapes.get("q") or (0,)
        width = q[-1] if self.gates == "random" else self.width
        wanted = {
            "q": (self.dim, self.units, width),
            "r": (self.dim, groups, width),
            "w": (groups, width),
            "bias": (self.units,),
        }
        self._refusal = None
        if shapes != wanted:
            self._refusal = (
                "The saved units are those of another head. This one has shapes "
                f"{wanted}, with gates='{self.gates}' and share_gates="
                f"{self.share_gates}. Received: {shapes}. Align as it was done when "
                "they were saved; heads of version 0.1.0 have share_gates=False."
            )
            raise ValueError(self._refusal)

    def set_weights(self, weights: list[Any]) -> None:
        """Sets the head's weights and, with them, its phase and width."""
        self.set_weights_of(self, weights)

    def set_weights_of(self, owner: keras.Layer, weights: list[Any]) -> None:
        """Sets the weights of a layer that holds this head, in any phase.

        Args:
            owner: The layer, or the head itself.
            weights: Arrays, as `owner.get_weights()` returns them: with the gated
                units, or without them.

        Raises:
            ValueError: If number or shapes do not fit; nothing is changed then.
        """
        own = {id(v) for v in [self._phase_index, *self.units_variables]}
        places = [i for i, w in enumerate(owner.weights) if id(w) in own]
        others = [w for w in owner.weights if id(w) not in own]
        names = _OWN if len(weights) == len(others) + len(_OWN) else ("phase_index",)
        begin, end = places[0], places[0] + len(names)
        values = [*weights[:begin], *weights[end:]]
        shapes = [tuple(np.shape(value)) for value in values]
        wanted = [tuple(w.shape) for w in others]
        if shapes != wanted:
            raise ValueError(
                f"The weights are not those of '{owner.name}', whose shapes are "
                f"{wanted}, and {len(_OWN)} of the head at {begin} (1 while random "
                f"gates explore). Received: {[np.shape(weight) for weight in weights]}"
            )
        self.load_own_variables(dict(zip(names, weights[begin:end], strict=True)))
        for variable, value in zip(others, values, strict=True):
            variable.assign(value)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        """Shape of the logits for features of the given shape."""
        return (_split_shapes(input_shape)[0][0], self.units)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> keras.KerasTensor:
        """Shape and dtype of the logits for symbolic features; arguments of `call`."""
        spec = super().compute_output_spec(*args, **kwargs)
        return keras.KerasTensor(spec.shape, self.output_dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild this head (its phase is among the weights).

        Returns:
            The arguments.

        Raises:
            ValueError: If Keras asks to write the legacy HDF5 format, which has no
                place for the phase.
        """
        if compat.saves_as_hdf5():
            refuse_hdf5()
        config = super().get_config()
        config.update(
            units=self.units,
            width=self._requested_width,
            n_samples=self.n_samples,
            gates=self.gates,
            slope=self.slope,
            share_gates=self.share_gates,
            seed=self.seed,
            dense=keras.saving.serialize_keras_object(self.dense),
            output_dtype=self.output_dtype,
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AlignmentHead:
        """Rebuilds a head from `get_config`."""
        config = dict(config)
        with rebuilding(cls.__name__):
            config["dense"] = keras.saving.deserialize_keras_object(config["dense"])
            # Version 0.1.0 had gates for each output.
            config.setdefault("share_gates", False)
            return cls(**config)


def _named(numbered: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The variables of a file of version 0.1.0 by name."""
    names = {str(i): name for i, name in enumerate((*_UNITS, "phase_index"))}
    if set(numbered) != set(names):
        raise ValueError(
            "The saved variables are not those of an alignment head. Received: "
            f"{sorted(numbered)}"
        )
    return {names[number]: array for number, array in numbered.items()}


def _check_memory(d: int, units: int, width: int) -> None:
    """Refuses units that cannot fit before anything is allocated."""
    gib = 4 * 2 * d * units * width / 2**30
    free = free_gib()
    if free is not None and gib > free:
        raise MemoryError(
            f"The gated units would take {gib:.3g} GiB, of {free:.3g} GiB that are "
            f"free: d * units * width = {d} * {units} * {width} weights, and as much "
            "again to train them. Pass a smaller `width` or the true number of "
            "samples, or solve with an L2 term, which needs a small width."
        )


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


def refuse_hdf5() -> None:
    """Refuses to save a whole model in Keras's legacy format.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        "A model with an alignment head cannot be saved in the legacy HDF5 format, "
        "which has no place for its phase and would not load. Received: a `filepath` "
        "that ends in .h5 or .hdf5. Save the model as 'model.keras', or its weights as "
        "'model.weights.h5'."
    )
