"""The options that commands have in common."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, TypeVar

import click

from domain_events import settings
from domain_events.cli import exits
from domain_events.errors import ConfigurationError
from domain_events.settings import DEFAULT, ConnectionSettings

Command = TypeVar("Command", bound=Callable[..., Any])


def broker_option(command: Command) -> Command:
    """``--broker``: the command gets ``broker``, settings whose password is not shown."""

    @wraps(command)
    def call(*args: Any, broker: ConnectionSettings, **kwargs: Any) -> Any:
        return command(*args, broker=broker, **kwargs)

    return click.option(  # type: ignore[return-value]
        "--broker",
        metavar="URL",
        callback=_masked,
        help=f"The broker's URL. If left out, the one in {settings.ENVIRONMENT[0]}.",
    )(call)


def _masked(_ctx: click.Context, _option: click.Parameter, value: str | None) -> ConnectionSettings:
    if value == "":  # it was moved there, with its password
        value = os.environ.get(settings.ENVIRONMENT[0], "")
    return DEFAULT if value is None else settings.masked(value)


def rabbitmq(broker: ConnectionSettings) -> tuple[str, ...]:
    """The broker's URLs.

    :raises ConfigurationError: it is an embedded one, which no other process sees.
    """
    urls = settings.resolve(broker)
    if urls is None or any(url.startswith("memory:") for url in urls):
        raise ConfigurationError(
            "The broker memory:// lives in one process, and this command is another one; name a "
            f"RabbitMQ by --broker or {settings.ENVIRONMENT[0]}."
        )
    return urls


class Number(click.FloatRange):
    """A number of seconds or the like. Neither nan, which no limit compares with, nor infinity."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class InputFile(click.File):
    """A file to be read as bytes. One that cannot be opened is an error of files, not of usage."""

    def __init__(self) -> None:
        super().__init__("rb")

    def fail(
        self, message: str, param: click.Parameter | None = None, ctx: click.Context | None = None
    ) -> NoReturn:
        raise FileFailed(message)


class FileFailed(click.ClickException):
    """A file cannot be read or written."""

    exit_code = exits.FILE


def timeout_option(command: Command) -> Command:
    """``--timeout``: seconds within which the broker must answer each request."""
    return click.option(
        "--timeout",
        type=Number(min=0, min_open=True),
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait for each answer of the broker.",
    )(command)


def exchange_option(command: Command) -> Command:
    """``--exchange``: the exchange of publishers and subscribers."""
    return click.option(
        "--exchange",
        default="domain-events",
        show_default=True,
        metavar="NAME",
        help="The exchange of the publishers and subscribers.",
    )(command)


def json_option(command: Command) -> Command:
    """``--json``: the command gets ``as_json``."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print JSON, one object on each line."
    )(command)


def management_option(command: Command) -> Command:
    """``--management``: the command gets ``management``, a URL or None."""
    return click.option(
        "--management",
        metavar="URL",
        envvar="DOMAIN_EVENTS_MANAGEMENT_URL",
        show_envvar=True,
        help=(
            "The URL of RabbitMQ's management plugin, such as http://host:15672. If left out, the "
            "broker's host is tried, then rabbitmqctl on this machine."
        ),
    )(command)
