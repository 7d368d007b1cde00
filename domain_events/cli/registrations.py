"""Reads what subscribers register, without a broker: modules are imported, nothing is declared."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from domain_events import settings
from domain_events.broker import Queue
from domain_events.cli.offline import load_offline
from domain_events.handling import Subscription
from domain_events.options import Options
from domain_events.settings import DEFAULT, ConnectionSettings


@dataclass(frozen=True)
class Registration:
    """One call of `Subscriber.register`.

    :ivar target: where the subscriber was found, ``package.module:subscriber``.
    :ivar handler: the function, as ``module:function``.
    :ivar payload: the name of the class that ``event.data`` is turned into.
    """

    target: str
    options: Options
    handler: str
    payload: str | None
    workers: int

    @property
    def name(self) -> str:
        """The subscriber's name, and its queue's."""
        return self.options.name

    @property
    def queue(self) -> Queue:
        return self.options.queue


@dataclass(frozen=True)
class Found:
    """What the targets register, in their order, and the brokers that they were made for."""

    registrations: list[Registration]
    brokers: list[tuple[str, ...]]

    def broker(self, given: ConnectionSettings) -> ConnectionSettings:
        """The broker that is meant: the one of ``--broker``, else that of the subscribers.

        :raises click.UsageError: they have different ones.
        """
        if given is not DEFAULT or not self.brokers:
            return given
        if len(self.brokers) > 1:
            raise click.UsageError(
                "The subscribers have different brokers; name the one that is meant with --broker."
            )
        return settings.masked(self.brokers[0])


def read(targets: Sequence[str]) -> Found:
    """What these subscribers register; a function may build each of them.

    :raises NotImported: one of them cannot be imported.
    :raises DomainEventsError: a registration cannot work.
    """
    registrations: list[Registration] = []
    brokers: list[tuple[str, ...]] = []
    for target in dict.fromkeys(targets):
        subscriber = load_offline(target)
        subscriber.connections.close_soon()
        registrations += [_registration(target, each, subscriber) for each in _all(subscriber)]
        urls = subscriber.connections.urls
        if urls is not None and urls not in brokers:
            brokers.append(urls)
    return Found(registrations, brokers)


def _all(subscriber: Any) -> list[Subscription]:
    return list(subscriber.subscriptions)


def _registration(target: str, subscription: Subscription, subscriber: Any) -> Registration:
    payload = subscription.payload
    return Registration(
        target,
        subscription.options,
        _place(subscription.handler),
        None if payload is None else payload.name,
        subscriber.workers,
    )


def _place(handler: Any) -> str:
    """Where a handler is defined."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if not hasattr(handler, "__qualname__"):
        handler = type(handler)  # an instance with __call__
    return f"{getattr(handler, '__module__', None) or 'builtins'}:{handler.__qualname__}"
