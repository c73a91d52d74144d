"""Choosing a worker for a request: the fleet's snapshot, leases, the queue, and one file per policy."""
