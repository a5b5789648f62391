"""Several devices and processes compute what one device computes."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from small import cross_entropy, digits, mlp

import keras_dalign as kd

BACKEND = keras.backend.backend()
SECONDS = 300

# Kinds of `several.start`, with numbers of processes.
KINDS = {
    "tensorflow": [("mirrored", 1), ("workers", 2)],
    "jax": [("mesh", 1), ("mesh", 2)],
    "torch": [("group", 2)],
}[BACKEND]


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


def run(kind, processes, folder):
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
    port = str(free_port())
    outputs = [folder / f"{kind}-{index}.pickle" for index in range(processes)]
    started = []
    try:
        for index, output in enumerate(outputs):
            command = [here / "several.py", kind, index, processes, port, output]
            with output.with_suffix(".log").open("wb") as log:
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
    logs = [output.with_suffix(".log").read_text()[-5000:] for output in outputs]
    assert ends == [0] * processes, "\n".join(logs)
    return [pickle.loads(output.read_bytes()) for output in outputs]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds on one device."""
    (found,) = run("alone", 1, tmp_path_factory.mktemp("alone"))
    return found["results"]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}{kind[1]}")
def several(request, tmp_path_factory):
    """What each of several processes finds, or one with several devices."""
    return run(*request.param, tmp_path_factory.mktemp("several"))


def test_results_are_those_of_one_device(alone, several):
    for process in several:
        for name, expected in alone.items():
            found = process["results"][name]
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                tolerance = 1e-6 + 1e-3 * np.max(np.abs(value))
                np.testing.assert_allclose(
                    found[key], value, 0, tolerance, err_msg=f"{key} of {name}"
                )


def test_processes_end_with_the_same_model(several):
    first, *others = several
    for other in others:
        for name, expected in first["results"].items():
            for key in ("q", "bias"):
                np.testing.assert_array_equal(
                    other["results"][name].get(key, 0), expected.get(key, 0), name
                )


def test_processes_that_disagree_are_told(several):
    expected = {
        "samples": "inputs and targets",
        "inputs": "inputs",
        "targets": "targets",
        "stream": "batches",
        "width": "heads",
    }
    if BACKEND == "torch":
        expected["weights"] = "weights"
    if len(several) == 1:
        expected = {}
    for index, process in enumerate(several):
        for case, differ in expected.items():
            message = process["messages"][case]
            assert f"Received: different {differ} ({differ.split()[0]} " in message
            assert f" in process {index})" in message


@pytest.mark.skipif(BACKEND != "jax", reason="a limit of Keras on JAX")
def test_batches_that_devices_do_not_divide_are_refused_on_jax(several):
    devices = 4 // len(several)
    for process in several:
        for case, n, rows in (("fit", 201, 1), ("evaluate", 203, 3)):
            message = process["messages"][case]
            assert f"{n} samples in batches of 40, one of them of {rows}" in message
            assert f"for {devices} devices" in message


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
@pytest.mark.parametrize("exploit", [None, "solve"])
def test_batches_that_replicas_do_not_divide(exploit, mirrored):
    x, y = digits(51)
    with mirrored.scope():
        model = kd.align(mlp(), n_samples=len(x))
        options = {"l2": 1e-2} if exploit else None
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
