"""Imported first of all: ``python -m domain_events`` runs no file of the current folder.

``python -m`` puts that folder in front of the path for imports, where a ``json.py`` or ``pika.py``
that happens to lie there would be taken for the real one. It is the package itself that takes it
out, since it is imported before its ``__main__``. Whoever imports the package in a program of
their own, also by ``python -m program``, keeps the path they have.
"""

import os
import sys


def _is_the_program() -> bool:
    # While Python looks for the module to run, this stands for the program's name.
    if sys.argv[:1] != ["-m"]:
        return False
    words = iter(sys.orig_argv[1:])
    for word in words:
        if word == "--check-hash-based-pycs":
            next(words, "")
        for at, letter in enumerate(word[1:], 1):
            value = word[at + 1 :]
            if letter == "m":
                return (value or next(words, "")).partition(".")[0] == __package__
            if letter in "WX":
                if not value:
                    next(words, "")
                break
    return False


def _current_folder() -> str:
    try:
        return os.getcwd()  # noqa: PTH109 - pathlib is not imported yet
    except OSError:  # it was deleted
        return ""


if _is_the_program() and sys.path[:1] in ([""], [_current_folder()]):
    del sys.path[0]
