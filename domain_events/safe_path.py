"""Imported first: keeps ``python -m domain_events`` from importing files of the current folder.

``python -m`` puts that folder first in ``sys.path``, where a ``json.py`` or ``pika.py`` would
shadow the real one. The package removes it, since it is imported before its ``__main__``. Other
programs that import the package, also by ``python -m program``, keep their path.
"""

import os
import sys


def _is_the_program() -> bool:
    # While Python locates the module to run, this is the program's name.
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
