"""The `upstream` engine: another server that speaks the OpenAI API, by its URL and key, as a worker.

    arguments.py  what an operator may set, checked
    presets.py    what each kind of server understands, and notes for operators
    addresses.py  which addresses may be connected to
    remote.py     the server itself: asked, looked after, and what its statuses mean
    requests.py   a gateway's request as the server understands it
    answers.py    the server's answers as gateways expect them, counted
    engine.py     what the process around an engine needs of it
    app.py        its HTTP face

It stands behind the same HTTP server, guard and supervisor as our own engines, so that to a gateway it is a
worker like any other.
"""
