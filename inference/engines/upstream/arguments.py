"""Engine arguments of an upstream deployment, from the JSON an operator wrote to checked values.

The key is none of them: they are shown to everybody who may see deployments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from yarl import URL

from inference.engines.arguments import read_typed
from inference.engines.base import LoadError
from inference.engines.upstream.presets import KNOWN, PRESETS
from inference.protocol import Cause

MAX_URL = 500


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str = ""
    """Where its OpenAI API begins, such as https://api.openai.com/v1; without a path: /v1 is meant."""
    model: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None
    """What the server calls the model; None: the only one that it serves."""
    preset: str = "openai-compatible"
    """What kind of server it is: see `presets.PRESETS`."""
    context_length: Annotated[int, msgspec.Meta(ge=1, le=2**40)] | None = None
    """None: as the server says, if it does."""
    capabilities: list[str] | None = None
    """Which endpoints and request fields this server and model honour; None: those of the preset."""
    timeout: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 300.0
    """Longest silence of the server, in seconds: before an answer, and within a stream."""


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """Check `given`. Null means "not given". Raises LoadError(BAD_ARGUMENT) that names the argument."""
    arguments = read_typed(Arguments, given, engine="upstream")
    if not arguments.url:
        raise _bad("Argument 'url' is missing: where the server's OpenAI API begins, with its /v1.")
    read_url(arguments.url)
    if arguments.preset not in PRESETS:
        raise _bad(f"Argument 'preset' must be one of {', '.join(PRESETS)}.")
    for name in arguments.capabilities or ():
        if name not in KNOWN:
            raise _bad(
                f"Argument 'capabilities' names {name[:100]!r}; known are: {', '.join(sorted(KNOWN))}."
            )
    return arguments


def read_url(text: str) -> URL:
    """The URL, with `/v1` where it has no path and without a slash at its end.

    Raises LoadError(BAD_ARGUMENT): only http and https, and nothing that could hold a secret or change
    what is added to it.
    """
    if len(text) > MAX_URL or not text.isascii() or not text.isprintable() or " " in text or "\\" in text:
        raise _bad("Argument 'url' is too long, or has characters that a URL has not.")
    try:
        url = URL(text)
        host, port = url.host, url.port
    except ValueError:
        raise _bad("Argument 'url' is no URL.") from None
    if url.scheme not in ("http", "https") or not host or not port:
        raise _bad("Argument 'url' must begin with http:// or https:// and a host.")
    if "@" in text:
        raise _bad("Argument 'url' must not hold a user or password: the key has a place of its own.")
    if "?" in text or "#" in text:
        raise _bad("Argument 'url' must not have a query or a fragment.")
    if "/.." in text:
        raise _bad("Argument 'url' must not have '..' in its path.")
    return url.with_path(url.path.rstrip("/") or "/v1")


def _bad(detail: str) -> LoadError:
    return LoadError(Cause.BAD_ARGUMENT, detail)
