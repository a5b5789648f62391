"""Model surgery: swap the output layer of a Keras model for an alignment head."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from keras_dalign.head.alignment_head import GATES, AlignmentHead
from keras_dalign.numerics.arguments import choice, flag, integer, shown
from keras_dalign.numerics.default_width import default_width
from keras_dalign.training.aligned_model import AlignedModel
from keras_dalign.training.feature_map import flattened, pooled_less
from keras_dalign.training.inherited_loss import loss_of_logits
from keras_dalign.training.model_graph import as_graph, copied, last_call
from keras_dalign.training.output_layer import OutputLayer, find_output

AUTO = "auto"


def align(
    model: keras.Model,
    n_samples: int,
    *,
    gates: str = "random",
    layer: str | keras.layers.Layer | None = None,
    features: str | keras.layers.Layer | None = AUTO,
    width: int | None = None,
    slope: float = 20.0,
    share_gates: bool = True,
    seed: int | None = None,
    copy: bool = False,
) -> AlignedModel:
    """Replaces the output layer of a model by an `AlignmentHead`.

    The result has the model's inputs and outputs (logits, in the dtype of the model's
    outputs). With `gates="random"` it computes, until the switch, what the model
    computes, bit for bit.

    The output layer is a `Dense` on feature vectors. A convolution with kernels of size
    1 on a map of a single place is equivalent and accepted, too: models of
    `keras.applications` that pool with `keepdims` end so. A convolution on a larger map
    that is averaged afterwards is equivalent only up to rounding, and refused.

    Args:
        model: A built Keras classifier or regressor with one output that ends in
            such a layer: Functional, Sequential, from `keras.applications`, or a
            subclass whose `call` can be traced. A softmax or sigmoid after (or in)
            that layer is dropped with a warning.
        n_samples: Positive int, number of training samples.
        gates: `"random"` or `"learned"`, see `AlignmentHead`.
        layer: The output layer, or its name. By default it is detected. Everything
            after it is dropped.
        features: The input of the gated units. None: the output layer's input. A layer
            of the model, or its name: the output of this layer, flattened. `"auto"`:
            with random gates, where the model (or a model that it calls as a layer)
            ends in a global average pooling, the feature map in front of the pooling,
            averaged over a coarse grid (see `feature_map.pooled_less`); in all other
            cases as None.
        width: Gated units per output, see `AlignmentHead`.
        slope: Positive float, see `AlignmentHead`.
        share_gates: Whether outputs share random gates, see `AlignmentHead`.
        seed: Int, see `AlignmentHead`.
        copy: Whether to work on a copy of the model's weights. By default they are
            shared: exploration trains the given model, exploitation does not change it.

    Returns:
        The `AlignedModel`. Compile it with `DAlign`, or pass it to `solve`, which
        needs no `compile` if the given model was compiled: the model's loss is kept as
        `inherited_loss`, and takes logits where it took probabilities.

    Raises:
        ValueError: If the model cannot be aligned; the message says what to do.
        MemoryError: If the units of learned gates do not fit into memory.

    Warns:
        UserWarning: If a softmax or sigmoid is dropped, the width is too small, or the
            model's class overrides how Keras trains, which is not carried over.

    Example:

    ```python
    base = keras.applications.MobileNetV2(weights=None, classes=10,
                                          input_shape=(32, 32, 3))
    model = keras_dalign.align(base, n_samples=len(x))
    ```
    """
    integer("n_samples", n_samples, advice="Pass n_samples=len(x).")
    choice("gates", gates, GATES)
    flag("copy", copy)
    if isinstance(model, AlignedModel):
        raise ValueError(
            "The model has an alignment head already. Received: an AlignedModel. Align "
            "the base model anew if you want another head."
        )
    graph = as_graph(model)
    if copy:
        graph = copied(graph)
        # The copy has layers of the same names.
        layer, features = _layer_name(layer), _layer_name(features)
    output = find_output(graph, layer)
    dense = output.dense
    linear, gated = _features(graph, output, features, n_samples, gates)
    if gated is None:
        outputs = linear
    elif gates == "learned":
        # There is no linear part, so its input is not needed.
        outputs = flattened(gated, "gated_features")
    else:
        outputs = [linear, gated]
    trunk = keras.Model(graph.input, outputs, name=f"{model.name}_trunk")
    head = AlignmentHead(
        dense.units,
        width=width,
        n_samples=n_samples,
        gates=gates,
        slope=slope,
        share_gates=share_gates,
        seed=seed,
        dense=dense if gates == "random" else None,
        output_dtype=output.dtype,
        activity_regularizer=output.layer.activity_regularizer,
        dtype=dense.dtype_policy,
        name="alignment_head",
    )
    aligned = AlignedModel(trunk, head, name=model.name, dtype=model.dtype_policy)
    aligned.inherited_loss = loss_of_logits(
        getattr(model, "loss", None), output.dropped
    )
    messages = [
        *output.warnings,
        *_width_warnings(head, n_samples),
        *_training_warnings(model),
    ]
    for message in messages:
        warnings.warn(message, stacklevel=2)
    return aligned


def _training_warnings(model: keras.Model) -> list[str]:
    """Warns of a model whose class overrides how it trains."""
    own = [
        name
        for name in ("train_step", "compute_loss", "fit")
        if getattr(type(model), name) is not getattr(keras.Model, name)
    ]
    if not own:
        return []
    text = (
        "The model's own way to train is not carried over: the aligned model explores "
        f"with Keras's. Received: {type(model).__name__}, which overrides "
        f"{', '.join(own)}. Train it first, and call keras_dalign.solve on the aligned "
        "model, if that matters."
    )
    return [text]


def _width_warnings(head: AlignmentHead, n_samples: int) -> list[str]:
    """Warns of a width that is too small to fit any labels."""
    d, width = head.dim, head.requested_width
    if width is None or width * d >= n_samples:
        return []
    message = (
        f"The head is too narrow to fit any labels of {n_samples} samples: width * d = "
        f"{width} * {d} = {width * d}. Received: width={width}. A width of "
        f"{default_width(n_samples, d, head.slope)} would do. With an L2 term it does "
        "not matter."
    )
    return [message]


def _layer_name(layer: Any) -> Any:
    """The name of a layer; anything else as it is."""
    return layer.name if isinstance(layer, keras.layers.Layer) else layer


def _features(
    graph: keras.Model, output: OutputLayer, features: Any, n_samples: int, gates: str
) -> tuple[keras.KerasTensor, keras.KerasTensor | None]:
    """The input of the output layer, and that of the gated units if it differs."""
    if features is None:
        return output.features, None
    names = {known.name for known in graph.layers}
    if not isinstance(features, str) or features != AUTO or AUTO in names:
        return output.features, _feature_tensor(graph, features)
    if gates != "random":
        return output.features, None
    return pooled_less(output.features, n_samples) or (output.features, None)


def _feature_tensor(graph: keras.Model, features: Any) -> keras.KerasTensor:
    """The output of a layer that the argument `features` names."""
    if isinstance(features, str):
        names = [known.name for known in graph.layers]
        if features not in names:
            raise ValueError(
                "`features`: the model has no such layer. Received: "
                f"features='{features}'. Its layers are: {names}"
            )
        features = graph.get_layer(features)
    if not isinstance(features, keras.layers.Layer):
        raise ValueError(
            "`features` must be a layer of the model or its name. Received: "
            f"features={shown(features)}"
        )
    return last_call(graph, features).outputs[0]
