"""What the commands print for people: the results of the library's functions, line by line."""

import dataclasses
import shlex
from typing import Any

import click

MAX_CHARACTERS = 2000  # of a line that is printed


def say(text: str, err: bool = False) -> None:
    """Print a line. It may hold names from files, so control characters are escaped and very long lines are cut."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: MAX_CHARACTERS + 1])
    click.echo(shown if len(text) <= MAX_CHARACTERS else f"{shown[:MAX_CHARACTERS]}...", err=err)


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
        else ("worst block", f"{result.worst_block[0]}  block error {_figure(result.worst_block[1], '.4f')}"),
        *(("worst layer", f"{name}  layer error {_figure(error, '.4f')}") for name, error in result.worst_layers),
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
    rows += [("not copied", text) for text in _not_copied(result.left_out)]
    if result.format_version < 2:
        rows.append(("format", f"version {result.format_version}, which plain transformers loads wrongly; --restart"))
    rows.append(("manifest sha256", result.manifest_sha256))
    say(f"{result.status}: {result.out}, {result.blocks} blocks")
    for label, text in rows:
        say(f"  {label:17} {text}")


def show_plan(result: Any) -> None:
    """What a job would read, hold and take, then which layers would stay dense."""
    memory = dataclasses.asdict(result.memory)
    ahead, on_gpu = memory.pop("blocks_ahead"), memory.pop("on_gpu")
    rows = [
        (
            "model",
            f"{result.blocks} blocks, {result.parameters / 1e9:.2f} G parameters, {result.layers} layers to prune",
        ),
        ("text", f"{result.samples} sequences of {result.sequence_length} tokens" if result.samples else "none"),
        ("pruned", f"{_size(result.pruned_bytes)}, of {result.coverage:.1%} of the blocks' matrices"),
        ("left dense", _size(result.dense_bytes)),
        ("copied", _size(result.copied_bytes)),
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
        say(f"  {label:17} {text}")


def show_verification(result: Any) -> None:
    """Faults, then what was checked."""
    for fault in result.faults:
        say(f"FAULT  {fault}")
    if result.reconstructed:
        say("weights were reconstructed: kept values are not the source's, only masks are compared with it")
    if result.ok and not result.validated:
        say("not validated: no text has passed the model, what pruning costs is unknown (evaluate measures it)")
    if result.quick:
        say("sizes and headers checked; no weight was read")
    else:
        how = "against the source, position by position" if result.against_source else "by itself, without its source"
        worst = max((layer.relative_error for layer in result.layers if layer.relative_error is not None), default=0.0)
        say(f"{len(result.layers)} layers checked {how}; largest error of a sparse product {worst:.2g}")
    say(f"manifest sha256 {result.manifest_sha256}")
    say("ok" if result.ok else f"{len(result.faults)} fault{'s' if len(result.faults) > 1 else ''}")


def show_evaluation(result: Any) -> None:
    """A line for the text, and one for each task and metric."""
    cost = f"({result.seconds:.1f} s, peak memory {_size(result.peak_memory_bytes)})"
    if result.loss is not None:
        beyond = f"beyond 1.8e308 (loss {_figure(result.loss, '.4f')} nats a token)"
        perplexity = beyond if result.perplexity is None else f"{result.perplexity:.4f}"
        windows = f"{result.tokens} tokens in windows of {result.sequence_length}"
        say(f"perplexity {perplexity} over {windows}{'' if result.tasks else f' {cost}'}")
    for task, metrics in result.tasks.items():
        for metric, value in metrics.items():
            if error := metrics.get(_error_of(metric)):
                say(f"{task:24} {metric:16} {value:.4f} +- {error:.4f}")
            elif not metric.partition(",")[0].endswith("_stderr"):
                say(f"{task:24} {metric:16} {value:.4f}")
    if result.tasks:
        say(cost)


def _error_of(metric: str) -> str:
    """The name of a metric's standard error: "acc_stderr", or "exact_match_stderr,strict" of what a filter passed."""
    name, comma, passed = metric.partition(",")
    return f"{name}_stderr{comma}{passed}"


def show_text(text: str) -> None:
    """A piece of a text on standard output, at once; but for the ends of lines its control characters are escaped."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    click.echo(shown, nl=False)


def show_texts(result: Any) -> None:
    """Several prompts, each with its text; a single one's is there already, but for the end of its line."""
    if len(result.prompts) == 1:
        show_text("\n")
    else:
        for prompt, text in zip(result.prompts, result.texts, strict=True):
            show_text(f"{prompt}{text}\n\n")


def show_pace(result: Any) -> None:
    """Figures of what was generated, on standard error: standard output has its text."""
    pace = "" if result.tokens_per_second is None else f", then {result.tokens_per_second:.2f} tokens/s"
    say(
        f"{sum(map(len, result.tokens))} tokens: the first after {result.first_token_seconds:.2f} s{pace}; "
        f"{result.resident_blocks} of {result.blocks} blocks in memory, peak memory {_size(result.peak_memory_bytes)}",
        err=True,
    )
    if result.expert_hit_rate is not None:
        say(
            f"room for {result.resident_experts} of {result.experts} experts; {result.expert_hit_rate:.1%} of those "
            "that tokens were routed to were there",
            err=True,
        )
    if result.disk_bytes_per_second is not None:
        say(
            f"{_size(result.pass_bytes)} read for each pass; the disk's {_size(result.disk_bytes_per_second)}/s allow "
            f"{result.ceiling_tokens_per_second:.2f} tokens/s",
            err=True,
        )


def show_export(result: Any) -> None:
    """What was written, and how many layers are N:M as they lie in the file."""
    in_order, regathered = len(result.in_memory_order), result.regathered
    say(f"{result.out}: {_size(result.output_bytes)}; {in_order} layers are N:M as they lie in the file")
    if regathered:
        say(
            f"{len(regathered)} layers had a stored permutation undone: same function, but N:M only through it "
            f"(first {regathered[0]})"
        )
    for text in _not_copied(result.left_out):
        say(f"not copied: {text}")


def show_inspection(result: Any) -> None:
    """The table of layers, then the sums."""
    width = max([len(row.name) for row in result.layers] + [5])
    names = ("selection", "shuffle", "refinement", "reconstruction")
    say(
        f"{'layer':{width}}  N:M   {'shape':>13}  {'packed':>10}  {'kept':>6}  kernel err  layer err  block err"
        f"  output error after {', '.join(names)}"
    )
    for row in result.layers:
        shape = f"{row.shape[0]} x {row.shape[1]}"
        first, last = row.steps[0]["retained_score"], row.steps[-1]["retained_score"]
        after = {step["name"]: step["output_error"] for step in row.steps}
        errors = "  ".join(f"{_figure(after.get(name), '.4f'):>6}" for name in names)
        say(
            f"{row.name:{width}}  {row.pattern:4}  {shape:>13}  {_size(row.packed_bytes):>10}"
            f"  {last / first if first else 1.0:6.3f}"
            f"  {_figure(row.kernel_error, '.1e'):>10}  {_figure(row.layer_error, '.4f'):>9}"
            f"  {_figure(row.block_error, '.4f'):>9}  {errors}"
        )
    for name, reason in result.dense_layers.items():
        say(f"{name:{width}}  dense: {reason}")
    share = result.packed_bytes / result.dense_bytes if result.dense_bytes else 0.0
    say(
        f"{len(result.layers)} pruned layers: {_size(result.dense_bytes)} dense, {_size(result.packed_bytes)} packed "
        f"({share:.2%}), and {_size(result.permutation_bytes)} of stored permutations"
    )
    say("kept: retained score after the last step over that of the plain selection")


def show_submission(result: Any) -> None:
    """The script itself where it was not submitted, so that it can be written to a file; or the number Slurm gave."""
    if result.job_id is None:
        click.echo(result.script, nl=False)
    else:
        many = f", an array of {len(result.outs)}" if len(result.outs) > 1 else ""
        say(f"submitted job {result.job_id}{many}; streamprune status {shlex.join(result.outs)} shows how far it is")


def show_status(result: Any) -> None:
    """A line for each job, and one for its last error."""
    width = max([len(job.out) for job in result.jobs] + [6])
    say(f"{'output':{width}}  {'state':11}  {'block':>9}  {'done':>6}  blocks/h   left  restarts  host")
    for job in result.jobs:
        share = f"{job.blocks_done / job.blocks:.1%}" if job.blocks else "-"
        rate = "-" if job.blocks_per_hour is None else f"{job.blocks_per_hour:.4g}"
        say(
            f"{job.out:{width}}  {job.state:11}  {f'{job.blocks_done}/{_known(job.blocks)}':>9}  {share:>6}  {rate:>8}"
            f"  {_time(job.seconds_left):>5}  {_known(job.restarts):>8}  {_known(job.host)}"
        )
        if job.last_error is not None:
            say(f"  last error: {job.last_error}")


def _known(value: Any) -> str:
    return "-" if value is None else str(value)


def _time(seconds: float | None) -> str:
    """Hours and minutes, or seconds where it is less than two minutes."""
    if seconds is None:
        return "-"
    return f"{seconds:.0f}s" if seconds < 120 else f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}"


def _not_copied(left_out: dict[str, str]) -> list[str]:
    """Files left out, a line for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    more = {reason: f" and {len(some) - 3} more" if len(some) > 3 else "" for reason, some in names.items()}
    return [f"{', '.join(some[:3])}{more[reason]}: {reason}" for reason, some in names.items()]


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form if value < 1e6 else ".1e")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.1f} TiB"
