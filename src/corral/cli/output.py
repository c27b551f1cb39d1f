"""How commands print: a table for people, one JSON document for programs, progress on standard error."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, sort_keys=True))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if title:
        click.echo(title)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(file=sys.stdout, highlight=False).print(table)


def tell(sentence: str) -> None:
    """Progress: what is being done or waited for."""
    click.echo(sentence, err=True)


def yes(condition: object) -> str:
    return "yes" if condition else "no"
