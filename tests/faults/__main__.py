"""``python tests/faults``: the folder's own name is the program's."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parent.parent
# Instead of this folder itself, whose modules have names that others may have too.
sys.path[0:1] = [str(_TESTS), str(_TESTS.parent / "tools")]

from faults.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
