"""docs/format/ipc.md and store.md say what the code does, and so does the reference of docs/guide/fencing.md."""

import re
import tomllib
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import pytest

from corral.api.cman import Peer
from corral.api.dlm import Completion, LockInfo, LockWaits, Request, ResourceInfo
from corral.api.fence import Device, FenceConfig, Method, NodeFencing, parse_fencing
from corral.base.ids import MemberId
from corral.base.view import Round, View
from corral.node.status import Answers
from corral.providers import ipc_wire, page
from corral.real import store, stream

FORMATS = Path(__file__).parents[2] / "docs" / "format"
IPC = (FORMATS / "ipc.md").read_text()
STORE = (FORMATS / "store.md").read_text()
FENCING = (FORMATS.parent / "guide" / "fencing.md").read_text()

MESSAGES = [
    *ipc_wire.TO_CORRALD.types,
    *ipc_wire.FROM_CORRALD.types,
    *ipc_wire.TO_LOCK_SERVICE.types,
    *ipc_wire.FROM_LOCK_SERVICE.types,
]
HELD = {View: "View", Round: "Round", Peer: "Peer", Request: "Request", Completion: "Completion"}
HELD |= {ResourceInfo: "ResourceInfo", LockInfo: "LockInfo", LockWaits: "LockWaits"}


def section(document: str, heading: str) -> str:
    return re.split(r"^#+ ", document.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def table(document: str, heading: str, number: int = 0) -> list[list[str]]:
    """The rows of the n-th table under a heading."""
    tables = re.findall(r"(?:^\|.*\n)+", section(document, heading), flags=re.M)
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in tables[number].splitlines()][2:]


def word(kind: Any) -> str:
    """How the documents call a type."""
    plain = {int: "int", str: "str", bytes: "bin", bool: "bool", Any: "any", MemberId: "member"}
    if kind in plain:
        return plain[kind]
    if kind in HELD:
        return HELD[kind].lower()
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is dict:
        return "map"
    if type(None) in arguments:
        return f"{word(arguments[0])} or nil"
    if origin is list or arguments[-1] is Ellipsis:
        return f"array of {word(arguments[0])}"
    return f"({', '.join(word(argument) for argument in arguments)})"


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_messages_have_the_documented_tags_and_fields(message: type[msgspec.Struct]) -> None:
    assert section(IPC, message.__name__).strip().startswith(f"Tag {message.__struct_config__.tag}.")
    fields = [(int(row[0]), row[1], row[2].partition(", default")[0]) for row in table(IPC, message.__name__)]
    found = msgspec.structs.fields(message)
    assert fields == [(index, field.name, word(field.type)) for index, field in enumerate(found, 1)]
    optional = [row[1] for row in table(IPC, message.__name__) if "default" in row[2]]
    assert optional == [field.name for field in found if not field.required]


def test_no_message_is_documented_that_does_not_exist() -> None:
    tags = [int(tag) for tag in re.findall(r"^Tag (\d+)\.", IPC, flags=re.M)]
    assert tags == [message.__struct_config__.tag for message in MESSAGES]
    assert f"which is {ipc_wire.IPC_VERSION}." in IPC


def test_what_messages_hold_has_the_documented_fields() -> None:
    rows = {row[0]: row for row in table(IPC, "What the messages hold")}
    for held, title in HELD.items():
        config = getattr(held, "__struct_config__", None)
        assert rows[title][1] == ("map" if config is not None and not config.array_like else "array")
        names = re.findall(r"(\w+)(?: \([^()]*(?:\([^()]*\)[^()]*)*\))?(?:, |$)", rows[title][2])
        assert tuple(names) == (held._fields if config is None else held.__struct_fields__)


def test_every_question_is_documented() -> None:
    class Nobody: ...

    assert {row[0] for row in table(IPC, "Questions")} == set(Answers(Nobody())._table)  # type: ignore[arg-type]


def test_the_page_is_laid_out_as_documented() -> None:
    memory = memoryview(bytearray(page.PAGE_SIZE))
    writer = page.PageWriter(memory)
    writer.publish(5_000, 7)
    slots = [writer.add(40), writer.add(41)]
    writer.freeze(41)
    page.PageReader(memory, slots[1]).tick(blocked=True)
    words = memory.cast("Q")

    head = {row[2]: int(row[0]) // 8 for row in table(IPC, "The shared page")}
    line = {row[2]: (64 + 64 * 1 + int(row[0])) // 8 for row in table(IPC, "The shared page", 1)}
    assert bytes(memory[:8]) == b"corralP1"
    assert [words[head[name]] for name in ("sequence", "lease_until", "round", "progress")] == [2, 5_000, 7, 1]
    assert [words[line[name]] for name in ("frozen", "progress", "serial", "blocked")] == [1, 1, 41, 1]
    for rows, total in ((table(IPC, "The shared page"), 64), (table(IPC, "The shared page", 1), 64)):
        assert [int(row[0]) for row in rows] == [sum(int(r[1]) for r in rows[:n]) for n in range(len(rows))]
        assert sum(int(row[1]) for row in rows) == total
    assert f"there are {page.LINES}." in IPC


def test_stores_and_streams_have_the_documented_numbers() -> None:
    frame = table(STORE, "Frame")
    sizes = [int(row[1]) for row in frame[:-1]]
    assert [int(row[0]) for row in frame] == [sum(sizes[:n]) for n in range(len(frame))]
    assert int(frame[0][3], 16) == store.FRAME_MAGIC
    assert table(STORE, "File")[0][3] == f'b"{store.MAGIC.decode()}"'
    assert f"above {stream.MESSAGE_LIMIT} " in STORE
    assert f"longer than {stream.GREETING_LIMIT} bytes" in STORE.replace("\n", " ")
    assert stream.GREETING == b"corral stream 1\n"


@pytest.mark.parametrize(
    ("heading", "table_type", "elsewhere"),
    [
        ("`[fence]`", FenceConfig, {"devices", "nodes"}),
        ("`[[fence.devices]]`", Device, set()),
        ("`[fence.nodes.N]`", NodeFencing, set()),
        ("`[[fence.nodes.N.methods]]`", Method, set()),
    ],
)
def test_the_fencing_reference_has_every_key_with_its_default(
    heading: str, table_type: type[msgspec.Struct], elsewhere: set[str]
) -> None:
    rows = {row[0]: row[1] for row in table(FENCING, heading)}
    fields = {field.name: field for field in msgspec.structs.fields(table_type) if field.name not in elsewhere}
    assert rows.keys() == fields.keys()
    for name, default in rows.items():
        field = fields[name]
        if field.required:
            assert default == ""
        elif isinstance(field.default, bool | int | float):
            assert tomllib.loads(f"x = {default}")["x"] == field.default
        else:
            assert default, name


def test_the_fencing_example_is_legal() -> None:
    example = tomllib.loads(FENCING.split("```toml\n", 1)[1].split("```", 1)[0])
    config = parse_fencing(example["fence"], [1, 2])
    assert [method.name for method in config.nodes[1].methods] == ["power", "by-hand"]
