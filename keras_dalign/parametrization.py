"""Parametrisations: how initial weights and steps scale with a network's width.

The choice decides the behaviour of a wide network: whether its features move, and
whether they stay linearly independent. It is implemented by multipliers of the stored
weights and factors of their initial values. There are no learning rates per variable,
so any optimizer can be used.

Sources: G. Yang, E. J. Hu, "Tensor Programs IV: feature learning in infinite-width
neural networks", ICML 2021; G. Yang et al., "Tensor Programs V", 2022, table 8, and the
authors' package `mup`; for `"ntk"` A. Jacot, F. Gabriel, C. Hongler, NeurIPS 2018. Its
form for Adam is derived here from the condition that a step changes the outputs by the
same amount at every width.
"""

from __future__ import annotations

import dataclasses
import random
import warnings
from typing import Any

import keras
from keras import layers, ops

from keras_dalign import compat
from keras_dalign.growth import (
    KINDS,
    NORMALIZATIONS,
    OPTIMIZERS,
    VECTORS,
    UnknownRoleError,
    growth,
    shapes,
    to_base_size,
    words,
)
from keras_dalign.numerics.arguments import choice, shown

_CONSTRAINTS = tuple(
    f"{name}_constraint" for name in ("kernel", "embeddings", *VECTORS)
)


def parametrize(
    model: keras.Model,
    base: keras.Model,
    kind: str = "mup",
    optimizer: str = "sgd",
) -> keras.Model:
    """Rewrites a new model so that its width scales by a parametrisation.

    Hyper-parameters are tuned on a small base model. The model is the same network with
    other widths. It gets initial weights and multipliers for which the base's learning
    rate is right, too. At the base's widths it does not change, bit for bit.

    Let `r_in` and `r_out` be the fan-in and the fan-out of a layer, divided by those of
    the same layer of the base. An effective weight is its multiplier times the stored
    weight:

    | kind | multiplier, SGD | multiplier, Adam | bias, SGD | bias, Adam |
    |---|---|---|---|---|
    | `"mup"`, `"mean_field"` | `(r_out / r_in)^1/2` | `1 / r_in` | `r_out^1/2` | 1 |
    | `"ntk"` | `r_in^-1/2` | `r_in^-1 r_out^-1/2` | 1 | `r_out^-1/2` |
    | `"standard"` | 1 | 1 | 1 | 1 |

    A size that does not grow has `r = 1`. A layer is an *input* layer if only its
    fan-out grows, an *output* layer if only its fan-in grows, and a *hidden* layer if
    both grow. The standard deviation of the effective initial kernel is that of the
    initializer at the base's shape times `r_in^-1/2`. For the output layers of `"mup"`,
    and for all layers of `"mean_field"`, it is times `1 / r_in`. `"standard"` is a copy
    of the model as Keras initialises it. Effective initial biases are the model's.

    - `"mup"`, the maximal update parametrisation: features move as much at every width.
    - `"ntk"`: features do not move in the limit, and training is kernel regression.
    - `"mean_field"`: as `"mup"`, with initial hidden kernels smaller by `r_in^-1/2`.
    - `"standard"`: training with a constant learning rate diverges as the width grows;
      divide the rate by the growth.

    Scale and shift of normalisations are treated as biases. A size may also be smaller
    than the base's. In the theory all widths grow by one factor; for different factors,
    the table follows the package `mup`. Constants that are no weights are not changed:
    attention divides by the root of the keys' length, where muP needs the length
    itself.

    The multipliers are `keras.layers.Rescaling` layers before and after the layers. (An
    activation of the layer becomes a separate layer after them.) So the saved model has
    no layers of this package, and `align` accepts it.

    **Optimizers.** Choose `"sgd"` for SGD, with momentum or without. Choose `"adam"`
    for optimizers that divide gradients by their size, entry by entry: Adam, AdamW,
    RMSprop, Adamax, Nadam, Lion, Adagrad. The gradient of a stored weight is the
    multiplier times that of the effective weight, so Adam's epsilon acts as epsilon
    divided by the multiplier. Under muP, gradients of hidden kernels fall as the width
    grows, and the multiplier adds a factor of `r_in` to the effective epsilon. Choose
    epsilon far below the gradients, such as 1e-12. Decoupled weight decay, and L2
    regularizers under SGD, shrink stored weights, and so effective weights, by the same
    factor at every width. Clipping by norm uses the gradients of stored weights.

    Args:
        model: A built Functional or Sequential model, freshly initialised, whose layers
            with growing kernels are `Dense`, `Conv1D`, `Conv2D`, `Conv3D`,
            `EinsumDense` or `Embedding`. Models that it calls as layers are rewritten,
            too. The model itself does not change.
        base: A model of the same layers, with the widths at which the learning rate was
            chosen, and the same inputs and outputs. Only its shapes are used.
        kind: `"mup"`, `"ntk"`, `"mean_field"` or `"standard"`.
        optimizer: `"sgd"` or `"adam"`, the family that will train the model.

    Returns:
        A new Functional model of the same name, not compiled, with its own weights.

    Raises:
        ValueError: If an argument is none of the above, or the two models do not match.
            If the role of a layer cannot be determined: a kernel is used in more than
            one place, a size that grows is neither fan-in nor fan-out, or a layer of
            another kind has weights that grow. If the variance of an initializer is
            unknown, or weights that are multiplied have a constraint.

    Warns:
        UserWarning: If the model's class overrides how Keras trains, which is not
            carried over.

    Example:

    ```python
    def network(width):
        hidden = [keras.layers.Dense(width, activation="tanh") for _ in range(3)]
        return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])

    model = keras_dalign.parametrize(network(1024), base=network(64))
    model.compile(keras.optimizers.SGD(0.1), "mse")  # the rate that suits network(64)
    ```
    """
    choice("kind", kind, KINDS)
    choice("optimizer", optimizer, OPTIMIZERS)
    graph, base_graph = _graph(model, "model"), _graph(base, "base")
    for ends in ("input", "output"):
        _check_ends(ends, graph, base_graph)
    own = [
        name
        for name in ("train_step", "compute_loss", "fit")
        if getattr(type(model), name) is not getattr(keras.Model, name)
    ]
    if own:
        warnings.warn(
            "The model's own way to train is not carried over: the result trains with "
            f"Keras's. Received: {type(model).__name__}, which overrides "
            f"{', '.join(own)}.",
            stacklevel=2,
        )
    # New layers with random numbers draw their seeds from Python's global generator,
    # whose state is restored.
    state = random.getstate()
    try:
        return _clone(graph, base_graph, kind, optimizer)
    finally:
        random.setstate(state)


def _graph(model: Any, name: str) -> keras.Model:
    """A Functional model of the same layers."""
    ends = compat.graph_ends(model)
    if ends is None:
        raise ValueError(
            f"`{name}` must be a built Functional or Sequential model without a `call` "
            f"of its own. Received: {name}={shown(model)} (of type "
            f"{type(model).__name__}). Begin a Sequential model with "
            "keras.Input(shape); parametrize a model before it is aligned."
        )
    if isinstance(model, keras.Sequential):
        return keras.Model(*ends, name=model.name)
    return keras.Model(model.input, model.output, name=model.name)


def _check_ends(which: str, model: keras.Model, base: keras.Model) -> None:
    found = [
        keras.tree.map_structure(lambda tensor: str(tensor.shape), getattr(m, which))
        for m in (model, base)
    ]
    if found[0] != found[1]:
        raise ValueError(
            f"`base` must have the model's {which}s: they do not grow with the width. "
            f"Received: {which} shapes {found[0]} of the model, {found[1]} of the "
            "base."
        )


@dataclasses.dataclass(frozen=True)
class _Replacement:
    """The layers that replace a layer.

    Attributes:
        copy: A new layer of the same kind.
        before: Layers for its inputs.
        behind: Layers for its outputs, in order.
        factors: Factors of the initial values, by the `id` of the original variable.
    """

    copy: Any
    before: tuple[keras.layers.Layer, ...] = ()
    behind: tuple[keras.layers.Layer, ...] = ()
    factors: dict[int, float] = dataclasses.field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def scaled(value: Any) -> Any:
            if isinstance(value, keras.KerasTensor):
                for layer in self.before:
                    value = layer(value)
            return value

        args, kwargs = keras.tree.map_structure(scaled, (args, kwargs))
        outputs = self.copy(*args, **kwargs)
        for layer in self.behind:
            outputs = layer(outputs)
        return outputs


def _clone(
    model: keras.Model, base: keras.Model, kind: str, optimizer: str
) -> keras.Model:
    """A copy with multipliers. Its weights are the model's times their factors."""
    n_used = sum(len(layer.variables) for layer in model.layers)
    if n_used != len(model.variables):
        raise ValueError(
            "Kernels that layers share have no role of their own. Received: model "
            f"'{model.name}', whose {len(model.variables)} variables are used as "
            f"{n_used}. Give each layer its own."
        )
    taken = {layer.name for layer in model.layers}
    replacements: dict[int, _Replacement] = {}
    for layer, twin in _pairs(model, base):
        grown = shapes(layer) != shapes(twin)
        changes = grown and kind != "standard"
        if changes and len(compat.calls_of(layer, model)) > 1:
            raise ValueError(
                "A layer that is called more than once has no role of its own. "
                f"Received: layer '{layer.name}' of model '{model.name}', whose "
                "weights grow. Use a layer for each call."
            )
        if compat.graph_ends(layer) is not None:
            inner, inner_base = _graph(layer, "model"), _graph(twin, "base")
            replacement = _Replacement(_clone(inner, inner_base, kind, optimizer))
        elif changes:
            replacement = _replacement(layer, twin, kind, optimizer, taken)
        else:
            replacement = _Replacement(_copy(layer))
        replacements[id(layer)] = replacement
    by_copy = {
        id(replacement.copy): replacement for replacement in replacements.values()
    }

    def clone(operation: Any) -> Any:
        known = replacements.get(id(operation))
        return _copy(operation) if known is None else known.copy

    def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
        return by_copy.get(id(operation), operation)(*args, **kwargs)

    result = keras.models.clone_model(model, clone_function=clone, call_function=call)
    for layer in model.layers:
        # Inputs have no replacement, and inner models already have their weights.
        if id(layer) in replacements and compat.graph_ends(layer) is None:
            _assign(layer, replacements[id(layer)])
    return result


def _copy(operation: Any) -> Any:
    return type(operation).from_config(operation.get_config())


def _assign(layer: keras.layers.Layer, replacement: _Replacement) -> None:
    for source, target in zip(layer.variables, replacement.copy.variables, strict=True):
        # As a NumPy copy: on JAX an assigned array is shared, and training donates it.
        value = ops.convert_to_numpy(source)
        factor = replacement.factors.get(id(source), 1.0)
        target.assign(value if factor == 1.0 else value * factor)


def _pairs(
    model: keras.Model, base: keras.Model
) -> list[tuple[keras.layers.Layer, keras.layers.Layer]]:
    """The layers of a model but its inputs, each with the layer of the base."""
    mine, theirs = (
        [x for x in m.layers if not isinstance(x, layers.InputLayer)]
        for m in (model, base)
    )
    if len(mine) != len(theirs):
        raise ValueError(
            "`base` must have the model's layers. Received: "
            f"{len(mine)} layers in model '{model.name}', {len(theirs)} in base "
            f"'{base.name}'."
        )
    pairs = list(zip(mine, theirs, strict=True))
    for layer, twin in pairs:
        ranks = [[len(shape) for shape in shapes(x)] for x in (layer, twin)]
        graphs = [compat.graph_ends(x) is not None for x in (layer, twin)]
        if graphs != [True, True] and (type(layer), ranks[0]) != (type(twin), ranks[1]):
            raise ValueError(
                "`base` must have the model's layers, in the same order and with as "
                f"many weights of the same ranks. Received: {words(layer)} in the "
                f"model where the base has {words(twin)}."
            )
    return pairs


def _replacement(
    layer: keras.layers.Layer,
    base: keras.layers.Layer,
    kind: str,
    optimizer: str,
    taken: set[str],
) -> _Replacement:
    """The layers that replace a layer whose weights grow."""
    grown = growth(layer, base)
    of_kernel, of_vector = grown.multipliers(kind, optimizer)
    factors = {id(vector): 1.0 / of_vector for vector in grown.vectors}
    if grown.kernel is not None:
        size = to_base_size(layer, base) * grown.spread(kind)
        factors[id(grown.kernel)] = size / of_kernel
    # A multiplier after the layer multiplies the bias, too.
    if isinstance(layer, layers.Embedding):
        inside, outside = 1.0, of_kernel
    elif grown.kernel is None:
        inside, outside = 1.0, of_vector if grown.vectors else 1.0
    elif grown.vectors:
        inside, outside = of_kernel / of_vector, of_vector
    else:
        inside, outside = of_kernel, 1.0
    if (inside, outside) != (1.0, 1.0):
        _check_multiplied(layer, base)
    before = _rescaling(layer, inside, "in_scale", taken)
    behind = _rescaling(layer, outside, "out_scale", taken)
    config = layer.get_config()
    if behind:
        behind += _activation(layer, taken)
        moved = {"activation", "activity_regularizer"} & set(config)
        config.update(dict.fromkeys(moved))
    return _Replacement(type(layer).from_config(config), before, behind, factors)


def _check_multiplied(layer: keras.layers.Layer, base: keras.layers.Layer) -> None:
    shifts = type(layer) in NORMALIZATIONS and getattr(layer, "center", False)
    if shifts and not layer.scale:
        raise UnknownRoleError(
            layer, base, "a shift cannot be multiplied without a scale"
        )
    for name in _CONSTRAINTS:
        constraint = getattr(layer, name, None)
        if constraint is not None:
            raise ValueError(
                "A constraint would act on stored weights, which are not the effective "
                f"ones. Received: {name}={constraint} of layer '{layer.name}'. Remove "
                "it, or use kind='standard'."
            )


def _rescaling(
    layer: keras.layers.Layer, scale: float, suffix: str, taken: set[str]
) -> tuple[keras.layers.Layer, ...]:
    """A layer that multiplies by `scale`, or none if that is 1."""
    if scale == 1.0:
        return ()
    name = _unused(f"{layer.name}_{suffix}", taken)
    return (layers.Rescaling(scale, dtype=layer.dtype_policy, name=name),)


def _activation(
    layer: keras.layers.Layer, taken: set[str]
) -> tuple[keras.layers.Layer, ...]:
    """A layer for the activation and the activity regularizer, if there are any."""
    function = getattr(layer, "activation", None) or keras.activations.linear
    if function is keras.activations.linear and layer.activity_regularizer is None:
        return ()
    return (
        layers.Activation(
            function,
            activity_regularizer=layer.activity_regularizer,
            dtype=layer.dtype_policy,
            name=_unused(f"{layer.name}_activation", taken),
        ),
    )


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
