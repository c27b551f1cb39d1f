"""What no linter checks: documents that name what exists, numbered invariants, files of one idea, no leftovers."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TESTS = sorted(path for path in (ROOT / "tests").rglob("*") if path.suffix in (".py", ".txt"))
PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))

INVARIANT = re.compile(r"\b(?:CMAN|LIFT|COMM|FENCE|DLM|GFS|FUSE|WORLD|SIM)-[1-9]\d*\b")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
NAMED_FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|txt|toml))`")

LINES_MAX = 800
LEFTOVERS = (
    (re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b"), "a leftover marker"),
    (re.compile(r"\bissue[ #]+\d", re.IGNORECASE), "the number of a ticket"),
    (re.compile(r"(?<![\w./])/(?:root|work|Users|home/\w+)/\w"), "a path of somebody's machine"),
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- invariants ------------------------------------------------------------------------------------------------------


def cited() -> dict[str, str]:
    """Every invariant that code or tests name, with one file that does."""
    found: dict[str, str] = {}
    for path in (*SOURCES, *TESTS):
        for number in INVARIANT.findall(path.read_text()):
            found.setdefault(number, name(path))
    return found


def documented() -> list[str]:
    page = (ROOT / "docs" / "invariants.md").read_text()
    return re.findall(rf"^\| ({INVARIANT.pattern}) \|", page, flags=re.M)


def test_every_invariant_cited_is_documented() -> None:
    missing = {number: where for number, where in cited().items() if number not in documented()}
    assert not missing, f"docs/invariants.md lacks {missing}"


def test_every_invariant_documented_is_cited_and_once() -> None:
    numbers = documented()
    assert len(numbers) == len(set(numbers))
    unused = set(numbers) - set(cited())
    assert not unused, f"nothing in src or tests cites {sorted(unused)}"


def test_invariants_are_asserted_where_the_page_says() -> None:
    rows = re.findall(
        rf"^\| ({INVARIANT.pattern}) \|[^|]*\|([^|]*)\|", (ROOT / "docs/invariants.md").read_text(), flags=re.M
    )
    for number, where in rows:
        if not where.strip().startswith("-"):
            for path in re.findall(r"`([^`]+)`", where):
                text = (ROOT / "src" / "corral" / path).read_text()
                assert f'"{number}"' in text or f'"{number}:' in text, f"{path} does not assert {number}"


# --- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_files_named_in_a_page_exist(page: Path) -> None:
    text = page.read_text()
    links = [target for target in LINK.findall(text) if "://" not in target and not target.startswith("mailto:")]
    broken = [target for target in links if not (page.parent / target).exists()]
    bases = (ROOT, ROOT / "src" / "corral")
    named = [path for path in NAMED_FILE.findall(text) if path.split("/")[0] in TOP]
    broken += [path for path in named if not any((base / path).exists() for base in bases)]
    assert not broken, f"{name(page)} names what is not there: {broken}"


TOP = {"src", "tests", "docs", "bench"} | {path.name for path in (ROOT / "src" / "corral").iterdir() if path.is_dir()}


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_source_file_is_one_idea() -> None:
    for path in SOURCES:
        lines = len(path.read_text().splitlines())
        assert lines <= LINES_MAX, f"{name(path)} has {lines} lines, more than {LINES_MAX}: split it"


def test_no_leftovers() -> None:
    mine = Path(__file__)
    found = [
        f"{name(path)}:{number}: {what}"
        for path in (*SOURCES, *TESTS, *PAGES, *(ROOT / "bench").glob("*.py"))
        if path != mine
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for pattern, what in LEFTOVERS
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)
