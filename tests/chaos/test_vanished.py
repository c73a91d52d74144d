"""F43, the last row: a client whose machine is gone sends no word of it. Here it is one in a network of its
own, whose cable is pulled."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.models import UsageEvent
from registry.states import Outcome
from tests.api.conftest import ROOT, Worker, eventually, process_serving, say
from tests.chaos.clients import request_of
from tests.services import free_port, missing

pytestmark = [pytest.mark.full, pytest.mark.django_db(transaction=True)]

OURS, THEIRS = "10.231.77.1", "10.231.77.2"
CLIENT = """
import socket, sys
connected = socket.create_connection((sys.argv[1], int(sys.argv[2])))
connected.sendall(sys.stdin.buffer.read())
while connected.recv(65536):
    print("some", flush=True)
"""


class Elsewhere:
    """A network of its own with one cable to ours."""

    def __init__(self) -> None:
        self._name = f"rh{os.getpid()}"
        self._ours, self._theirs = f"rhv{os.getpid() % 10**6}a", f"rhv{os.getpid() % 10**6}b"

    def __enter__(self) -> Elsewhere:
        if os.getuid() != 0 or shutil.which("ip") is None:
            missing("networks can only be made by root, with iproute2")
        self._ip("netns", "add", self._name)
        try:
            self._ip(*f"link add {self._ours} type veth peer name {self._theirs}".split())
            self._ip(*f"link set {self._theirs} netns {self._name}".split())
            self._ip(*f"addr add {OURS}/30 dev {self._ours}".split())
            self._ip(*f"link set {self._ours} up".split())
            self._ip(*f"-n {self._name} addr add {THEIRS}/30 dev {self._theirs}".split())
            self._ip(*f"-n {self._name} link set {self._theirs} up".split())
        except subprocess.CalledProcessError:
            self.__exit__()
            missing("this kernel makes no pair of network devices")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["ip", "netns", "del", self._name], check=False)
        subprocess.run(["ip", "link", "del", self._ours], check=False, stderr=subprocess.DEVNULL)

    def pull(self) -> None:
        """From now on nothing arrives, in either direction."""
        # Not the link: a device without a carrier may tell the sender.
        self._ip(*f"-n {self._name} addr del {THEIRS}/30 dev {self._theirs}".split())

    @contextlib.contextmanager
    def client(self, port: int, request: bytes) -> Iterator[subprocess.Popen[bytes]]:
        command = ["ip", "netns", "exec", self._name, sys.executable, "-c", CLIENT, OURS, str(port)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(request)
        process.stdin.close()
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, stderr=subprocess.DEVNULL)


@pytest.mark.timeout(120)
def test_a_client_that_vanished_is_noticed_within_20_seconds(
    facts: str, worker: Worker, tmp_path: Path
) -> None:
    """One in mid-stream, one that waits for its first token, one for a whole answer."""
    port = free_port()
    command = (str(ROOT / "manage.py"), "gateway", "--host", "0.0.0.0", "--port", str(port))
    questions = (
        say("!tokens 8000 !slow 0.05", stream=True),
        say("!tokens 10 !slow 100", stream=True),
        say("!tokens 8000 !slow 0.05"),
    )
    with (
        process_serving(*command, port=port, data=tmp_path),
        Elsewhere() as elsewhere,
        contextlib.ExitStack() as stack,
    ):
        clients = [
            stack.enter_context(elsewhere.client(port, request_of(facts, question))) for question in questions
        ]
        streaming = clients[0].stdout
        assert streaming is not None
        for _ in range(5):
            assert streaming.readline() == b"some\n"
        eventually(lambda: worker.load()["running"] == len(questions), "all of them run")
        # Those that are silent have been so for long: what is sent to them now must be no reason to cut them.
        time.sleep(12)
        assert worker.load()["running"] == len(questions)
        pulled = time.monotonic()
        elsewhere.pull()
        for left in reversed(range(len(questions))):
            eventually(lambda left=left: worker.load()["running"] <= left, "one is noticed", seconds=22)
            print(f"noticed after {time.monotonic() - pulled:.1f} s", file=sys.stderr)
        assert time.monotonic() - pulled <= 20.5
    rows = list(UsageEvent.objects.all())
    assert [row.outcome for row in rows] == [Outcome.ABORTED] * len(questions)
    assert max(row.completion_tokens for row in rows) > 5
