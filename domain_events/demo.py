"""The main job, told as it happens: publish, subscribe, a retry, a dead letter, its replay.

Two subscribers and a publisher run as processes of their own, as they would in two services; with
the embedded broker, which no other process can reach, as threads. What the user started tells what
they do and decides when the next thing happens. It works on an exchange and queues of its own and
deletes them at the end.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import TracebackType

from domain_events import settings, topology
from domain_events.broker import connect
from domain_events.dead_letters import DeadLetters
from domain_events.events import DomainEvent
from domain_events.publisher import Publisher
from domain_events.retry import Retry
from domain_events.subscriber import Subscriber

EXCHANGE = "domain-events-demo"
MAILER, LEDGER = "demo-mailer", "demo-ledger"
PUBLISH, MENDED = "publish", "--mended"
STOPPED = "has stopped in order"

#: Every demo has an embedded broker of its own.
EMBEDDED = "memory://demo"

# Seconds that any step may take; on a slow machine the first declaration of all queues is one.
_PATIENCE = 30.0
_BROKER_TIMEOUT = 10.0


def run(url: str = EMBEDDED) -> None:
    """Run the demo on the broker at ``url``.

    :raises DomainEventsError: no broker there, for example.
    """
    _say("A domain event is a fact that other services may want to hear.")
    embedded = " (embedded in this process)" if _is_embedded(url) else ""
    _say(f"Broker: {settings.shown(url)}{embedded}")
    service = _services(url)
    _clean_up(url)  # after an earlier one that was killed; also says when there is no broker
    try:
        _title("Two services subscribe, each with a queue of its own")
        with service("mailer", MAILER) as mailer, service("ledger", LEDGER) as ledger:
            mailer.wait_for("listens")
            ledger.wait_for("listens")

            _title("A third one publishes, without knowing them: both hear of it")
            _publish(service, "user.registered", {"user": "Ada"})
            mailer.wait_for("mail to Ada is sent")
            ledger.wait_for("entry for user.registered")

            _title("A handler asks for a retry: the event comes back to it alone, a second later")
            _publish(service, "user.imported", {"user": "Grace"})
            mailer.wait_for("mail to Grace is sent")

            _title("A handler has a bug: its event is kept as a dead letter, with the reason")
            _publish(service, "invoice.issued", {"amount": "12.50"})
            ledger.wait_for("entry for user.imported")
            ledger.wait_for("booking")
            with DeadLetters(LEDGER, url) as dead_letters:
                _wait_until(lambda: dead_letters.count() == 1)
                for letter in dead_letters:
                    _say(f"dead letter of {letter.subscriber}: {letter.routing_key}")
                    _say(f"  {letter.error_type}: {letter.error_message}")

            _title("The service is stopped, mended and started again")
            ledger.stop()
            ledger.start(MENDED)
            ledger.wait_for("listens")

            _title("The dead letter is replayed: nothing was lost")
            with DeadLetters(LEDGER, url) as dead_letters:
                _say(f"replayed: {dead_letters.replay_all()}")
                ledger.wait_for("12.50 is booked")
                _say(f"dead letters left: {dead_letters.count()}")
    finally:
        _clean_up(url)
    _title("Done. The queues and the exchange of this demo are deleted.")


def _services(url: str) -> Callable[..., _Service]:
    """What makes a service from its label and its arguments."""
    if not _is_embedded(url):
        return partial(_Process, url)
    settings.configure(url)
    logging.disable(logging.ERROR)  # the demo tells it in its own words
    return _Thread


def _is_embedded(url: str) -> bool:
    return url.lower().startswith("memory:")


def _publish(service: Callable[..., _Service], routing_key: str, data: dict[str, str]) -> None:
    ((name, value),) = data.items()
    with service("shop", PUBLISH, routing_key, name, value) as shop:
        shop.wait_for("confirmed")


class _Role:
    """What one of the services does; it tells so with ``say``."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def subscriber(self, role: str, mended: bool) -> Subscriber:
        """One of the two services that subscribe, ready to consume."""
        subscriber = Subscriber(exchange=EXCHANGE)
        if role == MAILER:
            subscriber.register(self._send_mail, MAILER, ["user.*"], max_retries=3)
        else:
            book = self._book_mended if mended else self._book
            subscriber.register(book, LEDGER, ["#"])
        self._say("listens")
        return subscriber

    def publish(self, routing_key: str, name: str, value: str) -> None:
        """The publishing service, for one event."""
        with Publisher(exchange=EXCHANGE) as publisher:
            event = publisher.publish(DomainEvent(routing_key, {name: value}))
            self._say(f"published and confirmed: {event.routing_key} {event.data}")

    def _send_mail(self, event: DomainEvent) -> None:
        user = event.data["user"]
        if event.routing_key == "user.imported" and event.retries == 0:
            self._say(f"the mail server is busy; raise Retry(1.0) for {user}")
            raise Retry(1.0)
        later = f", after {time.time() - event.timestamp:.2f} s" if event.retries else ""
        self._say(f"mail to {user} is sent (retries: {event.retries}{later})")

    def _book(self, event: DomainEvent) -> None:
        if event.routing_key == "invoice.issued":
            self._say(f"booking {event.data['amount']} ...")
            int(event.data["amount"])  # the bug: amounts have cents
        self._say(f"entry for {event.routing_key}")

    def _book_mended(self, event: DomainEvent) -> None:
        self._say(f"{float(event.data['amount']):.2f} is booked (retries: {event.retries})")


class _Service(ABC):
    """One of the services, whose words are told here: `_Process` or `_Thread`."""

    def __init__(self, label: str, *arguments: str) -> None:
        self._label = label
        self._arguments = arguments
        self._lines: list[str] = []
        self._heard = threading.Condition()

    def __enter__(self) -> _Service:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, *options: str) -> None:
        self._lines.clear()
        self._thread = threading.Thread(target=self._live, args=options, daemon=True)
        self._thread.start()

    def wait_for(self, words: str) -> None:
        """Until the service has said so, since it was started."""
        with self._heard:
            self._heard.wait_for(
                lambda: self._has_said(words) or not self._thread.is_alive(), _PATIENCE
            )
            if not self._has_said(words):
                raise SystemExit(f"The demo got stuck: {self._label} did not say {words!r}.")

    @abstractmethod
    def stop(self) -> None:
        """End it in order."""

    @abstractmethod
    def _run(self, *options: str) -> None:
        """Do what the service does, and `_tell` what it says."""

    def _live(self, *options: str) -> None:
        try:
            self._run(*options)
        finally:
            with self._heard:
                self._heard.notify_all()

    def _tell(self, line: str) -> None:
        with self._heard:
            _print(f"  {self._label:>8} | {line.rstrip()}")
            self._lines.append(line)
            self._heard.notify_all()

    def _has_said(self, words: str) -> bool:
        return any(words in line for line in self._lines)


class _Process(_Service):
    """A service in a process of its own."""

    def __init__(self, url: str, label: str, *arguments: str) -> None:
        super().__init__(label, *arguments)
        # Not among the arguments, which everybody on the machine can read.
        self._environment = {**os.environ, settings.ENVIRONMENT[0]: url}

    def start(self, *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "domain_events.demo", *self._arguments, *options],
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
            # Ctrl-C is for the demo, which then stops its services in order.
            start_new_session=True,
        )
        super().start(*options)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(_PATIENCE)

    def _run(self, *_options: str) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._tell(line)


class _Thread(_Service):
    """A service in a thread, for a broker that is in this process."""

    _subscriber: Subscriber | None = None

    def _run(self, *options: str) -> None:
        role = _Role(self._tell)
        if self._arguments[0] == PUBLISH:
            role.publish(*self._arguments[1:])
            return
        self._subscriber = role.subscriber(self._arguments[0], MENDED in options)
        self._subscriber.start_consuming()
        self._tell(STOPPED)

    def stop(self) -> None:
        if self._subscriber is not None:
            self._subscriber.stop_consuming()
        self._thread.join(_PATIENCE)


def _clean_up(url: str) -> None:
    urls = settings.resolve(url)
    assert urls is not None
    consuming = connect(urls).consuming("demo", lambda: None)
    try:
        queues = [topology.subscriber_queue(name) for name in (MAILER, LEDGER)]
        letters = [topology.dead_letter_queue(name) for name in (MAILER, LEDGER)]
        exchange = topology.Exchange(EXCHANGE)
        consuming.delete(
            [exchange, *queues, *letters, *topology.delays(EXCHANGE)], timeout=_BROKER_TIMEOUT
        )
    finally:
        consuming.close(_BROKER_TIMEOUT)


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("The demo got stuck.")
        time.sleep(0.05)


def _title(text: str) -> None:
    _print(f"\n== {text}")


def _say(text: str) -> None:
    _print(f"  {'demo':>8} | {text}")


def _serve(role: str, mended: bool) -> None:
    """Be one of the two services that subscribe, until SIGTERM."""
    logging.disable(logging.ERROR)  # the demo tells it in its own words
    subscriber = _Role(_print).subscriber(role, mended)
    subscriber.start_consuming()
    _print(STOPPED)


def _print(text: str) -> None:
    # In one piece: threads print side by side.
    print(f"{text}\n", end="", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == PUBLISH:
        _Role(_print).publish(*sys.argv[2:])
    else:
        _serve(sys.argv[1], MENDED in sys.argv)
