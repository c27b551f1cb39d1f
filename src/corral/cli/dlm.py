"""`corral dlm`: who holds and waits, purging what the dead left, and recordings of the kernel's lock manager."""

import asyncio
from pathlib import Path

import click

from corral.api.dlm import (
    MODE_NAMES,
    QUERY_ALL,
    QUERY_QUEUES,
    QUEUE_CONVERT,
    QUEUE_GRANT,
    VALUE_SIZE,
    Completion,
    LockInfo,
    Request,
)
from corral.base.errors import ClusterError
from corral.cli.output import json_option, print_json, print_table, yes
from corral.dlm.replay import Malformed, Mismatch, Parting, replay, runs
from corral.doors import connect


@click.group()
def dlm() -> None:
    """The lock manager: queries, orphans, replay of kernel traces."""


@dlm.command("replay")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@json_option
@click.pass_context
def replay_command(context: click.Context, files: tuple[Path, ...], as_json: bool) -> None:
    """Play the recorded runs in FILES against a lockspace of this process and print every difference.

    Status 0 only when no run differs. docs/design/dlm-oracle.md tells the format, and why some run can be compared only
    up to some step; such a place is printed on stderr.
    """
    passed = failed = 0
    mismatches: list[Mismatch] = []
    partings: list[Parting] = []
    for file in files:
        try:
            for run in runs(file.read_text()):
                found, parting = replay(run)
                passed, failed = (passed, failed + 1) if found else (passed + 1, failed)
                mismatches.extend(found)
                if not as_json:
                    for mismatch in found:
                        click.echo(f"{file}: {mismatch}")
                if parting is not None:
                    partings.append(parting)
                    click.echo(f"{file}: {parting}", err=True)
        except (Malformed, UnicodeDecodeError, OSError) as error:
            raise ClusterError(f"{file} is not a recording of lock manager runs: {error}") from None
    if as_json:
        print_json(
            {
                "passed": passed,
                "failed": failed,
                "mismatches": [mismatch._asdict() for mismatch in mismatches],
                "partings": [parting._asdict() for parting in partings],
            }
        )
    else:
        click.echo(f"{passed} passed, {failed} failed")
    context.exit(1 if failed else 0)


size_option = click.option(
    "--value-size", default=VALUE_SIZE, show_default=True, help="Bytes of a value block, as the lockspace was opened."
)


async def _submitted(socket: str, space: str, value_size: int, request: Request) -> Completion:
    """Opens the lockspace (this node joins it if it is not in it) and asks. Raises ClusterError."""
    async with connect(socket) as cluster:
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        opened = await cluster.lockspace(space, value_size=value_size)
        opened.submit([request], lambda _handle, completion: answer.set_result(completion))
        return await answer


def _state(lock: LockInfo) -> str:
    return "granted" if lock.state == QUEUE_GRANT else "converting" if lock.state == QUEUE_CONVERT else "waiting"


def _mode(mode: int, span: tuple[int, int] | None) -> str:
    if mode < 0:
        return "-"
    return MODE_NAMES[mode] if span is None else f"{MODE_NAMES[mode]} {span[0]}-{span[1]}"


@dlm.command()
@click.argument("space")
@click.argument("resource")
@size_option
@json_option
@click.pass_context
def query(context: click.Context, space: str, resource: str, value_size: int, as_json: bool) -> None:
    """Who has RESOURCE of lockspace SPACE, and who waits for it. Status 1 when nobody uses that name."""
    request = Request("query", resource.encode(), flags=QUERY_ALL | QUERY_QUEUES)
    info = asyncio.run(_submitted(context.obj, space, value_size, request)).report
    locks = [] if info is None else info.locks
    rows = [
        {
            "node": lock.member.node,
            "client": lock.client,
            "lock": lock.lock,
            "state": _state(lock),
            "granted": _mode(lock.granted, lock.range),
            "requested": _mode(lock.requested, lock.requested_range),
            "token": lock.token,
        }
        for lock in locks
    ]
    master = None if info is None or info.master is None else info.master.node
    if as_json:
        value = None if info is None else {"hex": info.value.hex(), "valid": info.value_valid, "writes": info.sequence}
        print_json({"space": space, "resource": resource, "master": master, "value": value, "locks": rows})
    elif info is None:
        click.echo(f"nobody uses {resource!r} in lockspace {space}")
    else:
        title = f"{resource!r} in lockspace {space}: mastered by node {master}, value valid {yes(info.value_valid)}"
        print_table(title, tuple(rows[0]) if rows else ("node",), [tuple(row.values()) for row in rows])
    if info is None:
        context.exit(1)


@dlm.command()
@click.argument("space")
@click.option("--node", default=0, help="Where their clients died; by default this node.")
@click.option("--client", default=0, help="Only what this client left.")
@size_option
@click.pass_context
def purge(context: click.Context, space: str, node: int, client: int, value_size: int) -> None:
    """Unlock the orphans of lockspace SPACE: persistent locks whose clients died."""
    done = asyncio.run(_submitted(context.obj, space, value_size, Request("purge", lock=node, owner=client)))
    if done.status:
        raise ClusterError(f"the purge was refused with status {done.status}; is {node} a node, {client} a client?")
