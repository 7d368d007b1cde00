"""Text from outside: reduced to a plain ``str`` where it comes in, made harmless where it is shown.

Pure. Names, keys and ids may be subclasses of ``str`` whose ``str()`` is something else (an Enum
member); text of other programs may contain control characters that move a terminal's cursor,
newlines that forge log lines, or a megabyte.
"""

from __future__ import annotations

#: The most characters of foreign text in one log line or error.
LONGEST_SHOWN = 200


def plain(text: str) -> str:
    """The same characters as an exact ``str``, whatever subclass of it this is."""
    return str.__str__(text)


def printable(text: object, most: int = LONGEST_SHOWN) -> str:
    r"""The text on one line, without control characters, cut to ``most`` characters.

    For text from other programs: an event's id, an error message, a routing key. Non-printable
    characters are escaped as in a Python string (``\n``, ``\x1b``, ``\u202e``).

    :param text: a str, or any object; its ``str()`` may raise.
    :param most: how many of its characters to show.
    """
    try:
        shown = text if isinstance(text, str) else str(text)
        shown = plain(shown)
    except Exception:  # noqa: BLE001 - a broken __str__ must not break the report
        shown = f"<{type(text).__name__} whose text cannot be shown>"
    left_out = len(shown) - most
    shown = shown[:most]
    if not shown.isprintable():
        shown = "".join(map(_escaped, shown))
    return f"{shown}... ({left_out:,} more characters)" if left_out > 0 else shown


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def truncate(text: str, most: int, *, keep_end: bool = False) -> str:
    """At most ``most`` bytes of the text in UTF-8, without splitting a character."""
    data = text.encode("utf-8", "replace")
    if len(data) > most:
        data = b"... " + data[4 - most :] if keep_end else data[: most - 4] + b" ..."
    return data.decode("utf-8", "ignore")
