"""Publishes copies of dead letters again, each one unless it is there already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from domain_events import settings
from domain_events.broker import Connections, confirm_each
from domain_events.cli import archive
from domain_events.dead_letters import DeadLetters
from domain_events.errors import EventUnroutable, InvalidEvent, TopologyError
from domain_events.message import Message, ToDeadLetters, ToSubscriber
from domain_events.names import check_name
from domain_events.settings import ConnectionSettings


class Import:
    """Makes dead letters of copies, or has them handled again.

    :param subscriber: whose they become; None: whose they were.
    :param replay: into the subscriber's queue.
    :param report: called with the id of each one, and what became of it.
    :ivar number: how many were imported.
    :ivar skipped: how many were among the dead letters already.
    """

    def __init__(
        self,
        broker: ConnectionSettings,
        timeout: float,
        *,
        subscriber: str | None = None,
        replay: bool = False,
        report: Callable[[str | None, str], None] = lambda _id, _what: None,
    ) -> None:
        self._broker = settings.masked(broker)
        self._timeout = timeout
        self._subscriber = subscriber
        self._replay = replay
        self._report = report
        self.number = self.skipped = 0
        # By subscriber: the ids of its dead letters.
        self._there: dict[str, set[str]] = {}

    def run(self, copies: Iterable[dict[str, Any] | None]) -> None:
        """Import these; see `archive.read`.

        :raises DomainEventsError: as `Publisher.publish`; the rest is not imported.
        """
        connections = Connections(settings.resolve(self._broker), "import")
        try:
            publishing = connections.publishing()
            if publishing is not None:
                confirm_each(publishing, self._messages(copies), self._timeout, self._confirmed)
        except EventUnroutable as error:
            raise TopologyError(
                f"There is no such queue: its subscriber must have registered first. {error}"
            ) from error
        finally:
            connections.close(self._timeout)

    def _messages(
        self, copies: Iterable[dict[str, Any] | None]
    ) -> Iterator[tuple[Message, str | None]]:
        for saved in copies:
            try:
                if saved is None:
                    raise InvalidEvent("The line is not complete JSON.")
                name = check_name(self._subscriber or saved.get("queue"), "subscriber")
                to = ToSubscriber(name) if self._replay else ToDeadLetters(name)
                message = archive.message(saved, to, replay=self._replay)
            except InvalidEvent as error:
                self._report(None, str(error))
                continue
            there = self._ids_of(name)
            if message.message_id in there:
                self.skipped += 1
                self._report(message.message_id, "there already")
                continue
            if message.message_id is not None:
                there.add(message.message_id)
            yield message, message.message_id

    def _confirmed(self, event_id: str | None) -> None:
        self.number += 1
        self._report(event_id, "imported")

    def _ids_of(self, name: str) -> set[str]:
        if name not in self._there:
            with DeadLetters(name, self._broker, timeout=self._timeout) as dead_letters:
                found = (letter.delivery.message_id or letter.id for letter in dead_letters)
                self._there[name] = {each for each in found if each is not None}
        return self._there[name]
