"""The real World: asyncio on uvloop, TLS 1.3, UDP, Unix sockets, O_DIRECT, pidfds (DESIGN 3).

`world.RealWorld` is the door; `run.run` starts a process on it; `pki` makes and loads the credentials of a cluster.
"""
