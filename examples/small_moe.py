"""Train a small mixture of experts on the demo's texts: experts to measure pruning on, whose weights have learned.

    python examples/small_moe.py [DIR] [--minutes 5] [--balance 0] [--seed 0]

DIR (default: demo) holds the inputs that `python examples/real_inputs.py DIR` makes. Adds to it

    small-moe/                  MixtralForCausalLM of 4 blocks with 8 experts each, 2 for a token, in float16, 5 MB,
                                and its own BPE tokenizer of 4,096 tokens
    text/wiki-calibration.txt   the first half of wiki.txt, by article: training sees it
    text/wiki-held-out.txt      the second half: training never sees it

--balance weighs the loss that has the router give every expert its share. With 0 some experts get few tokens, as in
models whose router is skewed; the model is then called small-moe-balance-0. Another seed is in the name likewise. How
long it learns and what is made again: as examples/small_opt.py has it.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
from torch.nn.functional import one_hot
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from small_opt import SEED, VOCABULARY, Recipe, make_trained

BALANCE = 0.02
EXPERTS, TAKEN = 8, 2
STEPS_A_MINUTE = 240  # measured: 8,200 tokens a second on two threads


def build_model() -> MixtralForCausalLM:
    """A Mixtral with random weights and tied embeddings."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TAKEN,
            max_position_embeddings=1024,
            sliding_window=None,
            router_aux_loss_coef=0.0,
            tie_word_embeddings=True,
            bos_token_id=2,
            eos_token_id=2,
        )
    )


def loss_with_balance(balance: float, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The next token's, and `balance` times each router's (Switch Transformer, eq. 4), 1 where it is balanced.

    transformers' own adds the routers up first, so that an expert which one of them never takes costs nothing if
    another router takes that of the same number more often.
    """
    out = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=balance > 0)
    loss: torch.Tensor = out.loss
    for logits in out.router_logits or ():
        shares = logits.softmax(dim=-1)
        taken = one_hot(shares.topk(TAKEN, dim=-1).indices, EXPERTS).sum(dim=1) / TAKEN
        loss = loss + balance * EXPERTS * (taken.mean(dim=0) * shares.mean(dim=0)).sum()
    return loss


def named(balance: float, seed: int) -> str:
    """The folder's name, which says what is not as by default."""
    other = {f"balance-{balance:g}": balance != BALANCE, f"seed-{seed}": seed != SEED}
    return "-".join(["small-moe", *(part for part, differs in other.items() if differs)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("demo"))
    parser.add_argument("--minutes", type=float, default=5.0, help="of two quiet cores; turned into steps (default: 5)")
    parser.add_argument("--balance", type=float, default=BALANCE, help=f"0: none (default: {BALANCE})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of weights and order (default: {SEED})")
    settings = parser.parse_args()
    if not (settings.directory / "text" / "wiki.txt").is_file():
        sys.exit(f"{settings.directory} holds no texts yet: run python examples/real_inputs.py {settings.directory}")
    loss = functools.partial(loss_with_balance, settings.balance)
    recipe = Recipe(build_model, length=256, batch=8, learning_rate=3e-3, steps_a_minute=STEPS_A_MINUTE, loss=loss)
    final = settings.directory / named(settings.balance, settings.seed)
    make_trained(final, settings.directory / "text", recipe, settings.minutes, settings.seed)
    print(final)


if __name__ == "__main__":
    main()
