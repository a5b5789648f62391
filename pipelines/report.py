"""Stage 4: the table, the figures and the summary of the grid.

Goes over the runs that the parameters name, never over the files that happen to be
there. What was not run is called so. Files in `results/`:

- `table.md`: by data set and method, mean and standard deviation over the seeds;
- `runs.csv`: the numbers of every run;
- `figures/NAME.png`: loss and test error against epochs;
- `summary.json`: the means, as DVC metrics, without wall times.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pipelines import figure, files
from pipelines.layout import Layout
from pipelines.params import Params, Run, load, parser

NOT_RUN = "not run"
_METRICS = (
    "error_rate",
    "train_loss",
    "train_error_rate",
    "lower_bound",
    "gap",
)


@dataclass(frozen=True)
class Result:
    """What came out of one run.

    Attributes:
        run: Which run.
        metrics: What `evaluate` wrote.
        seconds: Wall time of `fit`, or None if it was not recorded.
    """

    run: Run
    metrics: Mapping[str, Any]
    seconds: float | None


@dataclass(frozen=True)
class Row:
    """A method on a data set, over all seeds.

    Attributes:
        n_seeds: Number of seeds.
        error_rate: Mean test error, in [0, 1].
        error_rate_std: Its sample standard deviation, or None for one seed.
        train_loss: Mean training loss.
        gap: Largest certified gap.
        seconds: Mean wall time of `fit`, or None if one was not recorded.
    """

    n_seeds: int
    error_rate: float
    error_rate_std: float | None
    train_loss: float
    gap: float
    seconds: float | None


def main(*, params: Params | None = None, root: Path = Path()) -> Path:
    """Reports on the grid.

    Args:
        params: The parameters; those of params.yaml by default.
        root: The folder of all files.

    Returns:
        The path of the table.
    """
    params, layout = params or load(), Layout(root)
    results = read(params, layout)
    files.write_text(layout.table, table(params, results))
    files.write_text(layout.csv, table_of_runs(params, results))
    files.write_json(layout.summary, summary(params, results))
    for dataset in params.grid.datasets:
        curves = {
            method: [result.metrics["curves"] for result in finished]
            for method in params.grid.methods
            if (finished := of_method(params, results, dataset, method))
        }
        if curves:
            with files.replacing(layout.figure(dataset)) as path:
                figure.draw(path, dataset, curves, params.label)
    return layout.table


def read(params: Params, layout: Layout) -> dict[Run, Result]:
    """Reads the metrics of all runs of the grid that there are.

    Args:
        params: The parameters.
        layout: Where the files are.

    Returns:
        The results by run. Runs without metrics are not in it.

    Raises:
        ValueError: If a run was made with synthetic data, or the runs of a data set
            with different data.
    """
    results: dict[Run, Result] = {}
    hashes: dict[str, set[str]] = {}
    for run in params.grid.runs():
        if not layout.metrics(run).is_file():
            continue
        metrics = files.read_json(
            layout.metrics(run), *_METRICS, "curves", "provenance"
        )
        provenance = metrics["provenance"]
        if provenance.get("synthetic", True):
            raise ValueError(
                "Synthetic data do not belong into results. Received: metrics of "
                f"{run.name} in {layout.metrics(run)}. Delete them, and prepare the "
                "data set anew."
            )
        hashes.setdefault(run.dataset, set()).add(str(provenance.get("data_sha256")))
        timing = layout.timing(run)
        seconds = (
            float(files.read_json(timing, "seconds")["seconds"])
            if timing.is_file()
            else None
        )
        results[run] = Result(run, metrics, seconds)
    for dataset, found in hashes.items():
        if len(found) > 1:
            raise ValueError(
                "Runs can be compared on the same data only. Received: runs on "
                f"{dataset} that were made with {len(found)} versions of it: "
                f"{', '.join(sorted(found))}. Run them again."
            )
    return results


def of_method(
    params: Params, results: Mapping[Run, Result], dataset: str, method: str
) -> list[Result]:
    """The results of a method for all seeds, or none if a seed was not run."""
    runs = [Run(dataset, method, seed) for seed in params.grid.seeds]
    return [results[run] for run in runs] if set(runs) <= set(results) else []


def row(results: Sequence[Result]) -> Row:
    """Means over the seeds of a method, of which there is at least one."""
    errors = [float(result.metrics["error_rate"]) for result in results]
    seconds = [result.seconds for result in results if result.seconds is not None]
    return Row(
        n_seeds=len(results),
        error_rate=fmean(errors),
        error_rate_std=stdev(errors) if len(errors) > 1 else None,
        train_loss=fmean(float(result.metrics["train_loss"]) for result in results),
        gap=max(float(result.metrics["gap"]) for result in results),
        seconds=fmean(seconds) if len(seconds) == len(results) else None,
    )


def table(params: Params, results: Mapping[Run, Result]) -> str:
    """The table in Markdown, one section for a data set."""
    lines: list[str] = []
    for dataset in params.grid.datasets:
        lines += [
            f"### {dataset}",
            "",
            "| method | test error, % | training loss | certified gap | seconds |",
            "|---|---|---|---|---|",
        ]
        for method in params.grid.methods:
            cells = _cells(params, results, dataset, method)
            lines.append(f"| {' | '.join([params.label(method), *cells])} |")
        lines += ["", _caption(params, results, dataset), ""]
    return "\n".join(lines)


def _cells(
    params: Params, results: Mapping[Run, Result], dataset: str, method: str
) -> list[str]:
    finished = of_method(params, results, dataset, method)
    if not finished:
        seeds = params.grid.seeds
        done = sum(Run(dataset, method, seed) in results for seed in seeds)
        part = f" ({done} of {len(seeds)} seeds)" if done else ""
        return [f"{NOT_RUN}{part}", *[NOT_RUN] * 3]
    means = row(finished)
    error = f"{100 * means.error_rate:.2f}"
    if means.error_rate_std is not None:
        error += f" ± {100 * means.error_rate_std:.2f}"
    seconds = "not recorded" if means.seconds is None else f"{means.seconds:.1f}"
    return [error, f"{means.train_loss:.1e}", f"{means.gap:.1e}", seconds]


def _caption(params: Params, results: Mapping[Run, Result], dataset: str) -> str:
    """What the numbers are, and with what they were measured."""
    n, train = params.prepare[dataset], params.train[dataset]
    seeds = len(params.grid.seeds)
    text = (
        f"{n.n_train} training and {n.n_test} test samples, {train.epochs} epochs, "
        f"{seeds} seed{'s' * (seeds > 1)}. Test error: mean ± standard deviation. "
        "Training loss: mean over the seeds, of the final model. Certified gap to the "
        "global minimum of the training loss: the largest one. Seconds: wall time of "
        "`fit`, with the test error after every epoch, mean over the seeds."
    )
    made_with = {
        _made_with(result.metrics["provenance"])
        for run, result in results.items()
        if run.dataset == dataset
    }
    return text + "".join(f" Measured with {each}." for each in sorted(made_with))


def _made_with(provenance: Mapping[str, Any]) -> str:
    versions: Mapping[str, Any] = provenance.get("versions", {})
    names = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"{names}, on {provenance.get('device')}, {provenance.get('threads')} threads"
    )


def table_of_runs(params: Params, results: Mapping[Run, Result]) -> str:
    """The numbers of every run of the grid as CSV; empty cells were not run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "method", "seed", *_METRICS, "seconds"])
    for run in params.grid.runs():
        result = results.get(run)
        numbers: list[Any] = [""] * (len(_METRICS) + 1)
        if result is not None:
            numbers = [result.metrics[name] for name in _METRICS]
            numbers.append("" if result.seconds is None else round(result.seconds, 3))
        writer.writerow([run.dataset, run.method, run.seed, *numbers])
    return text.getvalue()


def summary(params: Params, results: Mapping[Run, Result]) -> dict[str, Any]:
    """The means by data set and method, without what was not run and wall times."""
    found: dict[str, Any] = {}
    for dataset in params.grid.datasets:
        for method in params.grid.methods:
            finished = of_method(params, results, dataset, method)
            if not finished:
                continue
            means = row(finished)
            found.setdefault(dataset, {})[method] = {
                "error_rate": means.error_rate,
                "error_rate_std": means.error_rate_std,
                "train_loss": means.train_loss,
                "gap": means.gap,
                "seeds": means.n_seeds,
            }
    return found


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__).parse_args(arguments)
    main(params=load(line.params), root=line.root)


if __name__ == "__main__":
    cli()
