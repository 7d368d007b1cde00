"""Whose turn it is to make a channel ready, and whose fault it is that the connection was closed.

RabbitMQ closes the whole *connection* over some mistakes (an exchange of a type that it does not
know, a feature that is denied, a channel too many for the user), and does not name the culprit. If
one channel alone was being made ready, it was that one's. Else they go one at a time on the next
connection until it is found; otherwise one mistake would take all others with it, for ever.

All on the I/O thread.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from domain_events.broker.rabbitmq.nodes import close_code

# The reply codes of mistakes (https://www.rabbitmq.com/amqp-0-9-1-reference#constants): FRAME_ERROR
# to RESOURCE_ERROR, NOT_ALLOWED, NOT_IMPLEMENTED, and INTERNAL_ERROR, which may also be the
# broker's own: that one counts the second time.
_INTERNAL_ERROR = 541
_MISTAKES = {501, 502, 503, 504, 505, 506, 530, 540, _INTERNAL_ERROR}


def is_mistake(error: BaseException | None) -> bool:
    """Whether the broker has closed the connection over something that was done on it."""
    return close_code(error) in _MISTAKES


class Turn(Protocol):
    """A channel that is being made ready."""

    @property
    def step(self) -> object:
        """What it is doing, equal for the same on another connection."""

    def begin(self) -> None:
        """Its turn has come."""

    def blame(self, reason: BaseException) -> None:
        """The broker has closed the connection over this one."""


class Turns:
    """The channels of one connection that are being made ready."""

    def __init__(self) -> None:
        self._begun: list[Turn] = []
        self._waiting: deque[Turn] = deque()
        self._one_at_a_time = False
        self._suspects: list[object] = []  # steps over which there was an internal error

    def take(self, turn: Turn) -> None:
        """Begin at once, or when those before it have ended."""
        self._waiting.append(turn)
        self._go_on()

    def ended(self, turn: Turn) -> None:
        """It is ready, or was refused."""
        if turn in self._begun:
            self._begun.remove(turn)
            self._go_on()
            if not self._begun:
                self._one_at_a_time = False
                self._suspects.clear()

    def lost(self, error: BaseException | None) -> None:
        """The connection is gone; if it was somebody's fault, that one is blamed."""
        begun, self._begun = self._begun, []
        self._waiting.clear()
        if error is None or not is_mistake(error) or not begun:
            return
        # Until all have been made ready: there may be another culprit.
        self._one_at_a_time = True
        if len(begun) == 1:
            step = begun[0].step
            if close_code(error) == _INTERNAL_ERROR and step not in self._suspects:
                self._suspects.append(step)
            else:
                begun[0].blame(error)

    def _go_on(self) -> None:
        while self._waiting and not (self._one_at_a_time and self._begun):
            turn = self._waiting.popleft()
            self._begun.append(turn)
            turn.begin()
