"""A model out of a hub: the allow-listed files of one commit, each checked, taken up where it broke off.

We speak to hubs ourselves, in some hundred lines of standard library, because three things must hold
that are ours to promise: a token never leaves for another host, no name from the hub reaches outside
of the folder, and nothing but weights, tokenizer and configuration is ever fetched. The environment
says where and who: HF_ENDPOINT (a mirror) and HF_TOKEN for `hub:`, MODELSCOPE_ENDPOINT for `modelscope:`,
and HTTPS_PROXY, SSL_CERT_FILE and the like as everywhere.
"""

from __future__ import annotations

import hashlib
import http.client
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, TypeVar, cast
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

import msgspec

from inference.protocol import Cause, CopyPhase
from inference.sources.cache import require_space, sha256_of
from inference.sources.check import CODE_FORMATS, INDEX, WEIGHTS, missing, read_object, refuse_code, short
from inference.sources.package import NAMES, is_licence
from inference.sources.progress import Reporter
from inference.sources.source import HubSource, SourceError

T = TypeVar("T")

TRIES = 5
"""Attempts without a single new byte before a download is given up."""
FIRST_PAUSE_SECONDS = 0.5
"""Between two attempts; doubled each time."""
TIMEOUT_SECONDS = 30.0
LOOK_SECONDS = 5.0
"""Longest silence of a hub that is only asked about a model."""
LOOK_SECONDS_IN_ALL = 15.0
"""After this long no more of an answer is read."""
LARGEST_LISTING = 64 * 1024 * 1024
LARGEST_SMALL_FILE = 256 * 1024 * 1024
_CHUNK = 1024 * 1024
_SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_FOLDER = re.compile(r"[A-Za-z0-9_-]{1,60}")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file as the hub lists it."""

    name: str
    """Its path in the repository."""
    size: int
    sha256: str = ""
    """Of its content, where the hub tells it (all large files)."""
    git_sha1: str = ""
    """Of its content as a git blob, for the files that are kept in git itself."""


class Hub(Protocol):
    """How one kind of hub is asked."""

    def listing_url(self, source: HubSource) -> str: ...

    def files(self, source: HubSource, listing: Any) -> list[RemoteFile]:
        """What the decoded listing says. Raises KeyError, TypeError or ValueError for another shape."""

    def file_url(self, source: HubSource, name: str) -> str: ...


class HuggingFace:
    def listing_url(self, source: HubSource) -> str:
        return f"/api/models/{source.repository}/revision/{source.revision}?blobs=true"

    def files(self, source: HubSource, listing: Any) -> list[RemoteFile]:
        if listing["sha"] != source.revision:
            raise SourceError(Cause.CHECKSUM, "The hub answered with another commit than the pinned one.")
        found = []
        for item in listing["siblings"]:
            large = item.get("lfs") or {}
            found.append(
                RemoteFile(
                    name=str(item["rfilename"]),
                    size=int(item["size"]),
                    sha256=str(large.get("sha256") or ""),
                    git_sha1="" if large else str(item.get("blobId") or ""),
                )
            )
        return found

    def file_url(self, source: HubSource, name: str) -> str:
        return f"/{source.repository}/resolve/{source.revision}/{quote(name)}"


class ModelScope:
    def listing_url(self, source: HubSource) -> str:
        return f"/api/v1/models/{source.repository}/repo/files?Revision={source.revision}&Recursive=true"

    def files(self, source: HubSource, listing: Any) -> list[RemoteFile]:
        return [
            RemoteFile(
                name=str(item["Path"]), size=int(item["Size"]), sha256=str(item.get("Sha256") or "").lower()
            )
            for item in listing["Data"]["Files"]
            if item.get("Type") != "tree"
        ]

    def file_url(self, source: HubSource, name: str) -> str:
        return f"/models/{source.repository}/resolve/{source.revision}/{quote(name)}"


class _Broken(Exception):
    """The connection, or the hub, failed in a way that another attempt may not meet."""


class _Redirects(request.HTTPRedirectHandler):
    """Follows a hub to its file servers, without the token."""

    max_redirections = 5

    def redirect_request(
        self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> request.Request | None:
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if before.scheme == "https" and after.scheme != "https":
            raise SourceError(Cause.FETCH, "The hub redirects to an address without encryption.")
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if new is not None and token is not None and _origin(before) == _origin(after):
            new.add_unredirected_header("Authorization", token)
        return new


class Client:
    """GET from one hub. The token goes to the hub's own origin and nowhere else."""

    def __init__(self, endpoint: str, token: str = "") -> None:
        self._endpoint = _checked(endpoint, has_token=bool(token)).rstrip("/")
        self._token = token
        self.host = urlsplit(self._endpoint).hostname or ""
        self._opener = request.OpenerDirector()
        for handler in (
            request.ProxyHandler(),
            request.UnknownHandler(),
            request.HTTPHandler(),
            request.HTTPSHandler(),
            request.HTTPDefaultErrorHandler(),
            _Redirects(),
            request.HTTPErrorProcessor(),
        ):
            self._opener.add_handler(handler)

    def open(
        self, path: str, *, offset: int = 0, timeout: float = TIMEOUT_SECONDS
    ) -> http.client.HTTPResponse:
        """The answer from byte `offset` on. Raises HTTPError for a refusal, _Broken for a failure."""
        asked = request.Request(self._endpoint + path, headers={"User-Agent": "roundhouse"})  # noqa: S310
        asked.add_header("Accept-Encoding", "identity")
        if offset:
            asked.add_header("Range", f"bytes={offset}-")
        if self._token:
            asked.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            response = self._opener.open(asked, timeout=timeout)
        except HTTPError as error:
            error.close()
            if error.code == 429 or error.code >= 500:
                raise _Broken(f"it answered with status {error.code}") from error
            raise
        except URLError as error:
            raise _Broken(_reason(error.reason)) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Broken(_reason(error)) from error
        return cast(http.client.HTTPResponse, response)


def client_of(source: HubSource, environment: Mapping[str, str] = os.environ) -> tuple[Hub, Client]:
    """Which hub, where, and as whom."""
    if source.hub == "modelscope":
        endpoint = environment.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn"
        return ModelScope(), Client(endpoint)
    endpoint = environment.get("HF_ENDPOINT") or "https://huggingface.co"
    return HuggingFace(), Client(endpoint, environment.get("HF_TOKEN", "").strip())


def fetch(source: HubSource, folder: Path, reporter: Reporter) -> Path:
    """Fetch the model into `folder`, which may hold what an earlier attempt had, and return it.

    Small files come first: a model that needs code of its own is refused before its weights move.
    """
    hub, client = client_of(source)
    folder.mkdir(parents=True, exist_ok=True)
    reporter.progress(CopyPhase.FETCHING, "list")
    files = {file.name: file for file in _listing(hub, client, source)}
    get = _Getter(hub, client, source, folder, reporter)

    small = [file for file in files.values() if _is_small(file.name)]
    get.all("download the configuration", small)
    folders = _modules(folder)
    parts = [
        file
        for file in files.values()
        if (path := PurePosixPath(file.name)).parent.as_posix() in folders and path.name in NAMES | {WEIGHTS}
    ]
    refuse_code(folder, [file.name for file in small])

    weights = _weights(source, files, folder)
    wanted = [*parts, *weights]
    here = sum(min(_size(get.place(file)), file.size) for file in wanted)
    require_space(folder, sum(file.size for file in wanted) - here)
    get.all("download", wanted)
    _drop_others(folder, {get.place(file) for file in [*small, *wanted]})
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a hub tells of a model before anything of it is fetched."""

    size_bytes: int
    """Of the weights."""
    config: dict[str, Any] | None
    """Its config.json, where it has one."""
    has_chat_template: bool
    licence: str
    """As the model's page names it; empty where it does not."""


def look(source: HubSource) -> Look:
    """Ask the hub about a model, once and for some seconds at most: a person waits for it.

    Raises SourceError, also for a model that `fetch` would refuse by its list of files.
    """
    hub, client = client_of(source)
    until = time.monotonic() + LOOK_SECONDS_IN_ALL

    def get(path: str) -> bytes:
        try:
            return _read_all(client.open(path, timeout=LOOK_SECONDS), until)
        except HTTPError as error:
            raise _refusal(client, source, error.code) from error
        except _Broken as error:
            raise SourceError(Cause.FETCH, f"{client.host} cannot be used: {error}.") from error

    text = get(hub.listing_url(source))
    files = {file.name: file for file in _files_in(hub, client, source, text)}
    # What `refuse_code` reads, and how the weights are split; not the vocabulary, which is large.
    small = [name for name in files if _is_small(name) and (name.endswith("config.json") or name == INDEX)]
    with tempfile.TemporaryDirectory(prefix="roundhouse-look-") as place:
        folder = Path(place)
        for name in small:
            if files[name].size <= LARGEST_SMALL_FILE:
                (folder / name).write_bytes(get(hub.file_url(source, name)))
        refuse_code(folder, [name for name in files if _is_small(name)])
        weights = _weights(source, files, folder)
        config, tokenizer = (
            read_object(folder / name) if name in small else None
            for name in ("config.json", "tokenizer_config.json")
        )
    return Look(
        size_bytes=sum(file.size for file in weights),
        config=config,
        has_chat_template="chat_template.jinja" in files
        or "chat_template.json" in files
        or bool((tokenizer or {}).get("chat_template")),
        licence=_licence_in(text),
    )


def _licence_in(listing: bytes) -> str:
    try:
        about = msgspec.json.decode(listing).get("cardData") or {}
        licence = about.get("license_name") or about.get("license") or ""
    except (msgspec.DecodeError, AttributeError):
        return ""
    return licence[:100] if isinstance(licence, str) and licence.isprintable() else ""


def _listing(hub: Hub, client: Client, source: HubSource) -> list[RemoteFile]:
    text = _patiently(client, source, lambda: _read_all(client.open(hub.listing_url(source))))
    return _files_in(hub, client, source, text)


def _files_in(hub: Hub, client: Client, source: HubSource, text: bytes) -> list[RemoteFile]:
    try:
        files = hub.files(source, msgspec.json.decode(text))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise SourceError(
            Cause.FETCH, f"{client.host} answered, but not as a model hub does; check the endpoint."
        ) from None
    for file in files:
        _refuse_bad_name(file.name)
        if file.size < 0:
            raise SourceError(Cause.FETCH, f"{client.host} lists a file with an impossible size.")
    return files


def _read_all(response: http.client.HTTPResponse, until: float = math.inf) -> bytes:
    with response:
        text = _read(response, LARGEST_LISTING + 1)
        while len(text) <= LARGEST_LISTING and (more := _read(response, LARGEST_LISTING + 1 - len(text))):
            if time.monotonic() > until:
                raise _Broken("its answer takes too long")
            text += more
    if len(text) > LARGEST_LISTING:
        raise SourceError(Cause.FETCH, "The hub's list of files is larger than any such list.")
    return text


def _read(response: http.client.HTTPResponse, most: int) -> bytes:
    """What has come, up to `most` bytes; nothing at the end. Does not wait for all of them."""
    try:
        return response.read1(most)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_reason(error)) from error


def _refuse_bad_name(name: str) -> None:
    parts = name.split("/")
    bad_part = any(part in ("", ".", "..") for part in parts)
    if bad_part or "\\" in name or ":" in parts[0] or not name.isprintable() or len(name) > 1000:
        raise SourceError(Cause.UNSAFE_FORMAT, f"The hub lists an unsafe file name: {short(name)}.")


def _is_small(name: str) -> bool:
    """What comes before the weights. All of it lies at the top of the repository."""
    return "/" not in name and (name in NAMES or is_licence(PurePosixPath(name)))


def _modules(folder: Path) -> set[str]:
    """Folders of a sentence-transformers model's further parts (its pooling, a dense layer)."""
    path = folder / "modules.json"
    if not path.exists():
        return set()
    try:
        modules = msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise missing("modules.json is damaged: it is not a list of modules.") from None
    names = {str(module.get("path", "")) for module in modules}
    return {name for name in names if _FOLDER.fullmatch(name)}


def _weights(source: HubSource, files: Mapping[str, RemoteFile], folder: Path) -> list[RemoteFile]:
    """The weights to fetch: the named GGUF, else safetensors, else the only GGUF."""
    if source.file:
        if source.file not in files:
            raise missing(f"{source.repository} has no file {short(source.file)} at this commit.")
        return [files[source.file]]
    if INDEX in files:
        shards = read_object(folder / INDEX).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else []
        for name in names:
            if not isinstance(name, str) or not _SHARD.fullmatch(name):
                raise SourceError(Cause.UNSAFE_FORMAT, f"{INDEX} names a file that is no safetensors shard.")
            if name not in files:
                raise missing(f"{source.repository} lacks {short(name)}, which {INDEX} lists.")
        return [files[name] for name in sorted(set(names))]
    if WEIGHTS in files:
        return [files[WEIGHTS]]
    ggufs = sorted(name for name in files if name.lower().endswith(".gguf"))
    if len(ggufs) == 1:
        return [files[ggufs[0]]]
    if ggufs:
        raise SourceError(
            Cause.BAD_ARGUMENT,
            f"{source.repository} holds {len(ggufs)} GGUF files ({_some(ggufs)}): "
            f"name the one to serve, as in {source}/{ggufs[0]}.",
        )
    suffixes = {PurePosixPath(name).suffix.lower() for name in files} & CODE_FORMATS
    if suffixes:
        raise SourceError(
            Cause.UNSAFE_FORMAT,
            f"{source.repository} has its weights only in a format that can carry code "
            f"({', '.join(sorted(suffixes))}); safetensors or GGUF is needed.",
        )
    raise missing(f"{source.repository} holds no model weights (safetensors or GGUF) at this commit.")


def _some(names: list[str]) -> str:
    shown = ", ".join(short(name) for name in names[:5])
    return f"{shown}, …" if len(names) > 5 else shown


class _Getter:
    """Downloads into one folder."""

    def __init__(self, hub: Hub, client: Client, source: HubSource, folder: Path, reporter: Reporter) -> None:
        self._hub, self._client, self._source = hub, client, source
        self._folder, self._reporter = folder, reporter

    def place(self, file: RemoteFile) -> Path:
        """Where the file goes. A named GGUF goes to the top, wherever it lies in the repository."""
        if file.name.lower().endswith(".gguf"):
            return self._folder / PurePosixPath(file.name).name
        return self._folder / file.name

    def all(self, step: str, files: Iterable[RemoteFile]) -> None:
        files = list(files)
        total = sum(file.size for file in files)
        before = 0
        for number, file in enumerate(files):
            if file.name in NAMES and file.size > LARGEST_SMALL_FILE:
                raise missing(f"{short(file.name)} is damaged: it is larger than any such file.")

            def say(here: int, before: int = before, number: int = number) -> None:
                self._say(step, before + here, total, number, len(files))

            say(min(_size(self.place(file)), file.size))
            self._one(file, say)
            before += file.size
        self._say(step, before, total, len(files), len(files))

    def _say(self, step: str, done: int, total: int, files_done: int, files_total: int) -> None:
        self._reporter.progress(
            CopyPhase.FETCHING, step, done, total, files_done=files_done, files_total=files_total
        )

    def _one(self, file: RemoteFile, say: Callable[[int], None]) -> None:
        place = self.place(file)
        place.parent.mkdir(parents=True, exist_ok=True)
        if _size(place) > file.size:
            place.unlink()
        place.touch()
        _patiently(
            self._client,
            self._source,
            lambda: self._rest_of(file, place, say),
            progress=lambda: _size(place),
        )
        if not _is_whole(place, file):
            place.unlink()
            raise SourceError(
                Cause.CHECKSUM,
                f"{short(file.name)} is not what the hub says it is: its digest differs; it was thrown away.",
            )

    def _rest_of(self, file: RemoteFile, place: Path, say: Callable[[int], None]) -> None:
        have = _size(place)
        if have == file.size:
            return
        with self._client.open(self._hub.file_url(self._source, file.name), offset=have) as response:
            if have and not _continues(response.headers, response.status, have):
                have = 0
            with place.open("r+b") as target:
                target.truncate(have)
                target.seek(have)
                while chunk := _read(response, _CHUNK):
                    have += len(chunk)
                    if have > file.size:
                        raise SourceError(
                            Cause.CHECKSUM, f"{short(file.name)} is longer than the hub says it is."
                        )
                    target.write(chunk)
                    say(have)
        if have < file.size:
            raise _Broken("the connection ended early")


def _patiently(
    client: Client, source: HubSource, attempt: Callable[[], T], *, progress: Callable[[], int] = lambda: 0
) -> T:
    """Try until it works; a failure that brought no new byte counts, and `TRIES` of them are enough."""
    failures, reached = 0, progress()
    while True:
        try:
            return attempt()
        except HTTPError as error:
            raise _refusal(client, source, error.code) from error
        except _Broken as error:
            now = progress()
            failures = 1 if now > reached else failures + 1
            reached = max(reached, now)
            if failures >= TRIES:
                raise SourceError(Cause.FETCH, f"{client.host} cannot be used: {error}.") from error
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (failures - 1))


def _refusal(client: Client, source: HubSource, status: int) -> SourceError:
    if status in (401, 403):
        return SourceError(
            Cause.FETCH,
            f"{client.host} does not give {source.repository} to us (status {status}): it does not exist, is "
            "private, or its terms must be accepted first. Set HF_TOKEN in the environment of the node to "
            "the token of an account that may read it.",
        )
    if status == 404:
        return missing(
            f"{client.host} has no {source.repository} with commit {source.revision}, or no such file in it."
        )
    return SourceError(Cause.FETCH, f"{client.host} answered with status {status}.")


def _continues(headers: Message, status: int, offset: int) -> bool:
    """Is this the rest that was asked for, and not the whole file again?"""
    return status == 206 and headers.get("Content-Range", "").startswith(f"bytes {offset}-")


def _is_whole(path: Path, file: RemoteFile) -> bool:
    if _size(path) != file.size:
        return False
    if file.sha256:
        return sha256_of(path) == file.sha256
    if file.git_sha1:
        digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        with path.open("rb") as content:
            while chunk := content.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest() == file.git_sha1
    return True


def _drop_others(folder: Path, wanted: set[Path]) -> None:
    """Remove what an earlier attempt fetched and this one does not want."""
    for path in folder.rglob("*"):
        if path.is_file() and path not in wanted:
            path.unlink()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _origin(parts: Any) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _checked(endpoint: str, *, has_token: bool) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise SourceError(Cause.BAD_ARGUMENT, "The hub's endpoint must be like https://huggingface.co.")
    if parts.username is not None:
        raise SourceError(Cause.BAD_ARGUMENT, "The hub's endpoint must not hold a user; set HF_TOKEN.")
    if has_token and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise SourceError(
            Cause.BAD_ARGUMENT, "HF_TOKEN would be sent without encryption: HF_ENDPOINT must be https."
        )
    return endpoint


def _reason(error: object) -> str:
    """What failed, without addresses."""
    if isinstance(error, OSError):
        return error.strerror or str(error.args[0] if error.args else type(error).__name__)
    return type(error).__name__
