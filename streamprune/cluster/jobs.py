"""Jobs of `compress` written down: from a TOML file to the command of each, checked before anything is submitted.

[slurm]      options of sbatch by their long names
[defaults]   settings of `compress`, by their names in Python, for every job
[[jobs]]     the settings of one job, `model` and `out` among them; the first has index 0
"""

import functools
import inspect
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from streamprune.checkpoint.untrusted import read_bounded
from streamprune.config import FIELDS, PathLike, check_settings, config_of, path_of
from streamprune.errors import CheckpointError, SettingsError
from streamprune.pipeline.compress import compress
from streamprune.pipeline.planning.memory import Limits
from streamprune.pipeline.planning.plan import Resources
from streamprune.stopping import parse_seconds
from streamprune.text.calibration import Calibration

MAX_TOML_BYTES = 1 << 20
MAX_JOBS = 1000  # Slurm's own limit on an array's indexes, unless a site has raised it (MaxArraySize)
IN_PYTHON_ALONE = ("config", "progress", "should_stop")
OPTION_NAME = re.compile(r"[a-z][a-z-]*")


@dataclass(frozen=True)
class Jobs:
    """Settings of each job by its index, and options of sbatch."""

    settings: tuple[dict[str, Any], ...]
    slurm: dict[str, str]

    def arguments(self, index: int) -> list[str]:
        """Of `streamprune compress` for one job. Raises SettingsError for an index that no job has."""
        if not 0 <= index < len(self.settings):
            raise SettingsError(f"index {index} is of no job; there are {len(self.settings)}, from 0 on")
        return arguments_of(self.settings[index])


def read_jobs(jobs: PathLike | Sequence[Mapping[str, Any]]) -> Jobs:
    """Jobs of a TOML file, or given by their settings. Raises SettingsError naming the first that makes no sense."""
    if isinstance(jobs, str | os.PathLike):
        path = path_of("jobs", jobs)
        content = _toml(path)
    else:
        path, content = None, {"jobs": [dict(job) for job in jobs]}
    slurm, defaults, listed = (
        content.get(name, empty) for name, empty in (("slurm", {}), ("defaults", {}), ("jobs", []))
    )
    unknown = sorted(content.keys() - {"slurm", "defaults", "jobs"})
    if unknown or not isinstance(slurm, dict) or not isinstance(defaults, dict) or not isinstance(listed, list):
        raise SettingsError(f"{path}: holds {unknown or 'something'} other than [slurm], [defaults] and [[jobs]]")
    if not 0 < len(listed) <= MAX_JOBS or not all(isinstance(job, dict) for job in listed):
        raise SettingsError(f"{path or 'jobs'}: has {len(listed)} [[jobs]] where 1 to {MAX_JOBS} tables belong")
    settings = []
    for index, job in enumerate(listed):
        try:
            settings.append(check_job({**defaults, **job}))
        except SettingsError as error:
            raise SettingsError(f"{path}: job {index}: {error}" if path else str(error)) from error
    _check_apart([str(job["out"]) for job in settings])
    return Jobs(tuple(settings), check_options(slurm))


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_bounded(path, MAX_TOML_BYTES).decode())
    except CheckpointError as error:
        raise SettingsError(str(error)) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        raise SettingsError(f"{path}: is not TOML ({error})") from error


@functools.cache
def _defaults() -> dict[str, Any]:
    """What `compress` takes without being told."""
    parameters = inspect.signature(compress).parameters
    return {name: one.default for name, one in parameters.items() if name not in IN_PYTHON_ALONE}


def check_job(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one job, checked as `compress` checks them before it looks at the model.

    Raises SettingsError for what it would refuse, and for what a job that is run again and again cannot have.
    """
    if unknown := sorted(given.keys() - _defaults().keys()):
        raise SettingsError(f"{unknown[0]!r:.80} is no setting of compress")
    for name in ("model", "out"):
        if not isinstance(given.get(name), str) or not given[name]:
            raise SettingsError(f"{name} is missing; each job needs one, as a string")
    for name, value in given.items():
        if isinstance(value, str) and not value.isprintable():
            raise SettingsError(f"{name} {value!r:.80} has a character that cannot be printed, such as a line's end")
    if given["model"].startswith("-"):
        raise SettingsError(f"model {given['model']!r:.80} begins with a dash; write ./ before it")
    if given.get("restart"):
        raise SettingsError("restart would throw the output away each time the job is requeued; delete it by hand")
    _check_values({**_defaults(), **given})
    return dict(given)


def _check_values(asked: Mapping[str, Any]) -> None:
    """By the checks of `compress`; a test holds that each setting is refused here as there."""
    check_settings(restart=asked["restart"])
    config_of(None, {name: asked[name] for name in FIELDS})
    if not isinstance(asked["calibration"], str | None):
        raise SettingsError(f"calibration {asked['calibration']!r:.40} is no path and no name")
    Calibration(*(asked[name] for name in ("calibration", "text_column", "samples", "sequence_length", "seed")))
    limits = Limits.parse(asked["max_memory"], asked["max_device_memory"])
    Resources(asked["device"], asked["dtype"], limits, asked["micro_batch"], asked["prefetch"], asked["min_coverage"])
    if asked["time_budget"] is not None:
        parse_seconds(asked["time_budget"])
    for name in ("model", "out", "scratch"):
        if asked[name] is not None:
            path_of(name, asked[name])


def _check_apart(outs: Sequence[str]) -> None:
    """Raise SettingsError for an output that is another's too, or lies inside another's."""
    folders = [Path(out).resolve() for out in outs]
    for (i, one), (j, other) in combinations(enumerate(folders), 2):
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise SettingsError(f"jobs {i} and {j} write to {outs[i]} and {outs[j]}; each job needs an out of its own")


def check_options(options: Mapping[str, Any]) -> dict[str, str]:
    """Options of sbatch by their long names, as text. Raises SettingsError for what no line of a script can hold."""
    for name, value in options.items():
        if not OPTION_NAME.fullmatch(name):
            raise SettingsError(f"slurm {name!r:.80} is no long name of an option of sbatch, such as cpus-per-task")
        if name == "array":
            raise SettingsError("slurm array is made of the jobs; leave it out")
        if not isinstance(value, str | int | float) or not str(value).isprintable() or set(str(value)) & set("\"'\\"):
            raise SettingsError(f"slurm {name} {value!r:.80} is neither true, nor a number, nor text without quotes")
    return {name: "" if value is True else str(value) for name, value in options.items() if value is not False}


def arguments_of(settings: Mapping[str, Any]) -> list[str]:
    """What stands behind `streamprune compress` for settings; those that are the default are left out."""
    defaults, options = _defaults(), []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if name == "model" or value == defaults[name]:
            continue
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            options.append(f"--{option}={value}")
    return [str(settings["model"]), *options]
