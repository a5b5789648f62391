"""What several devices and processes compute: run by `test_distribution`.

    python several.py KIND PROCESS PROCESSES PORT OUTPUT [CASE]

starts one of `PROCESSES` processes of a kind, and writes what `results` found there.
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
    if kind == "mesh":
        import jax

        jax.config.update("jax_num_cpu_devices", 4 // processes)
        if processes > 1:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        import keras

        if processes > 1:
            keras.distribution.initialize(f"localhost:{port}", processes, process)
        parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
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


def make(scope, images=False, n=203):
    """A model made in a scope, and data: neither 2, 3 nor 4 divide 203."""
    from small import convnet, digit_images, digits, mlp

    import keras_dalign as kd

    x, y = (digit_images if images else digits)(n)
    with scope():
        base = (convnet if images else mlp)()
        return kd.align(base, n_samples=n, seed=1), x, y


def results(scope):
    """Solves, certificates and fits of small problems that count as large ones."""
    import keras
    import numpy as np
    from small import cross_entropy

    import keras_dalign as kd
    from keras_dalign.solving import problem, products

    problem._LARGE = 1
    products._DEVICE_BLOCK_BYTES = 1  # Blocks of 64 samples, and one of 11.
    told = {"loss": cross_entropy(), "verbose": 0, "batch_size": 64}

    out = {}
    model, x, y = make(scope)
    out["plain"] = found(model, kd.solve(model, x, y, tol=1e-5, **told))
    certificate = kd.certify(model, x, y, loss=cross_entropy(), gradient_bound=True)
    out["certify"] = {"gap": certificate.gap, "loss": certificate.loss}
    model, x, y = make(scope, images=True)
    weight = np.linspace(0.5, 2.0, len(x)).astype("float32")
    out["auto"] = found(
        model, kd.solve(model, x, y, l2="auto", sample_weight=weight, **told)
    )
    model, x, y = make(scope)
    out["validated"] = found(
        model, kd.solve(model, x, y, l2=1e-2, validation_data=(x[:50], y[:50]), **told)
    )
    for name, l2 in (("fit", 0.0), ("fit with L2", 1e-2)):
        # Keras shards batches on JAX where the devices divide them.
        model, x, y = make(scope, n=200)
        with scope():
            model.compile(
                kd.DAlign(
                    keras.optimizers.Adam(),
                    explore=2,
                    exploit_optimizer="solve",
                    solve_options={"l2": l2, "tol": 1e-5},
                ),
                cross_entropy(),
                metrics=["accuracy"],
            )
        history = model.fit(
            x, y, epochs=3, batch_size=40, validation_data=(x, y), verbose=0
        ).history
        certificate = kd.certify(model, x, y)
        out[name] = {
            "explored": history["loss"][:2],
            "explored accuracy": history["accuracy"][:2],
            "loss": history["loss"][-1],
            "val_loss": history["val_loss"][-1],
            "gap": history["gap"][-1],
            "certified": certificate.gap,
            "q": np.asarray(model.head.q),
        }
    return out


def disagreement(process, scope):
    """What a process is told whose data are not those of the others."""
    from small import cross_entropy

    import keras_dalign as kd

    model, x, y = make(scope)
    messages = []
    told = {"loss": cross_entropy(), "verbose": 0}
    for rows in (slice(100 + process), slice(process, 100 + process)):
        try:
            kd.solve(model, x[rows], y[rows], **told)
        except ValueError as error:
            messages.append(str(error))
    return messages


def main():
    kind, process, processes, port, output, *case = sys.argv[1:]
    process, processes = int(process), int(processes)
    scope = start(kind, process, processes, int(port))
    if case:
        out = disagreement(process, scope)
    else:
        out = results(scope)
    Path(output).write_bytes(pickle.dumps(out))
    if kind == "group":
        import torch

        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
