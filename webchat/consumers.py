"""The chat page's socket: `/chat/ws`. What goes over it is in `webchat.protocol`.

The page's origin and its person's session are checked at the handshake, the person again every few
seconds, and the owner of what a frame names with each frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from typing import Any, ClassVar
from urllib.parse import urlsplit

import msgspec
from channels.consumer import AsyncConsumer
from django.db import DatabaseError, InterfaceError

from inference.http import INTERNAL_ERROR, Receive, Scope
from inference.http import Send as SendMessage
from openai_api.errors import STORAGE
from openai_api.gateway import Gateway
from registry.threads import in_database
from webchat import actions, bounds
from webchat.errors import BadInput, ChatError, NotNow, NotThere
from webchat.log import Answer, AnswerLog, Kept, kept_of
from webchat.models import Message
from webchat.protocol import (
    Attach,
    Detach,
    Frame,
    Regenerate,
    Send,
    Stop,
    explain,
    position_of,
    read_frame,
    seq_of,
)
from webchat.runner import ChatRunner
from webchat.sessions import session_key_of, user_of_session

logger = logging.getLogger("roundhouse.chat")

NORMAL, POLICY, TOO_BIG, FULL, LOGGED_OUT = 1000, 1008, 1009, 4429, 4401
"""Why a socket is closed."""
ENDING = "The server is about to restart. Please try again in a moment."


class Chat:
    """The chat's parts in one gateway process, made once and handed to the sockets."""

    def __init__(self, gateway: Gateway, redis_url: str | None) -> None:
        self.gateway = gateway
        self.log = AnswerLog(redis_url)
        self.runner = ChatRunner(gateway, self.log)
        self.sockets: Counter[int] = Counter()
        """Open ones, by user."""

    async def start(self) -> None:
        await self.log.start()
        await self.runner.start()

    async def stop(self) -> None:
        await self.runner.stop()
        await self.log.stop()


class ChatSocket(AsyncConsumer):  # type: ignore[misc]
    """One page's connection."""

    check_seconds: ClassVar[float] = bounds.USER_CHECK_SECONDS

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._send_message: SendMessage
        self._session_key = ""
        self._user_id = 0
        self._followers: dict[uuid.UUID, asyncio.Task[None]] = {}
        self._closed = False
        self._allowance = bounds.FRAMES_PER_SECOND
        self._allowance_at = time.monotonic()
        self._refused = 0

    async def __call__(self, scope: Scope, receive: Receive, send: SendMessage) -> None:
        self._send_message = send
        await receive()
        if not origin_is_ours(scope["headers"]) or not await self._log_in(scope["headers"]):
            # Before it was accepted: the handshake is answered with 403.
            await send({"type": "websocket.close", "code": POLICY})
            return
        await send({"type": "websocket.accept"})
        sockets = self._chat.sockets
        if sockets[self._user_id] >= bounds.SOCKETS_PER_USER:
            await self._say_error(
                f"You have {bounds.SOCKETS_PER_USER} chat pages open; close one and reload this page."
            )
            await self._close(FULL)
            return
        sockets[self._user_id] += 1
        checker = asyncio.create_task(self._check_user())
        try:
            await self._listen(receive)
        finally:
            sockets[self._user_id] -= 1
            if not sockets[self._user_id]:
                del sockets[self._user_id]
            self._closed = True
            tasks = [checker, *self._followers.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- who

    async def _log_in(self, headers: list[tuple[bytes, bytes]]) -> bool:
        session_key = session_key_of(headers)
        if session_key is None:
            return False
        try:
            user_id = await in_database(user_of_session, session_key)
        except (DatabaseError, InterfaceError):
            return False
        if user_id is None:
            return False
        self._session_key, self._user_id = session_key, user_id
        return True

    async def _check_user(self) -> None:
        """Ends the socket soon after its person was logged out, disabled or deleted."""
        while True:
            await asyncio.sleep(self.check_seconds)
            try:
                user_id = await in_database(user_of_session, self._session_key)
            except (DatabaseError, InterfaceError):
                if self._chat.gateway.fleet.database_away_seconds <= bounds.AWAY_SECONDS:
                    continue
                user_id = None
            if user_id != self._user_id:
                for task in self._followers.values():
                    task.cancel()
                await self._close(LOGGED_OUT)
                return

    # -- frames

    async def _listen(self, receive: Receive) -> None:
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect" or self._closed:
                return
            text = message.get("text")
            if text is None:
                await self._say_error("Frames are JSON text; this one is binary.")
            elif len(text) > bounds.FRAME_BYTES:
                await self._close(TOO_BIG)
                return
            elif not self._may_speak():
                self._refused += 1
                if self._refused > bounds.FRAMES_REFUSED:
                    await self._close(POLICY)
                    return
                await self._say_error("Too many messages at once; slow down a little.")
            else:
                await self._take(text)

    def _may_speak(self) -> bool:
        now = time.monotonic()
        earned = (now - self._allowance_at) * bounds.FRAMES_PER_SECOND
        self._allowance = min(bounds.FRAMES_PER_SECOND, self._allowance + earned)
        self._allowance_at = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True

    async def _take(self, text: str) -> None:
        """One frame; whatever is wrong with it is told, and the socket goes on."""
        message_id: uuid.UUID | None = None
        try:
            try:
                frame: Frame = read_frame(text)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise BadInput(explain(error)) from None
            except RecursionError:
                raise BadInput("The JSON is nested too deep.") from None
            message_id = getattr(frame, "message", None)
            await self._handle(frame)
        except ChatError as error:
            await self._say_error(str(error), message_id)
        except (DatabaseError, InterfaceError):
            logger.warning("a frame failed: the database is away", extra={"event": "chat_storage_away"})
            await self._say_error(STORAGE, message_id)
        except Exception:
            logger.exception("a frame failed by a fault of ours", extra={"event": "chat_frame_crashed"})
            await self._say_error(INTERNAL_ERROR, message_id)

    async def _handle(self, frame: Frame) -> None:
        match frame:
            case Send() | Regenerate():
                if not self._chat.runner.accepting:
                    raise NotNow(ENDING)
                # What is in the database as being written must be written, also if this page is left now.
                job = await asyncio.shield(self._begin(frame))
                sent: dict[str, Any] = {"type": "sent", "assistant": job.assistant}
                if job.user is not None:
                    sent["user"] = job.user
                await self._say(sent)
                self._follow(job.message_id, 0, Kept(content="", end=None))
            case Stop(message=message_id):
                if await in_database(actions.request_stop, user_id=self._user_id, message_id=message_id):
                    self._chat.runner.stop_answer(message_id)
            case Attach(message=message_id, after=after):
                position = position_of(after)
                if message_id not in self._followers and len(self._followers) >= bounds.FOLLOWED_PER_SOCKET:
                    raise NotNow(
                        f"A page follows at most {bounds.FOLLOWED_PER_SOCKET} answers; detach from one."
                    )
                kept = await in_database(load_kept, self._user_id, message_id)
                self._follow(message_id, position, kept)
            case Detach(message=message_id):
                follower = self._followers.pop(message_id, None)
                if follower is not None:
                    follower.cancel()

    async def _begin(self, frame: Send | Regenerate) -> actions.Job:
        gateway = self._chat.gateway.name
        if isinstance(frame, Send):
            job = await in_database(
                actions.send,
                user_id=self._user_id,
                conversation_id=frame.conversation,
                content=frame.content,
                parent=frame.parent,
                model=frame.model,
                gateway=gateway,
            )
        else:
            job = await in_database(
                actions.regenerate,
                user_id=self._user_id,
                message_id=frame.message,
                model=frame.model,
                gateway=gateway,
            )
        self._chat.runner.begin(job)
        return job

    # -- following

    def _follow(self, message_id: uuid.UUID, position: int, kept: Kept) -> None:
        before = self._followers.pop(message_id, None)
        if before is not None:
            before.cancel()
        task = asyncio.create_task(self._pass_on(message_id, position, kept))
        self._followers[message_id] = task
        task.add_done_callback(lambda done: self._forget(message_id, done))

    def _forget(self, message_id: uuid.UUID, task: asyncio.Task[None]) -> None:
        if self._followers.get(message_id) is task:
            del self._followers[message_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("an answer could not be followed", exc_info=error, extra={"event": "chat_follow"})

    async def _pass_on(self, message_id: uuid.UUID, position: int, kept: Kept) -> None:
        """Send what there is behind `position` and what comes, as fast as this page takes it."""
        name = str(message_id)
        told = None
        async with self._chat.log.following(message_id, kept) as answer:
            while True:
                news = answer.news
                length = len(answer.text)
                if length > position:
                    await self._say_delta(name, answer, position, length)
                    position = length
                elif answer.end is not None:
                    await self._say({"type": "end", "message": name, "seq": seq_of(length), **answer.end})
                    return
                else:
                    if answer.ahead != told:
                        told = answer.ahead
                        await self._say_waiting(name, answer)
                    await news.wait()

    async def _say_waiting(self, name: str, answer: Answer) -> None:
        if answer.ahead is not None and not answer.text:
            ahead, seconds = answer.ahead
            about = None if seconds is None else round(seconds, 1)
            await self._say({"type": "waiting", "message": name, "ahead": ahead, "seconds": about})

    async def _say_delta(self, name: str, answer: Answer, start: int, end: int) -> None:
        text = answer.text[start:end]
        await self._say({"type": "delta", "message": name, "seq": seq_of(end), "text": text})

    # -- saying

    async def _say_error(self, text: str, message_id: uuid.UUID | None = None) -> None:
        frame = {"type": "error", "text": text}
        if message_id is not None:
            frame["message"] = str(message_id)
        await self._say(frame)

    async def _say(self, frame: dict[str, Any]) -> None:
        if not self._closed:
            await self._send_raw({"type": "websocket.send", "text": msgspec.json.encode(frame).decode()})

    async def _close(self, code: int) -> None:
        if not self._closed:
            self._closed = True
            await self._send_raw({"type": "websocket.close", "code": code})

    async def _send_raw(self, message: dict[str, Any]) -> None:
        try:
            await self._send_message(message)
        except OSError:
            # The page left in this moment; `receive` says so next.
            self._closed = True


def origin_is_ours(headers: list[tuple[bytes, bytes]]) -> bool:
    """Was the handshake sent by a page of this very host? A browser always says where its page is from."""
    origins = [value for name, value in headers if name == b"origin"]
    hosts = [value for name, value in headers if name == b"host"]
    if len(origins) != 1 or len(hosts) != 1:
        return False
    with contextlib.suppress(ValueError):
        origin = urlsplit(origins[0].decode("latin-1"))
        port = {"http": ":80", "https": ":443"}.get(origin.scheme)
        if port is None or not origin.netloc:
            return False
        host = hosts[0].decode("latin-1").lower()
        return origin.netloc.lower().removesuffix(port) == host.removesuffix(port)
    return False


def load_kept(user_id: int, message_id: uuid.UUID) -> Kept:
    """In a database thread. Raises NotThere."""
    found = Message.objects.for_user(user_id).select_related("conversation").filter(pk=message_id).first()
    if found is None:
        raise NotThere("message")
    return kept_of(found)
