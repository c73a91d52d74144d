"""The benchmark: what a request costs the gateway, read from the processes' own accounting.

    python -m bench [--requests N]
    python -m bench --events 10000000 [--database postgres://…]

Everything runs as it does for a user (`manage.py up`, keys, ledger, everything on); the simulated engine
answers at once, so that what is measured is ours. Nothing here is asserted by tests.
"""
