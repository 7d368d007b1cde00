"""Domain events in a Django project; the extra ``[django]``.

::

    INSTALLED_APPS = [..., 'domain_events.django']
    DOMAIN_EVENTS = {'URL': 'amqp://user:password@host/vhost'}      # or the environment

    with transaction.atomic():
        order = Order.objects.create(...)
        publish_on_commit('order.placed', {'order': order.pk})

Read in this order: ``configuration`` (the settings), ``transaction`` (`publish_on_commit`),
``database`` (the outbox on Django's connections), ``handlers`` (`on`, and the ``subscribers.py`` of
apps), ``inbox`` (`once`), ``connections`` (those to the database, around each handler),
``testing``. The commands are in ``management/``.
"""

from domain_events.django.connections import DatabaseConnections
from domain_events.django.handlers import make_subscriber, on
from domain_events.django.inbox import once
from domain_events.django.transaction import publish_on_commit

__all__ = ["DatabaseConnections", "make_subscriber", "on", "once", "publish_on_commit"]
