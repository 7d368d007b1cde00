"""``python -m domain_events``."""

import sys

from domain_events.cli import main

sys.exit(main())
