"""Writes docs/command-line.rst: ``python tools/command_line.py``.

It is the reference of ``domain-events`` and has what ``--help`` shows. tests/test_cli.py compares
the page with what this writes.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click

from domain_events import demo
from domain_events.cli.app import COMMANDS, app

PAGE = Path(__file__).parent.parent / "docs" / "command-line.rst"

_HEAD = """\
Command line
============

Every command and option of ``domain-events``, as ``--help`` shows them. :doc:`operating` has
examples, what each command prints, and the exit statuses. To install it:
``pip install 'domain-events-rabbitmq[cli]'``; ``python -m domain_events`` is the same.

.. Written by tools/command_line.py.
"""


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    root = click.Context(app, info_name="domain-events")
    for name in COMMANDS:
        command = app.get_command(root, name)
        assert command is not None
        parts += _sections(command, click.Context(command, info_name=name, parent=root))
    return "\n".join(parts)


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    """That of a command, and those of the commands in it."""
    path = context.command_path
    inner = len(path.split()) > 2
    title = path.removeprefix("domain-events ")
    yield f"\n{title}\n{('~' if inner else '-') * len(title)}\n"
    if isinstance(command, click.Group):
        yield from _text(command.help or "")
        for name, each in command.commands.items():
            yield from _sections(each, click.Context(each, info_name=name, parent=context))
        return
    if command.name == "demo":  # its parser is another one, since it also works without click
        yield f".. code-block:: text\n\n{textwrap.indent(_help_of_demo(), '    ')}"
        return
    usage = " ".join([path, *command.collect_usage_pieces(context)]).strip()
    yield f".. code-block:: text\n\n    {usage}\n"
    yield from _text(command.help or "")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        names, about = record or ("", "")
        if about and "--help" not in parameter.opts:
            text = textwrap.fill(_escaped(about), 112)
            yield f"``{names}``\n{textwrap.indent(text, '    ')}\n"


def _help_of_demo() -> str:
    """At a fixed width, whatever the terminal's is."""
    parser = demo.parser()
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, width=96)
    return parser.format_help()


def _text(help_: str) -> Iterator[str]:
    """A docstring's paragraphs; those that keep their lines are blocks."""
    for paragraph in textwrap.dedent(help_).strip().split("\n\n"):
        if paragraph.startswith("\b\n"):
            lines = textwrap.indent(textwrap.dedent(paragraph[2:]).rstrip(), "    ")
            yield f".. code-block:: text\n\n{lines}\n"
        elif paragraph:
            yield f"{textwrap.fill(_escaped(paragraph), 116)}\n"


def _escaped(text: str) -> str:
    """Text, with options and what is in quotes as code: elsewhere two hyphens become a dash."""
    parts = re.split(r"((?<![\w`-])(?:--[a-z][a-z-]*|(?:\w+=)?'[^' ]+'))", " ".join(text.split()))
    return "".join(
        f"``{part}``" if number % 2 else re.sub(r"([*`|\\]|_(?!\w))", r"\\\1", part)
        for number, part in enumerate(parts)
    )


if __name__ == "__main__":
    PAGE.write_text(page())
