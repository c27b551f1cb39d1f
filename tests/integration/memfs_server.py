"""Serves a MemoryFilesystem until it is unmounted: python -m tests.integration.memfs_server DIR [--minor N]."""

import argparse
import json
import sys

import uvloop

from corral import fuse
from tests.integration.memfs import MemoryFilesystem

SECOND = 1_000_000_000


async def main(path: str, minor: int | None, cache: bool) -> None:
    limits = fuse.Limits() if minor is None else fuse.Limits(minor_max=minor)
    valid = 60 * SECOND if cache else 0
    mounted = await fuse.mount(
        lambda notifier: MemoryFilesystem(notifier, entry_valid_ns=valid, attr_valid_ns=valid),
        path,
        fuse.Options(limits=limits),
    )
    print("mounted", flush=True)
    await mounted.run()
    json.dump(mounted.session.statistics()._asdict(), sys.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--minor", type=int)
    parser.add_argument("--cache", action="store_true")
    arguments = parser.parse_args()
    uvloop.run(main(arguments.path, arguments.minor, arguments.cache))
