"""What all settings share. Values come from `config.env`; nothing here reads the environment."""

import sys

import dj_database_url

from config.env import ROOT, BadEnvironment, celery_broker, read_env
from registry.keys import redis_prefix

try:
    ENV = read_env()
except BadEnvironment as error:
    sys.exit(f"roundhouse: {error}")

BASE_DIR = ROOT
SECRET_KEY = ENV.secret_key
DEBUG = False
ALLOWED_HOSTS = list(ENV.allowed_hosts)

INSTALLED_APPS = [
    "daphne",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "config",
    "webchat",
    "openai_api",
    "inference",
    "registry",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "registry.middleware.Unaskable",
]

ROOT_URLCONF = "config.urls"
ASGI_APPLICATION = "config.asgi.application"
# A POST to /v1/…/ must not be redirected: clients would drop its body.
APPEND_SLASH = False
# Parts of a form are slow to take apart: a thousand, Django's bound, cost tenths of a second.
DATA_UPLOAD_MAX_NUMBER_FIELDS = 500

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "platform" / "config" / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

DATABASES = {"default": dj_database_url.parse(ENV.database_url)}
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    # WAL lets readers and one writer work at once; IMMEDIATE takes the write lock at BEGIN, where
    # waiting for it is possible, instead of failing in mid-transaction.
    DATABASES["default"]["OPTIONS"] = {
        "transaction_mode": "IMMEDIATE",
        "timeout": 5,
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA busy_timeout=5000;",
    }
else:
    DATABASES["default"]["CONN_HEALTH_CHECKS"] = True
    DATABASES["default"].setdefault("OPTIONS", {})["connect_timeout"] = 3
# The database threads keep their connections: opening one costs more than most of our queries.
DATABASES["default"]["CONN_MAX_AGE"] = 60
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]

LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_I18N = True
USE_TZ = True

STATIC_URL = "/static/"
STATIC_ROOT = ENV.data / "static"
# Admin's own files are served straight from the packages: no collectstatic step to forget.
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = False

LOGIN_URL = "/login/"
LOGIN_REDIRECT_URL = "/chat/"
LOGOUT_REDIRECT_URL = "/login/"
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
CSRF_COOKIE_SAMESITE = "Lax"
X_FRAME_OPTIONS = "DENY"
SECURE_REFERRER_POLICY = "same-origin"
SECURE_CONTENT_TYPE_NOSNIFF = True
if ENV.https:
    # A proxy ends TLS before us: cookies only over it, and its word on the scheme is taken.
    SESSION_COOKIE_SECURE = True
    CSRF_COOKIE_SECURE = True
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SECURE_HSTS_SECONDS = 30 * 24 * 3600
    CSRF_TRUSTED_ORIGINS = [f"https://{host}" for host in ENV.allowed_hosts]

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["openai_api.auth.ApiKeyAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["openai_api.auth.HasApiKey"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    # `Accept` never decides anything: SDKs send `application/json` for streams too.
    "DEFAULT_CONTENT_NEGOTIATION_CLASS": "openai_api.negotiation.AlwaysJson",
    "EXCEPTION_HANDLER": "openai_api.errors.drf_exception_handler",
    "UNAUTHENTICATED_USER": None,
    "UNAUTHENTICATED_TOKEN": None,
}

# -- Roundhouse's own. Read through `django.conf.settings` by the apps.
ROUNDHOUSE_HOST = ENV.host
ROUNDHOUSE_PORT = ENV.port
ROUNDHOUSE_DATA = ENV.data
ROUNDHOUSE_CACHE = ENV.cache
ROUNDHOUSE_REDIS_URL = ENV.redis_url
ROUNDHOUSE_KEY_PEPPERS = ENV.key_peppers
ROUNDHOUSE_CORS_ORIGINS = ENV.cors_origins
ROUNDHOUSE_TRUSTED_PROXIES = ENV.trusted_proxies
ROUNDHOUSE_UPSTREAM_HOSTS = ENV.upstream_hosts
ROUNDHOUSE_METRICS_TOKEN = ENV.metrics_token
ROUNDHOUSE_CURRENCY = ENV.currency
ROUNDHOUSE_USAGE_DAYS = ENV.usage_days
ROUNDHOUSE_RESPONSE_DAYS = 30
"""How long an answer of /v1/responses is kept after it was last built on."""

# -- Mail: notices of budgets. Without a server none is sent.
EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
EMAIL_TIMEOUT = 5
DEFAULT_FROM_EMAIL = ENV.mail_from
ROUNDHOUSE_MAIL = ENV.mail is not None
if ENV.mail is not None:
    EMAIL_HOST, EMAIL_PORT = ENV.mail.host, ENV.mail.port
    EMAIL_HOST_USER, EMAIL_HOST_PASSWORD = ENV.mail.user, ENV.mail.password
    EMAIL_USE_SSL, EMAIL_USE_TLS = ENV.mail.implicit_tls, ENV.mail.starttls

# -- Celery: control's queue, and the nudges it sends to the agents' queues.
CELERY_BROKER_URL = celery_broker(ENV.redis_url)
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None
CELERY_BROKER_TRANSPORT_OPTIONS = {
    # Several installations may share a Redis: each has its own queues.
    "global_keyprefix": redis_prefix(SECRET_KEY),
    # A Redis that hangs must not hang control.
    "socket_connect_timeout": 2,
    "socket_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 10,
}
# A message that cannot be sent now is not worth waiting for: the next tick sends another.
CELERY_TASK_PUBLISH_RETRY = False
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_DEFAULT_QUEUE = "control"
CELERY_TIMEZONE = "UTC"
CELERY_WORKER_ENABLE_REMOTE_CONTROL = False
CELERY_WORKER_SEND_TASK_EVENTS = False
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_WORKER_REDIRECT_STDOUTS = False
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
# Celery warns on each lost connection unless this is chosen; no task here is acknowledged late.
CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = True
# An expiry keeps a backlog from piling up while nobody works it off.
CELERY_BEAT_SCHEDULE = {
    "tick": {"task": "inference.tick", "schedule": 1.0, "options": {"expires": 2}},
    "watch_people": {"task": "inference.watch_people", "schedule": 2.0, "options": {"expires": 2}},
    "recover_spools": {"task": "inference.recover_spools", "schedule": 10.0, "options": {"expires": 10}},
    "housekeeping": {"task": "inference.housekeeping", "schedule": 60.0, "options": {"expires": 60}},
    "roll_up_usage": {"task": "inference.roll_up_usage", "schedule": 60.0, "options": {"expires": 60}},
    "forget_responses": {
        "task": "openai_api.forget_responses",
        "schedule": 600.0,
        "options": {"expires": 600},
    },
    "budget_notices": {"task": "inference.budget_notices", "schedule": 30.0, "options": {"expires": 30}},
    "forget_usage": {"task": "inference.forget_usage", "schedule": 600.0, "options": {"expires": 600}},
    "audit_usage": {"task": "inference.audit_usage", "schedule": 6 * 3600.0, "options": {"expires": 3600}},
}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {"()": "config.logs.LineFormatter"},
        "json": {"()": "config.logs.JsonFormatter"},
    },
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": ENV.log_format}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {
        "roundhouse": {"level": ENV.log_level},
        "django.server": {"level": "WARNING", "handlers": ["stderr"], "propagate": False},
        "celery": {"level": "WARNING"},
        # Below this it writes cookies and the chat's frames, whatever level the root is given.
        "uvicorn": {"level": "WARNING"},
        # While Redis is away the consumer says so; beat would add a traceback each second.
        "celery.beat": {"level": "CRITICAL"},
    },
}
