"""Several devices and processes compute what one device computes."""

import functools
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from small import cross_entropy, digits, mlp

import keras_dalign as kd
from keras_dalign.head.batch_predictor import BatchPredictor

BACKEND = keras.backend.backend()
SECONDS = 300

# Kinds of `several.start`, with numbers of processes.
KINDS = {
    "tensorflow": [("mirrored", 1), ("workers", 2)],
    "jax": [("mesh", 1), ("mesh", 2), ("model", 1)],
    "torch": [("group", 2)],
}[BACKEND]
PROCESSES = [(kind, processes) for kind, processes in KINDS if processes > 1]


def free_port():
    """A port such that it and the next one are free."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("localhost", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("localhost", port + 1))
            except OSError:
                continue
            return port


@functools.cache
def run(kind, processes):
    """Runs `several.py` in as many processes; gives what each of them found."""
    here = Path(__file__).parent
    paths = [str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "KERAS_BACKEND": BACKEND,
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    if BACKEND == "jax":
        import jax

        # What one process has compiled, others need not compile again.
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    port = free_port()
    started = []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{index}.pickle" for index in range(processes)]
        logs = [output.with_suffix(".log") for output in outputs]
        try:
            for index, output in enumerate(outputs):
                command = [here / "several.py", kind, index, processes, port, output]
                with logs[index].open("wb") as log:
                    started.append(
                        subprocess.Popen(
                            [sys.executable, *map(str, command)],
                            env=environment,
                            stdout=log,
                            stderr=log,
                        )
                    )
            ends = [process.wait(SECONDS) for process in started]
        except subprocess.TimeoutExpired:
            ends = [process.poll() for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        told = "\n".join(log.read_text()[-5000:] for log in logs)
        assert ends == [0] * processes, f"exit codes {ends}\n{told}"
        return [pickle.loads(output.read_bytes()) for output in outputs]


def name(kind):
    return "-".join(map(str, kind))


def allowed(key, value):
    """By how much a number may differ: sums in another order end at another iterate."""
    if key.startswith("iterations"):
        return 2 + 0.05 * value
    if key in {"gap", "certified"}:
        return 1e-6 + value
    # A gap of `g` leaves the parameters open by about the square root of `g`.
    part = 1e-2 if key in {"q", "bias"} else 1e-3
    return 1e-6 + part * np.max(np.abs(value))


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_results_are_those_of_one_device(kind):
    (alone,) = run("alone", 1)
    for process in run(*kind):
        for case, found in process["results"].items():
            expected = alone["results"][case]
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                np.testing.assert_allclose(
                    found[key],
                    value,
                    0,
                    allowed(key, value),
                    err_msg=f"{key} of {case}",
                )


@pytest.mark.parametrize("kind", PROCESSES, ids=name)
def test_processes_end_with_the_same_model(kind):
    first, *others = run(*kind)
    for other in others:
        for case, expected in first["results"].items():
            if "q" in expected:
                found = other["results"][case]
                np.testing.assert_array_equal(found["q"], expected["q"], case)


@pytest.mark.parametrize("kind", PROCESSES, ids=name)
def test_processes_that_disagree_are_told(kind):
    expected = {
        "samples": "inputs and targets",
        "inputs": "inputs",
        "targets": "targets",
        "stream": "batches",
        "width": "heads",
    }
    if BACKEND == "torch":
        expected["weights"] = "weights"
    for index, process in enumerate(run(*kind)):
        for case, differ in expected.items():
            message = process["messages"][case]
            assert f"Received: different {differ} ({differ.split()[0]} " in message
            assert f" in process {index})" in message


@pytest.mark.skipif(BACKEND != "jax", reason="a limit of Keras on JAX")
@pytest.mark.parametrize("processes", [1, 2])
def test_batches_that_devices_do_not_divide_are_refused_on_jax(processes):
    for process in run("mesh", processes):
        for case, n, rows in (("fit", 201, 1), ("evaluate", 203, 3)):
            message = process["messages"][case]
            assert f"{n} samples in batches of 40, one of them of {rows}" in message
            assert f"for {4 // processes} devices" in message


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
@pytest.mark.parametrize("exploit", [None, "solve"])
def test_batches_that_replicas_do_not_divide(exploit, mirrored):
    x, y = digits(51)
    with mirrored.scope():
        model = kd.align(mlp(), n_samples=len(x))
        # Few iterations: TensorFlow may crash when it frees a strategy's iterator, of
        # which each iteration with validation data makes one.
        options = {"l2": 1e-2, "tol": 0.2} if exploit else None
        optimizer = kd.DAlign(
            keras.optimizers.Adam(1e-2),
            explore=2,
            exploit_optimizer=exploit,
            solve_options=options,
        )
        model.compile(optimizer, cross_entropy(), metrics=["accuracy"])
    # The first batch is of 17 samples, for two replicas.
    losses = model.fit(
        x, y, epochs=4, batch_size=17, validation_data=(x, y), verbose=0
    ).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
def test_replicas_share_the_rows_of_a_pass(mirrored):
    class Recording(keras.layers.Layer):
        """Keeps the number of rows that a replica is given."""

        def call(self, inputs):
            rows.add(inputs.shape[0])
            return inputs

    rows = set()
    x, _ = digits(33)
    with mirrored.scope():
        inputs = keras.Input((64,))
        model = keras.Model(inputs, keras.layers.Dense(3)(Recording()(inputs)))
    rows.clear()
    predictor = BatchPredictor(model)
    expected = model.predict(x, verbose=0)
    rows.clear()
    np.testing.assert_allclose(predictor.outputs(x), expected, rtol=1e-5)
    np.testing.assert_allclose(predictor.outputs(x[:5]), expected[:5], rtol=1e-5)
    assert rows == {17}
