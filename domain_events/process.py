"""Detects that this process is the child of a fork, even of one made in C.

A child inherits the parent's sockets, locks and queues, but none of its threads. Code that keeps
such things at module level or in connections registers a hook with `on_fork`, which drops them
without affecting the parent's. Python runs the hooks after ``os.fork``; servers that fork in
C (uWSGI) do not run them, so code that is about to use such a thing calls `check_fork` first,
before it takes any lock: the parent may have held it.

On Windows, which has no fork, this does nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

_hooks: list[Callable[[], None]] = []
_pid = os.getpid()
# A lock for each process: that of the parent may have been held while it forked.
_locks: dict[int, threading.RLock] = {}
# The process in which the hooks run, or ran last: a child may be forked meanwhile.
_running_in = _pid


def on_fork(hook: Callable[[], None]) -> None:
    """Call ``hook`` in each child of a fork, before anything is used there."""
    _hooks.append(hook)


def check_fork() -> None:
    """Run the hooks if this process was forked since they last ran."""
    if os.getpid() != _pid:
        _in_child()


def _in_child() -> None:
    global _pid, _running_in
    pid = os.getpid()
    with _locks.setdefault(pid, threading.RLock()):
        # A hook may itself call `check_fork`, on this thread.
        if pid in (_pid, _running_in):
            return
        _running_in = pid
        try:
            for hook in _hooks:
                hook()
        finally:
            _pid = pid


# Not on Windows, where no process forks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
