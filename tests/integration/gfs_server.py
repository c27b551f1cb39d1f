"""Serves a real gfs on a fresh image, alone (no lockspace), until it is unmounted; then checks it with fsck.

python -m tests.integration.gfs_server DIR --image FILE [--minor N]
"""

import argparse
import json
import os
import sys
import tempfile

import uvloop

from corral import fuse
from corral.api.gfs import Filesystem, Notifier
from corral.gfs import fsck, mkfs
from corral.gfs.mount import mount
from corral.real.world import RealWorld

SIZE = 256 << 20


async def main(path: str, image: str, minor: int | None) -> None:
    world = RealWorld(tempfile.mkdtemp(dir=os.path.dirname(image)), guest=True)
    disk = await world.disk(image)
    await mkfs.format(world, disk, cluster="test", name="posix", journals=1)

    async def make(notifier: Notifier) -> Filesystem:
        filesystem = await mount(world, disk, None, slot=0, notifier=notifier)
        await filesystem.start(None)
        filesystem.finish(None)
        await filesystem.go_live()
        return filesystem

    limits = fuse.Limits() if minor is None else fuse.Limits(minor_max=minor)
    mounted = await fuse.mount(make, path, fuse.Options(limits=limits, devices=True, suid=True))
    print("mounted", flush=True)
    await mounted.run()
    report = await fsck.check(world, disk)
    json.dump({**mounted.session.statistics()._asdict(), "findings": [str(f) for f in report.findings]}, sys.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--image", required=True)
    parser.add_argument("--minor", type=int)
    arguments = parser.parse_args()
    with open(arguments.image, "wb") as file:
        file.truncate(SIZE)
    uvloop.run(main(arguments.path, arguments.image, arguments.minor))
