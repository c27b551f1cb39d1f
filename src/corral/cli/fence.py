"""`corral fence`: who must be cut off, who has been, and the operator's word."""

import asyncio
import getpass
import time

import click

from corral.cli.localcluster import ask
from corral.cli.output import json_option, print_json, print_table, yes


@click.group()
def fence() -> None:
    """Fencing: victims, history, acknowledgement."""


@fence.command()
@json_option
@click.pass_obj
def status(socket: str, as_json: bool) -> None:
    """Victims with what each waits for, and the last fences."""
    answer = asyncio.run(ask(socket, "fence.status"))
    if as_json:
        print_json(answer)
        return
    if answer["waits_for"]:
        click.echo(f"waiting: {answer['waits_for']}")
    victims = [
        (v["node"], v["incarnation"], v["method"], yes(v["running"]), v["failures"], v["waits_for"])
        for v in answer["victims"]
    ]
    if victims:
        print_table("victims", ("node", "incarnation", "method", "running", "failures", "waits for"), victims)
    history = [
        (
            time.strftime("%F %T", time.localtime(fact["at"])),
            fact["node"],
            fact["how"],
            fact["proof"],
            fact["method"] or "-",
            f"{fact['seconds'] * 1000:.0f} ms",
        )
        for fact in answer["history"]
    ]
    print_table("history", ("when", "node", "how", "proof", "method", "took"), history)


@fence.command()
@json_option
@click.pass_obj
def check(socket: str, as_json: bool) -> None:
    """Every node's fence methods, after asking the agents' programs whether they know what they are given."""
    answer = asyncio.run(ask(socket, "fence.check"))
    if as_json:
        print_json(answer)
        return
    rows = [(m["node"], m["method"], m["action"], ", ".join(m["devices"]), m["proof"]) for m in answer]
    print_table("", ("node", "method", "action", "devices", "proof"), rows)


@fence.command()
@click.argument("node", type=int)
@click.option("--reason", default="", help="How you know, kept in the history.")
@click.pass_obj
def ack(socket: str, node: int, reason: str) -> None:
    """Say that NODE is off. Nothing checks it: a node that still runs will corrupt what it shares."""
    operator = f"{getpass.getuser()}: {reason}" if reason else getpass.getuser()
    asyncio.run(ask(socket, "fence.ack", node=node, operator=operator[:200]))
    click.echo(f"node {node} counts as fenced")


@fence.command("node")
@click.argument("node", type=int)
@click.option("--reason", default="", help="Why, kept in the log of every member.")
@click.pass_obj
def fence_node(socket: str, node: int, reason: str) -> None:
    """Have NODE fenced now: a member is left out of the cluster first, a failed node does not wait for its delay."""
    asyncio.run(ask(socket, "fence.node", node=node, reason=f"{getpass.getuser()}: {reason or 'on request'}"[:200]))
    click.echo(f"node {node} will be fenced; `corral fence status` tells how it goes")
