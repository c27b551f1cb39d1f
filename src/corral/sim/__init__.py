"""The simulated World: whole clusters in virtual time, every choice drawn from one seed (DESIGN 3 and 8).

`simulation.Simulation` is the door: machines, processes on them, disks, a network, and the run of a test's body.
`harness` runs seeds, replays them and keeps those that failed; `faults` draws plans of what hurts; `power` fences.

    simulation -- scheduler (loop)      virtual time; one asyncio loop per process, one total order of steps
               |- machines (machine)    power, clock, boot id; processes (process) with a World each (world)
               |- network, links        connections, datagrams, partitions; Unix sockets (local)
               |- disks (disk)          shared devices with volatile caches; state directories (store)
               `- trace                 what happened, and one number for all of it
    kernel, syscalls                    the kernel's FUSE client over an `api.gfs.Filesystem`, and its system calls

What keeps a run deterministic: no set is iterated, no hash() or id() decides, every part draws from its own stream of
the seed, cyclic garbage is collected at fixed steps, and the trace is compared between runs and between hash seeds.
"""
