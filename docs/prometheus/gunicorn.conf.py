"""Gunicorn: what a worker was at when it ended is not shown any more."""

from prometheus_client.multiprocess import mark_process_dead


def child_exit(server, worker):
    mark_process_dead(worker.pid)
