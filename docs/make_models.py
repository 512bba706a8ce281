"""Write docs/models.md from the families that the tests run: `make docs`."""

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import streamprune
from streamprune.model.source import open_dense

PAGE = Path(__file__).with_name("models.md")
sys.path.insert(0, str(PAGE.parent.parent / "tests"))
families: Any = importlib.import_module("families")

TOP = """# Models

Made by `make docs` from the families that `tests/pipeline/test_families.py` runs; do not edit.

Each of them goes, as a tiny checkpoint that transformers itself has saved, through compress, interrupt and resume,
verify with source, evaluate, export, and loading in transformers, where the packed model's logits are those of the
masked dense one. Each setting of its config class is set to other values, too: then logits are transformers' own, or
the config is refused.

Other causal language models of transformers go through as well, if their blocks are a list of modules with linear
layers. What their blocks are is found by running the model once on tensors without numbers, and where permutations fold
by trying it. `streamprune plan MODEL --json` says of each tensor whether it is pruned, copied, or left dense and why.
Refused, by name and before a job starts: models with an encoder, models whose blocks hand each other more than hidden
states, keys and values, or depend on the text otherwise than token by token, and those of which less than
`--min-coverage` of the blocks' matrices are layers that can be pruned.

Of a model that holds a language model among other parts (with pictures) the language model is pruned; the other parts
are copied bit by bit, and `AutoModelForImageTextToText` loads the whole, as it loads the source. Recurrent layers are
pruned where they are linear ones that are only called; convolutions and state parameters are copied. What depends on
the text beside hidden states (Gemma 4's per-layer inputs), and keys and values that blocks share, lie in scratch with
them, which then takes several times the room; `streamprune plan` says how much.

A permutation that is folded costs nothing at run time; one that is stored is a gather of that input. A fold is believed
where it leaves what a block of the model's own class returns, made small and with random weights
([method.md](method.md#who-permutes-the-input)). Layers with commas between them share an input, and its permutation. Of
experts each matrix is named once, expert N's.
"""


def page() -> str:
    """The whole of docs/models.md."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row(families.write_family(Path(folder) / name, name))
            for name in sorted(families.FAMILIES | families.WRAPPED)
        ]
    return "\n".join([TOP, families.HEAD, *rows]) + "\n"


def row(model: Path) -> str:
    return str(families.row_of(open_dense(model), streamprune.plan(model).coverage))


if __name__ == "__main__":
    PAGE.write_text(page())
