"""Scripts in examples/ answer --help, whatever they need, and start nothing before it."""

import subprocess
import sys
from pathlib import Path

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
