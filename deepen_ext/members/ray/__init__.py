"""Members in actors of Ray: any backend of this package, on any machine of a cluster.

load.py       a member whose model is loaded in an actor, and its tokenizer here
actor.py      what runs in the actor: the member, its sessions
backend.py    what the ensemble sees of it
session.py    one call a step
wire.py       what a call carries
"""
