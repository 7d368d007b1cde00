"""The main job, told as it happens: publish, subscribe, a retry, a dead letter, its replay.

Two subscribers and a publisher run as processes of their own, as they would in two services; the
process that the user started tells what they do and decides when the next thing happens. It works
on an exchange and queues of its own and deletes them at the end.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
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

# Seconds that any step may take; on a slow machine the first declaration of all queues is one.
_PATIENCE = 30.0
_BROKER_TIMEOUT = 10.0


def run(url: str) -> None:
    """Run the demo on the broker at ``url``.

    :raises DomainEventsError: no broker there, for example.
    """
    _say("A domain event is a fact that other services may want to hear.")
    _say(f"Broker: {settings.shown(url)}")
    _clean_up(url)  # after an earlier one that was killed; also says when there is no broker
    try:
        with _Service("mailer", url, MAILER) as mailer, _Service("ledger", url, LEDGER) as ledger:
            _title("Two services subscribe, each with a queue of its own")
            mailer.wait_for("listens")
            ledger.wait_for("listens")

            _title("A third one publishes, without knowing them: both hear of it")
            _publish(url, "user.registered", {"user": "Ada"})
            mailer.wait_for("mail to Ada is sent")
            ledger.wait_for("entry for user.registered")

            _title("A handler asks for a retry: the event comes back to it alone, a second later")
            _publish(url, "user.imported", {"user": "Grace"})
            mailer.wait_for("mail to Grace is sent")

            _title("A handler has a bug: its event is kept as a dead letter, with the reason")
            _publish(url, "invoice.issued", {"amount": "12.50"})
            ledger.wait_for("entry for user.imported")
            ledger.wait_for("booking")
            with DeadLetters(LEDGER, url) as dead_letters:
                _wait_until(lambda: dead_letters.count() == 1)
                for letter in dead_letters:
                    _say(f"dead letter of {letter.subscriber}: {letter.routing_key}")
                    _say(f"  {letter.error_type}: {letter.error_message}")

            _title("The service is stopped, mended and started again")
            ledger.stop()
            ledger.start("--mended")
            ledger.wait_for("listens")

            _title("The dead letter is replayed: nothing was lost")
            with DeadLetters(LEDGER, url) as dead_letters:
                _say(f"replayed: {dead_letters.replay_all()}")
                ledger.wait_for("12.50 is booked")
                _say(f"dead letters left: {dead_letters.count()}")
    finally:
        _clean_up(url)
    _title("Done. The queues and the exchange of this demo are deleted.")


def serve(role: str, mended: bool) -> None:
    """Be one of the two services, until SIGTERM."""
    logging.disable(logging.ERROR)  # the demo tells it in its own words
    subscriber = Subscriber(exchange=EXCHANGE)
    if role == MAILER:
        subscriber.register(_send_mail, MAILER, ["user.*"], max_retries=3)
    else:
        book = _book_mended if mended else _book
        subscriber.register(book, LEDGER, ["#"])
    print("listens", flush=True)
    subscriber.start_consuming()
    print("has stopped in order", flush=True)


def _send_mail(event: DomainEvent) -> None:
    user = event.data["user"]
    if event.routing_key == "user.imported" and event.retries == 0:
        print(f"the mail server is busy; raise Retry(1.0) for {user}", flush=True)
        raise Retry(1.0)
    later = f", after {time.time() - event.timestamp:.2f} s" if event.retries else ""
    print(f"mail to {user} is sent (retries: {event.retries}{later})", flush=True)


def _book(event: DomainEvent) -> None:
    if event.routing_key == "invoice.issued":
        print(f"booking {event.data['amount']} ...", flush=True)
        int(event.data["amount"])  # the bug: amounts have cents
    print(f"entry for {event.routing_key}", flush=True)


def _book_mended(event: DomainEvent) -> None:
    print(f"{float(event.data['amount']):.2f} is booked (retries: {event.retries})", flush=True)


def publish(routing_key: str, name: str, value: str) -> None:
    """Be the publishing service, for one event."""
    with Publisher(exchange=EXCHANGE) as publisher:
        event = publisher.publish(DomainEvent(routing_key, {name: value}))
        print(f"published and confirmed: {event.routing_key} {event.data}", flush=True)


def _publish(url: str, routing_key: str, data: dict[str, str]) -> None:
    ((name, value),) = data.items()
    with _Service("shop", url, "publish", routing_key, name, value) as shop:
        shop.wait_for("confirmed")


class _Service:
    """One of the services, as a process whose lines are told here."""

    def __init__(self, label: str, url: str, *arguments: str) -> None:
        self._label = label
        # Not among the arguments, which everybody on the machine can read.
        self._environment = {**os.environ, settings.ENVIRONMENT[0]: url}
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
        self._process = subprocess.Popen(
            [sys.executable, "-m", "domain_events.demo", *self._arguments, *options],
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
            # Ctrl-C is for the demo, which then stops its services in order.
            start_new_session=True,
        )
        self._teller = threading.Thread(target=self._tell, daemon=True)
        self._teller.start()

    def wait_for(self, words: str) -> None:
        """Until the service has said so, since it was started."""
        with self._heard:
            said = self._heard.wait_for(
                lambda: any(words in line for line in self._lines) or not self._teller.is_alive(),
                _PATIENCE,
            )
            if not said or not any(words in line for line in self._lines):
                raise SystemExit(f"The demo got stuck: {self._label} did not say {words!r}.")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._teller.join(_PATIENCE)

    def _tell(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._heard:
                    print(f"  {self._label:>8} | {line.rstrip()}", flush=True)
                    self._lines.append(line)
                    self._heard.notify_all()
        with self._heard:
            self._heard.notify_all()


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
    print(f"\n== {text}", flush=True)


def _say(text: str) -> None:
    print(f"  {'demo':>8} | {text}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "publish":
        publish(*sys.argv[2:])
    else:
        serve(sys.argv[1], mended="--mended" in sys.argv)
