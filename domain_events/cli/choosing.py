"""The options with which commands choose among dead letters, and walks over what was chosen."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeVar

import click

from domain_events.checks import shown
from domain_events.cli import exits, output
from domain_events.cli.options import Number
from domain_events.cli.selection import Letter, Selection, Where, failed_at, parse_time
from domain_events.dead_letters import DeadLetter
from domain_events.undelivered import Undelivered, UndeliveredEvent
from domain_events.walks import Walks

Command = TypeVar("Command", bound=Callable[..., Any])
AnyLetter = TypeVar("AnyLetter", DeadLetter, UndeliveredEvent)

# So many are kept in memory, with their bodies, to begin with the newest one.
_MOST_NEWEST = 1000


@dataclass(frozen=True)
class Choice:
    """What the options choose.

    :ivar limit: at most so many of each subscriber.
    :ivar newest: begin with the newest one.
    """

    selection: Selection
    limit: int | None = None
    newest: bool = False

    def less(self, number: int) -> Choice:
        """What is left of it, after so many."""
        return self if self.limit is None else replace(self, limit=self.limit - number)

    def of(self, letters: Iterable[AnyLetter]) -> Iterator[AnyLetter]:
        """Those that are chosen, in their order."""
        chosen = filter(self.selection, letters)
        if self.newest:
            yield from reversed(deque(chosen, maxlen=self.limit))
            return
        left = self.limit
        for letter in chosen if left != 0 else ():
            yield letter
            if left is not None:
                left -= 1
                if not left:
                    return


def choice_options(
    *, errors: bool = True, limit: int | None = None
) -> Callable[[Command], Command]:
    """The options that choose; the command gets a ``choice``.

    :param errors: whether what is chosen from has errors.
    :param limit: the default of ``--limit``.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def call(
            *args: Any,
            routing_key: str | None,
            ids: Sequence[str],
            where: Sequence[str],
            limit: int | None,
            newest: bool,
            error_type: str | None = None,
            since: str | None = None,
            until: str | None = None,
            subscriber: str | None = None,
            **kwargs: Any,
        ) -> Any:
            if newest and (limit is None or limit > _MOST_NEWEST):
                raise click.UsageError(
                    f"--newest needs a --limit, at most {_MOST_NEWEST:,}: they are kept in memory."
                )
            selection = Selection(
                error_type,
                routing_key,
                parse_time(since) if since else None,
                parse_time(until) if until else None,
                frozenset(ids),
                tuple(map(Where.parse, where)),
                subscriber,
            )
            return command(*args, choice=Choice(selection, limit, newest), **kwargs)

        options = [
            click.option("--routing-key", metavar="KEY", help="A binding key, such as 'user.*'."),
            click.option("--id", "ids", metavar="ID", multiple=True, help="The event's id."),
            click.option(
                "--where",
                metavar="PATH=VALUE",
                multiple=True,
                help="A value in the data, such as user.country=DE; also !=, <, <=, >, >=.",
            ),
        ]
        if errors:
            options += [
                click.option(
                    "--error-type",
                    metavar="PATTERN",
                    help="The exception's class, such as ValueError or 'shop.*'.",
                ),
                click.option(
                    "--since", metavar="TIME", help="Failed since then: 2026-11-26T10:00, or 2h."
                ),
                click.option("--until", metavar="TIME", help="Failed until then."),
            ]
        else:
            options.append(
                click.option("--subscriber", metavar="PATTERN", help="The subscriber's name.")
            )
        options += [
            click.option(
                "--limit",
                type=click.IntRange(min=1),
                metavar="N",
                default=limit,
                show_default=limit is not None,
                help="At most so many (of each subscriber).",
            ),
            click.option("--newest", is_flag=True, help="The newest first; needs a --limit."),
        ]
        for option in reversed(options):
            call = option(call)
        return call  # type: ignore[return-value]

    return decorate


def acting_options(command: Command) -> Command:
    """``--dry-run`` and ``--yes``, for commands that change something."""
    command = click.option("--yes", is_flag=True, help="Do not ask.")(command)
    return click.option("--dry-run", is_flag=True, help="Only show which ones.")(command)


def rate_option(command: Command) -> Command:
    """``--rate``, for commands that hand events to a subscriber."""
    return click.option(
        "--rate",
        type=Number(min=0, min_open=True),
        metavar="N",
        help="At most so many events each second.",
    )(command)


def walked(walks: Walks, letters: Iterable[AnyLetter], what: str) -> Iterator[AnyLetter]:
    """The letters of a walk, with a bar on a terminal that shows how far it is."""
    total = walks.count() if sys.stderr.isatty() else None
    return output.tracked(letters, what, total)


def approved(
    choice: Choice,
    walks: Walks,
    letters: Callable[[], Iterator[AnyLetter]],
    question: str,
    what: str,
) -> Choice | None:
    """The choice, reduced to what the user was shown and has agreed to; None if there is nothing.

    Nothing is held while the answer is awaited.
    """
    if choice.newest:
        ids = [letter.id for letter in choice.of(letters())]
        number = len(ids)
    else:
        number = sum(1 for _ in choice.of(letters()))
    walks.release()
    if not number:
        output.remark(f"Nothing matches among {what}.")
        return None
    output.confirm(f"{question} {number:,} of {what}?", yes=False)
    if choice.newest:
        # Those that have arrived meanwhile would be the newest.
        chosen = frozenset(each for each in ids if each is not None)
        return Choice(replace(choice.selection, ids=chosen), number, newest=True)
    return Choice(choice.selection, number)


def status_of(choice: Choice, number: int) -> int:
    """The exit status of a command that has found so many: not all whose ids were named?"""
    named = len(choice.selection.ids)
    if number >= min(named, choice.limit or named):
        return exits.OK
    output.remark(f"Not there: {named - number:,} of the {named:,} that --id names.")
    return exits.PARTIAL


COLUMNS = ("FAILED AT", "SUBSCRIBER", "ROUTING KEY", "ERROR", "MESSAGE", "RETRIES", "REPLAYS", "ID")


def row(letter: DeadLetter, name: str) -> tuple[object, ...]:
    """What a table shows of a dead letter, under `COLUMNS`."""
    return (
        when(letter),
        name,
        letter.routing_key,
        letter.error_type,
        None if letter.error_message is None else letter.error_message.partition("\n")[0][:200],
        letter.retries,
        letter.replays,
        letter.id,
    )


def when(letter: Letter) -> str | None:
    """When it failed, in local time."""
    at = failed_at(letter)
    return None if at is None else at.astimezone().isoformat(" ", "seconds")


def place_of(undelivered: Undelivered) -> str:
    """For questions and remarks."""
    return f"the undelivered retries of {shown(undelivered.exchange)}"
