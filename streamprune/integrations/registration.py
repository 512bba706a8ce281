"""Telling transformers of the packed format as soon as it is there, without waiting for it.

`import streamprune` calls `register`: at once where transformers' table of quantisers was imported before, else when
somebody imports it. So the package and its command line start without transformers.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

TABLE, PLUG_IN = "transformers.quantizers.auto", "streamprune.integrations.huggingface"


class _Watch(importlib.abc.MetaPathFinder):
    """Imports the plug-in once the table has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The table's own spec, whose loader goes on to the plug-in; None for other modules."""
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == TABLE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_go_on(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(PLUG_IN)

        spec.loader.exec_module = execute_and_go_on  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Have `from_pretrained` load outputs from now on. Calling it again changes nothing."""
    if TABLE in sys.modules:
        importlib.import_module(PLUG_IN)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
