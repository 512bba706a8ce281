"""Views of weights: each kind reads its matrix out of a parameter and scatters one back, and touches nothing else."""

import pytest
import torch

from streamprune.model.weights import WeightView

HEADS, HEAD_DIM, HIDDEN = 3, 4, 8
NEOX_KEYS = tuple(head * 3 * HEAD_DIM + HEAD_DIM + channel for head in range(HEADS) for channel in range(HEAD_DIM))
# kind: the parameter's shape, the view of it, and the places of its first row's first two weights in the parameter
KINDS: dict[str, tuple[tuple[int, ...], WeightView, list[tuple[int, ...]]]] = {
    "whole": ((6, 8), WeightView("up", "up.weight", (6, 8)), [(0, 0), (0, 1)]),
    "transposed (GPT-2)": ((8, 6), WeightView("fc", "fc.weight", (6, 8), transposed=True), [(0, 0), (1, 0)]),
    "second half (Phi-3's up)": (
        (12, 8), WeightView("up", "gate_up.weight", (6, 8), rows=range(6, 12)), [(6, 0), (6, 1)],
    ),
    "interleaved by head (NeoX's keys)": (
        (36, HIDDEN), WeightView("key", "qkv.weight", (12, HIDDEN), rows=NEOX_KEYS), [(4, 0), (4, 1)],
    ),
    "middle columns (GPT-2's keys)": (
        (8, 24), WeightView("key", "c_attn.weight", (8, 8), transposed=True, rows=range(8, 16)), [(0, 8), (1, 8)],
    ),
    "an expert": ((3, 6, 8), WeightView("down", "experts.down", (6, 8), expert=2), [(2, 0, 0), (2, 0, 1)]),
    "an expert's up (interleaved, transposed, gpt-oss)": (
        (3, 8, 12),
        WeightView("up", "experts.gate_up", (6, 8), expert=1, transposed=True, rows=range(1, 12, 2)),
        [(1, 0, 1), (1, 1, 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "view", "places"), list(KINDS.values()), ids=list(KINDS))
def test_reads_and_scatters_back(shape: tuple[int, ...], view: WeightView, places: list[tuple[int, ...]]) -> None:
    parameter = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before, weight = parameter.clone(), view.read(parameter).clone()
    assert weight.shape == view.shape
    assert [float(value) for value in weight[0, :2]] == [float(parameter[place]) for place in places]
    view.write(parameter, weight * 2)
    assert torch.equal(view.read(parameter), weight * 2)
    changed = parameter != before
    assert int(changed.sum()) == weight.numel()
    view.write(parameter, weight)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((8, 6), WeightView("up", "w", (6, 8))),
        ((6, 8), WeightView("up", "w", (6, 8), expert=0)),
        ((2, 6, 8), WeightView("up", "w", (6, 8))),
        ((10, 8), WeightView("up", "w", (6, 8), rows=range(6, 12))),
    ],
    ids=["transposed", "no experts", "experts", "too few rows"],
)
def test_another_shape_is_refused(shape: tuple[int, ...], view: WeightView) -> None:
    with pytest.raises(ValueError, match="up: w "):
        view.read(torch.zeros(shape))
