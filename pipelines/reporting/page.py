"""The report as one page of HTML, with everything in it: styles, figures, numbers."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.reporting import answer, tables, verdict
from pipelines.reporting.results import AUGMENTATIONS, NOT_RUN, Results

if TYPE_CHECKING:
    from pipelines.reporting.table import Table

# The browser itself refuses whatever is not in the file.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# By the word that a cell begins with, its chip and class.
_CHIPS = {
    "met": ("✓ met", "met"),
    "missed": ("✗ missed", "missed"),
    answer.BETTER_WORD: (answer.BETTER_WORD, "met"),
    answer.NO_WORSE: (answer.NO_WORSE, "unknown"),
    answer.WORSE: (answer.WORSE, "missed"),
}

_READING = {
    "method": "What a row names. All methods share base model, recipe, batch size and, "
    "for a seed, the initial weights and shuffles.",
    "difference": "Seed by seed, so that what the seeds have in common drops out. An "
    "interval that contains zero means that the seeds do not tell the two apart.",
    "certified gap": "How far the final training loss is above its global minimum, at "
    "most: taken over the whole training set, in inference mode, in float64.",
    "rank at the switch": "The rank of the features that exploitation fits with. Where "
    "it is full, any labels can be fitted, so the minimum is the global one.",
    "partial data": "Numbers in brackets say that fewer samples were used than there "
    "are. Such results cannot be compared with published ones.",
    NOT_RUN: "There is no number, because nobody made the run. Nothing is filled in.",
}


def html(results: Results, figures: Mapping[str, Path]) -> str:
    """The page.

    Args:
        results: The results.
        figures: The paths of the figures, as `report.draw` names them.

    Returns:
        HTML that needs no other file.
    """
    sections = list(_sections(results, figures))
    links = "".join(
        f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in sections
    )
    bodies = "".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>{body}</section>'
        for key, title, body in sections
    )
    profile = escape(results.params.profile)
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>keras_dalign: results of the profile {profile}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
<header><div>
<h1>Two phases against one</h1>
<p>{_lead(results)}</p>
<nav aria-label="Contents"><ul>{links}</ul></nav>
</div></header>
<main>
{bodies}
</main>
<footer>keras_dalign, profile {profile}. Every number on this page was computed from
the files in <code>results/</code> by <code>pipelines/report.py</code>.</footer>
</body>
</html>
"""


def _lead(results: Results) -> str:
    grid = results.params.grid
    total, done = len(grid.runs()), len(results.by_run)
    ran = (
        f"All {total} runs of the grid were made."
        if done == total
        else f"{done} of the grid's {total} runs were made; "
        f"the others are called &ldquo;{NOT_RUN}&rdquo;."
    )
    return (
        f"Profile <b>{escape(results.params.profile)}</b>: "
        f"{_count(grid.datasets, 'data set')}, {_count(grid.methods, 'method')}, "
        f"{_count(grid.seeds, 'seed')}, "
        f"{' and '.join(escape(AUGMENTATIONS.get(a, a)) for a in grid.augmentations)}. "
        f"{ran}"
    )


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _sections(
    results: Results, figures: Mapping[str, Path]
) -> Iterable[tuple[str, str, str]]:
    """Key, title and HTML of each section."""
    yield "answer", "The answer", _answer(results, figures)
    for key, title, text in (
        (
            "errors",
            "Test error",
            "Test error, with standard deviations over the seeds.",
        ),
        ("nll", "NLL", "Negative log-likelihood of the test labels, likewise."),
        (
            "times",
            "Wall time",
            (
                "Wall time of explore, switch and exploit; beside each bar stands the "
                "ratio to the base."
            ),
        ),
    ):
        if key in figures:
            yield key, title, _figure(figures[key], text)
    for dataset in results.params.grid.datasets:
        body = _dataset(results, figures, dataset)
        yield f"data-{escape(dataset)}", results.title(dataset), body
    if answer.modes(results):
        body = _table(verdict.table(results), results, numbers=False)
        yield "targets", "Targets", body
    yield "provenance", "Provenance", _provenance(results)
    reading = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>"
        for key, text in _READING.items()
    )
    yield "reading", "How to read it", f"<dl>{reading}</dl>"


def _answer(results: Results, figures: Mapping[str, Path]) -> str:
    modes = answer.modes(results)
    more = [answer.against_long(results)]
    sentences = [answer.sentence(results, mode) for mode in modes]
    parts = [f"<p>{_marked(text)}</p>" for text in filter(None, sentences + more)]
    parts.append(_dirty(results))
    if "answer" in figures:
        text = (
            "The default and better against the best base of equal time in every cell: "
            "test error, NLL and wall time. The same numbers are in the tables below."
        )
        parts.append(_figure(figures["answer"], text))
    for mode in modes:
        table = answer.table(results, mode)
        parts += [f"<h3>{_marked(table.title)}</h3>", _table(table, results)]
    caption = answer.caption(results) if modes else answer.missing()
    return f'{"".join(parts)}<p class="caption">{_marked(caption)}</p>'


def _marked(text: str) -> str:
    """Text with `code` between backticks and *emphasis* between asterisks."""
    text = re.sub("`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)


def _dirty(results: Results) -> str:
    n = tables.dirty(results)
    if not n:
        return ""
    return (
        f'<p class="notice">{n} of {len(results.by_run)} runs were made with '
        "uncommitted changes: the commit named below is not quite their code.</p>"
    )


def _dataset(results: Results, figures: Mapping[str, Path], dataset: str) -> str:
    parts = []
    for augmentation in results.params.grid.augmentations:
        table = tables.methods(results, dataset, augmentation)
        title = results.heading(dataset, augmentation)
        parts += [f"<h3>{escape(title)}</h3>", _table(table, results)]
        if curves := figures.get(f"curves-{dataset}-{augmentation}"):
            parts += [
                _figure(
                    curves,
                    f"Learning curves on {title}: training loss and test error against "
                    "wall time. A thick segment is the solver; dots are final models.",
                )
            ]
        pairs = tables.differences(results, dataset, augmentation)
        parts += [
            (
                f"<details><summary>{escape(pairs.title)}</summary>"
                f"{_table(pairs, results)}</details>"
            )
        ]
        if recipes := tables.tuning(results, dataset, augmentation):
            parts += [
                (
                    f"<details><summary>{escape(recipes.title)}</summary>"
                    f"{_table(recipes, results)}</details>"
                )
            ]
    if frontier := figures.get(f"frontier-{dataset}"):
        parts += [
            f"<h3>{escape(results.title(dataset))}: how much to explore</h3>",
            _figure(
                frontier,
                "Test error, training loss and wall time against the share of epochs "
                "that is explored, with base training as dashed lines.",
            ),
        ]
    return "".join(parts)


def _provenance(results: Results) -> str:
    if not results.by_run:
        return f"<p>Everything in this grid: {NOT_RUN}.</p>"
    table = _table(tables.provenance(results), results, numbers=False)
    return f"{_dirty(results)}<p>{escape(tables.code(results))}</p>{table}"


def _figure(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(text)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )


def _table(table: Table, results: Results, *, numbers: bool = True) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    reference = results.params.label(results.reference)
    rows, before = "", None
    for name, *cells in table.rows:
        row = '<tr class="reference">' if name == reference else "<tr>"
        # Said once to the eye, each time to a screen reader.
        kind = ' class="again"' if name == before else ""
        row += f'<th scope="row"{kind}><span>{escape(name)}</span></th>'
        rows += f"{row}{''.join(map(_cell, cells))}</tr>"
        before = name
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    scroll = "scroll numbers" if numbers else "scroll"
    label = escape(table.title)
    return (
        f'<div class="{scroll}" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"{caption}"
    )


def _cell(text: str) -> str:
    for word, (chip, kind) in _CHIPS.items():
        if text.startswith((f"{word}:", f"{word} (")):
            rest = text.removeprefix(word).lstrip(": ")
            return (
                f'<td class="{kind}"><span class="chip">{chip}</span>'
                f"<small>{escape(rest)}</small></td>"
            )
    kind = ' class="none"' if text.startswith(NOT_RUN) else ""
    return f"<td{kind}>{escape(text)}</td>"
