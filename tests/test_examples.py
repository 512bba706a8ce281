"""Scripts in examples/ answer --help, whatever they need, and start nothing before it."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import streamprune

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py") if "__main__" in path.read_text())


def start(folder: Path, script: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_every_script_answers_help(tmp_path: Path) -> None:
    """All at once: most of their time is the importing of torch."""
    assert len(SCRIPTS) >= 11
    processes = {script: start(tmp_path, script, "--help") for script in SCRIPTS}
    for script, process in processes.items():
        stdout, stderr = process.communicate(timeout=120)
        assert (process.returncode, stderr) == (0, ""), script
        assert stdout.lower().startswith("usage: ")
        assert "--help" in stdout
        assert len(stdout.splitlines()) > 8, script
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    script = EXAMPLES / "benchmarks" / "llmcompressor_job.py"
    process = start(tmp_path, script, "model", "tokens.json", "out", "float32")
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.startswith("No module named 'llmcompressor")
    assert "run bench_llmcompressor.py, which makes an environment with llm-compressor" in stderr


def train_moe(directory: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """A single step, on texts of a few thousand tokens."""
    text = directory / "text"
    if not text.exists():
        text.mkdir(parents=True)
        words = [f"{'abcdefghij'[number % 10]}{number * 7919 % 1009}" for number in range(6000)]
        for name, ending in (("calibration.txt", "\n"), ("wiki.txt", "\n\n")):
            lines = [" ".join(words[first : first + 100]) for first in range(0, len(words), 100)]
            (text / name).write_text(ending.join(lines) + "\n")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["small_moe.py", str(directory), "--minutes", "0", *options])
    importlib.import_module("small_moe").main()


def test_a_small_mixture_of_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its options are in its name, a seed always gives the same bytes, and `compress` takes it."""
    for options in ((), ("--balance", "0"), ("--seed", "3")):
        train_moe(tmp_path, monkeypatch, *options)
    names = ["small-moe", "small-moe-balance-0", "small-moe-seed-3"]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    train_moe(tmp_path / "again", monkeypatch)
    weights = [
        (folder / "model.safetensors").read_bytes()
        for folder in (*map(tmp_path.joinpath, names), tmp_path / "again" / names[0])
    ]
    assert weights[0] == weights[3]
    assert len(set(weights)) == 3, "an option changes nothing"
    held_out, learned = (tmp_path / "text" / f"wiki-{part}.txt" for part in ("held-out", "calibration"))
    assert learned.read_text() + "\n" + held_out.read_text() == (tmp_path / "text" / "wiki.txt").read_text()
    result = streamprune.compress(tmp_path / names[0], tmp_path / "pruned", metric="magnitude", validate=False)
    experts = [name for name in tiny.read_tensors(tmp_path / "pruned") if ".experts." in name and "mask" in name]
    assert (len(experts), result.status) == (4 * 8 * 3, "finished")
