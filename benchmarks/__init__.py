"""Compares this library with other clients: ``make bench``, or ``python -m benchmarks --help``.

``registry`` lists the clients (peers), ``scenarios`` the measurements, ``targets`` the goals of
this library. ``environments`` creates a Python environment for each peer, ``peers/`` has a small
program for each, ``samples`` runs one of them once, ``running`` runs all of them, interleaved.
``results`` stores the results; ``tables`` and ``plots`` show them. ``outbox`` compares outboxes,
and ``bloat`` measures ours beside a long transaction, each with a PostgreSQL.
"""
