"""The facts: what exists, who may use it, what was used.

Models, states, named questions (`querysets`), every write with a rule (`actions`), and the admin
of what needs no running process to be shown. It imports no other app of ours.
"""
