"""What reading a request costs, measured from the code itself, in a process of its own:

    python -m bench.parsing

prints the seconds of each kind of request as one JSON object. DJANGO_SETTINGS_MODULE must be set.
"""

from __future__ import annotations

import json
import time

import django

MEGABYTE = 1_000_000


def main() -> None:
    django.setup()
    words = "a word of a prompt, " * (MEGABYTE // 20)
    found = {
        "plain": seconds_to_read(_chat("Say hi", stream=True, temperature=0.7), times=200),
        "megabyte": seconds_to_read(_chat(words), times=1),
    }
    print(json.dumps(found))


def seconds_to_read(body: bytes, *, times: int, rounds: int = 50) -> float:
    """The best of so many rounds: parsed, checked, and written for the engine."""
    from openai_api.endpoints import CHAT  # after Django's apps

    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(times):
            call = CHAT.parse(body)
            call.forwarded(call.needs())
        best = min(best, (time.process_time() - began) / times)
    return best


def _chat(text: str, **fields: object) -> bytes:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": text}]
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


if __name__ == "__main__":
    main()
