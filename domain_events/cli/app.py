"""The commands, and what they have in common: help, errors in one line, exit statuses, signals."""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, TextIO

import click
import click.shell_completion
from click.shell_completion import CompletionItem

from domain_events import __version__, demo
from domain_events.cli import exits
from domain_events.errors import DomainEventsError
from domain_events.text import printable

#: The commands in the order of the help: where each one is, and what it does.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": (
        "domain_events.cli.app:demonstrate",
        "See it work: publish, subscribe, retry, replay.",
    ),
    "run": ("domain_events.cli.run:command", "Run a subscriber, in one or several processes."),
    "publish": ("domain_events.cli.publish:command", "Publish events: one, or JSON lines."),
    "tail": ("domain_events.cli.tail:command", "Watch events as they are published."),
    "dead-letters": (
        "domain_events.cli.dead_letters:commands",
        "List, show, replay, discard, export dead letters.",
    ),
    "undelivered": (
        "domain_events.cli.undelivered:commands",
        "List, return, discard retries without a queue.",
    ),
    "topology": (
        "domain_events.cli.topology:commands",
        "Show, check, apply, prune queues and bindings.",
    ),
    "explain": ("domain_events.cli.explain:command", "Who gets an event, and why others do not."),
    "doctor": ("domain_events.cli.doctor:command", "Find what is wrong with the broker."),
    "migrate": ("domain_events.cli.migrate:command", "Move a classic queue to a quorum queue."),
    "rename": ("domain_events.cli.migrate:rename", "Give a subscriber another name."),
    "relay": ("domain_events.cli.outbox:relay", "Send the events of an outbox."),
    "outbox": ("domain_events.cli.outbox:commands", "List, retry, discard parked events."),
    "completion": ("domain_events.cli.app:completion", "Completion for bash, zsh or fish."),
}


class Commands(click.Group):
    """A group whose commands are imported when they are used, so that each one starts quickly."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _ReaderLeft from None  # else click ends with status 1, without a word

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # That of a group imports every command, for its help.
        found = [
            CompletionItem(name, help=text)
            for name, (_, text) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=(
        "The broker is the one in the environment (DOMAIN_EVENTS_URL, AMQP_URL, RABBITMQ_URL, "
        "CLOUDAMQP_URL), else on localhost; --broker URL names another one."
    ),
)
@click.version_option(__version__, prog_name="domain-events", message="%(prog)s %(version)s")
@click.pass_context
def app(ctx: click.Context) -> None:
    """Domain events over RabbitMQ: run subscribers, look at them, mend them."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False  # click itself does not honour it


@click.command(
    "demo",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.pass_context
def demonstrate(ctx: click.Context) -> int:
    """See it work."""
    # It has a parser of its own, since it also works without click.
    return demo.main(ctx.args)


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion for SHELL, to be sourced by it.

    \b
    For bash: eval "$(domain-events completion bash)"
    """
    kind = click.shell_completion.get_completion_class(shell)
    assert kind is not None  # those of the choice
    click.echo(kind(app, {}, "domain-events", "_DOMAIN_EVENTS_COMPLETE").source())


class _ReaderLeft(Exception):
    """Nobody reads the output any more, as in ``domain-events tail | head``."""


class Terminated(BaseException):
    """SIGTERM arrived: end as on Ctrl-C, so that what is held is given back."""


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns its exit status.

    A command returns its own exit status, or None, which is 0.
    """
    status = _run(arguments)
    for stream in (sys.stdout, sys.stderr):
        # That of a terminal that was closed meanwhile: Python would try it again at its end, and
        # make the status 120.
        if not _is_written(stream):
            discard(stream)
    return status


def _run(arguments: Sequence[str]) -> int:
    try:
        logging.basicConfig(format="domain-events: %(message)s", level=logging.WARNING)
        sys.unraisablehook = _raise_again
        signal.signal(signal.SIGTERM, _terminate)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # what cannot be encoded is escaped
                stream.reconfigure(errors="backslashreplace")
        status: Any = app.main(list(arguments), "domain-events", standalone_mode=False)
        sys.stdout.flush()
    except DomainEventsError as error:
        return _fail(f"{printable(error, 2000)}", exits.of(error))
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        see = f" (see {context.command_path} --help)" if context is not None else ""
        text = _PASSWORD.sub(r"\1...@", error.format_message())
        status = exits.FILE if isinstance(error, click.FileError) else error.exit_code
        return _fail(f"{text}{see}", status)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", exits.INTERRUPTED)
    except Terminated:
        return _fail("terminated", exits.TERMINATED)
    except (_ReaderLeft, BrokenPipeError):
        discard(sys.stdout)
        return exits.OK
    except OSError as error:
        where = f"{printable(error.filename)}: " if error.filename else ""
        if not where and not _is_written(sys.stdout):
            where = "the standard output: "
        discard(sys.stdout)  # it may be full
        return _fail(f"{where}{printable(error.strerror or error)}", exits.FILE)
    except Exception:
        logging.getLogger("domain_events.cli").exception(
            "an error of domain-events itself; please report it"
        )
        return exits.INTERNAL
    return exits.OK if status is None else int(status)


# Of a URL that was given in a wrong place.
_PASSWORD = re.compile(r"(://[^:/?#@\s]*:)[^@\s]*@")


def _fail(text: str, status: int) -> int:
    click.echo(f"domain-events: {text}", err=True)
    return status


def _is_written(stream: TextIO) -> bool:
    """Whether it takes what waits to be written to it."""
    try:
        stream.flush()
    except OSError:
        return False
    return True


def discard(stream: TextIO) -> None:
    """Write nothing to it any more, also not at the end of the interpreter."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _terminate(_number: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
    raise Terminated


def _raise_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Send a signal again whose exception Python has ignored.

    A signal handler runs between any two instructions of the main thread, also in a finalizer or a
    callback of a weak reference, where exceptions end.
    """
    if issubclass(unraisable.exc_type, Terminated):
        signal.signal(signal.SIGTERM, _terminate)
        number = signal.SIGTERM
    elif issubclass(unraisable.exc_type, KeyboardInterrupt):
        number = signal.SIGINT
    else:
        sys.__unraisablehook__(unraisable)
        return
    # Not at once, or it would be ignored in the same place.
    again = threading.Timer(0.05, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
