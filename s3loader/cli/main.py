"""The root of the command: commands load when they are called, errors become two lines and an exit code.

Exit codes: 0 ok, 1 some failed, 2 usage, 3 configuration or credentials, 4 not found, 5 temporary
(trying again may help), 6 integrity, 130 interrupted, 141 the reader of our output went away.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Final

import click

from s3loader import errors

__all__ = ["exit_code", "main"]

COMMANDS: Final = {
    "ckpt": "s3loader.cli.cmd_ckpt:ckpt",
    "config": "s3loader.cli.cmd_config:config",
    "doctor": "s3loader.cli.cmd_doctor:doctor",
}

_CODES: Final[tuple[tuple[type[BaseException], int], ...]] = (
    (errors.ConfigError, 3),
    (errors.AccessDeniedError, 3),
    (errors.IntegrityError, 6),
    (errors.ObjectNotFoundError, 4),
    (errors.CheckpointNotFoundError, 4),
)


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, without importing anything."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command called `cmd_name`."""
        where = COMMANDS.get(cmd_name)
        if where is None:
            return None
        module, _, attribute = where.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in the help."""
        rows = [(name, command.get_short_help_str(90)) for name in COMMANDS if (command := self.get_command(ctx, name))]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="s3loader")
def root() -> None:
    """Training data and checkpoints between object stores and PyTorch, TensorFlow and JAX."""


def exit_code(error: BaseException) -> int:
    """The exit code an error ends the command with."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return 5 if isinstance(error, errors.S3LoaderError) and error.retryable else 1


def main() -> None:
    """Run the command line and exit."""
    try:
        root.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except errors.S3LoaderError as error:
        if os.environ.get("S3LOADER_DEBUG"):
            raise
        head, _, hint = str(error).partition("\nhint: ")
        click.echo(f"error: {head}", err=True)
        click.echo(f"hint: {hint or 'S3LOADER_DEBUG=1 shows the traceback'}", err=True)
        sys.exit(exit_code(error))
    except (KeyboardInterrupt, click.Abort):
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at exit
        sys.exit(128 + signal.SIGPIPE)
    sys.exit(0)
