"""streamprune: N:M sparse language models from checkpoints that are larger than memory.

import streamprune
streamprune.compress("/models/llama-65b", "./pruned", pattern="2:4")
model = streamprune.load("./pruned")  # or transformers' from_pretrained, after this import

Each function takes its settings by keyword and returns the result of its name: `compress` a CompressResult, `verify` a
VerifyResult. Every error that is raised on purpose is a StreampruneError.
"""

import importlib
from typing import TYPE_CHECKING, Any

from streamprune.errors import StreampruneError
from streamprune.integrations.registration import register

if TYPE_CHECKING:
    from streamprune.cluster.status import StatusResult, status
    from streamprune.cluster.submission import SubmitResult, submit
    from streamprune.config import PruneConfig
    from streamprune.integrations.huggingface import load
    from streamprune.model.packed_linear import PackedLinear
    from streamprune.pipeline.compress import CompressResult, compress
    from streamprune.pipeline.planning.preview import PlanResult, plan
    from streamprune.pipeline.writing.journal import is_finished
    from streamprune.runtime.evaluate import EvaluateResult, evaluate
    from streamprune.runtime.export import ExportResult, export
    from streamprune.runtime.generate import GenerateResult, generate
    from streamprune.runtime.inspect import InspectResult, inspect
    from streamprune.runtime.verify import VerifyResult, verify

    __version__: str

__all__ = [
    "CompressResult",
    "EvaluateResult",
    "ExportResult",
    "GenerateResult",
    "InspectResult",
    "PackedLinear",
    "PlanResult",
    "PruneConfig",
    "StatusResult",
    "StreampruneError",
    "SubmitResult",
    "VerifyResult",
    "compress",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "is_finished",
    "load",
    "plan",
    "status",
    "submit",
    "verify",
]

_HOMES = {
    "CompressResult": "streamprune.pipeline.compress",
    "EvaluateResult": "streamprune.runtime.evaluate",
    "ExportResult": "streamprune.runtime.export",
    "GenerateResult": "streamprune.runtime.generate",
    "InspectResult": "streamprune.runtime.inspect",
    "PackedLinear": "streamprune.model.packed_linear",
    "PlanResult": "streamprune.pipeline.planning.preview",
    "PruneConfig": "streamprune.config",
    "StatusResult": "streamprune.cluster.status",
    "SubmitResult": "streamprune.cluster.submission",
    "VerifyResult": "streamprune.runtime.verify",
    "compress": "streamprune.pipeline.compress",
    "evaluate": "streamprune.runtime.evaluate",
    "export": "streamprune.runtime.export",
    "generate": "streamprune.runtime.generate",
    "inspect": "streamprune.runtime.inspect",
    "is_finished": "streamprune.pipeline.writing.journal",
    "load": "streamprune.integrations.huggingface",
    "plan": "streamprune.pipeline.planning.preview",
    "status": "streamprune.cluster.status",
    "submit": "streamprune.cluster.submission",
    "verify": "streamprune.runtime.verify",
}

register()


def __getattr__(name: str) -> Any:
    """Import a name on first use: `streamprune --help` should not wait for torch and transformers."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("streamprune")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
