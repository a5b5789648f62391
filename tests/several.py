"""What several devices and processes compute: run by `test_distribution`.

    python several.py KIND PROCESS PROCESSES PORT OUTPUT

is one of `PROCESSES` processes of a kind, and writes what `results` and `disagreements`
found there.
"""

import contextlib
import json
import os
import pickle
import sys
from pathlib import Path


def start(kind, process, processes, port):
    """Starts what the backend needs; gives the scope that models are made in."""
    if kind in {"mirrored", "workers"}:
        if kind == "workers":
            workers = [f"localhost:{port + index}" for index in range(processes)]
            task = {"type": "worker", "index": process}
            cluster = {"cluster": {"worker": workers}, "task": task}
            os.environ["TF_CONFIG"] = json.dumps(cluster)
        import tensorflow as tf

        if kind == "workers":
            return tf.distribute.MultiWorkerMirroredStrategy().scope
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 3
        )
        return tf.distribute.MirroredStrategy([f"cpu:{i}" for i in range(3)]).scope
    if kind in {"mesh", "model"}:
        import jax

        jax.config.update("jax_num_cpu_devices", 4 // processes)
        if processes > 1:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        import keras

        if processes > 1:
            keras.distribution.initialize(f"localhost:{port}", processes, process)
        if kind == "mesh":
            parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
        else:
            names = ["batch", "model"]
            mesh = keras.distribution.DeviceMesh((2, 2), names)
            layouts = keras.distribution.LayoutMap(mesh)
            layouts["hidden/kernel"] = (None, "model")
            parallel = keras.distribution.ModelParallel(layout_map=layouts)
        keras.distribution.set_distribution(parallel)
    if kind == "group":
        import torch

        torch.distributed.init_process_group(
            "gloo",
            init_method=f"tcp://localhost:{port}",
            rank=process,
            world_size=processes,
        )
    return contextlib.nullcontext


def found(model, result):
    """Numbers to be compared: those of a solve, and the head's parameters."""
    import numpy as np

    return {
        "value": result.value,
        "gap": result.gap,
        "certified": result.certificate.gap,
        "l2": result.l2,
        "width": result.width,
        "iterations": result.iterations,
        "q": np.asarray(model.head.q),
        "bias": np.asarray(model.head.bias),
    }


def make(scope, images=False, n=139, seed=0, width=None):
    """A model made in a scope, and data: neither 2, 3 nor 4 divide 139."""
    from small import convnet, digit_images, digits, mlp

    import keras_dalign as kd

    x, y = (digit_images if images else digits)(n)
    with scope():
        base = (convnet if images else mlp)(seed)
        return kd.align(base, n_samples=n, seed=1, width=width), x, y


def results(scope, few):
    """Solves, certificates and fits of small problems that count as large ones."""
    import keras
    import numpy as np
    from small import cross_entropy

    import keras_dalign as kd
    from keras_dalign.solving import device_products, problem

    problem._LARGE = 1
    device_products._BLOCK_BYTES = 1  # Blocks of 64 samples, and one of 11.
    told = {"loss": cross_entropy(), "verbose": 0, "batch_size": 64}

    out = {}
    model, x, y = make(scope)
    out["plain"] = found(model, kd.solve(model, x, y, l2=0, tol=1e-5, **told))
    certificate = kd.certify(model, x, y, loss=cross_entropy(), gradient_bound=True)
    out["certify"] = {"gap": certificate.gap, "loss": certificate.loss}
    if few:
        return out
    model, x, y = make(scope, images=True)
    weight = np.linspace(0.5, 2.0, len(x)).astype("float32")
    out["auto"] = found(
        model, kd.solve(model, x, y, l2="auto", sample_weight=weight, **told)
    )
    model, x, y = make(scope)
    out["validated"] = found(
        model, kd.solve(model, x, y, l2=1e-2, validation_data=(x[:50], y[:50]), **told)
    )
    for exploit in (None, "solve"):
        # Keras shares out a batch on JAX where the devices divide it.
        model, x, y = make(scope, n=120)
        # Few iterations: each evaluates on the validation data.
        options = {"l2": 1e-2, "tol": 1e-3} if exploit else None
        with scope():
            model.compile(
                kd.DAlign(
                    keras.optimizers.Adam(),
                    explore=2,
                    exploit_optimizer=exploit,
                    solve_options=options,
                ),
                cross_entropy(),
                metrics=["accuracy"],
            )
        history = model.fit(
            x, y, epochs=4, batch_size=60, validation_data=(x, y), verbose=0
        ).history
        certificate = kd.certify(model, x, y)
        out[f"fit, {exploit}"] = {
            "epochs": len(history["loss"]),
            **{f"{key} while exploring": history[key][:2] for key in history},
            **{f"{key} at the end": history[key][-1] for key in history},
            "certified": certificate.gap,
            "q": np.asarray(model.head.q),
        }
    return out


def disagreements(kind, process, scope):
    """What a process is told whose data or model are not those of the others."""
    import keras
    from small import cross_entropy

    import keras_dalign as kd

    class Stream(keras.utils.PyDataset):
        """Batches of 20 samples."""

        def __init__(self, x, y):
            super().__init__()
            self.x, self.y = x, y

        def __len__(self):
            return len(range(0, len(self.x), 20))

        def __getitem__(self, index):
            rows = slice(20 * index, 20 * index + 20)
            return self.x[rows], self.y[rows]

    model, x, y = make(scope)
    longer, other = slice(100 + process), slice(process, 100 + process)
    wider, _, _ = make(scope, width=20 + process)
    cases = {
        "samples": (model, x[longer], y[longer]),
        "inputs": (model, x[other], y[:100]),
        "targets": (model, x[:100], y[other]),
        "stream": (model, Stream(x[longer], y[longer]), None),
        "width": (wider, x, y),
    }
    if kind == "group":
        # The others give one process's weights to all, or refuse to make such a model.
        trained, x, y = make(scope, seed=process)
        cases["weights"] = (trained, x, y)
    messages = {}
    for name, (model, x, y) in cases.items():
        try:
            kd.solve(model, x, y, l2=0, loss=cross_entropy(), verbose=0)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def indivisible(scope):
    """What `fit` says of batches that Keras cannot share on JAX."""
    from small import cross_entropy

    import keras_dalign as kd

    model, x, y = make(scope, n=203)
    model.compile(kd.DAlign("adam"), cross_entropy())
    messages = {}
    for name, n, validation in (("fit", 201, None), ("evaluate", 200, (x, y))):
        try:
            model.fit(x[:n], y[:n], batch_size=40, validation_data=validation)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def main():
    kind, process, processes, port, output = sys.argv[1:]
    process, processes = int(process), int(processes)
    scope = start(kind, process, processes, int(port))
    out = {"results": results(scope, few=kind == "model")}
    out["messages"] = disagreements(kind, process, scope) if processes > 1 else {}
    if kind == "mesh":
        out["messages"] |= indivisible(scope)
    Path(output).write_bytes(pickle.dumps(out))
    if kind == "group":
        import torch

        # Not `destroy_process_group`: under load its threads may abort the process.
        torch.distributed.barrier()
        os._exit(0)


if __name__ == "__main__":
    main()
