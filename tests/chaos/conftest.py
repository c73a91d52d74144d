"""Faults by real processes and sockets. What is common is with the other tests of the API."""

from __future__ import annotations

from tests.api.conftest import facts, served, worker

__all__ = ["facts", "served", "worker"]
