"""``domain-events topology``: what subscribers need on the broker, and whether it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from domain_events.cli import exits
from domain_events.cli.options import (
    broker_option,
    exchange_option,
    json_option,
    management_option,
    timeout_option,
)
from domain_events.cli.output import confirm, record, remark
from domain_events.errors import ConfigurationError, DomainEventsError
from domain_events.settings import ConnectionSettings
from domain_events.text import printable

if TYPE_CHECKING:
    from domain_events.broker.rabbitmq.topology import Binding
    from domain_events.cli.comparing import Broker, Finding
    from domain_events.cli.registrations import Found

_TARGETS = "package.module:subscriber..."


@click.group("topology")
def commands() -> None:
    """What subscribers need on the broker: show it, check it, apply it, prune the rest."""


@commands.command("show")
@click.argument("targets", metavar=_TARGETS, nargs=-1, required=True)
@json_option
@click.option(
    "--svg",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Draw a picture into this file; - for stdout.",
)
def show(targets: tuple[str, ...], as_json: bool, svg: Path | None) -> None:
    """Show who gets which events, from the registrations in the code.

    No broker is needed. Name the subscribers of several services to have them in one picture. A
    function without parameters that returns a subscriber can be named as well.
    """
    from domain_events.cli import survey  # noqa: PLC0415 - quick --help

    found = _read(targets).registrations
    if svg is not None:
        from domain_events.cli import drawing  # noqa: PLC0415

        picture = drawing.svg(found)
        if str(svg) == "-":
            click.echo(picture, nl=False)
            return
        try:
            svg.write_text(picture, encoding="utf-8")
        except OSError as error:
            raise click.FileError(str(svg), error.strerror or str(error)) from None
        remark(f"The picture is in {svg}.")
    elif as_json:
        for each in found:
            record(survey.as_json(each))
    else:
        for line in survey.as_text(found):
            click.echo(line)


@commands.command("check")
@click.argument("targets", metavar=_TARGETS, nargs=-1, required=True)
@click.option("--strict", is_flag=True, help="Fail on what cannot be found out, too.")
@broker_option
@management_option
@timeout_option
@json_option
def check(
    targets: tuple[str, ...],
    strict: bool,
    broker: ConnectionSettings,
    management: str | None,
    timeout: float,
    as_json: bool,
) -> int:
    """Compare what subscribers need with what is on the broker; changes nothing.

    Name all subscribers that share queues: keys that none of them lists are stale. Bindings are
    read from the management plugin or by rabbitmqctl; where neither is there, they are unknown.
    Comparing queues takes the permission to declare them.

    Ends with status 1 if anything is missing, stale or different, or, with --strict, unknown.
    """
    from domain_events.cli import comparing  # noqa: PLC0415

    found = _read(targets)
    with _connected(found, broker, management, timeout) as there:
        findings = there.compare(comparing.wanted(found.registrations))
        findings += there.stale(found.registrations)
    bad = [each for each in findings if each.status != comparing.OK]
    if as_json:
        for each in findings:
            record(each.as_json())
    else:
        for line in comparing.lines(bad):
            click.echo(line)
        for line in _ways_out({each.status for each in bad}, targets):
            click.echo(line)
        click.echo(f"{len(findings) - len(bad)} of {len(findings)} are as they should be.")
    fails = {each.status for each in bad} - (set() if strict else {comparing.UNKNOWN})
    return exits.FOUND if fails else exits.OK


@commands.command("apply")
@click.argument("targets", metavar=_TARGETS, nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Change nothing; show what would be done.")
@broker_option
@management_option
@timeout_option
@json_option
def apply(
    targets: tuple[str, ...],
    dry_run: bool,
    broker: ConnectionSettings,
    management: str | None,
    timeout: float,
    as_json: bool,
) -> int:
    """Declare all that subscribers need: exchanges, queues, bindings, delay levels.

    For an operator's user, so that services can run with one that may configure nothing:
    Subscriber(declare=False). It unbinds and deletes nothing, and may be repeated. The queue of a
    temporary subscriber is left to its processes.

    If anything exists with other arguments, nothing is declared, and it ends with status 8.
    """
    from domain_events.cli import comparing  # noqa: PLC0415

    found = _read(targets)
    declarations = comparing.wanted(found.registrations)
    with _connected(found, broker, management, timeout) as there:
        findings = there.compare(declarations)
        different = [each for each in findings if each.status == comparing.DIFFERENT]
        if not different and not dry_run:
            there.administration.declare(declarations)
    if different:
        for line in comparing.lines(different):
            click.echo(line)
        for line in _ways_out({comparing.DIFFERENT}, targets):
            click.echo(line)
        click.echo("Nothing was declared.")
        return exits.TOPOLOGY
    words = {
        comparing.MISSING: "to create" if dry_run else "created",
        comparing.OK: "existed",
        comparing.UNKNOWN: "to declare" if dry_run else "declared",
    }
    results = [replace(each, status=words[each.status]) for each in findings]
    if as_json:
        for each in results:
            record(each.as_json())
        return exits.OK
    shown = [each for each in results if each.status != "existed"]
    for line in comparing.lines(_without_reasons(shown)):
        click.echo(line)
    existed = len(results) - len(shown)
    done = f"{len(shown)} to declare" if dry_run else f"{len(shown)} declared"
    click.echo(f"{done}, {existed} existed.")
    return exits.OK


def _without_reasons(findings: list[Finding]) -> list[Finding]:
    """What was declared is there, however little was known before."""
    return [replace(each, detail="") for each in findings]


def _read(targets: tuple[str, ...]) -> Found:
    from domain_events.cli import registrations  # noqa: PLC0415

    found = registrations.read(targets)
    if not found.registrations:
        raise ConfigurationError(f"{', '.join(targets)}: nothing is registered.")
    return found


@contextmanager
def _connected(
    found: Found, broker: ConnectionSettings, management: str | None, timeout: float
) -> Iterator[Broker]:
    from domain_events.broker.rabbitmq.administration import Administration  # noqa: PLC0415
    from domain_events.cli.comparing import Broker  # noqa: PLC0415
    from domain_events.cli.management import find  # noqa: PLC0415

    with Administration(found.broker(broker), timeout=timeout) as administration:
        # There is a broker, before others are tried.
        cluster = administration.cluster
        source, reasons = find(management, administration.urls, cluster)
        yield Broker(administration, source, reasons)


def _ways_out(statuses: set[str], targets: tuple[str, ...]) -> Iterator[str]:
    """What to do, for each kind of finding."""
    from domain_events.cli import comparing  # noqa: PLC0415

    named = " ".join(targets)
    ways = {
        comparing.MISSING: f"Missing: run domain-events topology apply {named}",
        comparing.STALE: (
            "Stale: once no process lists the key any more, run "
            f"domain-events topology prune --stale {named}"
        ),
        comparing.DIFFERENT: (
            "Different: types and arguments cannot change. Use what exists (exchange_type=..., "
            "queue_type='classic'), register under another name, or delete it once it is empty."
        ),
        comparing.UNKNOWN: (
            "Unknown: give the management plugin's URL (--management), or a user with more "
            "permissions (--broker)."
        ),
    }
    if statuses & set(ways):
        yield ""
    for status, way in ways.items():
        if status in statuses:
            yield way
    if statuses:
        yield ""


@commands.command("prune")
@click.argument("targets", metavar="[package.module:subscriber ...]", nargs=-1)
@click.option(
    "--unbind",
    multiple=True,
    metavar="QUEUE=KEY",
    help="Unbind this key; may be given several times.",
)
@click.option(
    "--retire",
    multiple=True,
    metavar="NAME",
    help="Unbind and delete the queue of this subscriber, and that of its dead letters.",
)
@click.option("--stale", is_flag=True, help="Unbind all that `topology check` calls stale.")
@click.option("--dry-run", is_flag=True, help="Change nothing; show what would be done.")
@click.option("--yes", is_flag=True, help="Do it without a question.")
@exchange_option
@broker_option
@management_option
@timeout_option
def prune(
    targets: tuple[str, ...],
    unbind: tuple[str, ...],
    retire: tuple[str, ...],
    stale: bool,
    dry_run: bool,
    yes: bool,
    exchange: str,
    broker: ConnectionSettings,
    management: str | None,
    timeout: float,
) -> int:
    """Unbind stale keys, and delete the queues of subscribers that are gone.

    Only what is named is touched. With --stale, name all subscribers that share queues. Consumers
    that are connected are shown: a process of an older release may still need the key. A queue is
    deleted only if nobody consumes from it and it is empty, and so are its dead letters; before
    that, nothing is unbound.
    """
    from domain_events.broker.rabbitmq.topology import dead_letter_name  # noqa: PLC0415
    from domain_events.cli import pruning, registrations  # noqa: PLC0415

    if stale and not targets:
        raise click.UsageError("--stale: name the subscribers whose keys are not stale.")
    if targets and not stale:
        raise click.UsageError("Subscribers are named for --stale only; give that, too.")
    found = _read(targets) if targets else registrations.Found([], [])
    bindings = [_binding(exchange, each) for each in unbind]
    _check_unneeded(found, bindings, retire)
    with _connected(found, broker, management, timeout) as there:
        if stale:
            bindings += _stale(there, found)
        planned = pruning.plan(there, bindings, retire)
        for name in retire:
            if not {name, dead_letter_name(name)}.intersection(planned.retire):
                remark(f"Note: there is no queue {printable(name)} on the broker.")
        for line in planned.lines():
            click.echo(line)
        if not planned.unbind and not planned.retire:
            click.echo("There is nothing to prune.")
            return exits.OK
        if dry_run:
            return exits.OK
        confirm("Do this?", yes=yes)
        done = 0
        try:
            for line in pruning.carry_out(there, planned):
                click.echo(line)
                done += 1
        except DomainEventsError as error:
            if not done:
                raise
            remark(f"domain-events: stopped halfway. {printable(error, 2000)}")
            return exits.PARTIAL
    return exits.OK


def _binding(exchange: str, text: str) -> Binding:
    from domain_events.broker.rabbitmq.topology import Binding  # noqa: PLC0415

    queue, _, key = text.partition("=")
    if not queue or not key:
        raise click.UsageError(f"--unbind {text}: give QUEUE=KEY, such as mails=user.deleted.")
    return Binding(exchange, queue, key)


def _check_unneeded(found: Found, bindings: list[Binding], retire: tuple[str, ...]) -> None:
    """Refuse to take away what the subscribers need that are named beside it."""
    for each in found.registrations:
        for binding in bindings:
            name, key = binding.destination, binding.binding_key
            if name == each.name and key in each.queue.binding_keys:
                raise click.UsageError(f"--unbind: {name} lists {key}, so it is not stale.")
        if each.name in retire:
            raise click.UsageError(f"--retire: {each.name} is registered in {each.target}.")


def _stale(there: Broker, found: Found) -> list[Binding]:
    """The bindings that none of the subscribers needs."""
    if there.bindings is None:
        raise ConfigurationError(
            f"--stale: the broker's bindings cannot be read: {there.reasons}. Give the management "
            "plugin's URL (--management), or name the keys with --unbind."
        )
    return [each.what for each in there.stale(found.registrations)]  # type: ignore[misc]
