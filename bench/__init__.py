"""The benchmark: what a request costs, read from the processes' own accounting, and how engines compare.

    python -m bench [--only PART,…] [--requests N]
    python -m bench --events 10000000 [--database postgres://…]

`--help` lists the parts, and what else can be measured.
Everything runs as it does for a user (`manage.py up`, keys, ledger, everything on). Nothing here is asserted
by tests: a row tells its bar, and whether it was met on this machine, in this run.
"""
