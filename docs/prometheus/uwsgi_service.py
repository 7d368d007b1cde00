"""uWSGI: a worker goes on with the files of the one before it, and not with new ones."""

import uwsgi
from prometheus_client import values

values.ValueClass = values.MultiProcessValue(process_identifier=uwsgi.worker_id)

from service import application  # noqa: E402, F401
