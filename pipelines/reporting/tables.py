"""The tables of the report, from the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pipelines.reporting import comparison
from pipelines.reporting.results import (
    BASES,
    NOT_RECORDED,
    NOT_RUN,
    RUNS,
    TIME_REFERENCE,
    Result,
    Results,
)
from pipelines.reporting.table import Table

if TYPE_CHECKING:
    from pipelines.reporting.comparison import Estimate

# A cell from the results of all seeds of a method, and all results.
_Cell = Callable[[list[Result], Results], str]


def methods(results: Results, dataset: str, augmentation: str) -> Table:
    """One row for every method of the grid.

    Args:
        results: The results.
        dataset: Name of the data set.
        augmentation: Name of the augmentation.

    Returns:
        The table. Where a seed is missing, the row says that it was not run.
    """
    rows = []
    for method in results.params.grid.methods:
        finished = results.of(dataset, augmentation, method)
        if finished:
            cells = [cell(finished, results) for cell in COLUMNS.values()]
        else:
            done = results.done(dataset, augmentation, method)
            seeds = len(results.params.grid.seeds)
            part = f" ({done} of {seeds} seeds)" if done else ""
            cells = [NOT_RUN + part, *[NOT_RUN] * (len(COLUMNS) - 1)]
        rows.append((results.params.label(method), *cells))
    return Table(
        results.heading(dataset, augmentation),
        ("method", *COLUMNS),
        tuple(rows),
        _caption(results, dataset, augmentation),
    )


def differences(results: Results, dataset: str, augmentation: str) -> Table:
    """Test error of every method less that of the base in each of its forms."""
    grid, params = results.params.grid, results.params
    references = [each for each in BASES if each in grid.methods]
    rows = []
    for method in grid.methods:
        cells = [
            "itself"
            if method == reference
            else _points(results.difference(dataset, augmentation, method, reference))
            for reference in references
        ]
        rows.append((params.label(method), *cells))
    return Table(
        f"{results.heading(dataset, augmentation)}: paired differences",
        ("method", *(f"less {params.label(each)}" for each in references)),
        tuple(rows),
        "Difference in test error, in points, paired by seed, with its 95 % confidence "
        "interval (Student's t) and its standard error. Below zero, the method is the "
        "better one.",
    )


def tuning(results: Results, dataset: str, augmentation: str) -> Table | None:
    """What each recipe reached on held-out training samples, or None if not run."""
    found = results.tuning.get(dataset, {})
    errors: Mapping[str, Mapping[str, float]] = found.get("augmentations", {}).get(
        augmentation, {}
    )
    if not errors:
        return None
    params = results.params
    names = list(dict.fromkeys(name for each in errors.values() for name in each))
    best = found.get("best", {}).get(augmentation)
    used = params.train[dataset].recipes.get(augmentation)
    rows = []
    for recipe, by_method in errors.items():
        notes = ["best"] * (recipe == best) + ["used"] * (recipe == used)
        cells = [
            f"{100 * by_method[name]:.2f}" if name in by_method else NOT_RUN
            for name in names
        ]
        rows.append((recipe.replace("_", " "), *cells, ", ".join(notes)))
    return Table(
        f"{results.heading(dataset, augmentation)}: recipes",
        ("recipe", *map(params.label, names), "choice"),
        tuple(rows),
        f"Error in % on a held-out share of {found.get('validation', 0):g} of the "
        f"training samples, seed {found.get('seed', 0)}. The best recipe is the best "
        "for the base; all methods use the same one.",
    )


def provenance(results: Results) -> Table:
    """With what data, code and machine the runs on each data set were made."""
    rows = []
    for dataset in results.params.grid.datasets:
        made = results.of_dataset(dataset)
        if not made:
            rows.append((dataset, *[NOT_RUN] * 6))
            continue
        first = made[0].provenance
        rows.append(
            (
                results.title(dataset),
                str(first.get("source", "not recorded")),
                "partial" if first.get("partial", True) else "full",
                str(first["data_sha256"])[:16],
                "; ".join(machines(made)),
                "; ".join(commits(made)),
                str(len(made)),
            )
        )
    return Table(
        "Provenance",
        ("data set", "source", "extent", "data sha256", "made with", "code", "runs"),
        tuple(rows),
    )


def machines(results: Iterable[Result]) -> list[str]:
    """Versions, device and threads, each combination once."""
    return sorted({_machine(each.provenance) for each in results})


def commits(results: Iterable[Result]) -> list[str]:
    """The commits that runs were made with, and whether the code was changed since."""
    found: dict[tuple[str, str], int] = {}
    for each in results:
        commit = each.timing.get("commit")
        dirty = each.timing.get("dirty")
        name = f"commit {commit[:10]}" if commit else "commit not recorded"
        state = " with uncommitted changes" if dirty else ""
        found[name, state] = found.get((name, state), 0) + 1
    runs = {key: f"{n} run{'s' * (n > 1)}" for key, n in found.items()}
    return [f"{name}{state} ({runs[name, state]})" for name, state in sorted(found)]


def code(results: Results) -> str:
    """All commits that something was made with, and what has changed since."""
    names, origins = commits(results.by_run.values()), results.origins
    if origins is None:
        return f"Code: {'; '.join(names)}."
    names += origins.commits(without=RUNS)
    return f"Code: {'; '.join(names)}. {origins.sentence}"


def dirty(results: Results) -> int:
    """Number of runs that were made with uncommitted changes."""
    return sum(bool(each.timing.get("dirty")) for each in results.by_run.values())


def _machine(made: Mapping[str, Any]) -> str:
    versions: Mapping[str, Any] = made.get("versions", {})
    names = [f"{name} {number}" for name, number in versions.items()]
    if made.get("python"):
        names.append(f"Python {made['python']}")
    return f"{', '.join(names)}, on {made.get('device')}, {made.get('threads')} threads"


def _points(found: Estimate | None) -> str:
    if found is None:
        return NOT_RUN
    return f"{comparison.interval(found)}, {comparison.error(found)}"


def _test_error(finished: list[Result], _: Results) -> str:
    found = comparison.spread([100 * each.number("error_rate") for each in finished])
    deviation = "" if found.std is None else f" ± {found.std:.2f}"
    return f"{found.mean:.2f}{deviation}"


def _difference(finished: list[Result], results: Results) -> str:
    run = finished[0].run
    if run.method == results.reference:
        return "itself"
    found = results.difference(
        run.dataset, run.augmentation, run.method, results.reference
    )
    return NOT_RUN if found is None else comparison.interval(found)


def _mean(name: str, form: str, scale: float = 1.0) -> _Cell:
    def cell(finished: list[Result], results: Results) -> str:
        run = finished[0].run
        values = results.numbers(run.dataset, run.augmentation, run.method, name)
        if not values:
            return NOT_RECORDED
        return form.format(scale * comparison.spread(values).mean)

    return cell


def _gap(finished: list[Result], _: Results) -> str:
    text = f"{max(each.number('gap') for each in finished):.1e}"
    regularised = [each.metrics.get("l2_gap") for each in finished]
    known = [float(gap) for gap in regularised if gap is not None]
    if len(known) == len(finished):
        text += f" (with L2: {max(known):.1e})"
    return text


def _rank(finished: list[Result], _: Results) -> str:
    switches = [found for each in finished if (found := each.metrics.get("switch"))]
    if not switches:
        return "no switch"
    checks = [switch for switch in switches if "rank" in switch]
    if not checks:
        return "not needed"
    # The worst of the seeds is reported.
    worst = min(checks, key=lambda check: check["rank"] / check["n"])
    if not all(check["full"] for check in checks):
        return f"{worst['rank']} of {worst['n']}"
    sampled = "" if all(check["complete"] for check in checks) else ", sampled rows"
    return f"full ({worst['n']}{sampled})"


def _time(finished: list[Result], results: Results) -> str:
    run = finished[0].run
    if run.method == TIME_REFERENCE:
        return "1"
    found = results.time_ratio(run.dataset, run.augmentation, run.method)
    if found is None:
        reference = results.of(run.dataset, run.augmentation, TIME_REFERENCE)
        return NOT_RECORDED if reference else NOT_RUN
    text = f"{found.value:.2f}"
    if found.low is not None and found.high is not None:
        text += f" [{found.low:.2f}, {found.high:.2f}]"
    return text


COLUMNS: dict[str, _Cell] = {
    "test error, %": _test_error,
    "NLL": _mean("nll", "{:#.3g}"),
    "ECE, %": _mean("ece", "{:.1f}", 100),
    "Brier": _mean("brier", "{:#.3g}"),
    "difference [95 % CI]": _difference,
    "training loss": _mean("train_loss", "{:.1e}"),
    "largest certified gap": _gap,
    "rank at the switch": _rank,
    "seconds": _mean("seconds", "{:.1f}"),
    "time / base": _time,
}


def _caption(results: Results, dataset: str, augmentation: str) -> str:
    """How the runs were made, and what the numbers are."""
    params = results.params
    n, train = params.prepare[dataset], params.train[dataset]
    recipe = params.recipe(dataset, augmentation)
    seeds = len(params.grid.seeds)
    return (
        f"{n.n_train:,} training and {n.n_test:,} test samples, {train.epochs} epochs, "
        f"{recipe.schedule} learning rate from {recipe.learning_rate:g}, {seeds} "
        f"seed{'s' * (seeds > 1)}. Means over the seeds, ± standard deviation. NLL, "
        "ECE and Brier: negative log-likelihood, calibration error over 15 bins, and "
        "squared error of the probabilities, summed over the classes, on test data. "
        f'Difference: test error less that of "{params.label(results.reference)}", in '
        "points, paired by seed. Training loss: of the final model. Certified gap: to "
        "the global minimum of the training loss, the largest over the seeds. Rank at "
        "the switch: of the head's features, against the samples they have to fit; the "
        "worst seed. Seconds: wall time. Time / base: wall time over that of "
        f'"{params.label(TIME_REFERENCE)}", paired by seed, geometric mean.'
    )
