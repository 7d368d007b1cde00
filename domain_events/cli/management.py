"""What AMQP does not show: bindings, policies, nodes. By the management plugin or rabbitmqctl.

Read-only. Where neither is there, a command shows what it can, and names the rest as unknown.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from domain_events.address import Address, shown
from domain_events.errors import ConfigurationError
from domain_events.text import printable

# Seconds. The management plugin collects the state of all queues of a big cluster.
_TIMEOUT = 10.0
# Seconds to find out whether it is there, where nobody has named it.
_PROBE_TIMEOUT = 2.0


@dataclass(frozen=True)
class BindingFound:
    """A binding from an exchange to a queue, or to another exchange."""

    exchange: str
    destination: str
    binding_key: str
    to_exchange: bool = False


@dataclass(frozen=True)
class ConsumerFound:
    """A consumer of a queue.

    :ivar client: its address; empty if it is unknown.
    """

    queue: str
    client: str = ""


@dataclass(frozen=True)
class Alarm:
    """A node that is short of something: publishers of the whole cluster are blocked."""

    node: str
    #: ``memory`` or ``disk space``.
    resource: str


@dataclass(frozen=True)
class NodeFound:
    """A node of the cluster."""

    name: str
    running: bool
    #: For how many seconds it has run; None if that is not known.
    uptime: float | None = None


class Unavailable(Exception):
    """What was requested cannot be read; the text gives the reason."""


class Source(Protocol):
    """Where a broker's state can be read.

    Every method raises `Unavailable` when it cannot be read.
    """

    #: What it is, for remarks.
    name: str

    def bindings(self) -> list[BindingFound]:
        """All bindings of the vhost, without those to the default exchange."""

    def queues(self) -> list[dict[str, Any]]:
        """All queues of the vhost.

        At least ``name``, ``arguments``, ``type``, ``durable``, ``messages``, ``messages_ready``,
        ``messages_unacknowledged``, ``consumers``; a quorum queue also ``members`` and ``online``,
        names of nodes. The management plugin counts every five seconds: before it has, the counts
        are missing.
        """

    def consumers(self) -> list[ConsumerFound]:
        """All consumers of the vhost."""

    def exchanges(self) -> list[dict[str, Any]]:
        """All exchanges of the vhost: at least ``name``, ``type``, ``arguments``."""

    def policies(self) -> list[dict[str, Any]]:
        """The policies and operator policies of the vhost.

        ``name``, ``pattern``, ``apply-to``, ``definition``, ``priority``, and ``operator``: whether
        it is an operator policy.
        """

    def cluster_name(self) -> str:
        """The cluster's name, as AMQP's server properties have it."""

    def alarms(self) -> list[Alarm]:
        """The alarms in effect in the cluster."""

    def nodes(self) -> list[NodeFound]:
        """All nodes of the cluster."""

    def disabled_feature_flags(self) -> list[str]:
        """The stable feature flags that are not enabled."""

    def deprecated_in_use(self) -> list[str]:
        """The deprecated features in use."""

    def default_queue_type(self) -> str:
        """The vhost's type of queues that are declared without one; empty if none is set."""

    def environment(self) -> dict[str, Any]:
        """The settings of the application ``rabbit`` on a node."""

    def clock_skew(self) -> float:
        """How many seconds the broker's clock is ahead of this machine's."""


class Management:
    """The HTTP API of the management plugin (https://www.rabbitmq.com/docs/http-api-reference).

    :param url: such as ``http://host:15672``; with a user and password, or those of the broker.
    :param broker: the broker's URL, for the vhost and the password.
    """

    def __init__(self, url: str, broker: str, timeout: float = _TIMEOUT) -> None:
        parts, of_broker = urlsplit(url), urlsplit(broker)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(
                f"--management: {shown(url)} is not the management plugin's URL, such as "
                "http://user:password@host:15672."
            )
        port = parts.port or (443 if parts.scheme == "https" else 15672)
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self._base = f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}/api/"
        user = parts.username or of_broker.username or "guest"
        password = parts.password or of_broker.password or "guest"
        # An Address masks its repr, so that no traceback shows the password.
        self._login = Address(f"{unquote(user)}:{unquote(password)}")
        self.vhost = unquote(of_broker.path.lstrip("/")) or "/"
        self.name = f"the management plugin at {parts.scheme}://{host}:{port}"
        self._timeout = timeout

    def patient(self) -> Management:
        """The same, with the time limit for answers that take long; for one that was found."""
        self._timeout = _TIMEOUT
        return self

    def get(self, path: str, *, also: int = 200) -> Any:
        """The answer to ``GET /api/<path>``.

        :param also: another status that is an answer.
        :raises Unavailable: there is none, or not for this user.
        """
        return self._get(path, also)[0]

    def _get(self, path: str, also: int = 200) -> tuple[Any, str]:
        """The answer, and the date that it bears."""
        request = urllib.request.Request(self._base + path)
        token = base64.b64encode(str.__str__(self._login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return json.load(answer), str(answer.headers["Date"])
        except urllib.error.HTTPError as error:
            with error:
                answer = _json_or_none(error)
            if error.code == also and answer is not None:
                return answer, str(error.headers["Date"])
            raise Unavailable(f"{self.name}: {_refusal(error.code, answer, path)}") from None
        except (OSError, ValueError, HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            raise Unavailable(f"{self.name}: {printable(cause)}") from None

    def bindings(self) -> list[BindingFound]:
        return [
            BindingFound(
                each["source"],
                each["destination"],
                each["routing_key"],
                each["destination_type"] == "exchange",
            )
            for each in self._of_vhost("bindings")
            if each["source"]
        ]

    def queues(self) -> list[dict[str, Any]]:
        return self._of_vhost("queues")

    def consumers(self) -> list[ConsumerFound]:
        return [
            ConsumerFound(each["queue"]["name"], _client(each.get("channel_details") or {}))
            for each in self._of_vhost("consumers")
        ]

    def exchanges(self) -> list[dict[str, Any]]:
        return self._of_vhost("exchanges")

    def policies(self) -> list[dict[str, Any]]:
        return _marked(self._of_vhost("policies"), self._of_vhost("operator-policies"))

    def cluster_name(self) -> str:
        return str(self.get("overview").get("cluster_name", ""))

    def alarms(self) -> list[Alarm]:
        # Not those of `nodes`, which are up to five seconds old. 503: there are some.
        found = self.get("health/checks/alarms", also=503)
        return [Alarm(each["node"], each["resource"]) for each in found.get("alarms", [])]

    def nodes(self) -> list[NodeFound]:
        return [
            NodeFound(
                each["name"],
                each["running"],
                None if each.get("uptime") is None else each["uptime"] / 1000,
            )
            for each in self.get("nodes")
        ]

    def disabled_feature_flags(self) -> list[str]:
        return _disabled(self.get("feature-flags"))

    def deprecated_in_use(self) -> list[str]:
        return [each["name"] for each in self.get("deprecated-features/used")]

    def default_queue_type(self) -> str:
        # The list: one vhost alone is for administrators.
        return _default_queue_type(self.get("vhosts"), self.vhost)

    def environment(self) -> dict[str, Any]:
        raise Unavailable("the management plugin does not show the settings of a node")

    def clock_skew(self) -> float:
        # The plugin's date has whole seconds, and is up to a second old (cowboy_clock).
        found = []
        for _ in range(3):
            begun = time.time()
            _, date = self._get("whoami")
            try:
                of_broker = parsedate_to_datetime(date).timestamp()
            except (TypeError, ValueError):
                raise Unavailable(f"{self.name}: its answers bear no date") from None
            found.append((of_broker - time.time(), of_broker + 2 - begun))
        least, most = max(low for low, _ in found), min(high for _, high in found)
        return 0.0 if least <= 0 <= most else min(least, most, key=abs)

    def _of_vhost(self, what: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get(f"{what}/{quote(self.vhost, safe='')}")
        return found


def _client(channel: Any) -> str:
    # A list while the plugin has no details yet.
    found = channel if isinstance(channel, dict) else {}
    return f"{found.get('peer_host', '?')}:{found.get('peer_port', '?')}"


class Rabbitmqctl:
    """``rabbitmqctl`` on the broker's machine, for a user who may run it."""

    name = "rabbitmqctl"

    def __init__(self, broker: str) -> None:
        self._vhost = unquote(urlsplit(broker).path.lstrip("/")) or "/"

    def run(self, *arguments: str, program: str = "rabbitmqctl") -> Any:
        """The JSON that ``rabbitmqctl ARGUMENTS`` prints.

        :raises Unavailable: it is not installed, or has failed.
        """
        path = shutil.which(program)
        if path is None:
            raise Unavailable(f"{program} is not installed here")
        try:
            done = subprocess.run(
                [path, "--quiet", "--formatter", "json", *arguments],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                stdin=subprocess.DEVNULL,
            )
            if not done.returncode:
                return json.loads(done.stdout)
            # A check that finds something fails, and prints it to stderr.
            if done.stderr.startswith("{"):
                return json.loads(done.stderr)
            first = next(filter(None, done.stderr.splitlines()), "it has failed")
            raise Unavailable(f"{program}: {printable(first).rstrip('.')}")
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{program}: {printable(error)}") from None

    def _list(self, command: str, *columns: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.run(command, "--vhost", self._vhost, *columns)
        return found

    def bindings(self) -> list[BindingFound]:
        columns = "source_name", "destination_name", "destination_kind", "routing_key"
        return [
            BindingFound(
                each["source_name"],
                each["destination_name"],
                each["routing_key"],
                each["destination_kind"] == "exchange",
            )
            for each in self._list("list_bindings", *columns)
            if each["source_name"]
        ]

    def queues(self) -> list[dict[str, Any]]:
        return self._with_arguments(
            "list_queues",
            "name",
            "arguments",
            "type",
            "durable",
            "messages",
            "messages_ready",
            "messages_unacknowledged",
            "consumers",
            "members",
            "online",
        )

    def consumers(self) -> list[ConsumerFound]:
        # It names their channels only, not their clients.
        found = self._list("list_consumers", "queue_name")
        return [ConsumerFound(each["queue_name"]) for each in found]

    def exchanges(self) -> list[dict[str, Any]]:
        return self._with_arguments("list_exchanges", "name", "type", "arguments")

    def policies(self) -> list[dict[str, Any]]:
        return _marked(self._list("list_policies"), self._list("list_operator_policies"))

    def cluster_name(self) -> str:
        return str(self._status()["cluster_name"])

    def alarms(self) -> list[Alarm]:
        return [
            # An alarm over file descriptors has no node.
            Alarm(each.get("node", ""), str(each.get("resource", "file descriptors")))
            for each in self._status()["alarms"]
        ]

    def nodes(self) -> list[NodeFound]:
        status, own = self._status(), self.run("status")
        running = status["running_nodes"]
        names = {*status["disk_nodes"], *status.get("ram_nodes", []), *running}
        # It has the uptime of one node only, after which that node's folder is named.
        this = own.get("data_directory", "").rpartition("/")[2]
        return [
            NodeFound(name, name in running, own["uptime"] if name == this else None)
            for name in sorted(names)
        ]

    def disabled_feature_flags(self) -> list[str]:
        return _disabled(self.run("list_feature_flags", "name", "state", "stability"))

    def deprecated_in_use(self) -> list[str]:
        # Not `rabbitmqctl list_deprecated_features --used`, which lists none on 4.0 and 4.3.
        check = "check_if_any_deprecated_features_are_used"
        found = self.run(check, program="rabbitmq-diagnostics")
        if found.get("result") != "ok" and "deprecated_features" not in found:
            raise Unavailable(f"rabbitmq-diagnostics: {printable(found.get('message', found))}")
        return list(found.get("deprecated_features", []))

    def default_queue_type(self) -> str:
        return _default_queue_type(
            self.run("list_vhosts", "name", "default_queue_type"), self._vhost
        )

    def environment(self) -> dict[str, Any]:
        found: dict[str, Any] = self.run("environment")["rabbit"]
        return found

    def clock_skew(self) -> float:
        return 0.0  # it is the same machine

    def _with_arguments(self, command: str, *columns: str) -> list[dict[str, Any]]:
        found = self._list(command, *columns)
        for each in found:
            if not isinstance(each["arguments"], dict):  # a list of name, type, value
                each["arguments"] = {name: value for name, _, value in each["arguments"]}
        return found

    def _status(self) -> Any:
        return self.run("cluster_status")


def find(management: str | None, urls: Sequence[str], cluster: str) -> tuple[Source | None, str]:
    """Where the broker's state can be read, or None with the reasons.

    :param management: the URL that the user has given, which must work then.
    :param cluster: the broker's own name, see `find_all`.
    :raises ConfigurationError: the URL that was given cannot be one, is not answered, or is that of
        another broker.
    """
    found, reasons = find_all(management, urls, cluster=cluster, enough=1)
    return (found[0], "") if found else (None, "; ".join(reasons))


def find_all(
    management: str | None, urls: Sequence[str], *, cluster: str = "", enough: int = 2
) -> tuple[list[Source], list[str]]:
    """Where the broker's state can be read, the better place first; and why not elsewhere.

    :param cluster: the broker's own name, by which those of another broker are told apart. If it is
        empty, rabbitmqctl is not used, since it belongs to whatever broker this machine has.
    :param enough: look no further when so many are found.
    :raises ConfigurationError: as `find`.
    """
    found: list[Source] = []
    reasons: list[str] = []
    for source in _candidates(management, urls):
        if len(found) == enough:
            break
        if not cluster and isinstance(source, Rabbitmqctl):
            reasons.append("without an answer over AMQP, rabbitmqctl may be that of another broker")
            continue
        try:
            # Any user of the plugin may read this.
            name = source.cluster_name()
        except Unavailable as error:
            if management is not None and isinstance(source, Management):
                raise ConfigurationError(f"--management: {error}.") from None
            reasons.append(str(error))
            continue
        if cluster and name != cluster:
            if management is not None and isinstance(source, Management):
                raise ConfigurationError(
                    f"--management: {source.name} is that of another broker, {printable(name)}; "
                    f"the one of AMQP is {printable(cluster)}."
                )
            reasons.append(f"{source.name} is that of another broker, {printable(name)}")
        elif isinstance(source, Management):
            found.append(source.patient())
        else:
            found.append(source)
    return found, reasons


def _candidates(management: str | None, urls: Sequence[str]) -> list[Source]:
    if management is not None:
        return [Management(management, urls[0]), Rabbitmqctl(urls[0])]
    parts = urlsplit(urls[0])
    # Over TLS where the broker is, so that the password is as safe as it is there.
    scheme, port = ("https", 15671) if parts.scheme == "amqps" else ("http", 15672)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or "localhost"
    url = f"{scheme}://{host}:{port}"
    return [Management(url, urls[0], _PROBE_TIMEOUT), Rabbitmqctl(urls[0])]


def _marked(policies: list[dict[str, Any]], of_operator: list[dict[str, Any]]) -> list[Any]:
    """Both kinds in one list. rabbitmqctl prints a definition as JSON in a string."""
    found = []
    for each, operator in [
        *((each, False) for each in policies),
        *((each, True) for each in of_operator),
    ]:
        definition = each["definition"]
        if isinstance(definition, str):
            definition = json.loads(definition)
        found.append({**each, "definition": definition, "operator": operator})
    return found


def _disabled(flags: list[dict[str, Any]]) -> list[str]:
    return [
        each["name"]
        for each in flags
        if each["state"] == "disabled" and each.get("stability") != "experimental"
    ]


def _default_queue_type(vhosts: list[dict[str, Any]], vhost: str) -> str:
    of_vhost = next((each for each in vhosts if each["name"] == vhost), {})
    found = str(of_vhost.get("default_queue_type") or "undefined")
    return "" if found == "undefined" else found


def _json_or_none(answer: Any) -> Any:
    try:
        return json.load(answer)
    except (OSError, ValueError, HTTPException):
        return None


# Of what the doctor reads: the tag that a user needs for it, if not "management".
_TAGS = {"nodes": "monitoring", "feature-flags": "administrator"}


def _refusal(status: int, answer: Any, path: str) -> str:
    """Why the management plugin has not answered, and what to do about it."""
    reason = str(answer.get("reason", "")) if isinstance(answer, dict) else ""
    # "Not management user", "Not monitor user": the tags. A wrong password has another one.
    if status in (401, 403) and reason.lower().startswith("not ") and "user" in reason:
        tag = _TAGS.get(path, "management")
        return (
            f"this user may not read it ({printable(reason)}): it needs the tag {tag!r}, as in "
            f"rabbitmqctl set_user_tags USER {tag}, or name another one in --management"
        )
    if status == 401:
        return "user or password is wrong"
    if status == 403:
        return "this user may not read it"
    return f"HTTP status {status}"
