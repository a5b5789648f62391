"""The report in Markdown: in full for results/, and an overview for the README."""

from __future__ import annotations

from pipelines.reporting import tables
from pipelines.reporting.results import AUGMENTATIONS, Results
from pipelines.reporting.verdict import NOT_RUN, judged, sentences

# Beyond so many, the tables of the overview are folded.
_OPEN = 2


def full(results: Results) -> str:
    """The verdict and one table for every data set and augmentation.

    Args:
        results: The results.

    Returns:
        Markdown.
    """
    parts = [f"# Results of the profile {results.params.profile}"]
    if judged(results):
        parts += [
            "## Verdict",
            tables.yardstick(results),
            "\n".join(sentences(results)),
        ]
        for augmentation in results.params.grid.augmentations:
            table = tables.targets(results, augmentation)
            words = AUGMENTATIONS.get(augmentation, augmentation)
            parts += [f"### {_capital(words)}", table.markdown()]
    for dataset, augmentation in results.groups():
        table = tables.methods(results, dataset, augmentation, tables.FULL)
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
    """The verdict at a glance and narrow tables, folded where there are many.

    Args:
        results: The results.

    Returns:
        Markdown without headings, to be put into a page.
    """
    parts = []
    groups = results.groups()
    if judged(results):
        # Of many data sets the sentences are many: they are in the full text.
        short = len(groups) > _OPEN
        parts += [
            tables.glance(results).markdown()
            if short
            else "\n".join(sentences(results))
        ]
        parts += [tables.yardstick(results)]
    for dataset, augmentation in groups:
        table = tables.methods(results, dataset, augmentation, tables.NARROW)
        if len(groups) > _OPEN:
            # A blank line on either side, or GitHub takes the table for HTML.
            parts += [
                f"<details>\n<summary>{table.title}</summary>",
                table.markdown(),
                table.caption,
                "</details>",
            ]
        else:
            parts += [f"**{table.title}**", table.markdown(), table.caption]
    return "\n\n".join([*parts, *_made(results)]) + "\n"


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


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
