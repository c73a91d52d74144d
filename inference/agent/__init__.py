"""The node's agent: makes the processes on this machine what the gateway's orders say.

    identity.py    who this node is, and the files it keeps
    command.py     `manage.py node`: joins, then becomes the agent
    __main__.py    `python -m inference.agent`
    loop.py        beats to the gateway and carries out its orders; the main thing
    processes.py   starts, adopts, watches and stops workers; nothing else touches processes
    copies.py      gets a model's files ready before a launch
    app.py         the Celery app that hears nudges, in a process of its own
    listener.py    runs that process beside the loop
    inventory.py   what this machine has

Free of Django and of torch. Workers outlive the agent and are adopted by the next one.
"""
