"""Which policy is in force for a queue or an exchange, and which one costs events. Pure.

Of all policies that match, only the one with the highest priority counts, and so with operator
policies; then both are merged (https://www.rabbitmq.com/docs/parameters#policies).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

Policy = Mapping[str, Any]

# A policy with one of these is not for quorum queues at all, whatever else it has
# (`unsupported_policies` in deps/rabbit/src/rabbit_quorum_queue.erl; tried on 3.10 and 4.3).
_NOT_FOR_QUORUM = {
    "queue-mode",
    "queue-master-locator",
    "ha-mode",
    "ha-params",
    "ha-sync-mode",
    "ha-promote-on-shutdown",
    "ha-promote-on-failure",
}


# Keys of a policy by which a queue loses, hides or refuses messages.
_LOSSY = {
    "message-ttl",
    "expires",
    "max-length",
    "max-length-bytes",
    "delivery-limit",
    # What is given back is in none of the numbers that AMQP shows until its delay is over (4.3).
    "delayed-retry-type",
}


def lossy(
    policies: Sequence[Policy], name: str, kind: str, arguments: Mapping[str, Any]
) -> dict[tuple[str, Any], Policy]:
    """What is in force for a queue that costs messages, key and value, and by which policy.

    :param arguments: the queue's own; the lower delivery limit counts.
    """
    found = {}
    for policy in in_force(policies, name, kind):
        for key, value in policy["definition"].items():
            if key not in _LOSSY or (key == "delayed-retry-type" and value == "disabled"):
                continue
            limit = arguments.get("x-delivery-limit")
            # A negative limit is none from 4.0 on, and on 3.10 the lowest.
            if key == "delivery-limit" and limit is not None and value >= limit:
                continue
            found[key, value] = policy
    return found


def clear_command(policy: Policy) -> str:
    """The command that removes it. rabbitmqctl looks in the vhost / unless another is named."""
    vhost = str(policy.get("vhost", "/"))
    where = [] if vhost == "/" else ["-p", vhost]
    command = "clear_operator_policy" if policy["operator"] else "clear_policy"
    return shlex.join(["rabbitmqctl", command, *where, str(policy["name"])])


def in_force(policies: Sequence[Policy], name: str, kind: str) -> list[Policy]:
    """The policy and the operator policy in force: none, one or both.

    :param kind: ``exchange``, or the queue's type.
    """
    matching = [each for each in policies if _matches(each, name, kind)]
    found = []
    for operator in (False, True):
        those = [each for each in matching if bool(each["operator"]) is operator]
        if those:
            found.append(max(those, key=lambda each: int(each["priority"])))
    return found


def _matches(policy: Policy, name: str, kind: str) -> bool:
    applies_to = policy["apply-to"]
    kinds = ("exchanges",) if kind == "exchange" else ("queues", f"{kind}_queues", f"{kind}s")
    if applies_to != "all" and applies_to not in kinds:
        return False
    if kind == "quorum" and not _NOT_FOR_QUORUM.isdisjoint(policy["definition"]):
        return False
    try:
        return re.search(policy["pattern"], name) is not None
    except re.error:
        # Python's expressions lack a few things that Erlang's have. Better one finding too many.
        return True
