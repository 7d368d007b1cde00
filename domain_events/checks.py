"""Options of public calls, checked where they are given. Pure.

Each returns the value as its exact type (also if given an Enum member or a numpy number), or raises
a `ConfigurationError` that names the option, the value, and what it must be.
"""

from __future__ import annotations

import sys
import threading

from domain_events.address import Address
from domain_events.errors import ConfigurationError
from domain_events.text import plain, printable


def whole_number(value: object, option: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise refusal(value, option, f"an int from {least:,} to {most:,}")
    return int.__int__(value)


def flag(value: object, option: str) -> bool:
    if not isinstance(value, bool):
        raise refusal(value, option, "True or False")
    return value


def seconds(value: object, option: str = "timeout", *, zero: bool = False) -> float:
    """A positive number of seconds; with ``zero``, also 0."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (value >= 0 if zero else value > 0)  # a NaN compares false
        or value > threading.TIMEOUT_MAX
    ):
        right = "0 or a positive number of seconds" if zero else "a positive number of seconds"
        hint = "; give its total_seconds()" if hasattr(value, "total_seconds") else ""
        raise refusal(value, option, right, hint)
    return float.__float__(value) if isinstance(value, float) else int.__int__(value)


def refusal(value: object, option: str, right: str, hint: str = "") -> ConfigurationError:
    """The error for an option that must be something else."""
    kind = "" if value is None else f" (of type {type(value).__name__})"
    return ConfigurationError(f"{option} must be {right}, not {shown(value)}{kind}{hint}.")


def shown(value: object) -> str:
    """The value for an error: short, on one line, a str in quotes, a URL without its password."""
    if "://" in printable(value, sys.maxsize):
        # A broker's URL passed as another argument.
        if isinstance(value, str):
            return repr(Address(plain(value)))
        return f"<a {type(value).__name__} that contains a URL>"
    # An exception's str() may be empty, or look like a name.
    text = printable(repr(value) if isinstance(value, BaseException) else value, 80)
    return f"'{text}'" if isinstance(value, str) else text
