"""HTML tables for reports in notebooks."""

from __future__ import annotations

from collections.abc import Mapping


def html_table(rows: Mapping[str, str]) -> str:
    """A table of names and values.

    Args:
        rows: The values by name, in HTML: escape text that may contain `<` or `&`.

    Returns:
        The `<table>` element.
    """
    cells = "".join(
        f"<tr><th style='text-align:left'>{name}</th><td>{value}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{cells}</table>"
