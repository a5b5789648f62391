"""The quadratic head: the second Taylor term of a wide layer, as an output layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_dalign.numerics.arguments import choice, integer, number, seed_or_peeked

if TYPE_CHECKING:
    from keras_dalign.numerics import Array

SECOND_DERIVATIVES = ("step", "relu", "one")
# Length of a unit's initial weights.
_INITIAL_LENGTH = 0.05


class _QuarticPenalty(keras.regularizers.Regularizer):
    """`penalty * sum_cr |w_cr|^4` for weights of shape `(d, units, width)`."""

    def __init__(self, head: QuadraticHead) -> None:
        self.head = head

    def __call__(self, w: Any) -> Any:
        squared_lengths = ops.sum(ops.square(w), axis=0)
        return self.head.penalty * ops.sum(ops.square(squared_lengths))


@keras.saving.register_keras_serializable(package="keras_dalign")
class QuadraticHead(keras.layers.Layer):
    """Output layer whose non-convex training problem has a certificate of optimality.

    For features `u` of length `d` and output `c` the head computes

        f_c(u) = 1 / (2 sqrt(m)) sum_r a_r phi''(w0_r . u / |u|) (w_cr . u)^2,

    the second-order term of a two-layer network of width `m` in the change `w` of its
    weights `w0` (Bai & Lee, "Beyond linearization", ICLR 2020). Gates `w0_r ~ N(0, I)`
    and signs `a_r = +-1` are random and fixed; outputs share them. Only `w` is trained.
    The objective is the loss plus `penalty * sum_cr |w_cr|^4`, which Keras adds as a
    regularizer.

    This is not convex in `w`, but it is in the matrices `M_cr = w_cr w_cr^T`. Of a
    model that ends in this layer, `certify` bounds the distance of the objective from
    its *global* minimum over `w`, and `solve_quadratic` minimises it. Many units make
    the bound sharp.

    The head has no bias and no linear term: append a 1 to the features to have them.
    Features whose second moment is close to the identity need the fewest samples.

    Args:
        units: Positive int, number of outputs `C`.
        width: Positive int, number of gated units per output, `m`.
        second_derivative: `phi''`: `"step"` (1 where its argument is at least 0),
            `"relu"` or `"one"` (no gates).
        penalty: Positive float, weight of the penalty. Squared error in Keras has no
            factor 1/2: for `(1/2n) sum_i (f_i - y_i)^2` with weight `lam` pass `2 lam`.
        seed: Int that determines gates, signs and initial weights, the same on every
            backend. Defaults to a value derived from Python's global random state,
            which is left as it was.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Features `u`, shape `(batch, d)`.

    Output shape:
        `(batch, units)`.

    Attributes:
        penalty: See above. Compile the model again after changing it.
        w: The trained weights, shape `(d, units, width)`.
        w0: The gates, shape `(d, width)`.
        signs: `a`, shape `(width,)`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    ```python
    model = keras.Sequential([trunk, keras_dalign.QuadraticHead(1, width=64)])
    keras_dalign.solve_quadratic(model, x, y, loss="mse")
    print(keras_dalign.certify(model, x, y, loss="mse"))
    ```
    """

    def __init__(
        self,
        units: int,
        width: int,
        second_derivative: str = "step",
        penalty: float = 1e-3,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.units = integer("units", units)
        self.width = integer("width", width)
        self.second_derivative = choice(
            "second_derivative", second_derivative, SECOND_DERIVATIVES
        )
        self.penalty = penalty
        self.seed = seed_or_peeked(seed)
        self.w: Any = None
        self.w0: Any = None
        self.signs: Any = None

    @property
    def penalty(self) -> float:
        """Weight of the penalty."""
        return self._penalty

    @penalty.setter
    def penalty(self, value: float) -> None:
        wanted = "a positive number: without it the objective has no certificate"
        self._penalty = number("penalty", value, wanted, lambda v: v > 0)

    def build(self, input_shape: Any) -> None:
        """Creates the weights for features of shape `(batch, d)`."""
        if len(input_shape) != 2 or input_shape[-1] is None:
            raise ValueError(
                "QuadraticHead works on feature vectors of a known length. Received: "
                f"features of shape {tuple(input_shape)}. Pool or flatten them first."
            )
        d = int(input_shape[-1])
        w = np.random.default_rng([self.seed, 0]).standard_normal(
            (d, self.units, self.width)
        )
        w0 = np.random.default_rng([self.seed, 1]).standard_normal((self.width, d)).T
        signs = np.random.default_rng([self.seed, 2]).choice([-1.0, 1.0], self.width)
        initial = {
            "w": w * (_INITIAL_LENGTH / math.sqrt(d)),
            "w0": w0,
            "signs": signs,
        }
        for name, values in initial.items():
            variable = self.add_weight(
                name=name,
                shape=values.shape,
                initializer="zeros",
                trainable=name == "w",
                regularizer=_QuarticPenalty(self) if name == "w" else None,
                autocast=False,
            )
            variable.assign(values)
            setattr(self, name, variable)
        self.built = True

    def call(self, inputs: Any) -> Any:
        """Computes the outputs, shape `(batch, units)`."""
        # Half-precision squares would overflow, and gates would flip.
        u = ops.cast(inputs, keras.backend.result_type(self.variable_dtype, "float32"))
        t = ops.matmul(u, self.w0)
        square = ops.sum(ops.square(u), axis=-1, keepdims=True)
        t = t * ops.rsqrt(ops.maximum(square, 1e-30))
        if self.second_derivative == "step":
            gates = ops.cast(t >= 0, u.dtype)
        elif self.second_derivative == "relu":
            gates = ops.relu(t)
        else:
            gates = ops.ones_like(t)
        gates = gates * (self.signs / (2.0 * math.sqrt(self.width)))
        d = self.w.shape[0]
        products = ops.matmul(u, ops.reshape(self.w, (d, self.units * self.width)))
        products = ops.reshape(products, (-1, self.units, self.width))
        gated = ops.expand_dims(gates, 1) * ops.square(products)
        return ops.cast(ops.sum(gated, axis=-1), self.compute_dtype)

    def gates_exactly(self, u: np.ndarray) -> Array:
        """The factors of the squares of `w_cr . u`, in NumPy float64.

        Args:
            u: Features, shape `(n, d)`.

        Returns:
            `a_r phi''(w0_r . u / |u|) / (2 sqrt(m))`, shape `(n, m)`.
        """
        u = np.asarray(u, dtype=np.float64)
        w0, signs = (
            ops.convert_to_numpy(v).astype(np.float64) for v in (self.w0, self.signs)
        )
        lengths = np.linalg.norm(u, axis=1, keepdims=True)
        t = (u @ w0) / np.maximum(lengths, 1e-15)
        gates = {
            "step": lambda: (t >= 0).astype(np.float64),
            "relu": lambda: np.maximum(t, 0.0),
            "one": lambda: np.ones_like(t),
        }[self.second_derivative]()
        return gates * (signs / (2.0 * math.sqrt(self.width)))

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        """Shape of the outputs for features of the given shape."""
        return (input_shape[0], self.units)

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild this head."""
        return {
            **super().get_config(),
            "units": self.units,
            "width": self.width,
            "second_derivative": self.second_derivative,
            "penalty": self.penalty,
            "seed": self.seed,
        }
