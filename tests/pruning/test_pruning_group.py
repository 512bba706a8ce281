"""Layers of one input: pieces of rows against all at once, steps against numpy, what becomes of the moments."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from streamprune.config import NMPattern, PruneConfig
from streamprune.pruning import group
from streamprune.pruning.group import PrunedGroup, prune_group
from streamprune.pruning.statistics import ChannelStatistics, LayerTokens, StatisticsAccumulator

IN, SEQUENCES, TOKENS = 48, 4, 60


@contextlib.contextmanager
def untimed(stage: str) -> Iterator[None]:
    yield


def weights(*rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"layer{i}": torch.randn(n, IN, generator=generator).bfloat16() for i, n in enumerate(rows)}


def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(IN, IN, generator=generator)
    return torch.randn(SEQUENCES, TOKENS, IN, generator=generator) @ mixed * torch.rand(IN, generator=generator)


def statistics(config: PruneConfig, layers: dict[str, torch.Tensor]) -> ChannelStatistics:
    only = next(iter(layers.values())).float() if len(layers) == 1 else None
    outputs = None if only is None else len(only)
    accumulator = StatisticsAccumulator(IN, config, torch.device("cpu"), outputs=outputs)
    for x in inputs():
        dense = x * 1.1 + 0.1
        accumulator.add(x)
        if config.correction:
            rows = [t @ only.T if only is not None else t[:, :1] for t in (dense, x)]
            accumulator.add_reference(LayerTokens(dense, rows[0]), LayerTokens(x, rows[1]))
    return accumulator.result()


def pruned(layers: dict[str, torch.Tensor], **settings: Any) -> PrunedGroup:
    corrects = settings.get("correction", 1.0) and settings.get("refine", True)
    config = PruneConfig(**({"correction_stride": 1} if corrects else {}), **settings)
    return prune_group(layers, statistics(config, layers), config, heads=None, fixed=False, timed=untimed)


CASES: list[dict[str, Any]] = [
    {},
    {"reconstruct": True},
    {"pattern": NMPattern(4, 8), "moments_width": 64, "shuffle": "global+local"},
    {"correction": 0.0, "shuffle": "none"},
    {"refine": False, "metric": "ria"},
]


@pytest.mark.parametrize("rows", [(40, 24), (33,)], ids=str)
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_pieces_of_rows_are_the_rows_at_once(
    settings: dict[str, Any], rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = weights(*rows)
    whole = pruned(layers, **settings)
    monkeypatch.setattr(group, "ROWS_AT_ONCE", 7)
    pieces = pruned(layers, **settings)
    assert (whole.permutation is None) is (settings.get("shuffle") == "none")
    if whole.permutation is not None:
        assert pieces.permutation is not None
        assert torch.equal(whole.permutation, pieces.permutation)
    assert whole.shrinkage == pieces.shrinkage
    assert whole.keep.keys() == layers.keys()
    assert whole.written.keys() == (layers.keys() if settings.get("reconstruct") else set())
    for name, weight in layers.items():
        assert whole.keep[name].shape == weight.shape
        assert torch.equal(whole.keep[name], pieces.keep[name])
        if settings.get("reconstruct"):
            torch.testing.assert_close(whole.written[name], pieces.written[name], rtol=0.02, atol=1e-3)
        assert [step.name for step in whole.steps[name]] == [step.name for step in pieces.steps[name]]
        for one, other in zip(whole.steps[name], pieces.steps[name], strict=True):
            assert one.retained_score == pytest.approx(other.retained_score, rel=1e-12)
            assert one.output_error == (None if other.output_error is None else pytest.approx(other.output_error, 1e-4))


@pytest.mark.parametrize("rows", [(40, 24), (33,)], ids=["inputs", "outputs"])
def test_errors_after_each_step_are_numpys(rows: tuple[int, ...]) -> None:
    """||D X|| / ||W X||, and what correction lowers over ||W X||^2, from activations."""
    layers = weights(*rows)
    found = pruned(layers, correction=0.5)
    assert found.permutation is not None
    x = inputs().double().numpy().reshape(-1, IN)
    offset = 0.5 * (x * 0.1 + 0.1)
    for name, layer in layers.items():
        w = layer.double().numpy()
        keep = numpy.empty(w.shape, dtype=bool)
        keep[:, found.permutation.numpy()] = found.keep[name].numpy()
        lost = x @ numpy.where(keep, 0, w).T
        moved = offset @ w.T
        whole = (x @ w.T).ravel() @ (x @ w.T).ravel()
        last = found.steps[name][-1]
        assert last.name == "refinement"
        assert last.output_error == pytest.approx((lost.ravel() @ lost.ravel() / whole) ** 0.5, rel=1e-3)
        expected = (((moved + lost) ** 2).sum() - (moved**2).sum()) / whole
        assert last.corrected_error == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_moments_are_used_up() -> None:
    config = PruneConfig()
    layers = weights(16)
    found = statistics(config, layers)
    assert found.moments is not None
    prune_group(layers, found, config, heads=None, fixed=False, timed=untimed)
    assert found.moments.halves[1] == []
