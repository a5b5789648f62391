"""Base models: residual networks for small images.

They are ordinary Functional Keras models that end in logits, for use as the
`model` of `keras_dalign.align` or by themselves.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TypeGuard

import keras

__all__ = ["resnet"]

# He et al. use their framework's default, an average over about ten steps. With
# Keras's default, 0.99, a tenth of the initial statistics remains after 200
# steps, which is more than a small run has.
_BN_MOMENTUM = 0.9
_BN_EPSILON = 1e-5


def resnet(
    depth: int,
    input_shape: Sequence[int | None] = (32, 32, 3),
    classes: int = 10,
    *,
    width: int | None = None,
    preactivation: bool = False,
    dtype: str | keras.DTypePolicy | None = None,
    name: str | None = None,
) -> keras.Model:
    """Builds a residual network for small images.

    There are two families, chosen by `depth`:

    - `depth = 6 n + 2` (8, 14, 20, 26, 32, ...): three stages of `n` basic
      blocks with 16, 32 and 64 channels, the networks of He et al. for
      CIFAR-10.
    - `depth = 18`: four stages of two basic blocks with 64, 128, 256 and 512
      channels, ResNet-18 with the stem for small images: a 3x3 convolution
      with stride 1 and no max-pooling.

    A basic block is two 3x3 convolutions without bias, each with its batch
    normalisation and ReLU. Every stage but the first halves height and width
    in its first block. Where the shape changes, the shortcut is a 1x1
    convolution, which `depth` does not count. Global average pooling and one
    `Dense` layer, named `"logits"`, follow.

    Sources: K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image
    recognition", CVPR 2016; with `preactivation=True`, the same authors'
    "Identity mappings in deep residual networks", ECCV 2016.

    Example:

    ```python
    base = resnet(8, input_shape=(28, 28, 1), classes=10)
    large = resnet(18, classes=100, preactivation=True, dtype="mixed_bfloat16")
    ```

    Args:
        depth: Number of convolution and dense layers on the longest path: 18,
            or `6 n + 2` for an integer `n >= 1`.
        input_shape: Shape of one image, `(height, width, channels)`, or
            `(channels, height, width)` where
            `keras.config.image_data_format()` is `"channels_first"`. Height
            and width may be `None`.
        classes: Number of logits; 1 for regression and binary problems.
        width: Channels of the first stage; each later stage has twice as many
            as the one before. Defaults to 16, and to 64 where `depth` is 18.
        preactivation: Whether batch normalisation and ReLU come before each
            convolution instead of after it, which leaves the identity path
            free of them.
        dtype: The layers' dtype policy, for example `"mixed_bfloat16"`.
            Defaults to `keras.config.dtype_policy()`. The pooled features and
            the logits are float32 under every policy but `"float64"`.
        name: Name of the model. Defaults to `"resnet<depth>"`, with
            `"_preactivation"` appended if `preactivation` is true.

    Returns:
        A Functional `keras.Model` from images `(batch, *input_shape)` to logits
        `(batch, classes)`.

    Raises:
        ValueError: If `depth` is not one of the values above, `input_shape` is
            not the shape of an image, or `classes` or `width` is not a positive
            integer.
    """
    blocks = _blocks_per_stage(depth)
    shape = _image_shape(input_shape)
    classes = _positive_integer("classes", classes)
    if width is None:
        width = 64 if depth == 18 else 16
    width = _positive_integer("width", width)
    policy = keras.dtype_policies.get(
        keras.config.dtype_policy() if dtype is None else dtype
    )
    # Only the convolutions use half precision. It would make features of
    # different inputs equal, and add rounding to the loss.
    wide = "float64" if policy.variable_dtype == "float64" else "float32"
    if name is None:
        name = f"resnet{depth}" + ("_preactivation" if preactivation else "")
    block = _preactivation_block if preactivation else _basic_block

    inputs = keras.Input(shape, dtype=wide, name="images")
    x = _conv(inputs, width, policy, "stem_conv")
    if not preactivation:
        x = _bn_relu(x, policy, "stem")
    for stage, count in enumerate(blocks, start=1):
        for index in range(1, count + 1):
            x = block(
                x,
                width * 2 ** (stage - 1),
                stride=2 if stage > 1 and index == 1 else 1,
                policy=policy,
                name=f"stage{stage}_block{index}",
            )
    if preactivation:
        x = _bn_relu(x, policy, "final")
    x = keras.layers.GlobalAveragePooling2D(dtype=wide, name="features")(x)
    logits = keras.layers.Dense(
        classes, kernel_initializer="he_normal", dtype=wide, name="logits"
    )(x)
    return keras.Model(inputs, logits, name=name)


def _basic_block(
    x: keras.KerasTensor,
    channels: int,
    *,
    stride: int,
    policy: keras.DTypePolicy,
    name: str,
) -> keras.KerasTensor:
    """Convolution, BN, ReLU, convolution, BN, plus the shortcut, ReLU."""
    shortcut = x
    if stride != 1 or _channels(x) != channels:
        shortcut = _conv(
            x, channels, policy, f"{name}_shortcut_conv", size=1, stride=stride
        )
        shortcut = _bn(shortcut, policy, f"{name}_shortcut_bn")
    x = _conv(x, channels, policy, f"{name}_conv1", stride=stride)
    x = _bn_relu(x, policy, f"{name}_1")
    x = _conv(x, channels, policy, f"{name}_conv2")
    x = _bn(x, policy, f"{name}_2_bn")
    x = keras.layers.Add(dtype=policy, name=f"{name}_add")([x, shortcut])
    return keras.layers.ReLU(dtype=policy, name=f"{name}_relu")(x)


def _preactivation_block(
    x: keras.KerasTensor,
    channels: int,
    *,
    stride: int,
    policy: keras.DTypePolicy,
    name: str,
) -> keras.KerasTensor:
    """BN, ReLU, convolution, BN, ReLU, convolution, plus the shortcut."""
    shortcut = x
    x = _bn_relu(x, policy, f"{name}_1")
    if stride != 1 or _channels(x) != channels:
        # As in the second paper, a projection takes the normalised input. An
        # identity takes the input itself.
        shortcut = _conv(
            x, channels, policy, f"{name}_shortcut_conv", size=1, stride=stride
        )
    x = _conv(x, channels, policy, f"{name}_conv1", stride=stride)
    x = _bn_relu(x, policy, f"{name}_2")
    x = _conv(x, channels, policy, f"{name}_conv2")
    return keras.layers.Add(dtype=policy, name=f"{name}_add")([x, shortcut])


def _conv(
    x: keras.KerasTensor,
    channels: int,
    policy: keras.DTypePolicy,
    name: str,
    *,
    size: int = 3,
    stride: int = 1,
) -> keras.KerasTensor:
    return keras.layers.Conv2D(
        channels,
        size,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        dtype=policy,
        name=name,
    )(x)


def _bn(
    x: keras.KerasTensor, policy: keras.DTypePolicy, name: str
) -> keras.KerasTensor:
    return keras.layers.BatchNormalization(
        axis=_channel_axis(),
        momentum=_BN_MOMENTUM,
        epsilon=_BN_EPSILON,
        dtype=policy,
        name=name,
    )(x)


def _bn_relu(
    x: keras.KerasTensor, policy: keras.DTypePolicy, name: str
) -> keras.KerasTensor:
    x = _bn(x, policy, f"{name}_bn")
    return keras.layers.ReLU(dtype=policy, name=f"{name}_relu")(x)


def _channel_axis() -> int:
    return -1 if keras.config.image_data_format() == "channels_last" else 1


def _channels(x: keras.KerasTensor) -> int:
    return int(x.shape[_channel_axis()])


def _blocks_per_stage(depth: int) -> tuple[int, ...]:
    if _is_positive_integer(depth):
        if depth == 18:
            return (2, 2, 2, 2)
        blocks, rest = divmod(int(depth) - 2, 6)
        if blocks >= 1 and rest == 0:
            return (blocks,) * 3
    raise ValueError(
        "`depth` must be 18, or 6 n + 2 for an integer n >= 1: 8, 14, 20, 26, "
        f"32, 38, 44, 50, 56, ... Received: depth={depth!r}"
    )


def _positive_integer(name: str, value: int) -> int:
    if not _is_positive_integer(value):
        raise ValueError(
            f"`{name}` must be an integer of at least 1. Received: {name}={value!r}"
        )
    return int(value)


def _is_positive_integer(value: object) -> TypeGuard[int]:
    return (
        isinstance(value, numbers.Integral)
        and not isinstance(value, bool)
        and int(value) >= 1
    )


def _image_shape(shape: Sequence[int | None]) -> tuple[int | None, ...]:
    last = keras.config.image_data_format() == "channels_last"
    order = "(height, width, channels)" if last else "(channels, height, width)"
    sizes = tuple(shape) if isinstance(shape, Sequence) else ()
    channels = 2 if last else 0
    if len(sizes) != 3 or not all(
        _is_positive_integer(size) or (size is None and index != channels)
        for index, size in enumerate(sizes)
    ):
        raise ValueError(
            f"`input_shape` must be {order}: three positive integers, of which "
            "height and width may be None; a grey image has one channel. "
            f"Received: input_shape={shape!r}"
        )
    return tuple(None if size is None else int(size) for size in sizes)
