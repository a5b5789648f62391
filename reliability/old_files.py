"""Files of every release: loaded on each backend, saved there, loaded on the others."""

from __future__ import annotations

import argparse
import itertools
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks.common import Target, table
from reliability import backends
from reliability.report import Report

FOLDER = backends.ROOT / "tests" / "files"
# Relative to the largest output.
TOLERANCE = 1e-5
OUTPUTS = "logits.npz"
WEIGHTS = ".weights.h5"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--folder", type=Path, default=FOLDER, help="files by release")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the files of this version into the folder first",
    )
    backends.add_option(parser)


def inputs() -> np.ndarray:
    """The inputs for which the outputs of each file were recorded, `(20, 6)`."""
    return np.random.default_rng(0).normal(size=(20, 6)).astype("float32")


def labels() -> np.ndarray:
    """The labels with which the models were trained, `(20,)`."""
    rng = np.random.default_rng(0)
    rng.normal(size=(20, 6))
    return rng.integers(0, 3, 20)


def network(width: int = 16, last: Any = None) -> keras.Sequential:
    """A small network on six features with three outputs."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(width, "relu"),
            keras.layers.Dense(3) if last is None else last,
        ]
    )


def _aligned(**options: Any) -> keras.Model:
    exploit = options.pop("exploit", None)
    model = kd.align(network(), n_samples=20, seed=1, **options)
    settings = {"l2": 1e-2} if exploit else None
    optimizer = kd.DAlign(
        keras.optimizers.Adam(1e-2), exploit, explore=2, solve_options=settings
    )
    return _compiled(model, optimizer)


def _pointwise() -> keras.Model:
    base = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Reshape((1, 1, 6)),
            keras.layers.Conv2D(16, 1, activation="relu"),
            keras.layers.Conv2D(3, 1),
            keras.layers.Flatten(),
        ]
    )
    model = kd.align(base, n_samples=20, seed=1)
    return _compiled(model, kd.DAlign(keras.optimizers.Adam(1e-2), None, explore=2))


def _compiled(model: keras.Model, optimizer: Any) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    return model


def _plain(model: keras.Model) -> keras.Model:
    return _compiled(model, keras.optimizers.Adam(1e-2))


# Each with the number of epochs that it is trained for.
MODELS: dict[str, tuple[Callable[[], keras.Model], int]] = {
    "explored": (_aligned, 2),
    "shared-exploiting": (_aligned, 4),
    "solved": (lambda: _aligned(exploit="solve"), 4),
    "separate-exploiting": (lambda: _aligned(share_gates=False), 4),
    "learned-exploring": (lambda: _aligned(gates="learned"), 2),
    "learned-exploiting": (lambda: _aligned(gates="learned"), 4),
    "pointwise-exploiting": (_pointwise, 4),
    "quadratic": (
        lambda: _plain(network(last=kd.QuadraticHead(3, width=8, seed=1))),
        2,
    ),
    "parametrized": (lambda: _plain(kd.parametrize(network(32), network())), 2),
}

# Those whose weights are kept as files of their own, too: each takes 40 kB.
WITH_WEIGHTS = ("shared-exploiting", "learned-exploiting", "quadratic")


def made(name: str, *, trained: bool = True) -> keras.Model:
    """A model of `MODELS`, the same on each call.

    Args:
        name: Its name.
        trained: Whether it is trained. Otherwise its weights are others.

    Returns:
        The model.
    """
    keras.utils.set_random_seed(0 if trained else 5)
    build, epochs = MODELS[name]
    model = build()
    if trained:
        model.fit(inputs(), labels(), epochs=epochs, verbose=0, shuffle=False)
    return model


def write(folder: Path) -> None:
    """Writes models and weights of this version, and what the models give."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in MODELS:
        model = made(name)
        model.save(folder / f"{name}.keras")
        recompress(folder / f"{name}.keras")
        if name in WITH_WEIGHTS:
            model.save_weights(folder / f"{name}{WEIGHTS}")
        found[name] = predicted(model)
    np.savez_compressed(folder / OUTPUTS, allow_pickle=False, **found)


def recompress(path: Path) -> None:
    """Compresses an archive, as Keras only stores."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def predicted(model: keras.Model) -> np.ndarray:
    """The model's outputs for `inputs`."""
    return np.asarray(model.predict(inputs(), verbose=0))


def opened(path: Path) -> keras.Model:
    """A model from a file; weights go into a new model of `MODELS`."""
    if not path.name.endswith(WEIGHTS):
        # Of a plain model that was compiled on PyTorch, Keras 3.15 writes down an
        # optimizer that other backends cannot import.
        plain = name_of(path) in {"quadratic", "parametrized"}
        return keras.saving.load_model(path, compile=not plain)
    model = made(path.name.removesuffix(WEIGHTS), trained=False)
    model.load_weights(path)
    return model


def name_of(path: Path) -> str:
    """The model's name."""
    return path.name.removesuffix(WEIGHTS).removesuffix(".keras")


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest output."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def child(task: Mapping[str, Any]) -> Any:
    """Loads files, compares their outputs and, if asked, saves them again.

    Args:
        task: `files`: pairs of a file and the npz of its outputs; `out`: a folder for
            the files as this backend saves them, or None.

    Returns:
        For each file its difference, or the text of the error.
    """
    found: dict[str, float | str] = {}
    for index, (file, outputs) in enumerate(task["files"]):
        path = Path(file)
        try:
            model = opened(path)
            with np.load(outputs, allow_pickle=False) as arrays:
                expected = arrays[name_of(path)]
            found[file] = difference(predicted(model), expected)
            if task["out"]:
                out = Path(task["out"]) / str(index) / path.name
                out.parent.mkdir(parents=True, exist_ok=True)
                if path.name.endswith(WEIGHTS):
                    model.save_weights(out)
                else:
                    model.save(out)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is reported)
            found[file] = f"{type(error).__name__}: {error}"[:300]
    return found


def measure(options: argparse.Namespace) -> Report:
    """Loads every file on every backend, directly and as another backend saved it.

    Args:
        options: See `add_options`.

    Returns:
        Files that failed, and the largest difference.
    """
    if options.write:
        write(options.folder / kd.__version__)
    files = sorted(
        path for path in options.folder.glob("*/*") if path.suffix in {".keras", ".h5"}
    )
    known = backends.pythons(options.python)
    pairs = [(str(path), str(path.with_name(OUTPUTS))) for path in files]
    rows: list[list[str]] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for backend, python in known.items():
            out = str(Path(temporary) / backend)
            task: dict[str, Any] = {"files": pairs, "out": out}
            found = backends.run("reliability.old_files", task, backend, python)
            _note(rows, failed, f"release, {backend}", found)
        for saved, loaded in itertools.permutations(known, 2):
            again = [
                (str(Path(temporary) / saved / str(index) / path.name), outputs)
                for index, (path, (_, outputs)) in enumerate(
                    zip(files, pairs, strict=True)
                )
            ]
            task = {"files": again, "out": None}
            found = backends.run("reliability.old_files", task, loaded, known[loaded])
            _note(rows, failed, f"{saved}, {loaded}", found)
    size = sum(path.stat().st_size for path in options.folder.rglob("*.*"))
    releases = sorted({path.parent.name for path in files})
    about = (
        f"{len(files)} files of releases {', '.join(releases)} ({size / 1000:.0f} "
        "kB). Each is loaded on every backend and saved there, and what was saved "
        "is loaded on the others. Difference: of the outputs from those recorded "
        "when the file was written, relative to the largest one."
    )
    return Report(
        title="Files of earlier releases",
        body=[
            about,
            table(["saved on, loaded on", "files", "failed", "difference"], rows),
            *([f"Failed: {'; '.join(failed)}"] if failed else []),
        ],
        targets=[
            Target("files that did not load, or gave other outputs", len(failed), 0),
            Target("backends", len(known), 3, at_least=True),
        ],
        settings={"tolerance": TOLERANCE, "backends": sorted(known)},
        measurements={"rows": rows, "failed": failed},
    )


def _note(
    rows: list[list[str]],
    failed: list[str],
    what: str,
    found: Mapping[str, float | str],
) -> None:
    """Adds a row, and the files that failed."""
    worst, bad = 0.0, []
    for file, value in found.items():
        path = Path(file)
        if isinstance(value, str) or not value <= TOLERANCE:
            bad.append(f"{path.parent.name}/{path.name} ({what}): {value}")
        else:
            worst = max(worst, value)
    rows.append([what, str(len(found)), str(len(bad)), f"{worst:.1e}"])
    failed += bad


if __name__ == "__main__":
    backends.serve(child)
