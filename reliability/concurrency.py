"""Runs the same things at the same time, in threads and in processes.

Threads certify and solve models that share a trunk. Processes prepare the same data,
run the same stages, keep features in the same folder, and run one workspace with
`dvc repro` and with `python pipelines resume`. Each case is right if every one of them
has the result that it has alone, or is refused with the reason.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import Target
from keras_dalign.certification import solver
from keras_dalign.head.features import DISK, CachePlan
from keras_dalign.numerics import threads as blas
from pipelines import resume
from reliability import faults, kills
from reliability.report import Report

# What a process that is refused says: the stages' own lock, or DVC's.
REFUSALS = (
    "Another process works on this run",
    "Unable to acquire lock",
    "is busy, it is being blocked by",
)


@dataclass(frozen=True)
class Outcome:
    """What came of things that were run at the same time.

    Attributes:
        case: What they were.
        right: How many had the right result.
        refused: How many were refused with the reason.
        wrong: Everything else.
    """

    case: str
    right: int
    refused: int
    wrong: tuple[str, ...]


# Processes.


def _solve_from_disk() -> None:
    """A `solve` that keeps its features in the folder for temporary files."""
    tempfile.tempdir = str(Path("..").resolve())
    plan = CachePlan(DISK, None, "on disk")
    with mock.patch.object(solver, "plan_cache", return_value=plan):
        kills.SOLVE.run()


def _resume() -> None:
    """`python pipelines resume`, whose DVC is a fork of this process."""

    def dvc(root: Path, *arguments: str) -> None:
        pid = os.fork()
        if pid == 0:
            kills.leave(lambda: kills.dvc(*arguments), root.resolve())
        _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError(f"DVC failed. Received: {arguments}")

    with mock.patch.object(resume, "dvc", dvc):
        resume.main()


def _programs() -> list[tuple[str, kills.Program, Callable[[], None]]]:
    stages = {each.name: each for each in kills.stages()}
    chosen = ("prepare", "explore", "train dalign", "train letter", "evaluate dalign")
    same = [
        (name, stages[name], stages[name].run)
        for name in (*chosen, f"tune {kills.RECIPES[0]}")
    ]
    return [
        *same,
        ("solve, features on disk", kills.SOLVE, _solve_from_disk),
        ("dvc repro", kills.DVC, kills.DVC.run),
        ("resume", kills.DVC, _resume),
    ]


def _together(
    name: str,
    program: kills.Program,
    run: Callable[[], None],
    references: kills.References,
    work: Path,
    delay: float,
) -> Outcome:
    """Runs a program twice at the same time, the second time a little later."""
    reference, _ = references.of(program)
    folders = [work / "first", work / "second"]
    # A `solve` has files of its own; all others work in one folder.
    shared = program is not kills.SOLVE
    for folder in folders[:1] if shared else folders:
        references.fresh(program, folder)
    if shared:
        folders[1] = folders[0]
    logs = [work / "first-log", work / "second-log"]
    started = []
    for folder, log in zip(folders, logs, strict=True):
        started.append(kills.started(run, folder, log))
        time.sleep(delay)
    statuses = [os.waitpid(pid, 0)[1] for pid in started]
    right, refused, wrong = 0, 0, []
    for folder, log, status in zip(folders, logs, statuses, strict=True):
        text = log.read_text(encoding="utf-8")
        different = kills.differences(program, folder, reference)
        if different:
            wrong.append(f"other results: {different}")
        elif status == 0:
            right += 1
        elif any(refusal in text for refusal in REFUSALS):
            refused += 1
        else:
            wrong.append(text[-1000:])
    if shared and not right:
        wrong.append("both were refused")
    for folder in set(folders):
        shutil.rmtree(folder)
    return Outcome(f"two processes: {name}", right, refused, tuple(wrong))


# Threads.


def _sharing(count: int) -> list[Any]:
    """Models that share one trunk."""
    keras.utils.set_random_seed(0)
    base = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(faults.CLASSES),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    base.compile("adam", loss)
    return [kd.align(base, n_samples=faults.N, seed=seed) for seed in range(count)]


def _solved(model: Any) -> list[np.ndarray]:
    x, y = faults.data()
    result = kd.solve(model, x, y, l2=1e-2, tol=1e-3, verbose=0)
    return [*faults.weights(model), np.array([result.value, result.gap])]


def _certified(model: Any) -> list[np.ndarray]:
    x, y = faults.data()
    found = kd.certify(model, x, y)
    return [np.array([found.loss, found.lower_bound, found.gap])]


def _checked(model: Any) -> list[np.ndarray]:
    x, y = faults.data()
    return [np.array([kd.check_alignment(model, x, y).residual])]


def _at_once(
    name: str,
    calls: Callable[[list[Any]], Sequence[Callable[[], list[np.ndarray]]]],
    models: int,
    solved: int,
) -> Outcome:
    """Calls functions in threads that begin together, and one after the other."""

    def prepared() -> Sequence[Callable[[], list[np.ndarray]]]:
        made = _sharing(models)
        for model in made[:solved]:
            _solved(model)
        return calls(made)

    wanted = [call() for call in prepared()]
    again = prepared()
    barrier = threading.Barrier(len(again))

    def run(call: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
        barrier.wait()
        return call()

    limit = blas.blas_threads()
    right, wrong = 0, []
    with ThreadPoolExecutor(len(again)) as pool:
        futures = [pool.submit(run, call) for call in again]
    for future, expected in zip(futures, wanted, strict=True):
        error = future.exception()
        if error is not None:
            wrong.append(f"{type(error).__name__}: {str(error)[:300]}")
            continue
        found = future.result()
        same = len(found) == len(expected) and all(
            np.array_equal(one, other)
            for one, other in zip(found, expected, strict=True)
        )
        if same:
            right += 1
        else:
            wrong.append("another result than alone")
    now = max((each["num_threads"] for each in blas.controller().info()), default=1)
    if now != limit:
        wrong.append(f"BLAS has {now} threads afterwards, and had {limit}")
    return Outcome(f"threads: {name}", right, 0, tuple(wrong))


def _bound(function: Callable[[Any], list[np.ndarray]], model: Any) -> Any:
    return lambda: function(model)


def thread_cases() -> list[Callable[[], Outcome]]:
    """What threads do at the same time."""

    def certify(models: list[Any]) -> list[Any]:
        return [_bound(_certified, models[0])] * 4

    def solve(models: list[Any]) -> list[Any]:
        return [_bound(_solved, model) for model in models]

    def mixed(models: list[Any]) -> list[Any]:
        first, second, third = models
        return [
            _bound(_solved, second),
            _bound(_certified, first),
            _bound(_solved, third),
            _bound(_checked, first),
            _bound(_certified, first),
        ]

    return [
        lambda: _at_once("four certify one model", certify, 1, 1),
        lambda: _at_once("four solve models that share a trunk", solve, 4, 0),
        lambda: _at_once("solve, certify and check_alignment share one", mixed, 3, 1),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    parser.add_argument("--rounds", type=int, default=3, help="times for each case")
    parser.add_argument("--only", default="", help="cases whose name has this text")


def measure(options: argparse.Namespace) -> Report:
    """Runs all cases: processes first, as these are forks of this one."""
    kills.check_can_fork()
    outcomes = []

    def note(outcome: Outcome) -> None:
        print(outcome, flush=True)
        outcomes.append(outcome)

    with tempfile.TemporaryDirectory() as work:
        references = kills.References(Path(work))
        rng = np.random.default_rng(0)
        for _ in range(options.rounds):
            for name, program, run in _programs():
                if options.only not in f"two processes: {name}":
                    continue
                delay = float(rng.uniform(0.0, 0.5))
                note(_together(name, program, run, references, Path(work), delay))
    with faults.eagerly():
        for _ in range(options.rounds):
            for case in thread_cases() if options.only in "threads" else []:
                note(case())
    return _report(outcomes, options)


def _report(outcomes: list[Outcome], options: argparse.Namespace) -> Report:
    totals: dict[str, collections.Counter[str]] = {}
    for each in outcomes:
        counter = totals.setdefault(each.case, collections.Counter())
        counter.update(
            times=1, right=each.right, refused=each.refused, wrong=len(each.wrong)
        )
    columns = ("times", "right", "refused", "wrong")
    rows = [[case, *(str(c[name]) for name in columns)] for case, c in totals.items()]
    wrong = [f"- {each.case}: {text}" for each in outcomes for text in each.wrong]
    body = [
        common.table(["case", *columns], rows),
        "Everything that was wrong:",
        *(wrong or ["nothing."]),
    ]
    targets = [
        Target("cases", float(len(outcomes)), float(options.rounds), at_least=True),
        Target("wrong results of things run together", float(len(wrong)), 0.0),
    ]
    measurements = [
        {"case": e.case, "right": e.right, "refused": e.refused, "wrong": list(e.wrong)}
        for e in outcomes
    ]
    settings = {"rounds": options.rounds, "only": options.only}
    return Report("Concurrency", body, targets, settings, measurements)
