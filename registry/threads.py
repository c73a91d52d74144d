"""How async code reaches the database: through a few threads of its own, each with its connection.

`sync_to_async` would put every query of the process into one thread, behind slow admin pages, or,
thread-insensitive, open a connection in each thread of the default pool.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import ParamSpec, TypeVar

from django.db import close_old_connections, connections

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4
CLOSE_SECONDS = 30.0
_pool = ThreadPoolExecutor(THREADS, thread_name_prefix="database")


def _with_fresh_connection(call: Callable[[], T]) -> T:
    # A connection that broke while idle, or outlived its age, is replaced before it is used.
    close_old_connections()
    return call()


async def in_database(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function that uses the ORM in a database thread and return its answer.

    Cancelling the caller does not stop the function: a transaction ends whole, either way.
    """
    call = partial(function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_pool, _with_fresh_connection, call)


def close_thread_connections() -> None:
    """Close the connections of the database threads (between tests, and when a process ends)."""
    # Each waits for the others, so that no thread can do two of these and leave one out.
    together = Barrier(THREADS)

    def close() -> None:
        together.wait(CLOSE_SECONDS)
        connections.close_all()

    for done in [_pool.submit(close) for _ in range(THREADS)]:
        done.result()
