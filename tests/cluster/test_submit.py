"""`submit` without a scheduler: which jobs a file names, what is refused, and the script as a shell reads it."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import run

import streamprune
from streamprune.cli import cli
from streamprune.cluster.jobs import IN_PYTHON_ALONE, arguments_of, read_jobs
from streamprune.errors import SettingsError

JOB = {"model": "/models/a", "out": "o"}
TOML = """
[slurm]
time = "08:00:00"
mem = "64G"
exclusive = true

[defaults]
samples = 64
refine = false

[[jobs]]
model = "/models/opt 66b"
out = "pruned/it's"

[[jobs]]
model = "/models/llama"
out = "pruned/llama"
pattern = "4:8"
refine = true
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "jobs.toml"
    path.write_text(TOML)
    return path


def test_a_file_of_two_jobs(file: Path) -> None:
    """Defaults are every job's, its own settings come before them; what is the default is left out of a command."""
    jobs = read_jobs(file)
    assert jobs.slurm == {"time": "08:00:00", "mem": "64G", "exclusive": ""}
    assert [jobs.arguments(index) for index in (0, 1)] == [
        ["/models/opt 66b", "--samples=64", "--no-refine", "--out=pruned/it's"],
        ["/models/llama", "--samples=64", "--refine", "--out=pruned/llama", "--pattern=4:8"],
    ]
    for index in (-1, 2):
        with pytest.raises(SettingsError, match=f"index {index} is of no job; there are 2, from 0 on"):
            jobs.arguments(index)


def test_the_file_in_the_documents(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
    (tmp_path / "jobs.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    jobs = read_jobs(tmp_path / "jobs.toml")
    text = ["--calibration=/data/c4-train.00000-of-01024.json.gz", "--samples=64"]
    assert [jobs.arguments(index) for index in (0, 1)] == [
        ["/models/opt-66b", *text, "--out=pruned/opt-66b"],
        ["/models/llama-65b", *text, "--out=pruned/llama-65b-48", "--pattern=4:8"],
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"samples": 7, "seed": 3, "max_memory": "12 GiB", "scratch": "a b"},
        {"validate": False, "metric": "magnitude", "refine": False},
        {"relative": True, "reconstruct": True, "alpha": 0.5, "min_coverage": 0.1},
        {"max_block_error": 0.25, "on_excess": "warn", "device": "cpu", "dtype": "float32"},
        {"calibration": "--text", "text_column": "-"},
    ],
)
def test_a_command_says_what_the_settings_say(settings: dict[str, Any]) -> None:
    command = cli.commands["compress"]
    name, *arguments = ["compress", *arguments_of({**JOB, **settings})]
    parsed = command.make_context(name, arguments).params
    defaults = command.make_context(name, ["/models/a", "--out=o"]).params
    assert parsed == {**defaults, **settings}


def test_what_compress_refuses_is_refused_before_by_the_same_words(tmp_path: Path) -> None:
    """Every setting, by a value that is never right."""
    parameters = {option.name for option in cli.commands["compress"].params} - {"quiet", "as_json", "yes", "debug"}
    wrong: dict[str, Any] = {name: ["no"] for name in parameters - {"model", "out", "calibration"}}
    wrong |= {"shuffle": "best", "pattern": "2", "correction_stride": 0, "max_memory": "much"}
    assert len(wrong) > 30
    for name, value in wrong.items():
        with pytest.raises(SettingsError) as there:
            streamprune.compress(str(tmp_path / "none"), tmp_path / "out", **{name: value})
        with pytest.raises(SettingsError) as here:
            read_jobs([{**JOB, name: value}])
        expected = str(there.value)
        if name != "restart":
            assert str(here.value) == expected, name


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 0.5}, "'sparsity' is no setting of compress"),
    *(({name: None}, f"'{name}' is no setting of compress") for name in IN_PYTHON_ALONE),
    ({"max-memory": "1GiB"}, "'max-memory' is no setting of compress"),
    ({"model": ""}, "model is missing; each job needs one"),
    ({"model": 3}, "model is missing"),
    ({"out": None}, "out is missing"),
    ({"out": "a\nb"}, r"out 'a\\nb' has a character that cannot be printed"),
    ({"calibration": "a\x1b"}, "calibration .* cannot be printed"),
    ({"calibration": ["a"]}, "calibration .* is no path and no name"),
    ({"model": "-x"}, "model '-x' begins with a dash; write ./ before it"),
    ({"restart": True}, "restart would throw the output away each time the job is requeued"),
    ({"samples": 0}, "samples 0 is not a whole number from 1"),
    ({"samples": "64"}, "samples '64' is not a whole number"),
    ({"metric": "magnitude", "alpha": 2.0}, "alpha 2.0 has no effect with metric magnitude"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_jobs([{**JOB, **settings}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("jobs = 3", "holds something other than"),
        ("[job]", r"holds \['job'\] other than \[slurm\], \[defaults\] and \[\[jobs\]\]"),
        ("", r"has 0 \[\[jobs\]\] where 1 to 1000 tables belong"),
        ("jobs = [1]", "has 1 .* tables belong"),
        ("[[jobs]", "is not TOML"),
        ("[defaults]\nmodel = 'm'\n[[jobs]]\nout = 'a'\n[[jobs]]\nx = 1", "job 1: 'x' is no setting of compress"),
        ("[defaults]\nmodel = 'm'\n[[jobs]]\nout = 'a'\n[[jobs]]\nout = './a/'", "jobs 0 and 1 write to a and ./a/"),
        ("[defaults]\nmodel = 'm'\n[[jobs]]\nout = 'a'\n[[jobs]]\nout = 'a/b'", "jobs 0 and 1 write to a and a/b"),
        ("[slurm]\narray = '0-3'\n[[jobs]]\nmodel = 'm'\nout = 'a'", "slurm array is made of the jobs"),
        ("[slurm]\ncpus_per_task = 3\n[[jobs]]\nmodel = 'm'\nout = 'a'", "'cpus_per_task' is no long name"),
        ('[slurm]\ncomment = "a\\nb"\n[[jobs]]\nmodel = \'m\'\nout = \'a\'', "slurm comment .* text without quotes"),
        ("[slurm]\ncomment = '\"'\n[[jobs]]\nmodel = 'm'\nout = 'a'", "slurm comment .* text without quotes"),
    ],
)  # fmt: skip
def test_refused_files(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "jobs.toml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=message):
        read_jobs(path)
    result = run("submit", path, "--print")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def arguments_by_bash(script: str, index: int, folder: Path) -> list[str]:
    """What a script runs, by a `streamprune` that prints its arguments; bash reads the quotes."""
    script = "\n".join(line for line in script.splitlines() if not line.startswith("streamprune=("))
    script = script.replace("set -uo pipefail", "set -uo pipefail; streamprune=(printf '%s\\0')", 1)
    about = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": str(index)}
    local = folder / "7"
    local.mkdir(exist_ok=True)
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(local), **about}
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stderr.startswith(f"job 6_{index} on ")
    assert done.returncode == 0
    return done.stdout.split("\0")[:-1]


def test_a_script_runs_each_job_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "it's a $(folder)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    names = ["a b", "it's", '"', "$HOME", "`id`", "*", "#", "a;b", "ü", "\\", "!"]
    script = streamprune.submit([{**JOB, "out": name} for name in names], print_only=True).script
    for index, name in enumerate(names):
        *options, model, out = arguments_by_bash(script, index, tmp_path)
        assert (model, out) == ("/models/a", f"--out={name}")
        assert options[0] == "compress"
        in_memory = subprocess.check_output(["stat", "-f", "-c", "%T", tmp_path], text=True).strip() == "tmpfs"
        assert options[1:] == ([] if in_memory else [f"--scratch={tmp_path}/7"])


def test_the_options_of_sbatch(file: Path) -> None:
    """Those of the call come before the file's, and both before our own."""
    script = streamprune.submit(
        file, slurm={"mem": "9G", "comment": "a b", "hold": True}, notice=7, print_only=True
    ).script
    options = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "job-name=streamprune", "nodes=1", "ntasks=1", "cpus-per-task=8", "mem=9G", "time=08:00:00",
        "output=%x-%A_%a.out", "open-mode=append", "signal=B:USR1@7", "requeue", "exclusive", 'comment="a b"', "hold",
        "array=0-1",
    ]  # fmt: skip


def test_the_command_prints_what_the_function_makes(file: Path) -> None:
    printed = run("submit", file, "--print", "--slurm=mem=9G", "--max-restarts=3")
    assert printed.stdout == streamprune.submit(file, slurm={"mem": "9G"}, max_restarts=3, print_only=True).script
    one = run("submit", "/models/a", "--out=o", "--pattern=4:8", "--no-refine", "--print")
    assert "\njob=(/models/a --out=o --pattern=4:8 --no-refine)\n" in one.stdout
    assert "array" not in one.stdout.partition("set -uo")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples=3"], "samples is a setting of one job; write it into "),
        (["--notice=0"], "notice 0 is not a whole number from 1 to 65535"),
        (["--max-restarts=some"], "max_restarts 'some' is not a whole number"),
        (["--index=2"], "index 2 is of no job; there are 2, from 0 on"),
        (["--index=x"], "index 'x' is no whole number"),
        (["--slurm=Mem=3"], "slurm 'Mem' is no long name of an option of sbatch"),
        ([], "there is no sbatch here; run on a login node of a Slurm cluster, or --print the script"),
    ],
)
def test_refused_commands(arguments: list[str], message: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = run("submit", file, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"streamprune: {message}")


def test_submit_takes_every_option_of_compress() -> None:
    options = {name: {option.name for option in cli.commands[name].params} for name in ("compress", "submit")}
    assert options["submit"] - options["compress"] == {"slurm", "notice", "max_restarts", "print_only", "index"}
    assert options["compress"] <= options["submit"]


def test_an_index_runs_the_job_itself(
    file: Path, sources: Callable[[str], Path], calibration: Path, outputs: Callable[..., Path], tmp_path: Path
) -> None:
    """As a pod of an Indexed Job does: the exit code and the output are those of compress."""
    settings = {"calibration": str(calibration), **tiny.CALIBRATION}
    defaults = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    jobs = "".join(
        f'[[jobs]]\nmodel = "{model}"\nout = "{tmp_path}/{i}"\n' for i, model in enumerate(["no", sources("llama")])
    )
    file.write_text(f"[defaults]\n{defaults}{jobs}")
    command = f"{sys.executable} -m streamprune submit {shlex.quote(str(file))} --quiet --index"
    shell = f"for index in 0 1; do {command} $index; echo $?; done"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=240)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[1], lines[-1]) == ("3", f"finished: {tmp_path}/1, 3 blocks", "0"), done.stderr
    assert tiny.digests(tmp_path / "1") == tiny.digests(outputs("llama"))
