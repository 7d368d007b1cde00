import sys
import uuid

from domain_events import publish_domain_event

user_id = str(uuid.uuid4())
event = publish_domain_event("user.registered", {"user_id": user_id, "email": sys.argv[1]}, user_id)
print("published", event.routing_key, event.uuid_string)
