"""Every write with a rule, by topic. An action owns its transaction; views and tasks only call it.

Arguments are keyword-only; `by` is the person or the process that does it, for the timeline.
"""
