"""Imports what a command is to work with: ``package.module:subscriber``."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any

import click

from domain_events.cli import exits
from domain_events.errors import DomainEventsError
from domain_events.subscriber import Subscriber
from domain_events.text import printable


class NotImported(click.ClickException):
    """It cannot be imported, or is not a subscriber."""

    exit_code = exits.NOT_IMPORTED


def load_subscriber(target: str) -> Subscriber:
    """The subscriber named by ``package.module:attribute``, or by a function that returns it.

    :raises NotImported: there is no such module or attribute, or it is something else.
    """
    found: Subscriber = load(target, (Subscriber,), "a Subscriber")
    return found


def load(target: str, kinds: tuple[type, ...], what: str) -> Any:
    """The object named by ``package.module:attribute``, or by a function that returns it.

    The current directory is the first place to import from, as with ``python -m``. An error in the
    module itself is shown with its traceback, without the frames of the import.

    :param kinds: what it may be; ``what`` in words.
    :raises NotImported: there is no such module or attribute, or it is something else.
    :raises DomainEventsError: as `Subscriber.register` does, which the module calls.
    """
    found = _load(target, what)
    if not isinstance(found, kinds) and callable(found):
        try:
            found = found()
        except DomainEventsError:
            raise
        except SystemExit as error:
            raise NotImported(_exits(target, error)) from error
        except Exception as error:
            raise NotImported(_with_traceback(target, error)) from error
    if not isinstance(found, kinds):
        raise NotImported(
            f"{target} is of type {type(found).__name__}; name {what}, or a function without "
            "parameters that returns one."
        )
    return found


def _load(target: str, what: str) -> Any:
    module_name, colon, attribute = target.partition(":")
    if not module_name or not colon or not attribute or module_name.startswith("."):
        raise click.UsageError(f"{target!r} does not name {what}; write package.module:attribute.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise NotImported(
                f"There is no module {error.name!r}. The current directory is searched first; is "
                "this the right one?"
            ) from error
        raise NotImported(_with_traceback(module_name, error)) from error
    except DomainEventsError:
        raise
    except SystemExit as error:
        raise NotImported(_exits(module_name, error)) from error
    except Exception as error:
        raise NotImported(_with_traceback(module_name, error)) from error
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise NotImported(f"{module_name!r} has no {printable(attribute)!r}.")
        found = getattr(found, name)
    return found


def _exits(name: str, error: SystemExit) -> str:
    return f"{name!r} cannot be imported: it calls sys.exit({printable(repr(error.code))})."


def _with_traceback(module_name: str, error: BaseException) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and frame.filename != __file__
    ]
    lines = traceback.format_list(frames) + traceback.format_exception_only(type(error), error)
    return f"{module_name!r} cannot be imported:\n{''.join(lines).rstrip()}"
