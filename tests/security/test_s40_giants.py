"""S40: a giant body, header, frame or password is refused before it is held, and all goes on."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import psutil
import pytest
import websockets
from django.contrib.auth import get_user_model
from django.test import Client

from openai_api import limits
from openai_api.endpoints import ENDPOINTS
from tests.api.conftest import Answer, Served, facts, say, served, worker  # noqa: F401
from tests.integration.test_chat_socket import page_of
from webchat import bounds
from webchat.login import PASSWORD_CHARACTERS

pytestmark = pytest.mark.django_db(transaction=True)

GIGABYTE = 2**30
PIECE = b"\x00" * 65536
MOST_SENT = 64 * 2**20
"""What is sent of a gigabyte at the most: sockets and loops on the way hold some megabytes."""
FLAT = 30e6
PATHS = [
    *(endpoint.path for endpoint in ENDPOINTS),
    *("/v1/engines/x/embeddings", "/api/v1/token_check", "/v1/models", "/v1/nothing", "/v1/responses/resp_x"),
    *("/fleet/worker", "/fleet/node", "/login/", "/admin/login/", "/chat/api/conversations", "/nothing", "/"),
]


@pytest.fixture
def flat(served: Served) -> Iterator[None]:  # noqa: F811
    """The gateway, which is in this process, is no larger afterwards, and serves."""
    assert served.chat(say("warm")).status == 200
    for path in PATHS:
        served.request("POST", path, b"{}")  # what its first use loads stays
    assert served.request("GET", "/login/").status == 200
    before = psutil.Process().memory_info().rss
    yield
    assert psutil.Process().memory_info().rss - before < FLAT
    assert served.chat(say("hi")).status == 200


def pushed(served: Served, path: str, length: str, piece: bytes) -> tuple[Answer, int]:  # noqa: F811
    """Send a body that does not end; what came back, and how much was sent by then."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\nAuthorization: Bearer {served.api_key}\r\n"
        f"Content-Type: application/{'x-www-form-urlencoded' if 'login' in path else 'json'}\r\n\r\n"
    )
    sent, received = 0, b""
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connected:
        connected.sendall(head.encode())
        with contextlib.suppress(ConnectionError):
            while sent < MOST_SENT and not received:
                connected.sendall(piece)
                sent += len(piece)
                connected.settimeout(0.001)
                with contextlib.suppress(TimeoutError):
                    received = connected.recv(65536)
                connected.settimeout(5)
        with contextlib.suppress(ConnectionError):
            while part := connected.recv(65536):
                received += part
    return Answer.of(received, 0.0), sent


def test_a_body_of_a_gigabyte_is_refused_wherever_it_is_sent(served: Served, flat: None) -> None:  # noqa: F811
    announced = f"Content-Length: {GIGABYTE}", PIECE
    chunked = "Transfer-Encoding: chunked", b"%x\r\n" % len(PIECE) + PIECE + b"\r\n"
    refused = 0
    for path in PATHS:
        for length, piece in (announced, chunked):
            answer, sent = pushed(served, path, length, piece)
            # By its size, or because nothing is taken there; 0: closed before the refusal was read.
            assert answer.status in (413, 400, 401, 403, 404, 405, 0), (
                path,
                answer.status,
                answer.body[:200],
            )
            assert sent < MOST_SENT, (path, length)
            refused += answer.status == 413
    assert refused > len(PATHS), "most are refused for their size"


def test_a_form_at_the_bound_is_read_and_one_byte_more_is_not(served: Served, flat: None) -> None:  # noqa: F811
    for length, status in ((limits.FORM_BYTES, 403), (limits.FORM_BYTES + 1, 413)):
        answer = served.request("POST", "/login/", b"x" * length)
        assert answer.status == status, answer.body[:200]  # 403: it has no CSRF token


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/login/", "/chat/ws"])
def test_a_header_of_100_kb_is_431(served: Served, flat: None, path: str) -> None:  # noqa: F811
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n" if path == "/chat/ws" else b""
    first = b"GET " + path.encode()
    for head in (
        first + b" HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"X-Long: " + b"x" * 100_000 + b"\r\n\r\n",
        first + b" HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"X-Many: x\r\n" * 10_000 + b"\r\n",
        first + b"?" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        first + b" HTTP/1.1\r\nHost: localhost\r\n" + b"x" * 100_000 + b": x\r\n\r\n",
        first + b" HTTP/1.1\r\nHost: localhost\r\nCookie: sessionid=" + b"x" * 100_000,
    ):
        answer = served.raw(head)
        assert answer.status in (431, 0), (head[:60], answer.status)  # 0: closed while we still sent


def frame(length: int, *, final: bool, opcode: int) -> bytes:
    """The head of a client's frame, and one byte of it."""
    return struct.pack("!BBQ", (0x80 if final else 0) | opcode, 0x80 | 127, length) + b"\x00\x00\x00\x00x"


def closed_by(connected: websockets.sync.client.ClientConnection) -> int:
    with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
        list(connected)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code


def test_a_frame_of_a_gigabyte_closes_the_socket(served: Served, flat: None) -> None:  # noqa: F811
    ann = get_user_model().objects.create_user("ann")
    for start in (frame(GIGABYTE, final=True, opcode=1), frame(2**62, final=True, opcode=2)):
        with page_of(ann, served.port) as page:
            page.socket.socket.sendall(start)
            assert closed_by(page.socket) == 1009
    # In pieces, each of them small enough.
    with page_of(ann, served.port) as page:
        piece = "x" * 65536
        pieces = iter([piece] * (bounds.FRAME_BYTES // len(piece) + 1))
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            page.socket.send(pieces)
        assert closed_by(page.socket) == 1009


@pytest.mark.parametrize("path", ["/login/", "/admin/login/"])
def test_a_password_of_a_megabyte_is_not_hashed(served: Served, flat: None, path: str) -> None:  # noqa: F811
    body = b"username=ann&password=" + b"x" * 2**20
    answer = served.request("POST", path, body, "Content-Type: application/x-www-form-urlencoded")
    assert answer.status in (413, 0)


def test_the_longest_password_is_a_kilobyte(facts: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    password = "p" * PASSWORD_CHARACTERS
    get_user_model().objects.create_user("ann", password=password)
    answer = Client().post("/login/", {"username": "ann", "password": password})
    assert answer.status_code == 302
    hashed: list[str] = []
    monkeypatch.setattr(
        "django.contrib.auth.hashers.MD5PasswordHasher.encode", lambda *_: hashed.append("") or "md5$x$x"
    )
    answer = Client().post("/login/", {"username": "ann", "password": password + "p"})
    assert answer.status_code == 400
    assert "at most 1024 characters" in answer.content.decode()
    assert not hashed
