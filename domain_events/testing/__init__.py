"""For the tests of programs that publish and subscribe: no RabbitMQ, no network, no waiting.

::

    with EventBroker() as broker:
        register_user('Ada')                                  # the code under test
        broker.assert_published('user.registered', {'name': 'Ada'})

While an `EventBroker` is switched on, it replaces every broker: whatever address is used, in
whatever thread, by `publish_domain_event`, a `Publisher`, a `Subscriber` or `DeadLetters`, even by
those created before. It is an embedded broker (``memory://``) of its own, so nothing is left for
the next test. Its time stands still until it is moved.

With pytest there is a fixture, ``event_broker``; with unittest or Django, use it as a context
manager or call ``start`` and ``stop``.
"""

from domain_events.outcomes import Delivered, Outcome
from domain_events.testing.broker import EventBroker

__all__ = ["Delivered", "EventBroker", "Outcome"]
