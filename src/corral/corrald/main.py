"""corrald: the cluster daemon, one a node.

    corrald --config cluster.toml --node 1 --state /var/lib/corral [--certificates DIR] [--socket PATH]

It runs in the foreground and logs to standard error. SIGTERM leaves the cluster cleanly; SIGKILL and a crash make the
others fence this node. Exit status: 0 left cleanly, 1 could not run or go on, 2 usage, 3 wrong configuration.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Final, NoReturn

from corral.base.errors import ClusterError, ConfigurationError
from corral.node.config import ClusterConfig, load
from corral.node.node import Ended, Node, Paths
from corral.real import pki
from corral.real.process import machine_id
from corral.real.run import Stopped, run
from corral.real.world import RealWorld

RESTART_SECONDS: Final = 0.5  # between a lock service that ended and the next
RESTART_SECONDS_MAX: Final = 30.0

log = logging.getLogger("corral")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="corrald", description="The cluster daemon: one a node.")
    parser.add_argument("--config", required=True, type=Path, help="the cluster's configuration (TOML)")
    parser.add_argument("--node", required=True, type=int, help="which of its nodes this is")
    parser.add_argument("--state", required=True, type=Path, help="directory of this node's state")
    parser.add_argument(
        "--certificates",
        type=Path,
        help="directory of ca.crt, node-N.crt, node-N.key (default: pki beside the configuration)",
    )
    parser.add_argument(
        "--socket",
        type=Path,
        help="Unix socket for participants and commands (default: corrald.sock in the state directory)",
    )
    parser.add_argument("--no-lock-service", action="store_true", help="do not run the lock service for light clients")
    return parser.parse_args(argv)


def paths_of(state: Path, socket: Path | None, certificates: Path) -> Paths:
    chosen = socket or state / "corrald.sock"
    return Paths(
        socket=str(chosen),
        lock_socket=str(chosen.with_name("lock.sock")),
        page=str(state / "page"),
        participants=str(state / "participants"),
        certificates=str(certificates),
    )


async def serve(
    world: RealWorld, config: ClusterConfig, node_id: int, paths: Paths, lock_service: list[str] | None
) -> Ended:
    """Lives incarnation after incarnation, until one ends for good."""
    while True:
        node = Node(
            world,
            config,
            node_id,
            paths,
            uid=os.getuid(),
            log=log.info,
            machine_id=machine_id(),
            loop_statistics=lambda: world.pulse.statistics()._asdict() if world.pulse is not None else {},
        )
        try:
            ended = await _live(node, lock_service)
        finally:
            await asyncio.shield(node.close())
        if not ended.again:
            return ended
        await world.sleep_until(world.now() + config.detect_ns)


async def _live(node: Node, lock_service: list[str] | None) -> Ended:
    await node.start()
    supervisor = asyncio.ensure_future(_supervise(lock_service)) if lock_service else None
    try:
        return await asyncio.shield(node.ended)
    except asyncio.CancelledError:
        # SIGTERM or SIGINT: leave cleanly, but not for longer than the others would need to fence us anyway.
        if supervisor is not None:
            supervisor.cancel()
        await node.leave()
        try:
            async with asyncio.timeout(2 * node.config.recover_ns / 1e9):
                return await asyncio.shield(node.ended)
        except TimeoutError:
            return Ended("leaving took too long: this node counts as failed until it is fenced", again=False)
    finally:
        if supervisor is not None:
            supervisor.cancel()


async def _supervise(argv: list[str]) -> None:
    """Keeps the lock service running. It is a participant like any other: when corrald ends it, it is gone."""
    pause = RESTART_SECONDS
    while True:
        try:
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            log.error("the lock service cannot be started: %s", error)
            return
        started = asyncio.get_running_loop().time()
        status = await process.wait()
        if asyncio.get_running_loop().time() - started > RESTART_SECONDS_MAX:
            pause = RESTART_SECONDS
        log.info("the lock service ended with status %d; it starts again in %g s", status, pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, RESTART_SECONDS_MAX)


def fail(sentence: str, status: int) -> NoReturn:
    print(f"corrald: {sentence}", file=sys.stderr)  # noqa: T201
    sys.exit(status)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if not __debug__:
        fail("it does not run under python -O: its assertions are what keeps a wrong node from writing", 1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    try:
        config = load(arguments.config)
        config.node(arguments.node)
        certificates = arguments.certificates or arguments.config.parent / "pki"
        credentials = pki.load(certificates, arguments.node)
        arguments.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except ConfigurationError as error:
        fail(str(error), 3)
    except OSError as error:
        fail(f"the state directory {arguments.state} cannot be made: {error.strerror or error}", 1)
    paths = paths_of(arguments.state, arguments.socket, certificates)
    lock_service = None
    if not arguments.no_lock_service:
        lock_service = [
            sys.executable, "-m", "corral.corrald.lockservice",
            "--socket", paths.socket, "--listen", paths.lock_socket,
            "--enlist", paths.participants, "--state", str(arguments.state),
            "--certificates", str(certificates), "--node", str(arguments.node),
        ]  # fmt: skip
    try:
        ended = run(
            lambda world: serve(world, config, arguments.node, paths, lock_service),
            state_directory=str(arguments.state),
            credentials=credentials,
            signals=(signal.SIGINT, signal.SIGTERM),
        )
    except ClusterError as error:
        fail(str(error), 3 if isinstance(error, ConfigurationError) else 1)
    except Stopped as error:
        fail(f"{error}; the log has the details", 1)
    except asyncio.CancelledError:
        fail("stopped", 1)
    if not ended.clean:
        fail(ended.reason, 1)
