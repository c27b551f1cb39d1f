"""Tables that grow without a pause: resources by name, and locks of this process by address.

A dict that is full is copied into one twice as large; with a million entries that stops everything for tens of
milliseconds. So neither table is one dict. Names are spread over shards by their checksum: each is small, and they do
not fill up at the same moment. Addresses, which clients count up, are cut into pages.
"""

from collections.abc import Iterator
from typing import Final, final
from zlib import crc32

from corral.dlm.resource import Lock, Resource

SHARD_SHIFT: Final = 26  # the upper bits of the checksum; what is left by the number of members chooses the directory
SHARDS: Final = 64
PAGE_SHIFT: Final = 14  # of an address, client << 32 | handle
CLIENT_SHIFT: Final = 32 - PAGE_SHIFT  # of a page's number


@final
class Names:
    """Resources by name, in no order that means anything: whoever decides by it sorts."""

    __slots__ = ("_shards",)

    def __init__(self) -> None:
        self._shards: list[dict[bytes, Resource]] = [{} for _ in range(SHARDS)]

    def get(self, name: bytes) -> Resource | None:
        return self._shards[crc32(name) >> SHARD_SHIFT].get(name)

    def make(self, name: bytes) -> Resource:
        """A new one; its master is unknown."""
        resource = Resource(name, None)
        self._shards[crc32(name) >> SHARD_SHIFT][name] = resource
        return resource

    def remove(self, name: bytes) -> None:
        del self._shards[crc32(name) >> SHARD_SHIFT][name]

    def clear(self) -> None:
        for shard in self._shards:
            shard.clear()

    def in_order(self) -> list[Resource]:
        """All of them by name."""
        return [resource for _, resource in sorted(item for shard in self._shards for item in shard.items())]

    def __iter__(self) -> Iterator[bytes]:
        return (name for shard in self._shards for name in shard)

    def __len__(self) -> int:
        return sum(len(shard) for shard in self._shards)


@final
class Addresses:
    """Locks of this process by address, a client's together. A client is known from its first lock until `forget`."""

    __slots__ = ("_clients", "_pages")

    def __init__(self) -> None:
        self._pages: dict[int, dict[int, Lock]] = {}
        self._clients: dict[int, list[int]] = {}  # numbers of its pages, the one made last at the end

    def get(self, address: int) -> Lock | None:
        page = self._pages.get(address >> PAGE_SHIFT)
        return None if page is None else page.get(address)

    def page(self, address: int) -> dict[int, Lock]:
        """Where the lock of this address is, or belongs."""
        page = self._pages.get(address >> PAGE_SHIFT)
        return self._open(address >> PAGE_SHIFT) if page is None else page

    def remove(self, address: int) -> None:
        del self._pages[address >> PAGE_SHIFT][address]

    def of(self, client: int) -> list[Lock]:
        """A client's locks by handle."""
        pages = [self._pages[number] for number in sorted(self._clients.get(client, ()))]
        return [lock for page in pages for _, lock in sorted(page.items())]

    def in_order(self) -> list[Lock]:
        """All of them by address."""
        return [lock for client in sorted(self._clients) for lock in self.of(client)]

    def forget(self, client: int) -> bool:
        """A client without locks; False if it has some."""
        numbers = self._clients.get(client, [])
        if any(self._pages[number] for number in numbers):
            return False
        for number in numbers:
            del self._pages[number]
        self._clients.pop(client, None)
        return True

    def clear(self) -> None:
        self._pages.clear()
        self._clients.clear()

    @property
    def clients(self) -> list[int]:
        return sorted(self._clients)

    def _open(self, number: int) -> dict[int, Lock]:
        """A new page of a client; those that have become empty are dropped on this occasion."""
        client = number >> CLIENT_SHIFT
        used = []
        for other in self._clients.get(client, ()):
            if self._pages[other]:
                used.append(other)
            else:
                del self._pages[other]
        self._clients[client] = [*used, number]
        page: dict[int, Lock] = {}
        self._pages[number] = page
        return page
