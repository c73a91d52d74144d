"""vLLM's load, read from its Prometheus page."""

from __future__ import annotations

from inference.protocol import Load

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_KV_USE = "vllm:kv_cache_usage_perc"
_STEPS = "vllm:iteration_tokens_total_count"
_TOKENS = "vllm:generation_tokens_total"
_WANTED = frozenset({_RUNNING, _WAITING, _KV_USE, _STEPS, _TOKENS})


class LoadReader:
    """Reads one page after the other of the same process."""

    def __init__(self) -> None:
        self._kv_use = 0.0
        self._moves = 0

    def read(self, page: str) -> Load:
        """Raises ValueError for what is no such page."""
        sums = dict.fromkeys(_WANTED, 0.0)
        found = set()
        for line in page.splitlines():
            if not line.startswith("vllm:"):
                continue
            name = line.partition("{")[0].partition(" ")[0]
            if name in _WANTED:
                found.add(name)
                value = float(line.rpartition(" ")[2])
                # One line per engine of a data-parallel server; of shares the fullest counts.
                sums[name] = max(sums[name], value) if name == _KV_USE else sums[name] + value
        if found != _WANTED:
            raise ValueError("not vLLM's metrics")
        # Its steps count what was generated; a long prompt in pieces shows as keys and values that grow.
        self._moves += sums[_KV_USE] != self._kv_use
        self._kv_use = sums[_KV_USE]
        return Load(
            running=int(sums[_RUNNING]),
            waiting=int(sums[_WAITING]),
            kv_use=min(1.0, self._kv_use),
            steps=int(sums[_STEPS]) + self._moves,
            tokens=int(sums[_TOKENS]),
        )
