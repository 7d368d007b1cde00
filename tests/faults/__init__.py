"""The fault harness: real programs under load, a broker that fails, and an account of every event.

``make faults``, or ``python tests/faults --help``. The faults: ``scenarios`` and ``schedule``
choose them, ``injectors`` inject them, through ``broker`` and ``proxy``. The programs under test:
``publisher`` and ``subscriber``, whose ``records`` on disk outlive them; ``kinds`` defines the
behaviour of handlers. The result: ``evidence`` gathers the records, ``verdict`` judges them,
``report`` prints. ``harness`` is a run from start to end. ``broken`` has broken versions of the
library, which the harness must detect.
"""
