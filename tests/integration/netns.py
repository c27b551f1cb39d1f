"""A network of namespaces: one for each node, with links that can be cut in one direction or for some ports only.

    node 1 --veth--+
    node 2 --veth--+-- bridge, in a namespace of its own
    node 3 --veth--+

Each namespace is held by a process that reads from a pipe of ours. It ends when the pipe does, so when the test dies in
whatever way the namespaces go, and with them every interface and every rule; nothing has a name outside, and nothing of
the machine's own network is touched. Packets are dropped where they arrive, before anything of the node sees them.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

CORRALD_PORT = 7400
"""Of every corrald; participants listen on ports the kernel chooses."""

PROGRAMS = {"ip": "iproute2", "nft": "nftables", "nsenter": "util-linux", "unshare": "util-linux"}


def missing() -> str:
    """Why there is no such network to be had here, "" when there is."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            return f"needs {program}; install the package {package}"
    return ""


class Namespace:
    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.write(b"\n")
        self._holder.stdin.flush()
        if self._holder.stdout.read(1) != b"\n":  # answered from inside
            self.close()
            raise OSError("no network namespace can be made here")

    @property
    def pid(self) -> int:
        return self._holder.pid

    def enter(self) -> Sequence[str]:
        """What a command begins with to run inside. Mounts stay those of the machine."""
        return ("nsenter", f"--net=/proc/{self.pid}/ns/net")

    def run(self, *command: str) -> None:
        done = subprocess.run([*self.enter(), *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"

    def close(self) -> None:
        self._holder.communicate()


class Network:
    """Nodes 1 to `count`, all links whole."""

    def __init__(self, count: int) -> None:
        self._nodes: dict[int, Namespace] = {}
        with ExitStack() as stack:
            hub = Namespace()
            stack.callback(hub.close)
            hub.run("ip", "link", "add", "bridge", "type", "bridge")
            hub.run("ip", "link", "set", "bridge", "up")
            for node in range(1, count + 1):
                namespace = self._nodes[node] = Namespace()
                stack.callback(namespace.close)
                self._connect(hub, namespace, node)
            self._stack = stack.pop_all()

    def _connect(self, hub: Namespace, namespace: Namespace, node: int) -> None:
        port = f"node{node}"
        hub.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(namespace.pid))
        hub.run("ip", "link", "set", port, "master", "bridge", "up")
        namespace.run("ip", "link", "set", "lo", "up")
        namespace.run("ip", "address", "add", f"{self.host(node)}/24", "dev", "eth0")
        namespace.run("ip", "link", "set", "eth0", "up")
        namespace.run("nft", "add", "table", "ip", "faults")
        namespace.run("nft", "add", "chain", "ip", "faults", "arrive", "{ type filter hook input priority 0; }")

    def close(self) -> None:
        self._stack.close()

    # -- where nodes are

    @staticmethod
    def host(node: int) -> str:
        return f"10.0.0.{node}"

    def address(self, node: int) -> str:
        return f"{self.host(node)}:{CORRALD_PORT}"

    def enter(self, node: int) -> Sequence[str]:
        return self._nodes[node].enter()

    # -- faults

    def cut(self, sources: Iterable[int], target: int) -> None:
        """Nothing of the sources arrives at the target any more; the other direction stays as it is."""
        hosts = ", ".join(self.host(source) for source in sources)
        self._add(target, f"ip saddr {{ {hosts} }} drop")

    def cut_participants(self, one: int, other: int) -> None:
        """Between these two only corrald still speaks to corrald."""
        for here, there in ((one, other), (other, one)):
            # Not one rule with both ports unequal: some versions of nft make of that one comparison of the pair.
            for rule in (
                f"tcp sport {CORRALD_PORT} accept",
                f"tcp dport {CORRALD_PORT} accept",
                "meta l4proto tcp drop",
            ):
                self._add(here, f"ip saddr {self.host(there)} {rule}")

    def cut_sessions(self, one: int, other: int) -> None:
        """Between these two heartbeats still pass, and nothing else."""
        for here, there in ((one, other), (other, one)):
            self._add(here, f"ip saddr {self.host(there)} meta l4proto tcp drop")

    def _add(self, node: int, rule: str) -> None:
        self._nodes[node].run("nft", "add", "rule", "ip", "faults", "arrive", rule)

    def heal(self) -> None:
        for namespace in self._nodes.values():
            namespace.run("nft", "flush", "chain", "ip", "faults", "arrive")
