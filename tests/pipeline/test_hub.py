"""Models by their names on a hub: from its cache, and downloaded from a small server that stands for it."""

import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import yaml
from command import run
from huggingface_hub import errors
from huggingface_hub.constants import ENDPOINT

import streamprune
from streamprune.errors import CheckpointError, Interrupted, OutputError
from streamprune.model.hub import folder_of, parse_name

COMMIT, OTHER_COMMIT = "0123456789" * 4, "fedcba9876" * 4
QUICK: dict[str, Any] = {"metric": "magnitude", "shuffle": "none", "refine": False, "validate": False}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/model", ("org/model", None)),
        ("org/model-1.5_b@main", ("org/model-1.5_b", "main")),
        ("org/model@refs/pr/1", ("org/model", "refs/pr/1")),
        ("org/model@v1.0+cpu", ("org/model", "v1.0+cpu")),
        (f"org/model@{COMMIT}", ("org/model", COMMIT)),
        *((text, None) for text in ("model", "a/b/c", "./model", "../model", "/model", "~/model", "org/.model", "")),
        *((text, None) for text in ("org/", "org//model", "org/model/", "org/a--b", "org/a..b", "org/model.git")),
        *((f"org/model@{revision}", None) for revision in ("", "../main", "a/../../b", "/etc", "-x", "a b", "a@b")),
    ],
)
def test_names_on_a_hub(text: str, expected: tuple[str, str | None] | None) -> None:
    assert parse_name(text) == expected


def test_what_exists_is_a_path(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("some/llama", "some/llama@main", "some/file")
    for name in names[:2]:
        Path(name).mkdir(parents=True)
    Path(names[2]).symlink_to("nothing")
    assert [folder_of("model", name) for name in (*names, "nowhere")] == [Path(name) for name in (*names, "nowhere")]
    with pytest.raises(CheckpointError, match="llama: holds neither model"):
        streamprune.plan("some/llama")


@pytest.fixture
def cache(sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with the tiny LLaMA in three shards and the tiny OPT in two .bin, some/llama and some/opt."""
    folder = tmp_path / "cache"
    for name, source in (("llama", "llama-sharded"), ("opt", "opt-bin")):
        tiny.as_hub_cache(sources(source), folder / f"models--some--{name}", COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def test_the_whole_way_by_names(
    cache: Path,
    sources: Callable[[str], Path],
    calibration: Path,
    held_out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    settings: dict[str, Any] = {**tiny.CALIBRATION, "calibration": calibration}
    assert streamprune.compress("some/llama", out, **settings).status == "finished"
    assert not any(path.is_symlink() for path in out.rglob("*"))
    manifest, card = tiny.read_json(out / tiny.MANIFEST), (out / "README.md").read_text()
    assert (manifest["source_name"], manifest["source_revision"]) == ("some/llama", COMMIT)
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "some/llama"
    assert f"`some/llama` (commit `{COMMIT}`), pruned by" in card

    snapshot = cache / "models--some--llama" / "snapshots" / COMMIT
    for same in (f"some/llama@{COMMIT}", "some/llama@main", snapshot, sources("llama-sharded")):
        assert streamprune.compress(same, out, **settings).status == "already finished"
    streamprune.compress(snapshot, tmp_path / "by folder", **settings)
    assert tiny.digests(tmp_path / "by folder") == tiny.digests(out)
    assert streamprune.verify(out, source="some/llama@main").faults == []
    with pytest.raises(OutputError, match="lies in the source folder"):
        streamprune.compress("some/llama", snapshot / "out", **settings)

    tiny.as_hub_cache(out, cache / "models--me--pruned", OTHER_COMMIT)
    assert streamprune.verify("me/pruned", source="some/llama").faults == []
    assert streamprune.inspect("me/pruned") == streamprune.inspect(out)
    texts = [streamprune.evaluate(folder, text=held_out, dtype="float32").loss for folder in ("me/pruned", out)]
    assert texts[0] == texts[1]
    asked: dict[str, Any] = {"prompt": "The", "max_new_tokens": 4, "dtype": "float32"}
    monkeypatch.setattr("streamprune.runtime.generate.place_blocks", lambda blocks, _: ([False] * 3, 2))  # from disk
    said = [streamprune.generate(folder, **asked).tokens for folder in (f"me/pruned@{OTHER_COMMIT}", out)]
    assert said[0] == said[1]
    streamprune.export("me/pruned", out=dense)
    assert tiny.read_tensors(dense).keys() == tiny.read_tensors(snapshot).keys()


def test_bin_files_by_name(
    cache: Path, sources: Callable[[str], Path], prune: Callable[..., Any], tmp_path: Path
) -> None:
    assert streamprune.plan("some/opt").weights == streamprune.plan(sources("opt-bin")).weights
    streamprune.compress("some/opt", tmp_path / "out", **QUICK)
    assert streamprune.verify(tmp_path / "out", source=sources("opt-bin")).faults == []


def test_a_job_stopped_by_name_goes_on_by_folder(
    cache: Path, sources: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**tiny.CALIBRATION, "calibration": calibration}
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        streamprune.compress("some/llama", out, **settings, should_stop=lambda: any(out.glob(".work/block-*.json")))
    streamprune.compress(sources("llama-sharded"), out, **settings)
    assert streamprune.verify(out, source="some/llama").faults == []
    assert tiny.read_json(out / tiny.MANIFEST)["source_revision"] is None


HALF = pytest.param(
    "some/half", marks=pytest.mark.skipif(not hasattr(errors, "IncompleteSnapshotError"), reason="old hub")
)


@pytest.mark.parametrize("model", ["no/such", "some/llama@v2", f"some/llama@{OTHER_COMMIT}", HALF])
def test_what_the_cache_lacks_is_one_line(model: str, cache: Path, tmp_path: Path) -> None:
    """Offline; of some/half the cache knows a shard that it does not have."""
    half = cache / "models--some--half"
    snapshot = tiny.as_hub_cache(cache / "models--some--llama" / "snapshots" / COMMIT, half, COMMIT)
    listed = [*(path.name for path in snapshot.iterdir()), "model-00009-of-00009.safetensors"]
    entry = {"size": 1, "blob_id": "0"}
    (half / "trees").mkdir()
    tiny.write_json(half / "trees" / f"{COMMIT}.json", {"format_version": 1, "files": dict.fromkeys(listed, entry)})
    for command in (("plan",), ("verify", tmp_path, "--source"), ("inspect",), ("generate", "--prompt", "a")):
        result = run(*command, model)
        assert result.exit_code == 3
        assert result.stderr == (
            f"streamprune: {model}: no such folder, not whole in the cache {cache}, and HF_HUB_OFFLINE keeps from "
            f"asking {ENDPOINT}; give a folder, or download it\n"
        )


@pytest.mark.parametrize(
    "line",
    [
        ("compress", "no/such", "--out", "out", "--pattern", "4:2"),
        ("compress", "no/such", "--out", "out", "--samples", "none"),
        ("compress", "no/such", "--out", "out", "--dtype", "float16", "--device", "cpu"),
        ("compress", "no/such", "--out", "out", "--calibration", "nowhere.txt"),
        ("plan", "no/such", "--max-memory", "much"),
        ("verify", "no/such", "--source", "no/such", "--quick"),
        ("evaluate", "no/such"),
        ("evaluate", "no/such", "--text", "nowhere.txt"),
        ("evaluate", "no/such", "--tasks", "nowhere.yaml"),
        ("generate", "no/such"),
        ("generate", "no/such", "--prompt", "a", "--temperature", "-1"),
        ("export", "no/such", "--out", "."),
        ("export", "no/such", "--out", "out", "--to", "gguf"),
        ("compress", "no/such", "--help"),
    ],
    ids=" ".join,
)
def test_nothing_is_asked_for_before_settings_are_checked(
    line: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: asked.append(1))
    result = run(*line)
    assert (result.exit_code, asked) == ({"--help": 0, ".": 5, "nowhere.txt": 4}.get(line[-1], 2), [])


@pytest.mark.parametrize(("progress", "terminal"), [(True, True), (True, False), (False, True)])
def test_progress_is_shown_on_a_terminal_alone(
    progress: bool, terminal: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    def download(*_: object, tqdm_class: Any, **__: object) -> str:
        bars.append(tqdm_class(total=1, disable=False, file=io.StringIO()))
        return str(cache / "models--some--llama" / "snapshots" / COMMIT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    folder_of("model", "some/llama", progress)
    assert [bar.disable for bar in bars] == [not (progress and terminal)]


NOT_NEEDED = ("pytorch_model.bin", "consolidated.safetensors", "modeling.py", "x.gguf")


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for a hub: its models are the folders in `models`; other names say what is wrong with them."""

    models: Path
    asked: set[str]
    refusals: ClassVar = {
        "missing": (404, "RepoNotFound"),
        "gated": (403, "GatedRepo"),
        "v2": (404, "RevisionNotFound"),
        "broken": (500, ""),
    }

    def do_GET(self) -> None:
        parts = urllib.parse.unquote(self.path.partition("?")[0]).split("/")
        code, reason = next((why for name, why in self.refusals.items() if name in parts), (200, ""))
        folder = next((path for path in self.models.iterdir() if path.name in parts), self.models)
        files = [path for path in folder.iterdir() if path.is_file()]
        if "tree" in parts:
            found: Any = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in files]
        else:
            found = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": path.name} for path in files]}
        body = (folder / parts[-1]).read_bytes() if "resolve" in parts else json.dumps(found).encode()
        self.asked |= {f"{folder.name}/{parts[-1]}"} if "resolve" in parts else set()
        self.send_response(code)
        about = {"ETag": f'"{parts[-1]}"', "X-Repo-Commit": COMMIT, "X-Error-Code": reason, "Content-Length": len(body)}
        for name, value in about.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - as the base class has it

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(sources: Callable[[str], Path], prune: Callable[..., Any], tmp_path: Path) -> Iterator[str]:
    """The endpoint of a hub with a dense model, and what else may lie beside it, one in .bin, and an output."""
    Hub.models, Hub.asked = tmp_path / "models", set()
    dense = Path(shutil.copytree(sources("llama"), Hub.models / "dense"))
    shutil.copytree(sources("opt-bin"), Hub.models / "in-bin")
    for name in ("LICENSE", "README.md", "odd[1].x", *NOT_NEEDED):
        (dense / name).write_text(name)
    prune(dense, Hub.models / "pruned", **QUICK)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


ASK = """
import json, sys
from command import run
from streamprune.errors import Interrupted
from streamprune.model.hub import folder_of
try:
    folder_of("model", "org/dense", should_stop=lambda: True)
    stopped = False
except Interrupted:
    stopped = True
results = {line: run(*line.split()) for line in sys.argv[1:]}
print(json.dumps([stopped, {line: [result.exit_code, result.stderr] for line, result in results.items()}]))
"""


def ask(endpoint: str, cache: Path, *lines: str) -> Any:
    """Whether a download was stopped; exit code and standard error of command lines, with a hub that can be asked."""
    hub = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **hub}
    command = [sys.executable, "-c", ASK, *lines]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PLAN = "plan --sequence-length 48 org/"


def test_a_hub_is_asked(hub: str, tmp_path: Path) -> None:
    """What is needed is downloaded, no code and no weights in other forms; what it refuses is one line."""
    cache = tmp_path / "cache"
    lines = {
        "missing": f"no such folder, and no such model on {hub}; check the name, or give HF_TOKEN if it is private",
        "gated": f"is gated on {hub}; ask for access on its page there, then give HF_TOKEN",
        "dense@v2": f"no such revision on {hub}; give a branch, a tag or a commit of the model",
        "broken": f"no such folder, not whole in the cache {cache}, and no answer comes from {hub}; give a folder, or "
        "download it",
    }
    sound = (f"{PLAN}dense", f"{PLAN}in-bin", "verify --quiet org/pruned")
    stopped, results = ask(hub, cache, *(PLAN + name for name in lines), *sound)
    assert stopped
    assert results == {
        **{PLAN + name: [3, f"streamprune: org/{name}: {line}\n"] for name, line in lines.items()},
        **{line: [0, ""] for line in sound},
    }
    served = {f"{path.parent.name}/{path.name}" for path in Hub.models.rglob("*") if path.is_file()}
    assert Hub.asked == served - {f"dense/{name}" for name in ("odd[1].x", *NOT_NEEDED)}


def test_a_hub_that_is_away_is_not_needed(cache: Path) -> None:
    """Where the cache has all; a download that would be stopped is none then."""
    away = "http://127.0.0.1:1"
    tiny.as_hub_cache(cache / "models--some--llama" / "snapshots" / COMMIT, cache / "models--org--dense", COMMIT)
    line = f"no such folder, not whole in the cache {cache}, and no answer comes from {away}"
    assert ask(away, cache, f"{PLAN}dense", f"{PLAN}other") == [
        False,
        {
            f"{PLAN}dense": [0, ""],
            f"{PLAN}other": [3, f"streamprune: org/other: {line}; give a folder, or download it\n"],
        },
    ]
