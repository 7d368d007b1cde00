"""What AMQP does not show, such as bindings and policies: by the management plugin or rabbitmqctl.

Read-only. Where neither is there, a command shows what it can, and names the rest as unknown.
"""

from __future__ import annotations

import base64
import json
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
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

    :ivar connection: its client's address or process, as far as it is known.
    """

    queue: str
    connection: str


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

        At least ``name``, ``arguments``, ``type``, ``durable``, ``messages_ready``,
        ``messages_unacknowledged``, ``consumers``.
        """

    def exchange_types(self) -> dict[str, str]:
        """The types of all exchanges of the vhost, by name."""

    def consumers(self) -> list[ConsumerFound]:
        """All consumers of the vhost."""

    def policies(self) -> list[dict[str, Any]]:
        """The policies and operator policies of the vhost.

        ``name``, ``pattern``, ``apply-to``, ``definition``, ``priority``.
        """


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

    def get(self, path: str) -> Any:
        """The answer to ``GET /api/<path>``.

        :raises Unavailable: there is none, or not for this user.
        """
        request = urllib.request.Request(self._base + path)
        token = base64.b64encode(str.__str__(self._login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            why = {401: "user or password is wrong", 403: "this user may not read it"}
            reason = why.get(error.code, f"HTTP status {error.code}")
            raise Unavailable(f"{self.name}: {reason}") from None
        except (OSError, ValueError, ssl.SSLError) as error:
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

    def exchange_types(self) -> dict[str, str]:
        return {each["name"]: each["type"] for each in self._of_vhost("exchanges")}

    def consumers(self) -> list[ConsumerFound]:
        return [
            ConsumerFound(each["queue"]["name"], _client(each.get("channel_details") or {}))
            for each in self._of_vhost("consumers")
        ]

    def policies(self) -> list[dict[str, Any]]:
        return self._of_vhost("policies") + self._of_vhost("operator-policies")

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

    def run(self, *arguments: str) -> Any:
        """The JSON that ``rabbitmqctl ARGUMENTS`` prints.

        :raises Unavailable: it is not installed, or has failed.
        """
        program = shutil.which("rabbitmqctl")
        if program is None:
            raise Unavailable("rabbitmqctl is not installed here")
        try:
            done = subprocess.run(
                [program, "--quiet", "--formatter", "json", *arguments],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                stdin=subprocess.DEVNULL,
            )
            if done.returncode:
                first = next(filter(None, done.stderr.splitlines()), "it has failed")
                raise Unavailable(f"rabbitmqctl: {printable(first).rstrip('.')}")
            return json.loads(done.stdout)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"rabbitmqctl: {printable(error)}") from None

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
        return self._list(
            "list_queues",
            "name",
            "arguments",
            "type",
            "durable",
            "messages_ready",
            "messages_unacknowledged",
            "consumers",
        )

    def exchange_types(self) -> dict[str, str]:
        return {each["name"]: each["type"] for each in self._list("list_exchanges", "name", "type")}

    def consumers(self) -> list[ConsumerFound]:
        columns = "queue_name", "channel_pid"
        return [
            ConsumerFound(each["queue_name"], each["channel_pid"])
            for each in self._list("list_consumers", *columns)
        ]

    def policies(self) -> list[dict[str, Any]]:
        return self._list("list_policies") + self._list("list_operator_policies")


def find(management: str | None, urls: Sequence[str]) -> tuple[Source | None, str]:
    """Where the broker's state can be read, or None with the reasons.

    :param management: the URL that the user has given, which must work then.
    :raises ConfigurationError: the URL that was given cannot be one, or is not answered.
    """
    if management is not None:
        given = Management(management, urls[0])
        try:
            given.get("whoami")
        except Unavailable as error:
            raise ConfigurationError(f"--management: {error}.") from None
        return given, ""
    reasons = []
    parts = urlsplit(urls[0])
    # Over TLS where the broker is, so that the password is as safe as it is there.
    scheme, port = ("https", 15671) if parts.scheme == "amqps" else ("http", 15672)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or "localhost"
    found = Management(f"{scheme}://{host}:{port}", urls[0], _PROBE_TIMEOUT)
    try:
        found.get("whoami")
    except Unavailable as error:
        reasons.append(str(error))
    else:
        return Management(f"{scheme}://{host}:{port}", urls[0]), ""
    control = Rabbitmqctl(urls[0])
    try:
        control.bindings()
    except Unavailable as error:
        reasons.append(str(error))
        return None, "; ".join(reasons)
    return control, ""
