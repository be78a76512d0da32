"""The root of the command: commands load when they are called, errors become two lines and an exit code.

Exit codes: 0 ok, 1 some failed, 2 usage, 3 configuration or credentials, 4 not found, 5 temporary
(trying again may help), 6 integrity, 130 interrupted, 141 the reader of our output went away.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any, Final

import click

from s3loader import errors

__all__ = ["exit_code", "main"]

COMMANDS: Final = {
    "bench": ("cmd_bench:bench", "Measure a store of yours: gets, puts, loading, checkpoints; give advice."),
    "check": ("cmd_datasets:check", "Look for torn samples in a dataset."),
    "ckpt": ("cmd_ckpt:ckpt", "Look at, check, compare, export and clean up checkpoints."),
    "completion": ("cmd_setup:completion", "Print the script that completes commands in bash, zsh or fish."),
    "config": ("cmd_setup:config", "Show settings and where each comes from."),
    "copy": ("cmd_objects_move:copy", "The same as cp."),
    "cp": ("cmd_objects_move:copy", "Copy objects or files, between any two stores, or a store and this machine."),
    "create-bucket": ("cmd_objects_write:create_bucket", "Make a bucket, or a local folder."),
    "delete": ("cmd_objects_write:delete", "The same as rm."),
    "delete-bucket": ("cmd_objects_write:delete_bucket", "Delete a bucket, which must be empty."),
    "doctor": ("cmd_setup:doctor", "Examine a store: conditions, checksums, clock, credentials, bandwidth; give advice."),
    "download": ("cmd_objects_move:download", "Write objects as files in a folder."),
    "du": ("cmd_objects_read:du", "Add up sizes, by folder."),
    "gen": ("cmd_gen:gen", "Write made-up objects: no two alike, the same for the same seed."),
    "get": ("cmd_objects_read:get", "Read objects, and say how fast."),
    "index": ("cmd_datasets:index", "Make the indexes of tar shards that are missing or outdated."),
    "list": ("cmd_objects_read:list_objects", "The same as ls."),
    "list-buckets": ("cmd_objects_read:list_buckets", "List the buckets that the credentials own."),
    "loader": ("cmd_loader:loader", "Show a dataset: samples, shards, classes, sizes, pictures, what an epoch costs."),
    "ls": ("cmd_objects_read:list_objects", "List objects."),
    "ls-samples": ("cmd_datasets:ls_samples", "List the samples of a dataset: keys, members, sizes, shards."),
    "manifest": ("cmd_manifest:manifest", "Show, make, extend, join, compact and delete manifests."),
    "mp-get": ("cmd_objects_read:mp_get", "Read objects in several processes, and say how fast."),
    "oplog": ("cmd_oplog:oplog", "Logs of requests: sum up, draw, merge, replay."),
    "pack": ("cmd_pack:pack", "Pack a folder, a table or another dataset into shards, ready to train on."),
    "put": ("cmd_objects_write:put", "Write objects of made-up data, and say how fast; upload writes files."),
    "repack": ("cmd_datasets:repack", "Write a dataset anew, in shards of another size."),
    "rm": ("cmd_objects_write:delete", "Delete objects."),
    "stat": ("cmd_objects_read:stat", "Show what the store says of one object."),
    "sync": ("cmd_objects_move:sync", "Make one folder hold what another holds."),
    "top": ("cmd_loader:top", "Follow the loaders of a running job."),
    "upload": ("cmd_objects_write:upload", "Write local files, folders and globs below a URL."),
}
"""Where each command is (a module of this package and its name there), and what the list of commands says of it."""

_CODES: Final[tuple[tuple[type[BaseException], int], ...]] = (
    (errors.SourceNotFoundError, 4),
    (errors.ConfigError, 3),
    (errors.AccessDeniedError, 3),
    (errors.IntegrityError, 6),
    (errors.ObjectNotFoundError, 4),
    (errors.CheckpointNotFoundError, 4),
)


_REDIRECTS: Final = (301, 302, 307, 308)
_OTHER_REGION: Final = ("IllegalLocationConstraintException", "InvalidLocationConstraint")
"""The bucket or the endpoint is of another region than was said."""


class _ReaderGoneError(Exception):
    """Nobody reads our output any more. (Of a BrokenPipeError click makes an exit code of its own.)"""


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is named."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _ReaderGoneError from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, without importing anything."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command called `cmd_name`."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(f"s3loader.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in the help, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="s3loader")
@click.option("-v", "--verbose", count=True, help="Log what happens: -v informs, -vv debugs.")
@click.option("--op-log", metavar="FILE", help="Write each request to FILE (.tsv.zst), as warp does.")
@click.option("--endpoint-url", help="URL of the S3 server.")
@click.option("--region", help="Region of the bucket.")
@click.option("--profile", help="Profile of ~/.aws/config.")
@click.option("--ca-bundle", help="PEM file of the authorities to trust.")
@click.option("--anonymous", is_flag=True, help="Send requests without credentials.")
@click.pass_context
def root(
    ctx: click.Context,
    verbose: int,
    op_log: str | None,
    endpoint_url: str | None,
    region: str | None,
    profile: str | None,
    ca_bundle: str | None,
    anonymous: bool,
) -> None:
    """Training data and checkpoints between object stores and PyTorch, TensorFlow and JAX."""
    if verbose:
        import logging

        logging.basicConfig(level=logging.INFO if verbose == 1 else logging.DEBUG, format="%(levelname)s %(name)s: %(message)s")
    for variable, value in zip(_VARIABLES, (endpoint_url, region, profile, ca_bundle), strict=True):
        if value is not None:
            os.environ[variable] = value  # for every command, and its processes
    if anonymous:
        from s3loader.store.options import StoreOptions
        from s3loader.toolbox.stores import configure

        configure(options=StoreOptions(unsigned=True))
    if op_log is not None:
        from s3loader.oplog import finalize_op_log, init_op_log

        init_op_log(op_log)
        ctx.call_on_close(finalize_op_log)


_VARIABLES: Final = ("S3_ENDPOINT_URL", "S3_REGION", "AWS_PROFILE", "AWS_CA_BUNDLE")


def exit_code(error: BaseException) -> int:
    """The exit code an error ends the command with."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    if isinstance(error, errors.StoreError) and (error.status in _REDIRECTS or error.code in _OTHER_REGION):
        return 3
    return 5 if isinstance(error, errors.S3LoaderError) and error.retryable else 1


def main() -> None:
    """Run the command line and exit."""
    try:
        root.main(standalone_mode=False, complete_var="_S3LOADER_COMPLETE")
    except click.ClickException as error:
        error.show()
        if isinstance(error, click.NoSuchOption) and any(error.option_name in param.opts for param in root.params):
            click.echo(
                f"hint: {error.option_name} stands before the command: s3loader {error.option_name} ... COMMAND", err=True
            )
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
    except _ReaderGoneError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at exit
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if os.environ.get("S3LOADER_DEBUG"):
            raise
        click.echo(f"error: {type(error).__name__}: {error}", err=True)
        click.echo("hint: S3LOADER_DEBUG=1 shows the traceback", err=True)
        sys.exit(1)
    sys.exit(0)
