"""``domain-events doctor``: finds what is wrong with the broker; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import click

from domain_events.cli import exits, output
from domain_events.cli.findings import Severity, show_unknown, summary
from domain_events.cli.options import (
    broker_option,
    exchange_option,
    json_option,
    management_option,
    timeout_option,
)
from domain_events.names import check_name
from domain_events.settings import DEFAULT, ConnectionSettings


@click.command("doctor")
@click.argument("targets", metavar="[package.module:subscriber]...", nargs=-1)
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="A durable subscriber whose code is not here; may be repeated.",
)
@exchange_option
@broker_option
@management_option
@timeout_option
@json_option
def command(
    targets: Sequence[str],
    names: Sequence[str],
    exchange: str,
    broker: ConnectionSettings,
    management: str | None,
    timeout: float,
    as_json: bool,
) -> int:
    """Find what is wrong with the broker, for these subscribers or for all.

    Every finding has what to do about it. What cannot be read is named. Nothing is changed, no
    message is taken. The exit status is 1 if there is an error or a warning.
    """
    # Here, so that --help does not load pika.
    from domain_events.broker.rabbitmq.administration import Administration  # noqa: PLC0415
    from domain_events.cli.checks import CHECKS, examine  # noqa: PLC0415
    from domain_events.cli.examination import (  # noqa: PLC0415
        Examination,
        Subscribed,
        of_name,
        of_target,
    )
    from domain_events.cli.management import find_all  # noqa: PLC0415
    from domain_events.cli.offline import load_offline  # noqa: PLC0415

    exchange = check_name(exchange, "exchange")
    subscribed: list[Subscribed] = []
    for target in targets:
        subscriber = load_offline(target)
        subscribed += of_target(subscriber)
        if broker is DEFAULT:
            # All of them must be at one broker: that of the first.
            broker = subscriber.connections.urls or DEFAULT
    subscribed += [of_name(check_name(each, "subscriber", exchange), exchange) for each in names]

    def connect() -> Administration:
        return Administration(broker, timeout=timeout)

    with connect() as administration:
        sources, reasons = find_all(management, administration.urls, cluster=administration.cluster)
        examination = Examination(administration, connect, sources, reasons, exchange, subscribed)
        findings = []
        for each in examine(examination):
            findings.append(each)
            if as_json:
                output.record(each.as_json())
            elif each.severity is not Severity.UNKNOWN:
                each.show()
    if not as_json:
        show_unknown(each for each in findings if each.severity is Severity.UNKNOWN)
    (output.remark if as_json else click.echo)(summary(findings, len(CHECKS)))
    return exits.FOUND if any(each.is_bad for each in findings) else exits.OK
