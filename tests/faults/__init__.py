"""The fault harness: whole programs under load, a broker that fails, and a count of every event.

``make faults``, or ``python tests/faults --help``. What is done to them: ``scenarios`` and
``schedule`` decide, ``injectors`` do it, through ``broker`` and ``proxy``. Who suffers:
``publisher`` and ``subscriber``, programs whose ``records`` on disk outlive them; ``kinds`` says
what the handlers do. What came of it: ``evidence`` gathers the records, ``verdict`` judges,
``report`` tells. ``harness`` is a run from its beginning to its end. ``broken`` has worse versions
of the library, which the harness must find guilty.
"""
