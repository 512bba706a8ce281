"""What a finished block leaves: its shard, the evidence of its permutations, and its record in journal and manifest."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from streamprune.checkpoint.manifest import LayerRecord, MomentsRecord, StepRecord
from streamprune.checkpoint.packed import packed_tensors
from streamprune.checkpoint.writer import Pieces, Staged, stage_safetensors
from streamprune.model.folding import FoldedPermutation
from streamprune.model.skeleton import Block
from streamprune.pipeline.block_pruning import PrunedBlock, PrunedLayer
from streamprune.pipeline.planning.job import Job
from streamprune.pipeline.residual import source_order
from streamprune.pipeline.run import Run
from streamprune.pipeline.validation import LayerErrors
from streamprune.pruning.statistics import ChannelStatistics


class StagedBlock(NamedTuple):
    """A block's files, whole but still beside their places."""

    evidence: Staged
    shard: Staged


def stage_block(run: Run, block: Block, pruned: PrunedBlock) -> StagedBlock:
    """Write a block's folded permutations and input RMS, which lie beside the journal until the end, and its shard.

    Layers are packed some rows at a time while the shard is written.
    """
    tensors: dict[str, torch.Tensor | Pieces] = {**pruned.others}
    evidence: dict[str, torch.Tensor] = {fold.name: fold.permutation.cpu().to(torch.int32) for fold in pruned.folded}
    for name, layer in pruned.layers.items():
        tensors.update(packed_tensors(name, layer.written, layer.keep, layer.gather, run.job.config.pattern))
        evidence[f"{name}.input_rms"] = source_order(layer.rms.cpu(), block.layers[name].parameter, run.residual)
    about = [about_permutation(fold) for fold in pruned.folded]
    beside, shard = run.journal.evidence_path(block.index), run.journal.out / run.job.shard_name(block)
    temporary = run.journal.temporary
    return StagedBlock(
        stage_safetensors(beside, evidence, temporary, about), stage_safetensors(shard, tensors, temporary)
    )


def digests_of(run: Run, staged: Iterable[Staged]) -> dict[str, str]:
    return {str(file.path.relative_to(run.journal.out)): file.digest for file in staged}


def about_permutation(fold: FoldedPermutation) -> dict[str, Any]:
    """A folded permutation's entry in the list of reordered tensors (docs/format.md)."""
    return {"permutation": fold.name, "reorders": [list(item) for item in fold.reorders]}


def moments_record(statistics: Mapping[str, ChannelStatistics]) -> MomentsRecord:
    """Memory of all second moments of a block, and the layers whose inputs were too wide for one matrix of them."""
    each = {id(shared): shared for shared in statistics.values()}.values()
    split = [name for name, s in statistics.items() if s.moments is not None and len(s.moments.bounds) > 1]
    return MomentsRecord(sum(shared.moments_bytes for shared in each), tuple(sorted(split)))


def layer_record(job: Job, block: Block, name: str, pruned: PrunedLayer, errors: LayerErrors | None) -> LayerRecord:
    """What the manifest says of a layer; without `errors` no text was run."""
    plan = job.plan.blocks[block.index][name]
    return LayerRecord(
        name=name,
        pattern=str(job.config.pattern),
        shape=plan.shape,
        dense_bytes=plan.dense_bytes,
        packed_bytes=plan.packed_bytes,
        permutation_bytes=0 if pruned.gather is None else 4 * len(pruned.gather),
        steps=tuple(StepRecord(**dataclasses.asdict(step)) for step in pruned.steps),
        shrinkage=pruned.shrinkage,
        weighted_error=pruned.weighted_error,
        kernel_error=None if errors is None else errors.kernel_error,
        layer_error=None if errors is None else errors.layer_error,
    )
