"""`AlignedModel.export`: artifacts that compute what the model computes."""

import keras
import numpy as np
import pytest
from small import convnet, cross_entropy, digit_images, digits, mlp

import keras_dalign as kd
from keras_dalign.training.trunk import input_specs

BACKEND = keras.backend.backend()
# What Keras imports for a format, and what the tests read it with.
NEEDS = {
    ("tensorflow", "tf_saved_model"): (),
    ("tensorflow", "litert"): (),
    ("tensorflow", "onnx"): ("tf2onnx", "onnxruntime"),
    ("jax", "tf_saved_model"): ("tensorflow",),
    ("jax", "onnx"): ("jax2onnx", "onnxruntime"),
    ("torch", "torch"): (),
    ("torch", "onnx"): ("onnx", "onnxruntime"),
    ("torch", "litert"): ("litert_torch",),
}
FORMATS = [kind for backend, kind in NEEDS if backend == BACKEND]
SUFFIXES = {"litert": ".tflite", "onnx": ".onnx", "torch": ".pt2"}

# Exporters of other projects warn about their own future.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=FORMATS)
def exported(request, tmp_path):
    """Exports a model and returns what its artifact computes, as a function."""
    kind = request.param
    for package in NEEDS[BACKEND, kind]:
        pytest.importorskip(package, exc_type=ImportError)

    def export(model, **arguments):
        path = str(tmp_path / f"artifact{SUFFIXES.get(kind, '')}")
        model.export(path, format=kind, verbose=False, **arguments)
        return READERS[kind](path)

    return export


def of_saved_model(path):
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    return lambda x: np.asarray(loaded.serve(x))


def of_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(x):
        leaves = keras.tree.flatten(x)
        return session.run(None, dict(zip(names, leaves, strict=True)))[0]

    return run


def of_litert(path):
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(path)
    (given,) = interpreter.get_input_details()
    (result,) = interpreter.get_output_details()

    def run(x):
        interpreter.resize_tensor_input(given["index"], x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return run


def of_torch(path):
    import torch

    module = torch.export.load(path).module()

    def run(x):
        # Without more arguments PyTorch exports for one sample at a time.
        rows = [
            module(
                keras.tree.map_structure(
                    lambda leaf, i=i: torch.as_tensor(leaf[i : i + 1]), x
                )
            )
            for i in range(len(keras.tree.flatten(x)[0]))
        ]
        return torch.cat(rows).detach().numpy()

    return run


READERS = {
    "tf_saved_model": of_saved_model,
    "onnx": of_onnx,
    "litert": of_litert,
    "torch": of_torch,
}


def aligned(base=None, n=96, **options):
    model = kd.align(base or mlp(), n_samples=n, seed=1, **options)
    model.compile("sgd", cross_entropy())
    return model


def solved(model, x, y):
    kd.solve(model, x, y, l2=1e-3, max_iterations=20, verbose=0)
    assert model.phase == "exploiting"
    return model


def loaded(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def assert_computes(run, model, x):
    np.testing.assert_allclose(
        run(x), keras.ops.convert_to_numpy(model(x)), rtol=1e-4, atol=1e-5
    )


STATES = {
    "new": lambda model, x, y, folder: model,
    "fitted": lambda model, x, y, folder: model.fit(x, y, verbose=0).model,
    "predicted": lambda model, x, y, folder: (model.predict(x, verbose=0), model)[1],
    "loaded": lambda model, x, y, folder: loaded(model, folder),
    "solved": lambda model, x, y, folder: solved(model, x, y),
    "solved, fitted": lambda model, x, y, folder: (
        solved(model, x, y).fit(x, y, verbose=0).model
    ),
    "solved, loaded": lambda model, x, y, folder: loaded(solved(model, x, y), folder),
}


@pytest.mark.parametrize("state", STATES)
def test_in_both_phases_after_anything(exported, state, tmp_path):
    x, y = digits(96)
    model = STATES[state](aligned(), x, y, tmp_path)
    assert (model.phase == "exploiting") == state.startswith("solved")
    run = exported(model)
    # Other numbers of samples than it was traced with.
    assert_computes(run, model, x[:5])
    if state == "solved":
        assert_computes(run, model, x[:3])


@pytest.mark.parametrize("phase", ["exploring", "exploiting"])
def test_a_trunk_with_batch_norm_and_a_feature_map(exported, phase):
    x, y = digit_images(96)
    model = aligned(convnet())
    if phase == "exploiting":
        solved(model, x, y)
    assert_computes(exported(model), model, x[:4])


def test_learned_gates(exported):
    x, y = digits(96)
    model = aligned(gates="learned", width=4)
    assert_computes(exported(model), model, x[:4])
    solved(model, x, y)
    # The format's file is written anew.
    assert_computes(exported(model), model, x[:4])


def test_a_signature_may_be_given(exported):
    x, _ = digits(8)
    model = aligned()
    signature = [keras.InputSpec(shape=(1, 64), dtype="float32", name="pixels")]
    assert_computes(exported(model, input_signature=signature), model, x[:1])


def two_inputs():
    keras.utils.set_random_seed(0)
    left, right = keras.Input((3,), name="left"), keras.Input((4,), name="right")
    h = keras.layers.Dense(8, "relu")(keras.layers.Concatenate()([left, right]))
    return keras.Model([left, right], keras.layers.Dense(3)(h))


def test_inputs_keep_their_structure_and_names():
    model = kd.align(two_inputs(), n_samples=9)
    (specs,) = [input_specs(model.trunk)]
    assert [spec.name for spec in specs] == ["left", "right"]
    assert [spec.shape for spec in specs] == [(None, 3), (None, 4)]
    assert {spec.dtype for spec in specs} == {"float32"}


class Features(keras.Model):
    """A trunk that is no graph."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(6, "relu")

    def call(self, inputs):
        return self.dense(inputs)


def test_a_trunk_that_is_no_graph(exported):
    x, _ = digits(8)
    trunk, head = Features(), kd.AlignmentHead(3, n_samples=8)
    head(trunk(x))
    model = kd.AlignedModel(trunk, head)
    assert_computes(exported(model), model, x[:4])


class Parts(Features):
    def call(self, parts):
        return self.dense(parts["left"] + parts["right"])


def test_inputs_that_nobody_knows(tmp_path):
    x, _ = digits(8)
    trunk, head = Parts(), kd.AlignmentHead(3, n_samples=8)
    head(trunk({"left": x, "right": x}))
    model = kd.AlignedModel(trunk, head)
    with pytest.raises(
        ValueError,
        match=r"inputs are unknown.*Parts.*input_signature=\[keras.InputSpec",
    ):
        model.export(tmp_path / "artifact", verbose=False)
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("suffix", [".h5", ".hdf5"])
def test_the_legacy_format_is_refused_before_a_file_is_touched(suffix, tmp_path):
    model, path = aligned(), tmp_path / f"model{suffix}"
    path.write_text("precious")
    with pytest.raises(ValueError, match=r"legacy HDF5.*`filepath`.*model\.keras"):
        model.save(path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("nested", [False, True])
def test_the_legacy_format_is_refused_on_every_way_to_it(nested, tmp_path):
    model = aligned()
    if nested:
        inputs = keras.Input((64,))
        model = keras.Model(inputs, model(inputs))
    with pytest.raises(ValueError, match=r"legacy HDF5.*`filepath`.*model\.keras"):
        keras.saving.save_model(model, tmp_path / "model.h5")
    # Neither the native format nor the weights are concerned.
    keras.saving.save_model(model, tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
