"""A table: a title, a header, rows of text and a caption, and its Markdown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it is about.
        header: Names of the columns.
        rows: Cells, each row as long as the header.
        caption: What the numbers are.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def markdown(self) -> str:
        """The header and the rows in Markdown, without title and caption."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "\n".join(
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
            for cells in lines
        )
