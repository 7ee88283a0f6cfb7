"""Tables for a terminal: by rich where it is installed, as plain columns where it is not."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

FILE_WIDTH = 180  # in a file or a pipe, where no terminal says


def print_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str,
    caption: str = "",
    left: Collection[str] = (),
    width: int = FILE_WIDTH,
) -> None:
    """Print rows under headings; the columns named in `left` are aligned left, the others right.

    width: characters a line where there is no terminal to tell.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(headings, rows, title=title, caption=caption, left=left))
        return
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else width, markup=False, highlight=False).print(table)


def plain_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str,
    caption: str = "",
    left: Collection[str] = (),
) -> str:
    """The same as text without a package."""
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    lines = [f"{title} (rich is not installed: plain columns)"]
    for row in (headings, *rows):
        cells = [
            cell.ljust(width) if heading in left else cell.rjust(width)
            for heading, cell, width in zip(headings, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *([caption] if caption else [])])
