"""Tokens a second of a packed output in transformers, beside its dense source.

    python examples/make_checkpoint.py BIG/dense --like llama-7b --blocks 4 --dtype bfloat16
    streamprune compress BIG/dense --out BIG/packed --metric magnitude --no-validate --shuffle none
    python examples/benchmarks/bench_transformers.py BIG/dense BIG/packed [--prompt-tokens 16] [--tokens 32] [--json]

Both models are in memory at once and take turns, a round is one greedy `generate` of each, batch 1. A token's time is
that of `--tokens` new ones less that of one, over the difference, so that the prompt is not in it. Figures are medians
of the rounds, ratios medians of each round's.
"""

import json
import statistics
import time
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM

import streamprune
from streamprune.model.machine import processor_name


def seconds_of(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    start = time.perf_counter()
    said = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    spent = time.perf_counter() - start
    if said.shape[1] != prompt.shape[1] + tokens:
        raise click.ClickException(f"{said.shape[1] - prompt.shape[1]} tokens came where {tokens} were asked for")
    return spent


def round_of(models: dict[str, Any], prompt: torch.Tensor, tokens: int) -> dict[str, dict[str, float]]:
    """Seconds of the prompt and its first token, and tokens a second after it, of each model."""
    found = {}
    for name, model in models.items():
        first, all_of_them = seconds_of(model, prompt, 1), seconds_of(model, prompt, tokens)
        found[name] = {"prompt_seconds": first, "tokens_per_second": (tokens - 1) / (all_of_them - first)}
    return found


@click.command(help=__doc__)
@click.argument("dense", type=click.Path(exists=True))
@click.argument("packed", type=click.Path(exists=True))
@click.option("--prompt-tokens", default=16, show_default=True)
@click.option("--tokens", default=32, show_default=True, help="New ones in a turn.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True, help="What both compute in.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile both models' forward, with a static cache.")
@click.option("--json", "as_json", is_flag=True)
def main(
    dense: str, packed: str, prompt_tokens: int, tokens: int, rounds: int, device: str, dtype: str, compiled: bool,
    as_json: bool,
) -> None:  # fmt: skip
    models = {
        "dense": AutoModelForCausalLM.from_pretrained(dense, dtype=dtype, device_map=device),
        "packed": streamprune.load(packed, dtype=dtype, device=device),
    }
    for model in models.values():
        if compiled:
            model.forward = torch.compile(model.forward)
            model.generation_config.cache_implementation = "static"
    prompt = torch.randint(models["dense"].config.vocab_size, (1, prompt_tokens), device=device)
    round_of(models, prompt, 4)  # reads what is mapped, compiles
    found = [round_of(models, prompt, tokens) for _ in range(rounds)]
    figures: dict[str, Any] = {"processor": processor_name(torch.bfloat16), "threads": torch.get_num_threads()}
    for name in models:
        figures[name] = {key: statistics.median(one[name][key] for one in found) for key in found[0][name]}
    for key in found[0]["dense"]:
        ratios = [one["packed"][key] / one["dense"][key] for one in found]
        figures[f"{key}, packed over dense"] = {
            "median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)
        }  # fmt: skip
    if as_json:
        click.echo(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        shown = ", ".join(f"{key} {number:.3f}" for key, number in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name}: {shown}")


if __name__ == "__main__":
    main()
