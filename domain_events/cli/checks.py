"""All checks of `doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from domain_events.cli import broker_checks, queue_checks
from domain_events.cli.examination import Examination, Unknown
from domain_events.cli.findings import Finding, Severity
from domain_events.errors import BrokerUnavailable, ConfigurationError, TopologyError

Check = Callable[[Examination], Iterator[Finding]]

#: The checks, in the order in which they are made, by the name that a finding has.
CHECKS: dict[str, Check] = {
    "version": broker_checks.version,
    "connection": broker_checks.connection,
    "alarms": broker_checks.alarms,
    "nodes": broker_checks.nodes,
    "clock": broker_checks.clock,
    "permissions": broker_checks.permissions,
    "feature-flags": broker_checks.feature_flags,
    "deprecated": broker_checks.deprecated,
    "queue-type": broker_checks.default_queue_type,
    "arguments": queue_checks.arguments,
    "policies": queue_checks.policies,
    "alternate-exchange": broker_checks.alternate_exchange,
    "consumer-timeout": queue_checks.consumer_timeout,
    "members": queue_checks.members,
    "binding-keys": queue_checks.binding_keys,
    "leftovers": queue_checks.leftovers,
    "restart": broker_checks.restart,
    "confirm-timeout": broker_checks.confirm_timeout,
    "consumers": queue_checks.consumers,
    "dead-letters": queue_checks.dead_letters,
}


def examine(examination: Examination) -> Iterator[Finding]:
    """What all checks find. One that cannot be made to its end is a finding, too."""
    for name, check in CHECKS.items():
        try:
            for each in check(examination):
                yield replace(each, check=name)
        except Unknown as unknown:
            yield _unknown(name, check, str(unknown), unknown.do)
        except (BrokerUnavailable, ConfigurationError, TopologyError) as error:
            yield _unknown(name, check, str(error), "Look at the other findings, and try again.")


def _unknown(name: str, check: Check, why: str, do: str) -> Finding:
    what = str(check.__doc__).rstrip(".")
    return Finding(Severity.UNKNOWN, what, "", why, do, "operating-doctor.rst#doctor", name)
