"""Tables on terminals of different widths."""

from __future__ import annotations

import sys

import pytest

from domain_events.cli import output

COLUMNS = "FAILED AT", "SUBSCRIBER", "ROUTING KEY", "ERROR", "MESSAGE", "RETRIES", "ID"
ID = "224b15ce-5a9f-40e2-ae12-b3b354942e17"
MESSAGE = "not enough values to unpack (expected 2, got 1), " * 3
ROW = "2026-11-26 11:21:16+00:00", "welcome-mail", "user.registered", "ValueError", MESSAGE, 1, ID


@pytest.mark.parametrize(("width", "is_table"), [(60, False), (80, False), (200, True)])
def test_id_is_in_one_piece_on_any_terminal(
    width: int, is_table: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is copied into the next command."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.table(COLUMNS, [ROW, ROW])
    printed = capsys.readouterr().out
    assert printed.count(ID) == 2
    assert printed.count("unpack") == 2 * 3, "all of the message"
    assert printed.count("SUBSCRIBER") == (1 if is_table else 2)


def test_table_elsewhere_has_a_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(COLUMNS, [ROW])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split("\t") == list(COLUMNS)
    assert row.split("\t") == [str(value) for value in ROW]


def test_table_without_rows_has_its_header(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.table(COLUMNS, [])
    assert "SUBSCRIBER" in capsys.readouterr().out
