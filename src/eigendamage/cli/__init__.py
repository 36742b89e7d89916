"""The command line: one file a command; each parses, calls the library and prints."""

from __future__ import annotations

import sys

import typer

from eigendamage._version import __version__
from eigendamage.cli._compare import compare_command
from eigendamage.cli._compress import compress_command
from eigendamage.cli._demo import demo_command
from eigendamage.cli._exits import EPILOG, Exit, tell
from eigendamage.cli._export import export_command
from eigendamage.cli._processes import in_one_process, processes
from eigendamage.cli._sweep import sweep_command

app = typer.Typer(
    name="eigendamage",
    help="Make trained PyTorch networks smaller and faster by their curvature.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("demo", epilog=EPILOG)(in_one_process(demo_command))
app.command("compress", epilog=EPILOG)(compress_command)
app.command("sweep", epilog=EPILOG)(in_one_process(sweep_command))
app.command("compare", epilog=EPILOG)(in_one_process(compare_command))
app.command("export", epilog=EPILOG)(in_one_process(export_command))


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
    """Make trained PyTorch networks smaller and faster by their curvature."""


def main() -> None:
    """Entry point: an error is told in one line, or as JSON, and its class gives the exit code."""
    # A command line that cannot be parsed has no options yet: its words have to do.
    as_json = "--json" in sys.argv[1:]
    try:
        with processes():
            code = app(standalone_mode=not as_json)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  every one has its exit code
        sys.exit(tell(error, as_json=as_json))
    if code == Exit.INTERRUPTED:
        sys.exit(tell(KeyboardInterrupt(), as_json=as_json))
    sys.exit(code if isinstance(code, int) else Exit.OK)
