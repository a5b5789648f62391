"""The alignment head: the output layer that makes a model able to fit any labels.

A Keras layer is one class, so this file is long: the state of both phases is here.
Pure functions of the head have files of their own: `gate_initialization`,
`feature_normalization` and `saved_state`.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dalign import compat
from keras_dalign.head.feature_normalization import (
    normalize_exactly,
    scale_to_length,
    standardize,
)
from keras_dalign.head.gate_initialization import (
    check_memory,
    explored_weights,
    learned_gates,
    output_signs,
    random_gates,
)
from keras_dalign.head.pointwise_dense import PointwiseDense
from keras_dalign.head.saved_state import (
    EXPLOITING_INDEX,
    EXPLORING_INDEX,
    PHASE_INDEX,
    REPLACED_INDEX,
    UNIT_VARIABLES,
    check_shapes,
    checked_phase,
    read_state,
    refuse_hdf5,
)
from keras_dalign.numerics.arguments import (
    choice,
    flag,
    integer,
    number,
    rebuilding,
    seed_or_peeked,
    shown,
)
from keras_dalign.numerics.default_width import default_width

EXPLORING = "exploring"
EXPLOITING = "exploiting"
PHASES = (EXPLORING, EXPLOITING)
GATES = ("random", "learned")

# The head's own variables in the order of Keras's `weights`: trainable ones first.
_WEIGHT_ORDER = ("bias", "q", PHASE_INDEX, "r", "w")
# Rows that are converted to float64 at once.
_ROWS_AT_ONCE = 8192


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
      linear layer, and the gates equal the units' weights (`r = q`). Every unit is
      then `t * s(slope * t)` with `t = q . v`, and `q` and `b` are trained like any
      other weight.
    - *exploiting*. The gates `r` are frozen and only `q` and `b` are trained. The
      output is linear in them, so the training problem is convex. With
      `replace_dense` the units replace the linear layer (`a = b0 = 0`), and the first
      gate is always open (`s = w = 1`). Its unit is a linear layer on `v`, which is
      trained with the others. An L2 term then covers the whole last layer.

    `start_exploiting` goes from the first phase to the second; `AlignedModel` calls it
    at the switch. In a model of another kind, freeze all other weights yourself
    (`head.dense` included). Compile the model again whenever the phase has changed,
    also by loading weights: a compiled function is valid in one phase only.

    The number of gated units, `width`, decides what is guaranteed:

    - *Any labels can be fitted.* For almost every `r` the head reaches every label
      vector if features are distinct, at most `width * k` samples lie in any subspace
      of `k` dimensions (for all samples: `width * d >= n`), and every sample has an
      open gate. The default width, `numerics.default_width`, is large enough.
      Exploitation without an L2 term needs it.
    - *The optimum with an L2 term is certified* at every width, since the problem is
      strongly convex. The solver then chooses a smaller width by held-out samples.

    Memory: `d * units * width` numbers for `q`, `d * width` for shared gates, and
    `batch * units * width` in the forward pass.

    Args:
        units: Positive int, number of outputs (classes; 1 for binary problems).
        width: Number of gated units per output. By default it is chosen when the gates
            are set: `ceil(2 * n_samples / (p + 1))`, or more where fewer could leave a
            sample without an open gate. With an L2 term the solver chooses a smaller
            one.
        n_samples: Number of training samples that the head must be able to fit.
            Needed unless `width` is given.
        gates: `"random"` (gates are drawn at the switch) or `"learned"` (gates are
            the units' weights, frozen at the switch).
        slope: Positive float, slope of the gate's sigmoid. Steep gates condition
            the exploitation problem better.
        share_gates: Whether all outputs have the same random gates, `r_k` instead of
            `r_ck`. Gates then take the memory of one output. Learned gates are never
            shared.
        seed: Int that determines gates, signs and noise, the same on every
            backend. Defaults to a value derived from Python's global random
            state, which is left as it was.
        dense: The `keras.layers.Dense` to use as the linear part
            (`gates="random"` only); its activation is ignored. Or a
            `PointwiseDense`, which wraps a convolution. Defaults to a new `Dense`.
        output_dtype: String, dtype of the logits. Defaults to the dtype that the head
            computes in, which is half precision under mixed precision.
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
        # The width given to the constructor, if any.
        self.requested_width = None if width is None else integer("width", width)
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
        # While learned gates explore, these are moving averages. The switch sets them
        # to the statistics of the whole training set.
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
        # How often units were created or removed. A function compiled before uses
        # variables that are gone.
        self.generation = 0
        self._replaces_dense = False
        self._phase = EXPLORING
        # Why the last load failed, if it did.
        self._load_error: str | None = None
        # As in Dense: the mask of the features applies to the logits and the loss.
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
            self._create_units(self.default_width())
            self.q.assign(explored_weights(self.q.shape, self.seed))
        self.built = True
        self._set_trainable()

    @property
    def width(self) -> int | None:
        """Number of gated units per output; None while there are none."""
        return None if self.q is None else int(self.q.shape[2])

    def default_width(self) -> int:
        """The width given to the constructor, or one that can fit any labels."""
        if self.requested_width is not None:
            return self.requested_width
        return default_width(int(self.n_samples or 1), self.dim, self.slope)

    @property
    def _groups(self) -> int:
        """Number of sets of gates: 1 if outputs share them, else one per output."""
        return 1 if self.share_gates else self.units

    def _unit_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the gated units' variables, in the order of their creation."""
        return {
            "bias": (self.units,),
            "q": (self.dim, self.units, width),
            "r": (self.dim, self._groups, width),
            "w": (self._groups, width),
        }

    def _create_units(self, width: int) -> None:
        """Creates the variables of `width` gated units, and removes the old ones."""
        check_memory(self.dim, self.units, width)
        self.generation += 1
        with compat.new_variables(self, self.units_variables):
            for name, shape in self._unit_shapes(width).items():
                trained = name in {"bias", "q"}
                variable = self.add_weight(
                    name=name, shape=shape, initializer="zeros", trainable=trained
                )
                setattr(self, name, variable)
        signs = output_signs(width, self._groups, self.seed)
        self.w.assign(signs / math.sqrt(width))

    def _remove_units(self) -> None:
        """Removes the variables of the gated units."""
        self.generation += 1
        with compat.new_variables(self, self.units_variables):
            self.q = self.r = self.w = self.bias = None

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Computes the logits, shape `(batch, units)`."""
        linear, gated = _split(inputs)
        exploring = self._phase == EXPLORING
        if exploring and self.gates == "random":
            return self._linear(linear)
        v = self.normalize(gated, training=bool(training) and exploring)
        t = _project(v, self.q)
        # Shared gates, (batch, 1, width), are broadcast over the outputs.
        gate = ops.sigmoid(self.slope * (t if exploring else _project(v, self.r)))
        # Half-precision sums over a thousand units would lose the small ones.
        dtype = keras.backend.result_type(t.dtype, "float32")
        units = ops.cast(gate * t, dtype) * ops.cast(self.w, dtype)
        outputs = ops.sum(units, axis=-1) + ops.cast(self.bias, dtype)
        outputs = ops.cast(outputs, self.output_dtype)
        if self.dense is not None and not self._replaces_dense:
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
        features = ops.reshape(features, (-1, self.dim - 1))
        dtype = keras.backend.result_type(self.compute_dtype, "float32")
        if self._phase == EXPLORING:
            # The layer is called, so that `reestimate_batch_norm` can set its
            # statistics.
            u = ops.cast(self.standardize(features, training=training), dtype)
        else:
            u = standardize(features, self.standardize, dtype)
        return ops.cast(scale_to_length(u), self.compute_dtype)

    def normalize_exactly(
        self,
        features: np.ndarray,
        moments: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> np.ndarray:
        """`normalize` in NumPy float64, for rank checks and as a reference.

        Args:
            features: Array `(n, ...)`.
            moments: Mean and variance `(p,)` to standardise by. Default: those of the
                head.

        Returns:
            Array `(n, p + 1)`, float64.
        """
        mean, variance = self.standardisation() if moments is None else moments
        return normalize_exactly(features, mean, variance, self.standardize.epsilon)

    def standardisation(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance that features are standardised by, `(p,)`, float64."""
        layer = self.standardize
        return _float64(layer.moving_mean), _float64(layer.moving_variance)

    def linear_part(self, z: np.ndarray) -> np.ndarray:
        """`a . z + b0` in NumPy float64.

        Args:
            z: The output layer's features, shape `(n, p)`.

        Returns:
            Array `(n, units)`; zeros if there is no linear part or it is replaced.
        """
        outputs = np.zeros((len(z), self.units))
        if self.dense is None or self._replaces_dense:
            return outputs
        kernel = _float64(self.dense.kernel)
        for start in range(0, len(z), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            outputs[rows] = np.asarray(z[rows], "float64") @ kernel
        if self.dense.bias is not None:
            outputs += _float64(self.dense.bias)
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
        # As Dense.call, but without its activation: aligned models end in logits.
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
        """The variables that the current phase does not use."""
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
        """Whether gated units replace the output layer."""
        return self._replaces_dense

    def start_exploiting(
        self,
        noise: float = 1e-3,
        width: int | None = None,
        replace_dense: bool = False,
    ) -> None:
        """Sets and freezes the gates; afterwards only `q` and `b` are trained.

        Random gates are drawn from N(0, I / d), and `q = b = 0`. The head's function
        does not change, unless the output layer is replaced: it is 0 then. Learned
        gates are set to `q` after Gaussian noise is added to it.

        Args:
            noise: Non-negative float, standard deviation of the noise for learned
                gates in units of `q`'s root mean square.
            width: Positive int, number of random gates, instead of the default.
            replace_dense: Whether gated units replace the output layer, for random
                gates. The first gate is then always open.

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
            self._replaces_dense = replace_dense
            self.set_width(width)
        else:
            self.q.assign(self.gates_at_switch(noise)[0])
            # As `q` holds them, rounded to its dtype.
            self.r.assign(ops.convert_to_numpy(self.q))
        index = REPLACED_INDEX if self._replaces_dense else EXPLOITING_INDEX
        self._phase_index.assign(index)
        self.sync_phase()

    def keep_dense(self) -> None:
        """Restores the output layer and sets `q = b = 0`: the function before."""
        self.generation += 1
        self._phase_index.assign(EXPLOITING_INDEX)
        self.sync_phase()
        for variable in self.exploited_variables:
            variable.assign(np.zeros(variable.shape))

    def set_width(self, width: int) -> None:
        """Draws `width` random gates and sets `q = b = 0`.

        Gates are nested: the first ones are the same at every width. Where units
        replace the output layer, the first gate is always open.

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
        self._create_units(integer("width", width))
        r, w = self.gates_at_switch(width=width)
        self.r.assign(r)
        self.w.assign(w)
        self._set_trainable()

    def gates_in_use(self) -> tuple[np.ndarray, np.ndarray]:
        """The current `r` and `w`, float64; shapes as in `gates_at_switch`."""
        return _float64(self.r), _float64(self.w)

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
            replace_dense: See `start_exploiting`. Default: as in the head's state.

        Returns:
            Gates `r` and output weights `w`, float64, of shapes `(d, units, width)` and
            `(units, width)`; `(d, 1, width)` and `(1, width)` if they are shared.

        Raises:
            MemoryError: If they do not fit into memory.
        """
        if self.gates == "learned":
            return learned_gates(_float64(self.q), noise, self.seed), _float64(self.w)
        return random_gates(
            self.dim,
            self._groups,
            width or self.default_width(),
            slope=self.slope,
            seed=self.seed,
            first_open=(
                self._replaces_dense if replace_dense is None else replace_dense
            ),
        )

    def sync_phase(self) -> None:
        """Sets the phase to that of the phase variable, after it was assigned."""
        index = int(ops.convert_to_numpy(self._phase_index))
        self._phase = EXPLORING if index == EXPLORING_INDEX else EXPLOITING
        self._replaces_dense = index == REPLACED_INDEX
        self._set_trainable()

    def _set_trainable(self) -> None:
        """Passes the head's `trainable` on to the variables of exploitation."""
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
            "replace_dense": self._replaces_dense,
        }

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the head in the phase in which it was saved.

        Keras builds the optimizer of a loaded model before it loads the weights, so the
        trainable variables must exist by then.
        """
        with rebuilding(type(self).__name__, TypeError):
            self._build_from(dict(config))

    def _build_from(self, config: dict[str, Any]) -> None:
        phase = config.pop("phase", EXPLORING)
        replaced = config.pop("replace_dense", False)
        is_version_010 = "width" not in config
        width = config.pop("width", None)
        super().build_from_config(config)
        if is_version_010:
            # It had units in both phases, and this default width.
            width = self.requested_width or -(-2 * int(self.n_samples or 1) // self.dim)
        if self.gates == "learned" and width != self.width:
            self._create_units(width)
        if phase == EXPLOITING:
            self.start_exploiting(width=width, replace_dense=replaced)

    def save_own_variables(self, store: Any) -> None:
        """Saves the phase and, if there are any, the gated units."""
        store[PHASE_INDEX] = ops.convert_to_numpy(self._phase_index)
        if self.q is not None:
            for name in UNIT_VARIABLES:
                store[name] = ops.convert_to_numpy(getattr(self, name))

    def load_own_variables(self, store: Any) -> None:
        """Loads the phase and the gated units; random gates of any width.

        Args:
            store: A mapping from names to arrays, as `save_own_variables` fills it.
                Files of version 0.1.0, whose names are numbers, are read, too.

        Raises:
            ValueError: If they are those of another head; this one is not changed.
        """
        if not store.keys():
            # After a failure Keras calls again with an empty store. The error that it
            # finally raises should be the first one.
            raise ValueError(self._load_error or "No variables of a head were found.")
        found = read_state(store)
        try:
            index = checked_phase(found[PHASE_INDEX])
            has_units = index != EXPLORING_INDEX or self.gates == "learned"
            if has_units:
                self._check_units(found)
        except ValueError as error:
            self._load_error = str(error)
            raise
        self._load_error = None
        if has_units:
            width = found["q"].shape[2]
            if width != self.width:
                self._create_units(width)
            for name in UNIT_VARIABLES:
                getattr(self, name).assign(found[name])
        elif self.q is not None:
            self._remove_units()
        self._phase_index.assign(index)
        self.sync_phase()

    def _check_units(self, found: dict[str, np.ndarray]) -> None:
        """Refuses saved units whose shapes are not those of this head."""
        width = self.width
        if self.gates == "random":
            # Any width can be loaded.
            width = found["q"].shape[-1] if "q" in found else 0
        check_shapes(
            found,
            self._unit_shapes(width or 0),
            gates=self.gates,
            share_gates=self.share_gates,
        )

    def set_weights(self, weights: list[Any]) -> None:
        """Sets the head's weights and, with them, its phase and width."""
        self.set_weights_of(self, weights)

    def set_weights_of(self, owner: keras.Layer, weights: list[Any]) -> None:
        """Sets the weights of a layer that contains this head, in any phase.

        Args:
            owner: The layer, or the head itself.
            weights: Arrays, as `owner.get_weights()` returns them: with the gated
                units, or without them.

        Raises:
            ValueError: If number or shapes do not fit; nothing is changed.
        """
        own = {id(v) for v in [self._phase_index, *self.units_variables]}
        places = [i for i, w in enumerate(owner.weights) if id(w) in own]
        others = [w for w in owner.weights if id(w) not in own]
        with_units = len(weights) == len(others) + len(_WEIGHT_ORDER)
        names = _WEIGHT_ORDER if with_units else (PHASE_INDEX,)
        begin, end = places[0], places[0] + len(names)
        values = [*weights[:begin], *weights[end:]]
        shapes = [tuple(np.shape(value)) for value in values]
        wanted = [tuple(w.shape) for w in others]
        if shapes != wanted:
            raise ValueError(
                f"The weights are not those of '{owner.name}', whose shapes are "
                f"{wanted}, and {len(_WEIGHT_ORDER)} of the head at {begin} (1 while "
                "random gates explore). Received: "
                f"{[np.shape(weight) for weight in weights]}"
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
            ValueError: If Keras writes the legacy HDF5 format, which cannot store the
                phase.
        """
        if compat.saves_as_hdf5():
            refuse_hdf5()
        config = super().get_config()
        config.update(
            units=self.units,
            width=self.requested_width,
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


def _float64(variable: Any) -> np.ndarray:
    """The value of a variable as a float64 array."""
    return ops.convert_to_numpy(variable).astype("float64")


def _project(v: Any, weights: Any) -> Any:
    """`(batch, d)` times `(d, units, width)` gives `(batch, units, width)`."""
    d, units, width = weights.shape
    product = ops.matmul(v, ops.reshape(weights, (d, units * width)))
    return ops.reshape(product, (-1, units, width))


def _split(inputs: Any) -> tuple[Any, Any]:
    """The features of the linear part, and those of the gated units."""
    if isinstance(inputs, (list, tuple)):
        linear, gated = inputs
        return linear, gated
    return inputs, inputs


def _split_shapes(input_shape: Any) -> tuple[Any, Any]:
    """The shapes of the features of the linear part and of the gated units."""
    if isinstance(input_shape[0], (list, tuple)):
        linear, gated = input_shape
        return linear, gated
    return input_shape, input_shape
