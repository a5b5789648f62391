"""Injects faults, and checks the error, the state of the model and the files.

Each case is one fault in one operation. It is right if

- the error is the injected one, or the one that the documentation names;
- the model is as it was, or, where the operation keeps what it reached, usable;
- a file is as it was, and nothing half-written is beside it;
- the same call works as soon as the fault is gone.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import json
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import yaml

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import Target
from keras_dalign.certification import solver
from keras_dalign.diagnostics import alignment
from keras_dalign.head import batch_norm
from keras_dalign.head.alignment_head import AlignmentHead
from keras_dalign.head.batch_predictor import BatchPredictor
from keras_dalign.head.features import FeaturePass
from keras_dalign.numerics.repeats import Repeats
from keras_dalign.solving.head_solver import HeadSolver
from keras_dalign.solving.own_loss import OwnLoss
from keras_dalign.solving.problem import ConvexProblem
from keras_dalign.training import switch
from pipelines import (
    datasets,
    evaluate,
    exploration,
    explore,
    files,
    params,
    prepare,
    train,
)
from pipelines.recording import Recorder
from reliability.report import ROOT, Report

EPOCHS, EXPLORED, BATCH = 4, 2, 16
N, CLASSES = 64, 3
TEXT = "injected"


class WrongOutcome(Exception):  # noqa: N818  (it is what a case finds)
    """A fault had an effect that it must not have."""


def _check(condition: object, text: str) -> None:
    if not condition:
        raise WrongOutcome(text)


def data() -> tuple[np.ndarray, np.ndarray]:
    """Samples that a small network does not fit."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 6)).astype("float32")
    return x, rng.integers(0, CLASSES, N).astype("int32")


def model_of(seed: int = 0, **options: Any) -> Any:
    """An aligned model with batch normalisation, compiled with `DAlign`."""
    keras.utils.set_random_seed(seed)
    base = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(CLASSES),
        ]
    )
    model = kd.align(base, n_samples=N)
    settings = {"explore": EXPLORED, "solve_options": {"l2": 1e-2, "tol": 1e-3}}
    model.compile(
        kd.DAlign("adam", **{**settings, **options}),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=True,
    )
    return model


def weights(model: Any) -> list[np.ndarray]:
    """Copies of a model's weights."""
    return [np.array(variable) for variable in model.weights]


def _same(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(one, other) for one, other in zip(left, right, strict=True)
    )


def _fit(model: Any, *callbacks: Any, x: Any = None, y: Any = None) -> None:
    if x is None:
        x, y = data()
    model.fit(
        x,
        y,
        batch_size=BATCH if y is not None else None,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )


def _solve(model: Any, x: Any = None, y: Any = None) -> None:
    if x is None:
        x, y = data()
    kd.solve(model, x, y, l2=1e-2, tol=1e-3, verbose=0)


def _certify(model: Any, x: Any = None, y: Any = None) -> None:
    if x is None:
        x, y = data()
    kd.certify(model, x, y)


def _align(model: Any, x: Any = None, y: Any = None) -> None:
    if x is None:
        x, y = data()
    kd.check_alignment(model, x, y)


def _reestimate(model: Any, x: Any = None, y: Any = None) -> None:  # noqa: ARG001
    kd.reestimate_batch_norm(model.trunk, data()[0] if x is None else x)


# What a fault leaves: the model as it was; as the last epoch left it; or one that can
# be used.
SAME, EPOCH, USABLE = "as it was", "as the last epoch left it", "usable"


@dataclass(frozen=True)
class Point:
    """Where a function is to fail.

    Attributes:
        operation: What is called.
        where: In which part of it.
        call: Calls it on a model.
        owner: What the function belongs to.
        name: Its name.
        at: Which of its calls fails, from 1.
        state: What is left of the model.
        interrupted: The same after Ctrl-C, if that differs.
    """

    operation: str
    where: str
    call: Callable[[Any], None]
    owner: Any
    name: str
    at: int = 1
    state: str = SAME
    interrupted: str = ""


@contextlib.contextmanager
def failing(owner: Any, name: str, error: BaseException, at: int) -> Iterator[None]:
    """Makes a call of a function fail."""
    function, calls = getattr(owner, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return function(*args, **kwargs)

    with mock.patch.object(owner, name, call):
        yield
    _check(calls >= at, f"{name} was called {calls} times: no fault was injected")


POINTS = (
    Point("fit", "a step", _fit, keras.optimizers.Adam, "apply", 6, USABLE),
    Point("fit", "statistics", _fit, switch, "reestimate_batch_norm", state=EPOCH),
    Point("fit", "features", _fit, FeaturePass, "run", state=EPOCH),
    Point("fit", "gates", _fit, AlignmentHead, "start_exploiting", state=EPOCH),
    Point("fit", "choice", _fit, HeadSolver, "_choose", state=USABLE),
    Point("fit", "iterations", _fit, ConvexProblem, "evaluate", 12, state=USABLE),
    Point("fit", "outputs", _fit, OwnLoss, "measure", 2, state=USABLE),
    Point("solve", "statistics", _solve, switch, "reestimate_batch_norm"),
    Point("solve", "features", _solve, FeaturePass, "run"),
    Point("solve", "gates", _solve, AlignmentHead, "start_exploiting"),
    Point("solve", "choice", _solve, HeadSolver, "_choose", interrupted=USABLE),
    Point(
        "solve", "iterations", _solve, ConvexProblem, "evaluate", 12, interrupted=USABLE
    ),
    Point("solve", "outputs", _solve, OwnLoss, "measure", 2, interrupted=USABLE),
    Point(
        "solve", "certificate", _solve, solver, "certify_features", interrupted=USABLE
    ),
    Point("certify", "outputs", _certify, BatchPredictor, "predict"),
    Point("certify", "lower bound", _certify, Repeats, "lower_bound"),
    Point("check_alignment", "first pass", _align, alignment, "_read"),
    Point("check_alignment", "Jacobian", _align, alignment, "jacobian"),
    Point("check_alignment", "projection", _align, alignment, "_project"),
    Point("reestimate_batch_norm", "pass", _reestimate, batch_norm, "_pool"),
)


@dataclass(frozen=True)
class Case:
    """One fault in one operation.

    Attributes:
        fault: What goes wrong.
        operation: In what.
        where: In which part of it.
        run: Injects it, and raises `WrongOutcome` unless all is right.
    """

    fault: str
    operation: str
    where: str
    run: Callable[[Path], None] = field(repr=False)


def _expect(
    call: Callable[[], object], kinds: type[BaseException] | tuple[Any, ...], text: str
) -> BaseException:
    """Calls what must fail; the error, which has the text."""
    try:
        call()
    except kinds as error:
        chain, each = "", error
        while each is not None:
            chain += f"{each}\n"
            each = each.__cause__ or each.__context__
        _check(text in chain, f"another error: {chain[:300]}")
        return error
    raise WrongOutcome("no error")


def _usable(model: Any) -> None:
    x, y = data()
    loss = kd.certify(model, x, y).loss
    _check(np.isfinite(loss), f"the loss is {loss}")


class _Epochs(keras.callbacks.Callback):
    """Keeps the weights of the last epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.last: list[np.ndarray] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        self.last = weights(self.model)


def _at(point: Point, error: BaseException) -> Callable[[Path], None]:
    """A case: the error at the point comes out, and leaves what it may leave."""

    def run(_: Path) -> None:
        model, epochs = model_of(), _Epochs()
        before = weights(model)
        with failing(point.owner, point.name, error, point.at):
            if point.call is _fit:
                raised = _expect(lambda: _fit(model, epochs), type(error), TEXT)
            else:
                raised = _expect(lambda: point.call(model), type(error), TEXT)
        _check(raised is error, "another error of the same type")
        state = point.state
        if isinstance(error, KeyboardInterrupt) and point.interrupted:
            state = point.interrupted
        if state == USABLE:
            _usable(model)
        else:
            wanted = before if state == SAME else epochs.last
            _check(_same(weights(model), wanted), "other weights")
            _check(model.phase == "exploring", f"the model is {model.phase}")
        point.call(model)
        _usable(model)

    return run


def _points() -> Iterator[Case]:
    for point in POINTS:
        for fault, error in (
            ("Ctrl-C", KeyboardInterrupt(TEXT)),
            ("MemoryError", MemoryError(TEXT)),
        ):
            yield Case(fault, point.operation, point.where, _at(point, error))


# Files.


def _save(model: Any, folder: Path) -> None:
    model.save(folder / "model.keras")


def _save_weights(model: Any, folder: Path) -> None:
    model.save_weights(folder / "model.weights.h5")


def _checkpoint(model: Any, folder: Path) -> None:
    _fit(model, keras.callbacks.ModelCheckpoint(folder / "model.keras"))


def _backup(model: Any, folder: Path) -> None:
    _fit(model, keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False))


def _arrays(_: Any, folder: Path) -> None:
    files.write_arrays(folder / "a.npz", {"a": np.zeros(20_000)})


def _json(_: Any, folder: Path) -> None:
    files.write_json(folder / "a.json", {"a": "b" * 20_000})


WRITERS: Mapping[str, Callable[[Any, Path], None]] = {
    "save": _save,
    "save_weights": _save_weights,
    "ModelCheckpoint": _checkpoint,
    "BackupAndRestore": _backup,
    "write_arrays": _arrays,
    "write_json": _json,
}


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def small_files(_: Path) -> Iterator[None]:
    """Files cannot grow beyond 8 KiB: what is written then fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_room_for_weights(_: Path) -> Iterator[None]:
    """A file of weights cannot be written to its end."""
    with failing(AlignmentHead, "save_own_variables", _full(), 1):
        yield


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be made or changed in a folder, whoever this process belongs to."""
    user = os.geteuid()
    folder.chmod(0o555)
    folder.parent.chmod(0o755)
    if user == 0:
        # Root may write anywhere.
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)
        folder.chmod(0o755)


def _writing(
    write: Callable[[Any, Path], None],
    fault: Callable[[Path], contextlib.AbstractContextManager[None]],
) -> Callable[[Path], None]:
    def run(work: Path) -> None:
        folder = work / "files"
        folder.mkdir()
        first = model_of(seed=1)
        # A whole file is there, which must stay.
        write(first, folder)
        before = _contents(folder)
        model = model_of()
        kept = weights(model)
        with fault(folder):
            _expect(lambda: write(model, folder), (OSError, RuntimeError), "")
        _check(_contents(folder) == before, "a file has changed, or there are more")
        if write in (_save, _save_weights):
            _check(_same(weights(model), kept), "other weights")
        write(model, folder)
        _usable(model)

    return run


def _files() -> Iterator[Case]:
    for name, write in WRITERS.items():
        # HDF5 ends the process where a write of its own fails: there the fault is in
        # what Keras hands to it.
        by_hdf5 = name in {"save_weights", "BackupAndRestore"}
        fault = "full disk" if by_hdf5 else "files cannot grow"
        limit = no_room_for_weights if by_hdf5 else small_files
        yield Case(fault, name, "writing", _writing(write, limit))
    for name, write in WRITERS.items():
        yield Case("read-only folder", name, "writing", _writing(write, read_only))
    for name, error in (("Ctrl-C", KeyboardInterrupt(TEXT)), ("I/O", OSError(TEXT))):
        yield Case(name, "save", "the head", _saving(error))
        yield Case(name, "load_weights", "the head", _loading(error))
    yield Case("full disk", "write_arrays", "writing", _explained)
    yield Case("full disk", "solve", "features on disk", _features_on_disk)


def _saving(error: BaseException) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        model = model_of()
        _save(model_of(seed=1), folder)
        before, kept = _contents(folder), weights(model)
        with failing(AlignmentHead, "save_own_variables", error, 1):
            _expect(lambda: _save(model, folder), type(error), TEXT)
        _check(_contents(folder) == before, "a file has changed, or there are more")
        _check(_same(weights(model), kept), "other weights")
        _save(model, folder)
        loaded = keras.saving.load_model(folder / "model.keras")
        _check(_same(weights(loaded), kept), "the file has other weights")

    return run


def _loading(error: BaseException) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        model, other = model_of(), model_of(seed=1)
        _fit(other)
        _save_weights(other, folder)
        kept, path = weights(model), folder / "model.weights.h5"
        load = AlignmentHead.load_own_variables

        def failing_load(head: Any, store: Any) -> None:
            load(head, store)
            if head is model.head and not raised:
                raised.append(True)
                raise error

        raised: list[bool] = []
        with mock.patch.object(AlignmentHead, "load_own_variables", failing_load):
            # Keras gathers the errors of layers in one of its own.
            interrupted = isinstance(error, KeyboardInterrupt)
            kinds = KeyboardInterrupt if interrupted else (OSError, ValueError)
            _expect(lambda: model.load_weights(path), kinds, "")
        _check(_same(weights(model), kept), "other weights")
        _check(model.phase == "exploring", f"the model is {model.phase}")
        model.load_weights(path)
        _check(_same(weights(model), weights(other)), "not those of the file")

    return run


def _full() -> OSError:
    return OSError(errno.ENOSPC, TEXT)


def _explained(folder: Path) -> None:
    _arrays(None, folder)
    before = _contents(folder)
    with failing(np, "savez", _full(), 1):
        error = _expect(lambda: _arrays(None, folder), OSError, "The disk is full")
    _check(getattr(error, "errno", 0) == errno.ENOSPC, "another error number")
    _check(_contents(folder) == before, "a file has changed, or there are more")
    _arrays(None, folder)


def _features_on_disk(_: Path) -> None:
    from keras_dalign.head.row_store import RowStore  # noqa: PLC0415

    model = model_of()
    before = weights(model)
    with failing(RowStore, "append", _full(), 1):
        _expect(lambda: _solve(model), OSError, TEXT)
    _check(_same(weights(model), before), "other weights")
    _solve(model)


# Data.


class Batches(keras.utils.PyDataset):
    """Batches, one of which can be had only once the fault is mended.

    Args:
        bad: What the bad batch raises or holds: an error, or NaN.
        **kwargs: Those of `PyDataset`, such as `workers`.
    """

    def __init__(self, bad: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bad = bad
        self.x, self.y = data()

    def __len__(self) -> int:
        """Number of batches."""
        return N // BATCH

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A batch."""
        part = slice(index * BATCH, (index + 1) * BATCH)
        x = self.x[part].copy()
        if index == 2 and isinstance(self.bad, Exception):
            raise self.bad
        if index == 2 and self.bad is not None:
            x[3, 1] = self.bad
        return x, self.y[part]


_READERS: Mapping[str, Callable[[Any, Any], None]] = {
    "fit": lambda model, x: _fit(model, x=x),
    "solve": _solve,
    "certify": _certify,
    "check_alignment": _align,
    "reestimate_batch_norm": _reestimate,
}


def _bad_stream(name: str, bad: Any, **kwargs: Any) -> Callable[[Path], None]:
    def run(_: Path) -> None:
        model = model_of()
        before, read = weights(model), _READERS[name]
        kinds: Any = Exception if isinstance(bad, Exception) else ValueError
        text = TEXT if isinstance(bad, Exception) else "finite"
        stream = Batches(bad, **kwargs)
        _expect(lambda: read(model, stream), kinds, text)
        _check(model.phase == "exploring", f"the model is {model.phase}")
        if name != "fit":
            _check(_same(weights(model), before), "other weights")
        # Trained on NaN, a model is lost; its user has another one.
        again = model if isinstance(bad, Exception) or name != "fit" else model_of()
        read(again, Batches(None, **kwargs))
        _usable(again)

    return run


def _bad_arrays(name: str) -> Callable[[Path], None]:
    def run(_: Path) -> None:
        model = model_of()
        before = weights(model)
        x, y = data()
        x[5, 2] = np.nan
        call = {
            "fit": lambda: _fit(model, x=x, y=y),
            "solve": lambda: _solve(model, x, y),
            "certify": lambda: _certify(model, x, y),
            "check_alignment": lambda: _align(model, x, y),
        }[name]
        _expect(call, ValueError, "finite")
        _check(model.phase == "exploring", f"the model is {model.phase}")
        if name != "fit":
            _check(_same(weights(model), before), "other weights")

    return run


class _Poison(keras.callbacks.Callback):
    """NaN in the trunk's weights after a step, as a gradient of NaN leaves them."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        if batch == 2:
            kernel = self.model.trunk.trainable_variables[0]
            kernel.assign(np.full(kernel.shape, np.nan, "float32"))


def _nan_weights(_: Path) -> None:
    model = model_of()
    _expect(lambda: _fit(model, _Poison()), ValueError, "finite")
    _check(model.phase == "exploring", f"the model is {model.phase}")


def _nan_and_backup(folder: Path) -> None:
    """Training stops at NaN, and goes on from the last backup."""
    model = model_of()
    backup = keras.callbacks.BackupAndRestore(folder / "b", delete_checkpoint=False)
    epochs = _Epochs()

    class Late(_Poison):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
            self.late = epoch == 1

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if self.late:
                super().on_train_batch_end(batch, logs)

    # Keras backs up at the end of an epoch: NaN must be found before.
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
            kernel = np.array(self.model.trunk.trainable_variables[0])
            if not np.isfinite(kernel).all():
                raise FloatingPointError(TEXT)

    call = lambda: _fit(model, epochs, Late(), Stop(), backup)  # noqa: E731
    _expect(call, FloatingPointError, TEXT)
    again, whole = model_of(), model_of()
    callback = keras.callbacks.BackupAndRestore(folder / "b", delete_checkpoint=False)
    _fit(again, callback)
    _fit(whole)
    _check(_same(weights(again), weights(whole)), "other weights than without fault")


def _wrong_labels(name: str) -> Callable[[Path], None]:
    def run(_: Path) -> None:
        model = model_of()
        before, (x, y) = weights(model), data()
        y[7] = CLASSES
        call = {"fit": _fit, "solve": _solve, "certify": _certify}[name]
        _expect(lambda: call(model, x=x, y=y), ValueError, "")
        _check(_same(weights(model), before), "other weights")
        call(model)

    return run


def _data() -> Iterator[Case]:
    error = RuntimeError(TEXT)
    for name in _READERS:
        yield Case("a batch raises", name, "batch 3", _bad_stream(name, error))
        yield Case("NaN in a batch", name, "batch 3", _bad_stream(name, np.nan))
    for name in ("fit", "solve", "certify"):
        run = _bad_stream(name, error, workers=2)
        yield Case("a worker raises", name, "batch 3", run)
        yield Case("a label too large", name, "arrays", _wrong_labels(name))
    for name in ("fit", "solve", "certify", "check_alignment"):
        yield Case("NaN in an input", name, "arrays", _bad_arrays(name))
    yield Case("NaN in the weights", "fit", "step 3", _nan_weights)
    yield Case("NaN in the weights", "BackupAndRestore", "epoch 2", _nan_and_backup)


# Memory.


def _too_large(_: Path) -> None:
    model = model_of()
    before, (x, y) = weights(model), data()

    def call() -> None:
        kd.check_alignment(model, x, y, method="dense", max_memory=100)

    _expect(call, MemoryError, "")
    _check(_same(weights(model), before), "other weights")
    _align(model)


def _no_room_for_gates(name: str) -> Callable[[Path], None]:
    def run(_: Path) -> None:
        model, epochs = model_of(), _Epochs()
        before = weights(model)
        from keras_dalign.head import alignment_head  # noqa: PLC0415

        def call() -> None:
            if name == "fit":
                _fit(model, epochs)
            else:
                _solve(model)

        with failing(alignment_head, "check_memory", MemoryError(TEXT), 1):
            _expect(call, MemoryError, TEXT)
        wanted = epochs.last if name == "fit" else before
        _check(_same(weights(model), wanted), "other weights")
        _check(model.phase == "exploring", f"the model is {model.phase}")
        call()

    return run


def _memory() -> Iterator[Case]:
    yield Case("memory limit", "check_alignment", "dense", _too_large)
    for name in ("fit", "solve"):
        yield Case("memory limit", name, "gates", _no_room_for_gates(name))


# Stages of the pipeline.

_CELL: dict[str, Any] = {"dataset": "digits", "augmentation": "none", "seed": 0}


def _params(folder: Path) -> Any:
    given = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    given["grid"] |= {"datasets": ["digits"], "seeds": [0], "methods": ["dalign"]}
    given["tune"] |= {"datasets": [], "recipes": []}
    given["prepare"]["digits"] = {"n_train": 100, "n_test": 40}
    given["train"]["digits"] |= {"epochs": 3, "checkpoints": [0.6, 1.0]}
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return params.load(path)


def _run_stages(folder: Path, upto: str) -> None:
    given: dict[str, Any] = {"params": _params(folder), "root": folder}
    method: dict[str, Any] = {**_CELL, "method": "dalign"}
    prepare.main("digits", **given)
    if upto != "prepare":
        explore.main(**_CELL, **given)
    if upto in {"train", "evaluate"}:
        train.main(**method, **given)
    if upto == "evaluate":
        evaluate.main(**method, root=folder)


def _stage(name: str, owner: Any, attribute: str, at: int) -> Callable[[Path], None]:
    """Ctrl-C in a stage, which is then run again: its files are those without it."""

    def run(work: Path) -> None:
        folders = [work / "whole", work / "interrupted"]
        for folder in folders:
            folder.mkdir()
        _run_stages(folders[0], name)
        error = KeyboardInterrupt(TEXT)
        with failing(owner, attribute, error, at):
            _expect(lambda: _run_stages(folders[1], name), KeyboardInterrupt, TEXT)
        whole = _results(folders[0])
        half = _results(folders[1])
        wrong = [path for path, content in half.items() if whole.get(path) != content]
        _check(not wrong, f"half-written: {wrong}")
        _run_stages(folders[1], name)
        _check(_results(folders[1]) == whole, "other results than without fault")

    return run


def _results(folder: Path) -> dict[str, bytes]:
    """What stages have made, less wall times and what a killed run goes on from."""
    left_out = ("backups", "results/timings")
    return {
        name: content
        for name, content in _contents(folder).items()
        if not name.startswith(left_out)
    }


def _stages() -> Iterator[Case]:
    for name, owner, attribute, at in (
        ("prepare", datasets, "load", 1),
        ("prepare", files, "write_json", 1),
        ("explore", Recorder, "on_epoch_end", 2),
        ("explore", exploration, "discard", 1),
        ("train", solver, "certify_features", 1),
        ("train", files, "write_arrays", 6),
        ("evaluate", evaluate, "brier", 1),
    ):
        run = _stage(name, owner, attribute, at)
        yield Case("Ctrl-C", f"stage {name}", attribute, run)


def cases() -> list[Case]:
    """All cases."""
    return [*_files(), *_data(), *_memory(), *_stages(), *_points()]


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Compiles nothing, which would take longer than the cases do."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf  # noqa: PLC0415  (only where it is the backend)

    tf.config.run_functions_eagerly(True)
    try:
        with warnings.catch_warnings():
            # tf.data compiles all the same, and says so.
            warnings.simplefilter("ignore")
            yield
    finally:
        tf.config.run_functions_eagerly(False)


def outcome(case: Case) -> str:
    """Runs a case: what was wrong, or nothing."""
    with tempfile.TemporaryDirectory() as folder, eagerly():
        try:
            case.run(Path(folder))
        except BaseException as error:  # noqa: BLE001  (a case may fail in any way)
            return f"{type(error).__name__}: {str(error)[:500]}"
    return ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    parser.add_argument("--only", default="", help="cases whose line has this text")
    parser.add_argument(
        "--state",
        type=Path,
        help="a file that keeps the outcomes; right ones are not measured again",
    )


def _line(result: Mapping[str, Any]) -> str:
    return ", ".join(result[name] for name in ("fault", "operation", "where"))


def measure(options: argparse.Namespace) -> Report:
    """Runs all cases."""
    state: Path | None = options.state
    known: dict[str, Any] = {}
    if state is not None and state.exists():
        for line in state.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            known[_line(found)] = found
    results = []
    for case in cases():
        result = {name: getattr(case, name) for name in ("fault", "operation", "where")}
        line = _line(result)
        if options.only not in line:
            continue
        if line not in known or known[line]["wrong"]:
            begin = time.perf_counter()
            known[line] = {**result, "wrong": outcome(case)}
            seconds = time.perf_counter() - begin
            print(f"{line}: {known[line]['wrong'] or 'right'} ({seconds:.1f} s)")
            if state is not None:
                with state.open("a", encoding="utf-8") as file:
                    print(json.dumps(known[line]), file=file)
        results.append(known[line])
    wrong_ones = [each for each in results if each["wrong"]]
    counts = collections.Counter(each["fault"] for each in results)
    rows = [
        [each["fault"], each["operation"], each["where"], each["wrong"] or "right"]
        for each in results
    ]
    body = [
        f"{len(results)} faults were injected: "
        + ", ".join(f"{name} {count}" for name, count in counts.items())
        + ".",
        common.table(["fault", "operation", "where", "outcome"], rows),
    ]
    targets = [
        Target("faults", len(results), 60.0, at_least=True),
        Target("faults with a wrong outcome", len(wrong_ones), 0.0),
    ]
    return Report("Faults", body, targets, {"only": options.only}, results)
