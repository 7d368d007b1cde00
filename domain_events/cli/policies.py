"""Which policy is in force for a queue or an exchange. Pure.

Of all policies that match, only the one with the highest priority counts, and so with operator
policies; then both are merged (https://www.rabbitmq.com/docs/parameters#policies).
"""

from __future__ import annotations

import re
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
