"""An event that ends every process that handles it, in processes of its own."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from bench import Bench

from domain_events import DeadLetters

# Handled, and not yet acked when the culprit ended the process. Up to RabbitMQ 4.2, which counts
# orderly stops too, what failed less than three times is no suspect, and not handled alone.
MOST_TIMES = 4

PROGRAM = Path(__file__).parent / "programs" / "poisoned.py"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exit", "kill", "sys.exit"])
def test_neighbours_are_handled_and_the_culprit_is_a_dead_letter(
    bench: Bench, tmp_path: Path, how: str
) -> None:
    """However it ends them; each event is handled, and no other becomes a dead letter."""
    queue, handled = bench.names.queue(), tmp_path / "handled"
    command = [sys.executable, str(PROGRAM), bench.url, bench.exchange, queue, str(handled), how]
    with bench.subscriber() as subscriber:
        subscriber.register(print, queue, ["#"])
    events = ["first", "poison", *map(str, range(20))]
    published = [bench.publish("n.n", data) for data in events]
    done = subprocess.run(
        command, check=True, timeout=140, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    starts = int(done.stdout)
    lines = Counter(handled.read_text().split())
    assert set(lines) == {*events} - {"poison"}
    assert max(lines.values()) <= MOST_TIMES
    with DeadLetters(queue, bench.url) as dead_letters:
        (letter,) = dead_letters
    assert letter.event == published[1]
    assert letter.error_type == ("SystemExit" if how == "sys.exit" else "delivery limit")
    assert letter.error_message
    assert 10 < starts <= 21
