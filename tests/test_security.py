"""TLS, permissions, credentials: what is refused, in which words, and what nobody gets to see."""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import impostor
import onlooker
import pytest
import rabbitmq_node
from bench import Events, running
from live import consuming
from rabbitmq_node import Node
from support import wait_until

from domain_events import (
    BrokerUnavailable,
    ConfigurationError,
    DeadLetters,
    DomainEvent,
    DomainEventsError,
    Publisher,
    Reject,
    Retry,
    Subscriber,
    TopologyError,
    configure,
    demo,
    settings,
)

NodeFactory = Callable[..., Node]
DOCUMENTATION = Path(__file__).parent.parent / "docs" / "topology.rst"


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls_node(rabbitmq_release: str) -> Iterator[Node]:
    """A node with a TLS listener that welcomes client certificates."""
    with Node(rabbitmq_release, tls=True) as node:
        yield node


def tls_url(node: Node, **options: object) -> str:
    return f"{node.tls_url}?ssl_options={options!r}".replace(" ", "")


def test_tls_with_a_known_authority(tls_node: Node, unique: str) -> None:
    """`amqps://` with pika's ssl_options; a client certificate too."""
    for options in (
        {"ca_certs": str(tls_node.ca_file)},
        {
            "ca_certs": str(tls_node.ca_file),
            "certfile": str(tls_node.certificate_file),
            "keyfile": str(tls_node.key_file),
        },
    ):
        url = tls_url(tls_node, **options)
        seen: Events = []
        with Publisher(url, unique) as publisher:
            subscriber = Subscriber(url, unique)

            def handle(event: DomainEvent) -> None:
                seen.append(event)  # noqa: B023
                if len(seen) == 5020:  # noqa: B023
                    subscriber.stop_consuming()  # noqa: B023

            subscriber.register(handle, f"{unique}-q", ["#"])
            small = [DomainEvent("a.b", n) for n in range(5000)]
            large = [DomainEvent("a.b", "x" * 50_000) for _ in range(20)]
            publisher.publish_many([*small, *large])
            subscriber.start_consuming(timeout=30)
            assert seen == [*small, *large]


def test_unknown_authority_is_refused_at_once(tls_node: Node, unique: str) -> None:
    """Not retried: nobody should grow used to it."""
    with (
        Publisher(tls_node.tls_url, unique) as publisher,
        pytest.raises(ConfigurationError, match="certificate is not trusted"),
    ):
        publisher.publish(DomainEvent("a.b", {}), timeout=30)


def test_plain_port_is_no_tls_port(tls_node: Node, unique: str) -> None:
    """`amqps://` on the plain port: said in words, when the deadline is over."""
    url = tls_url(tls_node, ca_certs=str(tls_node.ca_file)).replace(
        str(tls_node.tls_port), str(tls_node.port)
    )
    with (
        Publisher(url, unique) as publisher,
        pytest.raises(BrokerUnavailable, match=r"TLS failed|does not use AMQP"),
    ):
        publisher.publish(DomainEvent("a.b", {}), timeout=2)


def test_wrong_host_name_is_refused_at_once(tls_node: Node, unique: str) -> None:
    """The certificate is of a known authority, and of another host: 127.1 is 127.0.0.1, too."""
    url = tls_url(tls_node, ca_certs=str(tls_node.ca_file)).replace("127.0.0.1", "127.1")
    with (
        Publisher(url, unique) as publisher,
        pytest.raises(ConfigurationError, match=r"not trusted.*127\.1"),
    ):
        publisher.publish(DomainEvent("a.b", {}), timeout=30)


def test_client_without_the_certificate_that_is_required_is_told(
    node_factory: NodeFactory, unique: str
) -> None:
    """The error speaks of the certificate; with it, the client is let in."""
    node = node_factory(tls=True, config="ssl_options.fail_if_no_peer_cert = true")
    node.start()
    authority = {"ca_certs": str(node.ca_file)}
    own = {"certfile": str(node.certificate_file), "keyfile": str(node.key_file)}
    with Publisher(tls_url(node, **authority, **own), unique) as publisher:
        publisher.publish(DomainEvent("a.b", {}))
    # What the broker has to say may be lost when it hangs up; then it is tried until the deadline.
    refused = (ConfigurationError, BrokerUnavailable)
    with (
        Publisher(tls_url(node, **authority), unique, timeout=3) as publisher,
        pytest.raises(refused, match="certificate"),
    ):
        publisher.publish(DomainEvent("a.b", {}))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of an authority that the TLS node's is not of."""
    folder = tmp_path_factory.mktemp("foreign")
    rabbitmq_node._make_certificates(folder)
    return folder


# Python warns of each protocol but PROTOCOL_TLS_CLIENT.
old_protocols = pytest.mark.filterwarnings("ignore:ssl.PROTOCOL:DeprecationWarning")


@old_protocols
@pytest.mark.parametrize("kind", [Publisher, Subscriber, DeadLetters])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocol": int(ssl.PROTOCOL_TLSv1_2)}, "protocol"),
        ({"protocol": int(ssl.PROTOCOL_TLS)}, "protocol"),
        ({"protocol": int(ssl.PROTOCOL_TLS_SERVER)}, "protocol"),
        ({"protocol": int(ssl.PROTOCOL_TLSv1_2), "cert_reqs": int(ssl.CERT_REQUIRED)}, "protocol"),
        ({"protocol": int(ssl.PROTOCOL_TLSv1_2), "server_hostname": "localhost"}, "protocol"),
        ({"ciphers": "aNULL:@SECLEVEL=0"}, "ciphers"),
        ({"ciphers": "ALL:eNULL:@SECLEVEL=0"}, "ciphers"),
        ({"ca_certs": None}, "ca_certs"),
        ({"ca_certs": None, "cert_reqs": int(ssl.CERT_NONE)}, "ca_certs"),
    ],
    ids=str,
)
@pytest.mark.parametrize("scheme", ["amqps", "AMQPS", "amqp"])
def test_tls_that_does_not_verify_is_refused_before_any_connection(
    kind: type[Publisher | Subscriber | DeadLetters],
    foreign: Path,
    options: dict[str, object],
    words: str,
    scheme: str,
) -> None:
    """Whichever of pika's options switched it off; the error names it and the way to insist."""
    given = {"ca_certs": str(foreign / "ca.pem"), **options}
    url = f"{scheme}://guest:{SECRET}@127.0.0.1:5671/?ssl_options={quote(str(given))}"
    arguments = ("name", url) if kind is DeadLetters else (url,)
    with pytest.raises(ConfigurationError, match=words) as caught:
        kind(*arguments)
    assert "hunter2" not in told_by(caught.value)
    if words != "ca_certs":
        assert "tls_verify=no" in str(caught.value)


@old_protocols
@pytest.mark.parametrize(
    "options",
    [
        None,
        {"ca_certs": "foreign"},
        {"ca_certs": "foreign", "cert_reqs": int(ssl.CERT_NONE)},
        {"ca_certs": "foreign", "verify_mode": int(ssl.CERT_NONE), "check_hostname": False},
        {"ca_certs": "foreign", "protocol": int(ssl.PROTOCOL_TLSv1_2)},
        {"ca_certs": "foreign", "protocol": int(ssl.PROTOCOL_TLS)},
        {"ca_certs": "foreign", "protocol": int(ssl.PROTOCOL_TLS_CLIENT)},
        {"ca_certs": "foreign", "server_hostname": "localhost"},
        {"ca_certs": "foreign", "ciphers": "aNULL:ALL:@SECLEVEL=0"},
        {"ca_certs": "own", "server_hostname": "another.host"},
        {"ca_certs": "own", "server_hostname": ""},
    ],
    ids=str,
)
def test_server_with_a_foreign_certificate_never_receives_the_password(
    foreign: Path, tmp_path: Path, options: dict[str, object] | None
) -> None:
    """Nor one whose certificate is of another host: it is left at the TLS handshake."""
    received: list[bytes] = []
    rabbitmq_node._make_certificates(tmp_path)
    authorities = {"foreign": foreign / "ca.pem", "own": tmp_path / "ca.pem"}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")

    def behave(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            received.append(secured.recv(8))
            secured.sendall(impostor.START)
            received.append(secured.recv(10_000))

    query = ""
    if options is not None:
        given = {**options, "ca_certs": str(authorities[str(options["ca_certs"])])}
        query = f"?ssl_options={quote(str(given))}"
    with impostor.Impostor(behave) as server:
        # The URL's password is what impostors are after.
        with pytest.raises((ConfigurationError, BrokerUnavailable)):
            use_publisher(server.url(query, "amqps"), "x")
        assert not any(received)
        # The other end would have seen it.
        with pytest.raises((ConfigurationError, BrokerUnavailable)):
            use_publisher(server.url("?tls_verify=no", "amqps"), "x")
        wait_until(lambda: any(b"hunter2" in each for each in received))


@old_protocols
@pytest.mark.parametrize(
    "options", [None, {"protocol": int(ssl.PROTOCOL_TLSv1_2)}, {"server_hostname": "another.host"}]
)
@pytest.mark.parametrize(
    "form", ["?tls_verify=no{}", "?{}&tls_verify=no", "?{}&tls_verify=no&heartbeat=9"]
)
def test_verification_that_is_switched_off_in_so_many_words_is_warned_of(
    tls_node: Node,
    foreign: Path,
    unique: str,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, object] | None,
    form: str,
) -> None:
    """It then works with any certificate; each connection that is prepared says so."""
    given = ""
    if options is not None:
        given = f"ssl_options={quote(str({'ca_certs': str(foreign / 'ca.pem'), **options}))}"
    query = form.format(f"&{given}" if form.startswith("?tls") and given else given)
    url = tls_node.tls_url + query.replace("?&", "?")
    for _ in range(2):
        with Publisher(url, unique) as publisher:
            publisher.publish(DomainEvent("a.b", {}))
    lines = [each for each in caplog.records if "tls_verify=no" in each.getMessage()]
    assert [each.levelno for each in lines] == [logging.WARNING] * 2
    assert tls_node.tls_url.rpartition("@")[2] in lines[0].getMessage()
    assert "guest:guest" not in caplog.text


@pytest.mark.parametrize(
    ("scheme", "query"),
    [
        ("amqps", "tls_verify=No"),
        ("amqps", "tls_verify=false"),
        ("amqps", "tls_verify=0"),
        ("amqps", "tls_verify="),
        ("amqps", "tls_verify=no&tls_verify=yes"),
        ("amqps", "tls_verify=yes&heartbeat=1&tls_verify=no"),
        ("amqp", "tls_verify=no"),
    ],
)
def test_half_a_word_does_not_switch_verification_off(scheme: str, query: str) -> None:
    """Nor does it pass as if it had."""
    with pytest.raises(ConfigurationError):
        Publisher(f"{scheme}://guest:guest@localhost/?{query}")


def test_other_name_in_the_certificate_may_be_given(tls_node: Node, unique: str) -> None:
    """It is verified instead of the one in the URL."""
    options = {"ca_certs": str(tls_node.ca_file), "server_hostname": "localhost"}
    url = tls_url(tls_node, **options).replace("127.0.0.1", "127.1")
    with Publisher(url, unique) as publisher:
        publisher.publish(DomainEvent("a.b", {}))
    with Publisher(url.replace("?", "?tls_verify=yes&"), unique) as publisher:
        publisher.publish(DomainEvent("a.b", {}))


def test_plain_and_tls_addresses_in_one_list_are_a_mistake(tls_node: Node) -> None:
    """At once, and without either password."""
    plain = f"amqp://guest:{SECRET}@localhost/"
    verified = tls_url(tls_node, ca_certs=str(tls_node.ca_file)).replace(
        "guest:guest", f"g:{SECRET}"
    )
    hidden = verified.replace("amqps:", "amqp:")  # pika takes TLS from ssl_options, too
    for urls in ([plain, verified], [verified, plain], f"{plain},{verified}", [plain, hidden]):
        for use in (Publisher, Subscriber, lambda given: DeadLetters("name", given)):
            with pytest.raises(ConfigurationError, match="amqps://") as caught:
                use(urls)
            assert "hunter2" not in told_by(caught.value)


# --- permissions ---------------------------------------------------------------------------------


class Permissions(NamedTuple):
    """What a user may do, as regular expressions."""

    configure: str
    write: str
    read: str

    def without(self, kind: str, name: str) -> Permissions:
        """The same, but for one name in one of the three."""
        (rest,) = re.findall(r"\^(.*)\$", getattr(self, kind))
        return self._replace(**{kind: f"^(?!{re.escape(name)}$)({rest})$"})


ALL = Permissions(".*", ".*", ".*")


def documented(role: str, exchange: str, queue: str) -> Permissions:
    """What the documentation says that a user of this role needs."""
    text = DOCUMENTATION.read_text()
    kinds = "".join(rf"    - {kind}: ``(.*)``\n" for kind in Permissions._fields)
    rows = re.findall(rf"^(\S.*)\n{kinds}", text, re.MULTILINE)
    (found,) = [row[1:] for row in rows if row[0] == role]
    return Permissions(
        *(
            each.replace("domain-events", exchange).replace("print-user-event", queue)
            for each in found
        )
    )


class Users:
    """Users of a node, made all at once, since rabbitmqctl takes seconds for each."""

    def __init__(self, node: Node, prefix: str) -> None:
        self._node = node
        self._prefix = prefix
        self._urls: list[str] = []

    def make(self, *permissions: Permissions) -> list[str]:
        """A user with each of these permissions; their URLs."""
        first = len(self._urls)
        names = [f"{self._prefix}{n}" for n in range(first, first + len(permissions))]
        calls = []
        for name, each in zip(names, permissions, strict=True):
            user = f'{_binary(name)}, <<"hunter2">>, <<"test">>'
            calls.append(f"rabbit_auth_backend_internal:add_user({user})")
            calls.append(self._set(name, each))
        self._evaluate(calls)
        urls = [self._node.url.replace("guest:guest", f"{name}:hunter2") for name in names]
        self._urls += urls
        return urls

    def set(self, url: str, permissions: Permissions) -> None:
        """Give a user other permissions."""
        self._evaluate([self._set(f"{self._prefix}{self._urls.index(url)}", permissions)])

    def delete(self) -> None:
        self._evaluate(
            [
                f"rabbit_auth_backend_internal:delete_user({_binary(self._prefix + str(n))}, <<>>)"
                for n in range(len(self._urls))
            ]
        )

    def _set(self, name: str, permissions: Permissions) -> str:
        arguments = ", ".join(map(_binary, (name, "/", *permissions, "test")))
        return f"rabbit_auth_backend_internal:set_permissions({arguments})"

    def _evaluate(self, calls: list[str]) -> None:
        self._node.ctl("eval", f"[{', '.join(calls)}].")


def _binary(text: str) -> str:
    escaped = text.replace("\\", "\\\\")
    return f'<<"{escaped}">>'


@pytest.fixture
def users(killable_node: Node, unique: str) -> Iterator[Users]:
    users = Users(killable_node, f"u{unique[-6:]}-")
    yield users
    users.delete()


def work_with_retries(
    url: str, admin: str, exchange: str, queue: str, *, declare: bool = True
) -> None:
    """All that a subscriber does: a retry and a dead letter among it."""
    retries: list[int] = []
    with Subscriber(url, exchange, declare=declare) as subscriber:

        def handle(event: DomainEvent) -> None:
            retries.append(event.retries)
            if event.retries == 1:
                subscriber.stop_consuming()
            raise Retry(0.1)

        subscriber.register(handle, queue, ["#"], max_retries=1)
        publish(admin, exchange)
        subscriber.start_consuming(timeout=20)
    assert retries == [0, 1]
    assert onlooker.count(admin, f"{queue}-dl") == 1


def work(url: str, admin: str, exchange: str, queue: str, *, declare: bool = True) -> None:
    """All that a subscriber without retries does, a dead letter among it."""
    with Subscriber(url, exchange, declare=declare) as subscriber:

        def handle(event: DomainEvent) -> None:
            subscriber.stop_consuming()
            raise Reject("no")

        subscriber.register(handle, queue, ["#"])
        publish(admin, exchange)
        subscriber.start_consuming(timeout=20)
    assert onlooker.count(admin, f"{queue}-dl") == 1


def apply(admin: str, exchange: str, queue: str, max_retries: int = 0) -> None:
    """Declare what a subscriber needs that declares nothing, as an operator does."""
    with Subscriber(admin, exchange) as subscriber:
        subscriber.register(print, queue, ["#"], max_retries=max_retries)


def work_declaring_nothing(url: str, admin: str, exchange: str, queue: str) -> None:
    apply(admin, exchange, queue)
    work(url, admin, exchange, queue, declare=False)


def retry_declaring_nothing(url: str, admin: str, exchange: str, queue: str) -> None:
    apply(admin, exchange, queue, 1)
    work_with_retries(url, admin, exchange, queue, declare=False)


def publish(url: str, exchange: str, number: int = 1) -> None:
    with Publisher(url, exchange) as publisher:
        publisher.publish_many(DomainEvent("a.b", n) for n in range(number))


def replay(url: str, admin: str, exchange: str, queue: str) -> None:
    """All that a person does who looks after dead letters."""
    with Subscriber(admin, exchange) as subscriber:
        subscriber.register(print, queue, ["#"])
    for n in range(40):
        onlooker.publish(admin, "", f"{queue}-dl", b"%d" % n)
    with DeadLetters(queue, url) as dead_letters:
        assert dead_letters.count() == 40
        assert len(list(dead_letters)) == 40
        next(iter(dead_letters)).discard()
        assert dead_letters.replay_all() == 39
    assert onlooker.count(admin, queue) == 39


def declare_and_publish(url: str, admin: str, exchange: str, queue: str) -> None:
    publish(url, exchange)


def publish_only(url: str, admin: str, exchange: str, queue: str) -> None:
    onlooker.bind_queue(admin, queue, exchange, "#")
    publish(url, exchange, 300)
    assert onlooker.count(admin, queue) == 300


ROLES = {
    "Publisher; somebody else declares the exchange": publish_only,
    "Publisher that may declare it": declare_and_publish,
    "Subscriber without retries": work,
    "Subscriber with ``max_retries``": work_with_retries,
    "``Subscriber(declare=False)``": work_declaring_nothing,
    "``Subscriber(declare=False)`` with ``max_retries``": retry_declaring_nothing,
    "For ``DeadLetters``": replay,
}

# What a subscriber that declares nothing cannot do without. It is logged when it is missing.
LOGGED = [
    (role, kind, name)
    for role in ROLES
    if "declare=False" in role
    for kind, name in (("write", "amq.default"), ("read", "Q"))
] + [
    ("``Subscriber(declare=False)`` with ``max_retries``", "write", f"X.delay.{level}")
    for level in ("00", "11", "23")
]

# What each role cannot do without: the kind and the name. X is the exchange, Q the queue.
NEEDED = [
    ("Publisher; somebody else declares the exchange", "write", "X"),
    ("Publisher that may declare it", "write", "X"),
    *[
        (role, kind, name)
        for role in ("Subscriber without retries", "Subscriber with ``max_retries``")
        for kind, names in (
            ("configure", ("X", "Q", "Q-dl")),
            ("write", ("amq.default", "Q")),
            ("read", ("X", "Q")),
        )
        for name in names
    ],
    *[
        ("Subscriber with ``max_retries``", kind, f"X.{name}")
        for kind in ("configure", "write", "read")
        for name in ("due", "undelivered", "delay.00", "delay.11", "delay.23")
    ],
    ("For ``DeadLetters``", "write", "amq.default"),
    ("For ``DeadLetters``", "read", "Q-dl"),
]


def test_documented_permissions_are_enough(killable_node: Node, unique: str, users: Users) -> None:
    """For a publisher that may declare and one that may not, subscribers, and for replays."""
    names = [(f"{unique}-x{n}", f"{unique}-q{n}") for n in range(len(ROLES))]
    urls = users.make(*(documented(role, *each) for role, each in zip(ROLES, names, strict=True)))
    for role, url, (exchange, queue) in zip(ROLES, urls, names, strict=True):
        ROLES[role](url, killable_node.url, exchange, queue)


def test_each_documented_permission_is_needed_and_named_when_it_is_missing(
    killable_node: Node, unique: str, users: Users
) -> None:
    """One after the other is taken away: a `ConfigurationError` says which, and of what."""
    named = [(f"{unique}-x{n}", f"{unique}-q{n}") for n in range(len(NEEDED))]
    missing = [
        name.replace("X", exchange).replace("Q", queue)
        for (_, _, name), (exchange, queue) in zip(NEEDED, named, strict=True)
    ]
    urls = users.make(
        *(
            documented(role, *each).without(kind, name)
            for (role, kind, _), each, name in zip(NEEDED, named, missing, strict=True)
        )
    )
    for (role, kind, _), url, each, name in zip(NEEDED, urls, named, missing, strict=True):
        with pytest.raises(ConfigurationError) as caught:
            ROLES[role](url, killable_node.url, *each)
        told = str(caught.value)
        assert f"'{name}'" in told, (role, kind, name)
        assert re.search(rf"permissions? .*\b{kind}\b", told), (role, kind, told)


def test_permission_that_a_subscriber_misses_later_is_logged_and_nothing_is_lost(
    killable_node: Node, unique: str, users: Users, caplog: pytest.LogCaptureFixture
) -> None:
    """One that declares nothing learns of it only when it consumes, or moves an event."""
    role = "``Subscriber(declare=False)`` with ``max_retries``"
    cases = [("read", "Q"), ("write", "amq.default"), ("write", "X.delay.00")]
    named = [(f"{unique}-x{n}", f"{unique}-q{n}") for n in range(len(cases))]
    missing = [
        name.replace("X", exchange).replace("Q", queue)
        for (_, name), (exchange, queue) in zip(cases, named, strict=True)
    ]
    urls = users.make(
        *(
            documented(role, *each).without(kind, name)
            for (kind, _), each, name in zip(cases, named, missing, strict=True)
        )
    )
    for (kind, _), url, (exchange, queue), name in zip(cases, urls, named, missing, strict=True):
        apply(killable_node.url, exchange, queue, 1)
        publish(killable_node.url, exchange)
        with Subscriber(url, exchange, declare=False) as subscriber:

            def handle(event: DomainEvent, dead: bool = name == "amq.default") -> None:
                raise Reject("no") if dead else Retry(0.1)

            subscriber.register(handle, queue, ["#"], max_retries=1)

            def is_named(name: str = name, kind: str = kind) -> bool:
                return bool(re.search(rf"'{name}'.*\b{kind}\b", caplog.text))

            with running(subscriber):
                wait_until(is_named, message=f"{kind} on {name} is named")
        wait_until(partial(onlooker.count, killable_node.url, queue))


def test_no_documented_permission_is_more_than_needed(unique: str) -> None:
    """Each name that a documented expression matches is among those that cannot be missed."""
    x, q = f"{unique}-x", f"{unique}-q"
    levels = [f"{x}.delay.{n:02}" for n in range(24)]
    every = [x, q, f"{q}-dl", "amq.default", f"{x}.due", f"{x}.undelivered", *levels]
    # Without these it works on some releases, or as long as somebody else declares.
    useful = {("Publisher that may declare it", "configure", x)}
    useful |= {("For ``DeadLetters``", "configure", f"{q}-dl")}
    for role in ROLES:
        permissions = documented(role, x, q)
        needed = {
            (kind, name.replace("X", x).replace("Q", q))
            for each, kind, name in [*NEEDED, *LOGGED]
            if each == role
        }
        for kind in permissions._fields:
            matched = [name for name in every if re.search(getattr(permissions, kind), name)]
            for name in matched:
                level = re.sub(r"delay\.\d\d", "delay.00", name)
                assert (kind, level) in needed or (role, kind, name) in useful


def test_publisher_that_may_not_configure_asks_for_the_exchange(
    killable_node: Node, unique: str, users: Users
) -> None:
    """Where it does not exist yet; the same publisher goes on once it does."""
    exchange, queue = f"{unique}-x", f"{unique}-q"
    role = "Publisher; somebody else declares the exchange"
    (url,) = users.make(documented(role, exchange, queue))
    with Publisher(url, exchange) as publisher:
        missing = f"'{exchange}' does not exist.*permission configure"
        with pytest.raises(TopologyError, match=missing):
            publisher.publish(DomainEvent("a.b", {}))
        onlooker.bind_queue(killable_node.url, queue, exchange, "#")
        publisher.publish(DomainEvent("a.b", {}))
    assert onlooker.count(killable_node.url, queue) == 1


def test_subscriber_that_may_not_read_says_so_and_goes_on(
    killable_node: Node, unique: str, users: Users, caplog: pytest.LogCaptureFixture
) -> None:
    """The permission is missing, then given: it consumes without a restart."""
    exchange, queue = f"{unique}-x", f"{unique}-q"
    (url,) = users.make(ALL)
    seen: Events = []
    subscriber = Subscriber(url, exchange)
    subscriber.register(seen.append, queue, ["#"])
    users.set(url, ALL._replace(read=f"^{exchange}$"))
    thread = threading.Thread(target=subscriber.start_consuming)
    thread.start()
    try:
        wait_until(lambda: f"{queue} cannot consume" in caplog.text)
        assert "permission read" in caplog.text
        users.set(url, ALL)
        with Publisher(killable_node.url, exchange) as publisher:
            event = publisher.publish(DomainEvent("a.b", {}))
        wait_until(lambda: event in seen)
    finally:
        subscriber.stop_consuming()
        thread.join(20)
        assert not thread.is_alive()


def test_dead_letter_waits_for_the_permission_to_write_it(
    killable_node: Node, unique: str, users: Users, caplog: pytest.LogCaptureFixture
) -> None:
    """Taken away while the subscriber runs: the log says which, and the event is not lost."""
    exchange, queue = f"{unique}-x", f"{unique}-q"
    role = "Subscriber without retries"
    permissions = documented(role, exchange, queue)
    (url,) = users.make(permissions)

    def handle(event: DomainEvent) -> None:
        raise Reject("no")

    subscriber = Subscriber(url, exchange)
    subscriber.register(handle, queue, ["#"])
    users.set(url, permissions.without("write", "amq.default"))
    with consuming(subscriber, killable_node.url, queue):
        publish(killable_node.url, exchange)
        wait_until(lambda: "may not write to the exchange 'amq.default'" in caplog.text)
        users.set(url, permissions)
        wait_until(lambda: onlooker.count(killable_node.url, f"{queue}-dl") == 1)


# --- credentials ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replaced", "by", "words"),
    [
        ("guest:guest", "guest:hunter2", "password is wrong"),
        ("guest:guest", "nobody:hunter2", "password is wrong"),
        ("%2F", "no-such-vhost", "vhost does not exist"),
    ],
)
def test_wrong_address_is_told_at_once(
    broker_url: str,
    replaced: str,
    by: str,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not retried until the deadline; and no password in error, cause, log or repr."""
    url = broker_url.replace(replaced, by)
    event = DomainEvent("user.registered", {})
    with caplog.at_level(logging.DEBUG, "domain_events"), Publisher(url) as publisher:
        for _ in range(2):  # each call asks anew
            with pytest.raises(ConfigurationError, match=words) as caught:
                publisher.publish(event, timeout=30)
        with pytest.raises(ConfigurationError, match=words):
            publisher.publish_many([event], timeout=30)
        with Subscriber(url, timeout=30) as subscriber:
            with pytest.raises(ConfigurationError, match=words):
                subscriber.register(print, "nothing", ["#"])
            told = f"{caught.value!r} {caught.value.__cause__!r} {caplog.text} {vars(subscriber)}"
        assert "hunter2" not in told + repr(publisher) + str(vars(publisher))


SECRET = "s3cr3t-hunter2"


def told_by(error: BaseException | None) -> str:
    """All that can be seen of an error: text, repr, traceback, and those of its causes."""
    told = ""
    if error is not None:
        told += "".join(traceback.format_exception(error)) + f"{error} {error!r} {error.args!r}"
        told += told_by(error.__cause__) + told_by(error.__context__)
    return told


@pytest.mark.parametrize(
    "change",
    [
        ("guest:", "nobody:"),
        ("%2F", "no-such-vhost"),
        ("127.0.0.1", "no-such-host.invalid"),
        ("127.0.0.1", "127.0.0.1:bad"),
        ("%2F", "%2F?no_such_option=1"),
        ("@", "/@"),
        ("amqp:", "http:"),
        ("amqp:", "amqps:"),
        (":{port}/", ":1/"),
        ("", ""),
    ],
)
def test_password_is_nowhere_to_be_seen(
    killable_node: Node, unique: str, change: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Not in logs (all at DEBUG), errors, their causes, tracebacks, reprs; right or wrong."""
    before, after = (part.format(port=killable_node.port) for part in change)
    base = killable_node.url.replace("guest:guest", f"guest:{SECRET}")
    url = base.replace(before, after) if before else base
    told = ""
    pika_log = logging.getLogger("pika")
    level = pika_log.level
    pika_log.setLevel(logging.DEBUG)
    try:
        with caplog.at_level(logging.DEBUG):
            for use in (use_publisher, use_subscriber, use_dead_letters):
                with pytest.raises(DomainEventsError) as caught:
                    use(url, unique)
                told += told_by(caught.value)
    finally:
        pika_log.setLevel(level)
    seen = caplog.text + "".join(repr(record.args) for record in caplog.records)
    assert "hunter2" not in told
    assert "hunter2" not in seen


def use_publisher(url: str, name: str) -> None:
    with Publisher(url, name, timeout=2) as publisher:
        assert SECRET not in repr(publisher)
        publisher.publish(DomainEvent("a.b", {}))


def use_subscriber(url: str, name: str) -> None:
    with Subscriber(url, name, timeout=2) as subscriber:
        assert SECRET not in repr(subscriber)
        subscriber.register(print, name, ["#"])


def use_dead_letters(url: str, name: str) -> None:
    with DeadLetters(name, url, timeout=2) as dead_letters:
        assert SECRET not in repr(dead_letters)
        dead_letters.count()


@pytest.mark.parametrize("password", [SECRET, "hunter2"])
def test_password_is_not_printed_by_the_command(
    killable_node: Node, users: Users, password: str
) -> None:
    """Neither the wrong one that fails nor the right one that works."""
    (right,) = users.make(ALL)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "domain_events",
            "demo",
            "--broker",
            right.replace("hunter2", password),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode == 0) == (password == "hunter2"), done.stderr
    assert done.stdout + done.stderr
    assert "hunter2" not in done.stdout + done.stderr


def arguments_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# The form of the argument does not depend on the program that is given it.
@pytest.mark.parametrize(
    ("program", "form"),
    [
        ("-m domain_events", ["--broker", "{}"]),
        ("-m domain_events", ["--broker={}"]),
        ("-m domain_events", ["--brok", "{}"]),
        ("{}/domain-events", ["--broker", "{}"]),
    ],
)
def test_password_does_not_stay_in_the_list_of_processes(
    killable_node: Node, users: Users, form: list[str], program: str
) -> None:
    """Given as an argument, it moves to the environment before a connection is made."""
    (url,) = users.make(ALL)
    words = program.format(Path(sys.executable).parent).split()
    with subprocess.Popen(
        [sys.executable, *words, "demo", *(word.format(url) for word in form)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        seen = ""
        for line in demo.stdout:
            assert b"hunter2" not in arguments_of(demo.pid)
            seen += line
    assert demo.returncode == 0, seen
    assert "12.50 is booked" in seen
    assert "hunter2" not in seen


def test_demo_takes_the_brokers_url_from_the_environment(killable_node: Node) -> None:
    """`--broker` without a value."""
    done = subprocess.run(
        [sys.executable, "-m", "domain_events", "demo", "--broker"],
        env={**os.environ, "DOMAIN_EVENTS_URL": killable_node.url},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert f"amqp://guest@127.0.0.1:{killable_node.port}/" in done.stdout
    assert "12.50 is booked" in done.stdout


# --- the current folder --------------------------------------------------------------------------


# What the library and pika import, and Python has not imported by itself.
STRANGERS = (
    "pika",
    "json",
    "logging",
    "ssl",
    "queue",
    "argparse",
    "socket",
    "urllib",
    "uuid",
    "ast",
)


# Python's options decide how the command is started, and its arguments what it starts itself.
@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["-m"], ["demo"]),
        (["-m"], ["demo", "--broker"]),
        (["-m"], ["demo", "--broker", "{}"]),
        (["-um"], ["demo", "--broker", "{}"]),
        (["-X", "utf8", "-W", "default", "-m"], ["demo", "--broker", "{}"]),
    ],
)
@pytest.mark.usefixtures("demo_alone")
def test_nothing_of_the_current_folder_is_run(
    broker_url: str, tmp_path: Path, options: list[str], arguments: list[str]
) -> None:
    """Where `python -m` would look first: neither by the command itself nor by what it starts."""
    for name in STRANGERS:
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'run')!r}, 'a').write('{name} ')"
        )
    done = subprocess.run(
        [
            sys.executable,
            *options,
            "domain_events",
            *(word.format(broker_url) for word in arguments),
        ],
        cwd=tmp_path,
        env={**os.environ, "DOMAIN_EVENTS_URL": broker_url},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert not (tmp_path / "run").exists(), (tmp_path / "run").read_text()
    assert done.returncode == 0, done.stderr
    assert "12.50 is booked" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "service"],
        ["-m", "package", "domain_events"],
        ["-W", "default", "-mpackage"],
        ["-m", "service", "-m", "domain_events"],
        ["service.py"],
        ["-c", "import service"],
    ],
)
def test_program_of_somebody_else_keeps_its_path(tmp_path: Path, command: list[str]) -> None:
    """It may import the library first and its own modules afterwards."""
    (tmp_path / "service.py").write_text("import domain_events, mine\nprint(mine.__file__)\n")
    (tmp_path / "mine.py").touch()
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("import domain_events")
    (package / "__main__.py").write_text("import mine\nprint(mine.__file__)\n")
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(tmp_path / "mine.py"), done.stderr


def test_demo_leaves_the_process_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """The default broker, and what is logged."""
    configure("amqp://somewhere.invalid/")
    try:
        demo.run()
        assert settings.resolve() == ("amqp://somewhere.invalid/",)
        assert logging.root.manager.disable == logging.NOTSET
        assert not caplog.records
    finally:
        configure()
