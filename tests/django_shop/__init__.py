"""A small Django project for tests: orders, placed in views, whose events are handled."""

import os


def setup() -> None:
    """Use it in this process; may be called again."""
    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "django_shop.settings")
    django.setup()
