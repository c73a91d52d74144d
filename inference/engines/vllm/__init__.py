"""The `vllm` engine: vLLM's own API server as the worker's child, in an environment of its own.

    arguments.py     what an operator may set, checked
    command.py       the child's command line and environment
    capabilities.py  which request fields it honours
    metrics.py       its load, from what it counts
    endings.py       why it ended, from what it printed

No module here imports vLLM, nor anything that the supervisor has not: vLLM pins packages that conflict
with ours, so it runs under another interpreter (`command.interpreter`).
"""
