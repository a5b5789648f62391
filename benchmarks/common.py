"""Models, data, measurements, targets and result files that the benchmarks share."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from pipelines import datasets, provenance
from pipelines.params import DataParams

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The default folder of the data sets.
DATA = ROOT.parent / "shared" / "data"

BASE = "base"
REESTIMATED = "base, re-estimated"
RANDOM = "two-phase, random gates"
LEARNED = "two-phase, learned gates"
GATES = {RANDOM: "random", LEARNED: "learned"}

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
# The share of the epochs of a two-phase run that is exploration.
EXPLORE = 0.6


@dataclass(frozen=True)
class Data:
    """Training and test samples.

    Attributes:
        x: Training inputs, `(n, ...)`, float32 in [0, 1].
        y: Training labels, `(n,)`, int64 from 0.
        x_test: Test inputs.
        y_test: Test labels.
    """

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@dataclass(frozen=True)
class Target:
    """A figure that the package must show, and the number measured.

    Attributes:
        claim: A description of the figure.
        measured: The number measured.
        bound: The bound on it.
        at_least: Whether the bound is a lower bound; otherwise it is an upper bound.
    """

    claim: str
    measured: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the target is met; NaN never meets it."""
        if self.at_least:
            return bool(self.measured >= self.bound)
        return bool(self.measured <= self.bound)

    def __str__(self) -> str:
        verdict = "met" if self.met else "MISSED"
        sign = ">=" if self.at_least else "<="
        return (
            f"**{verdict}**: {self.claim}: {self.measured:.4g} "
            f"(target {sign} {self.bound:.4g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The target as a dict that `json.dumps` accepts."""
        return {
            "claim": self.claim,
            "measured": self.measured,
            "bound": self.bound,
            "at_least": self.at_least,
            "met": self.met,
        }


def digits() -> Data:
    """scikit-learn's digits, 1,200 for training and 597 for the test.

    Returns:
        Images of shape `(8, 8, 1)` in [0, 1], split at random, stratified by class.
    """
    data = datasets.load_digits(DataParams(n_train=1200, n_test=597, split_seed=0))
    return Data(data.x_train, data.y_train, data.x_test, data.y_test)


def mlp(seed: int) -> keras.Model:
    """The base model for digits: 64-64 with ReLU, ending in 10 logits."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def compiled(
    method: str,
    base: keras.Model,
    n_samples: int,
    seed: int,
    learning_rate: Any = LEARNING_RATE,
) -> keras.Model:
    """The model that a method trains, compiled with Adam.

    Args:
        method: `BASE`, `RANDOM` or `LEARNED`.
        base: The base model. It is trained itself, or shares its weights with the
            aligned model.
        n_samples: Number of training samples.
        seed: Seed of the gates.
        learning_rate: Float, or a schedule over all steps of the run.

    Returns:
        The model, ready for `fit`.
    """
    optimizer = keras.optimizers.Adam(learning_rate)
    model = base
    if method != BASE:
        model = kd.align(base, n_samples=n_samples, gates=GATES[method], seed=seed)
        optimizer = kd.DAlign(optimizer, None, explore=EXPLORE, average_weights=0)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def timed_fit(model: keras.Model, data: Data, *, seed: int, **arguments: Any) -> float:
    """Fits a model with the shuffles of `seed`.

    Args:
        model: A compiled model.
        data: The data; only the training samples are used.
        seed: Seed of the shuffles.
        **arguments: Further arguments of `fit`.

    Returns:
        The wall time of `fit` in seconds, compilation and switch included.
    """
    keras.utils.set_random_seed(seed)
    begin = time.perf_counter()
    model.fit(data.x, data.y, batch_size=BATCH_SIZE, verbose=0, **arguments)
    return time.perf_counter() - begin


def evaluation(model: keras.Model, data: Data) -> dict[str, float]:
    """Training loss, certified gap and test error of a model.

    Args:
        model: A compiled model.
        data: The data.

    Returns:
        `loss` and `gap` over all training samples, in inference mode with sums in
        float64, and `test_error` in percent.
    """
    certificate = kd.certify(model, data.x, data.y)
    logits = model.predict(data.x_test, batch_size=256, verbose=0)
    wrong = np.argmax(np.asarray(logits), axis=1) != data.y_test
    return {
        "loss": certificate.loss,
        "gap": certificate.gap,
        "test_error": 100.0 * float(np.mean(wrong)),
    }


def warm_up() -> None:
    """Fits a small model, so that no measured run includes the framework's start."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    model.fit(np.zeros((4, 4), "float32"), np.zeros(4, "int64"), verbose=0)


def mean(runs: Iterable[Mapping[str, Any]], key: str) -> float:
    """The mean of a number over the seeds."""
    return fmean(float(run[key]) for run in runs)


def spread(runs: Iterable[Mapping[str, Any]], key: str) -> float:
    """The sample standard deviation of a number over the seeds, NaN for one seed."""
    values = [float(run[key]) for run in runs]
    return stdev(values) if len(values) > 1 else math.nan


def plus_minus(runs: Sequence[Mapping[str, Any]], key: str) -> str:
    """Mean and standard deviation over the seeds, as `2.45 ± 0.10`."""
    deviation = spread(runs, key)
    text = f"{mean(runs, key):.2f}"
    return text if math.isnan(deviation) else f"{text} ± {deviation:.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bullets(items: Iterable[object]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {item}" for item in items)


def arguments(
    doc: str | None,
    *,
    seeds: int | None = None,
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """Reads a benchmark's command line.

    Args:
        doc: The program's docstring.
        seeds: Default number of seeds, for programs that take one.
        more: Adds the program's own options.

    Returns:
        The options: `out` (where the results go), `seeds`, and the program's own.
    """
    parser = argparse.ArgumentParser(
        description=(doc or "").strip().partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for the results"
    )
    if seeds is not None:
        parser.add_argument(
            "--seeds", type=int, default=seeds, help="number of seeds, from 0"
        )
    if more is not None:
        more(parser)
    return parser.parse_args()


def add_data_folder(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds the option `--data`, the folder with the data sets of these names."""
    *first, last = (f"{name}.npz" for name in names)
    files = f"{', '.join(first)} and {last}" if first else last
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder with {files}")


def write(
    out: Path,
    name: str,
    *,
    title: str,
    body: Sequence[str],
    targets: Sequence[Target],
    settings: Mapping[str, Any],
    measurements: Any,
) -> None:
    """Writes `NAME.json` and `NAME.md`, and prints the latter.

    Args:
        out: The folder.
        name: The name.
        title: The title of the Markdown file.
        body: Its paragraphs and tables.
        targets: The targets, met or missed.
        settings: The settings of the measurement.
        measurements: Everything that was measured.
    """
    today = datetime.now(UTC).date().isoformat()
    made_with = {**provenance.environment(), **_code(), "date": today}
    text = "\n\n".join(
        [f"# {title}", *body, "Targets:", bullets(targets), _footnote(made_with)]
    )
    record = {
        "settings": settings,
        "targets": [target.to_dict() for target in targets],
        "measurements": measurements,
        "provenance": made_with,
    }
    out.mkdir(parents=True, exist_ok=True)
    text_file, record_file = out / f"{name}.md", out / f"{name}.json"
    text_file.write_text(f"{text}\n", encoding="utf-8")
    record_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)


def _footnote(made_with: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in made_with["versions"].items())
    return (
        f"Measured with Python {made_with['python']}, {versions}; backend "
        f"{made_with['backend']}, {made_with['threads']} threads on "
        f"{made_with['device']}; code: {made_with['code']}; {made_with['date']}."
    )


def _code() -> dict[str, str]:
    """The commit, and whether the code differs from it."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git(
        "status",
        "--porcelain",
        "--",
        "keras_dalign",
        "benchmarks/*.py",
        "pipelines",
        "reliability/*.py",
    )
    if commit is None or changed:
        return {"code": "dirty" if commit is None else f"{commit}, dirty"}
    return {"code": commit}


def _git(*words: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
