"""The command line: one file a command; each parses, calls the library and prints."""

from __future__ import annotations

import sys

import typer

from eigendamage._version import __version__
from eigendamage.cli._compare import compare_command
from eigendamage.cli._compress import compress_command
from eigendamage.cli._demo import demo_command
from eigendamage.cli._processes import in_one_process, processes, speaker
from eigendamage.cli._sweep import sweep_command
from eigendamage.errors import EigenDamageError

app = typer.Typer(
    name="eigendamage",
    help="Make trained PyTorch networks smaller and faster by their curvature.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("demo")(in_one_process(demo_command))
app.command("compress")(compress_command)
app.command("sweep")(in_one_process(sweep_command))
app.command("compare")(in_one_process(compare_command))


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Make trained PyTorch networks smaller and faster by their curvature.

    Exit codes: 0 all went well; 1 the library refused, and said why; 2 wrong usage.
    """


def main() -> None:
    """Entry point: errors of the library become one line on standard error and exit code 1."""
    try:
        with processes():
            app()
    except (EigenDamageError, OSError) as error:
        print(f"{speaker()}: {error}", file=sys.stderr)
        sys.exit(1)
