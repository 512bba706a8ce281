"""The command line: parse, call one library function of the same signature, show its result."""

import dataclasses
import functools
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import click

import streamprune
from streamprune.endings import STOPS, ResultLost, end_on_signals, guard_streams, one_line_errors, stop_on_signals
from streamprune.environment import prepare
from streamprune.errors import EXIT_CODES, OutputError, SettingsError
from streamprune.options import (
    DEVICE,
    DTYPE,
    JOB,
    LENGTH,
    SCRATCH_HELP,
    TEXT_COLUMN,
    TEXT_FILES,
    Choice,
    integer,
    number,
)
from streamprune.summaries import (
    say,
    show_compression,
    show_evaluation,
    show_export,
    show_inspection,
    show_pace,
    show_plan,
    show_status,
    show_submission,
    show_text,
    show_texts,
    show_verification,
)

# Silence transformers below ERROR: most of its warnings do not apply here. Those that may concern a result are caught
# and passed on by streamprune.model.library.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:<3} {meaning}" for code, meaning in EXIT_CODES.items())


def _debug(context: click.Context, _: click.Parameter, debug: bool) -> None:
    root = context.find_root()
    root.obj = bool(root.obj) or debug


DEBUG = click.option("--debug", is_flag=True, expose_value=False, callback=_debug, help="Show tracebacks.")


@click.group(epilog=EPILOG)
@click.version_option(package_name="streamprune")
@DEBUG
def cli() -> None:
    """Prune language models that are larger than memory to N:M sparsity, block by block."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


def main() -> None:
    """Entry point of `streamprune`."""
    guard_streams()
    prepare()
    try:
        cli(prog_name="streamprune")
    except ResultLost as error:
        say(f"streamprune: {error}", err=True)
        sys.exit(error.exit_code)


def command(
    show: Callable[[Any], None], *examples: str, signals: Callable[[], AbstractContextManager[Any]] = end_on_signals
) -> Callable[[Callable[..., Any]], click.Command]:
    """A subcommand: its function returns a dataclass, which is shown as text or, with --json, as one JSON object.

    Errors are one line on standard error and an exit code of their kind; signals do what `signals` makes of them, also
    while the library is imported.
    """
    epilog = "\b\nExamples:\n" + "\n".join(f"  streamprune {example}" for example in examples)

    def decorate(function: Callable[..., Any]) -> click.Command:
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
        @click.option("--quiet", is_flag=True, help="Show no progress.")
        @DEBUG
        @functools.wraps(function)
        def wrapped(as_json: bool, **settings: Any) -> None:
            with one_line_errors():
                with signals() as should_stop:
                    _import(function.__name__)
                    result = function(**settings, **({} if should_stop is None else {"should_stop": should_stop}))
                text = json.dumps(dataclasses.asdict(result), indent=2, allow_nan=False) if as_json else None
            if text is not None:
                click.echo(text)
            else:
                show(result)
            if not getattr(result, "ok", True):
                sys.exit(1)

        return cli.command(function.__name__, epilog=epilog)(wrapped)

    return decorate


def _import(name: str) -> None:
    """Import a library function, and exempt everything imported so far from garbage collection.

    The modules of torch and transformers are a million objects that live until the end. Collecting garbage among them
    took a third of the time of a short command.
    """
    gc.disable()
    try:
        getattr(streamprune, name)
        gc.freeze()
    finally:
        gc.enable()


@command(
    show_compression,
    "compress /models/llama-65b --out ./pruned",
    "compress ./opt-66b --out ./pruned --pattern 4:8 --calibration c4-train.00000-of-01024.json.gz --samples 64",
    "compress ./llama --out ./pruned --max-block-error 0.5 --on-excess keep-dense",
    "compress HuggingFaceTB/SmolLM2-135M --out ./pruned",
    signals=stop_on_signals,
)
@click.option("--out", required=True, type=click.Path(), help="Output folder; run the same command again to continue.")
@JOB
def compress(quiet: bool, yes: bool, should_stop: Callable[[], bool], **settings: Any) -> Any:
    """Prune MODEL to packed N:M form.

    MODEL is a folder as transformers reads it: config.json, a tokenizer, and weights as safetensors or
    pytorch_model*.bin, single or sharded. Or it is a name on the hub, ORG/MODEL or ORG/MODEL@REVISION, with a branch, a
    tag or a commit: what the hub's cache lacks of it is downloaded there.

    Run the same command again to continue after the last finished block. SIGINT, SIGTERM, SIGHUP and SIGUSR1 stop the
    job at a safe point with exit code 85.
    """
    from streamprune.process import map_large_pieces

    map_large_pieces()
    if settings["restart"] and not yes and streamprune.is_finished(settings["out"]):
        with end_on_signals(STOPS):  # there is nothing to stop while a person is asked
            _ask_to_restart(settings["out"])
    return streamprune.compress(progress=not quiet, should_stop=should_stop, **settings)


def on_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty()


def _ask_to_restart(out: str) -> None:
    """Ask whether a finished output shall be thrown away. Raises SettingsError where nobody can answer."""
    if not on_terminal():
        raise SettingsError(f"{out}: holds a finished job; --restart throws it away only with --yes")
    if not click.confirm(f"{out}: holds a finished job. Throw it away and start over?", err=True):
        raise OutputError(f"{out}: holds a finished job, which stays; choose another --out")


@command(
    show_plan,
    "plan /models/llama-65b",
    "plan /models/llama-65b --max-memory 9GiB --samples 16 --sequence-length 256 --json",
)
@click.option("--out", type=click.Path(), help="As for compress; nothing is written.")
@JOB
def plan(quiet: bool, yes: bool, **settings: Any) -> Any:
    """Show what `compress` with the same options would read, hold and take.

    Bytes to read, to write, of scratch and of memory, stage by stage; the time; and which layers stay dense. Reads only
    headers of MODEL, which is downloaded first where it is named on the hub, and times a few products to learn the
    speed of this machine.
    """
    return streamprune.plan(progress=not quiet, **settings)


@command(
    show_verification, "verify ./pruned", "verify ./pruned --source /models/llama-65b --json", "verify ./pruned --quick"
)
@click.argument("folder", type=click.Path())
@click.option(
    "--source",
    type=click.Path(),
    help="The dense checkpoint, a folder or its name on the hub: also compare every kept value with it.",
)
@click.option("--quick", is_flag=True, help="Check only sizes and headers: finds what is missing, not what is damaged.")
@click.option("--device", type=Choice("device"), default="auto", show_default=True, help="Whose kernels multiply.")
def verify(quiet: bool, **settings: Any) -> Any:
    """Check every byte of an output FOLDER, or of one that is named on the hub.

    Exit code 1 on any fault, which is named. Checked are the checksums of all files, the structure, exactly N of M in
    every group, and each layer's sparse product; with --source also every kept value, mask and other tensor against the
    dense checkpoint. The printed sha256 names the whole output: two copies that both verify and have the same one are
    equal.
    """
    return streamprune.verify(progress=not quiet, **settings)


@command(
    show_evaluation,
    "evaluate ./pruned --text wiki.txt",
    "evaluate /models/llama-65b --text wiki.txt --sequence-length 1024 --max-tokens 20480 --json",
    "evaluate ./pruned --tasks examples/tasks/endings.yaml",
)
@click.argument("model", type=click.Path())
@click.option("--text", type=click.Path(), help=f"A file, {TEXT_FILES}; not the calibration text.")
@TEXT_COLUMN
@click.option("--sequence-length", type=integer, help=f"Tokens in a window. {LENGTH}")
@click.option(
    "--max-tokens",
    type=integer,
    help="Use only this many tokens of the text, from its start; needed for texts of more than 16 million characters.",
)
@DEVICE
@DTYPE
@click.option("--scratch", type=click.Path(), help=f"{SCRATCH_HELP}the system's temporary folder.")
@click.option(
    "--tasks",
    type=click.Path(),
    help='A .yaml file of tasks for lm-evaluation-harness, which pip install "streamprune[eval]" brings. The model is '
    "held in memory; Python functions that the file names run.",
)
def evaluate(quiet: bool, **settings: Any) -> Any:
    """Measure the perplexity of a text, or scores in tasks.

    MODEL is a dense checkpoint or an output, a folder or its name on the hub; for a text it runs block by block.
    docs/method.md defines the figure.
    """
    return streamprune.evaluate(progress=not quiet, **settings)


def _show_generation(result: Any) -> None:
    show_texts(result)
    if not click.get_current_context().params["quiet"]:
        show_pace(result)


@command(
    _show_generation,
    'generate ./pruned --prompt "The capital of France is"',
    "generate /models/llama-65b --prompt-file questions.txt --max-memory 12GiB --max-new-tokens 32 --json",
)
@click.argument("model", type=click.Path())
@click.option(
    "--prompt", multiple=True, help="Text to continue. Given several times, one reading of the blocks serves all."
)
@click.option("--prompt-file", type=click.Path(), help="A text file with a prompt on each line.")
@click.option("--max-new-tokens", type=integer, default=64, show_default=True, help="Most tokens after each prompt.")
@click.option(
    "--temperature",
    type=number,
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token; above, tokens are drawn, the more freely the higher it is.",
)
@click.option(
    "--top-p",
    type=number,
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that have this share together.",
)
@click.option("--seed", type=integer, default=0, show_default=True, help="Seed by which tokens are drawn.")
@click.option(
    "--max-memory",
    help="Limit on host memory, such as 12GiB, by an estimate: as many blocks as it holds stay in memory. Default: "
    "nine tenths of what is available.",
)
@click.option("--max-device-memory", help="Limit on the GPU's memory, in the same way; there blocks stay in it.")
@DEVICE
@DTYPE
def generate(quiet: bool, **settings: Any) -> Any:
    """Continue a prompt.

    MODEL is a dense checkpoint or an output, a folder or its name on the hub. Blocks that memory does not hold are read
    from disk for each token. The text of a single prompt is printed as it comes, that of several at the end, each after
    its prompt. Figures go to standard error: tokens per second, bytes read for each pass, what the disk allows.
    """
    as_json = click.get_current_context().params["as_json"]
    return streamprune.generate(on_text=None if as_json else show_text, progress=not quiet, **settings)


@command(show_export, "export ./pruned --to dense --out ./pruned-dense")
@click.argument("folder", type=click.Path())
@click.option(
    "--to",
    type=Choice("to"),
    default="dense",
    show_default=True,
    help="Form to write: dense has zeros in place of dropped weights.",
)
@click.option("--out", required=True, type=click.Path(), help="A folder that does not exist yet.")
def export(quiet: bool, **settings: Any) -> Any:
    """Write an output FOLDER, or one that is named on the hub, as a dense checkpoint.

    Plain transformers loads it, without streamprune; it is as large as the source. Stored permutations are undone: such
    layers compute the same, but are not N:M as they lie in the file.
    """
    return streamprune.export(progress=not quiet, **settings)


@command(show_inspection, "inspect ./pruned", "inspect ./pruned --json")
@click.argument("folder", type=click.Path())
def inspect(quiet: bool, **settings: Any) -> Any:
    """Show a table of an output FOLDER, or of one that is named on the hub.

    Every layer with its pattern, shape, packed bytes, kept score (over that of the plain selection), kernel_error,
    layer_error, its block's block_error, and its output error after each step; then the layers left dense, with
    reasons. docs/method.md defines the errors.
    """
    return streamprune.inspect(progress=not quiet, **settings)


@command(
    show_submission,
    "submit jobs.toml",
    "submit /models/llama-65b --out ./pruned --pattern 4:8 --slurm time=08:00:00 --slurm gres=gpu:1",
    "submit jobs.toml --print",
)
@click.option("--out", type=click.Path(), help="As for compress, for MODEL; a TOML file has an out in each job.")
@click.option(
    "--slurm", multiple=True, metavar="NAME=VALUE", help="An option of sbatch by its long name, over the file's."
)
@click.option(
    "--notice",
    type=integer,
    default=120,
    show_default=True,
    help="Seconds before its time limit at which the job is told to stop; more than a sequence in a block takes.",
)
@click.option(
    "--max-restarts", type=integer, default=100, show_default=True, help="After so many restarts a job gives up."
)
@click.option("--print", "print_only", is_flag=True, help="Print the script; submit nothing.")
@click.option("--index", type=integer, help="Submit nothing: run the job of this index, from 0 on, here and now.")
@JOB
def submit(quiet: bool, yes: bool, **settings: Any) -> Any:
    """Submit `compress` to Slurm as a job that goes on over time limits, preemptions and lost nodes.

    MODEL and the options are those of compress; or MODEL is a TOML file, whose name ends in .toml, of many jobs, which
    become one array. Settings that compress would refuse are refused before anything is submitted. The script has the
    commands themselves: later changes of the file change no job.
    """
    context = click.get_current_context()
    own = {"model", "slurm", "notice", "max_restarts", "print_only", "index"}
    by_user = click.core.ParameterSource.COMMANDLINE
    given = {name: value for name, value in settings.items() if context.get_parameter_source(name) is by_user}
    job = {name: value for name, value in given.items() if name not in own}
    from_file = settings["model"].endswith(".toml")
    if from_file and job:
        raise SettingsError(f"{min(job)} is a setting of one job; write it into {settings['model']}")
    jobs = settings["model"] if from_file else [{"model": settings["model"], **job}]
    if settings["index"] is not None:
        _become(jobs, settings["index"], quiet)
    options = dict(_option_of(text) for text in settings["slurm"])
    how = {name: settings[name] for name in ("notice", "max_restarts", "print_only")}
    return streamprune.submit(jobs, slurm=options, **how)


def _option_of(text: str) -> tuple[str, Any]:
    """An option of sbatch and its value, true where it has none."""
    name, equals, value = text.partition("=")
    return name, value if equals else True


def _become(jobs: Any, index: Any, quiet: bool) -> NoReturn:
    """Replace this process by `compress` of one job, so that signals and exit codes are its own."""
    from streamprune.cluster.jobs import read_jobs

    if not isinstance(index, int):
        raise SettingsError(f"index {index!r:.40} is no whole number")
    arguments = [*read_jobs(jobs).arguments(index), *(["--quiet"] if quiet else [])]
    os.execv(sys.executable, [sys.executable, "-m", "streamprune", "compress", *arguments])


WATCH_SECONDS = 5.0


@command(show_status, "status ./pruned", "status --watch ./opt-66b ./llama-65b", "status ./opt-66b ./llama-65b --json")
@click.argument("folders", nargs=-1, required=True, type=click.Path())
@click.option("--watch", is_flag=True, help="Show it again and again, until each job is finished or has failed.")
def status(quiet: bool, watch: bool, folders: tuple[str, ...]) -> Any:
    """Show how far the jobs in output FOLDERS have come.

    Block, percent, rate, time left, host, restarts, last error. All of it is read from the folders: no scheduler is
    asked, and any host that sees them can tell.
    """
    result = streamprune.status(folders)
    while watch and not result.ended:
        if not (quiet or click.get_current_context().params["as_json"]):
            click.clear()
            show_status(result)
        time.sleep(WATCH_SECONDS)
        result = streamprune.status(folders)
    return result
