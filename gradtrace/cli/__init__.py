"""The command line: one file per command, each imported only when it is used."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from gradtrace.errors import GradtraceError

COMMANDS = (
    *("demo", "graph", "doctor", "train"),
    *("ls", "info", "query", "compare", "plot", "report", "export", "compact", "merge", "verify", "plugins"),
)
FAILURE, NOTHING_MATCHED, INTERRUPTED = 1, 3, 130


class LazyGroup(click.Group):
    """Finds a command in the module of its name, and turns errors into exit codes.

    0 success, 1 failure, 2 usage, 3 nothing matched, 130 interrupted. Only GradtraceError becomes a plain message; any
    other exception keeps its traceback, because it is a bug.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"gradtrace.cli.{cmd_name}").command
        return command

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        *,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """The command's result, or, standing alone, the end of the process with its exit code."""
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        sys.exit(self._exit_code(args, prog_name, **extra))

    def _exit_code(self, args: Sequence[str] | None, prog_name: str | None, **extra: Any) -> int:
        try:
            result = super().main(args, prog_name, standalone_mode=False, **extra)
            sys.stdout.flush()
            return result if isinstance(result, int) else 0
        except click.exceptions.Abort:
            click.echo("Interrupted.", err=True)
            return INTERRUPTED
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except GradtraceError as error:
            _tell(error)
            return FAILURE
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            _silence_stdout()
            return FAILURE


def _tell(error: GradtraceError) -> None:
    click.secho("Error: ", fg="red", bold=True, nl=False, err=True, color=False if os.environ.get("NO_COLOR") else None)
    click.echo(str(error), err=True)
    for note in getattr(error, "__notes__", ()):
        click.echo(note, err=True)


def _silence_stdout() -> None:
    """The reader of our output (`| head`) has left: keep the interpreter from complaining when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gradtrace")
@click.pass_context
def main(ctx: click.Context) -> None:
    """See how a network learns, and for whom: gradient spectra per group of samples.

    Data goes to stdout, everything else to stderr. Exit codes: 0 success, 1 failure, 2 usage, 3 nothing matched, 130
    interrupted.
    """
    if os.environ.get("NO_COLOR"):
        ctx.color = False
