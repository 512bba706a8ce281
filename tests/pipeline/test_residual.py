"""One permutation of the residual stream changes nothing, whole or pruned, and leaves N:M as it lies in the file."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_reader
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from streamprune.config import NMPattern, PruneConfig
from streamprune.model.folding import FoldedPermutation
from streamprune.pipeline.planning.job import Job, resolve_job
from streamprune.pipeline.planning.plan import Resources
from streamprune.pipeline.residual import NAME, reordered, residual_sides, source_order
from streamprune.pruning.selection import select, stable_sum
from streamprune.runtime.evaluate import evaluate
from streamprune.runtime.export import export
from streamprune.runtime.verify import verify
from streamprune.text.calibration import Calibration
from streamprune_kernels import kept_sums

TOKENS = torch.tensor([[ord(character) for character in tiny.text(200, seed=5)]])
RESIDUAL = {"shuffle": "residual+assignment"}
READERS = {
    "llama": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")),
    "opt": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("fc1",)),
}


@pytest.fixture
def job(sources: Callable[[str], Path], calibration: Path) -> Callable[[str], Job]:
    def resolve(source: str | Path) -> Job:
        folder = sources(source) if isinstance(source, str) else source
        return resolve_job(
            folder,
            PruneConfig(**RESIDUAL),
            Calibration(str(calibration), samples=1, sequence_length=16),
            Resources("cpu", "float32"),
        )

    return resolve


def random_fold(job: Job) -> FoldedPermutation:
    order = torch.randperm(job.source.skeleton.hidden_size, generator=torch.Generator().manual_seed(0))
    return FoldedPermutation(NAME, order, residual_sides(job))


def by_parameter(job: Job) -> dict[str, torch.Tensor]:
    return job.source.read(job.source.names)


def logits(folder: Path, state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    if state is not None:
        outcome = model.load_state_dict({name: tensor.double() for name, tensor in state.items()}, strict=False)
        assert outcome.unexpected_keys == []
        assert outcome.missing_keys in ([], ["lm_head.weight"])
    with torch.inference_mode():
        return model(TOKENS).logits


def write_projected_opt(folder: Path) -> Path:
    """As OPT-350m: embeddings of another width than the stream's, norms behind the layers, no last norm."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=tiny.POSITIONS, word_embed_proj_dim=32, do_layer_norm_before=False, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(4)
    return tiny.write_model(folder, OPTForCausalLM(config), torch.float16)


@pytest.mark.parametrize("source", ["llama", "llama-plain", "llama-untied", "opt", "opt-bin", "opt-projected"])
def test_logits_of_the_reordered_model_are_the_dense_models(
    source: str, job: Callable[[Any], Job], sources: Callable[[str], Path], tmp_path: Path
) -> None:
    """Grouped heads with biases, tied and not; OPT with biases, positions, and embeddings of another width."""
    if source == "llama-untied":
        folder = tiny.write_llama(tmp_path / "source", tied=False)
    elif source == "opt-projected":
        folder = write_projected_opt(tmp_path / "source")
    else:
        folder = sources(source)
    resolved = job(folder)
    tensors = by_parameter(resolved)
    changed = reordered(tensors, random_fold(resolved))
    assert changed.keys() == tensors.keys()
    plain = sources("opt") if source == "opt-bin" else folder
    expected = logits(plain)
    assert expected.std() > 0.5
    # relative, since transformers computes norms in float32 throughout
    assert (logits(plain, changed) - expected).abs().max() <= 1e-5 * expected.abs().max()
    moved = [name for name in tensors if not torch.equal(tensors[name], changed[name])]
    assert len(moved) == len({name for name, _ in residual_sides(resolved)})


@pytest.mark.parametrize("source", ["llama", "llama-plain", "opt"])
def test_every_side_of_the_stream_counts(
    source: str, job: Callable[[Any], Job], sources: Callable[[str], Path]
) -> None:
    """The test above has teeth: forget any one tensor of block 1 or outside, and the logits are others."""
    resolved = job(source)
    tensors, fold = by_parameter(resolved), random_fold(resolved)
    changed, expected = reordered(tensors, fold), logits(sources(source))
    names = [name for name, _ in fold.reorders if ".layers." not in name or ".layers.1." in name]
    assert len(names) >= 12
    for name in names:
        assert (logits(sources(source), {**changed, name: tensors[name]}) - expected).abs().max() > 1e-3, name


def test_each_tensor_is_along_the_stream_once(job: Callable[[Any], Job]) -> None:
    for source in ("llama", "llama-plain", "opt", "opt-bin"):
        sides = residual_sides(job(source))
        assert len({name for name, _ in sides}) == len(sides)


def test_channels_go_back_to_the_sources_order(job: Callable[[Any], Job]) -> None:
    fold = random_fold(job("llama"))
    rms = torch.rand(64, generator=torch.Generator().manual_seed(1))
    there = rms[fold.permutation]
    query, down = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(source_order(there, query, fold), rms)
    assert torch.equal(source_order(there, down, fold), there)
    assert torch.equal(source_order(there, query, None), there)


@pytest.mark.parametrize(("source", "readers"), [("llama", "q k v gate up"), ("opt", "q k v fc1")])
def test_a_pruned_model_stores_no_permutation_and_lies_in_order(
    source: str,
    readers: str,
    sources: Callable[[str], Path],
    outputs: Callable[..., Path],
    held_out: Path,
    tmp_path: Path,
) -> None:
    out = outputs(source, **RESIDUAL)
    assert verify(out, source=sources(source)).faults == []
    packed = packed_reader.PackedFolder(out)
    packed.check_against(tiny.read_tensors(sources(source)))
    assert not [name for name in packed.tensors if name.endswith("_permutation")]
    order = packed.folded[NAME]
    assert sorted(order) == list(range(64))
    assert list(order) != list(range(64))
    exported = export(out, out=tmp_path / "dense")
    assert exported.regathered == []
    tensors = packed_reader.open_folder(tmp_path / "dense")
    linear = [name for name in packed.patterns if name.rpartition(".")[2].removesuffix("_proj") in readers.split()]
    assert len(linear) == 3 * len(readers.split())
    for name in linear:
        groups = (packed_reader.bits(tensors[f"{name}.weight"]) != 0).reshape(len(tensors[f"{name}.weight"]), -1, 4)
        assert (groups.sum(axis=2) == 2).all(), name
        assert (packed.order(f"{name}.weight", 1, 64) == order).all(), name
    # the same function as the masked model in the source's own order
    state = packed.unpacked_state(tiny.read_tensors(sources(source)))
    expected = logits(sources(source), state)
    assert (logits(tmp_path / "dense") - expected).abs().max() <= 1e-5 * expected.abs().max()
    figures = [
        evaluate(folder, text=held_out, sequence_length=100, dtype="float32") for folder in (out, tmp_path / "dense")
    ]
    assert figures[0].loss == pytest.approx(figures[1].loss, rel=1e-5)


@pytest.mark.parametrize("source", ["llama", "opt"])
def test_the_permutation_retains_more_of_what_reads_the_stream(
    source: str, sources: Callable[[str], Path], outputs: Callable[..., Path]
) -> None:
    """Weights' sizes times their inputs' in the dense model, on text of the same kind, over all blocks."""
    tensors, packed = tiny.read_tensors(sources(source)), packed_reader.PackedFolder(outputs(source, **RESIDUAL))
    model = AutoModelForCausalLM.from_pretrained(sources(source), dtype=torch.float32).eval()
    prefixes = sorted({name.partition(".self_attn")[0] for name in packed.patterns if ".self_attn" in name})
    rms: dict[str, torch.Tensor] = {}
    for prefix, layers in itertools.product(prefixes, READERS[source]):
        name = f"{prefix}.{layers[0]}"
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: rms.update({name: x[0].flatten(0, -2).square().mean(dim=0).sqrt()})
        )
    with torch.inference_mode():
        model(TOKENS)
    rows = []
    for prefix, layers in itertools.product(prefixes, READERS[source]):
        part = torch.cat([tensors[f"{prefix}.{layer}.weight"].float().abs() for layer in layers])
        rows.append(part * rms[f"{prefix}.{layers[0]}"] / (part * rms[f"{prefix}.{layers[0]}"]).mean())
    scores, order = torch.cat(rows), torch.from_numpy(packed.folded[NAME]).long()
    before, after = (stable_sum(kept_sums(s, select(s, NMPattern(2, 4)))) for s in (scores, scores[:, order]))
    assert after > before * 1.005


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"])
def test_a_tampered_permutation_of_the_stream_is_found(
    layer: str, copy_of: Callable[..., Path], sources: Callable[[str], Path]
) -> None:
    out = copy_of("llama", **RESIDUAL)

    def swap(order: torch.Tensor) -> None:
        order[[0, 9]] = order[[9, 0]]

    tiny.edit_tensor(out / tiny.PERMUTATIONS, NAME, swap)
    tiny.reseal(out)
    assert verify(out).ok
    verification = verify(out, source=sources("llama"))
    faulty = {check.name for check in verification.layers if not check.ok}
    assert f"model.layers.1.{layer}" in faulty
