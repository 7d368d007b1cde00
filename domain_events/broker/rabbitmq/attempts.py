"""Attempts to log in, across the process: a refused login is not repeated at once.

Repeated attempts with a wrong password may lock the account, and a program that creates a
`Publisher` for each event makes them even if nothing is retried. So a refusal is remembered for
some seconds, for every connection of this process. And until the first login at a broker has
succeeded, only one connection at a time tries; otherwise twenty of them would be refused at once.

Threads. The I/O threads of all links share this; everything is under one lock, held briefly.
"""

from __future__ import annotations

import threading
import time
from urllib.parse import urlsplit

from domain_events.process import on_fork

# Seconds for which a refusal is remembered.
_REFUSAL_TTL = 5.0
# Seconds after which others no longer wait for an attempt; pika's own time limit defaults to 15.
_LONGEST_ATTEMPT = 30.0


class Attempts:
    """The logins of this process. Keeps hashes of URLs only, as URLs contain passwords."""

    def __init__(self) -> None:
        self._refused: dict[int, tuple[float, str]] = {}
        self._good: set[int] = set()
        self.forget()

    def forget(self) -> None:
        """In the child of a fork: drop the attempts under way, which are the parent's."""
        self._lock = threading.RLock()
        self._under_way: dict[int, tuple[object, float]] = {}

    def refusal(self, url: str, *, login_only: bool) -> str | None:
        """Why this address refused a login a moment ago, if it did."""
        now = time.monotonic()
        with self._lock:
            for key in (_login(url),) if login_only else (_login(url), hash(url)):
                until, why = self._refused.get(key, (0.0, ""))
                if now < until:
                    return why
        return None

    def begin(self, url: str, owner: object) -> bool:
        """Begin an attempt. False: another is under way, and no login there has succeeded yet."""
        key, now = _login(url), time.monotonic()
        with self._lock:
            if key in self._good:
                return True
            other, since = self._under_way.get(key, (owner, now))
            if other is not owner and now - since < _LONGEST_ATTEMPT:
                return False
            self._under_way[key] = (owner, now)
            return True

    def ended(self, url: str, owner: object, *, connected: bool = False) -> None:
        """The attempt, or the connection that it made, has ended."""
        key = _login(url)
        with self._lock:
            if self._under_way.get(key, (None, 0.0))[0] is owner:
                del self._under_way[key]
            if connected:
                self._good.add(key)
                self._refused.pop(key, None)
                self._refused.pop(hash(url), None)
            else:
                self._good.discard(key)

    def refused(self, url: str, why: str, *, login: bool) -> None:
        """The attempt was refused for good; ``login``: for any vhost and options of the URL."""
        now = time.monotonic()
        with self._lock:
            for key, (until, _) in list(self._refused.items()):
                if until < now:
                    del self._refused[key]
            self._refused[_login(url) if login else hash(url)] = (now + _REFUSAL_TTL, why)


def _login(url: str) -> int:
    parts = urlsplit(url)
    return hash((parts.scheme, parts.netloc))


attempts = Attempts()
on_fork(attempts.forget)
