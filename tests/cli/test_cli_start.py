"""The command starts fast: what its helps import, measured in fresh processes by what is in `sys.modules`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from s3loader.cli.main import COMMANDS, root
from s3loader.datagen import OBJECT_TYPES

HEAVY = {
    *("asyncio", "boto3", "botocore", "h5py", "jax", "multiprocessing", "numpy", "obstore", "pyarrow", "rich", "ssl"),
    *("tensorflow", "torch", "zstandard"),
    *(
        "s3loader.checkpoint",
        "s3loader.loader",
        "s3loader.oplog",
        "s3loader.packing",
        "s3loader.store",
        "s3loader.toolbox.single",
    ),
}

SCRIPT = """
import contextlib, io, json, sys
from s3loader.cli.main import main
found = {}
for arguments in json.loads(sys.stdin.read()):
    sys.argv = ["s3loader", *arguments]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main()
    found[" ".join(arguments)] = [out.getvalue()[:6], sorted(sys.modules)]
print(json.dumps(found))
"""


def imported(*runs: list[str]) -> dict[str, set[str]]:
    """The modules that are there after each of `runs` of the command, one after the other in one fresh process."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=json.dumps(runs), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {start for start, _ in found.values()} <= {"Usage:", "s3load"}
    return {name: set(modules) for name, (_, modules) in found.items()}


def test_the_help_imports_no_command() -> None:
    for modules in imported(["--help"], ["--version"]).values():
        assert not modules & HEAVY
        assert {name for name in modules if name.startswith("s3loader.cli.")} == {"s3loader.cli.main"}


def every_command() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """The words and the command, of each that does something; under one of its names."""

    def below(words: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
        if not isinstance(command, click.Group):
            yield words, command
        for name, child in command.commands.items() if isinstance(command, click.Group) else ():
            yield from below((*words, name), child)

    seen = {id(command): (name, command) for name in sorted(COMMANDS, reverse=True) for command in [command_of(name)]}
    for name, command in seen.values():
        yield from below((name,), command)


def test_the_help_of_no_command_imports_what_is_heavy() -> None:
    runs = [[name, "--help"] for name in COMMANDS] + [[*words, "--help"] for words, _ in every_command() if len(words) > 1]
    for name, modules in imported(*runs).items():
        assert not modules & HEAVY, name


def command_of(name: str) -> click.Command:
    command = root.get_command(click.Context(root), name)
    assert command is not None
    return command


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_of_the_list_is_there(name: str) -> None:
    command = command_of(name)
    assert command.get_short_help_str()
    text = COMMANDS[name][1]
    assert text.endswith(".")
    assert len(text) < 90


def test_gen_offers_every_kind_of_object() -> None:
    (kind,) = [option for option in command_of("gen").params if option.name == "object_type"]
    assert isinstance(kind.type, click.Choice)
    assert tuple(kind.type.choices) == OBJECT_TYPES


NO_DATA = {("completion",), ("oplog", "plot"), ("oplog", "merge")}
"""What they print is no data: a script, a page, how many rows went into a file."""


def options_of(command: click.Command) -> set[str]:
    return {name for option in command.params if isinstance(option, click.Option) for name in option.opts}


def test_every_command_that_prints_data_prints_json() -> None:
    assert {words for words, command in every_command() if "--json" not in options_of(command)} == NO_DATA


def test_every_command_that_deletes_can_say_what_it_would_delete() -> None:
    deleting = {
        words
        for words, command in every_command()
        if {"delete", "rm", "gc", "rollback", "delete-bucket"} & {*words}
        or any(option.startswith("--delete") for option in options_of(command))
        or (command.help or "").lower().startswith(("delete", "remove"))
    }
    assert len(deleting) >= 7
    assert {
        words for words, command in every_command() if words in deleting and "--dry-run" not in options_of(command)
    } == set()
