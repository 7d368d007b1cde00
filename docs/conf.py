"""Sphinx: how the documentation is built. Nothing here needs the network."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import domain_events

project = "domain_events"
copyright = "domain_events contributors"  # noqa: A001
version = release = domain_events.__version__

extensions = ["sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# `Name` in single backticks, as in the docstrings, is a link to what has that name.
default_role = "py:obj"
nitpicky = True
# Types of the standard library, and names of ours that are explained where they are used. No
# intersphinx: it would need the network at each build.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|contextlib|datetime|decimal|enum|os|types|typing|uuid)\..*"),
    (r"py:.*", r"threading\..*"),
    (r"py:.*", r"(prometheus_client\.registry\.)?CollectorRegistry"),
    (r"py:obj", r"Delivery"),
    (r"py:.*", r"(domain_events\.probes\.)?HasHealth"),
    (r"py:.*", r"(domain_events\.testing\.broker\.)?(Store|memory)"),
    (r"py:.*", r"(domain_events\.(handling|django\.\w+)\.)?Handler"),
    (r"py:.*", r"TransactionManagementError"),
    (r"py:.*", r"(domain_events\.(events|middleware)\.)?(Data|Done|HeaderValue)"),
    (r"py:.*", r"(domain_events\.subscriber\.)?AnyHandler"),
    (r"py:.*", r"(domain_events\.(names|options)\.)?(ExchangeType|QueueType|RegisterOptions)"),
    (r"py:.*", r"(domain_events\.settings\.)?(ConnectionSettings|_Default.*)"),
    (r"py:.*", r"(opentelemetry\..*)?(TracerProvider|MeterProvider|TextMapPropagator)"),
    (r"py:.*", r"(sqlalchemy\..*|Engine|Connection|InvalidRequestError)"),
    (r"py:.*", r"(domain_events\.outbox\.(\w+\.)?)?(Parked|Relay|Result|Waiting)"),
]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
python_maximum_signature_line_length = 72  # then a parameter on each line

html_theme = "furo"
html_title = f"domain_events {release}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
