"""docs/demo.svg: the picture of the running demo in the README, made from what `corral demo` really prints.

    .venv/bin/python bench/demo_picture.py                    # runs the demo (a minute or two), draws what it printed
    .venv/bin/python bench/demo_picture.py --from FILE        # draws a kept recording
    .venv/bin/python bench/demo_picture.py --keep FILE        # and keeps the recording

The demo runs on a pseudo-terminal, so that it prints what a person would see. Nothing is added; `--until TEXT` leaves
out what comes from the line with that text on, for a picture of the first steps.
"""

import argparse
import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 108
PICTURE = Path(__file__).parents[1] / "docs" / "demo.svg"


def record() -> bytes:
    """What `corral demo` wrote to its terminal. Exits when the demo fails: a failed run is no picture."""
    chunks: list[bytes] = []

    def read(terminal: int) -> bytes:
        data = os.read(terminal, 1 << 16)
        chunks.append(data)
        return data

    os.environ["COLUMNS"] = str(COLUMNS)
    status = os.waitstatus_to_exitcode(pty.spawn([sys.executable, "-m", "corral.cli.main", "demo"], read))
    if status:
        sys.exit(f"the demo ended with status {status}; no picture is made of that")
    return b"".join(chunks)


def draw(recording: bytes, until: str) -> str:
    lines = recording.decode().replace("\r\n", "\n").rstrip("\n").split("\n")
    if until:
        lines = lines[: next(number for number, line in enumerate(lines) if until in line)]
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, highlight=False, file=nowhere, force_terminal=True)
        console.print(Text("$ corral demo", style="bold"))
        for line in lines:
            text = Text.from_ansi(line)
            text.highlight_regex(r"^\[\d/\d\].*", "bold cyan")
            console.print(text, soft_wrap=True)
        picture = console.export_svg(title="corral demo")
    # A picture in a README fetches nothing: whatever fixed font the reader has will do.
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, help="a kept recording, instead of a run")
    parser.add_argument("--until", default="", metavar="TEXT", help="draw only what comes before the line with TEXT")
    parser.add_argument("--keep", type=Path, help="where to keep the recording")
    arguments = parser.parse_args()
    recording = arguments.source.read_bytes() if arguments.source else record()
    if arguments.keep:
        arguments.keep.write_bytes(recording)
    PICTURE.write_text(draw(recording, arguments.until))
    print(f"{PICTURE}: {len(recording)} bytes of output drawn")


if __name__ == "__main__":
    main()
