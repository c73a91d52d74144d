"""With these settings, tests run faster, and never touch the data folder of a real Roundhouse."""

import os
import tempfile

# Before `base` reads the environment: tests have a data folder of their own.
os.environ.setdefault("ROUNDHOUSE_DATA", tempfile.mkdtemp(prefix="roundhouse-test-"))

from config.settings.base import *  # noqa: F403

PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
WHITENOISE_AUTOREFRESH = True
