"""The one place from which Roundhouse calls a URL that an operator set: notices, by POST.

Only an administrator can set one. No redirect is followed, no proxy of the environment is used, nothing of
the answer is read but its status, and all of it together takes at most `SECONDS`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

SECONDS = 5.0


class WebhookFailed(Exception):
    """The web hook could not be reached in time, or answered with something else than 2xx."""


def post_json(url: str, payload: Mapping[str, Any]) -> None:
    """Send it. Raises WebhookFailed, whose text does not tell the URL."""
    try:
        status = asyncio.run(_post(url, json.dumps(payload).encode()))
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise WebhookFailed(type(error).__name__) from None
    if not 200 <= status < 300:
        raise WebhookFailed(f"It answered {status}.")


async def _post(url: str, body: bytes) -> int:
    headers = {"content-type": "application/json", "user-agent": "roundhouse"}
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    async with (
        aiohttp.ClientSession(
            timeout=timeout, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
        ) as session,
        session.post(url, data=body, headers=headers, allow_redirects=False) as answer,
    ):
        return answer.status
