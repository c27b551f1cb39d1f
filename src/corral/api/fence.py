"""Fencing's contract: when a node is *fenced*, none of that incarnation can reach shared state any more.

Source of the semantics: fenced(8) and dlm_controld(8) (domain, victims, delays, averted fences, override), Pacemaker's
fencing topology (levels, reboot as all off and then all on, target to port map), the FenceAgentAPI of fence-agents.
"""

from collections.abc import Awaitable, Collection, Mapping
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from corral.base.errors import ConfigurationError
from corral.base.ids import NAME_MAX, NodeId, NodeIncarnation
from corral.base.time import Nanoseconds, Seconds

# What a successful fence proves, strongest first. Plain ints: the weakest of a method's devices is their maximum.
NONE: Final = 0  # nothing: a gate such as fence_heuristics_ping, or an averted fence
POWERED: Final = 1  # the machine was switched off, and was seen to be off
KILLED: Final = 2  # every process of that incarnation is gone (DESIGN 4); a newer incarnation was not touched
KEYED: Final = 3  # the storage refuses that node's writes
WAITED: Final = 4  # a watchdog that must have fired by now was waited for
MANUAL: Final = 5  # an operator's recorded word
PROOF_NAMES: Final = ("none", "powered", "killed", "keyed", "waited", "manual")

# How a victim stopped being one.
AGENT: Final = 1
MEMBER: Final = 2  # averted: the node joined again, clean
OVERRIDE: Final = 3  # an operator said so
EXTERNAL: Final = 4  # something outside this cluster fenced it
HOW_NAMES: Final = ("", "agent", "member", "manual", "external")

BUILT_IN_PROOF: Final[Mapping[str, int]] = {"process": KILLED, "manual": MANUAL, "dummy": POWERED}
ANY_INCARNATION: Final = 0  # in a victim: whatever of that node ran before this cluster started

PARAMETER_MAX: Final = 4096  # bytes in one parameter value
DEVICES_MAX: Final = 256
METHODS_MAX: Final = 9
SECONDS_MAX: Final = 3600.0


# --- events --------------------------------------------------------------------------------------------------------


class FenceStarted(NamedTuple):
    """An agent begins to work on a victim; only the node that runs it says so."""

    victim: NodeIncarnation
    method: str
    by: NodeId


class NodeFenced(NamedTuple):
    """The victim is no danger any more. Every member emits it once per victim; from here on recovery may go on."""

    victim: NodeIncarnation
    how: int
    proof: int
    method: str
    agent: str
    by: NodeId
    duration_ns: Nanoseconds
    text: str  # the operator's word, or what the agent said
    wall_seconds: int  # since 1970, of the node that knew first; 0 when it had no clock at hand

    def __str__(self) -> str:
        node = self.victim.node
        if self.how == MEMBER:
            return f"node {node} has joined again clean: fencing averted"
        if self.how == OVERRIDE:
            return f"node {node} counts as fenced by an operator's word: {self.text}"
        if self.how == EXTERNAL:
            return f"node {node} was fenced from outside: {self.text}"
        proof = PROOF_NAMES[self.proof]
        return f"node {node} fenced by node {self.by}, method {self.method} ({self.agent}), proof {proof}"


class FenceFailed(NamedTuple):
    """A method failed. Identical failures are told three times, then once in 600; `repeats` counts them all."""

    victim: NodeIncarnation
    method: str
    by: NodeId
    text: str
    repeats: int


class FenceDeferred(NamedTuple):
    """It is another member's turn to fence this victim."""

    victim: NodeIncarnation
    to: NodeId


class VictimStatus(NamedTuple):
    victim: NodeIncarnation
    fencer: NodeId  # whose turn it is; 0 between rounds
    turn: int
    method: str
    running: bool
    failures: int
    last_error: str
    waits_for: str  # one sentence


class FenceStatus(NamedTuple):
    """What `corral fence status` prints. `waits_for` is "" when nothing is waited for."""

    round: int
    done: bool
    members: tuple[NodeId, ...]
    victims: tuple[VictimStatus, ...]
    waits_for: str
    history: tuple[NodeFenced, ...]
    dropped: int  # messages of peers that made no sense or came from an older round


# --- contracts -----------------------------------------------------------------------------------------------------


class Agent(Protocol):
    """One way to cut a node off. Every method returns only when the new state was verified, raises FenceError with a
    sentence otherwise; a timeout is a failure. Cancelling the awaiting task stops the attempt, its outcome unknown."""

    @property
    def proof(self) -> int: ...

    def off(self, victim: NodeIncarnation) -> Awaitable[None]: ...

    def on(self, victim: NodeIncarnation) -> Awaitable[None]: ...

    def status(self, victim: NodeIncarnation) -> Awaitable[bool | None]:
        """True: it runs; False: it is off; None: this agent cannot tell."""


class Fence(Protocol):
    """What other services and doors see."""

    def status(self) -> FenceStatus: ...

    def fence(self, victim: NodeId, reason: str) -> None:
        """Ask for a node to be fenced; a member is first left out of the view. The outcome is a NodeFenced event."""

    def acknowledge(self, victim: NodeId, operator: str) -> None:
        """An operator's word that the node is off. Recorded; nothing checks it."""

    def fenced(self, victim: NodeIncarnation) -> bool: ...


# --- configuration -------------------------------------------------------------------------------------------------


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that can cut nodes off: an agent and what it needs to be told, e.g. one power distribution unit.

    `agent`: "process", "manual", "dummy", or a program of the FenceAgentAPI by name (looked up in /usr/sbin, /usr/bin
    and PATH) or absolute path. `proof`: what its success proves; "" takes the agent's own, "powered" for programs.
    `limit`: how many victims it can work on at once, 0 for any number.
    """

    name: str
    agent: str
    parameters: dict[str, str] = {}
    proof: str = ""
    timeout: Seconds = 60.0
    limit: int = 1

    @property
    def proof_number(self) -> int:
        if self.proof:
            return PROOF_NAMES.index(self.proof)
        return BUILT_IN_PROOF.get(self.agent, POWERED)


class DeviceUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device as one node's method uses it: `parameters` (such as plug) go over the device's own."""

    device: str
    parameters: dict[str, str] = {}


class Method(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All its devices must succeed, in order; a list inside the list is a group that works at once.

    `action` "off" leaves the node off; "reboot" switches all devices off and then, the victim being fenced already,
    all on.
    """

    name: str
    devices: list[str | DeviceUse | list[str | DeviceUse]]
    action: str = "off"

    @property
    def groups(self) -> tuple[tuple[DeviceUse, ...], ...]:
        return tuple(
            tuple(_use(use) for use in entry) if isinstance(entry, list) else (_use(entry),) for entry in self.devices
        )


class NodeFencing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one node is fenced: methods in order of preference. `delay` is waited before it is fenced, so of two halves
    that fence each other the side of the node with the longer delay wins."""

    methods: list[Method]
    delay: Seconds = 0.0


class FenceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `[fence]` table. `post_join_delay` -1 waits for ever for missing nodes; `startup` false assumes every missing
    node clean when the cluster first forms, which only an operator can know."""

    devices: list[Device] = []
    nodes: dict[NodeId, NodeFencing] = {}
    post_join_delay: Seconds = 6.0
    post_fail_delay: Seconds = 0.0
    retry_delay: Seconds = 5.0
    concurrent: int = 8
    startup: bool = True

    def device(self, name: str) -> Device:
        for device in self.devices:
            if device.name == name:
                return device
        raise KeyError(name)

    def proofs_of(self, node: NodeId) -> frozenset[int]:
        """What a successful fence of this node may prove, by method: what a stack above has to be content with."""
        fencing = self.nodes.get(node)
        return frozenset(self.proof_of(method) for method in fencing.methods) if fencing else frozenset()

    def proof_of(self, method: Method) -> int:
        """The weakest proof of its devices; gates that prove nothing do not count."""
        return max(self.device(use.device).proof_number for group in method.groups for use in group)


def _use(entry: str | DeviceUse) -> DeviceUse:
    return DeviceUse(entry) if isinstance(entry, str) else entry


def process_fencing(nodes: Collection[NodeId], *, machine: str = "", post_join_delay: Seconds = 1.0) -> FenceConfig:
    """The default of `corral up`: all nodes are processes of one machine, and killing them is the fence. `machine` is
    its /etc/machine-id: with it, what ran before a reboot counts as gone (providers/agents/process.py)."""
    parameters = {"machine": machine} if machine else {}
    method = Method("process", ["process"])
    return FenceConfig(
        devices=[Device("process", "process", parameters, timeout=10.0, limit=0)],
        nodes={node: NodeFencing([method]) for node in sorted(nodes)},
        post_join_delay=post_join_delay,
        retry_delay=1.0,
    )


def parse_fencing(table: Mapping[str, Any], nodes: Collection[NodeId]) -> FenceConfig:
    """The `[fence]` table as TOML gives it, checked against the configured nodes. Raises ConfigurationError."""
    try:
        config = msgspec.convert(table, FenceConfig, str_keys=True)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"[fence]: {error}") from None
    check_fencing(config, nodes)
    return config


def check_fencing(config: FenceConfig, nodes: Collection[NodeId]) -> None:
    """Everything a type cannot say. Raises ConfigurationError with key, cause and accepted values."""
    join = config.post_join_delay
    _require(join == -1 or 0 <= join <= SECONDS_MAX, "post_join_delay", "-1 (wait for ever) or 0 to 3600 seconds", join)
    fail, retry = config.post_fail_delay, config.retry_delay
    _require(0 <= fail <= SECONDS_MAX, "post_fail_delay", "0 to 3600 seconds", fail)
    _require(0 < retry <= SECONDS_MAX, "retry_delay", "more than 0 and at most 3600 seconds", retry)
    _require(1 <= config.concurrent <= 64, "concurrent", "1 to 64", config.concurrent)
    _require(len(config.devices) <= DEVICES_MAX, "devices", f"at most {DEVICES_MAX} devices", len(config.devices))
    names: set[str] = set()
    for device in config.devices:
        _check_device(device)
        _require(device.name not in names, "devices", "names that differ", f"{device.name!r} twice")
        names.add(device.name)
    for node in sorted(config.nodes):
        _require(node in nodes, f"nodes.{node}", f"one of the configured nodes {sorted(nodes)}", node)
        _check_node(config, node, names)
    for node in sorted(nodes):
        fencing = config.nodes.get(node)
        if fencing is None or not fencing.methods:
            raise ConfigurationError(
                f"[fence] node {node} has no method, so its failure would stop the cluster: give it one, "
                f"or say that an operator does it with a device of agent 'manual'"
            )


def _check_device(device: Device) -> None:
    where = f"devices.{device.name}"
    _require(0 < len(device.name.encode()) <= NAME_MAX, "devices", f"names of 1 to {NAME_MAX} bytes", device.name)
    agent = device.agent
    plain = bool(agent) and agent.isprintable() and " " not in agent
    _require(
        plain and ("/" not in agent or agent.startswith("/")),
        f"{where}.agent",
        "process, manual, dummy, or a program's name or absolute path",
        agent,
    )
    _require(device.proof in ("", *PROOF_NAMES), f"{where}.proof", f"one of {', '.join(PROOF_NAMES)}", device.proof)
    fixed = BUILT_IN_PROOF.get(agent)
    if fixed is not None and device.proof:
        _require(device.proof_number == fixed, f"{where}.proof", f"{PROOF_NAMES[fixed]} for {agent}", device.proof)
    _require(0 < device.timeout <= SECONDS_MAX, f"{where}.timeout", "more than 0, at most 3600 seconds", device.timeout)
    _require(0 <= device.limit <= 64, f"{where}.limit", "0 (any number) to 64", device.limit)
    _check_parameters(where, device.parameters)


def _check_parameters(where: str, parameters: Mapping[str, str]) -> None:
    for name, value in parameters.items():
        key = f"{where}.parameters.{name}"
        legal = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
        _require(legal and len(name) <= NAME_MAX, key, "names of letters, digits, _ and -", name)
        _require(name not in ("action", "nodename"), key, "parameters other than action and nodename", name)
        # Never the value itself: it may be a password.
        clean = not any(character in value for character in "\n\r\0") and len(value.encode()) <= PARAMETER_MAX
        _require(clean, key, f"one line of at most {PARAMETER_MAX} bytes", f"{len(value)} characters")


def _check_node(config: FenceConfig, node: NodeId, devices: set[str]) -> None:
    fencing = config.nodes[node]
    where = f"nodes.{node}"
    _require(0 <= fencing.delay <= SECONDS_MAX, f"{where}.delay", "0 to 3600 seconds", fencing.delay)
    _require(len(fencing.methods) <= METHODS_MAX, f"{where}.methods", f"at most {METHODS_MAX}", len(fencing.methods))
    names: set[str] = set()
    for method in fencing.methods:
        key = f"{where}.methods.{method.name}"
        _require(0 < len(method.name.encode()) <= NAME_MAX, key, f"a name of 1 to {NAME_MAX} bytes", method.name)
        _require(method.name not in names, key, "names that differ", f"{method.name!r} twice")
        names.add(method.name)
        _require(method.action in ("off", "reboot"), f"{key}.action", "off or reboot", method.action)
        uses = [use for group in method.groups for use in group]
        _require(0 < len(uses) <= DEVICES_MAX, f"{key}.devices", "at least one device", len(uses))
        for use in uses:
            _require(use.device in devices, f"{key}.devices", f"one of {', '.join(sorted(devices))}", use.device)
            _check_parameters(f"{key}.{use.device}", use.parameters)
        keyed = [use.device for use in uses if config.device(use.device).proof_number == KEYED]
        _require(not keyed or method.action == "off", f"{key}.action", "off for a device that only bars storage", keyed)
        proof = config.proof_of(method)
        _require(proof != NONE, f"{key}.devices", "at least one device that proves something", "only gates")
        alone = len(uses) == 1 or all(config.device(use.device).agent != "manual" for use in uses)
        _require(alone, f"{key}.devices", "'manual' alone in its method", [use.device for use in uses])


def _require(condition: bool, key: str, accepted: str, got: object) -> None:
    if not condition:
        raise ConfigurationError(f"[fence] {key}: expected {accepted}, got {got!r}")
