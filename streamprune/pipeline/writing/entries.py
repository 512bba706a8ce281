"""What a finished block leaves: its shard, the evidence of its permutations, and its record in journal and manifest."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from streamprune.checkpoint.manifest import LayerRecord, MomentsRecord, StepRecord
from streamprune.checkpoint.packed import packed_tensors
from streamprune.checkpoint.reader import open_file
from streamprune.checkpoint.writer import Pieces, Staged, file_digest, stage_safetensors
from streamprune.errors import KernelFault
from streamprune.model.folding import FoldedPermutation
from streamprune.model.skeleton import Block
from streamprune.pipeline.block_pruning import PrunedBlock, PrunedLayer
from streamprune.pipeline.planning.job import Job
from streamprune.pipeline.residual import source_order
from streamprune.pipeline.run import Run
from streamprune.pruning.statistics import ChannelStatistics

if TYPE_CHECKING:
    from streamprune.pipeline.validation import LayerErrors


class StagedBlock(NamedTuple):
    """A block's files, whole but still beside their places."""

    evidence: Staged
    shard: Staged


@dataclass(frozen=True)
class WrittenPart:
    """A part of a block in a file of its own, which is not published but copied into the block's shard.

    evidence   folded permutations and input RMS, by name
    reordered  entries of the list of reordered tensors
    """

    name: str
    file: Staged
    evidence: dict[str, torch.Tensor]
    reordered: list[dict[str, Any]]


def write_part(run: Run, part: Block, pruned: PrunedBlock) -> WrittenPart:
    """Write a part's tensors; layers are packed some rows at a time."""
    path = run.journal.temporary / f"{part.name}.safetensors"
    return WrittenPart(
        part.name,
        stage_safetensors(path, _tensors(run, pruned), run.journal.temporary),
        _evidence(run, part, pruned),
        [about_permutation(fold) for fold in pruned.folded],
    )


def stage_block(run: Run, block: Block, pruned: PrunedBlock, parts: Sequence[WrittenPart] = ()) -> StagedBlock:
    """Write a block's folded permutations and input RMS, which lie beside the journal until the end, and its shard.

    Layers are packed some rows at a time while the shard is written. `parts` are those that are written already; their
    files are removed.
    """
    tensors, evidence = _tensors(run, pruned), _evidence(run, block, pruned)
    about = [about_permutation(fold) for fold in pruned.folded]
    for part in parts:
        tensors |= _copied(part.file)
        evidence |= part.evidence
        about += part.reordered
    beside, shard = run.journal.evidence_path(block.index), run.journal.out / run.job.shard_name(block)
    temporary = run.journal.temporary
    staged = StagedBlock(
        stage_safetensors(beside, evidence, temporary, about), stage_safetensors(shard, tensors, temporary)
    )
    for part in parts:
        part.file.temporary.unlink()
    return staged


def _tensors(run: Run, pruned: PrunedBlock) -> dict[str, torch.Tensor | Pieces]:
    tensors: dict[str, torch.Tensor | Pieces] = {**pruned.others}
    for name, layer in pruned.layers.items():
        tensors.update(packed_tensors(name, layer.written, layer.keep, layer.gather, run.job.config.pattern))
    return tensors


def _evidence(run: Run, block: Block, pruned: PrunedBlock) -> dict[str, torch.Tensor]:
    evidence = {fold.name: fold.permutation.cpu().to(torch.int32) for fold in pruned.folded}
    for name, layer in pruned.layers.items():
        evidence[f"{name}.input_rms"] = source_order(layer.rms.cpu(), block.layers[name].parameter, run.residual)
    return evidence


def _copied(file: Staged) -> dict[str, Pieces]:
    """The tensors of a written part, read while they are copied. Raises KernelFault where it has other bytes by now."""
    if file_digest(file.temporary) != file.digest:
        raise KernelFault(f"{file.path.name}: came back from disk changed; check the disk and memory, then run again")
    opened = open_file(file.temporary)
    return {
        name: Pieces(source.dtype, source.shape, partial(opened.pieces, name))
        for name, source in opened.tensors.items()
    }


def digests_of(run: Run, staged: Iterable[Staged]) -> dict[str, str]:
    return {str(file.path.relative_to(run.journal.out)): file.digest for file in staged}


def about_permutation(fold: FoldedPermutation) -> dict[str, Any]:
    """A folded permutation's entry in the list of reordered tensors (docs/format.md)."""
    return {"permutation": fold.name, "reorders": [list(item) for item in fold.reorders]}


def moments_record(statistics: Mapping[str, ChannelStatistics], experts: Sequence[MomentsRecord] = ()) -> MomentsRecord:
    """Memory of second moments held at once, and the layers whose inputs were too wide for one matrix of them; of
    `experts` each is known, and one was held at a time.
    """
    each = {id(shared): shared for shared in statistics.values()}.values()
    split = [name for name, s in statistics.items() if s.moments is not None and len(s.moments.bounds) > 1]
    split += [name for expert in experts for name in expert.layers_in_blocks]
    most = max([sum(shared.moments_bytes for shared in each), *(expert.bytes for expert in experts)])
    return MomentsRecord(most, tuple(sorted(split)))


def layer_record(job: Job, name: str, pruned: PrunedLayer, errors: "LayerErrors | None") -> LayerRecord:
    """What the manifest says of a layer; without `errors` no text was run."""
    plan = job.plan.layers[name]
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
