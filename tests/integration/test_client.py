"""The client against real servers on real sockets, the well-behaved and the others."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import struct
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.client import WorkerClient
from inference.connections import Connection
from inference.dispatch.views import Timeouts, WorkerView
from inference.errors import WorkerBroke, WorkerRefused, WorkerUnreachable
from inference.sse import DONE, MAX_EVENT_BYTES, BadStream, EventSplitter

CHAT = "/v1/chat/completions"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def view(port: int) -> WorkerView:
    return WorkerView(
        id=1,
        epoch=1,
        name="worker-1",
        node_name="node",
        deployment_id=1,
        deployment_name="deployment",
        engine="simulated",
        revision_id=1,
        url=f"http://127.0.0.1:{port}",
        secret="the-secret",
        slots=4,
        capabilities=frozenset(),
        running=0,
        waiting=0,
        kv_use=0,
        speed=0,
        reported_at=0,
    )


@asynccontextmanager
async def serving(handler: Handler, path: str = CHAT) -> AsyncIterator[WorkerView]:
    app = web.Application()
    app.router.add_post(path, handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield view(site._server.sockets[0].getsockname()[1])
    finally:
        await runner.cleanup()


@asynccontextmanager
async def speaking(*parts: bytes, then: str = "close") -> AsyncIterator[WorkerView]:
    """A server that sends these bytes to whoever asks, then closes, or stays silent."""
    silence = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            for part in parts:
                writer.write(part)
                await writer.drain()
                # The next part is to be a read of its own at the other end.
                await asyncio.sleep(0.02)
            if then == "silence":
                await silence.wait()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield view(server.sockets[0].getsockname()[1])
    finally:
        silence.set()
        server.close()
        await server.wait_closed()


@pytest.fixture
async def client() -> AsyncIterator[WorkerClient]:
    one = WorkerClient(Timeouts(idle=0.2, first_token=2.0))
    await one.start()
    yield one
    await one.close()


async def streamed(client: WorkerClient, worker: WorkerView) -> list[bytes]:
    return [event async for batch in client.stream(worker, CHAT, b"{}", request_id="r1") for event in batch]


SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
CHUNKED = SSE + b"Transfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def test_an_answer_comes_back_whole_and_the_worker_gets_its_secret(client):
    seen = {}

    async def handler(request: web.Request) -> web.Response:
        seen.update(headers=request.headers, body=await request.read())
        return web.json_response({"object": "chat.completion"})

    async with serving(handler) as worker:
        answer = await client.complete(worker, CHAT, b'{"a": 1}', request_id="r1")
    assert json.loads(answer) == {"object": "chat.completion"}
    assert seen["headers"]["Authorization"] == "Bearer the-secret"
    assert seen["headers"]["X-Request-Id"] == "r1"
    assert seen["body"] == b'{"a": 1}'


async def test_a_stream_comes_event_by_event_and_its_connection_is_used_again(client):
    connections = set()

    async def handler(request: web.Request) -> web.StreamResponse:
        connections.add(request.transport)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b': comment\n\ndata: {"n": 1}\n\n')
        await response.write(b'event: message\ndata:{"n":\ndata: 2}\n\n')
        await response.write(b"data: [DONE]\n\n")
        await asyncio.sleep(0.01)
        return response

    async with serving(handler) as worker:
        for _ in range(3):
            events = await streamed(client, worker)
            assert events == [b'data: {"n": 1}', b'data: {"n": 2}', DONE]
            assert json.loads(events[1][6:]) == {"n": 2}
            await asyncio.sleep(0.03)  # its very end comes behind its last event
    assert len(connections) == 1


async def test_a_closed_port_is_unreachable_and_gone(client):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        worker = view(free.getsockname()[1])
        for attempt in (client.complete(worker, CHAT, b"{}", request_id="r"), streamed(client, worker)):
            with pytest.raises(WorkerUnreachable) as refused:
                await attempt
            assert refused.value.gone


async def test_a_host_that_does_not_answer_is_given_up_after_the_connect_timeout():
    # A listener whose queue is full drops further connections in silence, as a dead host does.
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        address = deaf.getsockname()
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            fillers.append(filler)
        client = WorkerClient(Timeouts(connect=0.2))
        await client.start()
        began = time.monotonic()
        with pytest.raises(WorkerUnreachable) as refused:
            await client.complete(view(address[1]), CHAT, b"{}", request_id="r")
        assert refused.value.gone
        assert 0.15 < time.monotonic() - began < 1.0
        await client.close()
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize("status", [500, 502, 503, 401, 403, 429, 302])
async def test_what_is_not_the_requests_fault_is_unreachable_but_not_gone(client, status):
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "secret detail"}}, status=status)

    async with serving(handler) as worker:
        with pytest.raises(WorkerUnreachable) as refused:
            await client.complete(worker, CHAT, b"{}", request_id="r1")
        assert not refused.value.gone
        assert "secret detail" not in str(refused.value)
        with pytest.raises(WorkerUnreachable):
            await streamed(client, worker)


async def test_a_refusal_carries_the_engines_words(client):
    async def handler(request: web.Request) -> web.Response:
        error = {"message": "Too long.", "type": "invalid_request_error", "param": "messages", "code": "x"}
        return web.json_response({"error": error}, status=400)

    async with serving(handler) as worker:
        with pytest.raises(WorkerRefused) as refused:
            await streamed(client, worker)
    assert (refused.value.status, refused.value.message) == (400, "Too long.")
    assert (refused.value.param, refused.value.code) == ("messages", "x")


@pytest.mark.parametrize(
    "body", [b"", b"<html>no</html>", b"\xff\xfe", b'{"error": "text"}', b'{"detail": "x"}', b"x" * 100_000]
)
async def test_a_refusal_of_another_shape_shows_nothing_of_it(client, body):
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=body, status=404)

    async with serving(handler) as worker:
        with pytest.raises(WorkerRefused) as refused:
            await client.complete(worker, CHAT, b"{}", request_id="r1")
    assert refused.value.status == 404
    assert refused.value.message == "The engine refused the request."
    assert refused.value.code is None


async def test_html_instead_of_an_answer_is_unreachable(client):
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text="<html>Welcome to the proxy</html>", content_type="text/html")

    async with serving(handler) as worker:
        with pytest.raises(WorkerUnreachable, match="text/html"):
            await client.complete(worker, CHAT, b"{}", request_id="r1")
        with pytest.raises(WorkerUnreachable, match="text/html"):
            await streamed(client, worker)


async def test_a_worker_that_dies_before_its_answer_is_unreachable(client):
    async with speaking() as worker:
        with pytest.raises(WorkerUnreachable):
            await streamed(client, worker)
    cut_short = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    async with speaking(cut_short) as worker:
        with pytest.raises(WorkerUnreachable):
            await client.complete(worker, CHAT, b"{}", request_id="r1")
    broken_chunk = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with speaking(broken_chunk, chunk(b"{"), b"zz\r\n") as worker:
        with pytest.raises(WorkerUnreachable):
            await client.complete(worker, CHAT, b"{}", request_id="r1")
    async with speaking(b"\x00\x01 this is no HTTP \xff\r\n\r\n") as worker:
        with pytest.raises(WorkerUnreachable):
            await streamed(client, worker)


async def test_an_idle_connection_that_the_worker_closes_costs_no_request(client):
    answers = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Promises to stay and closes at the next request without a word.
        nonlocal answers
        await reader.readuntil(b"\r\n\r\n{}")
        answers += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
        await reader.readuntil(b"\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    worker = view(server.sockets[0].getsockname()[1])
    for _ in range(2):
        assert await client.complete(worker, CHAT, b"{}", request_id="r1") == b"{}"
    assert answers == 2
    await client.close()
    server.close()


async def test_an_idle_connection_lost_with_an_error_is_no_news(client):
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    lost = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{")
        await asyncio.sleep(0.02)
        writer.write(b"}")
        await asyncio.sleep(0.02)
        # Closing without lingering sends a reset.
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        writer.transport.abort()
        lost.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    worker = view(server.sockets[0].getsockname()[1])
    await client.complete(worker, CHAT, b"{}", request_id="r1")
    await lost.wait()
    await asyncio.sleep(0.02)
    # Finds the lost connection in the pool and lets go of it.
    await client.complete(worker, CHAT, b"{}", request_id="r2")
    gc.collect()
    assert complaints == []
    server.close()


@pytest.mark.parametrize(
    "end",
    [
        pytest.param((b"",), id="connection cut in mid-stream"),
        pytest.param((chunk(b'data: {"n": 2'), b"0\r\n\r\n"), id="ended in mid-event"),
        pytest.param((b"0\r\n\r\n",), id="ended without DONE"),
        pytest.param((chunk(b"\x00\xffgarbage\n\n"),), id="garbage"),
        pytest.param((b"zz\r\n",), id="broken chunk"),
        pytest.param((chunk(b"data: " + b"x" * 10_000_000 + b"\n\n"), b"0\r\n\r\n"), id="10 MB line"),
    ],
)
async def test_a_failure_in_mid_stream_is_a_broken_answer(client, end):
    async with speaking(CHUNKED + chunk(b'data: {"n": 1}\n\n'), *end) as worker:
        stream = client.stream(worker, CHAT, b"{}", request_id="r1")
        assert await anext(stream) == [b'data: {"n": 1}']
        with pytest.raises(WorkerBroke):
            await anext(stream)


async def test_a_failure_before_the_first_event_lets_another_worker_be_tried(client):
    async with speaking(CHUNKED + chunk(b"\x00garbage\n\n")) as worker:
        with pytest.raises(WorkerUnreachable):
            await streamed(client, worker)
    async with speaking(CHUNKED, b"0\r\n\r\n") as worker:
        with pytest.raises(WorkerUnreachable):
            await streamed(client, worker)


async def test_a_worker_that_stays_silent_is_asked_once(client):
    """It may be at work: only of a connection that ended nothing was heard for certain."""
    asked = 0
    over = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await over.wait()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        worker = view(server.sockets[0].getsockname()[1])
        with pytest.raises(WorkerUnreachable, match="silent for"):
            await client.complete(
                worker, CHAT, b"{}", request_id="r1", timeouts=Timeouts(idle=0.2, first_token=0.3)
            )
        over.set()
    assert asked == 1


async def test_a_worker_that_falls_silent_in_mid_stream_is_broken(client):
    async with speaking(CHUNKED + chunk(b'data: {"n": 1}\n\n'), then="silence") as worker:
        stream = client.stream(worker, CHAT, b"{}", request_id="r1")
        await anext(stream)
        began = time.monotonic()
        with pytest.raises(WorkerBroke):
            await anext(stream)
        assert 0.1 < time.monotonic() - began < 1.0


async def test_a_slow_worker_is_waited_for(client):
    async def handler(request: web.Request) -> web.StreamResponse:
        # Longer than the gap allowed within a stream: thinking about the prompt.
        await asyncio.sleep(0.4)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(4):
            await asyncio.sleep(0.1)
            await response.write(b"data: %d\n\n" % number)
        await response.write(b"data: [DONE]\n\n")
        return response

    async with serving(handler) as worker:
        assert len(await streamed(client, worker)) == 5


async def test_closing_the_stream_closes_the_connection_at_once(client):
    left = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(CHUNKED + chunk(b"data: 1\n\n"))
        with suppress(ConnectionResetError):
            await reader.read()
        left.set_result(time.monotonic())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    stream = client.stream(view(server.sockets[0].getsockname()[1]), CHAT, b"{}", request_id="r1")
    await anext(stream)
    began = time.monotonic()
    await stream.aclose()
    assert await asyncio.wait_for(left, 2) - began < 0.1
    server.close()


async def test_a_request_cancelled_before_its_answer_closes_the_connection(client):
    left = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        try:
            await asyncio.sleep(30)
        finally:
            left.set()
        return web.Response()

    async with serving(handler) as worker:
        task = asyncio.create_task(client.complete(worker, CHAT, b"{}", request_id="r1"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(left.wait(), 1)


async def test_an_abort_tells_what_the_request_had_cost(client):
    async def handler(request: web.Request) -> web.Response:
        assert await request.json() == {"request_id": "r1"}
        return web.json_response({"prompt_tokens": 7, "completion_tokens": 3})

    async with serving(handler, "/abort") as worker:
        reply = await client.abort(worker, "r1")
    assert reply is not None
    assert (reply.prompt_tokens, reply.completion_tokens) == (7, 3)


async def test_an_abort_never_raises_and_ends_within_a_second(client):
    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    async def strange(request: web.Request) -> web.Response:
        return web.Response(text="<html>")

    async def refusing(request: web.Request) -> web.Response:
        return web.Response(status=404)

    assert await client.abort(view(9), "r1") is None
    for handler in (slow, strange, refusing):
        began = time.monotonic()
        async with serving(handler, "/abort") as worker:
            assert await client.abort(worker, "r1") is None
        assert time.monotonic() - began < 1.5
    closed = WorkerClient()
    assert await closed.abort(view(9), "r1") is None


TEXTS = st.lists(
    st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1), max_size=6
)


@given(texts=TEXTS, line_end=st.sampled_from([b"\n", b"\r\n"]), data=st.data())
@settings(max_examples=200, deadline=None)
def test_events_are_the_same_however_the_bytes_were_cut(texts, line_end, data):
    wanted = [b"data: " + text.encode() for text in texts]
    whole = b"".join(event + 2 * line_end for event in wanted)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=8)))
    splitter = EventSplitter()
    got = []
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        got += splitter.feed(whole[start:end])
    assert got == wanted


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_events_survive_being_cut_at_every_byte(line_end):
    wanted = ['data: {"text": "日本 🚂 é"}'.encode(), b'data: {"n": 2}', DONE]
    whole = b"".join(event + 2 * line_end for event in wanted)
    for cut in range(len(whole) + 1):
        splitter = EventSplitter()
        assert splitter.feed(whole[:cut]) + splitter.feed(whole[cut:]) == wanted
    splitter = EventSplitter()
    assert [event for byte in whole for event in splitter.feed(bytes([byte]))] == wanted


def test_an_event_without_an_end_is_not_collected_for_ever():
    splitter = EventSplitter()
    assert splitter.feed(b"x" * MAX_EVENT_BYTES) == []
    with pytest.raises(BadStream, match="bytes"):
        splitter.feed(b"x")


async def test_only_what_is_silent_is_not_waited_for_when_its_worker_is_gone(client, monkeypatch):
    """A stream that flows is left alone; one that is silent, and a whole answer, are given up."""
    monkeypatch.setattr("inference.client.GONE_SILENCE_SECONDS", 0.3)
    patient = Timeouts(idle=30, first_token=30)
    talking = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/flows" in head or b"/stalls" in head:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {}\n\n")
        if b"/flows" in head:
            for _ in range(20):
                await asyncio.sleep(0.05)
                writer.write(b"data: {}\n\n")
            writer.write(b"data: [DONE]\n\n")
            writer.close()
        else:
            await talking.wait()
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    worker = view(server.sockets[0].getsockname()[1])

    async def read(path: str) -> int:
        seen = 0
        async for batch in client.stream(worker, path, b"{}", request_id="r", timeouts=patient):
            seen += len(batch)
        return seen

    flows, stalls = asyncio.create_task(read("/flows")), asyncio.create_task(read("/stalls"))
    whole = asyncio.create_task(client.complete(worker, "/x", b"{}", request_id="r", timeouts=patient))
    begins = asyncio.create_task(read("/x"))
    for _ in range(8):
        await asyncio.sleep(0.1)
        client.break_off(lambda worker_id: worker_id == worker.id + 1)
    assert not any(task.done() for task in (flows, stalls, whole, begins)), "another one is gone"
    client.break_off(lambda worker_id: worker_id == worker.id)
    async with asyncio.timeout(2):
        with pytest.raises(WorkerBroke):
            await stalls
        for task in (whole, begins):
            with pytest.raises(WorkerUnreachable) as failed:
                await task
            assert not failed.value.gone
        assert await flows == 22
    talking.set()
    server.close()


async def test_a_long_prompt_may_be_silent_longer_than_a_stream(client):
    """Some servers send the head of a stream before they have read the prompt."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        await asyncio.sleep(0.5)
        writer.write(b"data: {}\n\ndata: [DONE]\n\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    worker = view(server.sockets[0].getsockname()[1])
    times = Timeouts(idle=0.2, first_token=2)
    batches = [one async for one in client.stream(worker, CHAT, b"{}", request_id="r", timeouts=times)]
    assert sum(map(len, batches)) == 2
    server.close()


async def test_the_time_limit_of_a_stream_that_came_at_once_is_none_of_the_next_one():
    whole = b'data: {"a":1}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(whole)
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with suppress(asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(2)
                writer.write(head)
                await asyncio.sleep(0.05)
                writer.write(whole)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    client = WorkerClient(Timeouts(idle=0.1, first_token=2))
    await client.start()
    worker = view(server.sockets[0].getsockname()[1])
    for _ in range(2):
        assert await streamed(client, worker) == [b'data: {"a":1}', DONE]
        await asyncio.sleep(0.3)
    assert connections == 1
    await client.close()
    await asyncio.sleep(0.02)  # in which the other end hears of it
    server.close()


JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


async def test_what_came_together_is_handed_on_together(client):
    several = b"".join(b'data: {"n": %d}\n\n' % number for number in range(5))
    async with speaking(
        CHUNKED + chunk(several[:40]) + chunk(several[40:]), chunk(b"data: [DONE]\n\n")
    ) as worker:
        batches = [batch async for batch in client.stream(worker, CHAT, b"{}", request_id="r1")]
    assert batches == [[b'data: {"n": %d}' % number for number in range(5)], [DONE]]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(
            b"HTTP/1.1 100 Continue\r\n\r\n" + JSON_HEAD + b"Content-Length: 2\r\n\r\n{}", id="100 before"
        ),
        pytest.param(JSON_HEAD + b"\r\n{}", id="ended by the connection"),
        pytest.param(JSON_HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}", id="which closes"),
        pytest.param(
            JSON_HEAD + b"Content-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\n\r\n", id="and one not asked for"
        ),
        pytest.param(
            JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n", id="chunks"
        ),
    ],
)
async def test_all_kinds_of_whole_answers_are_read_and_none_is_another_ones(client, sent):
    async with speaking(sent) as worker:
        for _ in range(2):
            assert await client.complete(worker, CHAT, b"{}", request_id="r1") == b"{}"


async def test_headers_without_end_are_no_answer(client):
    async with speaking(JSON_HEAD, *[b"X-Filler: %s\r\n" % (b"x" * 8000)] * 12, then="silence") as worker:
        with pytest.raises(WorkerUnreachable, match="headers"):
            await client.complete(worker, CHAT, b"{}", request_id="r1")


async def test_who_is_read_slowly_has_to_wait(client):
    """And then is not taken for silent."""
    event = b"data: " + b"1" * 10_000 + b"\n\n"
    written = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(CHUNKED)
        for _ in range(1000):
            writer.write(chunk(event))
            await writer.drain()
            written += 1
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    stream = client.stream(view(server.sockets[0].getsockname()[1]), CHAT, b"{}", request_id="r1")
    seen = len(await anext(stream))
    await asyncio.sleep(0.5)  # longer than a stream may be silent
    held = written
    assert held < 900, "nothing held it back"
    await asyncio.sleep(0.2)
    assert written == held
    async for batch in stream:
        seen += len(batch)
    assert seen == 1001
    server.close()


async def test_a_request_id_cannot_bring_headers_of_its_own(client):
    async with speaking(JSON_HEAD + b"Content-Length: 2\r\n\r\n{}") as worker:
        with pytest.raises(WorkerUnreachable, match="request id"):
            await client.complete(worker, CHAT, b"{}", request_id="r1\r\nX-Evil: 1")


@pytest.mark.parametrize("first", [b"data: {no json\n\n", b'data: {"id": "chatcmpl-req_other"}\n\n'])
async def test_a_first_event_that_is_none_lets_another_worker_be_tried(client, first):
    async with speaking(CHUNKED + chunk(first)) as worker:
        with pytest.raises(WorkerUnreachable):
            await streamed(client, worker)


async def test_a_connection_that_ended_does_not_wait_for_the_collector(client):
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({})

    def connections() -> weakref.WeakSet[Connection]:
        # By type(): isinstance asks each object for its __class__, at which some of torch's warn.
        return weakref.WeakSet(one for one in gc.get_objects() if type(one) is Connection)

    others = connections()  # of tests before this one
    async with serving(handler) as worker:
        await client.complete(worker, CHAT, b"{}", request_id="r1")
        (gone,) = (weakref.ref(one) for one in connections() if one not in others)
        gc.collect()
        gc.disable()
        try:
            await client.close()
            await asyncio.sleep(0.05)
            assert gone() is None
        finally:
            gc.enable()
