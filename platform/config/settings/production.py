"""What `manage.py` uses unless told otherwise: one machine or many, never DEBUG."""

import logging

from config.settings.base import *  # noqa: F403

# Of a line that cannot be written Python would print the arguments as they are, whatever is secret in them.
logging.raiseExceptions = False
