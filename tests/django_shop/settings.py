"""Its settings.

In the environment: SHOP_FOLDER has the SQLite files, SHOP_DATABASES more databases as JSON,
SHOP_APPS more apps, separated by spaces.
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
INSTALLED_APPS = ["domain_events.django", "django_shop", *os.environ.get("SHOP_APPS", "").split()]
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
