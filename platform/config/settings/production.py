"""What `manage.py` uses unless told otherwise: one machine or many, never DEBUG."""

from config.settings.base import *  # noqa: F403
