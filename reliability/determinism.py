"""The same seed twice: bit-equal by backend and threads, and near across backends."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks.common import Target, table
from reliability import backends
from reliability.report import Report

LOSSES, CERTIFICATES = 1e-5, 1e-10
_FEATURES, _CLASSES = 12, 4
_UNITS = (24, 16)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2, 4], help="numbers of threads"
    )
    parser.add_argument("--samples", type=int, default=256, help="training samples")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of fit")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights")
    backends.add_option(parser)


def problem(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Data and first weights, made by NumPy: the same on each backend.

    Args:
        n: Number of samples.
        seed: The seed.

    Returns:
        Inputs `(n, 12)`, labels `(n,)`, and the weights of the network.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, _FEATURES)).astype("float32")
    y = np.argmax(x @ rng.standard_normal((_FEATURES, _CLASSES)), axis=1)
    y = np.where(rng.random(n) < 0.1, rng.integers(0, _CLASSES, n), y)
    sizes = (_FEATURES, *_UNITS, _CLASSES)
    weights = []
    for a, b in itertools.pairwise(sizes):
        weights += [rng.standard_normal((a, b)) / np.sqrt(a), np.zeros(b)]
    return x, y.astype("int32"), [w.astype("float32") for w in weights]


def child(task: Mapping[str, Any]) -> Any:
    """Fits, switches, solves and certifies; then certifies on features of a file.

    Args:
        task: `samples`, `epochs`, `seed`, and `features`, an npz that the first child
            writes and the others read.

    Returns:
        `digest` of all weights, losses and certificates; `losses` of the exploration;
        `solved`, the minimum; `certificate`, loss and bound on the features.
    """
    x, y, weights = problem(task["samples"], task["seed"])
    keras.utils.set_random_seed(task["seed"])
    layers = [keras.layers.Dense(units, "relu") for units in _UNITS]
    base = keras.Sequential(
        [keras.Input((_FEATURES,)), *layers, keras.layers.Dense(_CLASSES)]
    )
    base.set_weights(weights)
    model = kd.align(base, n_samples=len(x), seed=task["seed"])
    optimizer = kd.DAlign(
        keras.optimizers.Adam(1e-2), explore=1.0, solve_options={"l2": 1e-3}
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    history = model.fit(
        x, y, epochs=task["epochs"], batch_size=64, verbose=0, shuffle=False
    ).history
    fitted = kd.certify(model, x, y)
    kd.solve(model, x, y, l2=1e-4, verbose=0)
    solved = kd.certify(model, x, y)
    digest = hashlib.sha256()
    for weight in model.get_weights():
        digest.update(np.ascontiguousarray(weight).tobytes())
    numbers = [*history["loss"], fitted.loss, fitted.gap, solved.loss, solved.gap]
    digest.update(np.array(numbers, "float64").tobytes())
    return {
        "digest": digest.hexdigest(),
        "losses": [float(each) for each in history["loss"][: task["epochs"]]],
        "solved": [solved.loss, solved.lower_bound],
        "certificate": _on_features(Path(task["features"]), model, x, y),
    }


def _on_features(
    path: Path, model: keras.Model, x: np.ndarray, y: np.ndarray
) -> list[float]:
    """Certifies a head on features and with weights that all backends read alike.

    Taken is what is computed in float64 from the features on: the loss with an L2 term.

    Returns:
        That loss, its lower bound over the head, and that over all functions.
    """
    if not path.exists():
        features = np.asarray(model.trunk.predict(x, verbose=0))
        arrays = {f"w{i}": w for i, w in enumerate(model.head.get_weights())}
        np.savez(path, allow_pickle=False, z=features, **arrays)
    with np.load(path, allow_pickle=False) as arrays:
        z = arrays["z"]
        weights = [arrays[f"w{i}"] for i in range(len(arrays.files) - 1)]
    inputs = keras.Input(z.shape[1:])
    # No weights of its own: the features are the inputs.
    trunk = keras.Model(inputs, keras.layers.Identity()(inputs))
    head = kd.AlignmentHead(_CLASSES, n_samples=len(z), seed=model.head.seed)
    head.build((None, z.shape[1]))
    head.set_weights(weights)
    certified = kd.AlignedModel(trunk, head)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = kd.certify(certified, z, y, loss=loss, l2=1e-3)
    numbers = (found.l2_loss, found.l2_lower_bound, found.lower_bound)
    return [float(each) for each in numbers if each is not None]


def measure(options: argparse.Namespace) -> Report:
    """Runs the same twice by backend and number of threads, and compares.

    Args:
        options: See `add_options`.

    Returns:
        Pairs that differ, and the largest differences across backends.
    """
    known = backends.pythons(options.python)
    task = {name: getattr(options, name) for name in ("samples", "epochs", "seed")}
    found: dict[str, dict[int, Any]] = {}
    rows, different = [], []
    with tempfile.TemporaryDirectory() as folder:
        task["features"] = str(Path(folder, "features.npz"))
        for backend, python in known.items():
            for threads in options.threads:
                first, second = (
                    backends.run(
                        "reliability.determinism", task, backend, python, threads
                    )
                    for _ in range(2)
                )
                found.setdefault(backend, {})[threads] = first
                equal = first["digest"] == second["digest"]
                if not equal:
                    different.append(f"{backend}, {threads}")
                shown = [f"{first['losses'][-1]:.9g}", f"{first['solved'][0]:.12g}"]
                rows.append([backend, str(threads), "yes" if equal else "no", *shown])
    singles = [one for by_threads in found.values() for one in by_threads.values()]
    losses = _spread([one["losses"] for one in singles])
    minimum = _spread([one["solved"][:1] for one in singles])
    certificates = _spread([one["certificate"] for one in singles])
    about = (
        f"A network of {' and '.join(map(str, _UNITS))} units on {options.samples} "
        "samples: fit, switch, solve and certify, twice each in processes of their "
        "own. Bit-equal: all weights, losses and certificates. Across backends and "
        "threads: the losses of the epochs; and of one head, on features that all "
        "of them read from one file, the certificate with an L2 term, which is in "
        "float64 from the features on."
    )
    return Report(
        title="Determinism",
        body=[
            about,
            table(["backend", "threads", "bit-equal", "last loss", "minimum"], rows),
            f"Minimum after `solve`, across backends: differs by {minimum:.1e}.",
        ],
        targets=[
            Target("pairs that are not bit-equal", len(different), 0),
            Target("backends", len(known), 3, at_least=True),
            Target("relative difference of losses", losses, LOSSES),
            Target("relative difference of certificates", certificates, CERTIFICATES),
        ],
        settings={**{k: task[k] for k in task if k != "features"}, **_settings(found)},
        measurements={"found": found, "different": different, "minimum": minimum},
    )


def _settings(found: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    threads = sorted({each for by_threads in found.values() for each in by_threads})
    return {"backends": sorted(found), "threads": threads}


def _spread(lists: list[list[float]]) -> float:
    """The largest relative difference of any entry between any two lists."""
    array = np.array(lists)
    spread = array.max(axis=0) - array.min(axis=0)
    return float(np.max(spread / np.maximum(np.abs(array).max(axis=0), 1e-300)))


if __name__ == "__main__":
    backends.serve(child)
