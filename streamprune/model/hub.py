"""A model by its name on a model hub: a snapshot in the hub's cache, to which missing files are downloaded.

A snapshot is a folder of links to files, named after the commit; no code of it is run.
"""

import glob
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from streamprune.checkpoint.manifest import read_manifest
from streamprune.checkpoint.packed import MANIFEST_FILE
from streamprune.checkpoint.reader import BIN_FILE, SAFETENSORS_FILE, SAFETENSORS_INDEX
from streamprune.config import path_of
from streamprune.errors import CheckpointError, Interrupted, StreampruneError

REVISION = re.compile(r"(?!.*\.\.)\w[\w.+/-]{0,200}", re.ASCII)  # a branch, a tag or a commit, and no path out of refs/
FILES = (
    *("*.safetensors", "*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja"),
    *("*.md", "LICEN[CS]E*", "COPYING*", "NOTICE*"),
    *("*.st", "*.sha256"),  # of an output
)
BIN = (f"{Path(BIN_FILE).stem}*.bin",)
OTHER_WEIGHTS = ("*/*.safetensors", "consolidated*")  # the same model in another form


def folder_of(
    setting: str, value: Any, progress: bool = False, should_stop: Callable[[], bool] = lambda: False
) -> Path:
    """The folder that a setting names: itself, or for ORG/MODEL or ORG/MODEL@REVISION a snapshot in the hub's cache.

    What exists is a path, whatever it looks like. `progress` shows a download where there is a terminal. Raises
    SettingsError for what is no path, CheckpointError for a name that cannot be resolved, Interrupted where a download
    should stop.
    """
    path = path_of(setting, value)
    named = None if os.path.lexists(path) else parse_name(os.fspath(value))
    if named is None:
        return path
    with _one_line(os.fspath(value)):
        return _snapshot(*named, _bars(progress and sys.stderr.isatty(), should_stop))


def parse_name(text: str) -> tuple[str, str | None] | None:
    """A model's name on a hub, and its revision where one is given; None for what can be no such name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    name, at, revision = text.partition("@")
    if name.count("/") != 1 or (at and not REVISION.fullmatch(revision)):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name, revision or None


def _snapshot(model: str, revision: str | None, bars: type) -> Path:
    """The snapshot of a model with all that a job takes of it; raises the hub's errors."""
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, model, ignore_patterns=list(OTHER_WEIGHTS), tqdm_class=bars)
    folder = Path(fetch(revision=revision, allow_patterns=list(FILES)))
    if more := _more(folder):
        fetch(revision=folder.name, allow_patterns=more)
    return folder


def _more(folder: Path) -> list[str]:
    """Patterns of the other files that are needed: all of an output's; .bin where there are no safetensors."""
    if (folder / MANIFEST_FILE).exists():
        with suppress(CheckpointError):  # whoever reads it says so
            return [glob.escape(name) for name in read_manifest(folder / MANIFEST_FILE).files]
    return [] if any((folder / name).exists() for name in (SAFETENSORS_FILE, SAFETENSORS_INDEX)) else list(BIN)


def _bars(shown: bool, should_stop: Callable[[], bool]) -> type:
    """Progress bars, shown or not, through which a download is stopped."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **(settings if shown else {**settings, "disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            if should_stop():
                raise Interrupted("stopped while the model is downloaded; the same command goes on with it")
            return super().update(n)

    return Bar


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Whatever keeps a hub's model away as one line."""
    from huggingface_hub import constants, errors

    from streamprune.model.configuration import one_line  # transformers, which imports the plug-in, which imports this

    try:
        yield
    except StreampruneError:
        raise
    except Exception as error:  # also those of its HTTP library, which is another in each major version
        hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
        away = "HF_HUB_OFFLINE keeps from asking" if constants.HF_HUB_OFFLINE else "no answer comes from"
        reasons = (
            (errors.GatedRepoError, f"is gated on {hub}; ask for access on its page there, then give HF_TOKEN"),
            (
                errors.RepositoryNotFoundError,
                f"no such folder, and no such model on {hub}; check the name, or give HF_TOKEN if it is private",
            ),
            (errors.RevisionNotFoundError, f"no such revision on {hub}; give a branch, a tag or a commit of the model"),
            (
                errors.LocalEntryNotFoundError,
                f"no such folder, not whole in the cache {cache}, and {away} {hub}; give a folder, or download it",
            ),
        )
        other = f"cannot be fetched from {hub} ({one_line(error)}); mend that and run again"
        why = next((text for kind, text in reasons if isinstance(error, kind)), other)
        raise CheckpointError(f"{name}: {why}") from error
