"""With these settings, tests run faster, and never touch the data folder of a real Roundhouse."""

import os
import tempfile

# Before `base` reads the environment: tests have a data folder of their own.
os.environ.setdefault("ROUNDHOUSE_DATA", tempfile.mkdtemp(prefix="roundhouse-test-"))

from config.settings.base import *  # noqa: F403
from config.settings.base import DATABASES, ENV

PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
WHITENOISE_AUTOREFRESH = True

if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    # A file, as in production: an in-memory database has other locks.
    DATABASES["default"]["TEST"] = {"NAME": str(ENV.data / "test.sqlite3")}
elif "ROUNDHOUSE_TEST_DB" in os.environ:
    # Two test runs at once on one PostgreSQL need a database each.
    DATABASES["default"]["TEST"] = {"NAME": os.environ["ROUNDHOUSE_TEST_DB"]}
