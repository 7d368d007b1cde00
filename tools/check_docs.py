"""Checks the built documentation: ``python tools/check_docs.py docs/_build/html``.

Every public name, every public member and field of a class, and every parameter must be described:
by its own docstring that the reference shows, or by name in the docstring of its class. And what
readers search for must be found: among the headings, so that it comes first, or in the text.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.search.en import SearchEnglish

#: What users import from. Their ``__all__`` lists what is public.
MODULES = (
    "domain_events",
    "domain_events.opentelemetry",
    "domain_events.outbox",
    "domain_events.probes",
    "domain_events.prometheus",
    "domain_events.sqlalchemy",
    "domain_events.testing",
)


def described(html: Path) -> set[str]:
    """The names that the reference has an entry for."""
    data = (html / "objects.inv").read_bytes()
    body = zlib.decompress(data.split(b"\n", 4)[4]).decode()
    return {line.split(" ", 1)[0] for line in body.splitlines() if " py:" in line}


def missing(entries: set[str]) -> Iterator[str]:
    """What is public and not described, each with the reason."""
    ends = {entry.rpartition(".")[2] for entry in entries}
    members = {".".join(entry.split(".")[-2:]) for entry in entries}
    seen: set[int] = set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in _public(module):
            thing = getattr(module, name)
            if name in INTERNAL:
                continue
            if name not in ends:
                yield f"{module_name}.{name}: it is on no page"
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            if callable(thing):
                yield from _undescribed(f"{module_name}.{name}", thing)
            if inspect.isclass(thing):
                kinds = [base.__name__ for base in thing.__mro__]
                for member in _members(thing):
                    # What overrides a method is described where that is.
                    known = any(f"{kind}.{member}" in members for kind in kinds)
                    if not known and not _in_words(thing, member):
                        yield f"{module_name}.{name}.{member}: it is on no page"


def _public(module: ModuleType) -> list[str]:
    """``__all__``; of a room of one module, what it defines."""
    own = (
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    )
    return list(getattr(module, "__all__", None) or own)


#: Not for users, though their names have no underscore: others call them.
INTERNAL = {"collect", "connections", "describe"}


def _members(kind: type) -> Iterator[str]:
    """Public names that a class of this package defines, inherited ones too, errors' apart."""
    for base in kind.__mro__:
        if not base.__module__.startswith("domain_events"):
            continue
        if issubclass(base, BaseException) and base is not kind:
            continue  # they are described with the error that has them
        for name, value in vars(base).items():
            private = (
                name.startswith("_")
                or name in INTERNAL
                or ":meta private:" in (inspect.getdoc(value) or "")
            )
            if not private and (callable(value) or isinstance(value, property | classmethod)):
                yield name
        yield from (
            name
            for name in base.__annotations__
            if not name.startswith("_") and name not in INTERNAL
        )


def _in_words(kind: type, member: str) -> bool:
    pattern = rf":(?:param|ivar|cvar|var) {re.escape(member)}:"
    return any(re.search(pattern, base.__doc__ or "") for base in kind.__mro__)


def _undescribed(name: str, thing: Any) -> Iterator[str]:
    if not inspect.getdoc(thing):
        yield f"{name}: it has no docstring"


#: What readers type into the search, and the page that has it in a heading.
HEADINGS = {
    "alarms": "alarms",
    "asyncio": "frameworks",
    "celery": "frameworks",
    "docker": "health",
    "django": "django",
    "fastapi": "frameworks",
    "flask": "frameworks",
    "gunicorn": "frameworks",
    "health": "health",
    "kubernetes": "health",
    "options": "options",
    "outbox": "transactions",
    "prefetch": "running",
    "prometheus": "prometheus",
    "rename": "releases",
    "schema": "wire",
    "systemd": "health",
    "thresholds": "alarms",
    "upgrade": "upgrading",
    "versions": "typed",
}
#: The same, in the text.
TEXTS = {"dictconfig": "settings", "migrate": "migrating", "schema": "typed"}


def not_found(html: Path) -> Iterator[str]:
    """What a search does not find, as Sphinx's own does it."""
    text = (html / "searchindex.js").read_text()
    index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    language = SearchEnglish({})
    for words, kind in (HEADINGS, "titleterms"), (TEXTS, "terms"):
        for word, page in words.items():
            found = index[kind].get(language.stem(word), [])
            numbers = found if isinstance(found, list) else [found]
            if page not in [index["docnames"][number] for number in numbers]:
                where = "a heading" if kind == "titleterms" else "the text"
                yield f"{page}.rst: a search does not find {word!r} in {where}"


def main() -> int:
    """Print what is missing; returns the exit status."""
    html = Path(sys.argv[1])
    found = sorted({*missing(described(html)), *not_found(html)})
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
