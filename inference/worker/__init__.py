"""The worker process: a supervisor without torch, and the guard in front of its engine.

Importing this package imports nothing else, because vLLM's own environment loads the guard from it.
"""
