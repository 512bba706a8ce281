"""The command line, run inside the test's own process."""

from typing import Any

from click.testing import CliRunner, Result

from streamprune.cli import cli


def run(*arguments: object, **settings: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="streamprune", **settings)
