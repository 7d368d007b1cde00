"""Wakes a connection's I/O thread, once for all that was added before it looks."""

from __future__ import annotations

import threading
from collections.abc import Callable

from domain_events.errors import BrokerUnavailable


class Doorbell:
    """Whoever adds something for the I/O thread then rings; the I/O thread answers, then looks.

    A wake-up is a system call, so that one has to do for all that is added until the I/O thread
    answers. One too many is harmless, one too few leaves somebody waiting for ever. Invariant:
    while ``_rung`` is set, a wake-up is on its way to the I/O thread, or some thread is about to
    send one, or the I/O thread has promised to look anyhow (`mute`).

    No lock: a signal handler, or a finalizer, may ring in the middle of a `ring` on its own thread.
    It must then not rely on the one it has interrupted, which goes on only after it.

    :param wake: has the I/O thread answer and look; raises `BrokerUnavailable` when it has ended.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._rung = False
        self._ringing: set[int] = set()  # the threads that are in the middle of it

    def ring(self) -> None:
        """Any thread: have the I/O thread look."""
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
        """I/O thread: before it looks, so that whatever comes too late for that rings again."""
        self._rung = False

    def mute(self) -> None:
        """I/O thread: nobody needs to ring until the next `answer`, since it will look anyhow."""
        self._rung = True
