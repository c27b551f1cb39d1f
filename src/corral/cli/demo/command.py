"""`corral demo`."""

from pathlib import Path

import click

from corral.cli.output import json_option, print_json, print_table, tell


@click.command()
@json_option
@click.option("--no-fuse", is_flag=True, help="Reach files through corral's library, as where there is no FUSE.")
@click.option("--quick", is_flag=True, help="A small tree and less writing; every step and check all the same.")
@click.option("--keep-logs", type=click.Path(path_type=Path), help="Where to put the logs if a check fails.")
def demo(as_json: bool, no_fuse: bool, quick: bool, keep_logs: Path | None) -> None:
    """Run the main job on this machine: three nodes, one filesystem, one kill -9; every promise checked.

    Exit status 0 only when every check passed. Where FUSE is missing it goes through corral's library, and says so."""
    from corral.cli.demo.supervisor import run

    options = [option for option, given in (("--no-fuse", no_fuse), ("--quick", quick)) if given]
    outcome = run(options, tell, keep_logs)
    if as_json:
        results = [{"what": what, "result": result} for what, result in outcome.rows]
        print_json({"results": results, "failed": outcome.failed})
    else:
        print_table("", ("what", "result"), outcome.rows)
    if outcome.failed:
        click.echo(f"corral: the demo failed: {outcome.failed}", err=True)
        raise SystemExit(1)
    if not as_json:
        click.echo("every check passed")
