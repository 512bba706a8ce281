"""The model card: valid front matter, figures and settings of the manifest, and nothing of a source as markup."""

import copy
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from streamprune import PackedLinear
from streamprune.checkpoint.beside import list_beside
from streamprune.checkpoint.card import Licence, model_card, source_licence, source_name, source_revision
from streamprune.checkpoint.manifest import Manifest, record_of
from streamprune.checkpoint.packed import open_packed
from streamprune.config import PruneConfig
from streamprune.pipeline.compress import CompressResult
from streamprune.runtime.export import export

Prune = Callable[..., CompressResult]
MAGNITUDE: dict[str, Any] = {"metric": "magnitude", "refine": False, "shuffle": "none", "validate": False}
COMMIT = "0123456789abcdef" * 2 + "01234567"
HOSTILE = (
    "](https://x.example)<script>`|\n---\nlicense: mit",
    "a\r\n# title\n\n- item \u202e \x1b[2J",
    '"; rm: [1] # & *',
    "x" * 5000,
    "``",
    "",
    " ",
    "\udcff",
    "2:4",
    "null",
)


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def rows(card: ModelCard) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", card.text, re.MULTILINE))


def test_the_card_of_an_output(outputs: Callable[..., Path]) -> None:
    out = outputs("llama")
    card, manifest = card_of(out), tiny.read_json(out / tiny.MANIFEST)
    assert card.data.to_dict() == {
        "base_model": "llama",
        "library_name": "streamprune",
        "pipeline_tag": "text-generation",
        "tags": ["streamprune", "pruned", "sparse", "2:4"],
    }
    errors = [block["block_error"] for block in manifest["blocks"]]
    found = rows(card)
    assert found["block error, worst"].startswith(f"{max(errors):.4g}, of `model.layers.")
    assert found["block error, mean"] == f"{sum(errors) / 3:.4g}"
    assert found["linear layers in the blocks"] == "21 pruned, 0 dense"
    assert found["zeros in pruned layers"] == "50.00% of their weights"
    shards = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert found["all weights here"] == f"{shards / 1e6:.2f} MB"
    assert {name: found[name] for name in ("samples", "sequence_length", "seed", "dtype", "pattern", "metric")} == {
        "samples": "`4`", "sequence_length": "`48`", "seed": "`0`", "dtype": "`float32`", "pattern": "`2:4`",
        "metric": "`esparse`",
    }  # fmt: skip
    assert set(PruneConfig.__dataclass_fields__) <= set(found)
    assert manifest["made_by"] in card.text
    assert "have the source's bits" in card.text
    assert "name no licence" in card.text
    assert manifest["files"]["README.md"]["sha256"] == tiny.sha256(out / "README.md")
    assert (out / "README.md").stat().st_size < 5000


def test_what_was_not_measured_and_what_was_fitted_is_said(outputs: Callable[..., Path]) -> None:
    unseen, fitted = (card_of(outputs("llama", **settings)) for settings in (MAGNITUDE, {"reconstruct": True}))
    assert rows(unseen)["block error, worst"] == rows(unseen)["block error, mean"] == "unknown"
    assert "No text has passed the model" in unseen.text
    assert "were fitted to the dense layers' outputs" in fitted.text
    assert "source's bits" not in fitted.text
    kept = card_of(outputs("llama", max_block_error=0.3, on_excess="keep-dense"))
    manifest = tiny.read_json(outputs("llama", max_block_error=0.3, on_excess="keep-dense") / tiny.MANIFEST)
    dense = sum(block["outcome"] == "kept dense" for block in manifest["blocks"])
    assert dense > 0
    assert rows(kept)["blocks"] == f"3, {dense} kept dense"
    assert rows(kept)["linear layers in the blocks"] == f"{21 - 7 * dense} pruned, {7 * dense} dense"


@pytest.mark.parametrize("dense", [False, True])
def test_the_lines_that_load_it(dense: bool, outputs: Callable[..., Path], tmp_path: Path) -> None:
    """Are run as they stand in the card."""
    folder = outputs("llama")
    if dense:
        export(folder, out=tmp_path / "plain")
        folder = tmp_path / "plain"
    text = card_of(folder).text.partition("## How to load it")[2].partition("## Measured")[0]
    code = "\n".join(
        line[4:] for line in text.splitlines() if line.startswith("    ") and "    streamprune " not in line
    )
    names: dict[str, Any] = {}
    exec(code.replace('"FOLDER"', repr(str(folder))), names)
    layers = {type(module) for name, module in names["model"].named_modules() if name.endswith("up_proj")}
    assert layers == {torch.nn.Linear if dense else PackedLinear}


def test_the_card_of_an_export(outputs: Callable[..., Path], tmp_path: Path) -> None:
    export(outputs("llama"), out=tmp_path / "dense")
    packed, dense = card_of(outputs("llama")), card_of(tmp_path / "dense")
    assert dense.data.to_dict() == {**packed.data.to_dict(), "library_name": "transformers"}
    total = tiny.read_json(tmp_path / "dense" / "model.safetensors.index.json")["metadata"]["total_size"]
    assert rows(dense) == {**rows(packed), "all weights here": f"{total / 1e6:.2f} MB"}
    assert "streamprune export" not in dense.text


def test_a_sources_own_card_and_licence(sources: Callable[[str], Path], prune: Prune, tmp_path: Path) -> None:
    """Are copied, and named; a dense export carries them on, and what is pruned again has its source's card."""
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# The dense model\n")
    (source / "LICENSE").write_text("terms")
    prune(source, tmp_path / "out", **MAGNITUDE)
    export(tmp_path / "out", out=tmp_path / "dense")
    prune(tmp_path / "dense", tmp_path / "again", **MAGNITUDE)
    for folder in (tmp_path / "out", tmp_path / "dense"):
        assert (folder / "README.source.md").read_bytes() == (source / "README.md").read_bytes()
        assert (folder / "LICENSE").read_text() == "terms"
        assert card_of(folder).data.license == "apache-2.0"
        assert "says `apache-2.0`. The source's licence is in `LICENSE`." in card_of(folder).text
        assert "The source's own card is `README.source.md`" in card_of(folder).text
    assert (tmp_path / "again" / "README.source.md").read_bytes() == (tmp_path / "dense" / "README.md").read_bytes()
    assert card_of(tmp_path / "again").data.to_dict()["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, Licence(None, None, None)),
        ({"README.md": "---\nlicense: mit\n---\n"}, Licence("mit", None, None)),
        ({"README.md": "\ufeff---\r\nlanguage:\r\n- en\r\nlicense: 'mit' \r\n---\r\n"}, Licence("mit", None, None)),
        ({"README.md": '---\nlicense: "other"\nlicense_name: llama3.1\n---\n', "LICENSE.txt": ""},
         Licence("other", "llama3.1", "LICENSE.txt")),
        ({"README.md": "# none\n\nlicense: mit\n", "COPYING": ""}, Licence(None, None, "COPYING")),
        ({"README.md": "---\nlicense: mit\n", "licence-model": ""}, Licence(None, None, "licence-model")),
        ({"README.md": "---\nlicense: [mit]\n---\n"}, Licence(None, None, None)),
        ({"README.md": "---\nlicense:\n---\n"}, Licence(None, None, None)),
        ({"README.md": "---\nlicense: a b\n---\n"}, Licence(None, None, None)),
        ({"README.md": "---\nlicense: 'mit\n---\n"}, Licence(None, None, None)),
        ({"README.md": "---\nlicense: *a\n---\n"}, Licence(None, None, None)),
        ({"README.md": f"---\nlicense: {'x' * 5000}\n---\n"}, Licence(None, None, None)),
        ({"LICENSE](http:)": "", "LICENSE": ""}, Licence(None, None, "LICENSE")),
        ({"sub/LICENSE": ""}, Licence(None, None, None)),
    ],
    ids=repr,
)  # fmt: skip
def test_what_a_source_says_of_its_licence(files: dict[str, str], expected: Licence, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert source_licence(tmp_path, list_beside(tmp_path)) == expected


@pytest.mark.parametrize(
    "content",
    [b"\n" * 10**6, b"---\n" * 250_000, b"---" + b" " * 10**6, b"---\n" + b"license: " * 10**5, b"\xff" * 10**6],
)
def test_a_hostile_readme_takes_no_time(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(content)
    start = time.perf_counter()
    assert source_licence(tmp_path, list_beside(tmp_path)) == Licence(None, None, None)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("folder", "given", "expected"),
    [
        ("llama", None, "llama"),
        ("llama", "owner/name-1.5", "owner/name-1.5"),
        ("llama", "/home/me/secret/llama", "llama"),
        ("llama", "../llama", "llama"),
        ("llama", "a/b/c", "llama"),
        ("llama", {"a": 1}, "llama"),
        ("models--owner--name/snapshots/0a1b", None, "owner/name"),
        ("models--owner--name/snapshots/0a1b", "its/base", "owner/name"),
        ("models--gpt2/snapshots/0a1b", "", "gpt2"),
        ("snapshots/0a1b", None, "0a1b"),
        ("a\nb\x1b", None, "a?b?"),
        ("\udcff", None, "?"),
    ],
)
def test_a_sources_name(folder: str, given: Any, expected: str, tmp_path: Path) -> None:
    assert source_name(tmp_path / folder, {"_name_or_path": given}) == expected


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (f"models--owner--name/snapshots/{COMMIT}", COMMIT),
        ("models--owner--name/snapshots/0a1b", None),
        (f"snapshots/{COMMIT}", None),
        (f"models--owner--name/{COMMIT}", None),
        (f"models--owner--name/snapshots/{COMMIT}/original", None),
        ("llama", None),
    ],
)
def test_a_sources_commit(folder: str, expected: str | None, tmp_path: Path) -> None:
    assert source_revision(tmp_path / folder) == expected


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text)[:30])
def test_nothing_from_elsewhere_is_markup(text: str, outputs: Callable[..., Path]) -> None:
    """A name, a licence, a setting or a version that somebody forged: the same headings, rows and keys as ever."""
    out = outputs("llama")
    _, layers, _ = open_packed(out)
    beside, manifest = list_beside(out), tiny.read_json(out / tiny.MANIFEST)
    sound = ModelCard(model_card(record_of(manifest, Manifest), layers, Licence(None, None, None), beside))
    forged = copy.deepcopy(manifest)
    forged.update(source_name=text, made_by=text, source_revision=text)
    forged["identity"]["settings"].update(metric=text, pattern=[text])
    forged["identity"]["calibration"].update(seed={text: text})
    forged["blocks"][0].update(name=text, block_error=1e300)
    written = model_card(record_of(forged, Manifest), layers, Licence(None, None, None), beside)
    assert len(written) < 6000
    card = ModelCard(written)
    data = card.data.to_dict()
    assert data.keys() | {"base_model"} == sound.data.to_dict().keys()
    if "base_model" in data:
        validate_repo_id(data["base_model"])
    assert yaml.safe_load(written.split("---\n")[1]) == data
    marks = r"^(?:#.*|    .*|\| [\w ,]+ \|(?! ---)|- .*|---.*)"
    shape = [re.findall(marks, one.text, re.MULTILINE) for one in (card, sound)]
    assert [line.split("`")[0] for line in shape[0]] == [line.split("`")[0] for line in shape[1]]
    outside = re.sub(r"`[^`\n]*`", "", card.text)
    assert all(part not in outside for part in ("x.example", "<script>", "item", "rm:", "xxx"))
    assert all(line.isprintable() for line in card.text.splitlines())
