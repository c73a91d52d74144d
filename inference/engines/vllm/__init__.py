"""The `vllm` engine: vLLM's own API server as the worker's child, in an environment of its own.

    arguments.py     what an operator may set, checked
    preflight.py     what is missing on this machine, found before it is started
    adapters.py      which folders are LoRA adapters that may be loaded
    command.py       the child's command line and environment
    capabilities.py  which request fields it honours
    progress.py      how far it is while it starts, from what it prints
    metrics.py       its load, from what it counts
    endings.py       why it ended, from what it printed

No module here imports vLLM, nor anything that the supervisor has not: vLLM pins packages that conflict
with ours, so it runs under another interpreter (`command.interpreter`).
"""
