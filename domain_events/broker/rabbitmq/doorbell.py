"""Wakes a connection's I/O thread, once for all work that was added before it checks."""

from __future__ import annotations

import threading
from collections.abc import Callable

from domain_events.errors import BrokerUnavailable


class Doorbell:
    """A thread that adds work for the I/O thread then rings; the I/O thread answers, then checks.

    A wake-up is a system call, so one has to suffice for all work that is added until the I/O
    thread answers. One too many is harmless, one too few leaves work waiting for ever. Invariant:
    while ``_rung`` is set, a wake-up is on its way to the I/O thread, or some thread is about to
    send one, or the I/O thread will check anyway (`mute`).

    No lock: a signal handler, or a finalizer, may ring in the middle of a `ring` on its own thread.
    It must then not rely on the one it has interrupted, which goes on only after it.

    :param wake: makes the I/O thread answer and check; raises `BrokerUnavailable` once it ended.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._rung = False
        self._ringing: set[int] = set()  # the threads that are in the middle of it

    def ring(self) -> None:
        """Any thread: make the I/O thread check for work."""
        thread = threading.get_ident()
        interrupting = thread in self._ringing
        if self._rung and not interrupting:
            return
        try:
            self._ringing.add(thread)
            self._rung = True
            self._wake()
        except BaseException as error:
            self._rung = False
            if not isinstance(error, BrokerUnavailable):
                # A signal handler raised. Meanwhile others may have relied on this wake-up.
                self._wake()
            raise
        finally:
            if not interrupting:
                self._ringing.discard(thread)

    def answer(self) -> None:
        """I/O thread: called before it checks, so that work added later rings again."""
        self._rung = False

    def mute(self) -> None:
        """I/O thread: no wake-up is needed until the next `answer`, since it will check anyway."""
        self._rung = True
