"""`corral up`, `down`, `node`, `status`: a whole cluster on this machine, to try and to test with."""

import re
from pathlib import Path

import click

from corral.base.errors import ClusterError
from corral.cli.layout import Layout, make
from corral.cli.localcluster import LocalCluster
from corral.cli.output import json_option, print_json, print_table, tell, yes

dir_option = click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("corral-local"),
    show_default=True,
    help="Directory of the local cluster.",
)
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Size(click.ParamType[int]):
    """Bytes with an optional unit: 512M, 1G."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)([KMGT]?)i?B?", str(value), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is not a size such as 512M or 1G", param, context)
        return int(match[1]) * UNITS[match[2].upper()]


def existing(directory: Path) -> LocalCluster:
    layout = Layout(directory.absolute())
    return LocalCluster(layout, layout.load(), tell)


@click.command()
@click.option("--nodes", type=click.IntRange(1, 32), default=3, show_default=True, help="How many nodes.")
@dir_option
@click.option("--mount", is_flag=True, help="Make a filesystem on DIR/disk.img and mount it on every node.")
@click.option("--size", type=Size(), default="1G", show_default=True, help="Size of the shared disk image.")
@click.option("--detect", type=float, default=0.5, show_default=True, help="Seconds until a silent node has failed.")
def up(nodes: int, directory: Path, mount: bool, size: int, detect: float) -> None:
    """Start a cluster on this machine in the background; returns when its services run. May be called again."""
    layout = Layout(directory.absolute())
    if layout.config.exists():
        config = layout.load()
        if len(config.nodes) != nodes:
            raise ClusterError(
                f"the cluster in {directory} has {len(config.nodes)} nodes, not {nodes}; name another directory, "
                f"or end it with `corral down --dir {directory}` and remove the directory"
            )
    else:
        tell(f"making a cluster of {nodes} nodes in {directory}")
        config = make(layout, nodes, detect=detect)
    cluster = LocalCluster(layout, config, tell)
    cluster.up()
    if mount:
        cluster.mount_all(size)
    click.echo(f"cluster {config.name} of {nodes} nodes is up; try: corral status --dir {directory}")


@click.command()
@dir_option
def down(directory: Path) -> None:
    """End and unmount everything `corral up` started, also after crashes."""
    existing(directory).down()


@click.command()
@dir_option
@json_option
def status(directory: Path, as_json: bool) -> None:
    """Every node of a local cluster: running, member, mounted. Exit status 1 when no node is in an active view."""
    answer = existing(directory).status()
    nodes = answer["nodes"]
    if as_json:
        print_json(answer)
    else:
        rows = []
        for node, entry in nodes.items():
            members = ",".join(map(str, entry.get("members", []))) or "-"
            state = entry.get("error") or entry.get("waits_for") or ""
            view = f"{entry['epoch']}.{entry['coordinator']}" if "epoch" in entry else "-"
            rows.append(
                (
                    node,
                    yes(entry["running"]),
                    view,
                    members,
                    yes(entry.get("quorate")),
                    yes(entry.get("active")),
                    yes(entry["mounted"]),
                    state and f"waiting for {state}",
                )
            )
        print_table(
            f"cluster {answer['cluster']} in {answer['directory']}",
            ("node", "running", "view", "members", "quorate", "active", "mounted", ""),
            rows,
        )
    if not any(entry.get("active") for entry in nodes.values()):
        raise SystemExit(1)


@click.group()
def node() -> None:
    """Faults and repairs of one node of a local cluster."""


only_option = click.option("--only", type=click.Choice(["corrald", "mount"]), help="Only this process of the node.")


@node.command()
@click.argument("number", type=int)
@dir_option
@only_option
def kill(number: int, directory: Path, only: str | None) -> None:
    """SIGKILL to the node's corrald and its participants: a crash."""
    existing(directory).kill(number, only)


@node.command()
@click.argument("number", type=int)
@dir_option
def stop(number: int, directory: Path) -> None:
    """Unmount and leave the cluster cleanly."""
    existing(directory).stop(number)


@node.command()
@click.argument("number", type=int)
@dir_option
@click.option("--mount/--no-mount", default=None, help="Mount the filesystem too; default: if it ever was there.")
def start(number: int, directory: Path, mount: bool | None) -> None:
    """Start the node again, having cleared what a dead life left; returns when it is a member, and mounted."""
    cluster = existing(directory)
    cluster.start(number)
    cluster.wait_ready([number])
    if cluster.mounts.were_there(number) if mount is None else mount:
        cluster.mounts.mount(number)


@node.command()
@click.argument("number", type=int)
@dir_option
@only_option
def pause(number: int, directory: Path, only: str | None) -> None:
    """SIGSTOP to the node's corrald (or its mount): a process that hangs."""
    existing(directory).pause(number, only)


@node.command()
@click.argument("number", type=int)
@dir_option
@only_option
def resume(number: int, directory: Path, only: str | None) -> None:
    """SIGCONT: the paused process goes on."""
    existing(directory).resume(number, only)
