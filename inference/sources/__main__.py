"""Prepare one model: `python -m inference.sources --model NAME --source TEXT --cache DIR`.

Prints one JSON `Preparation` per line: a `CopyReport` plus, in the last line of a success, `path`.
The last line's phase is `ready` (exit 0) or `failed` with cause and detail (exit 1). SIGTERM and
SIGINT end it and its children (exit 143 or 130). `--report FILE` always holds the newest line.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import msgspec

from inference.protocol import CopyPhase, CopyReport
from inference.sources.prepare import prepare
from inference.sources.progress import Preparation
from inference.sources.source import SourceError, parse_source


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m inference.sources", description=__doc__)
    parser.add_argument("--model", required=True, help="the model's name: names the copy in the cache")
    parser.add_argument("--model-id", type=int, default=0, help="written into every line")
    parser.add_argument("--source", required=True, help="as `inference.sources.parse_source` reads it")
    parser.add_argument("--cache", required=True, type=Path, help="folder of prepared models")
    parser.add_argument("--report", type=Path, help="file that always holds the newest line")
    parser.add_argument("--full-check", action="store_true", help="hash a copy that is already there")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, _leave)
    newest = CopyReport(model_id=arguments.model_id, phase=CopyPhase.FETCHING)

    def write(line: Preparation) -> None:
        text = msgspec.json.encode(line)
        # A reader that is gone, or a report that cannot be written, is no reason to stop: the model
        # is wanted all the same, and whoever asks next finds it ready.
        try:
            os.write(1, text + b"\n")
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if arguments.report is not None:
            fresh = arguments.report.with_name(f"{arguments.report.name}.{os.getpid()}")
            with contextlib.suppress(OSError):
                fresh.write_bytes(text)
                os.replace(fresh, arguments.report)

    def report(update: CopyReport) -> None:
        nonlocal newest
        newest = update
        if update.phase is not CopyPhase.READY:  # that line waits for the path
            write(msgspec.convert(update, Preparation, from_attributes=True))

    try:
        path = prepare(
            arguments.model,
            parse_source(arguments.source),
            arguments.cache.absolute(),
            report,
            model_id=arguments.model_id,
            full_check=arguments.full_check,
        )
    except SourceError as error:
        write(
            Preparation(
                model_id=arguments.model_id,
                phase=CopyPhase.FAILED,
                cause=error.cause,
                detail=error.detail,
            )
        )
        return 1
    except KeyboardInterrupt:
        return 130
    write(
        Preparation(
            model_id=arguments.model_id,
            phase=CopyPhase.READY,
            size_bytes=newest.size_bytes,
            sha256=newest.sha256,
            path=str(path),
        )
    )
    return 0


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
