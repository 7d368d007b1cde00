"""Explains what is wrong with a broker's URL.

Pure, except that it checks whether the files named in the URL exist.

pika silently accepts some mistakes (of the vhost ``a/b`` it uses ``a``), and connects to the wrong
host over others: in ``amqp://user:12/34@host``, whose password is not percent-encoded, ``user`` is
the host (tests/test_mistakes.py has more). No error repeats a part that may be a password.
"""

from __future__ import annotations

import ast
import ipaddress
import os
import re
import threading
from collections.abc import Sequence
from urllib.parse import parse_qsl, unquote

from domain_events.text import printable

_FORM = "amqp://user:password@host:5672/vhost"

# The query options of pika's URLParameters; of numbers, their bounds.
_WHOLE = {
    "channel_max": (1, 65_535),
    "connection_attempts": (1, 2**31 - 1),
    "frame_max": (4096, 131_072),
    "heartbeat": (0, 65_535),
}
_SECONDS = {  # and whether they may be 0
    "blocked_connection_timeout": True,
    "retry_delay": True,
    "socket_timeout": False,
    "stack_timeout": False,
}
_DICTS = ("client_properties", "ssl_options", "tcp_options")
_OPTIONS = (*_WHOLE, *_SECONDS, *_DICTS, "locale", "tls_verify")  # the last one is our own

_SSL_FILES = ("ca_certs", "cafile", "ca_path", "capath", "certfile", "keyfile")
_SSL_OPTIONS = (
    *_SSL_FILES,
    *("ca_data", "cadata", "ciphers", "password", "protocol", "server_hostname"),
    # Of ssl.wrap_socket; pika once passed them on, and ignores them now.
    *("cert_reqs", "ssl_version", "verify_mode", "check_hostname", "suppress_ragged_eofs"),
    "do_handshake_on_connect",
)

_HOST = re.compile(r"(?=.{1,254}\Z)[\w%-]{1,63}(\.[\w%-]{1,63})*\.?")

# User, password and vhost each.
_LONGEST_PART = 255

_PARTS = re.compile(
    r"(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?", re.DOTALL
)


def trouble_together(urls: Sequence[str]) -> str:
    """What is wrong with URLs that are right one by one; empty if nothing is."""
    if len({_scheme(url) == "memory" for url in urls}) > 1 or (
        len(urls) > 1 and _scheme(urls[0]) == "memory"
    ):
        return "the embedded broker's URL must be the only one: memory:// or memory://NAME."
    if len({_uses_tls(url) for url in urls}) > 1:
        return (
            "only some of them use TLS; to the others the password would go unprotected. Give "
            "amqps:// to all of them, or to none."
        )
    return ""


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _uses_tls(url: str) -> bool:
    return _scheme(url) == "amqps" or bool(re.search(r"[?&]ssl_options=", url))


def trouble(url: str) -> str:
    """What is wrong with the URL and what would be right; empty if nothing is.

    Whether there is such a broker is not checked.
    """
    scheme, colon, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme == "memory" and colon:
        named = re.fullmatch(r"[\w.-]*/?", rest)
        return "" if named else "the embedded broker's URL is memory:// or memory://NAME, no more."
    if why := _scheme_trouble(scheme if colon else ""):
        return why
    found = _PARTS.fullmatch(rest)
    assert found is not None
    if re.search(r";\s*amqps?://", rest, re.IGNORECASE):
        return "several URLs are separated by ',' and not by ';': amqp://one,amqp://two."
    if any(
        character.isspace() or character in "'\""
        for character in found["authority"] + found["path"]
    ):
        return "it contains a space or a quotation mark; remove it, or percent-encode it."
    return (
        _encoding_trouble(found)
        or _host_trouble(found["authority"].rpartition("@")[2])
        or _vhost_trouble(found["path"])
        or _length_trouble(found)
        or _query_trouble(found["query"] or "", scheme)
    )


def _scheme_trouble(scheme: str) -> str:
    if scheme in ("amqp", "amqps"):
        return ""
    right = f"it must begin with amqp:// (or amqps:// for TLS), as in {_FORM}."
    if not scheme:
        return f"it has no scheme; {right}"
    if scheme in ("http", "https"):
        return f"http:// is for the management interface (port 15672); {right}"
    # The embedded broker is not for production, and so comes last.
    return f"its scheme is unknown; {right} (memory:// is the embedded broker.)"


def _encoding_trouble(found: re.Match[str]) -> str:
    """Characters that end a part of a URL, within a user, a password or a vhost."""
    authority, path, query = found["authority"], found["path"], found["query"] or ""
    fragment = found["fragment"] or ""
    if "@" in path or fragment or ("@" in query and "@" not in authority):
        return (
            "it has a '/', '?', '#' or '@' in the wrong place; in the user, the password or "
            "the vhost write %2F, %3F, %23, %40 (urllib.parse.quote(password, safe=''))."
        )
    user, at, _ = authority.rpartition("@")
    if at and ":" not in user:
        return f"it has a user and no password; write user:password@, as in {_FORM}."
    return ""


def _host_trouble(address: str) -> str:
    if "," in address:
        return "it names several hosts; write a whole URL for each: amqp://one,amqp://two."
    host, colon, port = address.rpartition(":")
    if address.startswith("[") or address.endswith("]"):  # IPv6
        host, _, port = address.partition("]")
        if not host.startswith("[") or "]" not in address or (port and not port.startswith(":")):
            return "its IPv6 address must be in brackets: amqp://[::1]:5672."
        colon, port = port[:1], port[1:]
        try:
            ipaddress.IPv6Address(host[1:].replace("%25", "%"))
        except ValueError:
            return "the part in brackets is not an IPv6 address, such as amqp://[::1]:5672."
    elif ":" in host:
        return "an IPv6 address must be in brackets: amqp://[::1]:5672."
    elif (name := host if colon else address) and not _HOST.fullmatch(name):
        return (
            "its host is not a valid host name: labels of letters, digits and '-', at most 63 "
            f"characters each, separated by dots, as in {_FORM}."
        )
    # Not shown: in a URL without a host, it is the password.
    if colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        return f"its port must be a number from 1 to 65,535, as in {_FORM}."
    return ""


def _vhost_trouble(path: str) -> str:
    if "/" not in path[1:]:
        return ""
    if path == "//":
        return (
            "its vhost is '//', which is how Celery writes the vhost '/'; write %2F "
            "(amqp://host/%2F), or nothing."
        )
    return "its vhost contains a '/'; write %2F if it belongs to the name, otherwise remove it."


def _length_trouble(found: re.Match[str]) -> str:
    user, _, password = found["authority"].rpartition("@")[0].partition(":")
    for what, part in (("user", user), ("password", password), ("vhost", found["path"][1:])):
        try:
            size = len(unquote(part, errors="strict").encode())
        except UnicodeError:
            return f"its {what} cannot be decoded: it must be percent-encoded UTF-8."
        if size > _LONGEST_PART:
            return f"its {what} is longer than {_LONGEST_PART} bytes."
    return ""


def _query_trouble(query: str, scheme: str) -> str:
    seen: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            close = _close(name, _OPTIONS)
            # Anything else may be the rest of a password that contains a '?'.
            what = f"{name[:40]!r}; did you mean {close!r}?" if close else "(or a bare '?')."
            return f"it has an unknown option {what} The options are {', '.join(_OPTIONS)}."
        if name in seen:
            return f"it has the option {name!r} twice."
        if why := _option_trouble(name, value):
            return why
        seen[name] = value
    if "tls_verify" in seen and scheme != "amqps" and "ssl_options" not in seen:
        return f"tls_verify={seen['tls_verify']} is for amqps:// URLs; this one does not use TLS."
    return ""


def _option_trouble(name: str, value: str) -> str:
    # No value is shown: it may be part of a password that contains a '?'.
    if name in _WHOLE:
        least, most = _WHOLE[name]
        if not re.fullmatch(r"[0-9]{1,10}", value) or not least <= int(value) <= most:
            return f"option {name!r} must be a whole number from {least:,} to {most:,}."
        return ""
    if name in _SECONDS:
        least_words = "0 or more" if _SECONDS[name] else "more than 0"
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        right = 0 < number <= threading.TIMEOUT_MAX or (number == 0 and _SECONDS[name])
        return "" if right else f"option {name!r} must be a number of seconds, {least_words}."
    if not value:
        return f"option {name!r} has no value."
    if name == "tls_verify" and value not in ("yes", "no"):
        return "option 'tls_verify' must be 'yes' or 'no', in lower case."
    return _dict_trouble(name, value) if name in _DICTS else ""


def _dict_trouble(name: str, value: str) -> str:
    try:
        options = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        options = None
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        example = "{'ca_certs': '/etc/ca.pem'}" if name == "ssl_options" else "{'name': 'value'}"
        return f"option {name!r} must be a dict, percent-encoded, such as {example}."
    if name != "ssl_options":
        return ""
    if not options:
        return "option 'ssl_options' is an empty dict; leave it out, and write amqps://."
    for key, setting in options.items():
        if key not in _SSL_OPTIONS:
            close = _close(key, _SSL_OPTIONS)
            what = (
                f"has the unknown {key[:40]!r}; did you mean {close!r}?"
                if close
                else ("has an unknown key.")
            )
            return f"option 'ssl_options' {what} The keys are {', '.join(_SSL_OPTIONS)}."
        if key in _SSL_FILES:
            if setting is not None and not isinstance(setting, str):
                return f"option 'ssl_options': {key!r} must be a path, in quotes."
            if setting and not os.path.exists(setting):  # noqa: PTH110 - which takes what a Path may not
                return f"option 'ssl_options': {key!r} does not exist: {printable(setting)}."
    if "keyfile" in options and "certfile" not in options:
        return "option 'ssl_options' has a 'keyfile' and no 'certfile'."
    return ""


def _close(name: str, names: Sequence[str]) -> str:
    """The most similar name, if one is similar enough."""
    import difflib  # noqa: PLC0415 - for this mistake only

    found = difflib.get_close_matches(name.lower(), names, 1)
    return found[0] if found else ""
