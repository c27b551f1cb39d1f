"""`corral cman`: membership and quorum, as this node sees them."""

import asyncio

import click

from corral.cli.localcluster import ask
from corral.cli.output import json_option, print_json, print_table, yes


@click.group()
def cman() -> None:
    """Membership, quorum and recovery control."""


@cman.command()
@json_option
@click.pass_obj
def status(socket: str, as_json: bool) -> None:
    """Members, quorum, and what this node waits for. Exit status 1 when not quorate."""
    answer = asyncio.run(ask(socket, "cman.status"))
    if as_json:
        print_json(answer)
    else:
        rows = [
            (node["id"], node["name"], node["address"], yes(node["member"]), node["link"]) for node in answer["nodes"]
        ]
        print_table(
            f"cluster {answer['cluster']}, node {answer['node']}: view {answer['epoch']}.{answer['coordinator']}, "
            f"quorate {yes(answer['quorate'])}, active {yes(answer['active'])}",
            ("node", "name", "address", "member", "link"),
            rows,
        )
        if answer["waits_for"]:
            click.echo(f"waiting for {answer['waits_for']}")
    if not answer["quorate"]:
        raise SystemExit(1)


@cman.command()
@json_option
@click.pass_obj
def groups(socket: str, as_json: bool) -> None:
    """Service groups: level, round, members with their slots."""
    answer = asyncio.run(ask(socket, "groups"))
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            group["name"],
            group["level"],
            group["round"],
            ", ".join(f"{member['member']} (slot {member['slot']})" for member in group["members"]),
            ", ".join(group["failed"]) or "-",
        )
        for group in answer
    ]
    print_table("", ("group", "level", "round", "members", "being recovered"), rows)


@cman.command()
@json_option
@click.pass_obj
def timing(socket: str, as_json: bool) -> None:
    """Every timer, derived from `detect` and `recover`."""
    answer = asyncio.run(ask(socket, "timing"))
    if as_json:
        print_json(answer)
        return
    print_table("", ("timer", "seconds", "meaning"), [(t["name"], f"{t['seconds']:g}", t["meaning"]) for t in answer])


@cman.command()
@json_option
@click.pass_obj
def history(socket: str, as_json: bool) -> None:
    """What happened on this node lately."""
    answer = asyncio.run(ask(socket, "history"))
    if as_json:
        print_json([{"at": at, "kind": kind, "text": text} for at, kind, text in answer])
        return
    print_table("", ("s since boot", "kind", "what"), [(f"{at / 1e9:.3f}", kind, text) for at, kind, text in answer])


@cman.command()
@click.pass_obj
def leave(socket: str) -> None:
    """Leave the cluster cleanly: participants end, nobody is fenced, corrald stops."""
    asyncio.run(ask(socket, "leave"))
