"""corral: the command line. One sub-command a package; each file beside this one is one group of commands.

Exit status: 0 done, 1 the cluster said no or could not, 2 wrong usage, 3 wrong configuration.
"""

import os
import sys
from typing import Any

import click

import corral
from corral.base.errors import ClusterError, ConfigurationError

ENGINES = "compiled engines" if corral.compiled() else "engines in pure Python"


class Sentences(click.Group):
    """Errors a person sees are one sentence with the cause and the next step, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            click.echo(f"corral: {error}", err=True)
            ctx.exit(3)
        except ClusterError as error:
            click.echo(f"corral: {error}", err=True)
            ctx.exit(1)
        except BrokenPipeError:
            # The reader of our output has gone, as `head` does: nothing to tell, nobody to tell it to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        return None


@click.group(cls=Sentences, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    envvar="CORRAL_SOCKET",
    default="/run/corral/corrald.sock",
    show_default=True,
    show_envvar=True,
    help="Unix socket of the corrald to talk to.",
)
@click.version_option(package_name="corral", message=f"%(prog)s %(version)s, {ENGINES}")
@click.pass_context
def main(context: click.Context, socket: str) -> None:
    """Cluster services for Linux: membership, fencing, locks and a shared-disk filesystem."""
    context.obj = socket


def _register() -> None:
    from corral.cli import cman, dlm, fence, gfs, local
    from corral.cli.demo.command import demo

    for command in (demo, local.up, local.down, local.node, local.status, cman.cman, fence.fence, dlm.dlm, gfs.gfs):
        main.add_command(command)


_register()

if __name__ == "__main__":
    main()
