"""The form of secrets: API keys, join tokens, node and worker secrets. No database here.

An API key is `sk-<public id>-<secret><checksum>`: 12 + 43 + 6 characters of base 62. The public id
looks it up, the secret (32 random bytes) proves it, the checksum (CRC-32) lets a scanner, and us,
tell a mistyped key without asking anybody.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import zlib
from dataclasses import dataclass

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
PUBLIC_ID_LENGTH = 12
SECRET_LENGTH = 43
"""62 ** 43 > 2 ** 256: as many as 32 random bytes have."""
CHECKSUM_LENGTH = 6
KEY_PATTERN = re.compile(
    rf"sk-([0-9A-Za-z]{{{PUBLIC_ID_LENGTH}}})-([0-9A-Za-z]{{{SECRET_LENGTH}}})([0-9A-Za-z]{{{CHECKSUM_LENGTH}}})"
)
MAX_KEY_LENGTH = 128


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _checksum(text: str) -> str:
    number = zlib.crc32(text.encode())
    digits = []
    for _ in range(CHECKSUM_LENGTH):
        number, digit = divmod(number, 62)
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key just made; `text` is shown once and kept nowhere."""

    text: str
    public_id: str
    last4: str


def generate_key(public_id: str = "") -> NewKey:
    """A new key, or with the public id of one a new secret for it."""
    public_id = public_id or _random(PUBLIC_ID_LENGTH)
    secret = _random(SECRET_LENGTH)
    text = f"sk-{public_id}-{secret}{_checksum(public_id + secret)}"
    return NewKey(text=text, public_id=public_id, last4=text[-4:])


def public_id_of(text: str) -> str | None:
    """The public id of a well-formed key, None for anything else."""
    if len(text) > MAX_KEY_LENGTH:
        return None
    match = KEY_PATTERN.fullmatch(text)
    if match is None:
        return None
    public_id, secret, checksum = match.groups()
    return public_id if _checksum(public_id + secret) == checksum else None


def mask_key(text: str) -> str:
    """What an error or a log may show of a key that somebody sent."""
    return f"{text[:5]}***{text[-2:]}" if len(text) >= 12 else "***"


def digest_key(text: str, pepper: bytes) -> str:
    """HMAC-SHA256 of a whole key in hex. A fast hash is right: the secret has 256 bits of its own."""
    return hmac.digest(pepper, text.encode(), hashlib.sha256).hex()


def generate_secret() -> str:
    """A secret for a node or a join token: 256 bits, and never anything that a shell takes for an option."""
    return _random(SECRET_LENGTH)


def digest_secret(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def redis_prefix(secret_key: str) -> str:
    """Before every name that an installation has in Redis, so that several may share one. Two that were given
    the same secret key are one."""
    return f"roundhouse:{hashlib.sha256(b'roundhouse.redis.' + secret_key.encode()).hexdigest()[:12]}:"


def worker_secret(secret_key: str, worker_id: int, epoch: int) -> str:
    """The secret between gateways and one worker: every gateway can derive it, so none is stored."""
    return hmac.digest(
        secret_key.encode(), f"roundhouse.worker.{worker_id}.{epoch}".encode(), hashlib.sha256
    ).hex()
