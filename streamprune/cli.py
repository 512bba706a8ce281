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
from streamprune.config import CHOICES, MIN_COVERAGE, PruneConfig
from streamprune.endings import ResultLost, end_on_signals, guard_streams, one_line_errors, stop_on_signals
from streamprune.errors import EXIT_CODES, OutputError, SettingsError
from streamprune.summaries import (
    say,
    show_compression,
    show_evaluation,
    show_export,
    show_inspection,
    show_plan,
    show_verification,
)

# Silence transformers below ERROR: most of its warnings do not apply here. Those that may concern a result are caught
# and passed on by streamprune.model.library.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:<3} {meaning}" for code, meaning in EXIT_CODES.items())


def integer(text: Any) -> Any:
    """A whole number; anything else is passed on as text, for the library to refuse with its own message."""
    try:
        return int(text)
    except ValueError:
        return text


def number(text: Any) -> Any:
    """A number, whole or not; anything else is passed on likewise."""
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


LENGTH = "Default: 2048, or as many as the model has positions if those are fewer."
DEVICE = click.option("--device", type=Choice("device"), default="auto", show_default=True, help="Where to compute.")
DTYPE = click.option(
    "--dtype",
    type=Choice("dtype"),
    default="auto",
    show_default=True,
    help="Type to compute in; float16 only on a GPU. Stored weights keep theirs. auto: the source's on a GPU; on a "
    "processor bfloat16 where the source is and there are instructions for it, else float32.",
)
SCRATCH_HELP = "Folder for hidden states; a fast local disk is best. Default: "
TEXT_FILES = ".txt, .jsonl, .json (each also .gz or .zst) or .parquet"
TEXT_COLUMN = click.option(
    "--text-column",
    default="text",
    show_default=True,
    help="Column or key that holds the text, in files other than .txt.",
)


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in the order in which --help lists them."""
    return lambda function: functools.reduce(lambda done, option: option(done), reversed(decorators), function)


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
        @click.option("--quiet", is_flag=True, help="Show no progress.")
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


METHOD = _options(
    click.option(
        "--pattern",
        default="2:4",
        show_default=True,
        help="N:M: keep N of every M consecutive weights; 0 < N < M <= 64.",
    ),
    click.option(
        "--metric",
        type=Choice("metric"),
        default=PruneConfig.metric,
        show_default=True,
        help="Score that ranks weights.",
    ),
    click.option(
        "--shuffle",
        default=PruneConfig.shuffle,
        show_default=True,
        help="Searches for an order of channels: none, or any of stride, global, local and assignment, joined by + and "
        "run one after the other. residual in front: one permutation of the residual stream for the whole model, which "
        "costs nothing at run time.",
    ),
    click.option(
        "--fold",
        type=Choice("fold"),
        default=PruneConfig.fold,
        show_default=True,
        help="How attention's output is permuted: heads (inside each head, at no cost at run time) or across-heads (a "
        "gather at run time).",
    ),
    click.option(
        "--refine/--no-refine",
        default=None,
        help="Improve masks by the second moments of each layer's inputs (X^T X, often called the Hessian); kept "
        "weights do not change. Default: refine, unless --no-validate is given.",
    ),
    click.option(
        "--validate/--no-validate",
        default=PruneConfig.validate,
        show_default=True,
        help="--no-validate runs no text through the model, so no error is measured; only for --metric magnitude.",
    ),
    click.option(
        "--reconstruct",
        is_flag=True,
        help="Also fit the kept weights, by least squares. They then differ from the source's.",
    ),
    click.option(
        "--objective",
        type=Choice("objective"),
        default=PruneConfig.objective,
        show_default=True,
        help="What searches maximise: the sum of kept scores (score) or of their squares (energy).",
    ),
    click.option(
        "--shuffle-block",
        type=integer,
        default=PruneConfig.shuffle_block,
        show_default=True,
        help="Channels in one block of the local search.",
    ),
    click.option(
        "--alpha",
        type=number,
        default=PruneConfig.alpha,
        show_default=True,
        help="esparse: weight of the amplitude relative to the entropy.",
    ),
    click.option(
        "--entropy-bins",
        type=integer,
        default=PruneConfig.entropy_bins,
        show_default=True,
        help="esparse: bins of the histogram.",
    ),
    click.option(
        "--entropy-range",
        type=Choice("entropy_range"),
        default=PruneConfig.entropy_range,
        show_default=True,
        help="esparse: what the bins span, each channel's own range (channel) or the whole layer's (layer).",
    ),
    click.option(
        "--amplitude",
        type=Choice("amplitude"),
        default=PruneConfig.amplitude,
        show_default=True,
        help="esparse: norm of a channel, l2, or l2 over the root of the number of sequences (wanda) or tokens (rms).",
    ),
    click.option(
        "--relative/--absolute",
        default=PruneConfig.relative,
        show_default=True,
        help="esparse: whether to divide entropy and amplitude by their means over the layer first.",
    ),
    click.option(
        "--shrinkage",
        type=number,
        help="Refinement: how far second moments are shrunk towards their diagonal, 0 to 1. Default: chosen for each "
        "input on held-out samples.",
    ),
    click.option(
        "--correction",
        type=number,
        help="Refinement: share of the error of earlier blocks that masks compensate for, 0 to 1. 0 spares a pass. "
        "Default: 0.2 with refinement or reconstruction, else 0.",
    ),
    click.option(
        "--correction-stride",
        type=integer,
        default=PruneConfig.correction_stride,
        show_default=True,
        help="Run every k-th sequence through the dense blocks too, to measure that error.",
    ),
    click.option(
        "--moments-width",
        type=integer,
        default=PruneConfig.moments_width,
        show_default=True,
        help="Most channels in one block of second moments, which takes up to 12 bytes times its width squared; wider "
        "inputs are split.",
    ),
)
RESOURCES = _options(
    click.option(
        "--max-memory",
        help="Limit on host memory, such as 12GiB, by an estimate. To keep it, fewer sequences run at once, nothing is "
        "read ahead, second moments are split; a job that still does not fit is refused before it starts.",
    ),
    click.option("--max-device-memory", help="Limit on the GPU's memory, in the same way."),
    click.option(
        "--micro-batch",
        type=integer,
        help="Most sequences in a block at once. On a processor results do not depend on it; on a GPU they may, and a "
        "job goes on only with the same. Default: enough to total 1,024 tokens.",
    ),
    click.option(
        "--prefetch",
        type=integer,
        default=1,
        show_default=True,
        help="Most blocks read ahead; results do not depend on it.",
    ),
    click.option(
        "--min-coverage",
        type=number,
        default=MIN_COVERAGE,
        show_default=True,
        help="Least share of the blocks' matrices that must be layers which some pattern prunes, 0 to 1; a model of "
        "which less can be pruned is refused before it starts.",
    ),
)


JOB = _options(
    click.argument("model", type=click.Path()),
    click.option(
        "--calibration",
        help=f"A file, {TEXT_FILES}, or a data set NAME[:CONFIG[:SPLIT]] of the datasets library; read until there are "
        "enough tokens. Default: a text that ships with the package.",
    ),
    TEXT_COLUMN,
    click.option("--samples", type=integer, default=128, show_default=True, help="Calibration sequences."),
    click.option("--sequence-length", type=integer, help=f"Tokens in each sequence. {LENGTH}"),
    click.option(
        "--seed", type=integer, default=0, show_default=True, help="Seed that draws the calibration sequences."
    ),
    METHOD,
    click.option(
        "--max-block-error",
        type=number,
        help="Budget on the relative error of what a block adds. Default: none, every block is pruned.",
    ),
    click.option(
        "--on-excess",
        type=Choice("on_excess"),
        default=PruneConfig.on_excess,
        show_default=True,
        help="What to do with a block above the budget.",
    ),
    DEVICE,
    DTYPE,
    RESOURCES,
    click.option("--scratch", type=click.Path(), help=f"{SCRATCH_HELP}inside the output folder."),
    click.option("--restart", is_flag=True, help="Delete what the output folder holds of an earlier job; start over."),
    click.option("--yes", is_flag=True, help="With --restart: delete even a finished job, without asking."),
)


@command(
    show_compression,
    "compress /models/llama-65b --out ./pruned",
    "compress ./opt-66b --out ./pruned --pattern 4:8 --calibration c4-train.00000-of-01024.json.gz --samples 64",
    "compress ./llama --out ./pruned --max-block-error 0.5 --on-excess keep-dense",
)
@click.option("--out", required=True, type=click.Path(), help="Output folder; run the same command again to continue.")
@JOB
def compress(quiet: bool, yes: bool, **settings: Any) -> Any:
    """Prune MODEL to packed N:M form.

    MODEL is a folder as transformers reads it: config.json, a tokenizer, and weights as safetensors or
    pytorch_model*.bin, single or sharded. Run the same command again to continue after the last finished block. SIGINT,
    SIGTERM, SIGHUP and SIGUSR1 stop the job at a safe point with exit code 85.
    """
    from streamprune.process import map_large_pieces

    map_large_pieces()
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
@click.option("--out", type=click.Path(), help="As for compress; nothing is written.")
@JOB
def plan(quiet: bool, yes: bool, **settings: Any) -> Any:
    """Show what `compress` with the same options would read, hold and take.

    Bytes to read, to write, of scratch and of memory, stage by stage; the time; and which layers stay dense. Reads only
    headers of MODEL, and times a few products to learn the speed of this machine.
    """
    return streamprune.plan(**settings)


@command(
    show_verification, "verify ./pruned", "verify ./pruned --source /models/llama-65b --json", "verify ./pruned --quick"
)
@click.argument("folder", type=click.Path())
@click.option("--source", type=click.Path(), help="The dense checkpoint: also compare every kept value with it.")
@click.option("--quick", is_flag=True, help="Check only sizes and headers: finds what is missing, not what is damaged.")
@click.option("--device", type=Choice("device"), default="auto", show_default=True, help="Whose kernels multiply.")
def verify(quiet: bool, **settings: Any) -> Any:
    """Check every byte of an output FOLDER.

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
)
@click.argument("model", type=click.Path())
@click.option("--text", required=True, type=click.Path(), help=f"A file, {TEXT_FILES}; not the calibration text.")
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
def evaluate(quiet: bool, **settings: Any) -> Any:
    """Measure the perplexity of a text.

    MODEL is a dense checkpoint or an output folder; it runs block by block. docs/method.md defines the figure.
    """
    return streamprune.evaluate(progress=not quiet, **settings)


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
    """Write an output FOLDER as a dense checkpoint.

    Plain transformers loads it, without streamprune; it is as large as the source. Stored permutations are undone: such
    layers compute the same, but are not N:M as they lie in the file.
    """
    return streamprune.export(progress=not quiet, **settings)


@command(show_inspection, "inspect ./pruned", "inspect ./pruned --json")
@click.argument("folder", type=click.Path())
def inspect(quiet: bool, **settings: Any) -> Any:
    """Show a table of an output FOLDER.

    Every layer with its pattern, shape, packed bytes, kept score (over that of the plain selection), kernel_error,
    layer_error, its block's block_error, and its output error after each step; then the layers left dense, with
    reasons. docs/method.md defines the errors.
    """
    return streamprune.inspect(**settings)
