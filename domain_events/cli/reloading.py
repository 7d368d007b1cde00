"""Watches source files, for ``domain-events run --reload``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from domain_events.errors import ConfigurationError
from domain_events.log import Log
from domain_events.text import printable

log = Log("domain_events")


@contextlib.contextmanager
def watching(folder: Path, changed: Callable[[str], None]) -> Iterator[None]:
    """Call ``changed``, on a thread, with a few words whenever Python files below it have changed.

    :raises ConfigurationError: watchfiles is not installed.
    """
    try:
        from watchfiles import PythonFilter, watch  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "--reload needs one more package: pip install 'domain-events-rabbitmq[cli]'"
        ) from error
    ended = threading.Event()

    def run() -> None:
        try:
            for changes in watch(
                folder,
                watch_filter=PythonFilter(),
                stop_event=ended,
                raise_interrupt=False,
                ignore_permission_denied=True,
            ):
                names = sorted({Path(path).name for _, path in changes})
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                changed(f"{printable(', '.join(names[:3]))}{more} changed")
        except Exception as error:  # noqa: BLE001 - of the operating system, as too many watches
            log.error("Changes are not noticed any more: %s", printable(error))

    thread = threading.Thread(target=run, name="domain-events-reload", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)
