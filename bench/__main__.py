"""Runs the parts of the benchmark, each of which prints a table."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time

from bench.rows import columns, table

PARTS = {
    "gateway": "What a request costs the gateway",
    "paced": "Streams at 20 ms per token",
    "overload": "Five times more requests than the workers can answer",
    "pair": "A second gateway",
    "idle": "Idle streams",
    "policies": "Dispatch policies, in simulated time",
    "embeddings": "Embeddings, 64 single requests at a time",
    "engines": "Engines: SmolLM2-135M in bf16, answers of 64 tokens",
    "peers": "The same upstream behind others",
}
"""Each a module with `rows`, and its title."""
NOT_BY_ITSELF = frozenset({"peers"})
"""What needs environments of its own: `make bench-peers`."""
TAKE_REQUESTS = frozenset({"gateway", "pair", "peers"})
ALONE = {
    "bench.policies": "every policy on every trace",
    "bench.accounting": "what the ledger and limits cost by themselves (--database URL: in PostgreSQL)",
    "bench.flame": "where the gateway's time goes, as flame graphs (`make bench-profile`)",
}
"""What else can be run with `python -m`."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="What a request costs, and how engines compare. See docs/performance.md.",
        epilog=_listed("parts", PARTS) + "\n\n" + _listed("for themselves, with python -m", ALONE),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", help=f"parts, with commas between them (default: all but {', '.join(NOT_BY_ITSELF)})"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=3000,
        help=f"plain requests per load (default 3000) in {', '.join(sorted(TAKE_REQUESTS))}",
    )
    parser.add_argument("--events", type=int, help="only measure reports over so many events; takes long")
    parser.add_argument("--database", help="for --events: a PostgreSQL server's URL (default: SQLite)")
    arguments = parser.parse_args()
    if arguments.database and not arguments.events:
        parser.error("--database is for --events")
    # Whoever ends it ends what it started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.events:
        from bench import ledger

        print(columns("Reports over a large ledger", ledger.measured(arguments.events, arguments.database)))
        return
    chosen = (
        arguments.only.split(",") if arguments.only else [name for name in PARTS if name not in NOT_BY_ITSELF]
    )
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only: there is no part {', '.join(sorted(unknown))}")
    for name in chosen:
        began = time.monotonic()
        rows = importlib.import_module(f"bench.{name}").rows
        found = rows(arguments.requests) if name in TAKE_REQUESTS else rows()
        print(table(f"{PARTS[name]} ({name}, {time.monotonic() - began:.0f} s)", found), flush=True)
        print(flush=True)


def _listed(title: str, told: dict[str, str]) -> str:
    return "\n".join([f"{title}:", *(f"  {name:18} {what}" for name, what in told.items())])


if __name__ == "__main__":
    main()
