"""`manage.py gateway`: serves /v1, the admin and the fleet's reports, with uvicorn run from code."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import sys
import time
from argparse import ArgumentParser
from typing import Any

import uvicorn
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from config.garbage import Collector
from config.server import WEBSOCKETS, GatewayProtocol, GatewayServer, prepare_listener

BACKLOG = 2048
DRAIN_SECONDS = 60
IDLE_SECONDS = 75
"""A connection without a request is kept this long: longer than the minute of common proxies."""


class Command(BaseCommand):
    help = "Serve the API, the admin and the fleet."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--host", default=settings.ROUNDHOUSE_HOST)
        parser.add_argument("--port", type=int, default=settings.ROUNDHOUSE_PORT)

    def handle(self, *args: Any, **options: Any) -> None:
        listener = bind(options["host"], options["port"])
        from config.asgi import application

        config = uvicorn.Config(
            application,
            loop="uvloop",
            http=GatewayProtocol,
            **WEBSOCKETS,
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        # uvicorn hands the signal on when it has ended in good order: that is no failure.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        server = GatewayServer(config, application.gateway, Collector(time.monotonic()))
        host, port = listener.getsockname()[:2]
        self.stdout.write(f"Listening on http://{f'[{host}]' if ':' in host else host}:{port}")
        self.stdout.flush()
        try:
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(server.serve(sockets=[listener]))
        except OSError as error:
            # Two that start at once can both bind; only one of them can listen.
            raise _cannot_listen(host, port, error) from error
        sys.exit(0 if server.started else 1)


def bind(host: str, port: int) -> socket.socket:
    """The gateway's socket, not listening yet. Raises CommandError with one sentence for people."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        prepare_listener(listener)
        listener.bind(address)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> CommandError:
    if error.errno == errno.EADDRINUSE:
        return CommandError(
            f"Port {port} on {host} is in use by another program; "
            "stop it, or set ROUNDHOUSE_PORT to another port."
        )
    return CommandError(f"Cannot listen on {host} port {port}: {error.strerror or error}.")
