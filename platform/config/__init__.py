"""The Django project: reads the environment, wires the apps, starts the processes.

Nothing imports it. The commands that start whole processes (`up`, `gateway`, `control`) live here,
because only this layer may know all others.
"""
