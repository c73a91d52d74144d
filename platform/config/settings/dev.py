"""For working on Roundhouse itself: tracebacks in the browser, `runserver` on Daphne."""

from config.settings.base import *  # noqa: F403

DEBUG = True
