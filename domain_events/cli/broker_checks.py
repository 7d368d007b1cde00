"""Checks of `doctor` on the broker as a whole: each yields findings, or raises `Unknown`."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

from domain_events.address import shown
from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.permissions import Permission, to_bind
from domain_events.cli.examination import Examination, Role, Subscribed, Unknown
from domain_events.cli.findings import Finding, Severity, listed, plainly
from domain_events.cli.policies import in_force

# Seconds for which a broker that has just started may keep retries back.
_STANDSTILL = 180.0
_OLDEST, _NEWEST = (3, 10), (4, 3)
# Releases that demand the permission `configure` for looking whether a queue exists.
_DEMANDING = ((4, 2, 6), (4, 3, 0))
# Seconds by which two clocks may differ.
_SKEW = 2.0


def version(examination: Examination) -> Iterator[Finding]:
    """The release of RabbitMQ is one that this library supports, without a known fault."""
    server = examination.administration.server
    product, text = str(server.get("product")), str(server.get("version"))
    found, see = examination.version, "guarantees.rst#what-the-broker-must-provide"
    if product != "RabbitMQ" or not found:
        yield Finding(
            Severity.WARNING,
            f"the broker is {product} {text}, not RabbitMQ",
            "",
            "This library relies on RabbitMQ's quorum queues; another broker may lose events.",
            "Use RabbitMQ 3.10 to 4.3.",
            see,
        )
    elif found[:2] < _OLDEST:
        yield Finding(
            Severity.ERROR,
            f"RabbitMQ {text} is too old",
            "",
            "Before 3.10, quorum queues have no TTL and lose dead letters on their way.",
            "Upgrade to 3.10 or later, 4.x if you can.",
            see,
        )
    elif found[:2] > _NEWEST:
        yield Finding(
            Severity.NOTE,
            f"RabbitMQ {text} is newer than the releases this library is tested with",
            "",
            "It probably works; nobody has tried.",
            "Look for a newer release of this library.",
            see,
        )
    if found in _DEMANDING:
        yield Finding(
            Severity.WARNING,
            f"RabbitMQ {text} demands the permission configure for looking",
            "",
            "Even to check whether a queue exists takes it, so programs with minimal permissions "
            "fail.",
            "Upgrade to 4.2.7 or 4.3.1, or later.",
            "topology.rst#permissions",
        )
    if _OLDEST <= found[:2] < (4, 0):
        yield Finding(
            Severity.NOTE,
            f"RabbitMQ {text} trusts the header x-death of publishers",
            "",
            "A program that may publish can stop all delays of a node with it, until a restart.",
            "Upgrade to 4.x, if not all programs that publish here are trusted.",
            "broker.rst#who-may-publish",
        )


def connection(examination: Examination) -> Iterator[Finding]:
    """A broker on another machine is reached over TLS, and not as ``guest``."""
    for url in examination.administration.urls:
        parts = urlsplit(url)
        if _is_local(parts.hostname or "localhost"):
            continue
        if parts.scheme.lower() == "amqp":
            yield Finding(
                Severity.WARNING,
                "the connection to another machine is not encrypted",
                shown(url),
                "Whoever can read the network traffic reads the password and all events.",
                "Enable a TLS listener on the broker, and use amqps:// and port 5671.",
                "operations.rst#the-form-of-a-url",
            )
        if unquote(parts.username or "guest") == "guest":
            yield Finding(
                Severity.WARNING,
                "the user guest is used from another machine",
                shown(url),
                "By default RabbitMQ refuses that, since everybody knows this user's password.",
                "Make a user for each program, with its own permissions, and delete guest.",
                "broker.rst#permissions",
            )


def _is_local(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def permissions(examination: Examination) -> Iterator[Finding]:
    """This user has the permissions for what the named subscribers do, and for publishing."""
    exchanges = examination.exchange_names
    needed = {
        f"publish to {each!r}": (
            [Permission("write", "exchange", each)],
            not examination.subscribed,
        )
        for each in exchanges
    }
    for each in examination.subscribed:
        needed |= _operations(each)
    refusals: dict[Permission, str] = {}
    for operation, (those, is_own) in needed.items():
        missing = []
        for permission in those:
            if permission not in refusals:
                refusals[permission] = _refusal(examination, permission)
            if refusals[permission]:
                missing.append(permission)
        if missing:
            yield Finding(
                Severity.ERROR if is_own else Severity.NOTE,
                f"this user may not {operation}",
                listed(map(str, missing)),
                f"The broker answers: {plainly(refusals[missing[0]])}. "
                + ("" if is_own else "That may be intended: not every program does this."),
                "Grant it with rabbitmqctl set_permissions, or run this with the user of the "
                "program in question.",
                "topology.rst#permissions",
            )


def _operations(subscribed: Subscribed) -> dict[str, tuple[list[Permission], bool]]:
    """By operation: what it takes, and whether the subscriber's own process does it."""
    queue = subscribed.queue
    name, exchange = queue.name, queue.exchange.name
    dead_letters = topology.dead_letter_name(name)
    write_default = Permission("write", "exchange", "")
    found = {
        f"subscribe as {name!r}": (
            [
                Permission("configure", "exchange", exchange),
                Permission("configure", "queue", name),
                Permission("read", "queue", name),
                to_bind(name, exchange),
            ],
            True,
        )
    }
    if queue.dead_letters:
        found[f"keep dead letters of {name!r}"] = (
            [Permission("configure", "queue", dead_letters), write_default],
            True,
        )
        found[f"replay dead letters of {name!r}"] = (
            [Permission("read", "queue", dead_letters), write_default],
            False,
        )
    if queue.delays:
        due, undelivered = topology.due_name(exchange), topology.undelivered_name(exchange)
        declared = [each for each in topology.delays(exchange) if isinstance(each, topology.Queue)]
        # Of 24 levels, the lowest and the highest stand for all.
        levels = [declared[1].name, declared[-1].name]
        found[f"retry as {name!r}"] = (
            [
                *(Permission("configure", "queue", each) for each in [undelivered, *levels]),
                *(
                    Permission("configure", "exchange", each)
                    for each in [undelivered, due, *levels]
                ),
                *(Permission("write", "exchange", each) for each in [due, *levels]),
                *(to_bind(each, each) for each in [undelivered, *levels]),
                to_bind(name, due),
            ],
            True,
        )
    if queue.must_exist:  # an operator declares it, and binds it
        found = {
            operation: (
                [each for each in needed if each.action != "configure" and not each.queue],
                is_own,
            )
            for operation, (needed, is_own) in found.items()
        }
    return found


def _refusal(examination: Examination, permission: Permission) -> str:
    if permission.action != "write" or permission.kind != "exchange":
        return examination.administration.refusal(permission)
    # During an alarm it blocks the connection.
    with examination.connect() as other:
        return other.refusal(permission)


def alarms(examination: Examination) -> Iterator[Finding]:
    """No node is short of memory or of disk space."""
    try:
        found = examination.read("alarms", lambda source: source.alarms())
    except Unknown:
        with examination.connect() as other:
            # Whether the user may publish or not.
            other.refusal(Permission("write", "exchange", examination.exchange))
            where = [(other.blocked, "the broker")] if other.blocked else []
    else:
        where = [(f"low on {each.resource}", each.node or "the broker") for each in found]
    for what, node in where:
        yield Finding(
            Severity.ERROR,
            f"an alarm is in effect: {what}",
            node,
            "The broker reads nothing from connections that publish, on all nodes: publishers wait "
            "until their deadline, retries and dead letters too.",
            "Free disk space or memory on that node: start subscribers that are down, replay or "
            "discard dead letters. Then set the watermarks so that this is noticed earlier.",
            "broker.rst#alarms-memory-and-disk",
        )


def deprecated(examination: Examination) -> Iterator[Finding]:
    """No deprecated feature of RabbitMQ is in use."""
    if examination.version and examination.version < (3, 13):
        return  # which has no such list
    found = examination.read("deprecated features", lambda source: source.deprecated_in_use())
    if found:
        yield Finding(
            Severity.WARNING,
            f"deprecated features are in use: {listed(found)}",
            "",
            "A later release of RabbitMQ refuses them: programs that use them fail after an "
            "upgrade. This library uses none.",
            "Find what uses them, in the broker's log, and change it before the next upgrade.",
            "broker.rst#policies",
        )


def feature_flags(examination: Examination) -> Iterator[Finding]:
    """All stable feature flags are enabled."""
    found = examination.read("feature flags", lambda source: source.disabled_feature_flags())
    # It can be enabled from 3.13 on, and need not be before 4.3.
    found = [each for each in found if each != "khepri_db"]
    if found:
        yield Finding(
            Severity.WARNING,
            f"feature flags are disabled: {listed(found)}",
            "",
            "A later release of RabbitMQ requires them, and does not start without; quorum queues "
            "may lack what they need.",
            "When all nodes have the same release: rabbitmqctl enable_feature_flag all",
            "guarantees.rst#what-the-broker-must-provide",
        )


def nodes(examination: Examination) -> Iterator[Finding]:
    """All nodes of the cluster are up, and there are not just two."""
    found = examination.read("nodes", lambda source: source.nodes())
    down = [each.name for each in found if not each.running]
    if down:
        yield Finding(
            Severity.ERROR,
            f"{len(down)} of {len(found)} nodes are down",
            listed(down),
            "Another failure may leave queues without a majority: publishers and subscribers wait.",
            "Start it, or remove it for good with rabbitmqctl forget_cluster_node.",
            "broker.rst#cluster-three-nodes",
        )
    if len(found) == 2:
        yield Finding(
            Severity.WARNING,
            "the cluster has two nodes",
            listed(each.name for each in found),
            "Queues need both of them: it is down more often than a single node.",
            "Add a third one.",
            "broker.rst#cluster-three-nodes",
        )


def restart(examination: Examination) -> Iterator[Finding]:
    """Retries do not stand still, as they may for three minutes after a node's start."""
    held = {}
    for row, role in examination.rows():
        if role is not Role.DELAYS:
            continue
        counts = [row.get(f"messages{each}") for each in ("", "_ready", "_unacknowledged")]
        if None in counts:
            raise Unknown(
                "the management plugin has not counted the messages yet", "Try again in 10 seconds."
            )
        total, ready, unacked = (int(each or 0) for each in counts)
        if total > ready + unacked:
            held[row["name"]] = total - ready - unacked
    found = examination.read("nodes", lambda source: source.nodes())
    recent = [each.name for each in found if (each.uptime or 10**9) < _STANDSTILL + 10]
    if held:
        why = (
            f"The delay has passed of {sum(held.values())} retries that are still there. "
            "Everything else in these levels may have to wait behind them. "
        )
        if recent:
            why += f"A node that has started dead-letters again after {_STANDSTILL:g} s."
        else:
            why += "That is normal for a moment; if it lasts, the next exchange or queue is away."
        yield Finding(
            Severity.WARNING,
            "retries are due, and not delivered",
            listed([*held, *recent]),
            why,
            "Look again. If it lasts: domain-events topology check, and the broker's log. Against "
            "the wait after a restart set dead_letter_worker_publisher_confirm_timeout to 3000 in "
            "advanced.config.",
            "broker.rst#retries-after-a-crash-dead-letter-worker-publisher-confirm-timeout",
        )
    elif recent:
        yield Finding(
            Severity.NOTE,
            "a node has started less than three minutes ago",
            listed(recent),
            "Retries that fell due meanwhile may be late by as much. None are seen to be.",
            "Wait.",
            "broker.rst#retries-after-a-crash-dead-letter-worker-publisher-confirm-timeout",
        )


def confirm_timeout(examination: Examination) -> Iterator[Finding]:
    """A node that starts does not keep retries back for three minutes."""
    key = "dead_letter_worker_publisher_confirm_timeout"
    milliseconds = examination.environment.get(key)
    if isinstance(milliseconds, int) and milliseconds > 30_000:
        yield Finding(
            Severity.NOTE,
            f"retries may stand still for {milliseconds / 1000:g} s after a crash of the broker",
            key,
            "What a starting broker could not dead-letter at once it tries again after this time, "
            "and everything else in the same delay level waits behind it.",
            f"Put [{{rabbit, [{{{key}, 3000}}]}}]. in advanced.config of each node.",
            "broker.rst#retries-after-a-crash-dead-letter-worker-publisher-confirm-timeout",
        )


def clock(examination: Examination) -> Iterator[Finding]:
    """This machine's clock and the broker's agree."""
    skew = examination.read("clock", lambda source: source.clock_skew())
    if abs(skew) > _SKEW:
        yield Finding(
            Severity.WARNING,
            f"the broker's clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}",
            "",
            "Timestamps of events, ages in metrics and --since compare both clocks.",
            "Synchronize both machines, with chrony or systemd-timesyncd.",
            "operations.rst#monitoring",
        )


def default_queue_type(examination: Examination) -> Iterator[Finding]:
    """Queues that are declared without a type become classic ones."""
    classic = [each.queue.name for each in examination.subscribed if each.queue.classic]
    if examination.subscribed and not classic:
        return  # their queues name their type
    found = examination.read("default queue type", lambda source: source.default_queue_type())
    if found not in ("", "classic"):
        yield Finding(
            Severity.WARNING if classic else Severity.NOTE,
            f"the vhost's default queue type is {found}",
            listed(classic),
            "A new queue of queue_type='classic', or of domain-event-broker, becomes a "
            f"{found} queue, and has RabbitMQ's own delivery limit: 20 from 4.0 on.",
            "Leave the default at classic while you migrate.",
            "broker.rst#default-queue-type-of-the-vhost",
        )


def alternate_exchange(examination: Examination) -> Iterator[Finding]:
    """No policy gives the exchange an alternate exchange."""
    for exchange in examination.exchange_names:
        for policy in in_force(examination.policies, exchange, "exchange"):
            if "alternate-exchange" in policy["definition"]:
                yield Finding(
                    Severity.NOTE,
                    f"the policy {policy['name']!r} sets alternate-exchange",
                    f"the exchange {exchange!r}",
                    "Events that no queue is bound for go there, and mandatory=True does not "
                    "detect them.",
                    "Nothing, if it is intended.",
                    "broker.rst#policies",
                )
