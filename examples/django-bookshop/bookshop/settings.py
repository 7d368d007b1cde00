from pathlib import Path

INSTALLED_APPS = ["bookshop", "domain_events.django"]
DOMAIN_EVENTS = {"OUTBOX": True}
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": Path(__file__).parent / "bookshop.sqlite3",
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
ROOT_URLCONF = "bookshop.urls"
SECRET_KEY = "of an example"
DEBUG = True
