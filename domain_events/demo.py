"""A day in the life of an event: publish, subscribe, a retry, a dead letter, its replay.

Two services subscribe, each on a thread and connections of its own; a third one publishes. The demo
decides when the next thing happens. It works on an exchange and queues of its own and deletes them
at the end.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from domain_events import log, settings
from domain_events.address import shown
from domain_events.broker import connect
from domain_events.dead_letters import DeadLetters
from domain_events.errors import DomainEventsError
from domain_events.events import DomainEvent
from domain_events.publisher import Publisher
from domain_events.retry import Retry
from domain_events.subscriber import Subscriber
from domain_events.text import printable

EXCHANGE = "domain-events-demo"
MAILER, LEDGER = "demo-mailer", "demo-ledger"

#: Every demo has an embedded broker of its own.
EMBEDDED = ("memory://demo",)

# Seconds that any step may take; on a slow machine the first declaration of all queues is one.
_STEP_TIMEOUT = 30.0
_BROKER_TIMEOUT = 10.0


_BROKER_HELP = f"""
    run it on RabbitMQ: at URL (whose password other users of this machine may see for a moment),
    else at the URL in the environment ({", ".join(settings.ENVIRONMENT)}), else on localhost.
    Without this option, run it on an embedded broker, which needs no set-up
"""


def parser() -> argparse.ArgumentParser:
    """Its options, as ``--help`` shows them."""
    options = argparse.ArgumentParser(
        prog="domain-events demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--broker", metavar="URL", nargs="?", const="", help=_BROKER_HELP)
    return options


def main(arguments: Sequence[str]) -> int:
    """``domain-events demo``; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        if options.broker is None:
            run()
        else:
            run(settings.resolve(options.broker) or EMBEDDED)
    except DomainEventsError as error:
        print(f"domain-events: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def run(urls: Sequence[str] = EMBEDDED) -> None:
    """Run the demo on the broker at these URLs.

    :raises DomainEventsError: no broker there, for example.
    """
    _say("A domain event is a fact that other services may want to know.")
    embedded = " (embedded in this process)" if tuple(urls) == EMBEDDED else ""
    _say(f"Broker: {', '.join(map(shown, urls))}{embedded}")
    with _quiet():
        _clean_up(urls)  # after a demo that was killed; raises at once if there is no broker
        try:
            _show(urls)
        finally:
            _clean_up(urls)
    _title("Done. The queues and the exchange of this demo are deleted.")


def _show(urls: Sequence[str]) -> None:
    _title("Two services subscribe, each with a queue of its own")
    mailer = _Service("mailer", urls)
    ledger = _Service("ledger", urls)
    with (
        mailer.running(_send_mail, MAILER, ["user.*"], max_retries=3),
        Publisher(urls, EXCHANGE) as publisher,
        DeadLetters(LEDGER, urls) as dead_letters,
    ):
        with ledger.running(_book, LEDGER, ["#"]):
            _title("A third one publishes, without knowing them: both get the event")
            _publish(publisher, "user.registered", {"user": "Ada"})
            mailer.wait_for("mail to Ada is sent")
            ledger.wait_for("entry for user.registered")

            _title("A handler requests a retry: the event returns to it alone, a second later")
            _publish(publisher, "user.imported", {"user": "Grace"})
            mailer.wait_for("mail to Grace is sent")
            ledger.wait_for("entry for user.imported")

            _title("A handler has a bug: its event is kept as a dead letter, with the reason")
            _publish(publisher, "invoice.issued", {"amount": "12.50"})
            ledger.wait_for("booking")
            _wait_until(lambda: dead_letters.count() == 1, "the dead letter")
            for letter in dead_letters:
                _say(f"dead letter of {letter.subscriber}: {letter.routing_key}")
                _say(f"  {letter.error_type}: {printable(letter.error_message)}")

        _title("The service is stopped, fixed and started again")
        with ledger.running(_book_fixed, LEDGER, ["#"]):
            _title("The dead letter is replayed: nothing was lost")
            _say(f"replayed: {dead_letters.replay_all()}")
            ledger.wait_for("12.50 is booked")
            _say(f"dead letters left: {dead_letters.count()}")


def _publish(publisher: Publisher, routing_key: str, data: dict[str, str]) -> None:
    event = publisher.publish(DomainEvent(routing_key, data))
    _say(f"published and confirmed: {event.routing_key} {event.data}", "shop")


# --- the handlers of the services ----------------------------------------------------------------


def _send_mail(event: DomainEvent, say: Callable[[str], None]) -> None:
    user = event.data["user"]
    if event.routing_key == "user.imported" and event.retries == 0:
        say(f"the mail server is busy; raise Retry(1.0) for {user}")
        raise Retry(1.0)
    later = f", after {time.time() - event.timestamp:.2f} s" if event.retries else ""
    say(f"mail to {user} is sent (retries: {event.retries}{later})")


def _book(event: DomainEvent, say: Callable[[str], None]) -> None:
    if event.routing_key == "invoice.issued":
        say(f"booking {event.data['amount']} ...")
        int(event.data["amount"])  # the bug: amounts have cents
    say(f"entry for {event.routing_key}")


def _book_fixed(event: DomainEvent, say: Callable[[str], None]) -> None:
    say(f"{float(event.data['amount']):.2f} is booked (retries: {event.retries})")


class _Service:
    """A service that subscribes, and the lines it has printed."""

    def __init__(self, label: str, urls: Sequence[str]) -> None:
        self._label = label
        self._urls = urls
        self._lines: list[str] = []

    @contextmanager
    def running(
        self,
        handler: Callable[[DomainEvent, Callable[[str], None]], None],
        name: str,
        binding_keys: Sequence[str],
        max_retries: int = 0,
    ) -> Iterator[None]:
        """Consume on a thread until the end of the block."""
        subscriber = Subscriber(self._urls, EXCHANGE)
        subscriber.register(
            lambda event: handler(event, self._say), name, binding_keys, max_retries=max_retries
        )
        thread = threading.Thread(target=subscriber.start_consuming, daemon=True)
        thread.start()
        self._say("is consuming")
        try:
            yield
        finally:
            subscriber.stop_consuming()
            thread.join(_STEP_TIMEOUT)
        self._say("has stopped in order")

    def wait_for(self, words: str) -> None:
        """Wait until the service has printed this."""
        _wait_until(lambda: any(words in line for line in self._lines), f"{self._label}: {words}")

    def _say(self, text: str) -> None:
        _say(text, self._label)
        self._lines.append(text)


def _clean_up(urls: Sequence[str]) -> None:
    consuming = connect(tuple(urls)).consuming("demo", lambda: None)
    try:
        consuming.delete([MAILER, LEDGER], EXCHANGE, _BROKER_TIMEOUT)
    finally:
        consuming.close(_BROKER_TIMEOUT)


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines between those of the demo."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        log.flush()
        logging.disable(before)


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _STEP_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"The demo got stuck while waiting for {what}.")
        time.sleep(0.05)


def _title(text: str) -> None:
    _print(f"\n== {text}")


def _say(text: str, who: str = "demo") -> None:
    _print(f"  {who:>8} | {text}")


def _print(text: str) -> None:
    # In one piece: threads print side by side.
    print(f"{text}\n", end="", flush=True)
