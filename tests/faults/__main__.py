"""``python tests/faults``: the folder is the program."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parent.parent
# Instead of this folder itself, because other modules may have the same names as those in it.
sys.path[0:1] = [str(_TESTS), str(_TESTS.parent / "tools")]

from faults.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
