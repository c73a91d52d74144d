"""What a request costs the gateway; the simulated engine answers at once: what is measured is ours."""

from __future__ import annotations

from bench import accounting
from bench.rows import Row
from bench.stage import TOKENS, stage

LIMITED = """
for metric in ("requests", "tokens"):
    save_limit(limit=Limit(api_key=key, metric=metric, per="minute", amount=10**9), by="bench")
"""
BUDGETED = """
save_budget(budget=Budget(scope="key", subject=key.public_id, unit="tokens", limit=10**12), by="bench")
"""


def rows(requests: int) -> list[Row]:
    """Measured with so many plain requests in each load."""
    with stage() as bench:
        bench.deploy("instant", arguments={"token_seconds": 0.0})
        bench.deploy("paced", slots=128, arguments={"token_seconds": 0.02})
        bench.load(requests=requests // 4, connections=8, stream=False)
        plain, plain_cpu = bench.load(requests=requests, connections=16, stream=False)
        per_plain = plain_cpu / requests
        more = {}
        for what, code in {"two limits": LIMITED, "a hard budget": BUDGETED}.items():
            _, cpu = bench.load(requests=requests, connections=16, stream=False, key=bench.new_key(code))
            more[what] = cpu / requests - per_plain
        streams = requests // 3
        stream, stream_cpu = bench.load(requests=streams, connections=16, stream=True)
        per_token = (stream_cpu / streams - per_plain) / TOKENS
        _, paced_cpu = bench.load(requests=100, connections=100, stream=True, model="paced")
        per_paced = (paced_cpu / 100 - per_plain) / TOKENS
        through, direct = bench.first_bytes(rounds=20)
        reading = bench.parsing()
        memory = bench.gateway.memory_info().rss
    found = accounting.measured()
    return [
        Row("CPU per plain chat request", per_plain, "ms", 0.40e-3),
        Row("CPU per streamed token, instant upstream", per_token, "µs", 15e-6),
        Row("CPU per streamed token, 100 streams at 20 ms", per_paced, "µs", 45e-6),
        Row("added time to first token, p50, idle", through - direct, "ms", 1e-3),
        Row("parse a plain chat request", reading["plain"], "µs", 60e-6),
        Row("parse a 1 MB prompt", reading["megabyte"], "ms", 3e-3),
        Row("accounting on the request path, two limits", found["spool"] + found["limits"], "µs", 60e-6),
        # 1, and what the gateway corrects afterwards for a hundred requests at once.
        Row("Redis commands per request, two limits", found["Redis commands"], bar=1.02),
        Row("more CPU per request of a key with two limits", more["two limits"], "µs"),
        Row("more CPU per request of a key with a hard budget", more["a hard budget"], "ms", 1e-3),
        Row("an event into the ledger, in batches of 20", found["event in batches of 20"], "µs"),
        Row("plain requests per second, 16 connections", requests / plain.seconds),
        Row("streamed tokens per second, 16 connections", streams * TOKENS / stream.seconds),
        Row("gateway memory (RSS)", memory, "MB"),
    ]
