"""The application that every ASGI server runs: `config.front`, once Django is set up."""

import os

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings.production")
django.setup()

from config.front import make_application  # noqa: E402 - needs the apps above

application = make_application()
