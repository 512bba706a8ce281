"""The command line: parse, call one library function of the same signature, format its result."""

import dataclasses
import functools
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

import streamprune
from streamprune.config import PruneConfig
from streamprune.errors import StreampruneError

# Of transformers errors alone are heard: what it warns of is of other uses, and errors are one line.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
EXIT_CODES = (
    "Exit codes: 0 done, 1 fault, 2 settings, 3 checkpoint, 4 text, 5 output folder, 6 NaN or infinity, 7 "
    "kernel fault, 8 block error above budget, 85 interrupted (the same command goes on), "
    "130 ended by Ctrl-C."
)
MOST_CHARACTERS = 2000  # of a line that is printed
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
DTYPE = click.option(
    "--dtype", default="auto", show_default=True, help="Arithmetic: auto, float32, bfloat16, float16. Stored bits stay."
)
SCRATCH = click.option("--scratch", type=click.Path(), help="Folder for hidden states; a fast local disk is best.")
QUIET = click.option("--quiet", is_flag=True, help="No progress bars.")


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, listed by --help in this order."""
    return lambda function: functools.reduce(lambda done, option: option(done), reversed(decorators), function)


@click.group(epilog=EXIT_CODES)
@click.version_option(package_name="streamprune")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Prune language models that are larger than memory to N:M sparsity, block by block."""
    context.obj = debug
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


def main() -> None:
    """Entry point of `streamprune`."""
    cli(prog_name="streamprune")


def command(show: Callable[[Any], None], *examples: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A subcommand: its function returns a dataclass, which is shown as text or, with --json, as one JSON object.

    Errors are one line on standard error and an exit code of their kind.
    """
    epilog = "\b\nExamples:\n" + "\n".join(f"  streamprune {example}" for example in examples)

    def decorate(function: Callable[..., Any]) -> click.Command:
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
        @functools.wraps(function)
        def wrapped(as_json: bool, **settings: Any) -> None:
            with _errors_in_one_line():
                _import(function.__name__)
                result = function(**settings)
            if as_json:
                click.echo(json.dumps(dataclasses.asdict(result), indent=2))
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


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo("streamprune: interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        if click.get_current_context().find_root().obj:  # --debug
            raise
        expected = isinstance(error, StreampruneError)
        message = str(error) if expected else f"unexpected {type(error).__name__}: {error} (--debug shows where)"
        _say(f"streamprune: {' '.join(message.split())}", err=True)
        sys.exit(error.exit_code if isinstance(error, StreampruneError) else 1)


METHOD = _options(
    click.option("--pattern", default="2:4", show_default=True, help="N:M, N of every M weights are KEPT."),
    click.option("--metric", default=PruneConfig.metric, show_default=True, help="esparse, wanda, ria or magnitude."),
    click.option(
        "--shuffle",
        default=PruneConfig.shuffle,
        show_default=True,
        help="none, or searches joined by +: stride, global, local, assignment; residual in front: one "
        "permutation of the residual stream for the whole model.",
    ),
    click.option(
        "--fold",
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
        default=PruneConfig.objective,
        show_default=True,
        help="What searches raise: sum of retained score, or of its squares (energy).",
    ),
    click.option(
        "--shuffle-block", default=PruneConfig.shuffle_block, show_default=True, help="Channels in a block of local."
    ),
    click.option(
        "--alpha", default=PruneConfig.alpha, show_default=True, help="esparse: amplitude's weight beside entropy."
    ),
    click.option(
        "--entropy-bins", default=PruneConfig.entropy_bins, show_default=True, help="esparse: histogram bins."
    ),
    click.option(
        "--entropy-range",
        default=PruneConfig.entropy_range,
        show_default=True,
        help="esparse: bins span channel or layer.",
    ),
    click.option("--amplitude", default=PruneConfig.amplitude, show_default=True, help="esparse: l2, wanda or rms."),
    click.option(
        "--relative/--absolute",
        default=PruneConfig.relative,
        show_default=True,
        help="esparse: divide entropy and amplitude by their means first.",
    ),
    click.option(
        "--shrinkage",
        type=float,
        help="Refinement: of second moments towards their diagonal, 0 to 1. "
        "Default: chosen for each input by held-out samples.",
    ),
    click.option(
        "--correction",
        default=PruneConfig.correction,
        show_default=True,
        help="Refinement: share of earlier blocks' error that masks shall undo, 0 to 1.",
    ),
    click.option(
        "--correction-stride",
        default=PruneConfig.correction_stride,
        show_default=True,
        help="Every k-th sample also runs behind dense blocks, to learn that error.",
    ),
    click.option(
        "--moments-width",
        default=PruneConfig.moments_width,
        show_default=True,
        help="Channels in one block of second moments; 4 to 12 bytes a square.",
    ),
)
AMOUNT = _options(
    click.option("--samples", default=128, show_default=True, help="Calibration sequences."),
    click.option("--sequence-length", default=2048, show_default=True, help="Tokens in each."),
)
RESOURCES = _options(
    click.option("--max-memory", help="Limit on host memory, such as 12GiB; a job that cannot fit is refused."),
    click.option("--max-device-memory", help="Limit on a GPU's memory, likewise."),
    click.option(
        "--micro-batch",
        type=int,
        help="Most sequences in a block at once; no result depends on it. Default: as make up 1024 tokens.",
    ),
    click.option("--prefetch", default=1, show_default=True, help="Most blocks read ahead; no result depends on it."),
)


def show_compression(result: Any) -> None:
    """The closing summary of `compress`."""
    share = result.packed_bytes / result.dense_bytes if result.dense_bytes else 0.0
    rows = [
        ("time", f"{result.seconds:.1f} s"),
        ("peak memory", _size(result.peak_memory_bytes)),
        ("model", f"{_size(result.source_bytes)} -> {_size(result.output_bytes)}"),
        ("pruned layers", f"{_size(result.dense_bytes)} -> {_size(result.packed_bytes)} ({share:.2%})"),
        ("permutations", f"{_size(result.permutation_bytes)} stored beside them"),
        *([("second moments", f"{_size(result.moments_bytes)} at once")] if result.moments_bytes else []),
        ("worst block", "unknown: not validated, no text has passed the model")
        if result.worst_block is None
        else ("worst block", f"{result.worst_block[0]}  block error {result.worst_block[1]:.4f}"),
        *(("worst layer", f"{name}  layer error {error:.4f}") for name, error in result.worst_layers),
        *(("kept dense", f"{name} (above the budget)") for name in result.kept_dense),
    ]
    kept = tuple(f"{name}." for name in result.kept_dense)
    unfit = [f"{name}: {reason}" for name, reason in result.dense_layers.items() if not name.startswith(kept)]
    rows += [("not pruned", text) for text in unfit[:10]]
    if len(unfit) > 10:
        rows.append(("not pruned", f"and {len(unfit) - 10} more; see streamprune inspect"))
    if result.layers_in_moment_blocks:
        count, first = len(result.layers_in_moment_blocks), result.layers_in_moment_blocks[0]
        rows.append(("in blocks", f"{count} layers' inputs are wider than --moments-width (first {first})"))
    if result.reconstructed:
        rows.append(("reconstructed", "kept weights were fitted: they are NOT the source's"))
    rows.append(("manifest sha256", result.manifest_sha256))
    _say(f"{result.status}: {result.out}, {result.blocks} blocks")
    for label, text in rows:
        _say(f"  {label:17} {text}")


@command(
    show_compression,
    "compress /models/llama-65b --out ./pruned",
    "compress ./opt-66b --out ./pruned --pattern 4:8 --calibration c4.jsonl --samples 64",
    "compress ./llama --out ./pruned --max-block-error 0.5 --on-excess keep-dense",
)
@click.argument("model", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Output folder; the same command again goes on there.")
@click.option("--calibration", help="A .txt, .jsonl or .parquet file, or a data set NAME[:CONFIG[:SPLIT]]. "
                                    "Default: a text that ships with the package.")  # fmt: skip
@AMOUNT
@click.option("--seed", default=0, show_default=True, help="Draws the calibration sequences.")
@METHOD
@click.option("--max-block-error", type=float, help="Budget on the error of what a block adds. Default: no budget.")
@click.option("--on-excess", default="stop", show_default=True, help="Above the budget: stop, keep-dense or warn.")
@DEVICE
@DTYPE
@RESOURCES
@SCRATCH
@click.option("--restart", is_flag=True, help="Throw away what the output folder holds of a former job.")
@QUIET
def compress(quiet: bool, **settings: Any) -> Any:
    """Prune MODEL, a folder with a transformers checkpoint, into packed N:M form.

    The same command again goes on after the last finished block. SIGINT, SIGTERM and SIGUSR1 stop the job at a safe
    point with exit code 85.
    """
    if settings["max_block_error"] is None and settings["validate"] and not quiet:
        click.echo("no --max-block-error: every block is pruned, whatever it costs", err=True)
    with _stop_on_signals() as should_stop:
        return streamprune.compress(progress=not quiet, should_stop=should_stop, **settings)


def show_plan(result: Any) -> None:
    """What a job would do, then what would stay dense."""
    memory = dataclasses.asdict(result.memory)
    ahead, on_gpu = memory.pop("blocks_ahead"), memory.pop("on_gpu")
    rows = [
        (
            "model",
            f"{result.blocks} blocks, {result.parameters / 1e9:.2f} G parameters, {result.layers} layers to prune",
        ),
        ("read", _size(result.read_bytes)),
        ("written", _size(result.written_bytes)),
        ("scratch", _size(result.scratch_bytes)),
        ("peak memory", f"{_size(result.peak_memory_bytes)}, estimated"),
        *([("  of the GPU", _size(result.peak_device_memory_bytes))] if on_gpu else []),
        *((f"  {stage.replace('_', ' ')}", _size(count)) for stage, count in memory.items()),
        ("pace", f"{result.micro_batch} sequences at once, {ahead} blocks read ahead"),
        ("moments", f"blocks of at most {result.moments_width} channels"),
        ("time", f"{result.seconds / 3600:.1f} h" if result.seconds > 3600 else f"{result.seconds:.0f} s"),
        ("", f"assuming {result.assumption}"),
        *(("stays dense", f"{name}: {reason}") for name, reason in list(result.dense_layers.items())[:10]),
    ]
    if len(result.dense_layers) > 10:
        rows.append(("stays dense", f"and {len(result.dense_layers) - 10} more; --json lists all"))
    for label, text in rows:
        _say(f"  {label:17} {text}")


@command(
    show_plan,
    "plan /models/llama-65b",
    "plan /models/llama-65b --max-memory 9GiB --samples 16 --sequence-length 256 --json",
)
@click.argument("model", type=click.Path())
@METHOD
@AMOUNT
@DEVICE
@DTYPE
@RESOURCES
def plan(**settings: Any) -> Any:
    """What `compress` with the same options would read, write, hold in memory and take; reads headers alone."""
    return streamprune.plan(**settings)


def show_verification(result: Any) -> None:
    """Faults, then what was checked."""
    for fault in result.faults:
        _say(f"FAULT  {fault}")
    if result.reconstructed:
        _say("weights were reconstructed: kept values are not the source's, only masks are compared with it")
    if result.ok and not result.validated:
        _say("not validated: no text has passed the model, what pruning costs is unknown (evaluate measures it)")
    if result.quick:
        _say("sizes and headers checked; no weight was read")
    else:
        how = "against the source, position by position" if result.against_source else "by itself, without its source"
        worst = max((layer.relative_error for layer in result.layers if layer.relative_error is not None), default=0.0)
        _say(f"{len(result.layers)} layers checked {how}; largest error of a sparse product {worst:.2g}")
    _say(f"manifest sha256 {result.manifest_sha256}")
    _say("ok" if result.ok else f"{len(result.faults)} fault{'s' if len(result.faults) > 1 else ''}")


@command(
    show_verification, "verify ./pruned", "verify ./pruned --source /models/llama-65b --json", "verify ./pruned --quick"
)
@click.argument("folder", type=click.Path())
@click.option("--source", type=click.Path(), help="The dense checkpoint: compare every kept value with it.")
@click.option("--quick", is_flag=True, help="Sizes and headers alone: sees what is missing, not what is damaged.")
@QUIET
def verify(quiet: bool, **settings: Any) -> Any:
    """Check every byte of an output FOLDER; exit code 1 on any fault."""
    return streamprune.verify(progress=not quiet, **settings)


def show_evaluation(result: Any) -> None:
    """One line."""
    _say(
        f"perplexity {result.perplexity:.4f} over {result.tokens} tokens in windows of {result.sequence_length} "
        f"({result.seconds:.1f} s, peak memory {_size(result.peak_memory_bytes)})"
    )


@command(
    show_evaluation,
    "evaluate ./pruned --text wiki.txt",
    "evaluate /models/llama-65b --text wiki.txt --sequence-length 1024 --max-tokens 20480 --json",
)
@click.argument("model", type=click.Path())
@click.option(
    "--text", required=True, type=click.Path(), help="A .txt, .jsonl or .parquet file, not the calibration's."
)
@click.option("--sequence-length", default=2048, show_default=True, help="Tokens in a window.")
@click.option("--max-tokens", type=int, help="Use only the first tokens of the text.")
@DEVICE
@DTYPE
@SCRATCH
@QUIET
def evaluate(quiet: bool, **settings: Any) -> Any:
    """Perplexity of a text under MODEL, a dense checkpoint or an output folder, streamed block by block."""
    return streamprune.evaluate(progress=not quiet, **settings)


def show_export(result: Any) -> None:
    """What was written, and what of it is N:M in memory order."""
    in_order, regathered = len(result.in_memory_order), result.regathered
    _say(f"{result.out}: {_size(result.output_bytes)}; {in_order} layers are N:M as they lie in the file")
    if regathered:
        _say(
            f"{len(regathered)} layers had a stored permutation undone: same function, but N:M only through it "
            f"(first {regathered[0]})"
        )


@command(show_export, "export ./pruned --to dense --out ./pruned-dense")
@click.argument("folder", type=click.Path())
@click.option("--to", default="dense", show_default=True, help="dense: zeros in place, for plain transformers.")
@click.option("--out", required=True, type=click.Path(), help="A folder that does not exist yet.")
@QUIET
def export(quiet: bool, **settings: Any) -> Any:
    """Write an output FOLDER as a dense checkpoint that needs nothing of streamprune."""
    return streamprune.export(progress=not quiet, **settings)


def show_inspection(result: Any) -> None:
    """The table of layers, then the sums."""
    width = max([len(row.name) for row in result.layers] + [5])
    names = ("selection", "shuffle", "refinement", "reconstruction")
    _say(
        f"{'layer':{width}}  N:M   {'shape':>13}  {'packed':>10}  {'kept':>6}  kernel err  layer err  block err"
        f"  output error after {', '.join(names)}"
    )
    for row in result.layers:
        shape = f"{row.shape[0]} x {row.shape[1]}"
        first, last = row.steps[0]["retained_score"], row.steps[-1]["retained_score"]
        after = {step["name"]: step["output_error"] for step in row.steps}
        errors = "  ".join(f"{_figure(after.get(name), '.4f'):>6}" for name in names)
        _say(
            f"{row.name:{width}}  {row.pattern:4}  {shape:>13}  {_size(row.packed_bytes):>10}"
            f"  {last / first if first else 1.0:6.3f}"
            f"  {_figure(row.kernel_error, '.1e'):>10}  {_figure(row.layer_error, '.4f'):>9}"
            f"  {_figure(row.block_error, '.4f'):>9}  {errors}"
        )
    for name, reason in result.dense_layers.items():
        _say(f"{name:{width}}  dense: {reason}")
    share = result.packed_bytes / result.dense_bytes if result.dense_bytes else 0.0
    _say(
        f"{len(result.layers)} pruned layers: {_size(result.dense_bytes)} dense, {_size(result.packed_bytes)} packed "
        f"({share:.2%}), and {_size(result.permutation_bytes)} of stored permutations"
    )
    _say("kept: retained score after the last step over that of the plain selection")


@command(show_inspection, "inspect ./pruned", "inspect ./pruned --json")
@click.argument("folder", type=click.Path())
def inspect(**settings: Any) -> Any:
    """A table of an output FOLDER: layer, pattern, bytes, errors."""
    return streamprune.inspect(**settings)


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Ask the job to stop at its next safe point; a second signal of the same kind ends the process at once."""
    asked: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    former = {kind: signal.signal(kind, handle) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in former.items():
            signal.signal(kind, handler)


def _say(text: str, err: bool = False) -> None:
    """Print a line. It may hold names from files: what a terminal would obey is escaped, and no line is endless."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: MOST_CHARACTERS + 1])
    click.echo(shown if len(text) <= MOST_CHARACTERS else f"{shown[:MOST_CHARACTERS]}...", err=err)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.1f} TiB"
