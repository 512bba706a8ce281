"""Text from disk: a packed output beside its dense source, what the disk allows, and AirLLM on the dense one.

    python examples/make_checkpoint.py BIG/dense --like llama-7b --blocks 12 --dtype bfloat16
    streamprune compress BIG/dense --out BIG/packed --metric magnitude --no-validate --shuffle none
    python examples/benchmarks/bench_generate.py BIG/dense BIG/packed --max-memory 2.5GB [--airllm PYTHON] [--json]

What is compared takes turns, each turn a process of its own with nothing of the files in the page cache: `streamprune
generate` of both folders by the same command, and AirLLM (whose environment's python is PYTHON) with the files of its
own beside them, which it makes first, and which leave the page cache after every token. The ceiling is measured in the
same process, by the same reading with nothing computed. Figures are medians of the rounds, ratios medians of each
round's.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

PROMPT = "The capital of France is"
AIRLLM = """
import json, os, sys, time
from pathlib import Path
import torch
from airllm import AutoModel

def forget(folder):
    for path in Path(folder).rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

class Watch:
    times = []
    def put(self, _):
        begin = time.perf_counter()
        forget(sys.argv[2])
        self.times.append((begin, time.perf_counter()))
    def end(self):
        pass

model = AutoModel.from_pretrained(sys.argv[1], device="cpu", dtype=torch.bfloat16, layer_shards_saving_path=sys.argv[2])
ids = torch.tensor([list(sys.argv[3].encode())])
model.generate(ids, max_new_tokens=int(sys.argv[4]), use_cache=True, do_sample=False, streamer=Watch())
spans = [later[0] - before[1] for before, later in zip(Watch.times[1:], Watch.times[2:])]
print(json.dumps({"tokens_per_second": len(spans) / sum(spans)}))
"""


def forget(folder: Path) -> None:
    """Have the page cache drop a folder's files."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def result_of(*command: object) -> dict[str, Any]:
    """The JSON object that ends what a command prints."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout[("\n" + done.stdout).rindex("\n{") :]))


def ours(folder: Path, max_memory: str, tokens: int) -> dict[str, Any]:
    """What `streamprune generate` reports."""
    forget(folder)
    command = [sys.executable, "-m", "streamprune", "generate", folder, "--prompt", PROMPT, "--json"]
    return result_of(*command, "--max-memory", max_memory, "--max-new-tokens", tokens, "--dtype", "bfloat16")


def measure(dense: Path, packed: Path, max_memory: str, tokens: int, airllm: str | None) -> dict[str, dict[str, Any]]:
    """One round."""
    found = {name: ours(folder, max_memory, tokens) for name, folder in (("packed", packed), ("dense", dense))}
    if airllm is not None:
        own = dense.parent / "airllm"
        forget(own)
        few = max(3, tokens // 4)  # a token takes it long
        found["airllm"] = result_of(airllm, "-c", AIRLLM, dense, own, PROMPT, few)
    click.echo(", ".join(f"{name} {one['tokens_per_second']:.3f} tokens/s" for name, one in found.items()), err=True)
    return found


def summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Medians over rounds."""

    def median(value: Any) -> float:
        return statistics.median(map(value, rounds))

    names = list(rounds[0])
    figures = {f"{name} tokens/s": median(lambda one, n=name: one[n]["tokens_per_second"]) for name in names}
    for name in ("packed", "dense"):
        figures[f"{name} blocks in memory"] = rounds[0][name]["resident_blocks"]
        figures[f"{name} GB read for a token"] = rounds[0][name]["pass_bytes"] / 1e9
        figures[f"{name} GB/s of the disk"] = median(lambda one, n=name: one[n]["disk_bytes_per_second"] / 1e9)
        figures[f"{name} share of the ceiling"] = median(
            lambda one, n=name: one[n]["tokens_per_second"] / one[n]["ceiling_tokens_per_second"]
        )
    for name in names[1:]:
        figures[f"packed / {name}"] = median(
            lambda one, n=name: one["packed"]["tokens_per_second"] / one[n]["tokens_per_second"]
        )
    if "airllm" in names:
        figures["dense / airllm"] = median(
            lambda one: one["dense"]["tokens_per_second"] / one["airllm"]["tokens_per_second"]
        )
    return figures


@click.command(help=__doc__)
@click.argument("dense", type=click.Path(path_type=Path, exists=True))
@click.argument("packed", type=click.Path(path_type=Path, exists=True))
@click.option("--max-memory", required=True, help="As for streamprune generate.")
@click.option("--tokens", default=24, show_default=True, help="New tokens in each turn.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--airllm", help="Python of an environment with AirLLM; needs room for another copy of DENSE beside it.")
@click.option("--json", "as_json", is_flag=True)
def main(
    dense: Path, packed: Path, max_memory: str, tokens: int, rounds: int, airllm: str | None, as_json: bool
) -> None:
    measured = [measure(dense, packed, max_memory, tokens, airllm) for _ in range(rounds)]
    figures = summary(measured)
    if as_json:
        click.echo(json.dumps({"rounds": measured, "medians": figures}, indent=2))
        return
    for name, value in figures.items():
        click.echo(f"{name:26} {value:.3f}")


if __name__ == "__main__":
    main()
