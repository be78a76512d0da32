"""The command starts fast: what its helps import, measured in fresh processes by what is in `sys.modules`."""

from __future__ import annotations

import json
import subprocess
import sys

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


def test_the_help_of_no_command_imports_what_is_heavy() -> None:
    runs = [[name, "--help"] for name in COMMANDS]
    runs += [["oplog", "plot", "--help"], ["ckpt", "ls", "--help"], ["config", "show", "--help"]]
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
