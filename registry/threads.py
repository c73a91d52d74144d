"""How async code reaches the database: through a few threads of its own, each with its connection.

`sync_to_async` would put every query of the process into one thread, behind slow admin pages, or,
thread-insensitive, open a connection in each thread of the default pool.

Whoever writes may have to wait for a lock that somebody keeps. So the threads that write are others than
those that only read, a lock is waited for only so long, and so is a free thread: nobody waits for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier, current_thread
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from django.db import OperationalError, close_old_connections, connections
from django.db.backends.signals import connection_created
from django.dispatch import receiver

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4
READING_THREADS = 2
WAIT_SECONDS = 2.0
"""How long a free thread is waited for."""
READ_SECONDS = 5.0
"""How long the answer to what only reads is waited for."""
LOCK_SECONDS = 3.0
"""How long a thread waits for locks. So in all, nobody who is to be told waits longer than 5 s."""
CLOSE_SECONDS = 30.0
_NAME = "database"
_pool = ThreadPoolExecutor(THREADS, thread_name_prefix=_NAME)
_reading_pool = ThreadPoolExecutor(READING_THREADS, thread_name_prefix=f"{_NAME}-reading")


class DatabaseBusy(OperationalError):
    """The database threads are all waiting for it."""


def _with_fresh_connection(call: Callable[[], T]) -> T:
    # A connection that broke while idle, or outlived its age, is replaced before it is used.
    close_old_connections()
    try:
        return call()
    except Exception as error:
        _let_go(error)
        raise


def _let_go(error: BaseException | None) -> None:
    """Let this thread's cursors go here. Django's errors are in a circle with the frames that they came
    through: the collector, in whichever thread it runs, the event loop's too, would stand still over such a
    cursor for as long as its connection waits for SQLite's lock."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


async def in_database(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function that uses the ORM in a database thread and return its answer.

    Raises DatabaseBusy when no thread was free in time: then it was not run. Cancelling the caller does not
    stop one that has begun: a transaction ends whole, either way.
    """
    return await _run(_pool, partial(function, *args, **kwargs))


async def read_from_database(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The same for a function that only reads, and for which requests wait: it waits for no lock and behind
    nobody who does. Raises DatabaseBusy also when it did not answer in time."""
    try:
        async with asyncio.timeout(READ_SECONDS):
            return await _run(_reading_pool, partial(function, *args, **kwargs))
    except TimeoutError as error:
        raise DatabaseBusy("The database did not answer in time.") from error


async def _run(pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
    asked = pool.submit(_with_fresh_connection, call)
    answer = asyncio.wrap_future(asked)
    try:
        await asyncio.wait((answer,), timeout=WAIT_SECONDS)
    except asyncio.CancelledError:
        answer.cancel()
        raise
    if not answer.done() and asked.cancel():
        raise DatabaseBusy("No database thread was free in time.")
    try:
        return await answer
    finally:
        # They know the error, whose frames know them.
        del asked, answer


@receiver(connection_created)
def _bound_lock_waits(*, connection: BaseDatabaseWrapper, **_: Any) -> None:
    if not current_thread().name.startswith(_NAME):
        return
    milliseconds = round(LOCK_SECONDS * 1000)
    with connection.cursor() as cursor:
        if connection.vendor == "sqlite":
            cursor.execute(f"PRAGMA busy_timeout = {milliseconds}")
        else:
            # Whoever wants a row waits for two: behind others who wait, and for whoever has it.
            cursor.execute("SELECT set_config('lock_timeout', %s, false)", [f"{milliseconds // 2}ms"])


def close_thread_connections() -> None:
    """Close the connections of the database threads (between tests, and when a process ends)."""
    for pool, threads in ((_pool, THREADS), (_reading_pool, READING_THREADS)):
        # Each waits for the others, so that no thread can do two of these and leave one out.
        together = Barrier(threads)

        def close(together: Barrier = together) -> None:
            together.wait(CLOSE_SECONDS)
            connections.close_all()

        for done in [pool.submit(close) for _ in range(threads)]:
            done.result()
