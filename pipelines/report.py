"""Stage 5: tables, figures, verdict and page of the grid.

Reports on the runs that the parameters name, whatever files there are. Runs without
results are listed as not run. Files in `results/`:

- `table.md`: the answer (the default against the best base of equal time), the
  targets, and mean and standard deviation by data set and method;
- `overview.md`: the answer alone, for the README;
- `report.html`: all of it, to look at, in one file;
- `runs.csv`: the numbers of every run;
- `code.json`: the files of the code that the results were made with, by commit;
- `summary.json`: the means and differences, as DVC metrics, without wall times;
- `figures/`: test error and NLL; `time-figures/`: what shows or depends on wall times.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import files, origins, repository
from pipelines.layout import Layout
from pipelines.params import Params, load, parser
from pipelines.reporting import (
    answer,
    answer_figure,
    bars,
    comparison,
    curves,
    frontier,
    page,
    texts,
)
from pipelines.reporting.results import (
    CALIBRATION,
    NOT_RUN,
    NUMBERS,
    PHASES,
    RUNS,
    Result,
    Results,
    read,
    stages,
)

__all__ = ["NOT_RUN", "cli", "main", "read", "runs", "summary", "write_texts"]

_SWITCH = ("epoch", "width", "rank", "n", "full", "complete")
_PARAMETERS = ("base", "total", "exploited")
_PROVENANCE = ("title", "partial", "source", "data_sha256", "device", "threads")


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
    record(results, layout)
    draw(results, layout)
    files.write_text(layout.csv, runs(results))
    files.write_json(layout.summary, summary(results))
    write_texts(params, layout)
    return layout.table


def write_texts(params: Params, layout: Layout) -> None:
    """Writes the tables and the page, with the figures that there are.

    They list what has changed in the code since the runs were made, so they are written
    again when the code changes.

    Args:
        params: The parameters.
        layout: Where the files are.
    """
    results = read(params, layout)
    files.write_text(layout.table, texts.full(results))
    files.write_text(layout.overview, texts.overview(results))
    files.write_text(layout.html, page.html(results, figures(results, layout)))


def record(results: Results, layout: Layout) -> None:
    """Notes which code the results were made with.

    Args:
        results: The results.
        layout: Where the files are.
    """
    params = results.params
    explored = [layout.timing(run.exploration) for run in results.by_run]
    tuning = set()
    for dataset, found in results.tuning.items():
        for augmentation, errors in found["augmentations"].items():
            for recipe in errors:
                run = params.tune.run(dataset, augmentation, recipe)
                path = layout.timing(run)
                if path.is_file():
                    tuning.add(files.read_json(path).get("commit"))
                else:
                    path = layout.tuning(dataset, augmentation, recipe)
                    tuning.add(repository.commit_of(path))
    frontiers = [
        layout.frontier(dataset, seed)
        for dataset in results.frontier
        for seed in params.grid.seeds
    ]
    made = {
        RUNS: {each.timing.get("commit") for each in results.by_run.values()},
        "base training": {
            files.read_json(each).get("commit") for each in explored if each.is_file()
        },
        "tuning": tuning,
        # By git: DVC hashes these files, so they do not name a commit.
        "frontier": set(map(repository.commit_of, frontiers)),
    }
    if any(made.values()):
        origins.record(layout.code, made, stages(params))


def draw(results: Results, layout: Layout) -> dict[str, Path]:
    """Draws all figures for which there are results.

    Args:
        results: The results.
        layout: Where the files are.

    Returns:
        What `figures` returns.
    """
    found = figures(results, layout)
    for dataset, augmentation in results.groups():
        if path := found.get(f"curves-{dataset}-{augmentation}"):
            curves.draw(path, results, dataset, augmentation)
    for dataset in results.frontier:
        frontier.draw(found[f"frontier-{dataset}"], results, dataset)
    for name, draw_one in (
        ("answer", answer_figure.draw),
        ("errors", bars.draw_errors),
        ("nll", bars.draw_nll),
        ("times", bars.draw_times),
    ):
        if path := found.get(name):
            draw_one(path, results)
    return found


def figures(results: Results, layout: Layout) -> dict[str, Path]:
    """The figures for which there are results.

    Args:
        results: The results.
        layout: Where the files are.

    Returns:
        The figures' paths by name: `answer`, `errors`, `nll`, `times`,
        `curves-DATASET-AUGMENTATION` and `frontier-DATASET`.
    """
    # Apart from the others, which DVC hashes: wall times differ in every run.
    with_times = layout.results / "time-figures"
    found = {}
    if any(results.finished(*group) for group in results.groups()):
        found["errors"] = layout.figure("errors")
    for dataset, augmentation in results.groups():
        finished = results.finished(dataset, augmentation)
        cell = (dataset, augmentation)
        if any(results.numbers(*cell, method, "nll") for method in finished):
            found["nll"] = layout.figure("nll")
        if any(results.numbers(*cell, method, "seconds") for method in finished):
            found["times"] = with_times / "times.png"
            name = f"{dataset}-{augmentation}"
            found[f"curves-{name}"] = with_times / f"{name}.png"
    if any(answer.known(results, mode) for mode in answer.modes(results)):
        found["answer"] = with_times / "answer.png"
    for dataset in results.frontier:
        found[f"frontier-{dataset}"] = with_times / f"frontier-{dataset}.png"
    return found


def runs(results: Results) -> str:
    """The numbers of every run of the grid as CSV.

    Args:
        results: The results.

    Returns:
        One line a run; empty cells were not run or not recorded.
    """
    text = io.StringIO()
    names = [
        *("dataset", "augmentation", "method", "seed"),
        *NUMBERS,
        *CALIBRATION,
        *("l2", "l2_loss", "l2_gap"),
        *(f"switch_{name}" for name in _SWITCH),
        *(f"parameters_{name}" for name in _PARAMETERS),
        "seconds",
        *(f"seconds_{name}" for name in PHASES),
        *("commit", "dirty"),
        *_PROVENANCE,
    ]
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    for run in results.params.grid.runs():
        row: dict[str, Any] = {
            "dataset": run.dataset,
            "augmentation": run.augmentation,
            "method": run.method,
            "seed": run.seed,
        }
        if run in results.by_run:
            row |= _numbers(results.by_run[run])
        writer.writerow({key: "" if row[key] is None else row[key] for key in row})
    return text.getvalue()


def _numbers(result: Result) -> dict[str, Any]:
    metrics, timing = result.metrics, result.timing
    switch, parameters = metrics.get("switch") or {}, metrics.get("parameters") or {}
    seconds = {"seconds": result.seconds}
    seconds |= {f"seconds_{name}": result.phase(name) for name in PHASES}
    return {
        **{name: metrics[name] for name in NUMBERS},
        **{name: metrics.get(name) for name in CALIBRATION},
        **{name: metrics.get(name) for name in ("l2", "l2_loss", "l2_gap")},
        **{f"switch_{name}": switch.get(name) for name in _SWITCH},
        **{f"parameters_{name}": parameters.get(name) for name in _PARAMETERS},
        **{k: v if v is None else round(v, 3) for k, v in seconds.items()},
        **{name: timing.get(name) for name in ("commit", "dirty")},
        **{name: result.provenance.get(name) for name in _PROVENANCE},
    }


def summary(results: Results) -> dict[str, Any]:
    """Means and differences, without what was not run and what wall times decide.

    Args:
        results: The results.

    Returns:
        By data set, augmentation and method.
    """
    found: dict[str, Any] = {}
    for dataset, augmentation in results.groups():
        for method, finished in results.finished(dataset, augmentation).items():
            by_augmentation = found.setdefault(dataset, {})
            by_augmentation.setdefault(augmentation, {})[method] = _means(
                results, finished
            )
    return found


def _means(results: Results, finished: Sequence[Result]) -> dict[str, Any]:
    run = finished[0].run
    cell = (run.dataset, run.augmentation, run.method)
    errors = comparison.spread([each.number("error_rate") for each in finished])
    means: dict[str, Any] = {
        "error_rate": errors.mean,
        "error_rate_std": errors.std,
        **{
            name: comparison.spread(values).mean
            for name in ("nll", "ece", "brier")
            if (values := results.numbers(*cell, name))
        },
        "train_loss": comparison.spread(
            [each.number("train_loss") for each in finished]
        ).mean,
        "gap": max(each.number("gap") for each in finished),
        "seeds": errors.n,
    }
    against = results.difference(*cell, results.reference)
    if against is not None and run.method != results.reference:
        means |= {
            "difference": against.value,
            "difference_standard_error": against.standard_error,
        }
    return means


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__).parse_args(arguments)
    main(params=load(line.params), root=line.root)


if __name__ == "__main__":
    cli()
