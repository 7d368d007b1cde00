"""A web service: what all its workers publish is scraped at ``/metrics`` of any of them."""

import os

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.multiprocess import MultiProcessCollector

from domain_events import configure, publish_domain_event
from domain_events.prometheus import Prometheus

configure(middleware=[Prometheus()])

registry = CollectorRegistry()
MultiProcessCollector(registry)
metrics = make_wsgi_app(registry)


def application(environ, start_response):
    if environ["PATH_INFO"] == "/metrics":
        return metrics(environ, start_response)
    publish_domain_event("page.visited", {"path": environ["PATH_INFO"]})
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
