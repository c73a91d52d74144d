"""What several commands say alike."""

from __future__ import annotations

import getpass

from django.core.exceptions import ValidationError


def operator() -> str:
    """Who acts, for timelines: whoever runs the command."""
    try:
        return f"{getpass.getuser()} (manage.py)"
    except (KeyError, OSError):
        return "manage.py"


def sentence_of(error: ValidationError) -> str:
    """A validation error as one line that names the fields."""
    if not hasattr(error, "error_dict"):
        return " ".join(error.messages)
    return " ".join(
        f"{field}: {' '.join(messages)}" if field != "__all__" else " ".join(messages)
        for field, messages in error.message_dict.items()
    )
