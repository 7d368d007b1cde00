"""Writes files into the pages that show them: ``python tools/listings.py``.

A page on a repository does not render ``literalinclude``. So a page has the text of a file itself,
in the block after a comment that names it, relative to the page::

    .. listing: ../examples/tutorial/shop.py

    .. code-block:: python

A part of a file is ``, lines 3-4``; or it begins with a line, ``, from 'class Plan'``, or after
one, ``, after 'import Plan'``, and perhaps ends before one, ``, before 'if __name__'``.
tests/test_docs.py compares the pages with the files.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

PAGES = Path(__file__).parent.parent / "docs"

_LISTING = re.compile(
    r"^\.\. listing: (?P<path>[^,\n]+)"
    r"(?:, lines (?P<first>\d+)-(?P<last>\d+))?"
    r"(?:, from '(?P<start>[^'\n]+)'|, after '(?P<after>[^'\n]+)')?"
    r"(?:, before '(?P<before>[^'\n]+)')?\n\n"
    r"(?P<head>\.\. code-block:: \w+\n(?:   :[\w-]+:.*\n)*)\n"
    r"(?P<body>(?:    .*\n|\n)*)",
    re.MULTILINE,
)


def filled(page: Path) -> str:
    """The text of a page, with all that it lists as it is in the files.

    :raises ValueError: a comment names what is not there.
    """
    text = page.read_text()
    if len(_LISTING.findall(text)) != text.count(".. listing: "):
        raise ValueError(f"{page.name}: a listing needs an empty line and a code-block after it")
    return _LISTING.sub(lambda found: _block(page, found), text)


def _block(page: Path, found: re.Match[str]) -> str:
    comment = found[0].partition("\n")[0]
    body = textwrap.indent(_shown(page, found).strip("\n"), "    ")
    # As many empty lines after it as there were.
    kept = found["body"][len(found["body"].rstrip("\n")) :]
    return f"{comment}\n\n{found['head']}\n{body}" + (kept if found["body"].strip() else "\n\n")


def _shown(page: Path, found: re.Match[str]) -> str:
    path = page.parent / found["path"].strip()
    if not path.is_file():
        raise ValueError(f"{page.name}: there is no {found['path']}")
    lines = path.read_text().splitlines(keepends=True)
    if found["first"]:
        return "".join(lines[int(found["first"]) - 1 : int(found["last"])])
    if found["start"]:
        lines = lines[_line(path, lines, found["start"]) :]
    if found["after"]:
        lines = lines[_line(path, lines, found["after"]) + 1 :]
    if found["before"]:
        lines = lines[: _line(path, lines, found["before"])]
    return "".join(lines)


def _line(path: Path, lines: list[str], text: str) -> int:
    for number, line in enumerate(lines):
        if text in line:
            return number
    raise ValueError(f"{path.name}: no line has {text!r}")


def main() -> int:
    """Write the pages that differ; returns the exit status."""
    for page in sorted(PAGES.glob("*.rst")):
        try:
            text = filled(page)
        except ValueError as error:
            print(f"listings: {error}", file=sys.stderr)
            return 1
        if text != page.read_text():
            page.write_text(text)
            print(page.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
