"""`corral gfs`: make, mount, check filesystems."""

import os
from pathlib import Path

import click
import msgspec

from corral.base.errors import ClusterError
from corral.cli import images
from corral.cli.local import Size
from corral.cli.output import json_option, print_json, tell


@click.group()
def gfs() -> None:
    """The shared-disk filesystem."""


@gfs.command()
@click.argument("device", type=click.Path(path_type=Path))
@click.option("--table", required=True, metavar="CLUSTER:NAME", help="Which cluster may mount it, and its name there.")
@click.option("--journals", type=click.IntRange(1, 128), default=3, show_default=True, help="One for each mount.")
@click.option("--size", type=Size(), help="Make an image of this size when DEVICE does not exist.")
@click.option("--yes", is_flag=True, help="Do not ask before what is on DEVICE is overwritten.")
def mkfs(device: Path, table: str, journals: int, size: int | None, yes: bool) -> None:
    """Make a filesystem on DEVICE, a block device or an image file."""
    cluster, colon, name = table.partition(":")
    if not colon or not cluster or not name or not table.isascii() or not table.isprintable():
        raise ClusterError(f"--table is CLUSTER:NAME, such as home:data, in ASCII, not {table!r}")
    if device.exists() and not yes:
        click.confirm(f"What is on {device} will be lost. Go on?", abort=True)
    made = images.mkfs(device, size, cluster=cluster, name=name, journals=journals)
    click.echo(f"{device}: {made.blocks} blocks of 4096 bytes, {made.rgrps} resource groups, {made.journals} journals")


@gfs.command()
@click.argument("device", type=click.Path(path_type=Path))
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--foreground", is_flag=True, help="Stay in the foreground and log to standard error.")
@click.pass_obj
def mount(socket: str, device: Path, mountpoint: Path, foreground: bool) -> None:
    """Mount DEVICE on MOUNTPOINT as a member of this node's cluster. Unmount with `umount` or by SIGTERM."""
    from corral.cli import mountprocess

    where = os.path.join(os.path.realpath(mountpoint.parent), mountpoint.name)
    if foreground:
        mountprocess.main(socket, str(device.absolute()), where)
        return
    from corral.cli.mounts import mount_in_background

    mount_in_background(socket, device.absolute(), Path(where))


@gfs.command()
@click.argument("device", type=click.Path(exists=True, path_type=Path))
@click.option("--repair", "-y", is_flag=True, help="Put right what can be; without it nothing is written.")
@json_option
def fsck(device: Path, repair: bool, as_json: bool) -> None:
    """Check a filesystem that is mounted on NO node. Exit status 1 when something wrong is left."""
    progress = None if as_json else (lambda what, _done, _total: tell(f"checking {what}"))
    report = images.check(device, repair=repair, progress=progress)
    if as_json:
        print_json({**msgspec.to_builtins(report), "clean": report.clean})
    else:
        for finding in report.findings:
            click.echo(
                f"{finding.code} at block {finding.block}: {finding.message}" + (" (repaired)" * finding.repaired)
            )
        click.echo(images.summary(report))
    if not report.repaired:
        raise SystemExit(1)
