"""The report in Markdown: in full for results/, and an overview for the README."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.reporting import answer, tables, verdict
from pipelines.reporting.results import NOT_RUN, Results


def full(results: Results) -> str:
    """The answer, the targets and one table for every data set and augmentation.

    Args:
        results: The results.

    Returns:
        Markdown.
    """
    parts = [
        f"# Results of the profile {results.params.profile}",
        *answered(results, answer.modes(results)),
    ]
    if answer.modes(results):
        parts += ["## Targets", verdict.table(results).markdown()]
    for dataset, augmentation in results.groups():
        table = tables.methods(results, dataset, augmentation)
        parts += [f"## {table.title}", table.markdown(), table.caption]
        if recipes := tables.tuning(results, dataset, augmentation):
            parts += [
                f"Which recipe: {recipes.title}",
                recipes.markdown(),
                recipes.caption,
            ]
    parts += ["## Provenance", *_made(results)]
    return "\n\n".join(parts) + "\n"


def overview(results: Results) -> str:
    """The answer, and what it was made with.

    Args:
        results: The results.

    Returns:
        Markdown without headings, to be put into a page.
    """
    answers = answered(results, answer.modes(results), folded=True)
    return "\n\n".join([*answers, *_made(results)]) + "\n"


def answered(
    results: Results, modes: Sequence[str], *, folded: bool = False
) -> list[str]:
    """The answer: for each mode a sentence and a table, and what the columns are.

    Args:
        results: The results.
        modes: Names of the modes to report.
        folded: Whether the tables behind the first one are folded away, as HTML.

    Returns:
        Paragraphs in Markdown.
    """
    if not modes:
        return [answer.missing()]
    parts = []
    for mode in modes:
        parts.append(answer.sentence(results, mode))
        table = answer.table(results, mode)
        if folded and mode != modes[0]:
            parts += [f"<details>\n<summary>{_plain(table.title)}</summary>"]
            parts += [table.markdown(), "</details>"]
        else:
            parts.append(table.markdown())
    more = [answer.against_long(results)]
    return [*parts, *filter(None, more), answer.caption(results)]


def _plain(title: str) -> str:
    """A title for HTML, which does not know Markdown's ticks."""
    return title.replace("`", "")


def _made(results: Results) -> list[str]:
    """Paragraphs on data, machine and code."""
    found = list(results.by_run.values())
    if not found:
        return [f"Everything in this grid: {NOT_RUN}."]
    data = []
    for dataset in results.params.grid.datasets:
        made = results.of_dataset(dataset)
        if not made:
            continue
        first = made[0].provenance
        extent = "partial" if first.get("partial", True) else "full"
        data.append(
            f"{results.title(dataset)} ({extent}, from {first.get('source')}, sha256 "
            f"{str(first['data_sha256'])[:16]})"
        )
    texts = [
        f"Data: {'; '.join(data)}.",
        *(f"Measured with {each}." for each in tables.machines(found)),
        tables.code(results),
    ]
    if n := tables.dirty(results):
        texts.append(
            f"**{n} of {len(found)} runs were made with uncommitted changes.**"
        )
    return [" ".join(texts)]
