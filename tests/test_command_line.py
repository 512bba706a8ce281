"""The command line: help, exit codes, one-line errors, JSON, and signals to a real process."""

import functools
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import tiny
from command import run

import streamprune
from streamprune.checkpoint import writer
from streamprune.cli import cli
from streamprune.config import CHOICES
from streamprune.errors import CheckpointError, OutputError, SettingsError
from streamprune.model.arithmetic import DTYPES

COMMANDS = ["compress", "plan", "verify", "evaluate", "generate", "export", "inspect", "submit", "status"]


def strict_json(text: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def job(sources: Callable[[str], Path], calibration: Path, tmp_path: Path) -> list[str]:
    """`compress` of the tiny LLaMA into tmp_path/out."""
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in tiny.CALIBRATION.items()]
    out = tmp_path / "out"
    return ["compress", str(sources("llama")), "--out", str(out), "--calibration", str(calibration), *settings]


def test_help_names_every_command_and_exit_code() -> None:
    result = run("--help")
    assert result.exit_code == 0
    listed = result.stdout.partition("Commands:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\w+) ", listed, re.MULTILINE) == sorted(COMMANDS)
    for code in ("1 fault", "2 settings", "3 checkpoint", "4 text", "7 kernel fault", "85 interrupted"):
        assert code in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"\n    streamprune {command} " in result.stdout
    assert "--json" in result.stdout


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "submit"])
def test_options_are_the_functions_parameters(name: str) -> None:
    """By the same names and with the same defaults."""
    command = cli.commands[name]
    line = ["x" if isinstance(part, click.Argument) else f"--{part.name}=x" for part in command.params if part.required]
    options = command.make_context(name, line).params
    parameters = inspect.signature(getattr(streamprune, name)).parameters
    in_python_alone = {"progress", "should_stop", "config", "on_text"}
    assert options.keys() - {"quiet", "as_json", "yes", "watch"} == parameters.keys() - in_python_alone
    for key, parameter in parameters.items():
        if key in options and parameter.default is not parameter.empty:
            assert options[key] == parameter.default, key


def test_plan_takes_what_compress_takes() -> None:
    """So that a user can exchange the word; --out may be left away."""
    compress, plan = (
        {option.name: (option.opts, option.secondary_opts, option.type.name) for option in cli.commands[name].params}
        for name in ("compress", "plan")
    )
    assert compress == plan


@pytest.mark.parametrize(
    ("command", "option"),
    [(name, option) for name, command in cli.commands.items() for option in command.params if option.name in CHOICES],
    ids=lambda value: getattr(value, "name", value),
)
def test_choices_are_listed_and_others_refused(command: str, option: click.Option, tmp_path: Path) -> None:
    """By --help all that the library takes; another one is one line, before the model is looked for."""
    choices = get_args(CHOICES[option.name])
    assert f"--{option.name.replace('_', '-')} [{'|'.join(choices)}]" in run(command, "--help").stdout
    needed = {"compress": ["--out=o"], "evaluate": ["--text=t"], "export": ["--out=o"], "generate": ["--prompt=a"]}
    needed["submit"] = ["--out=o", "--print"]
    result = run(command, tmp_path / "nowhere", *needed.get(command, []), option.opts[0], "best")
    line = f"streamprune: {option.name} 'best' is none of {', '.join(choices)}\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", line)


def test_dtypes_that_are_listed_are_those_of_the_arithmetic() -> None:
    assert get_args(CHOICES["dtype"]) == ("auto", *DTYPES)


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"streamprune, version \d+\.\d+\.\d+\n", result.stdout)


def test_all_commands_in_a_row(job: list[str], sources: Callable[[str], Path], held_out: Path, tmp_path: Path) -> None:
    """Tables for people first: each says what a reader looks for."""
    out, source = tmp_path / "out", sources("llama")
    result = run(*job)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"finished: {out}, 3 blocks\n")
    assert f"manifest sha256   {tiny.sha256(out / tiny.MANIFEST)}" in result.stdout
    assert "no --max-block-error: every block is pruned" in result.stderr
    assert "model.layers.0: pruned, block error" in result.stderr
    again = run(*job)
    assert again.exit_code == 0
    assert again.stdout.startswith(f"already finished: {out}, 3 blocks\n")

    result = run("verify", out, "--source", source, "--quiet")
    assert result.exit_code == 0
    assert "21 layers checked against the source, position by position" in result.stdout
    assert result.stdout.endswith("ok\n")
    assert "21 layers checked by itself, without its source" in run("verify", out, "--quiet").stdout

    result = run("evaluate", out, "--text", held_out, "--sequence-length", 100, "--quiet")
    assert re.match(r"perplexity \d+\.\d{4} over 2000 tokens in windows of 100 ", result.stdout)

    result = run("export", out, "--out", tmp_path / "dense", "--quiet")
    assert "6 layers are N:M as they lie in the file" in result.stdout
    assert "15 layers had a stored permutation undone" in result.stdout

    result = run("inspect", out)
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("model.layers.")]
    assert len(rows) == 21
    assert all(row[1] == "2:4" for row in rows)
    assert "21 pruned layers: " in result.stdout


def test_json_keys_that_others_rely_on(
    job: list[str], sources: Callable[[str], Path], held_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    finished = strict_json(run(*job, "--quiet", "--json").stdout)
    assert finished["status"] == "finished"
    assert finished["manifest_sha256"] == tiny.sha256(out / tiny.MANIFEST)
    checked = strict_json(run("verify", out, "--source", sources("llama"), "--quiet", "--json").stdout)
    assert checked["ok"] is True
    assert checked["faults"] == []
    assert len(checked["layers"]) == 21
    assert all(layer.keys() >= {"name", "relative_error", "ok"} for layer in checked["layers"])
    figures = strict_json(
        run("evaluate", out, "--text", held_out, "--sequence-length", 100, "--quiet", "--json").stdout
    )
    assert figures["tokens"] == 2000
    assert figures["perplexity"] > 1
    table = strict_json(run("inspect", out, "--json").stdout)
    keys = {"name", "pattern", "shape", "packed_bytes", "dense_bytes", "kernel_error", "layer_error", "block_error"}
    assert all(layer.keys() >= keys for layer in table["layers"])
    assert table["packed_bytes"] == finished["packed_bytes"] == sum(row["packed_bytes"] for row in table["layers"])
    assert table["dense_bytes"] == finished["dense_bytes"] == sum(row["dense_bytes"] for row in table["layers"])
    foretold = strict_json(run("plan", sources("llama"), "--json").stdout)
    assert (foretold["samples"], foretold["sequence_length"]) == (128, tiny.POSITIONS)
    assert "text              128 sequences of 320 tokens\n" in run("plan", sources("llama")).stdout
    written = strict_json(run("export", out, "--out", tmp_path / "dense", "--quiet", "--json").stdout)
    assert written["out"] == str(tmp_path / "dense")


def test_quiet_is_quiet(job: list[str], held_out: Path, tmp_path: Path) -> None:
    for arguments in (
        [*job, "--json"],
        ["verify", tmp_path / "out", "--json"],
        ["evaluate", tmp_path / "out", "--text", held_out, "--sequence-length", 100],
        ["generate", tmp_path / "out", "--prompt", "a", "--max-new-tokens", 2],
        ["export", tmp_path / "out", "--out", tmp_path / "dense"],
        ["inspect", tmp_path / "out"],
        ["plan", *job[1:], "--samples", 4, "--restart", "--yes"],
    ):
        result = run(*arguments, "--quiet")
        assert result.exit_code == 0
        assert result.stderr == ""
        assert result.stdout != ""


def test_a_fault_is_exit_code_1_and_named(copy_of: Callable[..., Path], sources: Callable[[str], Path]) -> None:
    """Two kept values exchanged, all checksums right: the one line that a user needs is on standard output."""
    out, layer = copy_of("llama"), "model.layers.2.mlp.up_proj"
    name = f"{layer}.weight_values"
    tiny.edit_tensor(tiny.shard_of(out, name), name, lambda values: values[0, :2].copy_(values[0, :2].flip(0)))
    tiny.reseal(out)
    assert run("verify", out, "--quiet").exit_code == 0
    result = run("verify", out, "--source", sources("llama"), "--quiet")
    assert result.exit_code == 1
    assert f"FAULT  {layer}: 2 kept values differ from the source's" in result.stdout
    assert result.stdout.endswith("1 fault\n")
    tiny.flip_byte(tiny.shard_of(out, name), 5000)
    result = run("verify", out, "--quiet", "--json")
    assert result.exit_code == 1
    assert strict_json(result.stdout)["ok"] is False


def test_json_of_a_layer_that_cannot_be_checked(copy_of: Callable[..., Path]) -> None:
    """A group with three of four kept has no product to compare; its JSON is still JSON."""
    out, name = copy_of("llama"), "model.layers.2.mlp.up_proj.weight_mask"
    tiny.edit_tensor(tiny.shard_of(out, name), name, lambda mask: mask[0, :1].fill_(0x33 ^ 0x04))
    tiny.reseal(out)
    result = run("verify", out, "--quiet", "--json")
    assert result.exit_code == 1
    layers = strict_json(result.stdout)["layers"]
    assert [layer["name"] for layer in layers if not layer["ok"]] == ["model.layers.2.mlp.up_proj"]


def failing(
    name: str,
    job: list[str],
    sources: Callable[[str], Path],
    outputs: Callable[..., Path],
    held_out: Path,
    folder: Path,
) -> list[object]:
    """A command that ends with an error of the kind."""
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("mine")
    text: list[object] = ["--text", held_out, "--quiet"]
    return {
        "unknown option": [*job, "--sparsity", "0.5"],
        "no output": ["compress", sources("llama")],
        "pattern": [*job, "--pattern", "2:2"],
        "metric": [*job, "--metric", "best"],
        "correction": [*job, "--no-refine", "--correction", 0.5],
        "packed source": ["verify", outputs("llama"), "--source", outputs("llama")],
        "too long": ["evaluate", sources("llama"), *text, "--sequence-length", 321],
        "no model": ["compress", folder / "nowhere", "--out", folder / "out"],
        "not packed": ["inspect", sources("llama")],
        "no text": ["evaluate", sources("llama"), "--text", folder / "nowhere.txt"],
        "short text": [*job, "--samples", 10_000],
        "foreign output": [*job[:2], "--out", folder / "foreign", *job[4:]],
        "export exists": ["export", outputs("llama"), "--out", folder / "foreign"],
        "other settings": [*job[:2], "--out", outputs("llama"), *job[4:], "--alpha", 3],
        "budget": [*job, "--max-block-error", 0],
    }[name]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("unknown option", 2, "No such option"),
        ("no output", 2, "Missing option '--out'"),
        ("pattern", 2, "streamprune: pattern 2:2: N:M needs"),
        ("metric", 2, "streamprune: metric 'best' is none of"),
        ("correction", 2, "streamprune: correction 0.5 needs second moments, and neither refine nor reconstruct takes"),
        ("too long", 2, "beyond the model's 320 positions"),
        ("no model", 3, "nowhere"),
        ("packed source", 3, "is itself an output of streamprune; give --source the dense model"),
        ("not packed", 3, "is not a finished streamprune output"),
        ("no text", 4, "nowhere.txt: no such file"),
        ("short text", 4, "10000 are asked for"),
        ("foreign output", 5, "is not empty and not an output of streamprune"),
        ("export exists", 5, "exists already"),
        ("other settings", 5, "settings.alpha: 1.0 there, 3.0 now"),
        ("budget", 8, "model.layers.0: block error"),
    ],
)
def test_errors_are_one_line_with_the_right_exit_code(
    name: str,
    code: int,
    message: str,
    job: list[str],
    sources: Callable[[str], Path],
    outputs: Callable[..., Path],
    held_out: Path,
    tmp_path: Path,
) -> None:
    arguments = failing(name, job, sources, outputs, held_out, tmp_path)
    result = run(*arguments)
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert message in lines[-1]
    assert "Traceback" not in result.output
    assert "no --max-block-error" not in result.stderr or code == 8  # said of a job once its settings are accepted
    if not lines[-1].startswith("Error: "):  # click's own come with a line of usage
        assert [line for line in lines if line.startswith("streamprune: ")] == lines[-1:]
        assert result.stdout == ""


# Options that take a number: those of which 0 makes no sense, and the others. All others with a value take a text.
FROM_ONE = {
    "samples", "sequence_length", "max_tokens", "micro_batch", "shuffle_block", "entropy_bins", "correction_stride",
    "moments_width", "max_memory", "max_device_memory", "max_new_tokens",
}  # fmt: skip
FROM_ZERO = {
    "temperature",
    "top_p",
    "seed",
    "prefetch",
    "alpha",
    "shrinkage",
    "correction",
    "max_block_error",
    "min_coverage",
    "min_expert_tokens",
}
TEXTS = {
    "out", "calibration", "pattern", "metric", "shuffle", "fold", "objective", "entropy_range", "amplitude",
    "on_excess", "starved", "device", "dtype", "scratch", "source", "tasks", "text", "text_column", "to",
    "prompt", "prompt_file", "time_budget",
}  # fmt: skip
NUMERIC = [
    (name, option.name)
    for name, command in cli.commands.items()
    for option in command.params
    if name != "submit"  # whose settings tests/cluster/test_submit.py holds to those of compress
    if isinstance(option, click.Option) and not option.is_flag and option.name not in TEXTS
]
SENSELESS: list[Any] = [-1, 10**20, math.nan, math.inf, -math.inf, "x", ""]


def test_every_option_that_takes_a_number_is_in_the_table_below() -> None:
    assert {option for _, option in NUMERIC} == FROM_ONE | FROM_ZERO
    assert {command for command, _ in NUMERIC} == {"compress", "plan", "evaluate", "generate"}


@pytest.mark.parametrize(("command", "option"), NUMERIC)
def test_numbers_that_make_no_sense(command: str, option: str, tmp_path: Path) -> None:
    """Exit code 2 and one line, before the model is looked for; the same of the library's function."""
    needed: dict[str, Any] = {"compress": {"out": tmp_path / "out"}, "evaluate": {"text": tmp_path / "x.txt"},
                              "plan": {}, "generate": {"prompt": "a"}}[command]  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in needed.items()] + ["--quiet"] * (command != "plan")
    (tmp_path / "x.txt").touch()
    in_bytes = option.endswith("memory")
    senseless = [*SENSELESS, *([0] if option in FROM_ONE else [])]
    for value in senseless:
        result = run(command, tmp_path / "nowhere", *arguments, f"--{option.replace('_', '-')}", value)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        name = "" if in_bytes else f"{option} "
        assert re.fullmatch(rf"streamprune: {name}\S+ is not a (whole )?number .*\n", result.stderr), value
    function = functools.partial(getattr(streamprune, command), tmp_path / "nowhere", **needed)
    for value in [*senseless, True, [1], 64 if in_bytes else "64"]:
        with pytest.raises(SettingsError):
            function(**{option: value})
    with pytest.raises(CheckpointError):
        function(**{option: "64" if in_bytes else 64 if option in FROM_ONE else 0})


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OutputError("several\n  lines"), 5, "streamprune: several lines"),
        (ZeroDivisionError("odd"), 1, "streamprune: unexpected ZeroDivisionError: odd (--debug shows where)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unforeseen_errors_are_one_line_too(
    error: Exception, code: int, line: str, job: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(writer, "sync_folder", fail)
    result = run(*job, "--quiet")
    assert (result.exit_code, result.stderr) == (code, f"{line}\n")
    assert run("--debug", *job, "--quiet").exception is error
    assert run(*job, "--quiet", "--debug").exception is error


def test_debug_shows_the_traceback(sources: Callable[[str], Path]) -> None:
    command = [sys.executable, "-m", "streamprune"]
    arguments = ["inspect", str(sources("llama"))]
    plain, debug = (
        subprocess.run([*command, *flag, *arguments], capture_output=True, text=True) for flag in ([], ["--debug"])
    )
    assert plain.returncode == 3
    assert plain.stderr.count("\n") == 1
    assert plain.stderr.startswith("streamprune: ")
    assert debug.returncode != 0
    assert "Traceback (most recent call last)" in debug.stderr
    assert "CheckpointError: " in debug.stderr


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
LONG = {"samples": 24, "sequence_length": 320}  # long enough to be hit in the middle of a block


@pytest.fixture(scope="module")
def signalled(
    sources: Callable[[str], Path], calibration: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[signal.Signals, tuple[list[str], int, str]]:
    """Jobs that were sent a signal when their first block was done: arguments, exit code, standard error.

    All run at once, since starting takes most of their time.
    """
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in {**tiny.CALIBRATION, **LONG}.items()]
    settings += ["--calibration", str(calibration), "--quiet"]
    jobs, processes = {}, {}
    for kind in SIGNALS:
        out = tmp_path_factory.mktemp("signalled") / kind.name
        jobs[kind] = ["compress", str(sources("llama")), "--out", str(out), *settings]
        command = [sys.executable, "-m", "streamprune", *jobs[kind]]
        processes[kind] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True), out
    waiting, deadline = set(SIGNALS), time.monotonic() + 100
    while waiting and time.monotonic() < deadline:
        for kind in list(waiting):
            process, out = processes[kind]
            if (out / ".work" / "block-00000.json").exists() or process.poll() is not None:
                process.send_signal(kind)
                waiting.remove(kind)
        time.sleep(0.001)
    ends = {kind: (process.communicate(timeout=60)[1], process.returncode) for kind, (process, _) in processes.items()}
    return {kind: (jobs[kind], code, errors) for kind, (errors, code) in ends.items()}


@pytest.mark.parametrize("kind", SIGNALS, ids=lambda kind: kind.name)
def test_signals_end_a_job_that_goes_on_to_the_same_bytes(
    kind: signal.Signals, signalled: dict[signal.Signals, Any], outputs: Callable[..., Path]
) -> None:
    """Exit code 85 ("interrupted, resumable") and one line; the same command again goes on."""
    job, code, errors = signalled[kind]
    out = Path(job[3])
    assert code == 85, errors
    done = len(list((out / ".work").glob("block-*.json")))
    assert errors == f"streamprune: {out}: stopped after {done} of 3 blocks; the same command goes on\n"
    assert (out / ".work" / "block-00000.json").exists()
    assert not (out / tiny.MANIFEST_DIGEST).exists()
    result = run(*job)
    assert result.exit_code == 0
    assert result.stdout.startswith("finished: ")
    assert tiny.digests(out) == tiny.digests(outputs("llama", **LONG))


@pytest.mark.parametrize(
    ("more", "answer", "code", "said"),
    [
        ([], None, 2, "streamprune: {out}: holds a finished job; --restart throws it away only with --yes"),
        ([], "n\n", 5, "streamprune: {out}: holds a finished job, which stays; choose another --out"),
        ([], "y\n", 0, None),
        (["--yes"], None, 0, None),
    ],
    ids=["nobody to ask", "no", "yes", "--yes"],
)
def test_a_finished_job_is_thrown_away_only_when_that_is_said(
    more: list[str], answer: str | None, code: int, said: str | None, job: list[str], copy_of: Any, monkeypatch: Any
) -> None:
    out = copy_of("llama")
    made = (out / tiny.MANIFEST).stat().st_ino
    monkeypatch.setattr("streamprune.cli.on_terminal", lambda: answer is not None)
    result = run(*job[:2], "--out", out, *job[4:], "--quiet", "--restart", *more, input=answer)
    assert result.exit_code == code, result.stderr
    if said is None:  # click's runner echoes the answer, older ones into standard output
        assert f"finished: {out}" in result.stdout
    else:
        assert result.stderr.splitlines()[-1].endswith(said.format(out=out))
    assert ((out / tiny.MANIFEST).stat().st_ino == made) == bool(code)
    assert ("Throw it away and start over? [y/N]" in result.stderr) == (answer is not None)


def test_restart_of_an_unfinished_job_asks_nothing(job: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = run(*job, "--quiet", "--restart")
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_second_process_is_refused(job: list[str], tmp_path: Path) -> None:
    """A real one: the first is stopped in the middle of its work, so that it certainly holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-m", "streamprune", *job, "--quiet"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / ".work" / "identity.json").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        result = run(*job, "--quiet")
        assert result.exit_code == 5
        assert f"is in use by process {process.pid} on " in result.stderr
    finally:
        os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert run(*job, "--quiet").stdout.startswith("already finished")
