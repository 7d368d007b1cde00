"""Puts what a program has measured into a page, below a line that marks the place."""

from __future__ import annotations

from pathlib import Path

#: Everything below this line of a page is written by the program that the page names.
MARK = ".. What follows is written by a program."


def write(path: Path, text: str) -> None:
    """Replace what is below the mark; a file without one consists of the text alone."""
    head, mark, _ = path.read_text().partition(f"{MARK}\n") if path.exists() else ("", "", "")
    path.write_text(f"{head}{mark}\n{text}" if mark else text)
