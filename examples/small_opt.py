"""Train a small OPT on the demo's texts: a second architecture to measure pruning on, whose weights have learned.

    python examples/small_opt.py [DIR] [--minutes 6]

DIR (default: demo) holds the inputs that `python examples/real_inputs.py DIR` makes. Adds to it

    small-opt/                  OPTForCausalLM of 6 blocks in float16 (12 MB), and its own BPE tokenizer of 4,096 tokens
    text/wiki-calibration.txt   the first half of wiki.txt, by article: training sees it
    text/wiki-held-out.txt      the second half: training never sees it

It learns calibration.txt and wiki-calibration.txt, in sequences of the model's 1,024 positions: OPT's positions are
learned, shorter sequences would leave most of them at random. --minutes is turned into a number of steps by the speed
of two cores that did nothing else, so that the same option gives the same model however busy the machine is. What
exists is not made again; each part is written under a temporary name and renamed when complete.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from real_inputs import make, update_json

SEED = 0
VOCABULARY = 4096
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # in the order of OPT's own ids
POSITIONS = 1024


def next_token_loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Of sequences int64 [batch, length]."""
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


@dataclass(frozen=True)
class Recipe:
    """How a small model learns the texts.

    build           makes it with random weights
    length          tokens of a sequence; batch: sequences of a step
    steps_a_minute  the speed of two cores that do nothing else
    """

    build: Callable[[], PreTrainedModel]
    length: int
    batch: int
    learning_rate: float
    steps_a_minute: float
    loss: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] = next_token_loss


def split_encyclopedia(text: Path) -> tuple[Path, Path]:
    """Write the halves of wiki.txt beside it, by article; return the first, which training sees, and the second."""
    articles = (text / "wiki.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    middle = len(articles) // 2
    halves = {"wiki-calibration.txt": articles[:middle], "wiki-held-out.txt": articles[middle:]}
    for name, part in halves.items():
        if not (text / name).exists():
            partial = text / f"{name}.partial"
            partial.write_text("\n\n".join(part) + "\n", encoding="utf-8")
            partial.rename(text / name)
    first, second = (text / name for name in halves)
    return first, second


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training text."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=VOCABULARY, special_tokens=list(SPECIAL_TOKENS), show_progress=False, min_frequency=2
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def build_model() -> OPTForCausalLM:
    """An OPT with random weights and tied embeddings."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            word_embed_proj_dim=256,
            ffn_dim=1024,
            num_hidden_layers=6,
            num_attention_heads=8,
            max_position_embeddings=POSITIONS,
            dropout=0.0,
            attention_dropout=0.0,
        )
    )


def train(
    model: PreTrainedModel, sequences: torch.Tensor, recipe: Recipe, steps: int, generator: torch.Generator
) -> None:
    """AdamW with a short warm-up, then a cosine to a tenth; `sequences` [count, length] in a new order an epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, min(50, steps // 10))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (warm_up + 1), total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up), recipe.learning_rate / 10),
        ],
        [warm_up],
    )
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    with tqdm(total=steps, unit="step", desc="train", disable=None) as bar:
        for _ in range(steps):
            if len(order) < recipe.batch:
                order = torch.cat((order, torch.randperm(len(sequences), generator=generator)))
            ids, order = sequences[order[: recipe.batch]], order[recipe.batch :]
            loss = recipe.loss(model, ids)
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()


def make_trained(final: Path, text: Path, recipe: Recipe, minutes: float, seed: int = SEED) -> None:
    """Train a model and its tokenizer on the texts in the folder `text` and save both as `final`, unless it exists."""
    learned, _ = split_encyclopedia(text)

    def write(out: Path, _downloads: Path) -> None:
        texts = [path.read_text(encoding="utf-8") for path in (text / "calibration.txt", learned)]
        tokenizer = train_tokenizer(texts)
        ids = torch.tensor([token for part in texts for token in tokenizer(part, verbose=False)["input_ids"]])
        count = len(ids) // recipe.length
        sequences = ids[: count * recipe.length].view(count, recipe.length)
        torch.manual_seed(seed)
        model = recipe.build()
        steps = max(1, round(minutes * recipe.steps_a_minute))
        train(model, sequences, recipe, steps, torch.Generator().manual_seed(seed))
        model.eval().to(torch.float16).save_pretrained(out)
        tokenizer.save_pretrained(out)
        update_json(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")

    make(final, write)


# 120 steps a minute: measured 2,170 tokens a second on one thread, twice that on two
RECIPE = Recipe(build_model, length=POSITIONS, batch=2, learning_rate=1e-3, steps_a_minute=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("demo"))
    parser.add_argument("--minutes", type=float, default=6.0, help="of two quiet cores; turned into steps (default: 6)")
    settings = parser.parse_args()
    if not (settings.directory / "text" / "wiki.txt").is_file():
        sys.exit(f"{settings.directory} holds no texts yet: run python examples/real_inputs.py {settings.directory}")
    final = settings.directory / "small-opt"
    make_trained(final, settings.directory / "text", RECIPE, settings.minutes)
    print(final)


if __name__ == "__main__":
    main()
