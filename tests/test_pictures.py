"""The pictures of the documentation: up to date, and legible for everybody."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pictures
import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {path.name: path.read_text() for path in DOCS.glob("*.rst")}
# The room for a picture on a screen of 390 pixels: the page's margins take the rest.
ROOM = 350
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", sorted(pictures.PICTURES))
def test_picture_is_what_its_source_draws(name: str) -> None:
    """`python tools/pictures.py` changes nothing."""
    assert (pictures.FOLDER / name).read_text() == pictures.PICTURES[name]()


@pytest.mark.parametrize(
    "path",
    sorted(
        [
            *DOCS.glob("*.svg"),
            *DOCS.glob("pictures/*.svg"),
            *DOCS.glob("performance/headline-*.svg"),
        ]
    ),
    ids=lambda path: path.name,
)
def test_picture_can_be_read_by_anybody(path: Path) -> None:
    """On a narrow screen, light or dark, or by its text; and it stands on a page."""
    picture = ElementTree.parse(path).getroot()
    assert picture.findtext(f"{SVG}title")
    width = float(picture.attrib["viewBox"].split()[2])
    style = picture.findtext(f"{SVG}style") or ""
    sizes = [float(size) for size in re.findall(r"([0-9.]+)px", style)]
    assert min(sizes) * min(1.0, ROOM / width) >= 11
    assert "prefers-color-scheme: dark" in style
    name = path.relative_to(DOCS).as_posix()
    after = [page.partition(f".. image:: {name}\n")[2] for page in PAGES.values()]
    directives = [text for text in after if text]
    assert directives
    assert all(text.startswith("   :alt: ") for text in directives)


def test_no_picture_is_white_on_a_dark_page() -> None:
    pictures = [path for path in DOCS.rglob("*.svg") if "_build" not in path.parts]
    assert len(pictures) > 30
    for path in pictures:
        assert "prefers-color-scheme: dark" in path.read_text(), path.name
