"""Write docs/cli.md from the command line's own help: `make docs`."""

import inspect
import textwrap
from pathlib import Path

import click

from streamprune.cli import cli
from streamprune.errors import EXIT_CODES

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Commands

Made from the commands' own `--help` by `make docs`; do not edit. Each command is also a function of the package, with
the same names and defaults, such as `streamprune.compress(model, out, pattern="2:4")`.
"""


def page() -> str:
    """The whole of docs/cli.md."""
    root = click.Context(cli, info_name="streamprune")
    commands = [section(f"## {name}", click.Context(one, root, name)) for name, one in cli.commands.items()]
    codes = [f"| {code} | {cell(meaning)} |" for code, meaning in EXIT_CODES.items()]
    exits = "\n".join(["## Exit codes\n", "| code | meaning |", "| --- | --- |", *codes])
    return "\n\n".join([HEAD.strip(), section("## All commands", root), *commands, exits]) + "\n"


def section(title: str, context: click.Context) -> str:
    """Usage, what a command does, its options, its examples."""
    command = context.command
    records = [option.get_help_record(context) for option in command.params if isinstance(option, click.Option)]
    rows = [f"| `{escaped(names)}` | {cell(text)} |" for names, text in filter(None, records)]
    examples = (command.epilog or "").partition("Examples:\n")[2]
    parts = [title, f"    {command.get_usage(context).removeprefix('Usage: ')}", inspect.cleandoc(command.help or "")]
    parts += ["\n".join(["| option | |", "| --- | --- |", *rows]), textwrap.indent(inspect.cleandoc(examples), " " * 4)]
    return "\n\n".join(part for part in parts if part.strip())


def cell(text: str) -> str:
    """A text in a table: on one line, without what markdown would take for something else."""
    return escaped(" ".join(text.split())).replace("<", "&lt;").replace("*", "\\*")


def escaped(text: str) -> str:
    """A bar would end the cell, in code too."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
