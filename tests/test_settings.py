"""Which broker is used, and what is shown of its address: domain_events/settings.py."""

from __future__ import annotations

import copy
import logging
import pickle
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import Names

from domain_events import (
    DEFAULT,
    ConfigurationError,
    DomainEvent,
    DomainEventsError,
    Publisher,
    Subscriber,
    configure,
)
from domain_events.address import shown
from domain_events.settings import (
    ENVIRONMENT,
    FALLBACK,
    ConnectionSettings,
    _program_name,
    app_id,
    resolve,
)

# Machines that are shared are slow at times.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SECRET = "S3cr3t"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins as a process does whose environment names no broker."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    configure()
    _program_name.cache_clear()
    yield
    configure()
    _program_name.cache_clear()


# ------------------------------------------------------------------ which broker


def test_without_any_settings_it_is_the_broker_on_this_machine() -> None:
    """What RabbitMQ listens on when it was just installed."""
    assert resolve() == ("amqp://guest:guest@localhost:5672/%2F",)
    assert resolve() == (FALLBACK,)


def test_the_environment_is_asked_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """DOMAIN_EVENTS_URL, AMQP_URL, RABBITMQ_URL, CLOUDAMQP_URL: the first that is set counts."""
    assert ENVIRONMENT == ("DOMAIN_EVENTS_URL", "AMQP_URL", "RABBITMQ_URL", "CLOUDAMQP_URL")
    for name in reversed(ENVIRONMENT):
        url = f"amqp://{name.lower().replace('_', '-')}"
        monkeypatch.setenv(name, url)
        assert resolve() == (url,)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As shells and container files leave them."""
    monkeypatch.setenv("DOMAIN_EVENTS_URL", "")
    assert resolve() == (FALLBACK,)
    monkeypatch.setenv("RABBITMQ_URL", "amqp://given")
    assert resolve() == ("amqp://given",)


def test_configure_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives way to it again when called with nothing."""
    monkeypatch.setenv("DOMAIN_EVENTS_URL", "amqp://environment")
    configure("amqp://configured")
    assert resolve() == ("amqp://configured",)
    configure()
    assert resolve() == ("amqp://environment",)


def test_the_argument_wins_over_configure() -> None:
    """What is said at the call counts for the call."""
    configure("amqp://configured")
    assert resolve("amqp://argument") == ("amqp://argument",)
    assert resolve() == ("amqp://configured",)


def test_the_default_is_resolved_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each use: it does not matter who was imported first."""
    assert resolve() == (FALLBACK,)
    monkeypatch.setenv("AMQP_URL", "amqp://later")
    assert resolve() == ("amqp://later",)
    configure("amqp://latest")
    assert resolve(DEFAULT) == ("amqp://latest",)


@pytest.mark.parametrize("default", ["", DEFAULT])
def test_an_empty_string_is_the_default_too(
    default: ConnectionSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """domain-event-broker has it so, for the argument and for the configured settings."""
    configure("amqp://configured")
    assert resolve(default) == ("amqp://configured",)
    configure(default)
    monkeypatch.setenv("AMQP_URL", "amqp://environment")
    assert resolve() == ("amqp://environment",)


def test_none_switches_everything_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """By argument or by configure, whatever the environment says."""
    monkeypatch.setenv("AMQP_URL", "amqp://environment")
    assert resolve(None) is None
    configure(None)
    assert resolve() is None
    assert resolve("amqp://argument") == ("amqp://argument",)


@pytest.mark.parametrize(
    "settings",
    [
        "amqp://a,amqp://b/v",
        " amqp://a , amqp://b/v\n",
        ["amqp://a", "amqp://b/v"],
        ("amqp://a", "amqp://b/v"),
    ],
)
def test_the_nodes_of_a_cluster_may_be_named(
    settings: ConnectionSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a sequence, or separated by commas; also by configure and in the environment."""
    expected = ("amqp://a", "amqp://b/v")
    assert resolve(settings) == expected
    configure(settings)
    assert resolve() == expected
    if isinstance(settings, str):
        configure()
        monkeypatch.setenv("AMQP_URL", settings)
        assert resolve() == expected


def test_urls_of_any_spelling_may_be_separated_by_commas() -> None:
    """A scheme may be written in capitals: `connect` takes it so."""
    assert resolve("amqp://a,AMQP://b") == ("amqp://a", "AMQP://b")


def test_a_comma_inside_a_url_separates_nothing() -> None:
    """Only one with a scheme behind it does."""
    url = "amqp://a/v?ssl_options={'ciphers': 'x', 'password': 1}"
    assert resolve(url) == (url,)
    assert resolve(f"{url},amqps://b") == (url, "amqps://b")


NO_SETTINGS = [17, b"amqp://a", [], (), [""], ["amqp://a", ""], ["amqp://a", None], " ", object()]


@pytest.mark.parametrize("settings", NO_SETTINGS, ids=lambda given: type(given).__name__)
def test_settings_that_cannot_be_are_refused(settings: Any) -> None:
    """By whoever takes them, at once; what was configured before stays."""
    configure("amqp://before")
    for take in (resolve, configure, Publisher, Subscriber):
        with pytest.raises(ConfigurationError, match="connection_settings"):
            take(settings)
    assert resolve() == ("amqp://before",)


@pytest.mark.parametrize(
    "settings", [f"amqp+ssl://u:{SECRET}@h", f"amqp://a,http://u:{SECRET}@h", "localhost:5672"]
)
def test_a_url_of_no_known_broker_is_refused(settings: str) -> None:
    """When the Publisher or the Subscriber is made, before any connection."""
    for kind in (Publisher, Subscriber):
        with pytest.raises(ConfigurationError, match="amqp://") as caught:
            kind(settings)
        assert SECRET not in str(caught.value)


def test_the_default_says_what_it_is() -> None:
    """In the signatures that help() shows; there is one of it, also after a copy."""
    assert repr(DEFAULT) == "DEFAULT"
    assert copy.deepcopy(DEFAULT) is DEFAULT
    assert pickle.loads(pickle.dumps(DEFAULT)) is DEFAULT


# ------------------------------------------------------------------ the program's name


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["/srv/shop/worker.py", "x"], "worker"),
        (["/usr/bin/gunicorn"], "gunicorn"),
        (["/site-packages/shop/__main__.py"], "shop"),
        (["__main__.py"], "python"),
        ([""], "python"),
        ([], "python"),
        (["-c"], "-c"),
        ([f"/srv/{'x' * 300}.py"], "x" * 100),
    ],
)
def test_a_program_publishes_under_its_files_name(
    argv: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or its package's, where it runs as ``python -m package``; cut to what AMQP carries."""
    monkeypatch.setattr(sys, "argv", argv)
    assert app_id() == name


def test_the_name_may_be_configured() -> None:
    """Beside the broker or alone; what is left out goes back to the default."""
    configure(app_id="shop")
    assert app_id() == "shop"
    assert resolve() == (FALLBACK,)
    configure("amqp://a", app_id="shop-2")
    assert (resolve(), app_id()) == (("amqp://a",), "shop-2")
    configure("amqp://a")
    assert app_id() == _program_name()


# ------------------------------------------------------------------ passwords


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (f"amqp://user:{SECRET}@host:5673/vhost", "amqp://user@host:5673/vhost"),
        (f"amqps://user:{SECRET}@host/%2F?heartbeat=5#{SECRET}", "amqps://user@host/%2F"),
        ("amqp://host", "amqp://host"),
        ("amqp://", "amqp://"),
        ("amqp://[::1", "a malformed URL"),
        (f"amqp://user:{SECRET}@host:port/", "a malformed URL"),
    ],
)
def test_an_address_is_shown_without_password_and_options(url: str, text: str) -> None:
    """Enough of it to tell which broker is meant."""
    assert shown(url) == text


@patient
@given(
    scheme=st.sampled_from(["amqp://", "amqps://", "amqp:/", "amqp:", "//", ""]),
    user=st.sampled_from(["user", "", "us er", "u/s", "12", "u@s"]),
    # What stands before the secret part of the password, not percent-encoded as it should be.
    before=st.text("/#?@:%[]12 a", max_size=3),
    after=st.text("/#?@:%[]12 a", max_size=3),
    host=st.sampled_from(["@host", "@host:5672/%2F", "@[::1]:5672/v", "@127.0.0.1?x=1"]),
)
@example("", "guest", "", "", "@localhost:5672/%2F")
@example("amqp://", "user", "12/", "", "@host:5672/%2F")
@example("amqp://", "user", "@", "?", "@host:5672/%2F")
def test_no_password_is_ever_shown(
    scheme: str, user: str, before: str, after: str, host: str
) -> None:
    """Also when the URL lacks its scheme, or its password is not percent-encoded."""
    url = f"{scheme}{user}:{before}{SECRET}{after}{host}"
    # A host's name is shown in small letters.
    assert SECRET.lower() not in shown(url).lower(), url


@patient
@given(st.text(min_size=1, max_size=12), st.text(min_size=1))
def test_a_quoted_password_is_never_shown(user: str, password: str) -> None:
    """Whatever its characters: the address is as if there was none. (A longer user is cut.)"""
    user, password = quote(user, safe=""), quote(password, safe="")
    assert shown(f"amqp://{user}:{password}@host/v") == f"amqp://{user}@host/v"


@pytest.mark.parametrize(
    "url",
    [
        f"guest:{SECRET}@localhost:5672/%2F",
        f"amqp:/user:{SECRET}@host",
        f"amqp://user:{SECRET}@host:port/",
        f"amqp://user:[{SECRET}@host/",
        f"amqp://user:a/{SECRET}@host/",
        f"amqp://user:{SECRET}@host/v?no_such_option={SECRET}",
        f"amqp://user:{SECRET}@host/v?heartbeat={SECRET}",
        f"amqp://user:{SECRET}@host/v?ssl_options={SECRET}",
    ],
)
def test_an_error_about_a_url_does_not_tell_its_password(url: str) -> None:
    """Neither its text nor what a traceback shows of its causes."""
    for kind in (Publisher, Subscriber):
        with pytest.raises(ConfigurationError) as caught:
            kind(url)
        assert SECRET not in "".join(traceback.format_exception(caught.value))
        assert SECRET not in repr(caught.value)


def test_a_broker_that_is_away_does_not_cost_the_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither the error, nor the log, nor the repr of the publisher tells it."""
    with socket.socket() as taken:  # bound and not listening: refuses every connection
        taken.bind(("127.0.0.1", 0))
        url = f"amqp://user:{SECRET}@127.0.0.1:{taken.getsockname()[1]}/%2F"
        with caplog.at_level(logging.DEBUG), Publisher(url, timeout=0.2) as publisher:
            with pytest.raises(DomainEventsError) as caught:
                publisher.publish(DomainEvent("a.b", {}))
            assert SECRET not in repr(publisher)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in caplog.text


def test_a_wrong_password_is_an_error_that_does_not_tell_it(
    broker_url: str, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    """It names the broker, and that user or password is wrong."""
    parts = urlsplit(broker_url)
    url = f"amqp://guest:{SECRET}@{parts.hostname}:{parts.port}{parts.path}"
    with caplog.at_level(logging.DEBUG), Publisher(url, names.exchange()) as publisher:
        with pytest.raises(ConfigurationError, match="password is wrong") as caught:
            publisher.publish(DomainEvent("a.b", {}))
        assert f"{parts.hostname}:{parts.port}" in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in caplog.text
