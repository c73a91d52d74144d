"""Limits: may this request go on now? One question to Redis per request, answered for all gateways.

`rules` what a key's limits are, `pace` the rule of counting (pure), `scripts` the same in Redis' Lua,
`line` the connection, `levels` what this gateway knows of the counts, `told` what clients are told,
`admission` the whole. No budgets here (`registry.actions.budgets`), and no queueing: what finds no room is
refused at once.
"""

from openai_api.admission.admission import Admission, Admitted
from openai_api.admission.rules import Rule, load_rules

__all__ = ["Admission", "Admitted", "Rule", "load_rules"]
