"""`corral dlm`: the lock manager held against recordings of the kernel's."""

from pathlib import Path

import click

from corral.base.errors import ClusterError
from corral.cli.output import json_option, print_json
from corral.dlm.replay import Malformed, Mismatch, Parting, replay, runs


@click.group()
def dlm() -> None:
    """The lock manager: replay of kernel traces."""


@dlm.command("replay")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@json_option
@click.pass_context
def replay_command(context: click.Context, files: tuple[Path, ...], as_json: bool) -> None:
    """Play the recorded runs in FILES against a lockspace of this process and print every difference.

    Status 0 only when no run differs. docs/design/dlm-oracle.md tells the format, and why some run can be compared only
    up to some step; such a place is printed on stderr.
    """
    passed = failed = 0
    mismatches: list[Mismatch] = []
    partings: list[Parting] = []
    for file in files:
        try:
            for run in runs(file.read_text()):
                found, parting = replay(run)
                passed, failed = (passed, failed + 1) if found else (passed + 1, failed)
                mismatches.extend(found)
                if not as_json:
                    for mismatch in found:
                        click.echo(f"{file}: {mismatch}")
                if parting is not None:
                    partings.append(parting)
                    click.echo(f"{file}: {parting}", err=True)
        except (Malformed, UnicodeDecodeError, OSError) as error:
            raise ClusterError(f"{file} is not a recording of lock manager runs: {error}") from None
    if as_json:
        print_json(
            {
                "passed": passed,
                "failed": failed,
                "mismatches": [mismatch._asdict() for mismatch in mismatches],
                "partings": [parting._asdict() for parting in partings],
            }
        )
    else:
        click.echo(f"{passed} passed, {failed} failed")
    context.exit(1 if failed else 0)
