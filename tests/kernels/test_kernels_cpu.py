"""The compiled CPU kernels against their plain versions, for any thread count; and the job without them."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refinement_problems import clone, random_problem, whole_problem
from thread_count import threads

from streamprune import PackedLinear
from streamprune.config import NMPattern
from streamprune.pruning.refinement import group_patterns
from streamprune.runtime.verify import verify
from streamprune_kernels import (
    MIN_EXPONENT,
    add_range,
    count_values,
    hinge_sums,
    kept_sums,
    local_swaps,
    native,
    reference,
    refine_rows,
    select_groups,
    squared_distances,
    weighted_squares,
)

repeatable = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Without the library every comparison here would be of the plain version with itself."""
    assert isinstance(native.library(), ctypes.CDLL), "the package was built without its compiled kernels"


def on_threads(count: int, compute: Callable[[], Any]) -> Any:
    with threads(count):
        return compute()


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 100), seeds)
@repeatable
def test_hinge_sums(n_s: int, n_t: int, rows: int, seed: int) -> None:
    """Rows that are no multiple of 16, channels that are none of the tiles' 4 and 6."""
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(n, rows, generator=generator).exp() for n in (n_s, n_t))
    exact = (s.double()[None] - t.double()[:, None]).clamp(min=0).sum(dim=2)
    one, two, three = (on_threads(count, lambda: hinge_sums(s, t)) for count in (1, 2, 3))
    assert (one.shape, one.dtype) == ((n_t, n_s), torch.float32)
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    # of what is added up: both sides of max(s, t) - t
    scale = s.double().sum(dim=1)[None] + t.double().sum(dim=1)[:, None]
    assert ((one - exact).abs() <= 1e-6 * scale).all()
    assert ((one - reference.hinge_sums(s, t)).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("rows", [1023, 1024, 1025, 4099])
def test_hinge_sums_of_more_rows_than_stay_in_the_cache(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    s, t = (torch.rand(n, rows, generator=generator) for n in (13, 9))
    exact = (s.double()[None] - t.double()[:, None]).clamp(min=0).sum(dim=2)
    torch.testing.assert_close(hinge_sums(s, t).double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(hinge_sums(s, t), reference.hinge_sums(s, t), rtol=1e-5, atol=0)


def test_hinge_sums_of_views_that_are_not_contiguous() -> None:
    whole = torch.rand(64, 40, generator=torch.Generator().manual_seed(0))
    s, t = whole.T[:, ::2], whole.T[3:9, 1::2]
    assert not s.is_contiguous()
    torch.testing.assert_close(hinge_sums(s, t), hinge_sums(s.contiguous(), t.contiguous()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hinge_sums(s, t), reference.hinge_sums(s, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [kept_sums, weighted_squares, squared_distances])
@given(rows=st.integers(1, 40), width=st.integers(1, 70), seed=seeds)
@repeatable
def test_sums_of_rows(kernel: Callable[..., Any], rows: int, width: int, seed: int) -> None:
    """Columns that are no multiple of a vector; in float64, on any number of threads, each row by itself."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, rows, width, generator=generator)
    keep = torch.rand(rows, width, generator=generator) < 0.5
    scale = torch.rand(width, generator=generator)
    rest = {"kept_sums": (keep,), "weighted_squares": (keep, scale), "squared_distances": (y,)}[kernel.__name__]

    def sums(function: Callable[..., Any], *arguments: torch.Tensor) -> torch.Tensor:
        found = function(*arguments)
        return torch.stack(found) if isinstance(found, tuple) else found[None]

    one, three = (on_threads(count, lambda: sums(kernel, x, *rest)) for count in (1, 3))
    last = sums(kernel, *(tensor[-1:] if tensor.ndim == 2 else tensor for tensor in (x, *rest)))
    assert one.dtype == torch.float64
    assert torch.equal(one, three)
    assert torch.equal(one[:, -1:], last)
    torch.testing.assert_close(one, sums(getattr(reference, kernel.__name__), x, *rest), rtol=1e-12, atol=1e-12)


@given(
    st.sampled_from([(2, 4), (4, 8), (1, 4), (1, 2), (3, 4), (1, 3), (8, 16)]),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([16, 24, 64]),
    seeds,
)
@repeatable
def test_local_swaps_of_whole_numbers(sizes: tuple[int, int], groups: int, rows: int, block: int, seed: int) -> None:
    """Whole scores add up exactly, so the compiled search takes the very swaps of the plain one, ties among them."""
    kept, m = sizes
    block = max(block // m, 2) * m
    generator = torch.Generator().manual_seed(seed)
    s = torch.randint(0, 50, (groups * m, rows), generator=generator).float()
    start = torch.randperm(groups * m, generator=generator)
    arguments = start, block, kept, m, 32, 1e-6
    expected = reference.local_swaps(s, *arguments)
    for count in (1, 2, 3):
        found = on_threads(count, lambda: local_swaps(s, *arguments))
        assert torch.equal(found, expected)
    assert torch.equal(local_swaps(s.T.contiguous().T, *arguments), expected)
    assert torch.equal(expected.sort().values, torch.arange(groups * m))


def test_local_swaps_of_any_scores_reach_what_the_plain_ones_do() -> None:
    """Rounding may choose other swaps; the score that is kept in the end is the same to a hair."""
    generator = torch.Generator().manual_seed(3)
    s = torch.randn(192, 700, generator=generator).exp() * torch.randn(192, 1, generator=generator).exp()
    arguments = torch.arange(192), 64, 2, 4, 32, 1e-6

    def kept_score(order: torch.Tensor) -> float:
        groups = s[order].view(48, 4, -1)
        return float(groups.sort(dim=1, descending=True).values[:, :2].double().sum())

    before, plain = kept_score(arguments[0]), kept_score(reference.local_swaps(s, *arguments))
    compiled = kept_score(local_swaps(s, *arguments))
    assert plain > 1.01 * before
    assert compiled - before == pytest.approx(plain - before, rel=0.01)


@given(st.sampled_from([(2, 4), (4, 8), (1, 3), (8, 16)]), st.integers(1, 20), st.integers(1, 9), seeds)
@repeatable
def test_select_groups(sizes: tuple[int, int], rows: int, groups: int, seed: int) -> None:
    """Bit for bit, ties among few values included."""
    kept, m = sizes
    scores = torch.randint(0, 4, (rows, groups * m), generator=torch.Generator().manual_seed(seed)).float() - 1.5
    expected = reference.select_groups(scores, kept, m)
    for count in (1, 2):
        assert torch.equal(on_threads(count, lambda: select_groups(scores, kept, m)), expected)
    assert torch.equal(select_groups(scores.T.contiguous().T, kept, m), expected)
    assert (expected.view(rows, groups, m).sum(dim=2) == kept).all()


def range_state(channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
    return low, high, torch.zeros(channels, dtype=torch.float64)


@given(st.integers(1, 70), st.lists(st.integers(1, 40), min_size=1, max_size=3), seeds)
@repeatable
def test_add_range(channels: int, lengths: list[int], seed: int) -> None:
    """Channels that are no multiple of 16, and sequence after sequence into the same state."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randn(length, channels, generator=generator) for length in lengths]
    states = [range_state(channels) for _ in range(4)]
    for x in sequences:
        reference.add_range(x, *states[0])
        for count in (1, 2, 3):
            on_threads(count, lambda count=count, x=x: add_range(x, *states[count]))
    for state in states[1:]:
        assert torch.equal(state[0], states[0][0])
        assert torch.equal(state[1], states[0][1])
        torch.testing.assert_close(state[2], states[0][2], rtol=1e-12, atol=0)
        assert torch.equal(state[2], states[1][2])
    x = torch.cat(sequences)
    assert torch.equal(states[1][0], x.amin(dim=0))
    torch.testing.assert_close(states[1][2], x.double().square().sum(dim=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_add_range_shows_what_is_not_finite(value: float) -> None:
    for row in (0, 4, 8):
        for channel in (0, 15, 16, 20):
            for function in (add_range, reference.add_range):
                x = torch.ones(9, 21)
                x[row, channel] = value
                low, high, squares = range_state(21)
                function(x, low, high, squares)
                assert (~torch.isfinite(squares)).nonzero().tolist() == [[channel]]


def windows(channels: int, bins: int) -> tuple[torch.Tensor, ...]:
    """exponent, first_bin and counts as a histogram begins with them."""
    exponent = torch.full((channels,), MIN_EXPONENT, dtype=torch.int32)
    return exponent, torch.zeros(channels, dtype=torch.int32), torch.zeros(channels, bins, dtype=torch.int32)


@given(
    st.integers(1, 70), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from([16, 100, 4096]), seeds
)
@repeatable
def test_count_values(channels: int, lengths: list[int], bins: int, seed: int) -> None:
    """Bit for bit the plain version, sequence after sequence whose range grows, for any threads."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-130, 100, (channels,), generator=generator).double()).float()
    shift = torch.randint(-3, 4, (channels,), generator=generator) * size
    states = [windows(channels, bins) for _ in range(3)]
    low, high, _ = range_state(channels)
    for number, length in enumerate(lengths):
        x = torch.randn(length, channels, generator=generator) * size * 3**number + shift
        x[torch.rand(length, channels, generator=generator) < 0.2] = 0
        torch.minimum(low, x.amin(dim=0), out=low)
        torch.maximum(high, x.amax(dim=0), out=high)
        reference.count_values(x, low, high, *states[0])
        for count in (1, 2):
            on_threads(count, lambda count=count, x=x: count_values(x, low, high, *states[count]))
        for state in states[1:]:
            assert all(torch.equal(one, other) for one, other in zip(state, states[0], strict=True))
    exponent, first, counts = states[1]
    assert (counts.sum(dim=1) == sum(lengths)).all()
    width = torch.exp2(exponent.double())
    assert (first * width <= low).all()
    assert (high < (first + bins) * width).all()


def test_count_values_of_negative_values_is_floor_and_of_views_their_values() -> None:
    x = torch.tensor([[-0.25, 0.25], [-1.0, 1.75], [-1.25, 0.0], [0.5, -0.0]])
    for values in (x, x.T.contiguous().T):
        exponent, first, counts = windows(2, 4)
        exponent.zero_()
        count_values(values, torch.tensor([-1.25, -0.0]), torch.tensor([0.5, 1.75]), exponent, first, counts)
        assert exponent.tolist() == [0, 0]
        assert [counts[0, -2 - first[0] + i] for i in range(3)] == [1, 2, 1]
        assert [counts[1, -first[1] + i] for i in range(2)] == [3, 1]


REFINED = ["2:4", "4:8", "1:4", "1:3", "3:4", "2:8", "1:2", "5:6", "1:64", "8:16"]


@pytest.mark.parametrize("text", REFINED)
@pytest.mark.parametrize("off", [1.0, 0.8, 0.3])
def test_refine_rows(text: str, off: float) -> None:
    """The same masks, and q to rounding; 8:16 has too many patterns and goes by exchanges."""
    pattern = NMPattern.parse(text)
    assert (len(group_patterns(pattern)) == 0) is (text == "8:16")
    for seed, (rows, groups, tokens) in enumerate([(1, 1, 5), (7, 3, 9), (24, 4, 300)]):
        start = random_problem(pattern, rows, groups, tokens, seed, off)
        plain, one, two = clone(start), clone(start), clone(start)
        counts = [reference.refine_rows(*plain, off, 1e-6)]
        counts += [on_threads(n, lambda n=n, p=p: refine_rows(*p, off, 1e-6)) for n, p in ((1, one), (2, two))]
        assert counts[0] == counts[1] == counts[2]
        assert torch.equal(plain[1], one[1])
        for field in (1, 2):
            assert torch.equal(one[field], two[field])
        scale = float(start[3].diagonal().max()) * pattern.group_size
        torch.testing.assert_close(one[2], plain[2], rtol=1e-4, atol=1e-5 * scale)
        assert torch.equal(one[0], start[0])
        assert torch.equal(one[3], start[3])
        in_groups = one[1].view(rows, groups, -1).sum(dim=2)
        assert (in_groups == pattern.kept).all()
        changed = (one[1] != start[1]).view(rows, groups, -1).any(dim=2).sum()
        assert counts[0] == int(changed)
        dropped, before = (torch.where(p[1], 0, start[0]) for p in (one, start))
        torch.testing.assert_close(one[2], start[2] + off * (dropped - before) @ start[3], rtol=1e-4, atol=1e-5 * scale)
    assert counts[0] > 0


@pytest.mark.parametrize("text", ["2:4", "4:8", "8:16"])
def test_refine_rows_of_whole_numbers(text: str) -> None:
    """Exact, with many candidates that cost the same."""
    plain = whole_problem(NMPattern.parse(text), 2048, 192 // NMPattern.parse(text).group_size)
    compiled = clone(plain)
    assert reference.refine_rows(*plain, 0.5, 1e-6) == refine_rows(*compiled, 0.5, 1e-6) > 0
    for field in (1, 2):
        assert torch.equal(plain[field], compiled[field])


@given(st.sampled_from(REFINED), st.integers(1, 20), st.integers(1, 4), st.sampled_from([0.3, 1.0]), seeds)
@repeatable
def test_refine_rows_on_random_problems(text: str, rows: int, groups: int, off: float, seed: int) -> None:
    start = random_problem(NMPattern.parse(text), rows, groups, 64, seed, off)
    plain, compiled = clone(start), clone(start)
    assert reference.refine_rows(*plain, off, 1e-6) == refine_rows(*compiled, off, 1e-6)
    assert torch.equal(plain[1], compiled[1])


def test_refine_rows_leaves_numbers_that_are_not_finite() -> None:
    """A cost that is NaN is less than nothing: no group changes, and nothing is read outside a table."""
    for text in ("2:4", "8:16"):
        start = random_problem(NMPattern.parse(text), 3, 2, 50, 0)
        start[2].fill_(float("nan"))
        before = start[1].clone()
        assert refine_rows(*start, 0.8, 1e-6) == 0
        assert torch.equal(start[1], before)


@pytest.mark.parametrize("field", range(4), ids=["weight", "keep", "q", "moments"])
def test_refine_rows_refuses_what_is_not_contiguous(field: int) -> None:
    problem = list(random_problem(NMPattern(2, 4), 8, 4, 50, 0))
    wide = torch.cat([problem[field], problem[field]], dim=1)
    problem[field] = wide[:, : problem[field].shape[1]]
    with pytest.raises(ValueError, match="contiguous"):
        refine_rows(*problem, 0.8, 1e-6)  # type: ignore[arg-type]


def test_refine_rows_refuses_more_patterns_than_it_has_room_for() -> None:
    problem = random_problem(NMPattern(2, 4), 2, 4, 50, 0)
    places = torch.zeros(257, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="257 patterns are too many"):
        refine_rows(*problem[:4], places, 0.8, 1e-6)


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from streamprune.model import arithmetic
    from streamprune.pipeline import job

    for module in (native, arithmetic, job):
        if hasattr(module, "library"):
            monkeypatch.setattr(module, "library", lambda: None)
    arithmetic.warn_without_kernels.cache_clear()
    yield
    arithmetic.warn_without_kernels.cache_clear()


@pytest.mark.usefixtures("without_library")
def test_layers_without_the_library_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        PackedLinear.from_dense(torch.ones(2, 8))(torch.ones(3, 8))
    (line,) = caplog.messages
    assert "packed products take several times longer; install a C++ compiler" in line


@pytest.mark.parametrize("source", ["llama", "opt"])
@pytest.mark.usefixtures("without_library")
def test_a_job_without_the_library(
    source: str,
    prune: Callable[..., Any],
    sources: Callable[[str], Path],
    outputs: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Works, says so in one line, and another identity keeps its bytes from being mixed with the compiled ones'."""
    prune(source, tmp_path / "out")
    (line,) = [message for message in caplog.messages if "compiled kernels" in message]
    assert "\n" not in line
    assert line.endswith("install a C++ compiler and then streamprune again")
    assert verify(tmp_path / "out", source=sources(source)).faults == []
    manifest = tiny.read_json(tmp_path / "out" / tiny.MANIFEST)
    assert manifest["identity"]["compute"]["kernels"] == "plain"


def test_a_job_with_the_library_says_compiled_and_no_word(
    outputs: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    manifest = tiny.read_json(outputs("llama") / tiny.MANIFEST)
    assert manifest["identity"]["compute"]["kernels"] == "compiled"
    assert caplog.messages == []


def test_plain_and_compiled_agree_on_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamprune.pruning.refinement import refine_mask
    from streamprune.pruning.selection import select

    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(40, 448, generator=generator), torch.randn(600, 448, generator=generator)
    moments, pattern = x.T @ x, NMPattern(2, 4)
    keep = select(weight.abs(), pattern)
    compiled = refine_mask(weight, keep, moments, pattern, 0.1)
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(compiled, refine_mask(weight, keep, moments, pattern, 0.1))
    assert not torch.equal(compiled, keep)


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    with pytest.raises(ImportError, match="install streamprune again"):
        native.library.__wrapped__()
