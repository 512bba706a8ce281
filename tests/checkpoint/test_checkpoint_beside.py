"""What lies beside the weights: what is copied, what is left out and why, and names that lead elsewhere."""

import os
import stat
from pathlib import Path

import pytest

from streamprune.checkpoint import beside
from streamprune.checkpoint.beside import MAX_DEPTH, MAX_FILE_BYTES, copy_beside, file_inside, is_inside, list_beside
from streamprune.errors import CheckpointError, OutputError

COPIED = (
    "LICENSE License license.md NOTICE COPYING USE_POLICY.md README.md generation_config.json tokenizer.json "
    "tokenizer_config.json tokenizer.model tekken.json vocab.json merges.txt special_tokens_map.json added_tokens.json "
    "chat_template.jinja chat_template.json additional_chat_templates/tool_use.jinja preprocessor_config.json "
    "processor_config.json video_preprocessor_config.json figures/loss.png original/params.json bin requirements.txt "
    "original/tokenizer.model original/config.json original/timings.json binary lost+found.txt"
)
LEFT_OUT = {
    "weights": "model.safetensors pytorch_model.bin a.pt consolidated.00.pth consolidated.safetensors.index.json "
    "x.GGUF model.onnx model.onnx_data flax_model.msgpack tf_model.h5 training_args.bin optimizer.ckpt state.pickle "
    "pytorch_model.bin.index.json original/consolidated.00.pth original/model.safetensors.index.json "
    "model.safetensors.index.fp16.json __0_0.distcp",
    "about other weights": "adapter_config.json quantize_config.json",
    "code": "modeling_own.py original/convert.sh _cpu.cpython-311.so libx.so.1 notebook.ipynb __pycache__/",
    "hidden": ".gitattributes .DS_Store .git/ .cache/ original/.hidden",
    "temporary": "a.lock model.incomplete b.tmp c.json~ d.md.swp",
    "a log": "train.log events.out.tfevents.1700000000.host",
    "of the system": "Thumbs.db",
    "of the file system": "lost+found/",
    "the output has its own": "config.json timings.json streamprune_manifest.json",
}


def fill(folder: Path, names: list[str]) -> None:
    """Files of those names that say what they are; folders (with a / at the end) hold a file."""
    for name in names:
        path = folder / (f"{name}inner" if name.endswith("/") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_what_is_copied_and_why_the_rest_is_not(tmp_path: Path) -> None:
    left_out = {name: reason for reason, names in LEFT_OUT.items() for name in names.split()}
    fill(tmp_path, [*COPIED.split(), *left_out])
    found = list_beside(tmp_path)
    assert list(found.copied) == sorted(COPIED.split())
    assert found.left_out == left_out
    known = {"config.json", "model.safetensors", "README.md"}
    found = list_beside(tmp_path, known)
    assert known.isdisjoint({*found.copied, *found.left_out})


@pytest.mark.parametrize(
    ("there", "placed", "left_out"),
    [
        (["README.md", "sub/README.md"], {"README.md": "README.source.md", "sub/README.md": "sub/README.md"}, []),
        (["README.md", "README.source.md"], {"README.md": "README.source.md"}, ["README.source.md"]),
        (["README.source.md", "readme.md"], {n: n for n in ("README.source.md", "readme.md")}, []),
    ],
    ids=str,
)
def test_a_readme_makes_room_for_the_outputs_card(
    there: list[str], placed: dict[str, str], left_out: list[str], tmp_path: Path
) -> None:
    fill(tmp_path, there)
    found = list_beside(tmp_path)
    assert found.placed == placed
    assert found.left_out == dict.fromkeys(left_out, "the output has its own")


def test_links_pipes_and_what_is_too_large_or_deep(tmp_path: Path) -> None:
    """Nothing is waited for, no cycle is walked, and nothing outside is taken in but a file that a link names."""
    folder, deep = tmp_path / "source", "d/" * MAX_DEPTH
    fill(tmp_path, ["outside/notes.md"])
    fill(folder, ["large.md", f"{deep}kept.md", f"{deep}d/"])
    os.truncate(folder / "large.md", MAX_FILE_BYTES + 1)
    (folder / "linked.md").symlink_to("../outside/notes.md")
    (folder / "up").symlink_to("..")
    (folder / "nowhere.md").symlink_to("nothing")
    (folder / "itself.md").symlink_to("itself.md")
    os.mkfifo(folder / "pipe.md")
    os.mknod(folder / "socket.md", stat.S_IFSOCK | 0o600)
    found = list_beside(folder)
    assert found.copied == (f"{deep}kept.md", "linked.md")
    assert found.left_out == {
        f"{deep}d/": f"more than {MAX_DEPTH} folders deep",
        "itself.md": "cannot be read (Too many levels of symbolic links)",
        "large.md": "larger than 64 MiB",
        "nowhere.md": "cannot be read (No such file or directory)",
        "pipe.md": "not a regular file",
        "socket.md": "not a regular file",
        "up": "a link to a folder",
    }


def test_names_that_no_manifest_should_hold(tmp_path: Path) -> None:
    fill(tmp_path, ["a\x1b[2J.md", "b\nc.md", "right\u202eleft.md", "ü.md", "x" * 250 + "/" + "y" * 249])
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.md")).write_text("no text")
    found = list_beside(tmp_path)
    assert found.copied == ("x" * 250 + "/" + "y" * 249, "ü.md")
    reason = "its name cannot be printed"
    assert found.left_out == dict.fromkeys(["\\udcff.md", "a\\x1b[2J.md", "b\\nc.md", "right\\u202eleft.md"], reason)
    fill(tmp_path, ["x" * 250 + "/" + "y" * 250])
    assert list_beside(tmp_path).left_out["x" * 250 + "/" + "y" * 250] == "its path has more than 500 bytes"


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of them is left out whole; where they are beside the weights nothing can be said."""
    monkeypatch.setattr(beside, "MAX_ENTRIES", 10)
    fill(tmp_path, [*(f"a/{number}" for number in range(9)), "b/kept.md", "top.md"])
    found = list_beside(tmp_path)
    assert found.copied == ("b/kept.md", "top.md")
    assert found.left_out == {"a/": "holds too many files: at most 10 are looked at"}
    fill(tmp_path, [str(number) for number in range(10)])
    with pytest.raises(CheckpointError, match=r"holds too many files: .*; give a folder with the checkpoint alone"):
        list_beside(tmp_path)


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as one who may read everything."""
    fill(tmp_path, ["open.md", "secret.md"])
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("secret.md"))
    assert list_beside(tmp_path).left_out == {"secret.md": "cannot be read (Permission denied)"}


def test_names_inside_a_folder() -> None:
    long = "/".join(["x" * 99] * 5)
    for name in ("tokenizer.json", "a/b/c.jinja", "..a/b..", "back\\slash", "x" * 255, "ü" * 127, long):
        assert is_inside(name), name
    outside = ["", ".", "/etc/passwd", "../secret", "a/../../secret", "a/./b", "a//b", "a/", "zero\0byte"]
    for name in (*outside, "x" * 256, "ü" * 128, f"{long}/y"):
        assert not is_inside(name), name


def test_a_file_is_found_inside_alone(tmp_path: Path) -> None:
    """A file may be a link, as in the caches of model hubs; the folders around it may not."""
    fill(tmp_path, ["outside/secret", "out/sub/file"])
    (tmp_path / "out" / "sub" / "blob").symlink_to("../../outside/secret")
    (tmp_path / "out" / "linked").symlink_to("../outside")
    (tmp_path / "out" / "sub" / "linked").symlink_to("../../outside")
    for name in ("sub/file", "sub/blob"):
        assert file_inside(tmp_path / "out", name) == tmp_path / "out" / name
    for name in ("sub", "sub/other", "sub/file/x", "linked/secret", "sub/linked/secret", "../outside/secret"):
        assert file_inside(tmp_path / "out", name) is None, name


def test_copies_are_contents_beside_their_place(tmp_path: Path) -> None:
    """Links become files, modes are the umask's, nothing is left in the temporary folder, and a copy is replaced."""
    source, out, temporary = (tmp_path / name for name in ("source", "out", "out/temporary"))
    temporary.mkdir(parents=True)
    fill(source, ["blobs/1", "a/b/c.md", "top.md"])
    (source / "a" / "link.md").symlink_to("../blobs/1")
    (source / "top.md").chmod(0o4755)
    fill(out, ["a/foreign", "top.md"])
    copy_beside(source, {name: name for name in ("a/b/c.md", "a/link.md", "top.md")}, out, temporary)
    copied = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    assert {name: path.read_text() for name, path in copied.items()} == {
        "a/b/c.md": "a/b/c.md",
        "a/link.md": "blobs/1",
        "a/foreign": "a/foreign",
        "top.md": "top.md",
    }
    assert not any(path.is_symlink() for path in copied.values())
    assert copied["top.md"].stat().st_mode == copied["a/b/c.md"].stat().st_mode
    assert list(temporary.iterdir()) == []


def test_what_stands_in_the_way_of_a_copy(tmp_path: Path) -> None:
    source, out, temporary = (tmp_path / name for name in ("source", "out", "temporary"))
    temporary.mkdir()
    fill(source, ["a/b.md", "c/d.md"])
    fill(tmp_path, ["elsewhere/x", "out/c"])
    (out / "a").symlink_to("../elsewhere")
    with pytest.raises(OutputError, match="out/a: is a symbolic link in an output folder"):
        copy_beside(source, {"a/b.md": "a/b.md"}, out, temporary)
    with pytest.raises(OutputError, match="out/c: cannot be written"):
        copy_beside(source, {"c/d.md": "c/d.md"}, out, temporary)
    with pytest.raises(CheckpointError, match=r"gone\.md: cannot be read"):
        copy_beside(source, {"gone.md": "gone.md"}, out, temporary)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["x"]
