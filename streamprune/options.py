"""The options of the command line that several commands share, in the order in which --help lists them."""

import functools
from collections.abc import Callable
from typing import Any, get_args

import click

from streamprune.config import CHOICES, MIN_COVERAGE, PruneConfig


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


class Choice(click.Choice[str]):
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


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in the order in which --help lists them."""
    return lambda function: functools.reduce(lambda done, option: option(done), reversed(decorators), function)


METHOD = options(
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
        "--starved",
        type=Choice("starved"),
        default=PruneConfig.starved,
        show_default=True,
        help="An expert that sees fewer tokens than --min-expert-tokens: rank its weights by what it makes of its own "
        "inputs and of other experts' (pool) or by their magnitude alone (magnitude), or leave it as it is (dense).",
    ),
    click.option(
        "--min-expert-tokens",
        type=integer,
        default=PruneConfig.min_expert_tokens,
        show_default=True,
        help="Tokens of the calibration text with which an expert is not starved.",
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
RESOURCES = options(
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


JOB = options(
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
    click.option(
        "--time-budget",
        help="Stop with exit code 85 before this time is over, such as 3h50m, 90m or 4:00:00 (hours first); the same "
        "command goes on. Default: none.",
    ),
    click.option("--restart", is_flag=True, help="Delete what the output folder holds of an earlier job; start over."),
    click.option("--yes", is_flag=True, help="With --restart: delete even a finished job, without asking."),
)
