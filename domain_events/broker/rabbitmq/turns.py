"""Sets up channels in parallel, or one at a time to find the one that breaks the connection.

RabbitMQ closes the whole *connection* over some mistakes (an unknown exchange type, a denied
feature, too many channels for the user) without naming the channel. If only one channel was being
set up, that one is to blame. Otherwise the next connection sets them up one at a time until the
culprit is found; without that, one mistake would break all the other channels for ever.

All on the I/O thread.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from domain_events.broker.rabbitmq.errors import close_code

# The reply codes of mistakes (https://www.rabbitmq.com/amqp-0-9-1-reference#constants): FRAME_ERROR
# to RESOURCE_ERROR, NOT_ALLOWED, NOT_IMPLEMENTED, and INTERNAL_ERROR, which may also be the
# broker's own: that one counts the second time.
_INTERNAL_ERROR = 541
_MISTAKES = {501, 502, 503, 504, 505, 506, 530, 540, _INTERNAL_ERROR}


def is_mistake(error: BaseException | None) -> bool:
    """Whether the broker has closed the connection because of something done on it."""
    return close_code(error) in _MISTAKES


class Turn(Protocol):
    """A channel that is being set up."""

    @property
    def step(self) -> object:
        """The current step; compares equal to the same step on another connection."""

    def begin(self) -> None:
        """Begin to set it up."""

    def blame(self, reason: BaseException) -> None:
        """The broker has closed the connection because of this channel."""


class Turns:
    """The channels of one connection that are being set up."""

    def __init__(self) -> None:
        self._begun: list[Turn] = []
        self._waiting: deque[Turn] = deque()
        self._one_at_a_time = False
        self._suspects: list[object] = []  # steps that ended in an internal error

    def take(self, turn: Turn) -> None:
        """Begin at once, or after those before it."""
        self._waiting.append(turn)
        self._go_on()

    def ended(self, turn: Turn) -> None:
        """The channel is set up, or was refused."""
        if turn in self._begun:
            self._begun.remove(turn)
            self._go_on()
            if not self._begun:
                self._one_at_a_time = False
                self._suspects.clear()

    def lost(self, error: BaseException | None) -> None:
        """The connection is gone; blame the channel that caused it, if one did."""
        begun, self._begun = self._begun, []
        self._waiting.clear()
        if error is None or not is_mistake(error) or not begun:
            return
        # Until all are set up: there may be another culprit.
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
