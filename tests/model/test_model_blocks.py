"""One block: dense as transformers runs it, packed as the masked dense one; observing inputs; the streamed way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

from streamprune.checkpoint.packed import pack_layer
from streamprune.checkpoint.reader import open_checkpoint, open_file
from streamprune.checkpoint.scratch import HiddenStates
from streamprune.config import NMPattern
from streamprune.errors import CheckpointError, NumericsError, UnsupportedModelError
from streamprune.model.arithmetic import Arithmetic
from streamprune.model.blocks import RunnableBlock, dense_block, layers_observed, load_block, packed_block
from streamprune.model.forward import Arguments, BlockInputs
from streamprune.model.names import output_names
from streamprune.model.packed_linear import PackedLinear
from streamprune.model.skeleton import Skeleton
from streamprune.model.source import Source, open_dense
from streamprune.model.streaming import advance, embed, text_inputs
from streamprune.pruning.selection import select

CPU = torch.device("cpu")
FLOAT32 = Arithmetic(CPU, torch.float32)
PATTERN = NMPattern(2, 4)
TOKENS = torch.tensor([[ord(character) for character in tiny.text(24, seed=seed)] for seed in range(3)])

Sources = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def no_tick() -> None:
    return None


def block_tensors(source: Source, index: int) -> Tensors:
    return source.read(source.blocks[index].parameters)


def dense(source: Source, index: int, tensors: Tensors) -> torch.nn.Module:
    return dense_block(source.skeleton, source.blocks[index], tensors, FLOAT32)


def prune_by_magnitude(tensors: Tensors, layers: list[str], permuted: bool) -> tuple[Tensors, Tensors]:
    """A block's shard with `layers` packed, and the same block's dense tensors with the dropped weights set to 0."""
    shard, masked = dict(tensors), dict(tensors)
    for seed, layer in enumerate(layers):
        weight = shard.pop(f"{layer}.weight")
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))
        order = order if permuted else torch.arange(weight.shape[1])
        keep = select(weight[:, order].abs().float(), PATTERN)
        shard.update(pack_layer(weight[:, order], keep, order if permuted else None).tensors(layer))
        dense = torch.zeros_like(weight)
        dense[:, order] = torch.where(keep, weight[:, order], torch.zeros_like(weight))
        masked[f"{layer}.weight"] = dense
    return shard, masked


def arguments_of(source: Source, tokens: torch.Tensor = TOKENS[:1]) -> tuple[Arguments, ...]:
    return embed(source.skeleton, text_inputs(source), tokens, FLOAT32, None, no_tick)


def states_like(source: Source) -> torch.Tensor:
    return torch.randn(1, TOKENS.shape[1], source.skeleton.hidden_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_packed_block_equals_the_masked_dense_block(name: str, permuted: bool, sources: Sources) -> None:
    source = open_dense(sources(name))
    layers = [*source.blocks[1].layers]
    shard, masked = prune_by_magnitude(block_tensors(source, 1), layers, permuted)
    packed = packed_block(source.skeleton, source.blocks[1], shard, dict.fromkeys(layers, PATTERN), FLOAT32)
    masked_block = dense(source, 1, masked)
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == len(layers)
    arguments, states = arguments_of(source)[1], states_like(source)
    output, expected = (RunnableBlock("block", block, arguments).run(states) for block in (packed, masked_block))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)  # the sums round differently
    unpruned = dense(source, 1, block_tensors(source, 1))
    assert (RunnableBlock("block", unpruned, arguments).run(states) - output).abs().max() > 1e-2


def test_layers_that_are_not_packed_stay_dense(sources: Sources) -> None:
    source = open_dense(sources("llama"))
    layers = ["model.layers.0.mlp.down_proj"]
    shard, masked = prune_by_magnitude(block_tensors(source, 0), layers, permuted=False)
    packed = packed_block(source.skeleton, source.blocks[0], shard, dict.fromkeys(layers, PATTERN), FLOAT32)
    kinds = {name: type(module) for name, module in packed.named_modules() if name.endswith("_proj")}
    assert kinds.pop("mlp.down_proj") is PackedLinear
    assert set(kinds.values()) == {torch.nn.Linear}
    masked_block = dense(source, 0, masked)
    arguments, states = arguments_of(source)[0], states_like(source)
    output, expected = (RunnableBlock("", one, arguments).run(states) for one in (packed, masked_block))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_compute_in_the_arithmetics_dtype(dtype: torch.dtype, sources: Sources) -> None:
    source = open_dense(sources("llama"))
    tensors = block_tensors(source, 0)
    layers = ["model.layers.0.self_attn.q_proj"]
    shard, _ = prune_by_magnitude(tensors, layers, permuted=True)
    arguments, states = arguments_of(source)[0], states_like(source).to(dtype)
    kwargs = {key: tuple(x.to(dtype) for x in value) if key == "position_embeddings" else value
              for key, value in arguments.kwargs.items()}  # fmt: skip
    skeleton, block, arithmetic = source.skeleton, source.blocks[0], Arithmetic(CPU, dtype)
    packed = packed_block(skeleton, block, shard, dict.fromkeys(layers, PATTERN), arithmetic)
    assert packed.get_submodule("self_attn.q_proj").weight_values.dtype == torch.bfloat16  # as it is stored
    for module in (dense_block(skeleton, block, tensors, arithmetic), packed):
        assert {p.dtype for name, p in module.named_parameters() if not name.startswith("self_attn.q_proj")} == {dtype}
        assert RunnableBlock("", module, Arguments((), kwargs)).run(states).dtype == dtype
        assert not any(p.is_meta for p in [*module.parameters(), *module.buffers()])
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_missing_tensor_of_a_block_is_an_error_not_a_silent_zero(sources: Sources) -> None:
    source = open_dense(sources("llama"))
    tensors = block_tensors(source, 0)
    del tensors["model.layers.0.input_layernorm.weight"]
    for make in (
        lambda: dense(source, 0, tensors),
        lambda: packed_block(source.skeleton, source.blocks[0], tensors, {}, FLOAT32),
    ):
        with pytest.raises(KeyError, match="input_layernorm"):
            make()


def test_packed_linear_gathers_adds_bias_and_takes_any_batch() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float16)
    keep = torch.tensor([[False, True, False, True]])
    layer = pack_layer(weight, keep, torch.tensor([3, 2, 1, 0]))
    x = torch.tensor([[[1.0, 10.0, 100.0, 1000.0]], [[0.0, 0.0, 1.0, 0.0]]])
    # x permuted is 1000 100 10 1, of which places 1 and 3 are kept: 2 * 100 + 4 * 1 + 0.5.
    for bias, expected in (
        (torch.tensor([0.5], dtype=torch.float16), [[[204.5]], [[2.5]]]),
        (None, [[[204.0]], [[2.0]]]),
    ):
        linear = PackedLinear.from_packed(
            layer.values, layer.mask, in_features=4, bias=bias, permutation=layer.permutation
        )
        assert linear(x).tolist() == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_output_that_is_not_finite_stops_the_run_naming_the_block(value: float, sources: Sources) -> None:
    source = open_dense(sources("llama"))
    block = dense(source, 0, block_tensors(source, 0))
    states = states_like(source)
    states[0, 3, 5] = value
    with pytest.raises(NumericsError, match=r"^model\.layers\.0: its output holds NaN or infinity; mend the weights$"):
        RunnableBlock("model.layers.0", block, arguments_of(source)[0]).run(states)


def test_layers_are_observed_as_tokens_by_channels_while_open(sources: Sources) -> None:
    source = open_dense(sources("llama"))
    block = dense(source, 0, block_tensors(source, 0))
    arguments, states = arguments_of(source)[0], states_like(source)
    seen: dict[str, list[torch.Tensor]] = {"self_attn.q_proj": [], "self_attn.v_proj": [], "mlp.down_proj": []}
    results: list[torch.Tensor] = []
    observers = {name: lambda x, y, tensors=tensors: tensors.append(x) for name, tensors in seen.items()}
    with layers_observed(block, {**observers, "mlp.gate_proj": lambda x, y: results.append(y)}, TOKENS.shape[1]):
        output = RunnableBlock("block", block, arguments).run(states)
    assert [len(tensors) for tensors in seen.values()] == [1, 1, 1]
    assert torch.equal(seen["self_attn.q_proj"][0], seen["self_attn.v_proj"][0])
    with torch.inference_mode():
        normed = block.get_submodule("input_layernorm")(states)[0]
    assert torch.equal(seen["self_attn.q_proj"][0], normed)
    assert seen["mlp.down_proj"][0].shape == (TOKENS.shape[1], 160)
    assert [tuple(y.shape) for y in results] == [(TOKENS.shape[1], 160)]
    assert torch.equal(RunnableBlock("block", block, arguments).run(states), output)
    assert [len(tensors) for tensors in seen.values()] == [1, 1, 1]


def test_observers_are_taken_off_when_the_run_fails(sources: Sources) -> None:
    source = open_dense(sources("llama"))
    block = dense(source, 0, block_tensors(source, 0))
    with pytest.raises(RuntimeError, match="a fault"), layers_observed(block, {"mlp.up_proj": lambda x, y: None}, 4):
        raise RuntimeError("a fault")
    assert not block.get_submodule("mlp.up_proj")._forward_hooks


@pytest.mark.parametrize("name", ["llama", "opt", "qwen2"])
def test_streamed_blocks_from_disk_equal_the_same_blocks_at_once(name: str, sources: Sources, tmp_path: Path) -> None:
    source = open_dense(sources(name))
    samples, length = TOKENS.shape
    first, second = (
        HiddenStates(tmp_path / f"{file}.bin", samples, length, source.skeleton.hidden_size, torch.float32)
        for file in "ab"
    )
    ticks: list[int] = []
    arguments = embed(source.skeleton, text_inputs(source), TOKENS, FLOAT32, first, lambda: ticks.append(1))
    expected = [first.read(index) for index in range(samples)]
    for index, block in enumerate(source.blocks):
        shown: list[tuple[int, torch.Tensor]] = []

        def observe(sequence: int, x: torch.Tensor, y: torch.Tensor, shown: list[Any] = shown) -> None:
            shown.append((sequence, x))

        runnable = RunnableBlock(block.name, load_block(source, block, FLOAT32), arguments[index])
        advance(runnable, first, second, FLOAT32, lambda: ticks.append(1), observe)
        assert [sequence for sequence, _ in shown] == list(range(samples))
        assert all(torch.equal(x, expected[sequence]) for sequence, x in shown)
        whole = RunnableBlock(block.name, dense(source, index, block_tensors(source, index)), arguments[index])
        expected = [whole.run(states) for states in expected]
        for sequence in range(samples):
            assert torch.equal(second.read(sequence), expected[sequence])
        first, second = second, first
    assert len(ticks) == samples * (1 + len(source.blocks))
    first.close()
    second.close()


def test_packed_block_is_loaded_from_its_shard(sources: Sources, tmp_path: Path) -> None:
    source = open_dense(sources("opt"))
    layers = ["model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"]
    shard, masked = prune_by_magnitude(block_tensors(source, 0), layers, permuted=False)
    save_file(shard, tmp_path / "block.safetensors")
    checkpoint = open_file(tmp_path / "block.safetensors")
    names = {name: name for name in source.blocks[0].parameters}
    patterns = dict.fromkeys([*layers, "model.decoder.layers.1.fc1"], PATTERN)  # another block's layer is none of ours
    block = load_block(Source(source.skeleton, checkpoint, names, patterns), source.blocks[0], FLOAT32)
    arguments, states = arguments_of(source)[0], states_like(source)
    masked_block = dense(source, 0, masked)
    output, expected = (RunnableBlock("", one, arguments).run(states) for one in (block, masked_block))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_embed_runs_one_sequence_where_nothing_is_kept(sources: Sources) -> None:
    source = open_dense(sources("llama"))
    ticks: list[int] = []
    arguments = embed(source.skeleton, text_inputs(source), TOKENS, FLOAT32, None, lambda: ticks.append(1))
    assert len(arguments) == 3
    assert ticks == []


class Recorded:
    """Stands in for `block_inputs`: arguments of each recording in turn, and what it was asked for."""

    def __init__(self, masks: list[torch.Tensor]) -> None:
        self.masks, self.texts = masks, list[torch.Tensor]()

    def __call__(self, skeleton: Skeleton, inputs: Any, ids: torch.Tensor, arithmetic: Arithmetic) -> BlockInputs:
        self.texts.append(ids)
        mask = self.masks[len(self.texts) - 1]
        return BlockInputs(torch.zeros(1, len(ids), 64), (Arguments((), {"mask": mask, "flag": False}),) * 3)


ONE, NEXT, TWO = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]).nextafter(torch.tensor(3.0)), torch.full((2,), 2.0)


@pytest.mark.parametrize(
    ("masks", "expected", "lines"),
    [
        ([ONE, ONE], ONE, 0),
        ([NEXT, ONE, ONE, ONE], ONE, 1),  # once wrong by a single rounding, first or second: it is not what is used
        ([ONE, NEXT, ONE, ONE], ONE, 1),
        ([ONE, TWO, ONE, TWO], None, 1),
        ([ONE, NEXT, ONE, NEXT], None, 1),
        ([ONE, ONE[:1], ONE, ONE[:1]], None, 1),
    ],
    ids=["equal", "first once wrong", "second once wrong", "by text", "by text, a little", "of another shape"],
)
def test_arguments_are_what_two_texts_agree_on(
    masks: list[torch.Tensor],
    expected: torch.Tensor | None,
    lines: int,
    sources: Sources,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from streamprune.model import streaming

    skeleton = open_dense(sources("llama")).skeleton
    recorded = Recorded(masks)
    monkeypatch.setattr(streaming, "block_inputs", recorded)
    if expected is None:
        with pytest.raises(UnsupportedModelError, match=r"depends on the text: mask \(by ([0-9.e-]+|inf)\)"):
            embed(skeleton, None, TOKENS, FLOAT32, None, no_tick)  # type: ignore[arg-type]
    else:
        arguments = embed(skeleton, None, TOKENS, FLOAT32, None, no_tick)  # type: ignore[arg-type]
        assert all(torch.equal(one.kwargs["mask"], expected) for one in arguments)
    assert len(caplog.messages) == lines
    assert all("differs between two texts: mask (by " in line for line in caplog.messages)
    assert all((one != other).all() for one, other in zip(recorded.texts[::2], recorded.texts[1::2], strict=True))


def test_names_of_an_output_are_its_dense_parameters(sources: Sources, tmp_path: Path) -> None:
    source = open_dense(sources("llama"))
    layer = "model.layers.0.mlp.down_proj"
    tensors = tiny.read_tensors(source.folder)
    packed = pack_layer(tensors[f"{layer}.weight"], select(tensors[f"{layer}.weight"].abs().float(), PATTERN), None)
    del tensors[f"{layer}.weight"]
    save_file({**tensors, **packed.tensors(layer)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert output_names(source.skeleton, checkpoint, {layer: PATTERN}) == {name: name for name in tensors}
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.mlp\.up_proj.* is not in the model"):
        output_names(source.skeleton, checkpoint, {"model.layers.9.mlp.up_proj": PATTERN})
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, first model\.layers\.0\.mlp\.down_proj\.weight"):
        output_names(source.skeleton, checkpoint, {"model.layers.0.mlp.up_proj": PATTERN})
