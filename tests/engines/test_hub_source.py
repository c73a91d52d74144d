"""Models from a hub, fetched from a small hub of our own: what is asked for, refused and kept."""

from __future__ import annotations

import hashlib
import http.server
import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from django.core.exceptions import ValidationError

from inference.protocol import Cause, CopyPhase, CopyReport
from inference.sources import HubSource, SourceError, hub, parse_source
from inference.sources.cache import verify
from inference.sources.prepare import prepare
from registry.validators import validate_source
from tests.engines.test_sources import command, lines_of, seconds_left
from tests.engines.tiny_model import make_tiny_gguf, make_tiny_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = HubSource("hub", "acme/tiny", COMMIT)
TOKEN = "hf_very_secret"


@dataclass
class FakeHub:
    """Speaks as Hugging Face's hub and as ModelScope. Large files come from a second host, as there."""

    files: dict[str, bytes] = field(default_factory=dict)
    listed: dict[str, bytes] = field(default_factory=dict)
    """Names that only the listing has."""
    private: bool = False
    pace: float = 0.0
    """Seconds between two pieces of a large file."""
    cut_after: int = 0
    """Bytes after which a large file's connection breaks, each time."""
    flip: str = ""
    """A file that is served other than it is listed."""
    seen: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    """Host, path, Authorization and Range of each request."""
    url: str = ""
    files_url: str = ""
    never: threading.Event = field(default_factory=threading.Event)

    def asked_for(self, name: str) -> int:
        return sum(path.endswith(f"/{name}") for host, path, *_ in self.seen if host == "files")


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf", ".bin"))


def handler(fake: FakeHub, host: str) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            authorization = self.headers.get("Authorization")
            fake.seen.append((host, parts.path, authorization, self.headers.get("Range")))
            if host == "files":
                return self.large(parts.path.rpartition(f"{COMMIT}/")[2])
            if fake.private and authorization != f"Bearer {TOKEN}":
                return self.answer(401, b"{}")
            if parts.path == f"/api/models/acme/tiny/revision/{COMMIT}":
                return self.answer(200, json.dumps(listing(fake)).encode())
            if parts.path == "/api/v1/models/acme/tiny/repo/files":
                assert parse_qs(parts.query)["Revision"] == [COMMIT]
                return self.answer(200, json.dumps(modelscope_listing(fake)).encode())
            name = parts.path.partition(f"/resolve/{COMMIT}/")[2]
            if name not in fake.files:
                return self.answer(404, b"{}")
            if is_large(name):
                self.send_response(302)
                self.send_header("Location", f"{fake.files_url}/{COMMIT}/{name}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
            return self.answer(200, content_of(fake, name))

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def large(self, name: str) -> None:
            body = content_of(fake, name)
            begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - begin))
            self.end_headers()
            rest = body[begin:]
            if fake.cut_after:
                self.wfile.write(rest[: fake.cut_after])
                self.close_connection = len(rest) > fake.cut_after
                return
            size = 4096 if fake.pace else len(rest) or 1
            for start in range(0, len(rest), size):
                self.wfile.write(rest[start : start + size])
                if fake.pace and fake.never.wait(fake.pace):
                    return

    return Handler


def content_of(fake: FakeHub, name: str) -> bytes:
    content = fake.files[name]
    return bytes([content[0] ^ 1]) + content[1:] if name == fake.flip else content


def listing(fake: FakeHub) -> dict[str, object]:
    siblings = []
    for name, content in {**fake.files, **fake.listed}.items():
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        item = {"rfilename": name, "size": len(content), "blobId": blob}
        if is_large(name):
            item |= {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}}
        siblings.append(item)
    return {"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}


def modelscope_listing(fake: FakeHub) -> dict[str, object]:
    files = [
        {"Path": name, "Type": "blob", "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
        for name, content in fake.files.items()
    ]
    return {"Code": 200, "Data": {"Files": [*files, {"Path": "sub", "Type": "tree", "Size": 0}]}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def fake(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(files={file.name: file.read_bytes() for file in llama.iterdir()})
    fake.files |= {"README.md": b"# Tiny", "LICENSE": b"Apache-2.0", "modeling_tiny.py": b"print('never')"}
    fake.files |= {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx"}
    servers = [
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(fake, host)) for host in ("hub", "files")
    ]
    # Two names of this machine: for a client, another host.
    fake.url = f"http://127.0.0.1:{servers[0].server_port}"
    fake.files_url = f"http://localhost:{servers[1].server_port}"
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", fake.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "FIRST_PAUSE_SECONDS", 0.001)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for thread in threads:
        thread.start()
    yield fake
    fake.never.set()
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


def fetched(cache: Path, source: HubSource = SOURCE) -> tuple[Path, list[CopyReport]]:
    reports: list[CopyReport] = []
    return prepare("tiny", source, cache, reports.append), reports


def refusal(cache: Path, source: HubSource = SOURCE) -> SourceError:
    with pytest.raises(SourceError) as refused:
        fetched(cache, source)
    assert refused.value.detail.endswith(".")
    return refused.value


def content_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# -- the source's text


@pytest.mark.parametrize(
    "text",
    [
        f"hub:acme/tiny@{COMMIT}",
        f"modelscope:acme/tiny@{COMMIT}",
        f"hub:acme/Tiny-7B.v1_x@{COMMIT}/tiny-Q4_K_M.gguf",
        f"hub:acme/tiny@{COMMIT}/Q4/tiny.gguf",
    ],
)
def test_a_repository_at_a_commit_is_a_source(text: str) -> None:
    assert str(parse_source(text)) == text
    validate_source(text)


@pytest.mark.parametrize(
    "text",
    [
        "hub:acme/tiny",
        "hub:acme/tiny@main",
        f"hub:tiny@{COMMIT}",
        f"hub:../tiny@{COMMIT}",
        f"hub:acme/..@{COMMIT}",
        f"hub:acme/tiny/more@{COMMIT}",
        f"hub:acme/tiny@{COMMIT[:-1]}",
        f"hub:acme/tiny@{COMMIT.upper()}",
        f"hub:acme/tiny@{COMMIT}0",
        f"hub:acme/tiny@{COMMIT}/../x.gguf",
        f"hub:acme/tiny@{COMMIT}/a//x.gguf",
        f"hub:acme/tiny@{COMMIT}/model.safetensors",
        f"hub:acme/tiny@{COMMIT}?x",
        f"hub:acme/tiny@{COMMIT}\n",
        f"hub:acme/ti\x00ny@{COMMIT}",
        f"hub:äcme/tiny@{COMMIT}",
        f"other:acme/tiny@{COMMIT}",
        f"https://huggingface.co/acme/tiny@{COMMIT}",
    ],
)
def test_any_other_text_is_refused_here_and_in_forms(text: str) -> None:
    with pytest.raises(SourceError) as refused:
        parse_source(text)
    assert refused.value.cause is Cause.BAD_ARGUMENT
    with pytest.raises(ValidationError):
        validate_source(text)


def test_a_branch_is_refused_with_the_way_to_its_commit() -> None:
    with pytest.raises(SourceError) as refused:
        parse_source("hub:acme/tiny@main")
    assert "git ls-remote https://huggingface.co/acme/tiny main" in refused.value.detail
    assert "can change" in refused.value.detail


# -- fetching


def test_weights_tokenizer_and_configuration_are_fetched_and_nothing_else(
    fake: FakeHub, tmp_path: Path
) -> None:
    path, reports = fetched(tmp_path)
    assert content_below(path) == {
        "LICENSE", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", ".roundhouse.json",
    }  # fmt: skip
    assert verify(path) == []
    size = len(fake.files["model.safetensors"])
    last = [report.progress for report in reports if report.progress and report.progress.step == "download"]
    assert (last[-1].done, last[-1].total, last[-1].unit) == (size, size, "bytes")
    assert reports[-1].phase is CopyPhase.READY
    assert content_below(tmp_path / "models") == {f"{path.name}/{name}" for name in content_below(path)} | {
        f".{path.name}.lock"
    }


def test_a_copy_that_is_there_asks_the_hub_nothing(fake: FakeHub, tmp_path: Path) -> None:
    path, _ = fetched(tmp_path)
    fake.seen.clear()
    assert fetched(tmp_path)[0] == path
    assert fake.seen == []


def test_modelscope_gives_the_same_model(fake: FakeHub, tmp_path: Path, llama: Path) -> None:
    path, _ = fetched(tmp_path, HubSource("modelscope", "acme/tiny", COMMIT))
    assert (path / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()


def test_the_parts_of_an_embedding_model_come_along(fake: FakeHub, tmp_path: Path) -> None:
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "../.."}]
    fake.files |= {
        "modules.json": json.dumps(modules).encode(),
        "1_Pooling/config.json": b"{}",
        "2_Other/config.json": b"{}",
    }
    path, _ = fetched(tmp_path)
    assert (path / "1_Pooling" / "config.json").exists()
    assert not (path / "2_Other").exists()


def test_one_of_several_gguf_files_is_named(fake: FakeHub, tmp_path: Path) -> None:
    gguf = make_tiny_gguf(tmp_path / "made" / "tiny.gguf").read_bytes()
    del fake.files["model.safetensors"]
    fake.files |= {"tiny-Q8_0.gguf": gguf, "small/tiny-Q4.gguf": gguf}
    error = refusal(tmp_path / "cache")
    assert error.cause is Cause.BAD_ARGUMENT
    assert f"{SOURCE}/small/tiny-Q4.gguf" in error.detail
    source = parse_source(f"{SOURCE}/small/tiny-Q4.gguf")
    assert isinstance(source, HubSource)
    path, _ = fetched(tmp_path / "cache", source)
    assert (path / "model.safetensors").exists()
    assert fake.asked_for("tiny-Q4.gguf") == 1
    assert fake.asked_for("tiny-Q8_0.gguf") == 0
    assert not list((tmp_path / "cache" / "models").glob("*.part"))


# -- the token


def test_a_private_model_is_fetched_with_the_token_which_no_other_host_sees(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetched(tmp_path)
    at_hub = [authorization for host, _, authorization, _ in fake.seen if host == "hub"]
    elsewhere = [authorization for host, _, authorization, _ in fake.seen if host == "files"]
    assert set(at_hub) == {f"Bearer {TOKEN}"}
    assert elsewhere
    assert set(elsewhere) == {None}


def test_without_the_token_the_refusal_says_what_to_set(fake: FakeHub, tmp_path: Path) -> None:
    fake.private = True
    error = refusal(tmp_path)
    assert error.cause is Cause.FETCH
    assert "HF_TOKEN" in error.detail


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ("http://hub.example", "HF_ENDPOINT must be https"),
        ("https://me:pass@hub.example", "must not hold a user"),
        ("ftp://hub.example", "must be like"),
        ("file:///etc", "must be like"),
    ],
)
def test_an_endpoint_that_would_leak_the_token_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, endpoint: str, says: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    error = refusal(tmp_path)
    assert error.cause is Cause.BAD_ARGUMENT
    assert says in error.detail
    assert TOKEN not in error.detail
    assert "pass" not in error.detail


# -- refusals


def test_a_commit_that_is_not_there_is_said_to_be_missing(fake: FakeHub, tmp_path: Path) -> None:
    other = HubSource("hub", "acme/tiny", COMMIT[::-1])
    error = refusal(tmp_path, other)
    assert error.cause is Cause.MISSING_FILE
    assert other.revision in error.detail


def test_a_listed_file_that_is_not_there_is_said_to_be_missing(fake: FakeHub, tmp_path: Path) -> None:
    fake.listed["merges.txt"] = b"never"
    assert refusal(tmp_path).cause is Cause.MISSING_FILE


def without(name: str) -> Callable[[FakeHub], None]:
    return lambda fake: fake.files.pop(name) and None


@pytest.mark.parametrize(
    ("change", "cause", "says"),
    [
        (without("model.safetensors"), Cause.UNSAFE_FORMAT, ".bin"),
        (without("config.json"), Cause.MISSING_FILE, "config.json"),
        (
            lambda fake: fake.files.update({"config.json": b'{"auto_map": {"AutoModel": "x.Y"}}'}),
            Cause.UNSAFE_FORMAT,
            "remote code",
        ),
        (lambda fake: setattr(fake, "flip", "model.safetensors"), Cause.CHECKSUM, "digest"),
        (lambda fake: setattr(fake, "flip", "tokenizer.json"), Cause.CHECKSUM, "tokenizer.json"),
    ],
)
def test_a_model_that_cannot_be_trusted_is_refused_and_nothing_is_left(
    fake: FakeHub, tmp_path: Path, change: Callable[[FakeHub], None], cause: Cause, says: str
) -> None:
    change(fake)
    error = refusal(tmp_path)
    assert error.cause is cause
    assert says in error.detail
    assert {Path(name).suffix for name in content_below(tmp_path)} == {".lock"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors.index.json", b'{"weight_map": {"a": []}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": {"b": "c"}}}'),
        ("modules.json", b'["\xff"]'),
        ("modules.json", b'[{"a":' * 100_000),
    ],
)
def test_lists_of_files_that_are_none_are_refused(
    fake: FakeHub, tmp_path: Path, name: str, content: bytes
) -> None:
    fake.files[name] = content
    assert name in refusal(tmp_path).detail


def test_a_hub_that_is_only_asked_is_not_listened_to_for_ever(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "LOOK_SECONDS_IN_ALL", -1.0)
    monkeypatch.setattr(hub, "_read", lambda response, most: b"{" * min(most, 10))
    with pytest.raises(SourceError, match="takes too long"):
        hub.look(SOURCE)


def test_a_model_that_needs_code_is_refused_before_its_weights_move(fake: FakeHub, tmp_path: Path) -> None:
    fake.files["config.json"] = b'{"auto_map": {"AutoModel": "x.Y"}}'
    refusal(tmp_path)
    assert fake.asked_for("model.safetensors") == 0


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/../../config.json",
        "a//config.json",
        "./config.json",
        "..\\config.json",
        "C:/config.json",
        "config.json\x00.txt",
        "a/..",
        "..",
        "",
        "x\n/config.json",
        "\u202egnp.config.json",
    ],
)
def test_a_name_that_reaches_outside_is_refused_whole(fake: FakeHub, tmp_path: Path, name: str) -> None:
    fake.listed[name] = b"{}"
    error = refusal(tmp_path / "cache")
    assert error.cause is Cause.UNSAFE_FORMAT
    assert all(host == "hub" and path.startswith("/api/") for host, path, *_ in fake.seen)
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_too_small_a_disk_is_said_before_the_weights_move(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, needed: int) -> None:
        raise SourceError(Cause.DISK, f"Too little disk space: {needed} bytes are needed.")

    monkeypatch.setattr(hub, "require_space", full)
    error = refusal(tmp_path)
    assert error.cause is Cause.DISK
    assert str(len(fake.files["model.safetensors"])) in error.detail
    assert fake.asked_for("model.safetensors") == 0


def test_a_server_that_is_no_hub_is_named_as_such(fake: FakeHub, tmp_path: Path) -> None:
    fake.listed = {}
    source = HubSource("modelscope", "acme/other", COMMIT)
    assert refusal(tmp_path, source).cause is Cause.MISSING_FILE


def test_a_hub_that_cannot_be_reached_is_a_cause_that_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "FIRST_PAUSE_SECONDS", 0.001)
    error = refusal(tmp_path)
    assert error.cause is Cause.FETCH
    assert "refused" in error.detail


# -- interruptions


def test_a_connection_that_breaks_again_and_again_still_brings_the_whole_file(
    fake: FakeHub, tmp_path: Path
) -> None:
    fake.cut_after = len(fake.files["model.safetensors"]) // 9
    path, _ = fetched(tmp_path)
    assert verify(path) == []
    begins = [range_ for host, _, _, range_ in fake.seen if host == "files"]
    assert len(begins) >= 9
    assert all(begins[1:])


def test_a_killed_fetch_is_taken_up_where_it_was(fake: FakeHub, tmp_path: Path) -> None:
    fake.pace = 0.02
    first = subprocess.Popen(command(SOURCE, tmp_path), stdout=subprocess.PIPE)
    for _ in seconds_left(20):
        part = next(tmp_path.glob("models/.*.part/model.safetensors"), None)
        if part is not None and part.stat().st_size > 20_000:
            break
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not list(tmp_path.glob("models/tiny@*"))
    fake.pace = 0
    fake.seen.clear()
    done = subprocess.run(command(SOURCE, tmp_path), stdout=subprocess.PIPE, check=True)
    path = Path(lines_of(done.stdout)[-1].path)
    assert verify(path) == []
    (asked,) = [range_ for host, _, _, range_ in fake.seen if host == "files"]
    assert asked is not None
    assert int(asked[6:-1]) > 20_000
    # What was whole already was not fetched again.
    assert not [name for host, name, *_ in fake.seen if host == "hub" and name.endswith("tokenizer.json")]
    assert not list(tmp_path.glob("models/.*.part"))
