"""docs/cli.md says what the commands take: it is made from them by ``python tests/cli/test_cli_reference.py``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

import s3loader.cli.main as cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"

HEAD = """# The command

<!-- made by: python tests/cli/test_cli_reference.py -->

`s3loader`, `python -m s3loader` and `s3-cli` are one command; under the name `s3-cli` the last component of a URL may be a
regular expression, as s3dlio has it, else a glob. `s3loader COMMAND --help` says the same as this page.

Data goes to stdout (with `--json` as one JSON document), progress and errors to stderr. An error is two lines, what and a hint;
`S3LOADER_DEBUG=1` shows the traceback.

"""


def reference() -> str:
    """The page: the options of all commands, then each command once, under all its names."""
    _, _, codes = (inspect.getdoc(cli) or "").partition("\n\n")
    names: dict[int, tuple[click.Command, list[str]]] = {}
    for name in cli.COMMANDS:
        command = cli.root.get_command(click.Context(cli.root), name)
        assert command is not None
        names.setdefault(id(command), (command, []))[1].append(name)
    lines = [HEAD + codes, "", "## Before the command", "", "`s3loader [OPTIONS] COMMAND ...`", "", *options(cli.root)]
    for command, called in names.values():
        lines += section(command, sorted(called, key=len), "s3loader", "##")
    return "\n".join(lines).rstrip() + "\n"


def section(command: click.Command, called: list[str], before: str, mark: str) -> Iterator[str]:
    """What one command takes, and for a group its commands."""
    path = f"{before} {called[0]}"
    yield from ("", f"{mark} {', '.join(called)}" if mark == "##" else f"{mark} {path.removeprefix('s3loader ')}", "")
    taken = [argument(param) for param in command.params if isinstance(param, click.Argument)]
    rest = "COMMAND ..." if isinstance(command, click.Group) else " ".join(["[OPTIONS]", *taken])
    yield from (f"`{path} {rest}`", "", inspect.cleandoc(command.help or ""))
    yield from ("", *table) if (table := list(options(command))) else ()
    if isinstance(command, click.Group):
        for name, below in sorted(command.commands.items()):
            yield from section(below, [name], path, "###")


def argument(param: click.Argument) -> str:
    """How an argument stands in the usage line."""
    name = (param.metavar or str(param.name).upper()).removesuffix("...")
    name += "..." if param.nargs == -1 else ""
    return name if param.required else f"[{name}]"


def options(command: click.Command) -> Iterator[str]:
    """The options as a table."""
    rows = [row(param) for param in command.params if isinstance(param, click.Option)]
    if rows:
        yield from ("| option | takes | default | |", "|---|---|---|---|", *rows)


def row(option: click.Option) -> str:
    """One option."""
    takes, kind = "", option.type
    if isinstance(kind, click.Choice):
        takes = ", ".join(kind.choices)
    elif isinstance(kind, click.IntRange) and not option.count:
        takes = "number" + ("" if kind.min is None else f" from {kind.min}")
    elif not option.is_flag and not option.count:
        takes = option.metavar or {"integer": "number", "float": "number"}.get(kind.name, kind.name)
    takes += ", several times" if option.multiple else ""
    default = f"`{option.default}`" if option.show_default else ""
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len))
    return f"| {names} | {takes} | {default} | {option.help or ''} |"


def test_the_page_is_what_the_commands_take() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python tests/cli/test_cli_reference.py"


def test_every_option_says_what_it_does() -> None:
    def below(command: click.Command) -> Iterator[click.Command]:
        yield command
        for child in command.commands.values() if isinstance(command, click.Group) else ():
            yield from below(child)

    commands = [cli.root.get_command(click.Context(cli.root), name) for name in cli.COMMANDS]
    silent = {
        f"{command.name} {option.opts[0]}"
        for top in commands
        if top is not None
        for command in below(top)
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    }
    assert not silent


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
