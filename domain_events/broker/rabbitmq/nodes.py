"""The nodes of a cluster, in the order in which they are tried, and how to connect to each."""

from __future__ import annotations

import random
import re
import ssl
from collections.abc import Mapping

import pika
import pika.exceptions

from domain_events.address import Address, shown
from domain_events.errors import ConfigurationError
from domain_events.log import Log
from domain_events.settings import app_id

log = Log("domain_events")


class Nodes:
    """The nodes behind the URLs: shuffled once, rotated after each failure.

    pika gets one at a time, since it skips all others if one name cannot be resolved
    (test_nodes_that_are_down_are_passed_over in tests/test_cluster.py).

    :raises ConfigurationError: as `check` does.
    """

    def __init__(self, urls: tuple[str, ...]) -> None:
        check(urls)
        for url in urls:
            if _verification_off(url):
                log.warning(
                    "TLS without verification (tls_verify=no): any server that answers for %s gets "
                    "the password and all events.",
                    shown(url),
                )
        self._urls = random.sample(urls, len(urls))

    def __len__(self) -> int:
        return len(self._urls)

    def __str__(self) -> str:
        """The address of the current node, without its password."""
        return shown(self._urls[0])

    @property
    def url(self) -> str:
        """The URL of the current node, with its password."""
        return self._urls[0]

    def parameters(self, role: str) -> pika.URLParameters:
        """How to connect to the current node; a new object each time, as pika modifies it."""
        parameters = _parameters(self._urls[0])
        # One attempt: the link decides when and where to try again.
        parameters.connection_attempts = 1
        properties = dict(parameters.client_properties or {})
        properties.setdefault("connection_name", f"{app_id()}: {role}")
        parameters.client_properties = properties
        return parameters

    def rotate(self) -> None:
        """Go on to the next node."""
        # In one step: other threads read the address at any time.
        self._urls = self._urls[1:] + self._urls[:1]


def check(urls: tuple[str, ...]) -> None:
    """Check that these URLs can be used.

    :raises ConfigurationError: one is malformed, or uses TLS without verification.
    """
    for url in urls:
        _parameters(url)


def _parameters(url: str) -> pika.URLParameters:
    verified = not _verification_off(url)
    parameters = _read_by_pika(Address(_TLS_VERIFY.sub(_separator, url)))
    _mask(parameters)
    if parameters.ssl_options is None:
        return parameters
    if verified:
        _check_verification(url, parameters.ssl_options.context)
    else:
        parameters.ssl_options.context.check_hostname = False
        parameters.ssl_options.context.verify_mode = ssl.CERT_NONE
    return parameters


class _Secret(str):
    """A password that is hidden in its repr, for tracebacks with local variables."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def _mask(parameters: pika.URLParameters) -> None:
    found = parameters.credentials
    if isinstance(found, pika.PlainCredentials) and found.username and found.password:
        parameters.credentials = pika.PlainCredentials(found.username, _Secret(found.password))


def _read_by_pika(url: str) -> pika.URLParameters:
    try:
        return pika.URLParameters(url)
    except (ValueError, TypeError, AttributeError, SyntaxError, OSError, ssl.SSLError) as error:
        reason = str(error) if isinstance(error, OSError) else type(error).__name__
        if "cafile" in str(error):
            reason = "ssl_options must name an authority: 'ca_certs'"
    # Not in the `except`, where even `from None` keeps the context: its message may contain a
    # password with a bare '/' or '#' in it.
    raise ConfigurationError(
        f"{shown(url)} is not an AMQP URL that pika can use ({reason}). The form is "
        "amqp://user:password@host:5672/vhost; characters such as / # @ % in the user, the "
        "password or the vhost must be percent-encoded; the vhost '/' is %2F."
    )


# An option of this library in a URL; pika does not know it.
_TLS_VERIFY = re.compile(r"(?P<before>[?&])tls_verify=(?P<value>[^&#]*)(?P<after>&|(?=#|$))")


_VERIFIED = {"yes": True, "no": False}


def _separator(found: re.Match[str]) -> str:
    """The separator to keep where the option is removed from the URL."""
    return found["before"] if found["after"] or found["before"] == "?" else ""


def _verification_off(url: str) -> bool:
    """Whether the URL has ``tls_verify=no``."""
    # The value itself may be part of a password that contains "?".
    verified = {_VERIFIED.get(found["value"]) for found in _TLS_VERIFY.finditer(url)}
    if not verified <= {True} and verified != {False}:
        raise ConfigurationError(f"{shown(url)}: option tls_verify must be 'yes' or 'no'.")
    return verified == {False}


def _check_verification(url: str, context: ssl.SSLContext) -> None:
    """Check that TLS verifies the broker's identity.

    ssl_options may silently disable that: each ``protocol`` except
    ``ssl.PROTOCOL_TLS_CLIENT`` does, and so do ciphers that need no certificate.
    """
    if context.verify_mode != ssl.CERT_REQUIRED:
        what = "does not verify the broker's certificate; leave out its 'protocol'"
    elif not context.check_hostname:
        what = "does not verify the broker's host name; leave out its 'protocol'"
    elif any(map(_is_open_to_all, context.get_ciphers())):
        what = "allows ciphers without a certificate or without encryption; change its 'ciphers'"
    else:
        return
    raise ConfigurationError(
        f"{shown(url)}: ssl_options {what}. Or, if any server that answers for that address may "
        "have the password and all events, add tls_verify=no to the URL."
    )


def _is_open_to_all(cipher: Mapping[str, object]) -> bool:
    return cipher.get("auth") == "auth-null" or cipher.get("symmetric", "") is None
