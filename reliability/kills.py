"""Kills programs with SIGKILL at random moments, runs them again, compares the results.

The programs are those that users run: a `fit` with `BackupAndRestore` and
`ModelCheckpoint`, a `solve`, each stage of the pipeline, and `dvc repro`. A killed
program is started again by the same command, and may be killed again; after some kills
it is left to end. What it has made is compared, byte by byte, with what a run without
kills has made.

Importing the framework takes longer than the programs do. So this process imports it,
never computes with it, and forks itself for every run; `dvc repro` forks itself for
its stages.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import yaml

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import Target
from keras_dalign.certification import solver as solving
from keras_dalign.solving.head_solver import HeadSolver
from keras_dalign.training import training_run
from pipelines import __main__ as command
from pipelines import (
    datasets,
    evaluate,
    exploration,
    explore,
    files,
    prepare,
    train,
    tune,
)
from pipelines import report as report_stage
from reliability.report import ROOT, Report

PROGRAMS = (prepare, explore, train, evaluate, tune, report_stage)

# Kills of one run at most, before it is left to end.
_MOST_KILLS = 4
_POLL_SECONDS = 2e-4
_LONGEST_SECONDS = 300.0

# Of the `fit` that is killed.
EPOCHS, EXPLORED, L2 = 5, 3, 1e-3


class Board:
    """The phase that a program is in, in memory which its killer can see.

    The first word is the number of the phase; behind it, for each phase, how often it
    was entered. A phase within another one counts as the inner one.
    """

    def __init__(self) -> None:
        self.phases: list[str] = ["other"]
        self._words = np.frombuffer(mmap.mmap(-1, 4096), np.uint32)
        # Where a run notes its phases.
        self.log: Path | None = None

    def clear(self) -> None:
        """Begins a new run."""
        self._words[:] = 0

    @property
    def phase(self) -> str:
        """The phase that the program is in."""
        return self.phases[int(self._words[0])]

    def entered(self, phase: str) -> int:
        """How often a phase was entered."""
        return int(self._words[1 + self.phases.index(phase)])

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Says that the program is in a phase."""
        number, before = self.phases.index(phase), int(self._words[0])
        self._words[1 + number] += 1
        self._words[0] = number
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._words[0] = before
            if self.log is not None:
                with self.log.open("a", encoding="utf-8") as file:
                    print(
                        json.dumps([phase, time.perf_counter() - begin]),
                        file=file,
                    )

    def mark(self, phase: str, owner: Any, name: str) -> None:
        """Makes calls of a function a phase."""
        if phase not in self.phases:
            self.phases.append(phase)
        function = getattr(owner, name)

        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return function(*args, **kwargs)

        setattr(owner, name, marked)


BOARD = Board()


def _mark_phases() -> None:
    """Marks the phases of all programs, in this process and those it forks."""
    if len(BOARD.phases) > 1:
        return
    callbacks = keras.callbacks
    for phase, owner, name in (
        ("read data", datasets, "load"),
        ("read data", datasets, "read"),
        ("explore", training_run.TrainingRun, "_explore"),
        ("explore", exploration, "fit"),
        ("back up", callbacks.BackupAndRestore, "_save_model"),
        ("checkpoint", callbacks.ModelCheckpoint, "_save_model"),
        ("switch", training_run, "switch"),
        ("switch", solving, "switch"),
        ("solve", HeadSolver, "solve"),
        ("choose", HeadSolver, "_choose"),
        ("certify", solving, "certify_features"),
        ("certify", kd, "certify"),
        ("save", kd.AlignedModel, "save"),
        ("write", files, "write_text"),
        ("write", files, "write_arrays"),
        ("publish", Path, "replace"),
    ):
        BOARD.mark(phase, owner, name)


@dataclass(frozen=True)
class Program:
    """What is killed.

    Attributes:
        name: Its name in the tables.
        run: Runs it in the current folder, or goes on.
        makes: Patterns of the files that it makes, which must not exist in parts.
        often: Its share of the runs.
    """

    name: str
    run: Callable[[], None]
    makes: tuple[str, ...]
    often: int = 1

    def made(self, folder: Path) -> dict[str, bytes]:
        """The files that it has made."""
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for pattern in self.makes
            for path in sorted(folder.glob(pattern))
            # Git and DVC ignore what a killed process leaves under temporary names.
            if path.is_file() and not any(n.endswith(".tmp") for n in path.parts)
        }


def _two_moons() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 10)).astype("float32")
    return x, (x[:, 0] * x[:, 1] > 0).astype("int32")


def _base() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((10,)),
            keras.layers.Dense(16),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(2),
        ]
    )


def _fit() -> None:
    """The program of docs/how-to/resume.md."""
    x, y = _two_moons()
    model = kd.align(_base(), n_samples=len(x))
    options = {"l2": L2, "tol": 1e-3}
    optimizer = kd.DAlign("adam", explore=EXPLORED, solve_options=options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    callbacks = [
        keras.callbacks.BackupAndRestore("backup", double_checkpoint=True),
        keras.callbacks.ModelCheckpoint("checkpoint.keras"),
    ]
    history = model.fit(
        x, y, epochs=EPOCHS, shuffle=False, callbacks=callbacks, verbose=0
    )
    if history.epoch and history.epoch[0] >= EXPLORED:
        Path("resumed-in-the-solver").touch()
    head = [model.head.q, model.head.bias]
    own = {id(variable) for variable in head}
    rest = [variable for variable in model.weights if id(variable) not in own]
    files.write_arrays(
        Path("final.npz"),
        {
            "theta": np.concatenate([np.ravel(np.array(each)) for each in head]),
            **{f"{k:04d}": np.array(each) for k, each in enumerate(rest)},
        },
    )
    certificate = kd.certify(model, x, y, l2=L2)
    files.write_json(Path("gap.json"), {"gap": certificate.l2_gap})


def _solve() -> None:
    """Solves a model from a file, and saves it."""
    x, y = _two_moons()
    base = keras.saving.load_model("base.keras")
    model = kd.align(base, n_samples=len(x), seed=0)
    result = kd.solve(model, x, y, tol=1e-5, verbose=0)
    model.save("solved.keras")
    loaded = keras.saving.load_model("solved.keras")
    arrays = {f"{k:04d}": np.array(w) for k, w in enumerate(loaded.weights)}
    files.write_arrays(Path("solved.npz"), arrays)
    files.write_json(Path("solved.json"), {"value": result.value, "gap": result.gap})


def _save_base() -> None:
    """What `_solve` solves."""
    x, y = _two_moons()
    base = _base()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    base.compile("adam", loss)
    base.fit(x, y, epochs=2, verbose=0)
    base.save("base.keras")


METHODS = ("base", "dalign", "letter", "twice")
RECIPES = ("constant_1e3", "cosine_1e2")


def write_params(folder: Path) -> None:
    """Writes the parameters of a grid that takes seconds."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["grid"] |= {"datasets": ["digits"], "seeds": [0], "methods": list(METHODS)}
    params["tune"] |= {"datasets": ["digits"], "recipes": list(RECIPES)}
    # Two models of its own, one after the other.
    params["methods"]["twice"] = {"kind": "base", "epochs": "short", "temperature": 0.1}
    params["prepare"]["digits"] = {"n_train": 150, "n_test": 60}
    params["train"]["digits"] |= {"epochs": 5, "checkpoints": [0.6, 1.0]}
    text = yaml.safe_dump(params)
    (folder / "params.yaml").write_text(text, encoding="utf-8")


def _stage(name: str, makes: Sequence[str], **arguments: object) -> Program:
    words = [name]
    for key, value in arguments.items():
        words += [f"--{key}", str(value)]
    which = arguments.get("method", arguments.get("recipe", ""))
    label = f"{name} {which}".strip()
    return Program(label, lambda: command.cli(words), tuple(makes))


def stages() -> list[Program]:
    """The stages of the pipeline, in their order."""
    cell = {"dataset": "digits", "augmentation": "none"}
    programs = [
        _stage("prepare", ["data/digits.*"], dataset="digits"),
        _stage("explore", ["runs/digits-none-exploration-0/*"], **cell, seed=0),
    ]
    for method in METHODS:
        run = f"digits-none-{method}-0"
        each = {**cell, "method": method, "seed": 0}
        programs += [
            _stage("train", [f"runs/{run}/*"], **each),
            _stage("evaluate", [f"results/metrics/{run}.json"], **each),
        ]
    for recipe in RECIPES:
        made = f"results/tuning/digits-none-{recipe}.json"
        programs.append(_stage("tune", [made], **cell, recipe=recipe))
    programs.append(
        _stage("report", ["results/summary.json", "results/figures/*"]),
    )
    return programs


def dvc(*arguments: str) -> None:
    """Runs DVC, whose stages are forks of this process.

    Raises:
        SystemExit: If it fails.
    """
    # It takes seconds, and few programs need it.
    from dvc import cli  # noqa: PLC0415
    from dvc.stage import run as running  # noqa: PLC0415

    def run(executable: str, cmd: str, cwd: str, **rest: object) -> None:  # noqa: ARG001
        words = cmd.split()
        pid = os.fork()
        if pid == 0:
            leave(lambda: command.cli(words[2:]), Path(cwd))
        _, status = os.waitpid(pid, 0)
        if status:
            raise running.StageCmdFailedError(cmd, status)

    running._run = run  # noqa: SLF001  (in a fork, which ends)
    code = cli.main(list(arguments))
    if code:
        raise SystemExit(code)


def _repository(folder: Path) -> None:
    """A repository with the code and a grid of one method, as Git has it."""
    folder.mkdir()
    for name in ("keras_dalign", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("dvc.yaml", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    write_params(folder)
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    params["grid"]["methods"] = ["dalign"]
    params["tune"] |= {"datasets": [], "recipes": []}
    text = yaml.safe_dump(params)
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    for line in (
        "git init -q",
        f"{sys.executable} -m dvc init -q",
        f"{sys.executable} -m dvc config core.analytics false",
    ):
        subprocess.run(line.split(), cwd=folder, check=True)
    shutil.copy(ROOT / ".dvcignore", folder / ".dvcignore")


FIT = Program("fit", _fit, ("final.npz",), often=6)
SOLVE = Program("solve", _solve, ("solved.npz", "solved.json"), often=3)
DVC = Program(
    "dvc repro",
    lambda: dvc("repro"),
    ("dvc.lock", "data/digits.*", "runs/*/*", "results/metrics/**/*"),
)


def leave(run: Callable[[], None], folder: Path) -> None:
    """Runs a program in a folder, and ends this process, which is a fork."""
    code = 1
    try:
        os.chdir(folder)
        temporary = folder / "tmp"
        temporary.mkdir(exist_ok=True)
        tempfile.tempdir = str(temporary)
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf  # noqa: PLC0415  (only where it is the backend)

            # To compile takes longer than the programs do.
            tf.config.run_functions_eagerly(True)
        run()
        code = 0
    except BaseException:  # noqa: BLE001  (noted in the log of the run)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def started(run: Callable[[], None], folder: Path, log: Path | None = None) -> int:
    """Forks a process that runs a program; it and its forks are one group."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        path = log or folder / "log"
        output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        leave(run, folder)
    return pid


@dataclass(frozen=True)
class Moment:
    """When to kill: so long after a phase was entered for the n-th time."""

    phase: str
    entered: int
    seconds: float


def _ended(pid: int) -> int | None:
    """The status of a process that ended, or None."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return status if found else None


def _killed(pid: int, moment: Moment) -> str | int:
    """Kills a run at a moment.

    Returns:
        The phase that it was in, or its status if it ended before.

    Raises:
        RuntimeError: If it does not end.
    """
    begin, due = time.perf_counter(), None
    while True:
        status = _ended(pid)
        if status is not None:
            return status
        now = time.perf_counter()
        if due is None and BOARD.entered(moment.phase) >= moment.entered:
            due = now + moment.seconds
        if now - begin > _LONGEST_SECONDS:
            raise RuntimeError(f"A run does not end. Received: {moment}")
        if due is not None and now >= due:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return BOARD.phase
        time.sleep(_POLL_SECONDS)


def _run_through(run: Callable[[], None], folder: Path) -> int:
    """Runs a program to its end; the status."""
    pid = started(run, folder)
    return os.waitpid(pid, 0)[1]


def _without_kills(program: Program, folder: Path) -> list[tuple[str, float]]:
    """Runs a program, and says how long it was in which phase, in their order.

    Returns:
        Phases and seconds, one entry for each time that a phase was entered.

    Raises:
        RuntimeError: If it fails.
    """
    BOARD.clear()
    BOARD.log = folder / "phases"
    begin = time.perf_counter()
    status = _run_through(program.run, folder)
    BOARD.log = None
    log = (folder / "log").read_text(encoding="utf-8")
    if status:
        raise RuntimeError(f"{program.name} fails without a kill: {log[-4000:]}")
    noted = folder / "phases"
    lines = noted.read_text(encoding="utf-8").splitlines() if noted.exists() else []
    noted.unlink(missing_ok=True)
    (folder / "log").unlink()
    # Outside of all phases: from the beginning on.
    whole = ("other", time.perf_counter() - begin)
    return [whole, *((phase, seconds) for phase, seconds in map(json.loads, lines))]


class References:
    """What programs make without kills, made when it is first asked for."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._phases: dict[str, list[tuple[str, float]]] = {}

    def of(self, program: Program) -> tuple[Path, list[tuple[str, float]]]:
        """The folder after a run without kills, and the phases of the run."""
        folder = self._folder(program)
        if program.name not in self._phases:
            if program in (FIT, SOLVE, DVC):
                self._phases[program.name] = _without_kills(program, folder)
            else:
                # A stage needs what those before it made.
                for each in stages():
                    if each.name not in self._phases:
                        self._phases[each.name] = _without_kills(each, folder)
                    if each.name == program.name:
                        break
        return folder, self._phases[program.name]

    def _folder(self, program: Program) -> Path:
        own = program in (FIT, SOLVE, DVC)
        folder = self._work / (program.name.replace(" ", "-") if own else "stages")
        if folder.exists():
            return folder
        if program is DVC:
            _repository(folder)
        else:
            folder.mkdir()
            write_params(folder)
        if program is SOLVE:
            _without_kills(Program("base", _save_base, ()), folder)
        return folder

    def fresh(self, program: Program, folder: Path) -> None:
        """Makes a folder in which the program has yet to run."""
        reference, _ = self.of(program)
        shutil.copytree(reference, folder, symlinks=True)
        if program is DVC:
            for name in ("dvc.lock", "data", "runs", "results", ".dvc/cache"):
                path = folder / name
                shutil.rmtree(path, ignore_errors=True)
                if path.is_file():
                    path.unlink()
        for name in ("final.npz", "gap.json", "checkpoint.keras", "solved.keras"):
            (folder / name).unlink(missing_ok=True)
        for name in program.made(folder):
            path = folder / name
            path.unlink(missing_ok=True)
            if path.parent.parent.name == "runs":
                shutil.rmtree(path.parent, ignore_errors=True)


def _half_written(program: Program, folder: Path, whole: dict[str, bytes]) -> list[str]:
    """Files under their final names that are no whole ones."""
    made = program.made(folder)
    found = [
        name
        for name, content in made.items()
        # DVC writes its lock anew after each stage. A `fit` that went on inside of the
        # solver has other arrays.
        if name not in {"dvc.lock", "final.npz"} and content != whole.get(name)
    ]
    if (folder / "final.npz").exists() and not zipfile.is_zipfile(folder / "final.npz"):
        found.append("final.npz")
    checkpoints = (folder / "checkpoint.keras", folder / "solved.keras")
    return found + [path.name for path in checkpoints if _is_taken_for_whole(path)]


def _is_taken_for_whole(path: Path) -> bool:
    """Whether a file of Keras is damaged and Keras loads it all the same."""
    if not path.exists():
        return False
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = {"metadata.json", "config.json", "model.weights.h5"}
            if archive.testzip() is None and names <= set(archive.namelist()):
                return False

    def load() -> None:
        keras.saving.load_model(path)

    with tempfile.TemporaryDirectory() as folder:
        return _run_through(load, Path(folder)) == 0


def differences(program: Program, folder: Path, reference: Path) -> list[str]:
    """What a run that was killed has made otherwise."""
    found, wanted = program.made(folder), program.made(reference)
    different = [
        name
        for name in sorted(set(found) | set(wanted))
        if found.get(name) != wanted.get(name)
    ]
    if program is FIT and different and (folder / "resumed-in-the-solver").exists():
        return _outside_of_ball(folder, reference)
    return different


def _outside_of_ball(folder: Path, reference: Path) -> list[str]:
    """What differs by more than the certificates of both runs allow.

    The loss with its L2 term is strongly convex in the head: with a gap it is within
    `sqrt(2 gap / l2)` of the minimum. All else must be equal.

    Returns:
        Names of arrays.
    """
    radius = 0.0
    arrays = []
    for each in (folder, reference):
        gap = files.read_json(each / "gap.json", "gap")["gap"]
        radius += float(np.sqrt(2.0 * gap / L2))
        with np.load(each / "final.npz") as found:
            arrays.append({name: found[name] for name in found})
    one, other = arrays
    if set(one) != set(other) or one["theta"].shape != other["theta"].shape:
        return ["final.npz: other arrays"]
    different = [
        f"final.npz: {name}"
        for name in one
        if name != "theta" and not np.array_equal(one[name], other[name])
    ]
    distance = float(np.linalg.norm(one["theta"] - other["theta"]))
    # The head is kept in float32.
    if distance > radius + 1e-6 * float(np.linalg.norm(other["theta"])):
        different.append(f"final.npz: the head, by {distance:.3g} > {radius:.3g}")
    return different


def _one_run(
    program: Program, references: References, folder: Path, rng: random.Random
) -> dict[str, Any]:
    """Kills one run several times, lets it end, and says what was wrong."""
    reference, phases = references.of(program)
    references.fresh(program, folder)
    whole = program.made(reference)
    durations = collections.defaultdict(list)
    for phase, seconds in phases:
        durations[phase].append(seconds)
    kills: list[str] = []
    wrong: dict[str, list[str]] = {"half": [], "failed": [], "different": []}
    status: int | None = None
    for _ in range(_MOST_KILLS):
        phase = rng.choice(sorted(durations))
        index = rng.randrange(len(durations[phase]))
        entered = 0 if phase == "other" else 1 + index
        moment = Moment(phase, entered, rng.uniform(0, durations[phase][index]))
        BOARD.clear()
        outcome = _killed(started(program.run, folder), moment)
        if isinstance(outcome, int):
            status = outcome
            break
        kills.append(outcome)
        half = _half_written(program, folder, whole)
        wrong["half"] += [f"{name}, killed in {outcome}" for name in half]
    if status is None:
        BOARD.clear()
        status = _run_through(program.run, folder)
    if status:
        log = (folder / "log").read_text(encoding="utf-8")
        wrong["failed"].append(log[-2000:])
    else:
        wrong["different"] = differences(program, folder, reference)
    resumed = (folder / "resumed-in-the-solver").exists()
    record = {"program": program.name, "kills": kills, **wrong}
    return {**record, "resumed_in_solver": resumed}


def check_can_fork() -> None:
    """Refuses a process that has computed with the framework.

    Raises:
        RuntimeError: If it has several threads.
    """
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError(
            "Programs run as forks of this process, which must not have computed "
            "anything. Received: several threads. Start it with OMP_NUM_THREADS=1 "
            "and OPENBLAS_NUM_THREADS=1, as `nox -s reliability` does."
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    parser.add_argument("--kills", type=int, default=200, help="how many kills")
    parser.add_argument("--seconds", type=float, default=7200.0, help="no longer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        nargs="*",
        help="names of programs, such as fit, 'train dalign', 'dvc repro'",
    )
    parser.add_argument(
        "--state",
        type=Path,
        help="a file that keeps the runs; those that are in it are counted, and not "
        "made again",
    )


def measure(options: argparse.Namespace) -> Report:
    """Kills, resumes and compares."""
    check_can_fork()
    _mark_phases()
    programs = {each.name: each for each in (FIT, SOLVE, *stages(), DVC)}
    wanted = options.only or list(programs)
    schedule = [
        each for name in wanted for each in [programs[name]] * programs[name].often
    ]
    state: Path | None = options.state
    runs: list[dict[str, Any]] = []
    if state is not None and state.exists():
        lines = state.read_text(encoding="utf-8").splitlines()
        runs = [json.loads(line) for line in lines]
    begin = time.perf_counter()
    order = list(schedule)
    random.Random(options.seed).shuffle(order)  # noqa: S311  (no secret)
    with tempfile.TemporaryDirectory() as work:
        references = References(Path(work))
        while _kills(runs) < options.kills:
            if time.perf_counter() - begin > options.seconds:
                break
            number = len(runs)
            rng = random.Random(f"{options.seed}-{number}")  # noqa: S311
            program = order[number % len(order)]
            folder = Path(work) / f"run-{number}"
            runs.append(_one_run(program, references, folder, rng))
            shutil.rmtree(folder)
            print(f"{_kills(runs)} kills; {json.dumps(runs[-1])[:300]}", flush=True)
            if state is not None:
                with state.open("a", encoding="utf-8") as file:
                    print(json.dumps(runs[-1]), file=file)
    return _report(runs, options)


def _kills(runs: Sequence[dict[str, Any]]) -> int:
    return sum(len(run["kills"]) for run in runs)


def _report(runs: list[dict[str, Any]], options: argparse.Namespace) -> Report:
    counts = collections.Counter(
        (run["program"], phase) for run in runs for phase in run["kills"]
    )
    names = list(dict.fromkeys(run["program"] for run in runs))
    phases = [phase for phase in BOARD.phases if any(counts[n, phase] for n in names)]
    rows = [
        [name, *(str(counts[name, phase] or "") for phase in phases)] for name in names
    ]
    totals = [str(sum(counts[name, phase] for name in names)) for phase in phases]
    in_solver = sum(run["resumed_in_solver"] for run in runs)
    failures = [
        f"{run['program']}, killed in {', '.join(run['kills'])}: {kind}: {each}"
        for run in runs
        for kind in ("half", "failed", "different")
        for each in run[kind]
    ]
    first = (
        f"{len(runs)} runs were killed {_kills(runs)} times in all. By program and "
        "phase, where `other` is what is in no other phase:"
    )
    second = (
        f"{in_solver} runs of `fit` went on inside of the solver. There the solver "
        "starts again at the last backup: the head is compared within the distance "
        "that the two certificates allow, and all other weights bit by bit."
    )
    body = [
        first,
        common.table(["program", *phases], [*rows, ["all", *totals]]),
        second,
        "Everything that was wrong:",
        *([f"- {each}" for each in failures] or ["nothing."]),
    ]
    targets = [
        Target("kills", _kills(runs), float(options.kills), at_least=True),
        Target("kills after which a file was half-written", _sum(runs, "half"), 0.0),
        Target("killed runs that could not be resumed", _sum(runs, "failed"), 0.0),
        Target("killed runs that ended otherwise", _sum(runs, "different"), 0.0),
    ]
    settings = {"kills": options.kills, "seed": options.seed}
    return Report("Kills", body, targets, settings, runs)


def _sum(runs: Sequence[dict[str, Any]], kind: str) -> float:
    return float(sum(bool(run[kind]) for run in runs))
