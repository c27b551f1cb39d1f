"""`corral demo`."""

from pathlib import Path

import click

from corral.cli.output import json_option, print_json, print_table, tell


@click.command()
@json_option
@click.option("--keep-logs", type=click.Path(path_type=Path), help="Where to put the logs if a check fails.")
def demo(as_json: bool, keep_logs: Path | None) -> None:
    """Run the main job on this machine: three nodes, one filesystem, one kill -9; every promise checked.

    Exit status 0 only when every check passed."""
    from corral.cli.demo.runner import run

    rows, failed = run(tell, keep_logs)
    if as_json:
        print_json({"results": [{"what": what, "result": result} for what, result in rows], "failed": failed})
    else:
        print_table("", ("what", "result"), rows)
    if failed:
        click.echo(f"corral: the demo failed: {failed}", err=True)
        raise SystemExit(1)
    if not as_json:
        click.echo("every check passed")
