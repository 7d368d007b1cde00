"""Which broker, and what else a process is configured with.

The broker is that of the argument, else of ``configure()``, else of the environment, else on
localhost. All is resolved at each use, so that the order of imports does not matter. Passwords are
only ever sent to the broker; logs and errors use `shown`.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal, NoReturn, TypeAlias, cast

from domain_events.address import BETWEEN_URLS, Address, shown
from domain_events.checks import refusal
from domain_events.errors import ConfigurationError
from domain_events.log import Log
from domain_events.middleware import Middleware, check_middleware
from domain_events.names import LONGEST_NAME, fits
from domain_events.text import plain
from domain_events.urls import trouble, trouble_together

log = Log("domain_events")

ENVIRONMENT = ("DOMAIN_EVENTS_URL", "AMQP_URL", "RABBITMQ_URL", "CLOUDAMQP_URL")
FALLBACK = "amqp://guest:guest@localhost:5672/%2F"


class _Default(Enum):
    DEFAULT = "the process's default broker"

    def __repr__(self) -> str:
        return "DEFAULT"


#: Stands for the process's default broker wherever ``connection_settings`` are taken.
DEFAULT: Final = _Default.DEFAULT

ConnectionSettings: TypeAlias = str | Sequence[str] | Literal[_Default.DEFAULT] | None

_configured: ConnectionSettings = DEFAULT
_app_id: str | None = None
_middleware: tuple[Middleware, ...] = ()

# How None was given, and where; how, if that was logged.
_switched_off: dict[str, str] = {}
_warned: set[str] = set()


class _Addresses(tuple[Address, ...]):
    """Several URLs, one by one."""

    __slots__ = ()


class _Unusable:
    """Settings of a wrong type, of which only the type is shown."""

    def __init__(self, settings: object) -> None:
        self.type = type(settings).__name__
        if isinstance(settings, list | tuple):
            self.type += " of " + ", ".join(sorted({type(each).__name__ for each in settings}))

    def __repr__(self) -> str:
        return f"<a {self.type}>"


_PACKAGE = __name__.partition(".")[0] + "."


def configure(
    connection_settings: ConnectionSettings = DEFAULT,
    *,
    app_id: str | None = None,
    middleware: Iterable[Middleware] = (),
) -> None:
    """Set the process's defaults; arguments left out are reset to the environment's.

    :param connection_settings: an AMQP URL; several for the nodes of a cluster (a sequence, or
        separated by commas); ``memory://`` for the embedded broker, which lives in this process
        and is for trying and testing; ``None`` to switch publishing and subscribing off, which is
        logged as a warning, once, at the first use. A URL without a vhost, or with nothing after
        the last slash, means the vhost ``/``.
    :param app_id: the name under which this program publishes; its file's name if left out.
    :param middleware: around all publishing and handling of this process; the first is outermost.
    :raises ConfigurationError: when it is none of these.
    """
    global _configured, _app_id, _middleware
    _refuse_middleware(connection_settings)
    connection_settings = masked(connection_settings)
    urls = _split(connection_settings)
    if app_id is not None:
        if not fits(app_id) or re.search("amqps?://", app_id, re.IGNORECASE):
            raise refusal(app_id, "app_id", f"a str of at most {LONGEST_NAME} bytes")
        app_id = plain(app_id)
    chain = check_middleware(middleware)
    _configured, _app_id, _middleware = urls or connection_settings, app_id, chain
    _switched_off.pop("to configure()", None)
    _warned.discard("to configure()")
    if urls is None:
        _switched_off["to configure()"] = _caller()


def _refuse_middleware(given: object) -> None:
    """Raise if it was given in the place of the broker."""
    among = given if isinstance(given, list | tuple) else [given]
    if any(isinstance(each, Middleware) for each in among):
        _refuse(
            "configure() takes the broker's URL first; give middleware by name: "
            "configure(middleware=[...])."
        )


def resolve(connection_settings: ConnectionSettings = DEFAULT) -> tuple[str, ...] | None:
    """The broker's URLs, or None when publishing and subscribing are switched off.

    An empty string is the default too, as in domain-event-broker.

    :raises ConfigurationError: when the settings are neither a URL nor several.
    """
    connection_settings = masked(connection_settings)
    if connection_settings is None:
        if not _switched_off:  # else it may be what `configure` was given, on its way inside
            _switched_off["as an argument"] = _caller()
        return None
    if connection_settings is DEFAULT or connection_settings == "":
        connection_settings = _configured
        if connection_settings is DEFAULT or connection_settings == "":
            return _of_environment()
    return _split(connection_settings)


def warn_switched_off() -> None:
    """Log once that events are neither sent nor received; called at each use without a broker."""
    if _warned.issuperset(_switched_off):
        return
    _warned.update(_switched_off)
    given = "; ".join(f"{way} in {place}" for way, place in _switched_off.items())
    log.warning(
        "Publishing and subscribing are switched off, since connection_settings is None (given "
        "%s): no event is sent or received. If that is not intended, give an AMQP URL; the "
        "environment variable that it comes from may not be set.",
        given,
    )


def app_id() -> str:
    """The name under which this program publishes."""
    return _program_name() if _app_id is None else _app_id


def middleware() -> tuple[Middleware, ...]:
    """The middleware of the whole process."""
    return _middleware


@lru_cache(maxsize=1)
def _program_name() -> str:
    program = Path(sys.argv[0] if sys.argv else "")
    # python -m package: the program is the package's __main__.py.
    name = program.parent.name if program.stem == "__main__" else program.stem
    return name[:100] or "python"


def masked(connection_settings: ConnectionSettings) -> ConnectionSettings:
    """The same settings, without the password in their repr; never raises.

    Called first in each function that takes settings.
    """
    if isinstance(connection_settings, Address | _Addresses | _Unusable | _Default | None):
        return connection_settings
    if isinstance(connection_settings, str):
        return Address(plain(connection_settings))
    if isinstance(connection_settings, Sequence) and all(
        isinstance(url, str) for url in connection_settings
    ):
        return _Addresses(Address(plain(url)) for url in connection_settings)
    return cast(ConnectionSettings, _Unusable(connection_settings))


def _of_environment() -> tuple[str, ...]:
    for name in ENVIRONMENT:
        # Files of environment variables (docker run --env-file) keep quotes and spaces.
        value = Address(os.environ.get(name, "").strip().strip("'\"").strip())
        if value:
            try:
                return _split(value) or ()
            except ConfigurationError as error:
                raise ConfigurationError(f"{error} (In the environment variable {name}.)") from None
    return _Addresses([Address(FALLBACK)])


def _split(connection_settings: ConnectionSettings) -> tuple[str, ...] | None:
    if connection_settings is None:
        return None
    if connection_settings is DEFAULT or connection_settings == "":
        return ()
    if isinstance(connection_settings, str):
        return _addresses(Address(plain(connection_settings)))
    if isinstance(connection_settings, _Addresses) and connection_settings:
        if all(connection_settings):
            return _together(
                _Addresses(
                    address
                    for url in connection_settings
                    for address in _addresses(Address(plain(url)))
                )
            )
        _refuse("connection_settings: one of the URLs is empty.")
    # Not shown: they may contain a password.
    kind = getattr(connection_settings, "type", "")
    if not kind:
        _refuse("connection_settings is an empty sequence; give at least one AMQP URL, or None.")
    return _refuse(
        "connection_settings must be an AMQP URL (a str, such as "
        "amqp://user:password@host:5672/vhost), a list of such URLs, or None, not of type "
        f"{kind}. For another library's URL give str(url), for bytes url.decode()."
    )


@lru_cache(maxsize=64)
def _addresses(text: Address) -> _Addresses:
    """The URLs in a text."""
    addresses = _Addresses(map(Address, BETWEEN_URLS.split(text.strip())))
    for url in addresses:
        if why := trouble(url):
            _refuse(f"connection_settings: {shown(url)} cannot be a broker's URL: {why}")
    return _together(addresses)


def _together(addresses: _Addresses) -> _Addresses:
    if why := trouble_together(addresses):
        _refuse(f"connection_settings: {', '.join(map(shown, addresses))}: {why}")
    return addresses


def _refuse(why: str) -> NoReturn:
    # Here, where no variable contains a password: pytest shows those of the raising function.
    raise ConfigurationError(why)


def _caller() -> str:
    """File and line of the application's call."""
    frame = inspect.currentframe()
    assert frame is not None
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}"
