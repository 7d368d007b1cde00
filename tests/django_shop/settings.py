"""Its settings.

In the environment: SHOP_FOLDER has the SQLite files, SHOP_DATABASES more databases as JSON,
SHOP_APPS more apps, separated by spaces; SHOP_OUTBOX switches the outbox on.
"""

import atexit
import json
import os
import shutil
import tempfile

folder = os.environ.get("SHOP_FOLDER")
if folder is None:
    folder = tempfile.mkdtemp(prefix="django-shop-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

SECRET_KEY = "of tests"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "django_shop.urls"
USE_TZ = True
LOGGING_CONFIG = None
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "domain_events.django",
    "django_shop",
    *os.environ.get("SHOP_APPS", "").split(),
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    }
]
if os.environ.get("SHOP_OUTBOX"):
    DOMAIN_EVENTS = {"OUTBOX": True}
STATIC_URL = "static/"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DATABASES = {
    **{
        alias: {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": f"{folder}/{alias}.sqlite3",
            "OPTIONS": {"timeout": 30},
        }
        for alias in ("default", "other")
    },
    **json.loads(os.environ.get("SHOP_DATABASES", "{}")),
}
