"""Running the models: engines, workers, agents, and the dispatch that chooses among workers.

What starts on a node (`engines`, `worker`, `agent`, `sources`, `protocol`) imports neither
Django nor `registry`: a GPU process starts without them. The rest (`client`, `dispatch`,
`fleet`, `reconcile`, `tasks`, `admin`) runs in the gateway and in control.
"""
