"""Float64 copies of models, since ranks and residuals need more than float32."""

from __future__ import annotations

import contextlib
import inspect
import random
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops
from keras.src.backend.common import dtypes
from keras.src.saving.serialization_lib import ObjectSharingScope

from keras_dalign.diagnostics.determinism import no_gradients
from keras_dalign.numerics.arguments import shown

if TYPE_CHECKING:
    from keras_dalign.numerics import Array

_NARROW = ("float16", "bfloat16", "float32", "mixed_float16", "mixed_bfloat16")
# Outputs of one function in two dtypes: the largest difference, relative to the largest
# output, that counts as rounding.
_NARROWING = {"float64": 1e-6, "float32": 1e-2, "float16": 0.3, "bfloat16": 0.3}
_POLICIES = ("DTypePolicy", "DTypePolicyMap", "FloatDTypePolicy")


class RebuildError(ValueError):
    """A model cannot be rebuilt from its config, so it has no float64 copy."""


@contextlib.contextmanager
def float64_context() -> Iterator[None]:
    """The context in which a float64 copy is built and used.

    In it, Keras's default float is float64, JAX can compute in float64, and operations
    on float64 have float64 results. Without it, Keras casts these to float32 on JAX and
    PyTorch, even within a float64 model. Do not train in it.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If this version of Keras computes in float32 nevertheless.
    """
    floatx, demotions = keras.config.floatx(), dict(dtypes.BIT64_TO_BIT32_DTYPE)
    keras.config.set_floatx("float64")
    dtypes.BIT64_TO_BIT32_DTYPE.update(float64="float64", complex128="complex128")
    try:
        if keras.backend.result_type("float64", "float64") != "float64":
            raise RuntimeError(
                "Nothing can be judged in float64: this version of Keras makes float32 "
                f"of it. Received: Keras {keras.__version__}"
            )
        with _jax_x64():
            yield
    finally:
        dtypes.BIT64_TO_BIT32_DTYPE.update(demotions)
        keras.config.set_floatx(floatx)


def in_float64(model: keras.Model, x: Any = None) -> keras.Model:
    """Rebuilds a model with every floating dtype widened to float64.

    Layers, inputs and casts of the copy are float64, whatever dtype policy the model
    has. Weights are converted exactly. The copy is not compiled. The model, and the
    random state of Python and NumPy, do not change.

    Args:
        model: A built Keras model whose config rebuilds it: Functional, Sequential, an
            `AlignedModel`, or a subclass with `get_config`. Custom classes need not be
            registered.
        x: A batch of inputs, to build a subclassed model with, if it needs one.

    Returns:
        The copy, to be used within `float64_context`. Its `weights` are in the order of
        the model's.

    Raises:
        RebuildError: If the model cannot be rebuilt, or not with the same weights.
        ValueError: If a weight is NaN.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise RebuildError(
            "`model` must be a built keras.Model. Received: "
            f"model={shown(model)}. Call it once on a batch of data to build it."
        )
    with float64_context(), _float64_policy(), _random_state():
        copy = _rebuilt(model)
        if x is not None and len(copy.weights) != len(model.weights):
            try:
                copy(keras.tree.map_structure(widened, x), training=False)
            except Exception as error:
                raise RebuildError(
                    _message(model, f"its copy failed with: {error}")
                ) from error
        _check_weights(model, copy)
        for target, source in zip(copy.weights, model.weights, strict=True):
            # Copied: on JAX an assigned array would be shared, and training donates it.
            value = widened(ops.convert_to_numpy(source))
            # TensorFlow may make zeros of NaN, where it compiles a ReLU.
            if value.dtype == np.float64 and np.isnan(value).any():
                raise ValueError(
                    "The model's weights must not be NaN: it has probably diverged. "
                    f"Received: NaN in '{source.path}'. Take weights from before, and "
                    "a smaller learning rate."
                )
            target.assign(value)
    return copy


def widened(array: Any) -> np.ndarray:
    """An array in float64 if it has any floating dtype, unchanged otherwise."""
    array = np.asarray(array)
    # bfloat16 is no floating dtype to NumPy.
    if np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16":
        return array.astype("float64")
    return array


def _rebuilt(model: keras.Model) -> keras.Model:
    classes = {type(layer).__name__: type(layer) for layer in model._flatten_layers()}
    custom = {
        name: layer_class
        for name, layer_class in classes.items()
        if not layer_class.__module__.startswith(("keras.", "keras_dalign."))
    }
    # Only objects that exist as long as the model: other ids may be reused.
    shared = {id(layer) for layer in model._flatten_layers()}
    try:
        with ObjectSharingScope():
            # The copy shares layers that are used twice, by their ids in the config.
            # The scope gives ids to objects it has seen before, so all get one in the
            # second call.
            keras.saving.serialize_keras_object(model)
            config = keras.saving.serialize_keras_object(model)
        config = _widened_config(config, custom, shared)
        with ObjectSharingScope(), warnings.catch_warnings():
            # The same warnings were issued when the model was made.
            warnings.simplefilter("ignore")
            return keras.saving.deserialize_keras_object(
                config, custom_objects=custom, safe_mode=False
            )
    except Exception as error:
        raise RebuildError(_message(model, f"Keras said: {error}")) from error


def _widened_config(config: Any, custom: dict[str, type], shared: set[int]) -> Any:
    """The config with float64 for all floating dtypes, and no `compile_config`."""
    if isinstance(config, (list, tuple)):
        return type(config)(_widened_config(value, custom, shared) for value in config)
    if not isinstance(config, dict):
        return config
    name = config.get("class_name")
    if isinstance(name, str) and name.endswith("DTypePolicy") and "Quant" in name:
        raise ValueError("quantized layers have no float64 form")
    if name in _POLICIES:
        policy = config.get("config", {}).get("name", "")
        is_float = name == "DTypePolicyMap" or policy in _NARROW
        return _float64_config() if is_float else config
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key == "compile_config":
            continue
        if key == "shared_object_id" and value not in shared:
            continue
        if key in {"dtype", "output_dtype"} and value in _NARROW:
            result[key] = "float64"
        else:
            result[key] = _widened_config(value, custom, shared)
    if name in custom and isinstance(result.get("config"), dict):
        result["config"] = _accepted(custom[name], result["config"])
    return result


def _accepted(layer_class: type, config: dict[str, Any]) -> dict[str, Any]:
    """The config without keys that Keras adds and the constructor does not take."""
    parameters = inspect.signature(layer_class).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return config
    optional = {"name", "trainable", "dtype"} - set(parameters)
    return {key: value for key, value in config.items() if key not in optional}


def _float64_config() -> Any:
    return keras.dtype_policies.serialize(keras.DTypePolicy("float64"))


def _check_weights(model: keras.Model, copy: keras.Model) -> None:
    shapes = [[tuple(v.shape) for v in m.weights] for m in (model, copy)]
    if shapes[0] != shapes[1]:
        reason = (
            f"the copy has {len(shapes[1])} weights where the model has "
            f"{len(shapes[0])}, or weights of other shapes"
        )
        raise RebuildError(_message(model, reason))


def _message(model: keras.Model, reason: str) -> str:
    return (
        "The model cannot be rebuilt in float64 from its config. Received: model "
        f"'{model.name}' of type {type(model).__name__}; {reason}. Give its classes a "
        "`get_config` that returns all arguments of their constructors."
    )


@contextlib.contextmanager
def _float64_policy() -> Iterator[None]:
    """Makes float64 the default, for layers that a custom layer makes without dtype."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    """Restores the global random generators, which Keras shuffles data with."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _jax_x64() -> Any:
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax  # noqa: PLC0415  (only where it is the backend)

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # noqa: PLC0415

    return enable_x64()


def agreeing_copy(model: keras.Model, batch: Any) -> keras.Model:
    """Makes a float64 copy of a model, and checks that their outputs agree.

    Args:
        model: A built model, which does not change.
        batch: Inputs to compare the two on.

    Returns:
        The copy; see `in_float64`.

    Raises:
        RebuildError: If the model cannot be rebuilt, or the outputs of its copy differ.
    """
    copy = in_float64(model, batch)
    with no_gradients():
        own = model(
            keras.tree.map_structure(ops.convert_to_tensor, batch), training=False
        )
        with float64_context():
            wide = keras.tree.map_structure(
                lambda leaf: ops.convert_to_tensor(widened(leaf)), batch
            )
            other = copy(wide, training=False)
    rounding = max(_NARROWING.get(dtype, 0.0) for dtype in _dtypes(model))
    for tensor, twin in zip(
        keras.tree.flatten(own), keras.tree.flatten(other), strict=True
    ):
        a, b = as_float64(tensor), as_float64(twin)
        if not close_to(b, a, rounding):
            raise RebuildError(
                "The model's float64 copy computes something else. Received: model "
                f"'{model.name}' of type {type(model).__name__}, whose outputs differ "
                f"by up to {np.max(np.abs(a - b)):.3g} from its copy's. Check that "
                "`get_config` returns everything that makes it what it is."
            )
    return copy


def narrow_operations(copy: keras.Model, batch: Any) -> str:
    """Detects operations of a float64 copy that have float32 results.

    Args:
        copy: A copy by `in_float64`. Its weights are changed and restored.
        batch: Inputs to try it on.

    Returns:
        Why the copy does not compute in float64, or an empty string if it does.
    """
    # Along steps this small, float64 outputs are linear to 1e-11; float32 rounding is
    # larger than that.
    few = keras.tree.map_structure(lambda leaf: widened(leaf[:2]), batch)
    weights = [v for v in copy.weights if "float" in str(v.dtype)]
    values = [as_float64(v) for v in weights]
    rng = np.random.default_rng(0)
    moves = [3e-9 * rng.standard_normal(value.shape) * value for value in values]
    outputs = []
    with no_gradients(), float64_context():
        tensors = keras.tree.map_structure(ops.convert_to_tensor, few)
        for step in (1, -1, 0):
            for variable, value, move in zip(weights, values, moves, strict=True):
                variable.assign(value + step * move)
            leaves = keras.tree.flatten(copy(tensors, training=False))
            outputs.append(
                np.concatenate([as_float64(leaf).ravel() for leaf in leaves])
            )
    bend = np.max(np.abs(outputs[0] + outputs[1] - 2 * outputs[2]), initial=0.0)
    if bend <= 1e-11 * np.max(np.abs(outputs[2]), initial=0.0):
        return ""
    return "some operation of the model computes in float32, whatever it is given"


def _dtypes(model: keras.Model) -> set[str]:
    """The dtypes that a model's layers compute in."""
    return {str(layer.compute_dtype) for layer in model._flatten_layers()}


def close_to(a: Array, b: Array, tolerance: float) -> bool:
    """Whether arrays agree, to a tolerance relative to the largest entry of `a`."""
    scale = np.max(np.abs(a), initial=0.0)
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= tolerance * scale))


def as_float64(tensor: Any) -> Array:
    """A tensor of any backend as a NumPy array in float64."""
    array: Array = np.asarray(ops.convert_to_numpy(tensor)).astype("float64")
    return array
