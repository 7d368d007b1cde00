"""This library measured beside its peers: ``make bench``, or ``python -m benchmarks --help``.

``registry`` says who is measured, ``scenarios`` what, ``targets`` what this library is to reach.
``environments`` gives each peer a Python of its own, ``peers/`` holds a small program for each,
``samples`` runs one of them once, ``running`` all of them, interleaved. ``results`` keeps what
came out; ``tables`` and ``plots`` show it.
"""
