"""The command line, run inside the test's own process."""

import inspect
from typing import Any

from click.testing import CliRunner, Result

from streamprune.cli import cli

# click before 8.2 puts standard error into standard output unless it is told not to
APART: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}


def run(*arguments: object, **settings: Any) -> Result:
    return CliRunner(**APART).invoke(
        cli, [str(argument) for argument in arguments], prog_name="streamprune", **settings
    )
