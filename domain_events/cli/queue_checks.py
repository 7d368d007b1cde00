"""Checks of `doctor` on queues and bindings: each yields findings, or raises `Unknown`."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from domain_events.broker.rabbitmq import topology
from domain_events.broker.rabbitmq.administration import Comparison
from domain_events.cli.examination import Examination, Role, Subscribed, Unknown
from domain_events.cli.findings import Finding, Severity, listed, plainly
from domain_events.cli.policies import clear_command, in_force

# Milliseconds: RabbitMQ's own.
_CONSUMER_TIMEOUT = 1_800_000
_MOST_REPLICAS = 3
_MOST_HASHES = 2

_DELAYED = "arrives later than it should, after a stop, a crash or a deployment"
_IN_VAIN = "has no effect at best: these queues dead-letter by their own arguments, or not at all"
_TRANSIENT = "x-expires"

_ERROR, _WARNING, _NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

# What a key of a policy does to the queues of each role. docs/broker.rst has the same table.
_HARM: dict[str, dict[Role, tuple[Severity, str]]] = {
    "message-ttl": {
        Role.SUBSCRIBER: (_WARNING, "events that wait for longer become dead letters unhandled"),
        Role.DEAD_LETTERS: (_ERROR, "dead letters are deleted"),
        Role.UNDELIVERED: (_ERROR, "undelivered retries are deleted"),
        Role.DELAYS: (_WARNING, "retries arrive too early"),
    },
    "expires": {
        Role.SUBSCRIBER: (
            _ERROR,
            "the queue is deleted, with its events, while its service is down",
        ),
        Role.DEAD_LETTERS: (_ERROR, "the queue is deleted, with its dead letters"),
        Role.UNDELIVERED: (_ERROR, "the queue is deleted, with its retries"),
        Role.DELAYS: (_ERROR, "the queue is deleted, with its retries"),
    },
    "delivery-limit": {
        Role.SUBSCRIBER: (_WARNING, "events that are requeued that often become dead letters"),
        Role.DEAD_LETTERS: (_ERROR, "dead letters are deleted when they are looked at that often"),
        Role.UNDELIVERED: (_ERROR, "retries are deleted when they are looked at that often"),
        Role.DELAYS: (_WARNING, "retries are deleted when somebody looks at them that often"),
    },
    "delayed-retry-type": {
        Role.SUBSCRIBER: (_WARNING, f"what a subscriber hands back {_DELAYED}"),
        Role.DEAD_LETTERS: (
            _WARNING,
            "after a look at them, dead letters are invisible for a time",
        ),
        Role.UNDELIVERED: (_WARNING, "after a look at them, retries are invisible for a time"),
    },
    **{
        key: {
            Role.SUBSCRIBER: (_WARNING, "publishers get EventRejected when the queue is full"),
            Role.DEAD_LETTERS: (_ERROR, "the oldest dead letters are deleted when it is full"),
            Role.UNDELIVERED: (_ERROR, "the oldest retries are deleted when it is full"),
            Role.DELAYS: (_WARNING, "retries fail while the level is full"),
        }
        for key in ("max-length", "max-length-bytes")
    },
    **{
        key: dict.fromkeys(Role, (_NOTE, _IN_VAIN))
        for key in ("dead-letter-exchange", "dead-letter-routing-key", "dead-letter-strategy")
    },
}

# Where the queue has the argument itself, the lower of both values counts.
_LOWER = {"message-ttl": "x-message-ttl", "delivery-limit": "x-delivery-limit"}


def policies(examination: Examination) -> Iterator[Finding]:
    """No policy in force harms these queues."""
    harmed: dict[tuple[str, str, str], dict[str, tuple[Severity, str]]] = defaultdict(dict)
    clear: dict[tuple[str, str], str] = {}
    types = {
        name: (row.get("type", ""), row.get("arguments") or {})
        for name, row in examination.queues.items()
    }
    for name, role in examination.roles.items():
        if name in types:
            kind, arguments = types[name]
        elif _is_new(examination, name):
            kind, arguments = "quorum", topology.subscriber_queue(name).arguments
        else:
            continue
        if kind != "quorum" and role is Role.SUBSCRIBER and _TRANSIENT in arguments:
            continue  # a temporary one
        for policy in in_force(examination.policies, name, kind):
            for key, (severity, harm) in _harm(policy["definition"], role, arguments):
                value = f"{key} = {policy['definition'][key]}"
                what = "operator policy" if policy["operator"] else "policy"
                harmed[what, policy["name"], value][name] = (severity, harm)
                clear[what, policy["name"]] = clear_command(policy)
    for (what, policy_name, value), queues in harmed.items():
        order = list(Severity)
        names = sorted(queues, key=lambda name: order.index(queues[name][0]))
        worst, _ = queues[names[0]]
        harms = dict.fromkeys(queues[name][1] for name in names)
        yield Finding(
            worst,
            f"the {what} {policy_name!r} sets {value}",
            listed(names),
            "; ".join(harms) + ".",
            "Give it a pattern that does not match these queues, or an apply-to without them; or "
            f"remove it: {clear[what, policy_name]}",
            "broker.rst#policies",
        )


def _is_new(examination: Examination, name: str) -> bool:
    """Whether it is the queue of a subscriber that was named, and does not exist yet."""
    return any(
        each.queue.name == name and each.queue.counts_failures for each in examination.subscribed
    )


def _harm(
    definition: Mapping[str, Any], role: Role, arguments: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[Severity, str]]]:
    for key, value in definition.items():
        harm = _HARM.get(key, {}).get(role)
        if harm is None or (key == "delayed-retry-type" and value == "disabled"):
            continue
        own = arguments.get(_LOWER.get(key, ""))
        if own is not None and isinstance(value, int) and value >= own:
            continue
        overflow = arguments.get("x-overflow", definition.get("overflow"))
        if key.startswith("max-length") and overflow == "reject-publish" and harm[0] is _ERROR:
            harm = _WARNING, "dead letters and retries stay where they are when it is full"
        yield key, harm


def arguments(examination: Examination) -> Iterator[Finding]:
    """The queues and exchanges that exist have the arguments that this library declares."""
    declared: dict[str, topology.Declaration] = {}
    for each in examination.subscribed:
        if each.queue.exclusive:
            continue  # there is one while its process runs, and only for that
        declared |= {str(one): one for one in topology.needed(each.queue)}
    for exchange in examination.exchange_names:
        declared |= {str(one): one for one in topology.delays(exchange)}
    unknown: dict[str, list[str]] = defaultdict(list)
    for one in declared.values():
        if not isinstance(one, topology.Queue | topology.Exchange):
            continue
        what = "queue" if isinstance(one, topology.Queue) else "exchange"
        result, text = examination.administration.compare(one)
        if result is Comparison.DIFFERENT:
            yield Finding(
                _ERROR,
                f"the {what} {one.name!r} exists with other settings",
                one.name,
                f"A program that declares it gets a TopologyError. The broker answers: "
                f"{plainly(text)}.",
                "domain-events migrate, if domain-event-broker has declared it; else another name, "
                "or, once it is empty, delete it and start again.",
                "operations.rst#topologyerror-and-its-ways-out",
            )
        elif result is Comparison.UNKNOWN:
            unknown[text].append(one.name)
    if unknown:
        text, names = next(iter(unknown.items()))
        number = sum(map(len, unknown.values()))
        raise Unknown(
            f"{number} of them cannot be compared, such as {listed(names)}: {text}",
            "Run this with a user that may configure them.",
        )


def members(examination: Examination) -> Iterator[Finding]:
    """Quorum queues have as many members as they should, and a majority of them is up."""
    number = len(examination.read("nodes", lambda source: source.nodes()))
    few: dict[str, str] = {}
    minority: dict[str, str] = {}
    away: dict[str, str] = {}
    for row, _ in examination.rows():
        if row.get("type") != "quorum":
            continue
        name, of_queue = row["name"], row.get("members") or []
        online = row.get("online") or []
        counts = f"{name} ({len(online)} of {len(of_queue)} up)"
        if len(of_queue) < min(_MOST_REPLICAS, number):
            few[name] = f"{name} ({len(of_queue)})"
        if len(online) <= len(of_queue) // 2:
            minority[name] = counts
        elif len(online) < len(of_queue):
            away[name] = counts
    see = "broker.rst#cluster-three-nodes"
    if minority:
        yield Finding(
            _ERROR,
            f"{len(minority)} queues have no majority of their members",
            listed(minority.values()),
            "Nothing can be published to them, nor handled from them, until a majority is up.",
            "Start the nodes that are down.",
            see,
        )
    if away:
        yield Finding(
            _WARNING,
            f"{len(away)} queues lack a member",
            listed(away.values()),
            "One more failure may leave them without a majority.",
            "Start the nodes that are down; or shrink and grow, if one is gone for good.",
            see,
        )
    if few:
        yield Finding(
            _WARNING,
            f"{len(few)} queues have fewer members than the cluster of {number} nodes allows",
            listed(few.values()),
            "They were declared before the cluster had its nodes. If a node is lost, so are they.",
            "For each node without members: rabbitmq-queues grow NODE all",
            see,
        )


def binding_keys(examination: Examination) -> Iterator[Finding]:
    """No binding key has more than two ``#``."""
    found = {
        f"{each.queue.name}: {key}"
        for each in examination.subscribed
        for key in each.queue.binding_keys
        if _hashes(key) > _MOST_HASHES
    }
    unknown = None
    try:
        names, exchanges = {*examination.names}, {*examination.exchange_names}
        found |= {
            f"{each.destination}: {each.binding_key}"
            for each in examination.bindings
            if each.exchange in exchanges
            and each.destination in names
            and _hashes(each.binding_key) > _MOST_HASHES
        }
    except Unknown as error:
        unknown = error
    if found:
        yield Finding(
            _WARNING,
            f"binding keys have more than {_MOST_HASHES} '#'",
            listed(sorted(found)),
            "RabbitMQ 4.3.5 and later refuse them, and matching them takes very long.",
            "Leave out those that add nothing: '#.#' matches what '#' does.",
            "concepts.rst#terms",
        )
    if unknown is not None:
        raise unknown


def _hashes(key: str) -> int:
    return key.split(".").count("#")


def leftovers(examination: Examination) -> Iterator[Finding]:
    """Nothing of domain-event-broker is left behind."""
    unknown = None
    try:
        exchanges, queues = _leftovers(examination)
    except Unknown as error:
        unknown = error
        exchanges, queues = _leftovers_by_amqp(examination)
    accepted = {each.queue.name for each in examination.subscribed if each.queue.classic}
    see = "migrating.rst#queues"
    classic = {name for name in queues if not re.search(r"-delay-\d+\Z", name)}
    if own := classic - accepted:
        yield Finding(
            _WARNING,
            "classic queues of domain-event-broker",
            listed(sorted(own)),
            "They have no replicas, and lose dead letters when the broker crashes.",
            "domain-events migrate NAME",
            see,
        )
    if used := classic & accepted:
        yield Finding(
            _NOTE,
            "classic queues of domain-event-broker, used with queue_type='classic'",
            listed(sorted(used)),
            "They have no replicas.",
            "domain-events migrate NAME, when all its processes use this library.",
            see,
        )
    if waiting := queues - classic:
        yield Finding(
            _WARNING,
            "retries of domain-event-broker wait",
            listed(sorted(waiting)),
            "They return to the old queue, and nowhere if that is gone.",
            "Wait until these queues are empty; they are deleted 10 s after that.",
            see,
        )
    # Those of queues that are still in use belong to them.
    useless = {name for name in exchanges if name.rpartition("-")[0] not in classic}
    if useless:
        yield Finding(
            _NOTE,
            "exchanges of domain-event-broker are left",
            listed(sorted(useless)),
            "No queue needs them any more.",
            "Delete them, when no old process runs: rabbitmqctl eval, the management plugin, or an "
            "AMQP client.",
            see,
        )
    if unknown is not None:
        raise unknown


def _leftovers(examination: Examination) -> tuple[set[str], set[str]]:
    """The exchanges and the queues."""
    exchanges, queues = {*examination.exchanges}, examination.queues
    retrying = {name.removesuffix("-retry") for name in exchanges if name.endswith("-retry")}
    old = {
        name
        for name, row in queues.items()
        if row.get("type") != "quorum"
        and (
            (row.get("arguments") or {}).get("x-dead-letter-exchange") == f"{name}-dlx"
            or name in retrying
        )
    }
    waiting = {
        name
        for name, row in queues.items()
        if re.search(r"-delay-\d+\Z", name)
        and str((row.get("arguments") or {}).get("x-dead-letter-exchange")).endswith("-retry")
    }
    # Both, or it may be another program's.
    left = {
        name
        for name in exchanges
        if (name.endswith("-dlx") and f"{name.removesuffix('-dlx')}-dl" in queues)
        or (name.endswith("-retry") and f"{name.removesuffix('-retry')}-dlx" in exchanges)
        or (name.endswith("-retry") and name.removesuffix("-retry") in queues)
    }
    return left, old | waiting


def _leftovers_by_amqp(examination: Examination) -> tuple[set[str], set[str]]:
    """As far as names that are known show it."""
    exchanges, queues = set(), set()
    for name in examination.names:
        own = {
            each
            for each in (f"{name}-dlx", f"{name}-retry")
            if examination.administration.has_exchange(each)
        }
        exchanges |= own
        if own and examination.state(name) is not None:
            result, _ = examination.administration.compare(topology.subscriber_queue(name))
            if result is Comparison.DIFFERENT:
                queues.add(name)
    return exchanges, queues


def dead_letters(examination: Examination) -> Iterator[Finding]:
    """No dead letters wait, and no retries without a subscriber's queue."""
    for name, role in examination.roles.items():
        if role not in (Role.DEAD_LETTERS, Role.UNDELIVERED):
            continue
        state = examination.state(name)
        if state is None or not state.messages:
            continue
        if role is Role.UNDELIVERED:
            exchange = name.removesuffix(".undelivered")
            yield Finding(
                _WARNING,
                f"undelivered retries: {state.messages:,}",
                name,
                "Their subscriber's queue was gone when they were due.",
                f"domain-events undelivered list --exchange {exchange}, then return or discard.",
                "operations.rst#retries-without-a-subscriber",
            )
        else:
            subscriber = shlex.quote(name.removesuffix("-dl"))
            yield Finding(
                _WARNING,
                f"dead letters: {state.messages:,}",
                name,
                "Events that a handler has given up on: they wait for somebody, for ever.",
                f"domain-events dead-letters list {subscriber}, then replay or discard.",
                "operations.rst#dead-letters",
            )
    examination.names  # noqa: B018 - unknown subscribers have unknown dead letters


def consumers(examination: Examination) -> Iterator[Finding]:
    """Each subscriber's queue exists, and has a consumer."""
    for name in examination.names:
        state = examination.state(name)
        temporary = any(
            each.queue.name == name and each.queue.is_temporary for each in examination.subscribed
        )
        if state is None and not temporary:
            yield Finding(
                _WARNING,
                f"{name!r} has no queue",
                name,
                "No event is kept for it until it has registered.",
                "Start it once, or: domain-events topology apply package.module:subscriber",
                "operations.rst#monitoring",
            )
        elif state is not None and not state.consumers:
            waits = f"; events that wait: {state.messages:,}" if state.messages else ""
            yield Finding(
                _WARNING,
                f"nobody consumes from {name!r}{waits}",
                name,
                "Its events are kept, and fill the broker's disk.",
                "Start the subscriber; or delete the queue, if there is none any more.",
                "topology.rst#when-a-subscriber-is-retired",
            )


def consumer_timeout(examination: Examination) -> Iterator[Finding]:
    """Handlers end, and prefetched events are acked, within the broker's consumer_timeout."""
    limited = [each for each in examination.subscribed if each.handler_limit is not None]
    if not limited:
        return
    unknown = None
    own: dict[str, int] = {}
    overall = _CONSUMER_TIMEOUT
    try:
        value = examination.environment.get("consumer_timeout", _CONSUMER_TIMEOUT)
        overall = value if isinstance(value, int) else 0
    except Unknown as error:
        unknown = error
    try:
        own = {each.queue.name: _own_timeout(examination, each) for each in limited}
    except Unknown as error:
        unknown = error
    for each in limited:
        name, limit = each.queue.name, each.handler_limit or 0.0
        timeout = (own.get(name) or overall) / 1000
        if not timeout:
            continue  # "undefined": none
        known = "" if unknown is None or own.get(name) else " (the default; it cannot be read)"
        waits = limit * each.prefetch / each.workers
        do = "Raise consumer_timeout in rabbitmq.conf, or by policy for this queue (from 4.0 on)"
        see = "broker.rst#time-for-handlers-consumer-timeout"
        if limit >= timeout:
            yield Finding(
                _ERROR,
                f"a handler may take longer than the broker waits: {limit:g} s",
                name,
                f"After its consumer_timeout, {timeout:g} s{known}, the broker delivers the event "
                "again, while it is being handled, and so on without end.",
                f"{do}; or make the handler shorter.",
                see,
            )
        elif waits >= timeout:
            fitting = max(1, int(timeout * each.workers / limit / 2))
            yield Finding(
                _NOTE,
                f"prefetched events may wait for longer than the broker does: {waits:g} s",
                name,
                f"{each.prefetch} events, {limit:g} s each at worst, {each.workers} at a time; the "
                f"consumer_timeout is {timeout:g} s{known}. Then they are delivered again.",
                f"If handlers often take so long: prefetch_count={fitting}. Or: {do[0].lower()}"
                f"{do[1:]}.",
                "running.rst#prefetch",
            )
    if unknown is not None:
        raise Unknown(
            f"{unknown} (RabbitMQ's default, {_CONSUMER_TIMEOUT // 60_000} minutes, was assumed)",
            unknown.do,
        )


def _own_timeout(examination: Examination, subscribed: Subscribed) -> int:
    """By an argument or a policy of the queue; 0 if there is none."""
    name = subscribed.queue.name
    row = examination.queues.get(name, {})
    values = [(row.get("arguments") or {}).get("x-consumer-timeout")]
    values += [
        policy["definition"].get("consumer-timeout")
        for policy in in_force(examination.policies, name, row.get("type", "quorum"))
    ]
    return min((each for each in values if isinstance(each, int)), default=0)
