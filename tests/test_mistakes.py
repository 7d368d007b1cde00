"""Mistakes, typed as a new user would: each is answered at its place, with what to do instead.

That is: an error of the right kind whose text names the option, its value, and what is right; or,
where it may be meant, a warning in the log.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import AsyncMock

import onlooker
import pytest
from bench import Bench, Events
from support import Names, wait_until

import domain_events
from domain_events import (
    Backoff,
    BrokerUnavailable,
    ConfigurationError,
    DeadLetters,
    DomainEvent,
    InvalidEvent,
    Publisher,
    Reject,
    Retry,
    Subscriber,
    Undelivered,
    close_publishers,
    configure,
    publish_domain_event,
    replay_all,
    replay_event,
    settings,
)

SECRET = "S3cr3t"


def nop(event: DomainEvent) -> None:
    """A handler."""


async def coroutine(event: DomainEvent) -> None:
    """A handler that runs nothing when it is called."""


def generator(event: DomainEvent) -> Iterator[None]:
    yield


async def async_generator(event: DomainEvent) -> AsyncIterator[None]:
    yield


class Service:
    """Handlers as they are written in a class."""

    async def coroutine(self, event: DomainEvent) -> None: ...

    def generator(self, event: DomainEvent) -> Iterator[None]:
        yield


class CalledAsync:
    async def __call__(self, event: DomainEvent) -> None: ...


class Called:
    def __init__(self, event: object = None) -> None: ...

    def __call__(self, event: DomainEvent) -> None: ...


def decorated(handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(handler)
    async def wrapper(event: DomainEvent) -> None:
        await handler(event)

    return wrapper


class Url:
    """A URL of another library, as pydantic's AmqpDsn or yarl's URL: no str, but it has one."""

    def __str__(self) -> str:
        return f"amqp://user:{SECRET}@host"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each mistake is the first one of its process."""
    for name in settings.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    settings._switched_off.clear()
    settings._warned.clear()
    configure()
    yield
    close_publishers()
    configure()


# ------------------------------------------------------------------ the broker's URL

URLS: list[tuple[str, list[str]]] = [
    ("http://localhost:15672", ["http://", "management interface", "amqp://user:password@host"]),
    ("https://host/", ["management interface", "amqps://"]),
    ("redis://localhost", ["scheme is unknown", "amqp://"]),
    ("pyamqp://guest@localhost//", ["scheme is unknown", "amqp://"]),
    ("localhost", ["no scheme", "amqp://"]),
    ("localhost:5672", ["no scheme", "amqp://"]),
    (f"guest:{SECRET}@localhost:5672/%2F", ["no scheme", "amqp://"]),
    ("amqp:/host", ["no scheme", "amqp://"]),
    (f"amqp://user:pa/{SECRET}@host:5672/v", ["'/'", "%2F", "quote"]),
    (f"amqp://user:12/{SECRET}@host:5672/v", ["'/'", "%2F", "quote"]),
    (f"amqp://user:pa#{SECRET}@host:5672/v", ["'#'", "%23", "quote"]),
    (f"amqp://user:pa?{SECRET}@host:5672/v", ["'?'", "%3F", "quote"]),
    ("amqp://host/v#part", ["'#'", "%23"]),
    ("amqp://host//", ["'//'", "Celery", "%2F"]),
    ("amqp://host//v", ["vhost contains a '/'", "%2F"]),
    ("amqp://host/a/b", ["vhost contains a '/'", "%2F"]),
    ("amqp://host/v/", ["vhost contains a '/'", "otherwise remove it"]),
    (f"amqp://user:{SECRET}", ["port must be a number", "host:5672"]),
    ("amqp://host:0/", ["port must be a number from 1 to 65,535"]),
    ("amqp://host:70000/", ["port must be a number from 1 to 65,535"]),
    ("amqp://one,two:5672/", ["several hosts", "amqp://one,amqp://two"]),
    ("amqp://::1/", ["IPv6", "[::1]"]),
    ("amqp://my host/", ["space", "percent-encode"]),
    ("'amqp://host/'", ["must begin with amqp://"]),
    ("amqp://user@host", ["no password", "user:password@"]),
    ("amqp://host/?hearbeat=30", ["'hearbeat'", "did you mean 'heartbeat'?"]),
    ("amqp://host/?Heartbeat=30", ["'Heartbeat'", "did you mean 'heartbeat'?"]),
    ("amqp://host/?timeout=30", ["unknown option", "socket_timeout"]),
    (f"amqp://user:pw@host?{SECRET}", ["unknown option (or a bare '?'). The options are "]),
    *(
        (
            f"amqp://host/?heartbeat={value}",
            ["'heartbeat' must be a whole number from 0 to 65,535."],
        )
        for value in ("thirty", "-1", "", "70000", "2.5", "1e400", SECRET)
    ),
    ("amqp://host/?channel_max=0", ["'channel_max' must be a whole number from 1 to 65,535."]),
    ("amqp://host/?channel_max=65536", ["'channel_max'", "from 1 to 65,535."]),
    ("amqp://host/?frame_max=1024", ["'frame_max'", "from 4,096 to 131,072."]),
    ("amqp://host/?frame_max=131073", ["'frame_max'", "from 4,096 to 131,072."]),
    ("amqp://host/?connection_attempts=0", ["'connection_attempts'", "from 1"]),
    *(
        (f"amqp://host/?socket_timeout={value}", ["'socket_timeout'", "seconds, more than 0."])
        for value in ("0", "-1", "nan", "inf", "", "1e300", SECRET)
    ),
    ("amqp://host/?stack_timeout=0", ["'stack_timeout'", "more than 0."]),
    ("amqp://host/?retry_delay=-1", ["'retry_delay'", "0 or more."]),
    *(
        (f"amqp://host/?{name}={value}", [f"'{name}' must be a dict"])
        for name in ("client_properties", "tcp_options", "ssl_options")
        for value in ("{", "5", "None", "[1]", "{1:2}", "'x'", SECRET)
    ),
    ("amqps://host/?ssl_options={}", ["'ssl_options' is an empty dict", "amqps://"]),
    (
        "amqps://host/?ssl_options={'ca_cert':'/x'}",
        ["'ca_cert'; did you mean 'ca_certs'?", "The keys are ca_certs, "],
    ),
    (f"amqps://host/?ssl_options={{'{SECRET}':1}}", ["an unknown key. The keys are ca"]),
    *(
        (
            f"amqps://host/?ssl_options={{'{name}':'/no/such'}}",
            [f"'{name}'", "does not exist: /no/such."],
        )
        for name in ("ca_certs", "certfile", "keyfile")
    ),
    (f"amqps://host/?ssl_options={{'keyfile':'{__file__}'}}", ["'keyfile' and no 'certfile'"]),
    ("amqps://host/?TLS_VERIFY=no", ["'TLS_VERIFY'; did you mean 'tls_verify'?"]),
    ("amqps://host/?tls_verify=No", ["'tls_verify' must be 'yes' or 'no'"]),
    ("amqp://host/?tls_verify=no", ["tls_verify=no is for amqps://", "does not use TLS"]),
    ("amqp://host/?tls_verify=yes", ["tls_verify=yes is for amqps://", "does not use TLS"]),
    ("amqp://host?ssl=true", ["unknown option", "The options are"]),
    (f"amqp://{'u' * 256}:{SECRET}@host", ["user is longer than 255 bytes"]),
    (f"amqp://u:{SECRET}{'p' * 250}@host", ["password is longer than 255 bytes"]),
    (f"amqp://host/{'%C3%A9' * 128}", ["vhost is longer than 255 bytes"]),
    ("amqp://host/%ff", ["vhost cannot be decoded", "UTF-8"]),
    (f"amqp://u%ff:{SECRET}@host", ["user cannot be decoded", "UTF-8"]),
    (f"amqp://{'h' * 64}/", ["host is not a valid host name", "63"]),
    ("amqp://a..b/", ["host is not a valid host name"]),
    ("amqp://a$b/", ["host is not a valid host name"]),
    (f"amqp://u:{SECRET}@[h]", ["not an IPv6 address", "amqp://[::1]:5672"]),
    (f"amqp://u:{SECRET}@a;amqp://b", ["','", "';'", "amqp://one,amqp://two"]),
    (f"memory://u:{SECRET}@x", ["memory:// or memory://NAME"]),
    (f"amqp://u:{SECRET}@a,amqps://b", ["only some of them use TLS"]),
    (f"amqps://u:{SECRET}@a,memory://b", ["must be the only one"]),
    ("memory://a,memory://b", ["must be the only one"]),
    ("amqp://host/?heartbeat=3&heartbeat=4", ["'heartbeat'", "twice"]),
    ("amqp://host/?locale=", ["'locale'", "no value"]),
    ("amqp://good,localhost", ["several hosts"]),
    ("amqp://good,http://localhost", ["management interface"]),
]


@pytest.mark.parametrize(("url", "words"), URLS, ids=[url for url, _ in URLS])
def test_wrong_url_is_told_where_it_is_given(
    url: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By everything that takes one; each has its own words, and the password is not shown."""
    monkeypatch.setenv("AMQP_URL", f'"{url}"' if "'" not in url else url)
    takers: list[Callable[[], object]] = [
        lambda: configure(url),
        lambda: Publisher(url),
        lambda: Publisher([url]),
        lambda: Subscriber(url),
        lambda: DeadLetters("mail", url),
        lambda: publish_domain_event("a.b", {}, connection_settings=url),
        lambda: replay_all("mail", connection_settings=url),
    ]
    if not url.startswith("'"):  # around a variable they are taken off
        takers.append(Publisher)
    for take in takers:
        with pytest.raises(ConfigurationError) as caught:
            take()
        for word in [*words, "connection_settings"]:
            assert word in str(caught.value)
        assert SECRET not in str(caught.value)
        assert ("variable AMQP_URL" in str(caught.value)) == (take is Publisher)


@pytest.mark.parametrize(
    "url",
    [
        "amqp://",
        "amqp://host",
        "amqp://host/",
        "amqp://user:@host",
        "AMQP://user:p%2F%40ss@host:5672/%2F",
        "amqp://user:p@ss@host/v",
        "amqp://user:p:ss@host/v",
        "amqps://[::1]:5671/v.1?heartbeat=0&socket_timeout=2.5",
        "amqp://u:p@host/v?client_properties={'connection_name':'a@b'}",
        "amqp://a,amqp://b",
        "memory://",
        "memory://a.b-c/",
        "amqp://rabbit_1.cluster-x.local.:5672",
        "amqp://[fe80::1%25eth0]",
        f"amqp://{'u' * 255}:{'p' * 255}@host/{'v' * 255}",
        "amqps://host?tls_verify=yes&retry_delay=0&frame_max=131072&channel_max=65535",
        "amqp://host?tcp_options={'TCP_KEEPIDLE':60}&locale=en_US&blocked_connection_timeout=0",
        " amqp://host\n",
    ],
)
def test_url_that_works_is_taken(url: str) -> None:
    """A slash at the end is the vhost ``/``, and an @ in a password is what it looks like."""
    configure(url)
    Publisher(url)


@pytest.mark.parametrize(
    "given", [Url(), Path("amqp://host"), b"amqp://host", {"host": "x"}, 5, [Url()], {"amqp://a"}]
)
def test_url_of_another_type_is_told_with_the_way_out(given: Any) -> None:
    """``str(url)``; what it is, is named by its type alone."""
    for take in (configure, Publisher, Subscriber, lambda url: DeadLetters("mail", url)):
        with pytest.raises(ConfigurationError) as caught:
            take(given)
        kind = type(given[0] if isinstance(given, list) else given).__name__
        for word in ("connection_settings", kind, "str(url)"):
            assert word in str(caught.value)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("value", ["", "  ", '""', "'amqp://h'", ' "amqp://h" ', "amqp://h\n"])
def test_variable_may_have_spaces_and_quotes(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files of environment variables keep them; without anything else it is not set."""
    monkeypatch.setenv("AMQP_URL", value)
    expected = "amqp://h" if "amqp" in value else settings.FALLBACK
    assert settings.resolve() == (expected,)


@pytest.mark.parametrize(
    "app_id", [5, "x" * 256, "\ud800", b"shop", ["shop"]], ids=lambda value: repr(value)[:9]
)
def test_wrong_app_id_is_told(app_id: Any) -> None:
    """With what is right; and nothing is configured."""
    with pytest.raises(ConfigurationError, match="app_id must be a str of at most 255 bytes"):
        configure("memory://x", app_id=app_id)
    assert settings.resolve() == (settings.FALLBACK,)


@pytest.mark.parametrize(
    ("urls", "words"),
    [
        ([f"amqps://u:{SECRET}@a", "amqp://b"], "amqps://u@a, amqp://b: only some of them use TLS"),
        (["amqp://a?ssl_options={'ciphers':'x'}", "amqp://b"], "only some of them use TLS"),
        (["memory://a", "amqp://b"], "must be the only one"),
        ([], "is an empty sequence; give at least one"),
    ],
)
def test_urls_that_do_not_go_together_are_told_where_they_are_given(
    urls: list[str], words: str
) -> None:
    """Also by configure, and not at the first use."""
    for take in (configure, Publisher, Subscriber, lambda urls: DeadLetters("mail", urls)):
        with pytest.raises(ConfigurationError) as caught:
            take(urls)
        assert words in str(caught.value)
        assert SECRET not in str(caught.value)


# ------------------------------------------------------------------ switched off


USES: list[Callable[[], object]] = [
    lambda: publish_domain_event("a.b", {}),
    lambda: publish_domain_event("a.b", {}, mandatory=True),
    lambda: Publisher().publish_many([DomainEvent("a.b", {})]),
    lambda: Subscriber().register(nop, "mail", ["#"]),
    lambda: Subscriber().start_consuming(),
    lambda: list(DeadLetters("mail")),
    lambda: replay_all("mail"),
]


@pytest.mark.parametrize("use", USES)
def test_none_is_said_once_at_the_first_use(
    use: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    """As a warning that names the place where it was given; not before it matters."""
    configure(None)
    line = sys._getframe().f_lineno - 1
    Publisher()
    Subscriber()
    assert not caplog.records
    for each in (use, *USES):
        each()
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    text = said[0].getMessage()
    assert f"given to configure() in {__file__}, line {line})" in text
    assert "connection_settings is None" in text
    assert "switched off" in text


def test_none_as_an_argument_is_said_too(caplog: pytest.LogCaptureFixture) -> None:
    """Also where the process's default is a broker; and of `configure`, when that comes later."""
    publisher = Publisher(None)
    line = sys._getframe().f_lineno - 1
    publisher.publish(DomainEvent("a.b", {}), mandatory=True)
    publisher.publish(DomainEvent("a.b", {}))
    assert caplog.text.count("switched off") == 1
    assert f"given as an argument in {__file__}, line {line})" in caplog.text
    configure(None)
    publish_domain_event("a.b", {})
    assert caplog.text.count("switched off") == 2
    configure(None)  # is a decision of its own
    publish_domain_event("a.b", {})
    assert caplog.text.count("switched off") == 3


def test_variable_that_is_not_set_is_noticed_by_whoever_runs_the_program() -> None:
    """Without any logging set up, on standard error; the program ends with status 0."""
    program = """
        import os
        from domain_events import Subscriber, configure
        configure(os.environ.get('AMPQ_URL'))
        subscriber = Subscriber()
        subscriber.register(print, 'mail', ['user.*'])
        subscriber.start_consuming()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert "connection_settings is None (given to configure() in <string>, line 4)" in done.stderr
    assert done.stderr.count("switched off") == 1


# ------------------------------------------------------------------ the broker


def test_broker_that_cannot_be_used_is_told(
    broker_url: str, names: Names, unused_port: int
) -> None:
    """Down, another protocol's port, unknown vhost, wrong password."""
    down = f"amqp://guest:guest@127.0.0.1:{unused_port}/%2F"
    with Publisher(down, timeout=0.5) as publisher, pytest.raises(BrokerUnavailable) as unavailable:
        publisher.publish(DomainEvent("a.b", {}))
    assert "connection refused" in str(unavailable.value)
    for wrong, by, word in [
        ("%2F", "no-such-vhost", "no-such-vhost"),
        ("guest:guest", f"guest:{SECRET}", "password is wrong"),
    ]:
        url = broker_url.replace(wrong, by)
        with Publisher(url) as publisher, pytest.raises(ConfigurationError, match=word) as caught:
            publisher.publish(DomainEvent("a.b", {}))
        assert "Cannot connect to amqp://guest@127.0.0.1" in str(caught.value)
        with Subscriber(url) as subscriber, pytest.raises(ConfigurationError, match=word):
            subscriber.register(nop, names.queue(), ["#"])


# ------------------------------------------------------------------ a publisher, a subscriber

WAITS = [0, -1, None, "10", True, float("nan"), float("inf"), timedelta(seconds=5), Decimal(5)]


@pytest.mark.parametrize("timeout", WAITS, ids=repr)
def test_wrong_timeout_is_told(timeout: Any, broker_url: str) -> None:
    """With the option, the value and what is right, before anything is connected."""
    event = DomainEvent("a.b", {})
    subscriber = Subscriber(broker_url)
    takers: list[Callable[[], object]] = [
        lambda: Publisher(broker_url, timeout=timeout),
        lambda: Subscriber(broker_url, timeout=timeout),
        lambda: DeadLetters("mail", broker_url, timeout=timeout),
        lambda: close_publishers(timeout=timeout),
    ]
    if timeout is not None:  # there it is the default
        takers += [
            lambda: publish_domain_event("a.b", {}, timeout=timeout),
            lambda: Publisher(broker_url).publish(event, timeout=timeout),
        ]
    if timeout not in (None, 0):
        takers.append(lambda: subscriber.start_consuming(timeout=timeout))
    for take in takers:
        with pytest.raises(ConfigurationError, match=r"timeout .*positive number of seconds, not"):
            take()


@pytest.mark.parametrize(
    ("kind", "option", "value", "words"),
    [
        (Subscriber, "workers", 0, "workers must be an int from 1 to 1,000, not 0"),
        (Subscriber, "workers", "4", "not '4' (of type str)"),
        (Subscriber, "workers", True, "not True"),
        (Subscriber, "workers", 2.0, "not 2.0"),
        (Subscriber, "workers", None, "not None"),
        (Subscriber, "workers", 100_000, "from 1 to 1,000"),
        (Subscriber, "exchange_type", "topik", "one of 'topic', 'direct', 'fanout', 'headers'"),
        (Subscriber, "exchange_type", None, "exchange_type must be one of 'topic'"),
        (Publisher, "exchange_type", "Topic", "exchange_type must be one of 'topic'"),
        (Publisher, "exchange_type", 5, "exchange_type must be one of 'topic'"),
        (Publisher, "exchange", "", "The exchange needs a name"),
        (Publisher, "exchange", None, "The exchange needs a name"),
        (Publisher, "exchange", b"x", "The exchange needs a name"),
        (Subscriber, "exchange", "amq.topic", "names are reserved; choose another one"),
        (Subscriber, "exchange", "events.*", "wildcards belong in binding_keys"),
        (Subscriber, "exchange", "events ", "begins or ends with whitespace"),
    ],
)
def test_wrong_option_of_a_constructor_is_told(
    kind: Any, option: str, value: object, words: str
) -> None:
    """No connection is needed for it."""
    with pytest.raises(ConfigurationError) as caught:
        kind("amqp://nowhere.invalid", **{option: value})
    assert words in str(caught.value)


def test_exchange_of_a_plug_ins_type_is_the_brokers_to_judge() -> None:
    """Its type begins with ``x-``; any number of them may be installed."""
    Publisher("amqp://host", exchange_type="x-consistent-hash")  # type: ignore[arg-type]


def register_with(option: str, value: object) -> None:
    arguments: Any = {"handler": nop, "name": "x", "binding_keys": ["#"], option: value}
    Subscriber("memory://").register(**arguments)


URL = f"amqp://guest:{SECRET}@localhost:5672/%2F"
PLACES: dict[str, tuple[type[Exception], Callable[[Any], object]]] = {
    "replay_all, callback": (ConfigurationError, lambda url: replay_all("x", url)),
    "replay_event, callback": (ConfigurationError, lambda url: replay_event("x", url)),
    "replay_all, name": (ConfigurationError, replay_all),
    "DeadLetters": (ConfigurationError, lambda url: DeadLetters(url, url)),
    "DeadLetters, timeout": (ConfigurationError, lambda url: DeadLetters("x", timeout=url)),
    "Undelivered": (ConfigurationError, Undelivered),
    "hand_back_all": (ConfigurationError, lambda url: Undelivered().hand_back_all(url)),
    "hand_back_all, list": (ConfigurationError, lambda url: Undelivered().hand_back_all([url])),
    "Publisher, timeout": (ConfigurationError, lambda url: Publisher("memory://", timeout=url)),
    "Publisher, exchange": (ConfigurationError, lambda url: Publisher("memory://", url)),
    "Publisher, type": (ConfigurationError, lambda url: Publisher("memory://", "x", url)),
    "Publisher.close": (ConfigurationError, lambda url: Publisher("memory://").close(url)),
    "publish, timeout": (
        ConfigurationError,
        lambda url: publish_domain_event("a.b", {}, connection_settings="memory://x", timeout=url),
    ),
    "publish, exchange": (
        ConfigurationError,
        lambda url: publish_domain_event("a.b", {}, connection_settings="memory://x", exchange=url),
    ),
    "Subscriber, workers": (ConfigurationError, lambda url: Subscriber("memory://", workers=url)),
    "Subscriber, exchange": (ConfigurationError, lambda url: Subscriber("memory://", url)),
    "start_consuming": (
        ConfigurationError,
        lambda url: Subscriber("memory://").start_consuming(url),
    ),
    "close_publishers": (ConfigurationError, close_publishers),
    "configure": (ConfigurationError, lambda url: configure(app_id=url)),
    "configure, long": (ConfigurationError, lambda url: configure(app_id=f"{url}" * 10)),
    "Retry": (ValueError, Retry),
    "Backoff.first": (ValueError, Backoff),
    "Backoff.factor": (ValueError, lambda url: Backoff(factor=url)),
    "Backoff.jitter": (ValueError, lambda url: Backoff(jitter=url)),
    **{
        f"register, {option}": (ConfigurationError, functools.partial(register_with, option))
        for option in (
            *("handler", "name", "binding_keys", "dead_letter", "durable", "max_retries"),
            *("retry_on", "backoff", "queue_type", "prefetch_count", "ordered", "retired_keys"),
        )
    },
    "register, a key": (
        ConfigurationError,
        lambda url: Subscriber("memory://").register(nop, "x", [f"a.{url}*"]),
    ),
}


@pytest.mark.parametrize(
    "given", [URL, [URL], (f"{URL},{URL}",), {URL: 1}, "x" * 90 + URL], ids=repr
)
@pytest.mark.parametrize("place", PLACES)
def test_url_in_another_place_is_told_without_its_password(place: str, given: Any) -> None:
    """Alone, in something else, and behind what is shown at most."""
    if not isinstance(given, str) and place in ("hand_back_all, list", "register, a key"):
        given = given[0] if isinstance(given, list | tuple) else URL
    kind, take = PLACES[place]
    if place in ("register, binding_keys", "register, retired_keys", "hand_back_all"):
        given = URL
    with pytest.raises(kind) as caught:
        take(given)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)
    if given == URL:
        assert "amqp://guest@localhost:5672/%2F" in str(caught.value) or place == "configure, long"


def test_url_for_a_name_is_told_with_the_right_call() -> None:
    """Arguments that are swapped."""
    for make in (DeadLetters, replay_all, replay_event):
        with pytest.raises(ConfigurationError, match=r"DeadLetters\(name, connection_settings\)"):
            make(URL)
    with pytest.raises(ConfigurationError, match=r"Undelivered\(exchange, connection_settings\)"):
        Undelivered(URL)


class Registered(NamedTuple):
    """What is wrong in a call of register, and what the answer says."""

    wrong: dict[str, Any]
    words: list[str]


REGISTERED: dict[str, Registered] = {
    "string for binding_keys": Registered(
        {"binding_keys": "user.*"}, ["binding_keys must be a list", "give ['user.*']"]
    ),
    "bytes for binding_keys": Registered(
        {"binding_keys": b"user.*"}, ["binding_keys must be a list", "['user.*']"]
    ),
    "binding_keys None": Registered(
        {"binding_keys": None}, ["binding_keys must be a list", "not None", "['#'] for all"]
    ),
    "binding_keys 5": Registered({"binding_keys": 5}, ["binding_keys must be a list", "not 5"]),
    "no binding_keys": Registered({"binding_keys": []}, ["binding_keys is empty", "'user.*'"]),
    "a key of None": Registered({"binding_keys": ["a", None]}, ["must be a str", "not None"]),
    "a key of bytes": Registered({"binding_keys": [b"a.b"]}, ["must be a str", "type bytes"]),
    "a list of lists": Registered({"binding_keys": [["a.b"]]}, ["must be a str", "type list"]),
    "an empty key": Registered({"binding_keys": [""]}, ["is empty", "'#' for all"]),
    "half a surrogate": Registered({"binding_keys": ["\ud800"]}, ["valid Unicode"]),
    "a long key": Registered({"binding_keys": ["x" * 256]}, ["at most 255 bytes"]),
    "user*": Registered({"binding_keys": ["user*"]}, ["'user*'", "'user.*'", "'user.#'"]),
    "user.reg*": Registered({"binding_keys": ["user.reg*"]}, ["'reg*'", "'user.reg.*'"]),
    "**": Registered({"binding_keys": ["**"]}, ["whole words", "'user.#'"]),
    "user.#x": Registered({"binding_keys": ["user.#x"]}, ["'#x'", "whole words"]),
    "*.user*": Registered({"binding_keys": ["*.user*"]}, ["'user*'", "'*.user.*'"]),
    "a..b": Registered({"binding_keys": ["a..b"]}, ["'a..b'", "empty word"]),
    ".a": Registered({"binding_keys": [".a"]}, ["'.a'", "empty word"]),
    "user.": Registered({"binding_keys": ["user."]}, ["'user.'", "empty word"]),
    "a space before": Registered({"binding_keys": [" user.x"]}, ["' user.x'", "space"]),
    **{
        key: Registered({"binding_keys": [key]}, [f"{found!r} in it", "'*' stands for one word"])
        for key, found in {
            "user.?": "?",
            "user.%": "%",
            "user.{a,b}": "{a,b}",
            "user.[ab]": "[ab]",
        }.items()
    },
    "a space inside": Registered({"binding_keys": ["user x"]}, ["'user x'", "contains whitespace"]),
    "keys in a dict": Registered(
        {"binding_keys": {"user.*": nop}}, ["binding_keys must be a list", "type dict"]
    ),
    "a newline behind": Registered({"binding_keys": ["user.x\n"]}, ["space"]),
    "forgot the name": Registered({"name": ["user.*"]}, ["needs a name", "not ['user.*']"]),
    "name None": Registered({"name": None}, ["needs a name", "not None"]),
    "name empty": Registered({"name": ""}, ["needs a name"]),
    "name of bytes": Registered({"name": b"mail"}, ["needs a name", "str"]),
    "swapped name and keys": Registered(
        {"name": ["user.*"], "binding_keys": "mail"},
        ["swapped", "register(handler, name, binding_keys)", "'mail'"],
    ),
    "swapped handler and name": Registered(
        {"handler": "mail", "name": nop},
        ["'mail'", "swapped", "register(handler, name, binding_keys)"],
    ),
    "name in amq.": Registered({"name": "amq.x"}, ["'amq.x'", "choose another one"]),
    "name with a wildcard": Registered({"name": "a.*"}, ["'a.*'", "binding_keys"]),
    "name with a space behind": Registered({"name": "mail "}, ["'mail '", "space"]),
    "name with a newline": Registered({"name": "a\nb"}, ["control character"]),
    "name too long": Registered({"name": "x" * 208}, ["longer than 207 bytes", "shorter"]),
    "the handler was called": Registered(
        {"handler": None}, ["handler None", "pass the function itself"]
    ),
    "handler without arguments": Registered(
        {"handler": lambda: None}, ["must take one argument, the event", "too many"]
    ),
    "handler with two arguments": Registered(
        {"handler": lambda event, more: None}, ["must take one argument, the event", "'more'"]
    ),
    "handler with a keyword of its own": Registered(
        {"handler": eval("lambda event, *, db: None")}, ["must take one argument", "'db'"]
    ),
    "method of the class": Registered(
        {"handler": Called.__call__}, ["must take one argument", "'event'"]
    ),
    "async handler": Registered({"handler": coroutine}, ["async function", "asyncio.run"]),
    "async method": Registered({"handler": Service().coroutine}, ["async function", "asyncio.run"]),
    "async partial": Registered(
        {"handler": functools.partial(coroutine)}, ["async function", "asyncio.run"]
    ),
    "partial of an async __call__": Registered(
        {"handler": functools.partial(CalledAsync())}, ["async function", "asyncio.run"]
    ),
    "async __call__": Registered({"handler": CalledAsync()}, ["async function", "asyncio.run"]),
    "async staticmethod": Registered(
        {"handler": staticmethod(coroutine)}, ["async function", "asyncio.run"]
    ),
    "wrapped async": Registered({"handler": decorated(nop)}, ["async function", "asyncio.run"]),
    "AsyncMock": Registered({"handler": AsyncMock()}, ["async function", "asyncio.run"]),
    "generator handler": Registered({"handler": generator}, ["generator", "yield"]),
    "generator method": Registered({"handler": Service().generator}, ["generator", "yield"]),
    "async generator handler": Registered({"handler": async_generator}, ["generator", "yield"]),
    "class for an instance": Registered(
        {"handler": Called}, ["is a class", "give an instance: Called()"]
    ),
    "retry_on without max_retries": Registered(
        {"retry_on": ValueError}, ["retry_on", "max_retries, which is 0", "max_retries=3"]
    ),
    "retry_on an instance": Registered(
        {"retry_on": ValueError(), "max_retries": 1}, ["retry_on", "exception classes"]
    ),
    "retry_on an instance with a text": Registered(
        {"retry_on": ValueError("x"), "max_retries": 1},
        ["retry_on", "not ValueError('x') (of type ValueError); give ValueError."],
    ),
    "backoff without retry_on": Registered(
        {"backoff": Backoff(), "max_retries": 3}, ["backoff has no effect without retry_on"]
    ),
    "backoff without max_retries": Registered(
        {"backoff": Backoff()}, ["backoff has no effect without retry_on", "max_retries=3"]
    ),
    "retry_on a name": Registered(
        {"retry_on": "ValueError", "max_retries": 1}, ["retry_on", "exception classes"]
    ),
    "retry_on None": Registered(
        {"retry_on": None, "max_retries": 1}, ["retry_on", "exception classes", "not None"]
    ),
    "retry_on SystemExit": Registered(
        {"retry_on": [SystemExit], "max_retries": 1}, ["retry_on", "exception classes"]
    ),
    "backoff a number": Registered({"backoff": 5}, ["backoff", "Backoff(first=5)", "not 5"]),
    "backoff the class": Registered({"backoff": Backoff}, ["backoff", "Backoff(first=5)"]),
    "max_retries -1": Registered({"max_retries": -1}, ["max_retries", "from 0", "not -1"]),
    "max_retries None": Registered({"max_retries": None}, ["max_retries", "an int", "not None"]),
    "max_retries str": Registered({"max_retries": "3"}, ["max_retries", "'3' (of type str)"]),
    "max_retries True": Registered({"max_retries": True}, ["max_retries", "not True"]),
    "max_retries inf": Registered({"max_retries": float("inf")}, ["max_retries", "an int"]),
    "max_retries 2**31": Registered({"max_retries": 2**31}, ["max_retries", "2,147,483,647"]),
    "prefetch_count 0": Registered({"prefetch_count": 0}, ["prefetch_count", "1 to 65,535"]),
    "prefetch_count 70000": Registered({"prefetch_count": 70_000}, ["65,535", "not 70000"]),
    "prefetch_count str": Registered({"prefetch_count": "9"}, ["prefetch_count", "'9'"]),
    "queue_type stream": Registered(
        {"queue_type": "stream"}, ["queue_type must be 'quorum' or 'classic'", "'stream'"]
    ),
    "queue_type None": Registered({"queue_type": None}, ["queue_type", "'quorum' or 'classic'"]),
    **{
        f"{option} a str": Registered({option: "false"}, [f"{option} must be True or False"])
        for option in ("dead_letter", "durable", "exclusive", "auto_delete", "ordered")
    },
}


@pytest.mark.parametrize("mistake", REGISTERED.values(), ids=REGISTERED)
def test_mistake_in_register_is_told(mistake: Registered, bench: Bench) -> None:
    """At once, before the broker is asked; nothing is registered or declared."""
    name = bench.names.queue()
    with bench.subscriber() as subscriber:
        arguments = {"handler": nop, "name": name, "binding_keys": ["user.*"], **mistake.wrong}
        with pytest.raises(ConfigurationError) as caught:
            subscriber.register(**arguments)
        for word in mistake.words:
            assert word in str(caught.value)
        assert not subscriber.connections.are_open
        with pytest.raises(ConfigurationError, match=r"Nothing is registered.*call register\(\)"):
            subscriber.start_consuming()


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("events.delay.00", ".delay.00"),
        ("others.delay.23", ".delay.23"),
        ("events.undelivered", ".undelivered"),
        ("events.due", ".due"),
        ("mail-dl.walk", ".walk"),
        ("mail-dl", "-dl"),
    ],
)
def test_name_that_the_library_gives_itself_is_told(name: str, end: str) -> None:
    """A subscriber would take what is on its way: retries, dead letters."""
    subscriber = Subscriber("memory://mistakes", "events")
    takers: list[Callable[[], object]] = [
        lambda: subscriber.register(nop, name, ["#"]),
        lambda: Undelivered("events", "memory://mistakes").hand_back_all([name]),
    ]
    if end != ".due":  # of an exchange, which it does not know
        takers.append(lambda: DeadLetters(name, "memory://mistakes"))
    for take in takers:
        with pytest.raises(ConfigurationError) as caught:
            take()
        assert f"The subscriber's name {name!r}" in str(caught.value)
        assert (end if end != "-dl" else "give the subscriber's name, 'mail'") in str(caught.value)
    if end not in ("-dl", ".walk"):
        makers: list[Callable[..., object]] = [
            Publisher,
            Subscriber,
            lambda url, exchange: Undelivered(exchange, url),
            lambda url, exchange: publish_domain_event(
                "a.b", {}, connection_settings=url, exchange=exchange
            ),
        ]
        for make in makers:
            with pytest.raises(ConfigurationError, match=rf"ends in '{end}'"):
                make("memory://mistakes", name)


@pytest.mark.parametrize("name", ["invoice.due", "mail-dlx", "walk", "undelivered", "events.mail"])
def test_name_that_only_looks_like_one_of_the_librarys_is_taken(name: str) -> None:
    """Nothing of ours has it."""
    Subscriber("memory://mistakes", "events").register(nop, name, ["#"])


def annotated_for_type_checkers() -> Any:
    """A handler whose annotation has a name that does not exist at run time."""
    # Until Python 3.14 it must be text, since it is evaluated when the function is defined.
    annotation = "Imported" if sys.version_info >= (3, 14) else "'Imported'"
    names: dict[str, Any] = {}
    code = f"def handle(event: {annotation}): pass"
    exec(compile(code, "a module", "exec", dont_inherit=True), names)
    return names["handle"]


HANDLERS: list[Any] = [
    nop,
    annotated_for_type_checkers(),
    print,
    [].append,
    lambda *events: None,
    lambda event, db=None: None,
    functools.partial(lambda db, event: None, "db"),
    Called(),
    lambda event: asyncio.run(coroutine(event)),
    DomainEvent.__repr__,
    len,
]


@pytest.mark.parametrize("handler", HANDLERS)
def test_handler_that_takes_an_event_is_taken(handler: Any) -> None:
    """Whatever can be called with one argument."""
    Subscriber("memory://mistakes").register(handler, "mail", ["#"])


@pytest.mark.parametrize(
    ("kind", "key"), [("direct", "user*"), ("fanout", "a..b"), ("direct", "a b"), ("fanout", "")]
)
def test_key_is_literal_where_there_are_no_wildcards(kind: Any, key: str) -> None:
    """Only a topic exchange has them."""
    Subscriber("memory://mistakes", f"of-{kind}", kind).register(nop, f"{kind}{key}", [key])


def test_wildcard_on_a_direct_exchange_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """It is a letter there; an event with that key is possible, and hardly meant."""
    subscriber = Subscriber("memory://mistakes", "of-direct", "direct")
    subscriber.register(nop, "wild", ["user.*"])
    assert "not wildcards: user.*" in caplog.text
    keys: Any = (key for key in ["order.*"])  # which can be gone through once
    subscriber.register(nop, "wild too", keys)
    assert "not wildcards: order.*" in caplog.text


def test_decorator_without_its_call_is_told() -> None:
    """``@subscriber.on``, keys in a list, no name."""
    subscriber: Any = Subscriber("memory://mistakes")
    example = r"@subscriber.on\('user.registered', name='welcome-mail'\)"
    for wrong in (
        lambda: subscriber.on(nop),
        lambda: subscriber.on(["user.*"], name="mail"),
        lambda: subscriber.on(None, name="mail"),
        lambda: subscriber.on("user.*"),
        subscriber.on,
    ):
        with pytest.raises(ConfigurationError, match=example):
            wrong()
    with pytest.raises(ConfigurationError, match="binding_keys is empty"):
        subscriber.on(*[], name="mail")(nop)
    with pytest.raises(TypeError, match="prefetch_cout"):
        subscriber.on("user.*", name="mail", prefetch_cout=1)(nop)


def test_two_subscribers_of_one_name_are_warned_of(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """When they would do different things; threads of one subscriber are the same one."""
    name = bench.names.queue()

    def made() -> Callable[[DomainEvent], None]:
        return lambda event: None

    with bench.subscriber() as one, bench.subscriber() as two, bench.subscriber() as three:
        one.register(made(), name, ["a.b", "c"])
        two.register(made(), name, ["c", "a.b"])
        assert name not in caplog.text
        three.register(nop, name, ["a.b", "c"])
        assert f"{name} is registered by two Subscribers of this process" in caplog.text
        assert "Give each a name of its own" in caplog.text
    caplog.clear()
    with bench.subscriber() as four:  # the others are closed
        four.register(nop, name, ["a.b"])
        assert not caplog.text
        with bench.subscriber() as five:
            five.register(nop, name, ["a.c"])
            assert name in caplog.text


def test_same_name_twice_in_one_subscriber_says_what_to_do() -> None:
    """Also when the second one is of another type of text."""

    class Names(str, Enum):
        MAIL = "mail"

    subscriber = Subscriber("memory://mistakes")
    subscriber.register(nop, "mail", ["#"])
    for name in ("mail", Names.MAIL):
        with pytest.raises(ConfigurationError, match=r"mail is registered already.*of its own"):
            subscriber.register(nop, name, ["#"])


# ------------------------------------------------------------------ an event

EVENTS: dict[str, tuple[tuple[Any, ...], list[str]]] = {
    "a set": (("a.b", {1, 2}), ["type set", "sorted(value)", "event.data"]),
    "a set inside": (("a.b", {"x": [{"y": {1}}]}), ["type set", "event.data['x'][0]['y']"]),
    "bytes": (("a.b", {"x": b"1"}), ["type bytes", "base64", "where it is", "event.data['x']"]),
    "an object": (("a.b", SimpleNamespace(id=1)), ["type SimpleNamespace", "to a dict"]),
    "a timedelta": (
        ("a.b", {"x": timedelta(1)}),
        ["type timedelta", "total_seconds()", "event.data['x']"],
    ),
    "a key of two": (("a.b", {"x": {(1, 2): 3}}), ["keys must be str", "event.data['x']"]),
    "NaN": (("a.b", {"x": [1.0, float("nan")]}), ["not JSON", "event.data['x'][1]"]),
    "1 and '1'": (("a.b", {1: "a", "1": "b"}), ["1 and '1'", "lost", "rename"]),
    "no routing key": ((None, {}), ["routing key", "not None", "publish_domain_event('user."]),
    "empty routing key": (("", {}), ["routing key", "not ''", "publish_domain_event('user."]),
    "swapped": (({"secret": SECRET}, "a.b"), ["routing key", "of type dict", "('user.registered'"]),
    "wildcard": (("user.*", {}), ["'user.*'", "wildcard", "binding keys of subscribers"]),
    "float id": (("a.b", {}, 1.5), ["domain_object_id", "a str, an int, a UUID", "type float"]),
    "bool id": (("a.b", {}, True), ["domain_object_id", "type bool", "str(user.id)"]),
    "object as id": (("a.b", {}, SimpleNamespace()), ["domain_object_id", "str(user.id)"]),
    "list as id": (("a.b", {}, [1]), ["domain_object_id", "type list"]),
    "int as uuid": (("a.b", {}, None, 5), ["uuid_string", "of type int"]),
    "datetime": (
        ("a.b", {}, None, None, datetime(2024, 5, 6, tzinfo=timezone.utc)),
        ["timestamp", "Unix seconds", "give its timestamp()"],
    ),
    **{
        f"timestamp {name}": (("a.b", {}, None, None, value), ["timestamp", "Unix seconds"])
        for name, value in {
            "10**400": 10**400,
            "-10**400": -(10**400),
            "inf": float("inf"),
            "nan": float("nan"),
            "10**5000": 10**5000,
            "True": True,
        }.items()
    },
    "text as timestamp": (("a.b", {}, None, None, "now"), ["timestamp", "Unix seconds", "now"]),
}


@pytest.mark.parametrize(("arguments", "words"), EVENTS.values(), ids=EVENTS)
def test_event_that_cannot_be_one_is_told(arguments: tuple[Any, ...], words: list[str]) -> None:
    """With what is right, and where in the data it is; nothing was sent, nothing of it is shown."""
    configure("amqp://nowhere.invalid")
    with pytest.raises(InvalidEvent) as caught:
        publish_domain_event(*arguments)
    for word in words:
        assert word in str(caught.value)
    assert SECRET not in str(caught.value)
    assert isinstance(caught.value.event, DomainEvent)


@pytest.mark.parametrize(
    "key", ["a..b", ".a", "user.", " user.x", "user.x ", "a\nb", "a b", "user*", "x.#y"]
)
def test_odd_routing_key_is_warned_of(key: str, caplog: pytest.LogCaptureFixture) -> None:
    """The broker takes it, and so do we; once for each."""
    domain_events.message._warn_of_mistyped.cache_clear()
    for _ in range(3):
        publish_domain_event(key, {}, connection_settings="memory://mistakes")
    assert caplog.text.count("The routing key") == 1
    assert "user.registered" not in caplog.text
    publish_domain_event("user.registered", {}, connection_settings="memory://mistakes")
    assert caplog.text.count("The routing key") == 1


def test_timestamp_in_milliseconds_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Once, and it is published all the same."""
    domain_events.message._warn_of_milliseconds.cache_clear()
    publish_domain_event("a.b", {}, timestamp=time.time(), connection_settings="memory://mistakes")
    assert not caplog.text
    for _ in range(3):
        publish_domain_event(
            "a.b", {}, timestamp=time.time() * 1000, connection_settings="memory://mistakes"
        )
    assert caplog.text.count("milliseconds") == 1


@pytest.mark.parametrize("retries", [-1, True, None, "1", 1.5])
def test_wrong_retries_of_an_event_are_told(retries: Any) -> None:
    """They are what a test of a handler gives it."""
    with pytest.raises(InvalidEvent, match=f"retries must be an int from 0, not {retries!r}"):
        DomainEvent("a.b", retries=retries)
    assert DomainEvent("a.b", retries=Count.TWO).retries == 2


@pytest.mark.parametrize("given", [{"routing_key": "a.b", "data": {}}, None, 5])
def test_something_else_than_json_is_told(given: Any) -> None:
    """With the way from a dict."""
    with pytest.raises(InvalidEvent, match=rf"{type(given).__name__};.*DomainEvent\(\*\*fields"):
        DomainEvent.from_json(given)


@pytest.mark.parametrize("given", ["no", 1, None])
def test_wrong_mandatory_is_told(given: Any) -> None:
    """'no' would be true."""
    event = DomainEvent("a.b", {})
    with Publisher("memory://mistakes") as publisher:
        for publish in (
            lambda: publisher.publish(event, mandatory=given),
            lambda: publisher.publish_many([event], mandatory=given),
            lambda: publish_domain_event(
                "a.b", {}, mandatory=given, connection_settings="memory://mistakes"
            ),
        ):
            with pytest.raises(ConfigurationError, match="mandatory must be True or False"):
                publish()


@pytest.mark.parametrize("given", [None, 5, "a.b", {"a": 1}, DomainEvent("a.b", {})])
def test_something_else_than_events_is_told(given: Any) -> None:
    """publish_many takes them from an iterable."""
    with Publisher("memory://mistakes") as publisher:
        with pytest.raises(TypeError, match=r"takes an iterable of DomainEvents.*publish"):
            publisher.publish_many(given)
        assert publisher.publish_many(iter([DomainEvent("a.b", {})])) == 1


def test_attribute_of_the_data_is_named() -> None:
    """``event.user_id`` is an item of a dict, or a field of a dataclass."""
    event: Any = DomainEvent("user.registered", {"user_id": 1})
    with pytest.raises(AttributeError, match=r"'user_id'.*event\.data\['user_id'\]"):
        _ = event.user_id
    with pytest.raises(AttributeError, match=r"no attribute 'no_such'$"):
        _ = event.no_such
    with pytest.raises(AttributeError, match=r"event\.data\.first$"):
        _ = DomainEvent("a.b", Backoff()).first  # type: ignore[attr-defined]
    assert not hasattr(event, "user_id")
    with pytest.raises(AttributeError, match="cannot assign to field 'data'"):
        event.data = {}


def test_publishing_is_not_awaited() -> None:
    """An event cannot be awaited, or a handler that returns one would look like a coroutine."""

    async def publish() -> None:
        await publish_domain_event("a.b", {}, connection_settings="memory://mistakes")  # type: ignore[misc]

    with pytest.raises(TypeError, match=r"DomainEvent.*await"):
        asyncio.run(publish())


def test_something_else_than_an_event_is_told() -> None:
    """To publish and publish_many."""
    with Publisher("memory://mistakes") as publisher:
        wrong: Any
        for wrong in ({"a": 1}, "a.b", None):
            with pytest.raises(TypeError, match=r"takes a DomainEvent.*publish_domain_event"):
                publisher.publish(wrong)
            with pytest.raises(TypeError, match=r"DomainEvent"):
                publisher.publish_many([wrong])


@pytest.mark.parametrize("exchange", ["", None, 5, ["x"], "amq.topic", "a.*"])
def test_wrong_exchange_of_a_published_event_is_told(exchange: Any) -> None:
    """As by Publisher."""
    with pytest.raises(ConfigurationError, match="The exchange"):
        publish_domain_event("a.b", {}, connection_settings="memory://x", exchange=exchange)


# ------------------------------------------------------------------ a handler's signals


@pytest.mark.parametrize(
    "delay", ["10", None, True, -1, timedelta(seconds=5), 30 * 24 * 3600], ids=repr
)
def test_wrong_delay_is_told(delay: Any) -> None:
    """Where the retry is made."""
    words = "total_seconds" if isinstance(delay, timedelta) else "19 days"
    for make in (Retry, lambda seconds: Backoff(first=seconds), lambda s: Backoff(maximum=s)):
        with pytest.raises(ValueError, match=words) as caught:
            make(delay)
        assert str(delay) in str(caught.value)


@pytest.mark.parametrize("value", ["2", None, True, 1j, float("nan")], ids=repr)
def test_wrong_factor_or_jitter_is_told(value: Any) -> None:
    """A number, and no other error."""
    with pytest.raises(ValueError, match=r"Backoff.factor must be 1 or more, not"):
        Backoff(factor=value)
    with pytest.raises(ValueError, match=r"Backoff.jitter must be from 0 to 1, not"):
        Backoff(jitter=value)


# ------------------------------------------------------------------ dead letters


@pytest.mark.parametrize("given", [None, "mail", b"mail", 5, [None]])
def test_wrong_names_to_hand_back_to_are_told(given: Any) -> None:
    """Before anything is connected."""
    with pytest.raises(ConfigurationError, match=r"list of names|needs a name"):
        Undelivered(connection_settings="amqp://nowhere.invalid").hand_back_all(given)


def test_text_for_a_delay_is_shown_as_a_text() -> None:
    """In quotes: 5 would be right."""
    with pytest.raises(ValueError, match=r"not '5'\."):
        Backoff("5")  # type: ignore[arg-type]


def test_wrong_use_of_dead_letters_is_told(broker_url: str) -> None:
    """The name, and what decides about each."""
    wrong: Any
    for wrong in ("", None, ["mail"], b"mail"):
        with pytest.raises(ConfigurationError, match="The subscriber needs a name"):
            DeadLetters(wrong, broker_url)
        with pytest.raises(ConfigurationError, match="The subscriber needs a name"):
            replay_all(wrong, connection_settings=broker_url)
    for wrong in ("retry", None, domain_events.RETRY):
        for replay in (replay_all, replay_event):
            with pytest.raises(ConfigurationError, match=r"message_callback.*RETRY, LEAVE"):
                replay("mail", wrong, broker_url)


# ------------------------------------------------------------------ text that is more than a str


class Safe(str):
    """As Django's SafeString, with a str() of its own."""

    __slots__ = ()

    def __str__(self) -> str:
        return "another text"


class Count(IntEnum):
    TWO = 2


class Float(float):
    """As numpy.float64, with a repr of its own."""

    def __repr__(self) -> str:
        return f"np.float64({float(self)})"


def member(text: str) -> Any:
    """A member of ``class E(str, Enum)``."""
    kind: Any = Enum("E", {"MEMBER": text}, type=str)  # type: ignore[misc]
    return kind.MEMBER


@pytest.mark.parametrize("kind", [Safe, member])
def test_text_that_is_more_than_a_str_is_what_it_says(
    kind: Any, broker_url: str, names: Names
) -> None:
    """Names, keys and ids: on the broker, in a retry, in a dead letter and in a replay."""
    exchange, name = names.exchange(), names.queue()
    seen: Events = []
    with Subscriber(broker_url, kind(exchange), kind("topic")) as subscriber:

        def handle(event: DomainEvent) -> None:
            seen.append(event)
            if len(seen) == 1:
                raise Retry(0.1)
            if len(seen) == 2:
                raise Reject("no")
            subscriber.stop_consuming()

        subscriber.register(
            handle, kind(name), [kind("user.*")], max_retries=Count.TWO, queue_type=kind("quorum")
        )
        with Publisher(kind(broker_url), kind(exchange), kind("topic")) as publisher:
            event = publisher.publish(
                DomainEvent(
                    kind("user.x"), {kind("k"): kind("v")}, kind("id"), kind("uuid"), Float(1.5)
                )
            )
        thread = threading.Thread(target=subscriber.start_consuming, args=(30,))
        thread.start()
        wait_until(lambda: onlooker.count(broker_url, f"{name}-dl") == 1)
        assert replay_all(kind(name), connection_settings=kind(broker_url)) == 0
        thread.join(30)
    assert [each.event_data for each in seen] == [
        {
            "routing_key": "user.x",
            "data": {"k": "v"},
            "domain_object_id": "id",
            "uuid_string": "uuid",
            "timestamp": 1.5,
        }
    ] * 3
    assert event == seen[0]
    assert [
        type(each) for each in (event.routing_key, event.domain_object_id, event.timestamp)
    ] == [
        str,
        str,
        float,
    ]
    assert repr(event) == "<DomainEvent 'user.x' uuid, about 'id'>"
    assert onlooker.count(broker_url, f"{exchange}.undelivered") == 0


def test_numbers_that_are_more_are_what_they_count() -> None:
    """An IntEnum, a float of numpy."""
    event = DomainEvent("a.b", {}, Count.TWO, timestamp=Float(2.5))
    assert (type(event.domain_object_id), type(event.timestamp)) == (int, float)
    subscriber = Subscriber("memory://mistakes", workers=Count.TWO, timeout=Float(2.5))
    subscriber.register(nop, "counts", ["#"], prefetch_count=Count.TWO, max_retries=Count.TWO)
    options = subscriber.subscriptions[0].options
    assert [type(each) for each in (options.prefetch_count, options.max_retries)] == [int, int]
    assert (type(subscriber.workers), type(subscriber._timeout)) == (int, float)
    configure("memory://x", app_id=Safe("shop"))
    assert type(settings.app_id()) is str
    assert settings.app_id() == "shop"


# ------------------------------------------------------------------ for a type checker


USER = """
from dataclasses import dataclass
from typing import Any
from domain_events import (
    DeadLetters, DomainEvent, Publisher, Retry, Subscriber, close_publishers, configure,
    publish_domain_event,
)

configure("amqp://host", app_id="shop")
event: DomainEvent = publish_domain_event("user.registered", {"user_id": 1}, exchange="x")
envelope: dict[str, Any] = event.event_data
again = DomainEvent(**envelope)
subscriber = Subscriber(exchange_type="topic", workers=2, timeout=5)

@subscriber.on("user.*", "order.#", name="mail", max_retries=3, retry_on=(OSError,), ordered=True)
def handle(event: DomainEvent) -> None:
    raise Retry(5)

subscriber.register(handle, "audit", ["#"], queue_type="classic", prefetch_count=None)
handle(event)
keys = ["a", "b"]
subscriber.on(*keys, name="keys")(handle)
with DeadLetters("mail") as letters:
    number: int = letters.replay_all()
close_publishers(timeout=1)
"""

MISTYPED = [
    "subscriber.on('a', name='b', prefetch_cout=1)",
    "subscriber.on('a', name='b', max_retries='3')",
    "subscriber.on('a', name='b', queue_type='stream')",
    "subscriber.on('a')",
    "subscriber.on(['a'], name='b')",
    "Subscriber(exchange_type='topik')",
    "Publisher(exchange_type='topik')",
    "Subscriber(workers='4')",
    "event.user_id",
    "event.retries = 1",
    "subscriber.register(handle, 'mail', None)",
    "subscriber.register(print, 'mail', ['#'], queue_type='stream')",
    "publish_domain_event('a.b', {}, 1.5)",
]


@pytest.mark.slow
def test_type_checker_finds_a_users_mistakes(tmp_path: Path) -> None:
    """In a program that uses the library as it is meant to, none; otherwise each one."""
    pytest.importorskip("mypy", reason="mypy comes with the extra `dev`, not with `test`")
    script = tmp_path / "user.py"
    script.write_text(USER + "\n".join(MISTYPED) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "user.py"]
    root = Path(domain_events.__file__).parents[1]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=170,
        cwd=tmp_path,
        env={"PATH": "", "MYPYPATH": str(root), "HOME": str(tmp_path)},
        check=False,
    )
    first = USER.count("\n") + 1
    lines = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert lines == set(range(first, first + len(MISTYPED))), done.stdout + done.stderr


def test_port_of_something_else_is_told() -> None:
    """Something that answers, and not with AMQP: an HTTP server."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            with socket.socket():
                connection, _ = server.accept()
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        publisher = Publisher(f"amqp://127.0.0.1:{port}")
        with publisher, pytest.raises(BrokerUnavailable, match=str(port)):
            publisher.publish(DomainEvent("a.b", {}), timeout=1)
        thread.join(10)
