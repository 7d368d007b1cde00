"""The handlers of a project: each app's are in its ``subscribers.py``.

::

    # shop/subscribers.py
    from domain_events.django import on

    @on('order.placed', name='shop-invoices', max_retries=5)
    def issue_invoice(event): ...

Nothing connects to a broker when such a module is imported: the queues are declared by
`make_subscriber`, which ``manage.py consume_domain_events`` and tests call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from django.utils.module_loading import autodiscover_modules

from domain_events import ConfigurationError, DomainEvent, Middleware, Subscriber
from domain_events.django.connections import DatabaseConnections

MODULE = "subscribers"

Handler = TypeVar("Handler", bound=Callable[[DomainEvent[Any]], object])


class _Registration(NamedTuple):
    handler: Callable[[DomainEvent[Any]], object]
    name: str
    binding_keys: tuple[str, ...]
    options: dict[str, Any]


_registrations: dict[str, _Registration] = {}


def on(*binding_keys: str, name: str, **options: Any) -> Callable[[Handler], Handler]:
    """Have the function called with the events that one of the binding keys matches.

    For functions in the ``subscribers.py`` of an installed app; they are left as they are. Binding
    keys, name and options are those of `domain_events.Subscriber.register`, which checks them when
    `make_subscriber` is called.

    :raises ConfigurationError: another function has the name.
    """

    def decorate(handler: Handler) -> Handler:
        known = _registrations.get(name)
        if known is not None and _place(known.handler) != _place(handler):
            raise ConfigurationError(
                f"{name} is the name of two handlers, {_place(known.handler)} and "
                f"{_place(handler)}: they would share one queue, and each get only some of the "
                "events. Give each a name of its own."
            )
        _registrations[name] = _Registration(handler, name, binding_keys, options)
        return handler

    return decorate


def make_subscriber(
    *names: str, workers: int = 1, middleware: Iterable[Middleware] = (), **options: Any
) -> Subscriber:
    """A `domain_events.Subscriber` with the handlers of all installed apps, or of these names.

    Imports each app's ``subscribers.py``, and declares the queues.

    :param workers: how many handlers run at the same time.
    :param middleware: within `DatabaseConnections`, which is always there.
    :param options: others of `domain_events.Subscriber`.
    :raises ConfigurationError: there are no handlers, or none of that name.
    :raises DomainEventsError: as `domain_events.Subscriber.register` does.
    """
    autodiscover_modules(MODULE)
    if not _registrations:
        raise ConfigurationError(
            f"No installed app has a {MODULE}.py with a function that is decorated with "
            "@domain_events.django.on(...)."
        )
    if unknown := set(names) - set(_registrations):
        raise ConfigurationError(
            f"There is no handler named {', '.join(sorted(unknown))}; there are "
            f"{', '.join(sorted(_registrations))}."
        )
    subscriber = Subscriber(
        workers=workers, middleware=[DatabaseConnections(), *middleware], **options
    )
    for each in _registrations.values():
        if not names or each.name in names:
            subscriber.register(each.handler, each.name, each.binding_keys, **each.options)
    return subscriber


def is_registered(handler: object) -> bool:
    """Whether this very function was given to `on`."""
    return any(each.handler is handler for each in _registrations.values())


def _place(handler: object) -> str:
    """Where it is defined; the same after its module was loaded again."""
    module = getattr(handler, "__module__", "")
    return f"{module}.{getattr(handler, '__qualname__', type(handler).__qualname__)}"
