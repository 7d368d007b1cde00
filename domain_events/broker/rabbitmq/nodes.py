"""The nodes of a cluster, in the order in which they are tried, and what their refusals mean.

The one place that turns pika's connection errors into messages for users.
"""

from __future__ import annotations

import random
import re
import socket
import ssl
from collections.abc import Mapping

import pika
import pika.exceptions

from domain_events.errors import ConfigurationError
from domain_events.log import Log
from domain_events.settings import Address, app_id, shown
from domain_events.text import printable

log = Log("domain_events")


class Nodes:
    """The nodes behind the URLs: shuffled once, rotated after each failure.

    pika is given one at a time, since it skips all the others when one name cannot be resolved.

    :raises ConfigurationError: as `check` does.
    """

    def __init__(self, urls: tuple[str, ...]) -> None:
        check(urls)
        for url in urls:
            if _verification_off(url):
                log.warning(
                    "TLS without verification (tls_verify=no): whoever answers for %s gets the "
                    "password and all events.",
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
    parameters = _read_by_pika(Address(_TLS_VERIFY.sub(_nothing, url)))
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
    """A password whose repr does not show it, in tracebacks with local variables for example."""

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
    # Not in the `except`, where even `from None` leaves the context to be looked at: a password
    # with a bare '/' or '#' in it ends up in such messages.
    raise ConfigurationError(
        f"{shown(url)} is no AMQP URL that pika can use ({reason}). The form is "
        "amqp://user:password@host:5672/vhost; characters such as / # @ % in the user, the "
        "password or the vhost must be percent-encoded; the vhost '/' is %2F."
    )


# An option of this library in a URL; pika does not know it.
_TLS_VERIFY = re.compile(r"(?P<before>[?&])tls_verify=(?P<value>[^&#]*)(?P<after>&|(?=#|$))")


_VERIFIED = {"yes": True, "no": False}


def _nothing(found: re.Match[str]) -> str:
    """What remains where the option is removed from the URL."""
    return found["before"] if found["after"] or found["before"] == "?" else ""


def _verification_off(url: str) -> bool:
    """Whether the URL says ``tls_verify=no``."""
    # The value itself may be part of a password, with "?" in it.
    verified = {_VERIFIED.get(found["value"]) for found in _TLS_VERIFY.finditer(url)}
    if not verified <= {True} and verified != {False}:
        raise ConfigurationError(f"{shown(url)}: the option tls_verify is 'yes' or 'no'.")
    return verified == {False}


def _check_verification(url: str, context: ssl.SSLContext) -> None:
    """Check that TLS verifies who the broker is.

    ssl_options may silently switch that off: each ``protocol`` but
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
        f"{shown(url)}: ssl_options {what}. Or, if whoever answers for that address may have the "
        "password and all events, say so in the URL: tls_verify=no."
    )


def _is_open_to_all(cipher: Mapping[str, object]) -> bool:
    return cipher.get("auth") == "auth-null" or cipher.get("symmetric", "") is None


# The reply codes of AMQP (https://www.rabbitmq.com/amqp-0-9-1-reference#constants) with which a
# login is refused, and with which a vhost is.
REFUSED_LOGIN = 403
_NOT_ALLOWED = 530

# RabbitMQ closes with NOT_ALLOWED for transient and for permanent reasons, so the text decides. Of
# 3.10, 4.0 and 4.3 (deps/rabbit/src/rabbit_reader.erl and rabbit_access_control.erl in
# https://github.com/rabbitmq/rabbitmq-server):
#
#   vhost V not found                                              a mistake
#   access to vhost V refused for user U                           permissions may be granted yet
#   access to vhost V refused for user U: connection limit (N) is reached           others may go
#   connection refused for user U: user connection limit (N) is reached             others may go
#   connection refused: node connection limit (N) is reached                        others may go
#
# (A vhost that is down is INTERNAL_ERROR.) Only the beginning: a long name cuts off the end.
_NO_SUCH_VHOST = re.compile(r"NOT_ALLOWED - vhost ")

# OpenSSL's names of the alerts with which the broker refuses the client's certificate. With TLS 1.3
# they come when the handshake is over for the client. The connection may break before one is read.
_CERTIFICATE_ALERT = re.compile(r"\w*ALERT_\w*(?:CERTIFICATE|UNKNOWN_CA)\w*")

# What pika raises when a server speaks another protocol.
_FOREIGN = (
    pika.exceptions.IncompatibleProtocolError,
    pika.exceptions.ProtocolSyntaxError,
    pika.exceptions.ProtocolVersionMismatch,
    pika.exceptions.UnexpectedFrameError,
)


def explain(error: BaseException | None) -> str:
    """Why a connection failed or was lost, in one line for a user."""
    cause = _innermost(error)
    code = _closed_by_broker(cause)
    if code is not None:
        return f"closed by the broker: {printable(code[1])} ({code[0]})"
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused"
    if isinstance(cause, pika.exceptions.AMQPHeartbeatTimeout):
        return "the broker fell silent (missed heartbeats)"
    if isinstance(cause, pika.exceptions.StreamLostError):
        return "the connection broke"
    if isinstance(cause, _FOREIGN):
        # A proxy that is up before its broker is causes this, too, so it may be transient.
        return (
            "it does not answer as RabbitMQ does (perhaps another port, or it expects TLS, hence "
            "amqps://, or a client's certificate)"
        )
    if isinstance(cause, pika.exceptions.NoFreeChannels):
        return "no channel is free on this connection"
    if isinstance(cause, _PROBABLE):
        return "it hung up during the login"
    if isinstance(cause, ssl.SSLError):
        return f"TLS failed ({cause.reason or cause}); perhaps it is not a TLS port"
    if isinstance(cause, socket.gaierror):
        return f"the host's name cannot be resolved ({cause.strerror})"
    if isinstance(cause, OSError):
        return printable(cause.strerror or cause) or type(cause).__name__
    return printable(cause) or type(cause).__name__


def permanent(error: BaseException, *, was_connected: bool) -> str | None:
    """Why no retry can help; None if one may.

    A missing vhost or an untrusted certificate is a mistake at the first connection; after one that
    has worked, it is an outage like others. A refused password is always final: retries lock
    accounts.
    """
    cause = _innermost(error)
    code, words = _closed_by_broker(cause) or (0, "")
    if code == REFUSED_LOGIN:
        return "user or password is wrong (and 'guest' may log in from the broker's machine only)"
    if was_connected:
        return None
    if code == _NOT_ALLOWED and _NO_SUCH_VHOST.match(words):
        return f"the vhost does not exist ({printable(words)})"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({cause.verify_message})"
    if isinstance(cause, ssl.SSLError) and _CERTIFICATE_ALERT.fullmatch(cause.reason or ""):
        return f"TLS is refused ({cause.reason}); does it require another client certificate?"
    return None


def close_code(error: BaseException | None) -> int:
    """The reply code with which the broker closed a channel or connection; 0 if it did not."""
    found = _closed_by_broker(_innermost(error))
    return found[0] if found else 0


def _innermost(error: BaseException | None) -> BaseException | None:
    """The error that pika's connection workflow has wrapped, of its last attempt."""
    while True:
        following: BaseException | None = None
        if exceptions := getattr(error, "exceptions", None):
            following = exceptions[-1]
        elif isinstance(wrapped := getattr(error, "exception", None), BaseException):
            following = wrapped
        if following is None:
            return error
        error = following


_PROBABLE = (
    pika.exceptions.ProbableAuthenticationError,
    pika.exceptions.ProbableAccessDeniedError,
)

_CLOSED = (pika.exceptions.ConnectionClosedByBroker, pika.exceptions.ChannelClosedByBroker)


def _closed_by_broker(cause: BaseException | None) -> tuple[int, str] | None:
    if isinstance(cause, _CLOSED):
        return cause.reply_code, printable(cause.reply_text, 255)
    return None
