"""Two workers share a grid: the time saved, and equal results.

A part of the digits grid (`dvc.yaml`, without augmentation, one seed for each worker)
runs in one clone, and again in two clones at the same time, which share a cache and run
one seed each. A fourth clone with their cache must then have no stage left to run, and
all metrics must equal those of one worker, byte for byte. Clones are of the last
commit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import ROOT, Target

SEEDS = (0, 1)
_GRID = "digits-none-*-"


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = Clone(folder / "one", folder / "cache-of-one")
        seconds_of_one = elapsed([one.repro(SEEDS)])
        workers = [Clone(folder / f"worker-{k}", folder / "shared") for k in SEEDS]
        seconds_of_two = elapsed(
            [worker.repro([k]) for k, worker in zip(SEEDS, workers, strict=True)]
        )
        whole = Clone(folder / "whole", folder / "shared")
        seconds_of_rest = elapsed([whole.repro(SEEDS)])
        metrics = one.metrics()
        differing = sum(whole.metrics()[key] != metrics[key] for key in metrics)
        found: dict[str, Any] = {
            "stages run by one": one.stages_run(),
            "stages run by two": [worker.stages_run() for worker in workers],
            "stages run after two": whole.stages_run(),
            "metrics": len(metrics),
            "metrics that differ": differing,
            "seconds of one": seconds_of_one,
            "seconds of two": seconds_of_two,
            "seconds of the rest": seconds_of_rest,
        }
    rows = [
        ["one worker", str(found["stages run by one"]), f"{seconds_of_one:.0f}"],
        [
            "two workers, at the same time",
            " + ".join(map(str, found["stages run by two"])),
            f"{seconds_of_two:.0f}",
        ],
        [
            "`dvc repro` of everything, with their cache",
            str(found["stages run after two"]),
            f"{seconds_of_rest:.0f}",
        ],
    ]
    about = (
        f"{len(metrics)} runs of the digits grid; {os.cpu_count()} cores, which all "
        "workers share. "
        f"Two workers take {seconds_of_two / seconds_of_one:.2f} of one's time."
    )
    common.write(
        options.out,
        "workers",
        title="Two workers",
        body=[about, common.table(["", "stages run", "seconds"], rows)],
        targets=[
            Target("metrics that differ from those of one worker", differing, 0),
            Target(
                "stages left to run after two workers",
                float(found["stages run after two"]),
                0,
            ),
        ],
        settings={"grid": _GRID, "seeds": SEEDS},
        measurements=found,
    )


class Clone:
    """A clone of the repository with its own cache, or a shared one.

    Args:
        path: The folder of the clone.
        cache: The folder of its DVC cache.
    """

    def __init__(self, path: Path, cache: Path) -> None:
        self.path = path
        self.log = path.with_suffix(".log")
        subprocess.run(["git", "clone", "-q", str(ROOT), str(path)], check=True)
        for words in (
            ("config", "--local", "core.analytics", "false"),
            ("cache", "dir", "--local", str(cache)),
        ):
            elapsed([self._dvc(*words)])

    def repro(self, seeds: Sequence[int]) -> subprocess.Popen[bytes]:
        """Starts to reproduce all runs of these seeds."""
        targets = [f"dvc.yaml:evaluate@{_GRID}{seed}" for seed in seeds]
        return self._dvc("repro", "--glob", *targets)

    def stages_run(self) -> int:
        """The number of stages that were run, rather than found done or cached."""
        return self.log.read_text(encoding="utf-8").count("Running stage")

    def metrics(self) -> dict[str, bytes]:
        """The metrics by run.

        Returns:
            The bytes of each file by its name.

        Raises:
            RuntimeError: If there are none to compare.
        """
        folder = self.path / "results" / "metrics"
        found = {
            path.name: path.read_bytes()
            for seed in SEEDS
            for path in folder.glob(f"{_GRID}{seed}.json")
        }
        if not found:
            raise RuntimeError(f"There are no metrics. Received: {_GRID}, {SEEDS}")
        return found

    def _dvc(self, *words: str) -> subprocess.Popen[bytes]:
        tools = Path(sys.executable).parent
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dvc", *words],
                cwd=self.path,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
            )


def elapsed(running: Sequence[subprocess.Popen[bytes]]) -> float:
    """Seconds until all have ended.

    Args:
        running: Processes that were just started.

    Returns:
        Wall time.

    Raises:
        RuntimeError: If one fails.
    """
    begin = time.perf_counter()
    codes = [process.wait() for process in running]
    if any(codes):
        raise RuntimeError(f"A worker failed. Received: exit statuses {codes}")
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
