"""Fence agents: what really cuts a node off, run over `World.process`.

service.py   takes the engine's RunAttempt and CancelAttempt, answers AttemptDone
registry.py  agent name -> Agent
process.py, manual.py, dummy.py   built in
runner.py    any program of the FenceAgentAPI; metadata.py reads what such a program says of itself
"""
