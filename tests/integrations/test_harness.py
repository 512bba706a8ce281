"""Outputs in lm-evaluation-harness: `make test-vllm` runs these in the environment that has it."""

import builtins
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import run
from transformers import AutoModelForCausalLM

import streamprune
from streamprune.errors import SettingsError

EXAMPLE = Path(__file__).parents[2] / "examples/tasks/endings.yaml"
COMMAND = "import streamprune; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
TASK = """
task: {name}
custom_dataset: !function data.questions
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""
DATA = """
import datasets, json, pathlib
def questions(**_):
    return {"test": datasets.Dataset.from_list(json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()))}
"""
CHOICES = ["abcab", "!?!?!", "zyxzy"]
QUESTIONS = [{"context": f"{number}: ", "choices": CHOICES, "answer": number % 3} for number in range(40)]


@pytest.fixture
def pruned(copy_of: Callable[..., Path]) -> Callable[..., Path]:
    """Outputs whose tokenizers name a last token, as the harness wants it."""

    def output(source: str, **settings: Any) -> Path:
        folder = copy_of(source, **settings)
        config = tiny.read_json(folder / "tokenizer_config.json")
        tiny.write_json(folder / "tokenizer_config.json", config | {"eos_token": "~"})
        return folder

    return output


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "data.json").write_text(json.dumps(QUESTIONS))
    (tmp_path / "letters.yaml").write_text(TASK.format(name="letters"))
    return tmp_path / "letters.yaml"


def accuracy(folder: Path) -> float:
    """The share of questions whose right choice has the largest likelihood, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    right = 0
    for question in QUESTIONS:
        likelihoods = []
        for choice in CHOICES:
            ids = torch.tensor([[ord(letter) for letter in question["context"].rstrip() + " " + choice]])
            with torch.no_grad():
                scores = model(ids).logits[0, :-1].float().log_softmax(dim=1)
            likelihoods.append(float(scores.gather(1, ids[0, 1:, None])[-len(choice) :].sum()))
        right += likelihoods.index(max(likelihoods)) == question["answer"]
    return right / len(QUESTIONS)


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")  # the harness and its libraries warn on import
@pytest.mark.parametrize("source", ["llama", "opt"])
def test_scores_are_transformers_own_and_those_of_the_dense_export(
    source: str, pruned: Callable[..., Path], task: Path, tmp_path: Path
) -> None:
    packed = pruned(source, shuffle="assignment")
    streamprune.export(packed, out=tmp_path / "dense")
    scores = [streamprune.evaluate(folder, tasks=task, dtype="float32") for folder in (packed, tmp_path / "dense")]
    assert scores[0].tasks == scores[1].tasks
    assert scores[0].tasks.keys() == {"letters"}
    assert scores[0].tasks["letters"]["acc"] == pytest.approx(accuracy(packed))
    assert 0 < scores[0].tasks["letters"]["acc"] < 1
    assert 0 < scores[0].tasks["letters"]["acc_stderr"] < 0.1
    assert [one.packed for one in scores] == [True, False]
    assert (scores[0].loss, scores[0].perplexity, scores[0].tokens) == (None, None, 0)


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")  # the harness and its libraries warn on import
def test_the_command_shows_scores_and_perplexity(pruned: Callable[..., Path], task: Path, held_out: Path) -> None:
    folder = pruned("llama")
    arguments = ["evaluate", folder, "--tasks", task, "--dtype", "float32", "--quiet"]
    both = run(*arguments, "--text", held_out, "--sequence-length", 100, "--json")
    assert both.exit_code == 0, both.output
    result = json.loads(both.stdout)
    alone = streamprune.evaluate(folder, text=held_out, sequence_length=100, dtype="float32")
    assert (result["loss"], result["tokens"]) == (alone.loss, alone.tokens)
    shown = run(*arguments)
    score, error = (result["tasks"]["letters"][name] for name in ("acc", "acc_stderr"))
    assert f"letters{' ' * 18}acc{' ' * 14}{score:.4f} +- {error:.4f}\n" in shown.stdout
    assert "perplexity" not in shown.stdout


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")  # the harness and its libraries warn on import
def test_the_harness_own_command_loads_an_output_packed(pruned: Callable[..., Path], tmp_path: Path) -> None:
    """And scores it in the example's task as `evaluate` does."""
    folder = pruned("llama")
    arguments = ["--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu"]
    arguments += ["--tasks", str(EXAMPLE), "--batch_size", "8", "--output_path", str(tmp_path / "scores.json")]
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.glob("scores*.json")
    theirs = tiny.read_json(written)["results"]["endings"]
    ours = streamprune.evaluate(folder, tasks=EXAMPLE, dtype="float32").tasks["endings"]
    assert ours == {name: theirs[f"{name},none"] for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")}


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")  # the harness and its libraries warn on import
def test_a_file_that_the_harness_does_not_take_is_refused(sources: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "no.yaml").write_text("task: [")
    with pytest.raises(SettingsError, match="its tokenizer has no bos_token and no eos_token"):
        streamprune.evaluate(sources("llama"), tasks=EXAMPLE)
    with pytest.raises(SettingsError, match=r"no.yaml: lm-evaluation-harness does not take it \("):
        streamprune.evaluate(sources("llama"), tasks=tmp_path / "no.yaml")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is looked for."""
    with pytest.raises(SettingsError, match="give text, tasks, or both"):
        streamprune.evaluate(tmp_path)
    with pytest.raises(SettingsError, match=r"tasks .*none.yaml: is no .yaml file of lm-evaluation-harness"):
        streamprune.evaluate(tmp_path, tasks=tmp_path / "none.yaml")
    (tmp_path / "task.yaml").touch()
    imported = builtins.__import__

    def without_harness(name: str, *arguments: Any) -> Any:
        if name == "lm_eval":
            raise ImportError(name)
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_harness)
    with pytest.raises(SettingsError, match=r'^tasks need lm-evaluation-harness: pip install "streamprune\[eval\]"$'):
        streamprune.evaluate(tmp_path, tasks=tmp_path / "task.yaml")


def test_the_examples_questions_are_made_by_the_script_beside_them(tmp_path: Path) -> None:
    script, made = tmp_path / "endings.py", tmp_path / "endings.jsonl"
    script.write_text(EXAMPLE.with_suffix(".py").read_text())
    subprocess.run([sys.executable, str(script)], check=True, capture_output=True)
    assert made.read_text() == EXAMPLE.with_suffix(".jsonl").read_text()
    questions = [json.loads(line) for line in made.read_text().splitlines()]
    assert [question["answer"] for question in questions] == [number % 4 for number in range(100)]
    assert all(len({*question["choices"]}) == 4 for question in questions)
