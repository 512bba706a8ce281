"""The main job on a real model: compress SmolLM2-135M to 2:4, verify it, evaluate it, print one table, let it speak.

    python examples/demo.py

Writes into demo/: the source model and texts (see real_inputs.py), and the packed model in demo/pruned. Calibration is
web text, evaluation is encyclopedia text that calibration never saw. Interrupted, it goes on where it stopped when run
again. Exits with 1 where a layer does not verify.

Needs 1 GB of memory and of disk, and a package index the first time; two cores take about a quarter of an hour.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("demo/smollm2-135m")
PRUNED = Path("demo/pruned")
CALIBRATION = ("--calibration", "demo/text/calibration.txt", "--samples", "32", "--sequence-length", "512")
EVALUATION = ("--text", "demo/text/wiki.txt", "--sequence-length", "1024", "--max-tokens", "20480")

# What loading costs without streamprune: the whole model in fp32 and nothing else. VmHWM is the process's own peak;
# ru_maxrss would start at its parent's.
LOAD_DENSE = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""

PROMPT = "The best thing about a long walk in the mountains is"
# What transformers says without and with packed weights; the second needs the plug-in that `import streamprune` is.
SPEAK = """
import sys, streamprune
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[2:]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    said = model.generate(**tokenizer(sys.argv[1], return_tensors="pt"), max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(said[0], skip_special_tokens=True).replace(chr(10), " "))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository's root; progress (stderr) goes to the terminal, figures (stdout) come back."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def streamprune(*arguments: str) -> dict[str, Any]:
    """The figures that one command prints with --json; the demo ends where it prints none."""
    print("\n$ streamprune", *arguments, file=sys.stderr, flush=True)
    done = run("-m", "streamprune", *arguments, "--json")
    if not done.stdout.strip():
        raise SystemExit(done.returncode or 1)
    return dict(json.loads(done.stdout))


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    run("examples/real_inputs.py", "demo").check_returncode()
    job = streamprune("compress", str(MODEL), "--out", str(PRUNED), *CALIBRATION)
    verified = streamprune("verify", str(PRUNED), "--source", str(MODEL))
    dense = streamprune("evaluate", str(MODEL), *EVALUATION)
    pruned = streamprune("evaluate", str(PRUNED), *EVALUATION)
    loading = run("-c", LOAD_DENSE, str(MODEL))
    loading.check_returncode()

    rows = (
        ("", "perplexity", "block linears", "seconds", "peak memory"),
        (
            "dense, loaded in fp32",
            f"{dense['perplexity']:.2f}",
            megabytes(job["dense_bytes"]),
            "",
            megabytes(int(loading.stdout)),
        ),
        (
            "2:4, compressed",
            f"{pruned['perplexity']:.2f}",
            megabytes(job["packed_bytes"]),
            f"{job['seconds']:.0f}",
            megabytes(job["peak_memory_bytes"]),
        ),
    )
    print("\nSmolLM2-135M")
    for row in rows:
        print("{:<22}{:>12}{:>16}{:>10}{:>14}".format(*row))
    print(f"packed / dense: {job['packed_bytes'] / job['dense_bytes']:.2%}; perplexity over {dense['tokens']} tokens")
    if job["status"] == "already finished":
        print(f"{PRUNED} was finished before: its seconds and peak memory are that run's")
    speaking = run("-c", SPEAK, PROMPT, str(MODEL), str(PRUNED))
    speaking.check_returncode()
    for name, said in zip(("dense", "2:4"), speaking.stdout.splitlines(), strict=True):
        print(f"{name + ' says:':<12}{said}")
    faults = verified["faults"]
    print(f"{len(verified['layers'])} layers verified against the source: {'ok' if verified['ok'] else faults}")
    return 0 if verified["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
