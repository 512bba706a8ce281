"""The command line: parse, call one library function of the same signature, show its result."""

import dataclasses
import functools
import gc
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, get_args

import click

import streamprune
from streamprune.config import CHOICES, PruneConfig
from streamprune.endings import ResultLost, end_on_signals, guard_streams, one_line_errors, stop_on_signals
from streamprune.errors import OutputError, SettingsError
from streamprune.summaries import (
    say,
    show_compression,
    show_evaluation,
    show_export,
    show_inspection,
    show_plan,
    show_verification,
)

# Of transformers errors alone are heard: most of what it warns of is of other uses. Where it may be of our results,
# streamprune.model.library hears it all the same.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
EXIT_CODES = (
    "Exit codes: 0 done, 1 fault, 2 settings, 3 checkpoint, 4 text, 5 output folder, 6 NaN or infinity, 7 "
    "kernel fault, 8 block error above budget, 85 interrupted (the same command goes on), "
    "130 ended by Ctrl-C, 128 + N by signal N."
)


def integer(text: Any) -> Any:
    """An option's whole number; what is none is left for the library to refuse, which refuses all alike."""
    try:
        return int(text)
    except ValueError:
        return text


def number(text: Any) -> Any:
    """Likewise one that need not be whole."""
    try:
        return float(text)
    except ValueError:
        return text


class Choice(click.Choice):  # type: ignore[type-arg]  # takes none before click 8.2
    """A choice that --help lists; one that is none is left for the library to refuse too."""

    def __init__(self, name: str) -> None:
        super().__init__(get_args(CHOICES[name]))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value


LENGTH = "Default: 2048, or the model's positions if fewer."
DEVICE = click.option(
    "--device", type=Choice("device"), default="auto", show_default=True, help="Where it is computed."
)
DTYPE = click.option(
    "--dtype", type=Choice("dtype"), default="auto", show_default=True, help="Arithmetic. Stored bits stay."
)
SCRATCH = click.option("--scratch", type=click.Path(), help="Folder for hidden states; a fast local disk is best.")
TEXT_FILES = ".txt, .jsonl, .json (each also .gz or .zst) or .parquet"
TEXT_COLUMN = click.option(
    "--text-column", default="text", show_default=True, help="Column or key that holds the text, in all files but .txt."
)


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, listed by --help in this order."""
    return lambda function: functools.reduce(lambda done, option: option(done), reversed(decorators), function)


def _debug(context: click.Context, _: click.Parameter, debug: bool) -> None:
    root = context.find_root()
    root.obj = bool(root.obj) or debug


DEBUG = click.option("--debug", is_flag=True, expose_value=False, callback=_debug, help="Show tracebacks.")


@click.group(epilog=EXIT_CODES)
@click.version_option(package_name="streamprune")
@DEBUG
def cli() -> None:
    """Prune language models that are larger than memory to N:M sparsity, block by block."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


def main() -> None:
    """Entry point of `streamprune`."""
    guard_streams()
    try:
        cli(prog_name="streamprune")
    except ResultLost as error:
        say(f"streamprune: {error}", err=True)
        sys.exit(error.exit_code)


def command(show: Callable[[Any], None], *examples: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A subcommand: its function returns a dataclass, which is shown as text or, with --json, as one JSON object.

    Errors are one line on standard error and an exit code of their kind.
    """
    epilog = "\b\nExamples:\n" + "\n".join(f"  streamprune {example}" for example in examples)

    def decorate(function: Callable[..., Any]) -> click.Command:
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
        @click.option("--quiet", is_flag=True, help="No progress.")
        @DEBUG
        @functools.wraps(function)
        def wrapped(as_json: bool, **settings: Any) -> None:
            with one_line_errors():
                _import(function.__name__)
                with end_on_signals():
                    result = function(**settings)
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
    """Import a library function, and leave what is there then out of all collections of garbage.

    The modules of torch and transformers are a million objects that stay: to look through them while they are made, and
    at the end, took a third of the time of a short command.
    """
    gc.disable()
    try:
        getattr(streamprune, name)
        gc.freeze()
    finally:
        gc.enable()


METHOD = _options(
    click.option("--pattern", default="2:4", show_default=True, help="N:M, N of every M weights are KEPT."),
    click.option(
        "--metric", type=Choice("metric"), default=PruneConfig.metric, show_default=True, help="What ranks weights."
    ),
    click.option(
        "--shuffle",
        default=PruneConfig.shuffle,
        show_default=True,
        help="none, or searches joined by +: stride, global, local, assignment; residual in front: one "
        "permutation of the residual stream for the whole model.",
    ),
    click.option(
        "--fold",
        type=Choice("fold"),
        default=PruneConfig.fold,
        show_default=True,
        help="Attention's output: heads (inside heads, free at run time) or free (a gather).",
    ),
    click.option(
        "--refine/--no-refine",
        default=None,
        help="Improve the masks by the inputs' second moments; kept weights stay. Default: refine, if validating.",
    ),
    click.option(
        "--validate/--no-validate",
        default=PruneConfig.validate,
        show_default=True,
        help="Without: no text passes the model and no error is known; for --metric magnitude alone.",
    ),
    click.option("--reconstruct", is_flag=True, help="Fit the kept weights too: they are then NOT the source's."),
    click.option(
        "--objective",
        type=Choice("objective"),
        default=PruneConfig.objective,
        show_default=True,
        help="What searches raise: sum of retained score, or of its squares (energy).",
    ),
    click.option(
        "--shuffle-block",
        type=integer,
        default=PruneConfig.shuffle_block,
        show_default=True,
        help="Channels in a block of local.",
    ),
    click.option(
        "--alpha",
        type=number,
        default=PruneConfig.alpha,
        show_default=True,
        help="esparse: amplitude's weight beside entropy.",
    ),
    click.option(
        "--entropy-bins",
        type=integer,
        default=PruneConfig.entropy_bins,
        show_default=True,
        help="esparse: histogram bins.",
    ),
    click.option(
        "--entropy-range",
        type=Choice("entropy_range"),
        default=PruneConfig.entropy_range,
        show_default=True,
        help="esparse: what the bins span.",
    ),
    click.option(
        "--amplitude",
        type=Choice("amplitude"),
        default=PruneConfig.amplitude,
        show_default=True,
        help="esparse: norm of a channel's inputs.",
    ),
    click.option(
        "--relative/--absolute",
        default=PruneConfig.relative,
        show_default=True,
        help="esparse: divide entropy and amplitude by their means first.",
    ),
    click.option(
        "--shrinkage",
        type=number,
        help="Refinement: of second moments towards their diagonal, 0 to 1. "
        "Default: chosen for each input by held-out samples.",
    ),
    click.option(
        "--correction",
        type=number,
        help="Refinement: share of earlier blocks' error that masks shall undo, 0 to 1. Default: 0.2.",
    ),
    click.option(
        "--correction-stride",
        type=integer,
        default=PruneConfig.correction_stride,
        show_default=True,
        help="Every k-th sample also runs behind dense blocks, to learn that error.",
    ),
    click.option(
        "--moments-width",
        type=integer,
        default=PruneConfig.moments_width,
        show_default=True,
        help="Channels in one block of second moments; 4 to 12 bytes a square.",
    ),
)
RESOURCES = _options(
    click.option("--max-memory", help="Limit on host memory, such as 12GiB; a job that cannot fit is refused."),
    click.option("--max-device-memory", help="Limit on a GPU's memory, likewise."),
    click.option(
        "--micro-batch",
        type=integer,
        help="Most sequences in a block at once; no result depends on it. Default: as make up 1024 tokens.",
    ),
    click.option(
        "--prefetch",
        type=integer,
        default=1,
        show_default=True,
        help="Most blocks read ahead; no result depends on it.",
    ),
)


JOB = _options(
    click.argument("model", type=click.Path()),
    click.option("--calibration", help=f"A file, {TEXT_FILES}, or a data set NAME[:CONFIG[:SPLIT]]. "
                                       "Default: a text that ships with the package."),
    TEXT_COLUMN,
    click.option("--samples", type=integer, default=128, show_default=True, help="Calibration sequences."),
    click.option("--sequence-length", type=integer, help=f"Tokens in each. {LENGTH}"),
    click.option("--seed", type=integer, default=0, show_default=True, help="Draws the calibration sequences."),
    METHOD,
    click.option("--max-block-error", type=number, help="Budget on the error that a block adds. Default: no budget."),
    click.option(
        "--on-excess",
        type=Choice("on_excess"),
        default=PruneConfig.on_excess,
        show_default=True,
        help="What becomes of a block above the budget.",
    ),
    DEVICE,
    DTYPE,
    RESOURCES,
    SCRATCH,
    click.option("--restart", is_flag=True, help="Throw away what the output folder holds of a former job."),
    click.option("--yes", is_flag=True, help="With --restart: of a finished job too, without a question."),
)  # fmt: skip


@command(
    show_compression,
    "compress /models/llama-65b --out ./pruned",
    "compress ./opt-66b --out ./pruned --pattern 4:8 --calibration c4-train.00000-of-01024.json.gz --samples 64",
    "compress ./llama --out ./pruned --max-block-error 0.5 --on-excess keep-dense",
)
@click.option("--out", required=True, type=click.Path(), help="Output folder; the same command again goes on there.")
@JOB
def compress(quiet: bool, yes: bool, **settings: Any) -> Any:
    """Prune MODEL, a folder with a transformers checkpoint, into packed N:M form.

    The same command again goes on after the last finished block. SIGINT, SIGTERM, SIGHUP and SIGUSR1 stop the job
    at a safe point with exit code 85.
    """
    if settings["restart"] and not yes and streamprune.is_finished(settings["out"]):
        _ask_to_restart(settings["out"])
    with stop_on_signals() as should_stop:
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
@click.option("--out", type=click.Path(), help="As of compress; nothing is written.")
@JOB
def plan(quiet: bool, yes: bool, **settings: Any) -> Any:
    """What `compress` with the same options would read, write, hold in memory and take; reads headers alone."""
    return streamprune.plan(**settings)


@command(
    show_verification, "verify ./pruned", "verify ./pruned --source /models/llama-65b --json", "verify ./pruned --quick"
)
@click.argument("folder", type=click.Path())
@click.option("--source", type=click.Path(), help="The dense checkpoint: compare every kept value with it.")
@click.option("--quick", is_flag=True, help="Sizes and headers alone: sees what is missing, not what is damaged.")
def verify(quiet: bool, **settings: Any) -> Any:
    """Check every byte of an output FOLDER; exit code 1 on any fault."""
    return streamprune.verify(progress=not quiet, **settings)


@command(
    show_evaluation,
    "evaluate ./pruned --text wiki.txt",
    "evaluate /models/llama-65b --text wiki.txt --sequence-length 1024 --max-tokens 20480 --json",
)
@click.argument("model", type=click.Path())
@click.option("--text", required=True, type=click.Path(), help=f"A file, {TEXT_FILES}, not the calibration's.")
@TEXT_COLUMN
@click.option("--sequence-length", type=integer, help=f"Tokens in a window. {LENGTH}")
@click.option("--max-tokens", type=integer, help="Use only the first tokens of the text.")
@DEVICE
@DTYPE
@SCRATCH
def evaluate(quiet: bool, **settings: Any) -> Any:
    """Perplexity of a text under MODEL, a dense checkpoint or an output folder, streamed block by block."""
    return streamprune.evaluate(progress=not quiet, **settings)


@command(show_export, "export ./pruned --to dense --out ./pruned-dense")
@click.argument("folder", type=click.Path())
@click.option(
    "--to", type=Choice("to"), default="dense", show_default=True, help="dense: zeros in place, for plain transformers."
)
@click.option("--out", required=True, type=click.Path(), help="A folder that does not exist yet.")
def export(quiet: bool, **settings: Any) -> Any:
    """Write an output FOLDER as a dense checkpoint that needs nothing of streamprune."""
    return streamprune.export(progress=not quiet, **settings)


@command(show_inspection, "inspect ./pruned", "inspect ./pruned --json")
@click.argument("folder", type=click.Path())
def inspect(quiet: bool, **settings: Any) -> Any:
    """A table of an output FOLDER: layer, pattern, bytes, errors."""
    return streamprune.inspect(**settings)
