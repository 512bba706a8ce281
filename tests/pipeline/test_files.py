"""The files of a job: what it copies beside the weights, what of that it removes again, and their modes."""

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoTokenizer

from streamprune.errors import Interrupted, OutputError
from streamprune.pipeline import compress
from streamprune.pipeline.compress import CompressResult
from streamprune.pipeline.writing.lease import Lease
from streamprune.runtime.export import export
from streamprune.runtime.verify import verify

Prune = Callable[..., CompressResult]
QUICK: dict[str, Any] = {"metric": "magnitude", "shuffle": "none", "refine": False, "validate": False}
TEMPLATES = {
    "default": "{{ messages }}",
    "rag": "documents: {{ documents }}",
    "tool_use": "tools: {{ tools }}",
}
KEPT = {
    "NOTICE",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "license.md",
    "original/params.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
LEFT_OUT = {
    ".git/": "hidden",
    "modeling.py": "code",
    "original/consolidated.00.pth": "weights",
    "timings.json": "the output has its own",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with three templates, a licence under another name, the weights in another form, and code."""
    folder = tiny.write_llama(tmp_path_factory.mktemp("source") / "model", blocks=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(folder)
    for name in ("NOTICE", "license.md", "original/params.json", *LEFT_OUT):
        path = folder / (f"{name}config" if name.endswith("/") else name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    return folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_everything_that_is_no_weight_and_no_code_comes_along(source: Path, prune: Prune, tmp_path: Path) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    result = prune(source, out, **QUICK)
    assert result.left_out == LEFT_OUT
    assert prune(source, out, **QUICK).left_out == LEFT_OUT  # a finished job's
    assert export(out, out=dense).left_out == {}
    for folder in (out, dense):
        assert {name for name in names(folder) if not name.startswith(("model", "streamprune"))} - {
            "README.md",
            "config.json",
            "timings.json",
        } == KEPT
        for name in KEPT:
            assert (folder / name).read_bytes() == (source / name).read_bytes(), name
        assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATES
    assert set(tiny.read_json(out / tiny.MANIFEST)["files"]) > KEPT
    assert verify(out, source=source).faults == []


def test_a_hub_caches_links_give_the_same_bytes(source: Path, prune: Prune, tmp_path: Path) -> None:
    named = Path(shutil.copytree(source, tmp_path / "named"))
    tiny.write_json(named / "config.json", {**tiny.read_json(named / "config.json"), "_name_or_path": "owner/model"})
    prune(named, tmp_path / "plain", **QUICK)
    prune(tiny.as_hub_cache(named, tmp_path / "hub"), tmp_path / "linked", **QUICK)
    assert tiny.digests(tmp_path / "plain") == tiny.digests(tmp_path / "linked")
    assert not any(path.is_symlink() for path in (tmp_path / "linked").rglob("*"))
    packed = tiny.as_hub_cache(tmp_path / "plain", tmp_path / "hub of the output")
    assert verify(packed, source=source).faults == []
    export(packed, out=tmp_path / "dense")
    assert names(tmp_path / "dense") >= KEPT


@pytest.fixture
def out(source: Path, prune: Prune, tmp_path: Path) -> Path:
    prune(source, tmp_path / "out", **QUICK)
    return tmp_path / "out"


def test_verify_looks_at_copied_files(out: Path) -> None:
    name = "additional_chat_templates/rag.jinja"
    tiny.flip_byte(out / name, 3)
    assert verify(out).faults == [f"{name}: its sha256 is not the recorded one; it holds no pruned layer"]
    (out / name).unlink()
    assert verify(out, quick=True).faults == [f"{name}: is missing"]


def test_verify_reads_nothing_behind_a_link_to_a_folder(out: Path, tmp_path: Path) -> None:
    """Its files would be right."""
    (out / "additional_chat_templates").rename(tmp_path / "elsewhere")
    (out / "additional_chat_templates").symlink_to("../elsewhere")
    assert verify(out).faults == [f"additional_chat_templates/{name}.jinja: is missing" for name in ("rag", "tool_use")]


class Killed(BaseException):
    """Not an Exception: nothing in the library may catch it."""


def killed_at(owner: Any, name: str, call: int, job: Callable[[], object]) -> bool:
    """Run a job that ends where it calls a function for that time, if it does so often, before anything is done."""
    original, calls = getattr(owner, name), itertools.count()

    def die(*arguments: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(owner, name, die)
        job()
        return False
    return True


@pytest.mark.parametrize("finished", [True, False])
def test_restart_removes_what_was_copied_and_nothing_else(
    finished: bool, source: Path, prune: Prune, tmp_path: Path
) -> None:
    """The manifest of a finished output says what is ours, the journal of one that was killed does."""
    out = tmp_path / "out"
    if finished:
        prune(source, out, **QUICK)
    else:
        assert killed_at(compress, "write_manifest", 0, lambda: prune(source, out, **QUICK))
    for name in ("notes.md", "original/mine.txt"):
        (out / name).write_text("mine")
    prune("opt", out, **QUICK, restart=True)
    prune("opt", tmp_path / "fresh", **QUICK)
    assert names(out) == names(tmp_path / "fresh") | {"notes.md", "original/mine.txt"}
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"original"}


def test_a_restart_that_was_killed_is_taken_up(out: Path, prune: Prune, tmp_path: Path) -> None:
    """Whichever removal it was killed at, and without --restart: the other job ends in its own files alone."""
    prune("opt", tmp_path / "fresh", **QUICK)
    shutil.copytree(out, tmp_path / "before")
    for removal in range(0, 100, 5):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "before", out)
        if not killed_at(Lease, "discard", removal, lambda: prune("opt", out, **QUICK, restart=True)):
            break
        prune("opt", out, **QUICK)
        assert tiny.digests(out) == tiny.digests(tmp_path / "fresh"), removal
    assert removal >= len(names(tmp_path / "before"))


def test_what_the_source_lost_meanwhile_is_not_left_over(source: Path, prune: Prune, tmp_path: Path) -> None:
    changing, out = Path(shutil.copytree(source, tmp_path / "changing")), tmp_path / "out"
    assert killed_at(compress, "write_manifest", 0, lambda: prune(changing, out, **QUICK))
    shutil.rmtree(changing / "original")
    (changing / "NOTICE").rename(changing / "NOTICES")
    prune(changing, out, **QUICK)
    prune(changing, tmp_path / "fresh", **QUICK)
    assert tiny.digests(out) == tiny.digests(tmp_path / "fresh")


def test_a_forged_manifest_removes_nothing_outside(out: Path, prune: Prune, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "empty").mkdir(parents=True)
    (tmp_path / "elsewhere" / "thesis.tex").write_text("mine")
    (out / "mine").mkdir()
    (out / "mine" / "thesis.tex").write_text("mine")
    manifest = tiny.read_json(out / tiny.MANIFEST)
    outside = [f"{tmp_path}/elsewhere/empty/x", "../elsewhere/thesis.tex", "mine", "a/../../elsewhere/thesis.tex"]
    manifest["files"].update(dict.fromkeys(outside, manifest["files"]["NOTICE"]))
    tiny.write_json(out / tiny.MANIFEST, manifest)
    prune("opt", out, **QUICK, restart=True)
    assert names(tmp_path / "elsewhere") == {"thesis.tex"}
    assert (tmp_path / "elsewhere" / "empty").is_dir()
    assert (out / "mine" / "thesis.tex").exists()
    (out / "linked").symlink_to("../elsewhere")
    with pytest.raises(OutputError, match="out/linked: is a symbolic link in an output folder"):
        prune("opt", out, **QUICK, restart=True)


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002], ids=oct)
def test_modes_are_those_of_the_umask(umask: int, source: Path, prune: Prune, tmp_path: Path) -> None:
    """Whatever the source's are: a finished output, its export, and an interrupted job with its hidden states."""
    first = tmp_path / "part" / ".work" / "block-00000.json"
    before = os.umask(umask)
    try:
        prune(source, tmp_path / "deep" / "out", **QUICK)
        export(tmp_path / "deep" / "out", out=tmp_path / "exported" / "dense")
        with pytest.raises(Interrupted):
            prune("llama", tmp_path / "part", should_stop=first.exists, scratch=tmp_path / "scratch")
        with pytest.raises(Interrupted):
            prune("llama", tmp_path / "whole", should_stop=(tmp_path / "whole/.work/block-00000.json").exists)
    finally:
        os.umask(before)
    seen = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o7777 for path in tmp_path.rglob("*")}
    assert {name for name in seen if name.endswith(".bin")}
    assert len(seen) > 50
    assert seen == {name: (0o777 if (tmp_path / name).is_dir() else 0o666) & ~umask for name in seen}


def test_a_file_system_that_refuses_chmod(
    source: Path, prune: Prune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    for name in ("chmod", "fchmod", "lchmod"):
        monkeypatch.setattr(os, name, refuse, raising=False)
    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(shutil, "copymode", refuse)
    prune(source, tmp_path / "out", **QUICK)
    prune(source, tmp_path / "out", **QUICK, restart=True)
    export(tmp_path / "out", out=tmp_path / "dense")
    assert verify(tmp_path / "out").faults == []


def test_a_fresh_file_system_is_an_empty_folder(source: Path, prune: Prune, tmp_path: Path) -> None:
    """It holds lost+found, which stays, in the source's too."""
    model, out = Path(shutil.copytree(source, tmp_path / "model")), tmp_path / "out"
    for folder in (model, out):
        (folder / "lost+found").mkdir(parents=True)
        (folder / "lost+found" / "#123").write_text("found")
    assert prune(model, out, **QUICK).left_out == LEFT_OUT | {"lost+found/": "of the file system"}
    assert prune(model, out, **QUICK).status == "already finished"
    assert prune(model, out, **QUICK, restart=True).status == "finished"
    assert (out / "lost+found" / "#123").read_text() == "found"
    assert verify(out).faults == []
    assert export(out, out=tmp_path / "dense").left_out == {"lost+found/": "of the file system"}
    assert "lost+found/#123" not in names(tmp_path / "dense")
