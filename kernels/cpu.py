"""Launchers of the compiled CPU kernels of cpu.cpp, packing.cpp and selection.cpp, or of the plain versions.

The library is built with the package where a C++ compiler is there. Without it every function here is its plain version
of reference.py: the same numbers up to rounding, several times slower. Threads are as many as torch's; results do not
depend on their number.
"""

import ctypes
import importlib.machinery
import itertools
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional

from streamprune_kernels import reference

INTERFACE = 14  # of the compiled functions; this and cpu.cpp's number are raised together
LANES = 16  # floats of a vector
MAX_PATTERNS = 256  # of a group that are tried one by one
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # of values, as the compiled functions number them
INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # its bits
PATHS = ("portable", "avx2", "avx512")  # sets of instructions, as instructions.h numbers them
VALUE_BYTES = (1, 2, 4, 8)  # that packing moves
POINTER, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "sum_of_maxima": [POINTER, INT64, POINTER, INT64, INT64, POINTER, INT64],
    "channel_range": [POINTER, INT64, INT64, POINTER, POINTER, POINTER, INT64],
    "count_values": [POINTER, INT64, INT64, *[POINTER] * 5, INT64, INT64, INT64],
    "local_swaps": [POINTER, *[INT64] * 6, FLOAT, POINTER, INT64],
    "select_groups": [POINTER, *[INT64] * 4, POINTER, INT64],
    "select_weights": [POINTER, INT64, POINTER, *[INT64] * 4, POINTER, POINTER, INT64],
    "kept_sums": [POINTER, POINTER, INT64, INT64, POINTER, INT64],
    "weighted_squares": [POINTER, INT64, POINTER, POINTER, INT64, INT64, POINTER, POINTER, INT64],
    "count_not_finite": [POINTER, *[INT64] * 4],
    "squared_distances": [POINTER, POINTER, INT64, INT64, POINTER, INT64],
    "pack_mask": [POINTER, INT64, INT64, POINTER, INT64, INT64],
    "unpack_mask": [POINTER, INT64, INT64, POINTER, INT64, INT64],
    "pack_rows": [POINTER, POINTER, *[INT64] * 4, POINTER, INT64, INT64],
    "expand_rows": [*[POINTER] * 3, *[INT64] * 4, POINTER, INT64, INT64],
    "refine_rows": [*[POINTER] * 4, *[INT64] * 4, POINTER, POINTER, INT64, FLOAT, FLOAT, INT64],
    "best_path": [],
    "product_rows": [POINTER, POINTER, *[INT64] * 4, POINTER, POINTER, INT64, POINTER, *[INT64] * 3],
    "has_product_pairs": [],
    "product_pairs": [POINTER, POINTER, *[INT64] * 3, POINTER, POINTER, INT64, POINTER, *[INT64] * 3],
    "xor_of_words": [POINTER, INT64, INT64],
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the package was built without a compiler.

    Raises ImportError where they were compiled from another version of the code.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu{suffix}")
        if path.exists():
            loaded = ctypes.CDLL(str(path))
            number = getattr(loaded, "interface_number", lambda: 0)()
            if number != INTERFACE:
                raise ImportError(f"{path} has interface {number}, {INTERFACE} is needed; install streamprune again")
            for name, arguments in SIGNATURES.items():
                function = getattr(loaded, name)
                function.argtypes, function.restype = arguments, INT64  # nothing reads that of a void one
            return loaded
    return None


def paths() -> tuple[str, ...]:
    """Sets of instructions that this processor has, the best last; none where the package was built without kernels."""
    compiled = library()
    return PATHS[: compiled.best_path() + 1] if compiled is not None else ()


def excess_sums(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Sum over rows of max(0, s_b - t_i), float32 [n_t, n_s]; s [n_s, rows] and t [n_t, rows] float32."""
    compiled = _library_for(s)
    if compiled is None:
        return reference.excess_sums(s, t)
    # max(0, s - t) = max(s, t) - t; padding adds 0 to both sums
    padding = -s.shape[1] % LANES
    padded_s, padded_t = (functional.pad(x, (0, padding)) if padding else x.contiguous() for x in (s, t))
    sums = torch.empty(t.shape[0], s.shape[0])
    compiled.sum_of_maxima(
        padded_s.data_ptr(), len(s), padded_t.data_ptr(), len(t), padded_s.shape[1], sums.data_ptr(), _threads()
    )
    return sums.sub_(t.sum(dim=1)[:, None])


def local_swaps(
    s: torch.Tensor, start: torch.Tensor, block: int, kept: int, group_size: int, rounds: int, least_gain: float
) -> torch.Tensor:
    """Greedy swaps of channels inside blocks of places; reference.local_swaps is the definition."""
    compiled = _library_for(s)
    if compiled is None:
        return reference.local_swaps(s, start, block, kept, group_size, rounds, least_gain)
    padding = -s.shape[1] % LANES  # rows of zeros add nothing
    padded = functional.pad(s, (0, padding)) if padding else s.contiguous()
    order = start.clone(memory_format=torch.contiguous_format)
    sizes = *padded.shape, block, group_size, kept, rounds
    compiled.local_swaps(padded.data_ptr(), *sizes, least_gain, order.data_ptr(), _threads())
    return order


def add_range(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, square_sum: torch.Tensor) -> None:
    """Update float32 `low` and `high` and float64 `square_sum`, all [channels], by x float32 [tokens, channels]."""
    compiled = _library_for(x)
    if compiled is None:
        reference.add_range(x, low, high, square_sum)
        return
    x = x.contiguous()
    compiled.channel_range(x.data_ptr(), *x.shape, low.data_ptr(), high.data_ptr(), square_sum.data_ptr(), _threads())


def count_values(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    exponent: torch.Tensor,
    first_bin: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Count values in windows of bins that widen as values need it; reference.count_values is the definition."""
    compiled = _library_for(x)
    if compiled is None:
        reference.count_values(x, low, high, exponent, first_bin, counts)
        return
    x = x.contiguous()
    windows = (tensor.data_ptr() for tensor in (low, high, exponent, first_bin, counts))
    compiled.count_values(x.data_ptr(), *x.shape, *windows, counts.shape[1], counts.stride(0), _threads())


def select_groups(scores: torch.Tensor, kept: int, group_size: int) -> torch.Tensor:
    """Mask bool [out, in] of the `kept` highest of every group of scores float32 [out, in]; of equal ones the lower."""
    compiled = _library_for(scores)
    if compiled is None or scores.dtype != torch.float32:
        return reference.select_groups(scores, kept, group_size)
    scores = scores.contiguous()
    keep = torch.empty(scores.shape, dtype=torch.bool)
    compiled.select_groups(scores.data_ptr(), *scores.shape, group_size, kept, keep.data_ptr(), _threads())
    return keep


def select_weights(
    weight: torch.Tensor, factor: torch.Tensor, kept: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`select_groups` by the scores |weight| * factor, which are never in memory, and their `kept_sums`.

    weight [out, in] finite; factor float32 [in], not negative. Returns the mask and the sums, float64 [out].
    """
    compiled = _library_for(weight)
    if compiled is None or weight.dtype not in TYPES:
        return reference.select_weights(weight, factor, kept, group_size)
    if factor.shape != weight.shape[1:] or factor.dtype != torch.float32 or weight.shape[1] % group_size:
        raise ValueError(f"{factor.dtype} factors {list(factor.shape)} do not fit a weight {list(weight.shape)}")
    weight, factor = weight.contiguous(), factor.contiguous()
    keep, sums = torch.empty(weight.shape, dtype=torch.bool), torch.empty(len(weight), dtype=torch.float64)
    sizes = *weight.shape, group_size, kept
    result = keep.data_ptr(), sums.data_ptr()
    compiled.select_weights(weight.data_ptr(), TYPES[weight.dtype], factor.data_ptr(), *sizes, *result, _threads())
    return keep, sums


def kept_sums(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Sum of the kept values of each row, float64 [rows]; x float32 [rows, width] finite, keep bool of its shape."""
    compiled = _library_for(x)
    if compiled is None or x.dtype != torch.float32:
        return reference.kept_sums(x, keep)
    x, keep, sums = x.contiguous(), keep.contiguous(), torch.empty(len(x), dtype=torch.float64)
    compiled.kept_sums(x.data_ptr(), keep.data_ptr(), *x.shape, sums.data_ptr(), _threads())
    return sums


def weighted_squares(x: torch.Tensor, keep: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of (x * scale)^2 of each row, float64 [rows]: over the dropped columns, and over all.

    x [rows, width] finite, keep bool of its shape, scale float32 [width].
    """
    compiled = _library_for(x)
    if compiled is None or x.dtype not in TYPES:
        return reference.weighted_squares(x, keep, scale)
    x, keep, scale = x.contiguous(), keep.contiguous(), scale.contiguous()
    dropped, whole = torch.empty(2, len(x), dtype=torch.float64)
    tensors = x.data_ptr(), TYPES[x.dtype], keep.data_ptr(), scale.data_ptr()
    compiled.weighted_squares(*tensors, *x.shape, dropped.data_ptr(), whole.data_ptr(), _threads())
    return dropped, whole


def all_finite(x: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    compiled = _library_for(x)
    if compiled is None or x.dtype not in TYPES:
        return reference.all_finite(x)
    x = x.contiguous()
    return not compiled.count_not_finite(x.data_ptr(), x.numel(), x.itemsize, INFINITY[x.dtype], _threads())


def squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """||x - y||^2 of each row, float64 [rows]; x and y float32 [rows, width]."""
    compiled = _library_for(x)
    if compiled is None:
        return reference.squared_distances(x, y)
    x, y, sums = x.contiguous(), y.contiguous(), torch.empty(len(x), dtype=torch.float64)
    compiled.squared_distances(x.data_ptr(), y.data_ptr(), *x.shape, sums.data_ptr(), _threads())
    return sums


def pack_mask(keep: torch.Tensor, *, path: str | None = None) -> torch.Tensor:
    """bool [out, in] to uint8 [out, ceil(in/8)], little end first; padding bits are 0.

    `path`, here and in the functions below, is one of `paths()` to run instead of the best.
    """
    compiled = _library_for(keep)
    if compiled is None or keep.dim() != 2 or keep.dtype != torch.bool or not keep.numel():
        return reference.pack_mask(keep)
    (rows, width), keep = keep.shape, keep.contiguous()
    mask = torch.empty(rows, -(-width // 8), dtype=torch.uint8)
    how = path_number(compiled, path), _threads()
    compiled.pack_mask(keep.data_ptr(), rows, width, mask.data_ptr(), *how)
    return mask


def unpack_mask(mask: torch.Tensor, in_features: int, *, path: str | None = None) -> torch.Tensor:
    """uint8 [out, ceil(in/8)] to bool [out, in]; a mask that does not fit is left to reference.unpack_mask."""
    compiled = _library_for(mask)
    fits = mask.dim() == 2 and mask.dtype == torch.uint8 and mask.shape[1] == -(-in_features // 8)
    if compiled is None or not fits or not mask.numel():
        return reference.unpack_mask(mask, in_features)
    mask, keep = mask.contiguous(), torch.empty(len(mask), in_features, dtype=torch.bool)
    how = path_number(compiled, path), _threads()
    compiled.unpack_mask(mask.data_ptr(), *keep.shape, keep.data_ptr(), *how)
    return keep


def pack_values(weight: torch.Tensor, keep: torch.Tensor, *, path: str | None = None) -> torch.Tensor:
    """Kept values of a weight [out, in] in ascending channel, bits untouched.

    Raises ValueError where rows keep different numbers of them.
    """
    rows, width = weight.shape
    if keep.shape != weight.shape or keep.dtype != torch.bool:
        raise ValueError(f"a mask {list(keep.shape)} does not fit a weight {list(weight.shape)}")
    kept = int(keep[0].sum()) if rows else 0
    compiled = _library_for(weight)
    if compiled is None or not kept or weight.itemsize not in VALUE_BYTES:
        return reference.pack_values(weight, keep)
    weight, keep, values = weight.contiguous(), keep.contiguous(), torch.empty(rows, kept, dtype=weight.dtype)
    sizes, how = (rows, width, kept, weight.itemsize), (path_number(compiled, path), _threads())
    if compiled.pack_rows(weight.data_ptr(), keep.data_ptr(), *sizes, values.data_ptr(), *how):
        raise ValueError(f"rows of a mask do not all keep the {kept} values that the first does")
    return values


def expand(
    values: torch.Tensor,
    mask: torch.Tensor,
    in_features: int,
    permutation: torch.Tensor | None = None,
    *,
    path: str | None = None,
) -> torch.Tensor:
    """Dense weight [out, in] in the values' dtype, zeros where nothing is kept; reference.expand is the definition.

    Raises ValueError where a row of the mask does not keep as many as there are values, and for a permutation that is
    none.
    """
    compiled = _library_for(values)
    if compiled is None or not values.numel() or values.itemsize not in VALUE_BYTES:
        return reference.expand(values, mask, in_features, permutation)
    rows, kept = values.shape
    if mask.shape != (rows, -(-in_features // 8)) or mask.dtype != torch.uint8:
        raise ValueError(f"a mask {list(mask.shape)} does not fit {rows} rows of {in_features} channels")
    values, mask, dense = values.contiguous(), mask.contiguous(), torch.empty(rows, in_features, dtype=values.dtype)
    place = None if permutation is None else permutation.to(torch.int32).contiguous()
    pointers = values.data_ptr(), mask.data_ptr(), None if place is None else place.data_ptr()
    sizes, how = (rows, in_features, kept, values.itemsize), (path_number(compiled, path), _threads())
    fits = place is None or place.shape == (in_features,)
    wrong = compiled.expand_rows(*pointers, *sizes, dense.data_ptr(), *how) if fits else -1
    if wrong < 0:
        raise ValueError("the permutation of a packed layer is not one")
    if wrong:
        raise ValueError(f"a mask does not keep {kept} values in every row")
    return dense


def refine_rows(
    weight: torch.Tensor,
    keep: torch.Tensor,
    q: torch.Tensor,
    moments: torch.Tensor,
    places: torch.Tensor,
    off_diagonal: float,
    least_gain: float,
) -> int:
    """One pass of coordinate descent over the groups of every row; returns how many groups changed.

    The tensors are those of reference.refine_rows, which is the definition, and contiguous.
    """
    compiled = _library_for(weight)
    if compiled is None:
        return reference.refine_rows(weight, keep, q, moments, places, off_diagonal, least_gain)
    for tensor in (weight, keep, q, moments):
        if not tensor.is_contiguous():
            raise ValueError("refine_rows works in place on contiguous tensors")
    kept_places, terms = _cost_terms(tuple(map(tuple, places.tolist())), places.shape[1])
    tensors = (tensor.data_ptr() for tensor in (weight, keep, q, moments))
    patterns = len(kept_places), kept_places.data_ptr(), terms.data_ptr(), terms.shape[1]
    m = places.shape[1]
    return int(compiled.refine_rows(*tensors, *weight.shape, m, *patterns, off_diagonal, least_gain, _threads()))


@cache
def _cost_terms(places: tuple[tuple[bool, ...], ...], m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patterns as uint8, and the terms that each one's cost sums, float32 [M + M(M-1)/2 + 1, patterns rounded up].

    The last row is what a cost starts with: infinity in the lanes that are no pattern.
    """
    kept = torch.tensor(places, dtype=torch.bool).view(-1, m)
    if len(kept) > MAX_PATTERNS:
        raise ValueError(f"{len(kept)} patterns are too many to try one by one")
    dropped = (~kept).to(torch.float32).T
    pairs = [dropped[i] * dropped[j] for i, j in itertools.combinations(range(m), 2)]
    padding = (0, -len(kept) % LANES)
    terms = functional.pad(torch.cat([dropped, torch.stack(pairs)]), padding)
    start = functional.pad(torch.zeros(1, len(kept)), padding, value=torch.inf)
    return kept.to(torch.uint8), torch.cat([terms, start]).contiguous()


def _library_for(x: torch.Tensor) -> ctypes.CDLL | None:
    return library() if x.device.type == "cpu" else None


def _threads() -> int:
    return torch.get_num_threads()


def path_number(compiled: ctypes.CDLL, path: str | None) -> int:
    """Number of a set of instructions, of the best without a name. Raises ValueError for one that is not here."""
    best: int = compiled.best_path()
    if path is None:
        return best
    if path not in PATHS[: best + 1]:
        raise ValueError(f"no compiled path {path} here; there are: {', '.join(PATHS[: best + 1])}")
    return PATHS.index(path)
