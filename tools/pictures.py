"""Draws the pictures of the documentation: ``python tools/pictures.py`` writes docs/pictures/*.svg.

tests/test_pictures.py compares the files with what this draws.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sheet import Sheet, Timeline

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"


def life_of_an_event() -> str:
    """The whole way, from a publisher to two subscribers, a retry and a dead letter."""
    sheet = Sheet(
        "The life of an event",
        "A shop publishes user.registered to the exchange domain-events. It reaches the queues of "
        "two subscribers, mailer and ledger. The mailer's handler requests a retry, and the event "
        "returns to the mailer alone after 30 seconds. The ledger's handler fails, and the event "
        "is kept among the ledger's dead letters, from where it is replayed.",
    )
    sheet.box(70, 10, 210, 44, "box", "publish_domain_event(", "'user.registered', ...)", code=2)
    sheet.arrow((175, 54), (175, 84))
    sheet.text(182, 74, "confirmed: on disk", "faint")
    sheet.box(85, 86, 180, 34, "box round", "domain-events", code=1)
    for x, key, name, handler in (
        (85, "user.*", "mailer", "send_mail"),
        (265, "#", "ledger", "book"),
    ):
        sheet.arrow((175 + (x - 175) / 2, 120), (x, 158))
        sheet.text(x + (-34 if x < 175 else 24), 142, key, "mid code")
        sheet.box(x - 65, 160, 130, 34, "queue", name, code=1)
        sheet.arrow((x, 194), (x, 220))
        sheet.box(x - 65, 222, 130, 34, "box", f"{handler}(event)", code=1)
    sheet.arrow((60, 256), (60, 298))
    sheet.text(66, 282, "Retry(30)", "code")
    sheet.box(20, 300, 120, 46, "queue", "waits 30 s, for", "mailer alone")
    sheet.arrow((20, 322), (10, 322), (10, 177), (18, 177), again=True)
    sheet.arrow((290, 256), (290, 298))
    sheet.text(284, 282, "any exception", "end")
    sheet.box(170, 300, 160, 46, "kept", "ledger-dl", "kept, with the reason", code=1)
    sheet.arrow((330, 322), (341, 322), (341, 177), (332, 177), again=True)
    sheet.text(336, 364, "replay, by an operator", "end faint")
    return sheet.svg()


def delay_levels() -> str:
    """How 1.3 seconds are waited for in levels."""
    sheet = Sheet(
        "A retry after 1.3 seconds",
        "1.3 seconds are 13 tenths, in binary 1101. The event waits 0.8 seconds in level 3 and 0.4 "
        "seconds in level 2, passes level 1 without waiting, waits 0.1 seconds in level 0, and "
        "returns through domain-events.due to the queue of its own subscriber.",
    )
    sheet.text(175, 24, "1.3 s = 13 tenths of a second = 1101", "mid bold")
    sheet.text(14, 52, "level", "faint")
    sheet.text(112, 52, "bit", "mid faint")
    sheet.text(336, 52, "still to wait", "end faint")
    left = 1.3
    y = 62
    for level, bit in ((3, 1), (2, 1), (1, 0), (0, 1)):
        seconds = 2**level / 10
        sheet.text(14, y + 22, f"{level}: {seconds:g} s")
        sheet.text(112, y + 22, str(bit), "mid code")
        sheet.text(336, y + 22, f"{left:.1f} s", "end")
        if bit:
            sheet.box(140, y, 130, 34, "queue", f"waits {seconds:g} s")
        else:
            sheet.text(205, y + 22, "passes", "mid faint")
        left = round(left - seconds * bit, 1)
        sheet.arrow((205, y + (34 if bit else 26)), (205, y + 48))
        y += 50
    sheet.text(14, y + 22, "domain-events.due", "code")
    sheet.box(152, y, 106, 34, "box round", "is due")
    sheet.text(336, y + 22, "0.0 s", "end")
    sheet.arrow((205, y + 34), (205, y + 48))
    sheet.box(140, y + 50, 130, 34, "queue", "mailer", code=1)
    return sheet.svg()


def publishing() -> str:
    """What a crash leaves, before and after the confirm."""
    return (
        Timeline(
            "Publishing: what a crash leaves",
            "A program publishes an event, RabbitMQ stores it on disk in every bound queue and "
            "confirms it, and the call returns. If the program or the broker dies before the "
            "confirm, nobody knows whether the event is stored, and the call raises or sends it "
            "again with the same id. After the confirm it is stored.",
            ["Your thread", "RabbitMQ"],
        )
        .send("Your thread", "RabbitMQ", "publish the event")
        .work("RabbitMQ", "on disk, in each queue")
        .kill("Killed here: perhaps stored.", "Connection lost: sent again, same id")
        .send("RabbitMQ", "Your thread", "confirm")
        .kill("The call has returned: stored,", "whoever is killed now")
        .svg()
    )


def handling() -> str:
    """What a crash leaves, before and after the ack."""
    return (
        Timeline(
            "Handling: what a crash leaves",
            "RabbitMQ delivers an event, the handler runs and returns, and the event is acked. If "
            "the process is killed at any moment before the ack has arrived, the event is "
            "delivered again with the same id.",
            ["RabbitMQ", "Handler"],
        )
        .send("RabbitMQ", "Handler", "event")
        .work("Handler", "runs, and returns", 36)
        .kill("Killed before the ack: it comes again,", "with the same id")
        .send("Handler", "RabbitMQ", "ack")
        .send("RabbitMQ", "Handler", "next event")
        .svg()
    )


def moving() -> str:
    """A retry, a dead letter, a replay."""
    return (
        Timeline(
            "Retry, dead letter, replay: one movement",
            "The event is published to its new queue, the broker confirms it there, and only then "
            "is the original acked. If the process is killed before the confirm, the original is "
            "delivered again. If it is killed between the confirm and the ack, there are two "
            "copies, never none.",
            ["Its queue", "Subscriber", "New queue"],
        )
        .send("Its queue", "Subscriber", "event")
        .send("Subscriber", "New queue", "publish")
        .kill("Killed here: the event comes again")
        .send("New queue", "Subscriber", "confirm")
        .kill("Killed here: two copies, never none")
        .send("Subscriber", "Its queue", "ack")
        .svg()
    )


def io_thread() -> str:
    """How threads, two connections and the broker work together."""
    sheet = Sheet(
        "Two connections, each with an I/O thread",
        "Threads that publish append their events to a queue and wake the I/O thread of the "
        "publishing connection. It sends all that waits in one write, and wakes each caller when "
        "the broker has confirmed its event. Deliveries arrive on the I/O thread of the consuming "
        "connection, wait in an inbox, and are taken by the threads that run handlers. What these "
        "have finished goes back to the I/O thread, which acks it in batches.",
    )
    for x, first, role in ((92, "publishes", "publishing"), (258, "runs handlers", "consuming")):
        sheet.box(x - 80, 12, 160, 44, "box", "a thread of yours", first)
        sheet.box(x - 80, 118, 160, 46, "box round", "I/O thread", role)
    sheet.arrow((62, 56), (62, 116))
    sheet.text(68, 80, "events,")
    sheet.text(68, 96, "one wake-up")
    sheet.arrow((156, 118), (156, 58), again=True)
    sheet.arrow((206, 118), (206, 58))
    sheet.text(212, 80, "inbox")
    sheet.arrow((322, 56), (322, 116), again=True)
    sheet.text(316, 104, "outcomes", "end")
    sheet.box(12, 232, 326, 34, "queue", "RabbitMQ")
    sheet.arrow((62, 164), (62, 230))
    sheet.text(68, 190, "up to 2,000")
    sheet.text(68, 206, "unconfirmed")
    sheet.arrow((156, 232), (156, 166), again=True)
    sheet.arrow((206, 232), (206, 166))
    sheet.text(212, 190, "up to the")
    sheet.text(212, 206, "prefetch")
    sheet.arrow((322, 164), (322, 230), again=True)
    sheet.text(316, 222, "acks", "end")
    sheet.text(175, 288, "dashed: confirms, outcomes, acks", "mid faint")
    return sheet.svg()


def stopping() -> str:
    """An orderly stop, and what a kill in the middle of it leaves."""
    return (
        Timeline(
            "Stopping: what a crash leaves",
            "On SIGTERM the subscriber takes no more events from its inbox, lets running handlers "
            "finish, acks what they have handled, and closes the connection, upon which RabbitMQ "
            "requeues what was not begun. If the process is killed at any moment, unacked events "
            "are delivered again.",
            ["RabbitMQ", "Subscriber"],
        )
        .work("Subscriber", "SIGTERM: the handler ends", 36)
        .kill("Killed here: its event comes again")
        .send("Subscriber", "RabbitMQ", "acks of all that ended")
        .send("Subscriber", "RabbitMQ", "cancel, close")
        .work("RabbitMQ", "the rest is requeued", 30)
        .kill("Nothing lost, nothing delayed,", "nothing handled twice")
        .svg()
    )


TRACE = Path(__file__).parent.parent / "docs" / "trace-linked.txt"


def trace() -> str:
    """The spans of docs/trace-linked.txt, which a test of OpenTelemetry compares with real ones."""
    traces = [part.splitlines() for part in TRACE.read_text().split("\n\n")]
    sheet = Sheet(
        "The traces of one event",
        "Five traces. A request publishes an event. Its handler is called three times, each time "
        "in a trace of its own: first it requests a retry, then it fails and the event is a dead "
        "letter, and after a replay it succeeds. Each trace is linked to the one before.",
    )
    y, places = 10.0, dict[str, float]()
    for spans in traces:
        top = y
        y += 6
        for line in spans:
            y = _span(sheet, line, y, places)
        y += 8
        sheet.behind(
            f'<rect class="box" x="8" y="{top:g}" width="334" height="{y - top:g}" rx="4"/>'
        )
        y += 12
    return sheet.svg()


def _span(sheet: Sheet, line: str, y: float, places: dict[str, float]) -> float:
    """One span: a bar, its name, and below it its outcome; returns where the next one begins."""
    name, _, about = re.sub("[├└]─ ", "", line).partition("  ")
    indent = 14 if line[0] in "├└" else 0
    number = re.match(r"\[(\d)\] ", name)
    # The exchange and what the picture is about anyway are left out of the name.
    short = name.replace("domain-events:", "").replace("user.registered:", "")
    kind, _, links = about.strip().partition(" -> ")
    outcome = kind.partition(" ")[2].replace("ERROR: ", "").rstrip()
    y += 18
    sheet.shape(
        f'<rect class="span" x="{16 + indent}" y="{y - 10:g}" width="6" height="12"/>', y + 2
    )
    sheet.text(28 + indent, y, short, "code")
    if number:
        places[number[1]] = y
    if outcome:
        y += 17
        sheet.text(28 + indent, y, outcome, "good" if outcome == "handled" else "faint")
    if links and not indent:
        end = places[links.split(", ")[-1]]
        begin = y - (17 if outcome else 0)
        # Beside the one before, which ends where this one may begin.
        x = 332 - 10 * (len(places) % 2)
        sheet.arrow((300, begin - 4), (x, begin - 4), (x, end - 4), (298, end - 4), again=True)
    return y


def waiting() -> str:
    """A retry that waits while the broker is killed."""
    return (
        Timeline(
            "Waiting for a retry: what a crash leaves",
            "An event waits on disk in the queue of a delay level. When its time has passed, it is "
            "published to the next level, confirmed there, and only then removed; at the end it "
            "returns to the queue of its subscriber in the same way. If the broker is killed while "
            "it waits, it is still there afterwards. If it is killed before the confirm, there may "
            "be two copies, never none.",
            ["Delay level", "Next level", "Its queue"],
        )
        .work("Delay level", "waits on disk", 34)
        .kill("Broker killed: it is still there,", "and perhaps comes late")
        .send("Delay level", "Next level", "time is up")
        .send("Next level", "Delay level", "confirm")
        .kill("Killed before the confirm:", "perhaps two copies, never none")
        .send("Next level", "Its queue", "time is up")
        .send("Its queue", "Next level", "confirm")
        .svg()
    )


def poison() -> str:
    """An event whose handler kills the process."""
    return (
        Timeline(
            "An event that kills its process",
            "A process gets an event together with others, and its handler kills the process. All "
            "of them come again, and this event comes alone, so that further failures count for it "
            "alone. After twenty of them it becomes a dead letter: it is published to the dead "
            "letters, confirmed there, and acked. The others are handled.",
            ["Its queue", "Process", "Dead letters"],
        )
        .send("Its queue", "Process", "with others")
        .kill("It kills the process: all come again,", "and it comes alone")
        .send("Its queue", "Process", "alone")
        .kill("Killed again: counted for it alone")
        .send("Its queue", "Process", "the 21st time")
        .send("Process", "Dead letters", "publish")
        .send("Dead letters", "Process", "confirm")
        .send("Process", "Its queue", "ack")
        .send("Its queue", "Process", "the others")
        .svg()
    )


def releases() -> str:
    """Two releases of one subscriber, and a binding key that only the new one lists."""
    return (
        Timeline(
            "Two releases of one subscriber",
            "The queue delivers an event to a process of the old release, which does not list its "
            "routing key and hands it back. After half a second, and later up to 15 seconds, the "
            "event is delivered again, until a process of the new release gets it, handles it and "
            "acks it. If there is none for 15 minutes, it becomes a dead letter.",
            ["Old release", "Queue", "New release"],
        )
        .send("Queue", "Old release", "a new key")
        .send("Old release", "Queue", "hand back")
        .work("Queue", "0.5 to 15 s")
        .send("Queue", "New release", "a new key")
        .send("New release", "Queue", "ack")
        .kill("No new release for 15 minutes:", "a dead letter, with this reason")
        .svg()
    )


PICTURES: dict[str, Callable[[], str]] = {
    "life-of-an-event.svg": life_of_an_event,
    "delay-levels.svg": delay_levels,
    "publishing.svg": publishing,
    "handling.svg": handling,
    "moving.svg": moving,
    "stopping.svg": stopping,
    "waiting.svg": waiting,
    "poison.svg": poison,
    "releases.svg": releases,
    "io-thread.svg": io_thread,
    "trace.svg": trace,
}


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw())
        print(FOLDER / name)


if __name__ == "__main__":
    main()
