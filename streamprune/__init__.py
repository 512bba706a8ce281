"""streamprune: N:M sparse language models from checkpoints that are larger than memory.

import streamprune
streamprune.compress("/models/llama-65b", "./pruned", pattern="2:4")
"""

import importlib
from typing import TYPE_CHECKING, Any

from streamprune.errors import StreampruneError

if TYPE_CHECKING:
    from streamprune.model.packed_linear import PackedLinear
    from streamprune.pipeline.compress import compress
    from streamprune.pipeline.preview import plan
    from streamprune.runtime.evaluate import evaluate
    from streamprune.runtime.export import export
    from streamprune.runtime.inspect import inspect
    from streamprune.runtime.verify import verify

__all__ = ["PackedLinear", "StreampruneError", "compress", "evaluate", "export", "inspect", "plan", "verify"]

_HOMES = {
    "PackedLinear": "streamprune.model.packed_linear",
    "compress": "streamprune.pipeline.compress",
    "evaluate": "streamprune.runtime.evaluate",
    "export": "streamprune.runtime.export",
    "inspect": "streamprune.runtime.inspect",
    "plan": "streamprune.pipeline.preview",
    "verify": "streamprune.runtime.verify",
}


def __getattr__(name: str) -> Any:
    """Import a name on first use: `streamprune --help` should not wait for torch and transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
