"""The matrix of kills of the outbox and the inbox: what is right passes, what is broken does not.

One run is a program with processes, a database and a RabbitMQ of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import outbox_faults
import pytest
from databases import PostgreSQL
from outbox_adapters import ADAPTERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # for what hangs: a run takes less than a minute on a quiet machine
    pytest.mark.usefixtures("rabbitmq_release"),
    pytest.mark.skipif(
        os.environ.get("DOMAIN_EVENTS_TEST_DATABASES") == "none" or not PostgreSQL.installed(),
        reason="takes a PostgreSQL: it is not installed, or may not be started",
    ),
]

thorough = pytest.mark.skipif(
    not os.environ.get("DOMAIN_EVENTS_TEST_FAULTS"),
    reason="takes eight minutes: set DOMAIN_EVENTS_TEST_FAULTS=1",
)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    release = os.environ.get("DOMAIN_EVENTS_TEST_RELEASE") or "host"
    words = [sys.executable, outbox_faults.__file__, "--release", release, *arguments]
    return subprocess.run(
        list(map(str, words)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=580,
        check=False,
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_outbox_and_inbox_keep_their_promises_while_everything_is_killed(
    adapter: str, tmp_path: Path
) -> None:
    """Each kind of fault once; `make kills` injects as many as wanted."""
    file, kept = tmp_path / "report.inc", tmp_path / "kept.json"
    words = ("--adapter", adapter, "--transactions", 240, "--seed", 5)
    done = run(*words, "--report", file, "--json", kept)
    assert done.returncode == 0, done.stdout
    assert "as promised" in done.stdout
    written = file.read_text()
    for fault in ("database killed", "RabbitMQ killed, and started", "and away", "relay stopped"):
        assert fault in written
    for fault in ("service killed", "relay killed", "subscriber killed"):
        assert fault in written, "no process was killed at a step"
    assert outbox_faults.show([kept]) == written
    assert "   * - transactions\n     - 240\n     - 240\n     - 480\n" in outbox_faults.show(
        [kept] * 2
    )


#: By what is broken: what the verdict must find.
FOUND = {
    "delete before the confirm": "committed, but never arrived",
    "publish before the commit": "arrived, but rolled back",
    "cursor by id": "committed, but never arrived",
    "inbox outside of the transaction": "committed, but never handled",
}


@thorough
@pytest.mark.parametrize("broken", outbox_faults.BROKEN)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_matrix_finds_what_is_broken_on_purpose(adapter: str, broken: str) -> None:
    words = ("--adapter", adapter, "--transactions", 150, "--seed", 2)
    done = run(*words, "--broken", broken)
    assert done.returncode == 1, done.stdout
    assert f"NOT AS PROMISED: {FOUND[broken]}" in done.stdout
