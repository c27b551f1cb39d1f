"""Programs of the FenceAgentAPI, unchanged: fence_ipmilan, fence_virsh, fence_scsi, your own script.

A program gets `name=value` lines on standard input and nothing else: parameters may be passwords, so they appear
neither in argv nor in any text of ours. Exit status 0 is success; for status 0 means on and 2 means off; everything
else, a timeout above all, is failure. After `off` a program that has `status` must confirm it.

`nodename` is the victim's name; a parameter `plug` or `port` wins over it, and is filled in with that name when the
agent has one and the configuration does not set it. Source: ClusterLabs fence-agents `doc/FenceAgentAPI.md`.
"""

from collections.abc import Mapping
from typing import Final

from corral.api.fence import NONE, Device
from corral.base.errors import ConfigurationError, FenceError
from corral.base.ids import NodeId, NodeIncarnation
from corral.base.time import SECOND, Nanoseconds, from_seconds
from corral.base.world import Completed, World
from corral.providers.agents.metadata import NAMING_VICTIM, Metadata, parse_metadata

DIRECTORIES: Final = ("/usr/sbin", "/usr/local/sbin", "/sbin", "/usr/bin", "/usr/local/bin")
METADATA_TIMEOUT: Final[Nanoseconds] = 10 * SECOND
STATUS_TRIES: Final = 3  # some devices tell of a change only after a moment
SAID_MAX: Final = 200  # characters of a program's output in an error
SECRET_WORDS: Final = ("pass", "secret", "token", "key", "kg", "pin", "community")

STATUS_ON: Final = 0
STATUS_OFF: Final = 2


class Program:
    """One agent program: where it is and what it says of itself."""

    def __init__(self, world: World, name: str) -> None:
        self.name: Final = name
        self._world = world
        self._paths = [name] if name.startswith("/") else [f"{directory}/{name}" for directory in DIRECTORIES]
        self._metadata: Metadata | None = None

    async def run(self, lines: Mapping[str, str], timeout_ns: Nanoseconds) -> Completed:
        """Raises FenceError when it cannot be started, TimeoutError when it was killed for not ending in time."""
        stdin = "".join(f"{name}={value}\n" for name, value in sorted(lines.items())).encode()
        for path in list(self._paths):
            try:
                completed = await self._world.process.run([path], stdin, timeout_ns)
            except FileNotFoundError:
                continue
            except TimeoutError:
                raise
            except OSError as error:
                raise FenceError(f"fence agent {path} cannot be started: {error.strerror or error}") from None
            self._paths = [path]
            return completed
        where = self.name if self.name.startswith("/") else f"{self.name} (looked for in {', '.join(DIRECTORIES)})"
        raise FenceError(f"there is no fence agent {where}: install it, e.g. package fence-agents")

    async def metadata(self, timeout_ns: Nanoseconds = METADATA_TIMEOUT) -> Metadata:
        """Asked until it answers once. Raises ConfigurationError, FenceError or TimeoutError."""
        if self._metadata is None:
            completed = await self.run({"action": "metadata"}, timeout_ns)
            if completed.status != 0:
                raise ConfigurationError(f"agent {self.name}: action metadata ended with status {completed.status}")
            self._metadata = parse_metadata(completed.stdout, self.name)
        return self._metadata


class ProgramAgent:
    """One use of a device by one method."""

    def __init__(
        self,
        world: World,
        program: Program,
        device: Device,
        parameters: Mapping[str, str],
        names: Mapping[NodeId, str],
    ) -> None:
        self._world = world
        self._program = program
        self._device = device
        self._parameters = parameters
        self._names = names

    @property
    def proof(self) -> int:
        return self._device.proof_number

    async def off(self, victim: NodeIncarnation) -> None:
        metadata = await self._known_metadata()
        deadline = self._world.now() + from_seconds(self._device.timeout)
        await self._succeed("off", victim, metadata, deadline)
        if metadata is not None and "status" in metadata.actions and self.proof != NONE:
            await self._confirm_off(victim, metadata, deadline)

    async def on(self, victim: NodeIncarnation) -> None:
        metadata = await self._known_metadata()
        await self._succeed("on", victim, metadata, self._world.now() + from_seconds(self._device.timeout))

    async def status(self, victim: NodeIncarnation) -> bool | None:
        metadata = await self._known_metadata()
        deadline = self._world.now() + from_seconds(self._device.timeout)
        completed = await self._run("status", victim, metadata, deadline)
        return {STATUS_ON: True, STATUS_OFF: False}.get(completed.status)

    async def check(self, node: NodeId, action: str) -> None:
        """The configuration of this use against the program's metadata. Raises ConfigurationError."""
        where = f"[fence] node {node}, device {self._device.name}"
        try:
            metadata = await self._program.metadata()
        except TimeoutError:
            raise ConfigurationError(f"{where}: agent {self._program.name} did not tell its metadata in 10 s") from None
        except FenceError as error:
            raise ConfigurationError(f"{where}: {error}") from None
        metadata.check(self._parameters, action=action, where=where)

    async def _known_metadata(self) -> Metadata | None:
        """A program without usable metadata is still worth trying: it then cannot be asked to confirm."""
        try:
            return await self._program.metadata(min(METADATA_TIMEOUT, from_seconds(self._device.timeout) // 4))
        except (ConfigurationError, TimeoutError):
            return None

    async def _succeed(self, action: str, victim: NodeIncarnation, metadata: Metadata | None, deadline: int) -> None:
        completed = await self._run(action, victim, metadata, deadline)
        if completed.status != 0:
            raise FenceError(f"{self._program.name} {action}: {_ending(completed)}{self._said(completed)}")

    async def _confirm_off(self, victim: NodeIncarnation, metadata: Metadata, deadline: int) -> None:
        for last in (False,) * (STATUS_TRIES - 1) + (True,):
            completed = await self._run("status", victim, metadata, deadline)
            if completed.status == STATUS_OFF:
                return
            if not last:
                await self._world.sleep_until(self._world.now() + SECOND)
        if completed.status == STATUS_ON:
            raise FenceError(
                f"{self._program.name} reported success, but its status says that node {victim.node} is on"
            )
        raise FenceError(
            f"{self._program.name} reported success, but its status cannot confirm it: "
            f"{_ending(completed)}{self._said(completed)}"
        )

    async def _run(self, action: str, victim: NodeIncarnation, metadata: Metadata | None, deadline: int) -> Completed:
        left = deadline - self._world.now()
        if left <= 0:
            raise FenceError(f"{self._program.name} {action}: no time left")
        try:
            return await self._program.run(self._lines(action, victim, metadata), left)
        except TimeoutError:
            raise FenceError(
                f"{self._program.name} {action}: did not end within {self._device.timeout:g} s and was killed"
            ) from None

    def _lines(self, action: str, victim: NodeIncarnation, metadata: Metadata | None) -> dict[str, str]:
        name = self._names.get(victim.node, f"node{victim.node}")
        lines = {**self._parameters, "action": action, "nodename": name}
        plug = metadata.names_victim_by if metadata is not None else ""
        if plug and not any(other in lines for other in NAMING_VICTIM):
            lines[plug] = name
        return lines

    def _said(self, completed: Completed) -> str:
        """The last line of its output, made fit to be shown: one line, printable, without secrets."""
        output = completed.stderr.strip() or completed.stdout.strip()
        text = output.decode("utf-8", "replace")
        secrets = [v for k, v in self._parameters.items() if v and any(word in k.lower() for word in SECRET_WORDS)]
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        last = text.splitlines()[-1] if text else ""
        line = "".join(character if character.isprintable() else "?" for character in last)[-SAID_MAX:]
        return f": {line}" if line else ""


def _ending(completed: Completed) -> str:
    if completed.status < 0:
        return f"killed by signal {-completed.status}"
    return f"failed with status {completed.status}"
