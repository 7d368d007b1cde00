"""Events that belong to a transaction of SQLAlchemy 2.

::

    with Session(engine) as session, session.begin():
        user = User(email='ada@example.org')
        session.add(user)
        session.flush()  # for the id
        publish_on_commit(session, 'user.registered', {'user_id': user.id})

An event is published once its transaction has committed, and only then: a SAVEPOINT that is rolled
back takes its own events with it, and no others. After the commit, no error reaches the caller, for
whom the work is done: an event that could not be published is logged. It is lost when the program
dies between the commit and the publish. With an `Outbox` none is lost: the event is a row of the
same transaction until it is confirmed.

`once` is for handlers: their work, the note that it is done and the events that they publish are
one transaction.

Read in this order: ``transactions``, ``after_commit``, ``tables``, ``outbox``, ``publishing``,
``inbox``.
"""

try:
    import sqlalchemy as _sqlalchemy
except ImportError as error:
    raise ImportError(
        "domain_events.sqlalchemy needs SQLAlchemy 2, which is not installed: "
        "pip install 'domain-events-rabbitmq[sqlalchemy]'"
    ) from error

from domain_events.sqlalchemy.inbox import first_time, once, prune_inbox
from domain_events.sqlalchemy.outbox import Outbox
from domain_events.sqlalchemy.publishing import publish_on_commit
from domain_events.sqlalchemy.tables import inbox_table, outbox_table
from domain_events.sqlalchemy.transactions import publish_at_session_commits

del _sqlalchemy

__all__ = [
    "Outbox",
    "first_time",
    "inbox_table",
    "once",
    "outbox_table",
    "prune_inbox",
    "publish_at_session_commits",
    "publish_on_commit",
]
