"""One entry of the catalogue of malformed inputs, and how entries are listed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

Make = Callable[[Path], object]


@dataclass(frozen=True)
class Malformed:
    """An input that must be refused, or (`code` 0) must work.

    make gets a folder with `model`, a copy of the valid input `base`, and `text.txt`, and damages something there.
    command is what it is fed to; code and message are how that must end; text is the file given as text. With
    `journal` the job has begun: its work folder may be there, but no file of the output.
    """

    name: str
    base: str
    command: str
    code: int
    message: str
    make: Make
    why: str
    text: str = "text.txt"
    journal: bool = False

    @property
    def is_verified(self) -> bool:
        """Whether it is a fault that `verify` lists on standard output."""
        return self.command.startswith("verify") and self.code == 1

    def may_write(self, name: str) -> bool:
        """Whether a path of the case's folder may be new or changed afterwards."""
        return self.code == 0 or (self.journal and (name == "out" or name.startswith("out/.work")))


class Catalogue(list[Malformed]):
    """Entries of one kind of input, listed by decorating what makes them."""

    def entry(self, base: str, command: str, code: int, message: str = "", **settings: Any) -> Callable[[Make], Make]:
        """List a function as an entry: its name is the entry's, its docstring says why."""

        def listed(make: Make) -> Make:
            assert make.__doc__, f"{make.__name__} does not say why"
            self.put(make.__name__.replace("_", " "), base, command, code, message, make, make.__doc__, **settings)
            return make

        return listed

    def put(
        self, name: str, base: str, command: str, code: int, message: str, make: Make, why: str, **settings: Any
    ) -> None:
        """List an entry that is one of many of a pattern."""
        self.append(Malformed(f"{name} ({command})", base, command, code, message, make, why, **settings))


def config_with(**changes: Any) -> Make:
    """Change entries of config.json; None removes one."""

    def make(case: Path) -> None:
        path = case / "model" / "config.json"
        config = {**tiny.read_json(path), **changes}
        tiny.write_json(path, {name: value for name, value in config.items() if value is not None})

    return make
