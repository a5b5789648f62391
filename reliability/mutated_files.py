"""Damaged and hostile files: loading works or raises a documented error, no more."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks.common import Target, table
from pipelines import files, gate, params
from pipelines.datasets import imported, storage
from pipelines.datasets.known import KNOWN
from pipelines.layout import Layout
from pipelines.studies import settings
from reliability import backends, mutations, old_files
from reliability.report import Report

# What loading may raise. SECURITY.md and docs/reliability.md list the same.
OURS = (ValueError, OSError)
KERAS = (
    *OURS,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    RuntimeError,
    ImportError,
    ArithmeticError,
    MemoryError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
)
# Of those, what code of this package may raise itself.
OF_THE_PACKAGE = (ValueError, OSError, TypeError, MemoryError)

SECONDS, MEGABYTES = 1.0, 200.0
# A child that takes more CPU time for one file is stopped, or more time at all.
_CPU_SECONDS, _WALL_SECONDS = 20.0, 1800.0
# A child may take this much address space beyond what it has at its beginning.
_ADDRESSES = 2**30
_PER_CHILD = 250
_LOG = backends.ROOT / "build" / "reliability" / "mutated_files.jsonl"
_PACKAGES = ("keras_dalign", "pipelines")

Row = dict[str, Any]
Load = Callable[[Path], object]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--files", type=int, default=5000, help="number of files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations")
    parser.add_argument(
        "--log", type=Path, default=_LOG, help="results so far; it goes on from there"
    )
    parser.add_argument(
        "--only", nargs="*", type=int, help="numbers of the mutations to do again"
    )


class Corpus:
    """The files that are mutated, and how each of them is loaded.

    Args:
        folder: An empty folder, the workspace.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        saved = sorted(old_files.FOLDER.glob("*/*"))
        keras_files = [path for path in saved if path.suffix == ".keras"]
        weights = [path for path in saved if path.suffix == ".h5"]
        grids = [
            backends.ROOT / "params.yaml",
            *sorted(backends.ROOT.glob("profiles/*/params.yaml")),
        ]
        studies = [path for path in grids if path.parent.name == "studies"]
        grids = [path for path in grids if path not in studies]
        self._models: dict[Path, keras.Model] = {}
        data = self._data()
        # Kind of the mutations, share of all, files, how each is loaded.
        self.groups: tuple[tuple[str, str, float, list[Path]], ...] = (
            (".keras", "keras", 0.4, keras_files),
            (".weights.h5", "weights", 0.12, weights),
            ("npz, prepared data", "npz", 0.1, [data[0]]),
            ("npz, imported data", "npz", 0.1, [data[1]]),
            ("npz, kept weights", "npz", 0.08, [data[2]]),
            ("params.yaml, grid", "yaml", 0.1, grids),
            ("params.yaml, studies", "yaml", 0.04, studies),
            ("dvc.lock", "yaml", 0.06, [self._lock()]),
        )

    def _data(self) -> list[Path]:
        """Small data sets and kept weights, as the pipelines write them."""
        rng = np.random.default_rng(0)
        parts = {
            f"{axis}_{part}": (
                rng.integers(0, 256, (40, 4, 4, 1), dtype="uint8")
                if axis == "x"
                else rng.integers(0, 10, 40)
            )
            for part in ("train", "test")
            for axis in "xy"
        }
        prepared = Layout(self.folder).arrays("digits")
        files.write_arrays(prepared, parts)
        description = {"sha256": "", "pixel_scale": 1.0, "synthetic": False}
        files.write_json(
            Layout(self.folder).description("digits"), {**description, "title": ""}
        )
        folder = self.folder / "originals"
        x = rng.integers(0, 2, (40, 16, 16, 1), dtype="uint8")
        files.write_arrays(folder / "semeion.npz", {"x": x, "y": parts["y_train"]})
        weights = {f"w{i}": rng.normal(size=(5, 3)) for i in range(3)}
        files.write_arrays(folder / "weights.npz", weights)
        return [prepared, folder / "semeion.npz", folder / "weights.npz"]

    def _lock(self) -> Path:
        """The first stages of the lock, as all of it takes seconds to read."""
        text = (backends.ROOT / "dvc.lock").read_text("utf-8")
        path = self.folder / "originals" / "dvc.lock"
        path.write_text(text[: text.index("\n  ", 4000) + 1], "utf-8")
        return path

    def case(self, index: int, seed: int) -> tuple[str, Path, str, bytes]:
        """One mutation.

        Args:
            index: Its number.
            seed: Seed of all.

        Returns:
            The group, the original, the mutation's name, and the content.
        """
        rng = np.random.default_rng([seed, index])
        shares = [share for _, _, share, _ in self.groups]
        name, kind, _, originals = self.groups[int(rng.choice(len(shares), p=shares))]
        original = originals[int(rng.integers(len(originals)))]
        mutation, content = mutations.mutated(
            kind, original.read_bytes(), (seed, index, 1)
        )
        return name, original, mutation, content

    def loader(self, name: str, original: Path) -> tuple[str, Load]:
        """The name that the file must have, and what loads it."""
        if name == ".keras":
            return "model.keras", keras.saving.load_model
        if name == ".weights.h5":
            if original not in self._models:
                self._models[original] = old_files.opened(original)
            model = self._models[original]
            model.load_weights(original)

            def load(path: Path) -> None:
                before = model.get_weights()
                try:
                    model.load_weights(path)
                except Exception:
                    after = model.get_weights()
                    if isinstance(model, kd.AlignedModel) and not _equal(before, after):
                        raise AssertionError("the model was changed") from None
                    raise

            return "model.weights.h5", load
        if name == "dvc.lock":
            return name, _lock_reader()
        readers: dict[str, tuple[str, Load]] = {
            "npz, prepared data": (
                "data/digits.npz",
                lambda path: storage.read(Layout(path.parent.parent), "digits"),
            ),
            "npz, imported data": (
                "semeion.npz",
                lambda path: imported.read(path, KNOWN["semeion"]),
            ),
            "npz, kept weights": (
                "weights.npz",
                lambda path: files.read_arrays(path, "w0", "w1", "w2"),
            ),
            "params.yaml, grid": ("params.yaml", params.load),
            "params.yaml, studies": ("params.yaml", settings.load),
        }
        return readers[name]


def _equal(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> bool:
    return len(before) == len(after) and all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(before, after, strict=True)
    )


def _lock_reader() -> Load:
    """What reads a lock as DVC does, then as the gate does."""
    from dvc.exceptions import DvcException  # noqa: PLC0415
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA  # noqa: PLC0415
    from dvc.utils import strictyaml  # noqa: PLC0415

    def read(path: Path) -> None:
        try:
            strictyaml.load(str(path), COMPILED_LOCKFILE_SCHEMA)
        except DvcException as error:
            # DVC ends with a message, and the gate stops there.
            raise ValueError("DVC refuses it") from error
        gate.locked_paths(path.read_text("utf-8"))

    return read


class Watch:
    """Notes what must not happen while files are loaded, by Python's audit events.

    Args:
        folder: The only folder in which files may be written.
    """

    _FORBIDDEN = (
        "os.system",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
        "subprocess.Popen",
        "pty.spawn",
        "pickle.find_class",
        "socket.connect",
        "socket.getaddrinfo",
        "urllib.Request",
        "ftplib.connect",
        "webbrowser.open",
    )
    _WRITES = (
        "os.chmod",
        "os.chown",
        "os.link",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.symlink",
        "os.truncate",
        "shutil.copyfile",
        "shutil.move",
        "shutil.rmtree",
    )

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.seen: list[str] = []
        self.on = False
        # There is no way to remove a hook: a child has one, and ends with it.
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        self.on = False
        try:
            if self._is_wrong(event, arguments):
                self.seen.append(f"{event} {arguments!r}"[:300])
        finally:
            self.on = True

    def _is_wrong(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event in self._FORBIDDEN:
            return True
        if event == "open":
            path, mode, flags = arguments
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            for_writing = any(letter in (mode or "") for letter in "wax+")
            return (for_writing or bool(flags & writes)) and self._is_outside(path)
        if event in self._WRITES:
            return any(self._is_outside(path) for path in arguments[:2])
        if event == "import":
            return str(arguments[0]).startswith(mutations.CANARY)
        if event in {"marshal.loads", "function.__new__", "code.__new__"}:
            # Python itself reads compiled modules in this way.
            return event != "marshal.loads" or not _importing()
        if event == "exec":
            return getattr(arguments[0], "co_filename", "") == "<mutated>"
        return False

    def _is_outside(self, path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        real = os.path.realpath(os.fsdecode(path))
        inside = real == self.folder or real.startswith(self.folder + os.sep)
        return not inside and real != os.devnull


def _importing() -> bool:
    frame = sys._getframe()  # noqa: SLF001  (there is no other way)
    while frame is not None:
        if "importlib._bootstrap" in frame.f_code.co_filename:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def attempt(
    load: Load, path: Path, allowed: Sequence[type[Exception]], watch: Watch
) -> Row:
    """Loads a file, and says how it went.

    Args:
        load: Loads it.
        path: The file.
        allowed: What it may raise.
        watch: Is on while it loads.

    Returns:
        `outcome`: `loaded` or the name of the error; `wrong`: why that is not allowed,
        or an empty string; `seconds` of CPU; `megabytes` beyond those before.
    """
    outcome, wrong = "loaded", ""
    gc.collect()
    before = _peak(reset=True)
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            watch.on = True
            load(path)
            watch.on = False
    except Exception as error:  # noqa: BLE001  (what it is, is the question)
        watch.on = False
        outcome, wrong = _judged(error, allowed)
    seconds = time.process_time() - start
    megabytes = (_peak() - before) / 1e6
    return {
        "outcome": outcome,
        "wrong": wrong,
        "seconds": round(seconds, 3),
        "megabytes": round(megabytes, 1),
    }


def _judged(error: Exception, allowed: Sequence[type[Exception]]) -> tuple[str, str]:
    """The name of an error, and why it is not allowed, if so."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).parent.name}/{Path(last.filename).name}"
    ours = any(f"/{package}/" in last.filename for package in _PACKAGES)
    kinds = tuple(OF_THE_PACKAGE) if ours else tuple(allowed)
    # Whatever TensorFlow's own errors are called, they have one class.
    known = isinstance(error, kinds) or (
        not ours
        and ValueError in allowed
        and TypeError in allowed
        and type(error).__module__.startswith("tensorflow.")
    )
    name = _name(type(error))
    if known:
        return name, ""
    return name, f"{name} at {place}:{last.lineno}: {error}"[:300]


def _name(kind: type[BaseException]) -> str:
    """The name of an error; that of zlib is called no more than `error`."""
    own = kind.__name__ == "error"
    return f"{kind.__module__}.error" if own else kind.__name__


def _peak(*, reset: bool = False) -> float:
    """The most memory that was resident, in bytes, since the last reset."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    if reset:
        # Where that is not permitted, the peak since the start is what there is.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", "ascii")
    line = next(
        each for each in status.read_text("ascii").splitlines() if "VmHWM" in each
    )
    return float(line.split()[1]) * 1024


def _child(
    corpus: Corpus, folder: Path, numbers: Sequence[int], seed: int, log: int
) -> None:
    """Loads mutated files, and writes a line before each and another one after it."""
    tempfile.tempdir = str(folder)
    os.environ["TMPDIR"] = str(folder)
    os.chdir(folder)
    sys.path.append(str(folder))
    (folder / f"{mutations.CANARY}.py").write_text("", "utf-8")
    random.seed(0)
    watch = Watch(folder)
    # What the first load makes once, it makes now.
    for name, _, _, originals in corpus.groups:
        _, load = corpus.loader(name, originals[-1])
        with contextlib.suppress(ValueError):
            load(originals[-1])
    limit = _addresses() + _ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    for number in numbers:
        _note(log, {"begun": number})
        name, original, mutation, content = corpus.case(number, seed)
        file, load = corpus.loader(name, original)
        path = folder / "loaded" / file
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        if name == "npz, prepared data":
            description = corpus.folder / "data" / "digits.json"
            shutil.copyfile(description, path.with_suffix(".json"))
        allowed = KERAS if name in {".keras", ".weights.h5"} else OURS
        watch.seen.clear()
        row = attempt(load, path, allowed, watch)
        if row["seconds"] > SECONDS or row["megabytes"] > MEGABYTES:
            # What the first use of something takes is not the file's.
            again = attempt(load, path, allowed, watch)
            for key in ("seconds", "megabytes"):
                row[key] = min(row[key], again[key])
        if not _is_safe():
            watch.seen.append("unsafe deserialization was enabled")
        made = [str(each) for each in folder.rglob(mutations.CANARY)]
        made += [str(each) for each in (folder.parent / "x",) if each.exists()]
        row |= {
            "number": number,
            "file": name,
            "original": f"{original.parent.name}/{original.name}",
            "mutation": mutation,
            "happened": [*watch.seen, *made],
        }
        _note(log, row)
        keras.backend.clear_session()


def _is_safe() -> bool:
    """Whether Keras would still refuse a lambda."""
    config = {"class_name": "__lambda__", "config": {"value": ["", None, None]}}
    try:
        keras.saving.deserialize_keras_object(config)
    except ValueError as error:
        return "lambda" in str(error)
    return False


def _addresses() -> int:
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return 2**40
    return int(pages.read_text("ascii").split()[0]) * resource.getpagesize()


def _note(log: int, row: Row) -> None:
    os.write(log, f"{json.dumps(row)}\n".encode())


def _rows(log: Path, seed: int) -> dict[int, Row]:
    """The results that a log has, by number; others than those of the seed go."""
    if not log.exists():
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps({"seed": seed}) + "\n", "utf-8")
    first, *lines = (json.loads(line) for line in log.read_text("utf-8").splitlines())
    if first != {"seed": seed}:
        raise ValueError(
            f"The log has results of another seed. Received: {log} with {first}, "
            f"seed={seed}. Delete it, or give another `--log`."
        )
    return {line["number"]: line for line in lines if "number" in line}


def run(numbers: Sequence[int], seed: int, log: Path) -> list[Row]:
    """Loads mutated files in children, and goes on after those that end early.

    Args:
        numbers: Of the mutations.
        seed: Of all.
        log: A file with one line a result; those that it has are not made again.

    Returns:
        The results of the numbers.

    Raises:
        RuntimeError: If a child cannot begin.
    """
    done = _rows(log, seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "originals")
        folder.mkdir()
        corpus = Corpus(folder)
        left = [number for number in numbers if number not in done]
        while left:
            workspace = Path(tempfile.mkdtemp(dir=temporary), "workspace")
            workspace.mkdir()
            stopped = _in_child(corpus, workspace, left[:_PER_CHILD], seed, log)
            done = _rows(log, seed)
            left = [number for number in left if number not in done]
            if stopped is not None and left:
                begun = _begun(log)
                if begun not in left:
                    raise RuntimeError(
                        f"A child ended before its first file. Received: {stopped}"
                    )
                number = begun
                with log.open("ab") as file:
                    row = {"number": number, "outcome": "died", "wrong": stopped}
                    _note(file.fileno(), row | _of(corpus, number, seed))
                left.remove(number)
    done = _rows(log, seed)
    return [done[number] for number in numbers]


def _of(corpus: Corpus, number: int, seed: int) -> Row:
    name, original, mutation, _ = corpus.case(number, seed)
    return {
        "file": name,
        "original": f"{original.parent.name}/{original.name}",
        "mutation": mutation,
        "seconds": 0.0,
        "megabytes": 0.0,
        "happened": [],
    }


def _begun(log: Path) -> int | None:
    """The number of the file that was being loaded last."""
    line: Row = json.loads(log.read_text("utf-8").splitlines()[-1])
    return line.get("begun")


def _in_child(
    corpus: Corpus, folder: Path, numbers: Sequence[int], seed: int, log: Path
) -> str | None:
    """Runs `_child`; says why it ended early, if it did."""
    with log.open("ab") as file, warnings.catch_warnings():
        # JAX warns of forks, though nothing has run on it here.
        warnings.simplefilter("ignore")
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _child(corpus, folder, numbers, seed, file.fileno())
                code = 0
            except BaseException:  # noqa: BLE001  (a child must end here)
                traceback.print_exc()
            finally:
                os._exit(code)
    size, since, spent = -1, 0.0, 0.0
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if code == 0 else f"the process ended with code {code}"
        if log.stat().st_size != size:
            size = log.stat().st_size
            since, spent = time.monotonic(), _cpu_seconds(child)
        elif (
            _cpu_seconds(child) - spent > _CPU_SECONDS
            or time.monotonic() - since > _WALL_SECONDS
        ):
            os.kill(child, 9)
            os.waitpid(child, 0)
            return f"no end after {_CPU_SECONDS:g} s of CPU time"
        time.sleep(0.2)


def _cpu_seconds(process: int) -> float:
    """The CPU time of a process; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{process}/stat").read_text("utf-8")
    except OSError:
        return 0.0
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(options: argparse.Namespace) -> Report:
    """Loads mutated files.

    Args:
        options: See `add_options`.

    Returns:
        What was raised, executed or written, and the time and memory that it took.
    """
    numbers = options.only or range(options.files)
    rows = run(numbers, options.seed, options.log)
    return report(rows, {"files": len(rows), "seed": options.seed})


def _faults(rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    """Everything that is not as it should be."""
    for row in rows:
        if row["wrong"]:
            yield f"error: {row['wrong']}", row
        if row["happened"]:
            yield f"happened: {'; '.join(row['happened'])}", row
        if row["seconds"] > SECONDS:
            yield f"took {row['seconds']:.1f} s", row
        if row["megabytes"] > MEGABYTES:
            yield f"took {row['megabytes']:.0f} MB", row


def report(rows: Sequence[Row], given: Mapping[str, Any]) -> Report:
    """The figures of results."""
    faults = list(_faults(rows))
    shown = []
    for name in dict.fromkeys(sorted(row["file"] for row in rows)):
        of = [row for row in rows if row["file"] == name]
        outcomes = Counter(row["outcome"] for row in of)
        text = ", ".join(f"{kind} {n}" for kind, n in outcomes.most_common())
        longest = max(row["seconds"] for row in of)
        most = max(row["megabytes"] for row in of)
        shown.append([name, str(len(of)), text, f"{longest:.2f}", f"{most:.0f}"])
    listed = [
        [str(row["number"]), row["original"], row["mutation"], text.replace("|", "/")]
        for text, row in faults[:100]
    ]
    names = ", ".join(f"`{_name(each)}`" for each in KERAS)
    about = (
        f"{len(rows)} files made from the repository's own by one mutation each "
        "(`reliability/mutations.py`), loaded by the package's and Keras's "
        "ordinary calls. Documented errors are "
        f"{', '.join(f'`{each.__name__}`' for each in OURS)} for data, parameters "
        f"and locks, and for models and weights {names}, and TensorFlow's errors."
    )
    return Report(
        title="Damaged and hostile files",
        body=[
            about,
            table(["file", "number", "outcomes", "CPU s, most", "MB, most"], shown),
            *(
                [
                    table(["number", "original", "mutation", "fault"], listed),
                    "`--only NUMBER` repeats one.",
                ]
                if faults
                else ["No faults."]
            ),
        ],
        targets=[
            Target("mutated files", len(rows), 5000, at_least=True),
            Target("undocumented errors", sum(bool(row["wrong"]) for row in rows), 0),
            Target(
                "executed, or written outside of the workspace",
                sum(bool(row["happened"]) for row in rows),
                0,
            ),
            Target("CPU seconds, most", max(row["seconds"] for row in rows), SECONDS),
            Target(
                "additional MB, most",
                max(row["megabytes"] for row in rows),
                MEGABYTES,
            ),
        ],
        settings=given,
        measurements={"faults": [{"fault": text, **row} for text, row in faults]},
    )
