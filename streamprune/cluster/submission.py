"""`submit`: jobs of `compress` as one script for sbatch, an array where there are several, and its submission."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.cluster.jobs import Jobs, check_options, read_jobs
from streamprune.config import PathLike, check_settings
from streamprune.errors import SettingsError, StreampruneError

ASKED = {  # of Slurm, unless told otherwise
    "job-name": "streamprune",
    "nodes": "1",
    "ntasks": "1",
    "cpus-per-task": "8",
    "mem": "32G",
    "time": "04:00:00",
}
SUBMIT_SECONDS = 120  # a controller that is busy answers late


@dataclass(frozen=True)
class SubmitResult:
    """What was, or with print_only would be, submitted. `job_id` is Slurm's number; None where nothing was."""

    job_id: str | None
    outs: tuple[str, ...]
    script: str


def submit(
    jobs: PathLike | Sequence[Mapping[str, Any]],
    *,
    slurm: Mapping[str, Any] | None = None,
    notice: int = 120,
    max_restarts: int = 100,
    print_only: bool = False,
) -> SubmitResult:
    """Submit jobs of `compress` to Slurm; several become one array, in which each index has an output of its own.

    `jobs` is a TOML file, which docs/clusters.md describes, or a list of dicts of settings by the names of `compress`'s
    parameters. `slurm` holds options of sbatch by their long names, over those of the file. The job is told to stop
    `notice` seconds before its time limit, requeues itself, and gives up after `max_restarts`.

    Raises SettingsError for settings that `compress` would refuse and where there is no sbatch, StreampruneError with
    sbatch's own words where it fails.

    >>> result = streamprune.submit([{"model": "/models/opt-66b", "out": "./pruned"}], print_only=True)
    >>> result.script.splitlines()[0]
    '#!/usr/bin/env bash'
    """
    check_settings(notice=notice, max_restarts=max_restarts, print_only=print_only)
    asked = read_jobs(jobs)
    options = {**asked.slurm, **check_options(slurm or {})}
    script = script_of(asked, options, notice, max_restarts)
    job_id = None if print_only else _submitted(script)
    return SubmitResult(job_id, tuple(str(job["out"]) for job in asked.settings), script)


def _submitted(script: str) -> str:
    """The number that Slurm gives a job."""
    if shutil.which("sbatch") is None:
        raise SettingsError("there is no sbatch here; run on a login node of a Slurm cluster, or --print the script")
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, capture_output=True, text=True, timeout=SUBMIT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise StreampruneError(
            f"sbatch did not answer in {SUBMIT_SECONDS} s; see squeue --me, then try again"
        ) from error
    if done.returncode != 0:
        raise StreampruneError(f"sbatch refused the job: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]


def script_of(jobs: Jobs, options: Mapping[str, str], notice: int, max_restarts: int) -> str:
    """The batch script. It holds the commands themselves: a TOML file that changes later changes no job."""
    count = len(jobs.settings)
    log = "%x-%j.out" if count == 1 else "%x-%A_%a.out"
    asked = {**ASKED, "output": log, "open-mode": "append", "signal": f"B:USR1@{notice}", "requeue": "", **options}
    if count > 1:
        asked["array"] = f"0-{count - 1}"
    lines = [f"#SBATCH --{name}{_shown(value)}" for name, value in asked.items()]
    commands = [f"job=({shlex.join(jobs.arguments(index))})" for index in range(count)]
    if count > 1:
        cases = "\n".join(f"  {index}) {command} ;;" for index, command in enumerate(commands))
        commands = [f"case $SLURM_ARRAY_TASK_ID in\n{cases}\nesac"]
    return TEMPLATE.format(
        options="\n".join(lines),
        folder=shlex.quote(str(Path.cwd())),
        streamprune=shlex.join([sys.executable, "-m", "streamprune"]),
        max_restarts=max_restarts,
        jobs=commands[0],
    )


def _shown(value: str) -> str:
    """An option's value on its line of a script, quoted where sbatch would split it."""
    if not value:
        return ""
    return f'="{value}"' if set(value) & set(" #;") else f"={value}"


TEMPLATE = """\
#!/usr/bin/env bash
# Made by `streamprune submit`. Compresses over as many time limits and preemptions as it takes.
#
{options}

set -uo pipefail # not -e: exit codes are read below

readonly RESUMABLE=85 # streamprune's "interrupted at a safe point, run again to go on"
readonly BY_USR1=138  # 128 + USR1: the signal met a program just starting, or one just done; running again is right
readonly MAX_RESTARTS={max_restarts}

cd {folder} || exit
streamprune=({streamprune})
{jobs}

# An array's task is requeued by this name: the bare number of one of them means them all.
readonly this=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
readonly name=${{this:-$SLURM_JOB_ID}}
restarts=$((${{SLURM_RESTART_COUNT:-0}} + ${{STREAMPRUNE_RESTARTS:-0}}))
echo "job $name on $(hostname), restart $restarts" >&2
if [ "$restarts" -gt "$MAX_RESTARTS" ]; then
  echo "job $name was restarted $restarts times, which is too often; submit the same again to go on" >&2
  exit "$RESUMABLE"
fi

# Hidden states lie on a disk of the node where the site gives each job a folder there that is not in memory.
for folder in "${{SLURM_TMPDIR:-}}" "${{TMPDIR:-}}"; do
  if [[ $folder =~ (^|[^0-9])$SLURM_JOB_ID([^0-9]|$) && -w $folder && $(stat -f -c %T "$folder") != tmpfs ]]; then
    job=(--scratch="$folder" "${{job[@]}}") # the job's own --scratch comes later and is taken instead
    break
  fi
done

# In the background and without exec: the shell has to hand signals on, and to outlive the program to requeue the job.
time_is_up=false
worker=
trap 'time_is_up=true; kill -USR1 "$worker" 2>/dev/null' USR1
trap 'kill -TERM "$worker" 2>/dev/null' TERM INT
"${{streamprune[@]}}" compress "${{job[@]}}" &
worker=$!
if $time_is_up; then # before there was a worker
  kill -USR1 "$worker"
fi

# `wait` returns early when a signal comes, so wait until the program has really ended; a last `wait` gives its code.
wait "$worker"
while kill -0 "$worker" 2>/dev/null; do
  wait "$worker"
done
wait "$worker"
code=$?

# After TERM there is nothing to do: Slurm requeues a preempted job itself, and a cancelled one shall stay cancelled.
if ! $time_is_up || {{ [ "$code" -ne "$RESUMABLE" ] && [ "$code" -ne "$BY_USR1" ]; }}; then
  exit "$code"
fi

# The time limit is near. The same command goes on after the last finished block, so run it again.
if scontrol requeue "$name"; then
  echo "interrupted at a safe point; job $name is requeued and will go on" >&2
  exit "$code"
fi

# Some clusters disable requeue: submit this script again, to start when this job is gone.
export STREAMPRUNE_RESTARTS=$((restarts + 1))
again=(--parsable --dependency="afterany:$name" ${{this:+--array="$SLURM_ARRAY_TASK_ID"}})
if next=$(sbatch "${{again[@]}}" "$0"); then
  echo "interrupted at a safe point; requeue is refused here, so job ${{next%%;*}} was submitted and will go on" >&2
else
  echo "interrupted at a safe point; neither requeue nor sbatch worked: submit the same again to go on" >&2
fi
exit "$code"
"""
