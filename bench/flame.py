"""Where the gateway's time goes, as two flame graphs: `docs/images/profile-{plain,stream}.svg`.

    python -m bench.flame

py-spy looks at the gateway a few hundred times a second while it is loaded, and needs to be allowed to. What
the kernel does while the interpreter is free (most of reading from sockets, the disk) is not in the picture.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import threading
from pathlib import Path

from bench.load import run
from bench.peers import ROOT, environment
from bench.stage import Stage, body, stage

SECONDS = 12
RATE = 250
IMAGES = ROOT / "docs" / "images"
LOADS = {"plain": ("instant", False, 16), "stream": ("paced", True, 100)}
LARGEST_BYTES = 300_000
_TITLE = re.compile(r'(<text id="title"[^>]*>)[^<]*(</text>)')


def main() -> None:
    with stage() as bench:
        bench.deploy("instant", arguments={"token_seconds": 0.0})
        bench.deploy("paced", slots=128, arguments={"token_seconds": 0.02})
        for name, (model, stream, connections) in LOADS.items():
            path = IMAGES / f"profile-{name}.svg"
            record(bench, path, model=model, stream=stream, connections=connections)
            if path.stat().st_size > LARGEST_BYTES:
                raise SystemExit(f"{path} has more than {LARGEST_BYTES} bytes")
            print(path.relative_to(ROOT), flush=True)


def record(bench: Stage, path: Path, *, model: str, stream: bool, connections: int) -> None:
    target = bench.through(body(stream=stream, model=model))
    asyncio.run(run(target, requests=connections, connections=connections))
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            asyncio.run(run(target, requests=connections * 4, connections=connections))

    loading = threading.Thread(target=load)
    loading.start()
    try:
        command = [
            *(str(environment("profile").parent / "py-spy"), "record", "--pid", str(bench.gateway.pid)),
            # Only who holds the interpreter: the threads that wait for work would fill the picture.
            *("--gil", "--duration", str(SECONDS), "--rate", str(RATE), "--output", str(path)),
        ]
        # What it says when it is not allowed to look is on its stderr.
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    finally:
        over.set()
        loading.join()
    # py-spy's is its own command line, with the paths of this machine.
    path.write_text(_TITLE.sub(rf"\g<1>The gateway: {path.stem}\g<2>", path.read_text()))


if __name__ == "__main__":
    main()
