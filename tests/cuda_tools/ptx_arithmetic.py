"""PTX instructions that compute lane by lane, as a table: signature and numpy function of each.

A signature such as "ku>k" names the types of the operands and of the result: k the opcode's own type, w the integer
type twice as wide, u an unsigned 32-bit number, p a predicate, f the type converted from.
"""

from collections.abc import Callable

import numpy as np

from cuda_tools.ptx_text import PtxError

NUMPY = {"pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
         "s16": np.int16, "f16": np.float16, "bf16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
         "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64}  # fmt: skip
Function = Callable[..., np.ndarray]


def wide(x: np.ndarray) -> np.ndarray:
    """Integers in the type twice as wide."""
    return x.astype({"i": np.int64, "u": np.uint64}[x.dtype.kind] if x.itemsize == 4 else f"{x.dtype.kind}4")


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Upper half of a product."""
    if a.itemsize > 4:
        raise PtxError("the upper half of 128 bits is not understood")
    return ((wide(a) * wide(b)) >> wide(a).dtype.type(8 * a.itemsize)).astype(a.dtype)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, rounded once.

    In float64 the product of two float32 is exact, and the sum is rounded to odd before it is rounded to float32, which
    gives the same as one rounding (Boldo and Melquiond, IEEE Trans. Computers 57, 2008).
    """
    product = np.multiply(a, b, dtype=np.float64)
    if a.dtype == np.float64:
        half = np.float32  # exact where both factors have 24 bits, as squares of converted float32
        if not (
            np.array_equal(a.astype(half), a, equal_nan=True) and np.array_equal(b.astype(half), b, equal_nan=True)
        ):
            raise PtxError("fma in float64 is understood for factors that float32 holds")
        return product + c
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)
    bits = np.atleast_1d(total).view(np.int64)
    inexact = (lost != 0) & ((bits & 1) == 0) & np.isfinite(total)
    away = (lost > 0) == (total > 0)
    odd = np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64).reshape(np.shape(total))
    return odd.astype(np.float32)


def shift_left(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * a.itemsize
    return np.where(by >= bits, a.dtype.type(0), a << np.minimum(by, bits - 1).astype(a.dtype))


def shift_right(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Signed numbers keep their sign."""
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by >= bits, a.dtype.type(0), shifted)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers towards zero; floating-point to the nearest."""
    if a.dtype.kind == "f":
        return a / b
    whole = np.floor_divide(a, b)
    return whole + ((whole < 0) & (whole * b != a)).astype(a.dtype)


def minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)  # of a NaN and a number: the number


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def insert_bits(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """b with `length` bits from `position` on replaced by a's lowest."""
    field = shift_left(shift_left(np.ones_like(a), length) - a.dtype.type(1), position)
    return (b & ~field) | (shift_left(a, position) & field)


def extract_bits(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "i":
        raise PtxError("bfe of a signed number is not understood")
    return shift_right(a, position) & (shift_left(np.ones_like(a), length) - a.dtype.type(1))


def select_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: byte i of the result is the one of b:a (eight bytes) that nibble i of the selector names."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint64)
    for i in range(4):
        nibble = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(0xFF)
        sign = np.where(byte >= 0x80, np.uint64(0xFF), np.uint64(0))
        result |= np.where(nibble >= 8, sign, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


def funnel(left: bool) -> Function:
    """shf.wrap: the upper (left) or lower half of b:a shifted by c modulo 32."""

    def shifted(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        by = (c & np.uint32(31)).astype(np.uint64)
        return (((both << by) >> np.uint64(32)) if left else (both >> by)).astype(np.uint32)

    return shifted


def logic_table(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """lop3: bit 4 a + 2 b + c of the table, for each bit."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for row in range(8):
        if int(table) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def leading_zeros(a: np.ndarray) -> np.ndarray:
    if a.itemsize > 4:
        raise PtxError("clz of 64 bits is not understood")
    return (32 - np.frexp(a.astype(np.float64))[1]).astype(np.uint32)


def reversed_bits(a: np.ndarray) -> np.ndarray:
    result = np.zeros_like(a)
    for i in range(32):
        result |= ((a >> np.uint32(i)) & np.uint32(1)) << np.uint32(31 - i)
    return result


def highest_bit(a: np.ndarray) -> np.ndarray:
    return np.uint32(31) - leading_zeros(a)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even, as bits."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), np.uint64(0x7FFF), rounded).astype(np.uint16)


def conversion(rounding: str, to: str, source: str) -> Function:
    """cvt between two types; integers take floating-point values saturated, NaN as 0."""
    target = NUMPY[to]
    to_float, from_float = (kind in ("f16", "f32", "f64") for kind in (to, source))
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(rounding)
    if to == "bf16" and source == "f32" and rounding == "rn":
        return bfloat16
    if "bf16" in (to, source):
        raise PtxError(f"cvt.{rounding}.{to}.{source} is not understood")
    if from_float and not to_float:
        limits = np.iinfo(target)
        if whole is None or limits.bits > 32:
            raise PtxError(f"cvt.{rounding}.{to}.{source} is not understood")
        return lambda x: np.clip(np.nan_to_num(whole(x.astype(np.float64)), posinf=np.inf, neginf=-np.inf),
                                 limits.min, limits.max).astype(target)  # fmt: skip
    if whole is not None:
        return lambda x: whole(x).astype(target)
    if rounding not in ("", "rn"):
        raise PtxError(f"cvt.{rounding} is not understood")
    return lambda x: x.astype(target)


def differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of numbers: a NaN does not differ from anything."""
    return (a < b) | (a > b)


COMPARISONS: dict[str, Function] = {"eq": np.equal, "ne": differs, "lt": np.less, "le": np.less_equal,
                                    "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal,
                                    "hi": np.greater, "hs": np.greater_equal}  # fmt: skip
UNORDERED: dict[str, Function] = {f"{name}u": (lambda a, b, f=f: f(a, b) | np.isnan(a) | np.isnan(b))
                                  for name, f in COMPARISONS.items()}  # fmt: skip
NUMBERS: dict[str, Function] = {"nan": lambda a, b: np.isnan(a) | np.isnan(b),
                                "num": lambda a, b: ~(np.isnan(a) | np.isnan(b))}  # fmt: skip

TABLE: dict[str, tuple[str, Function]] = {
    "add": ("kk>k", np.add),
    "add.rn": ("kk>k", np.add),
    "sub": ("kk>k", np.subtract),
    "sub.rn": ("kk>k", np.subtract),
    "mul": ("kk>k", np.multiply),
    "mul.rn": ("kk>k", np.multiply),
    "mul.lo": ("kk>k", np.multiply),
    "mul.hi": ("kk>k", high_product),
    "mul.wide": ("kk>w", lambda a, b: wide(a) * wide(b)),
    "mad.lo": ("kkk>k", lambda a, b, c: a * b + c),
    "mad.wide": ("kkw>w", lambda a, b, c: wide(a) * wide(b) + c),
    "fma.rn": ("kkk>k", fused),
    "div": ("kk>k", quotient),
    "div.rn": ("kk>k", quotient),
    "rem": ("kk>k", np.fmod),
    "rcp.rn": ("k>k", lambda a: a.dtype.type(1) / a),
    "sqrt.rn": ("k>k", np.sqrt),
    "neg": ("k>k", np.negative),
    "abs": ("k>k", np.abs),
    "min": ("kk>k", minimum),
    "max": ("kk>k", maximum),
    "and": ("kk>k", np.bitwise_and),
    "or": ("kk>k", np.bitwise_or),
    "xor": ("kk>k", np.bitwise_xor),
    "not": ("k>k", np.invert),
    "shl": ("ku>k", shift_left),
    "shr": ("ku>k", shift_right),
    "shf.l.wrap": ("kku>k", funnel(left=True)),
    "shf.r.wrap": ("kku>k", funnel(left=False)),
    "lop3": ("kkku>k", logic_table),
    "prmt": ("kku>k", select_bytes),
    "bfi": ("kkuu>k", insert_bits),
    "bfe": ("kuu>k", extract_bits),
    "popc": ("k>u", lambda a: np.bitwise_count(a).astype(np.uint32)),
    "clz": ("k>u", leading_zeros),
    "brev": ("k>k", reversed_bits),
    "bfind": ("k>u", highest_bit),
    "bfind.shiftamt": ("k>u", leading_zeros),
    "selp": ("kkp>k", lambda a, b, p: np.where(p, a, b)),
    "mov": ("k>k", lambda a: a),
    **{f"setp.{name}": ("kk>p", function) for name, function in (COMPARISONS | UNORDERED | NUMBERS).items()},
}


def operation(opcode: str) -> tuple[list[str], str, Function] | None:
    """Operand types, result type and function of an opcode; None where the table lacks it."""
    parts = opcode.split(".")
    kinds = []
    while parts[-1] in NUMPY:
        kinds.insert(0, parts.pop())
    if parts[0] == "cvt" and len(parts) <= 2 and len(kinds) == 2:
        return [kinds[1]], kinds[0], conversion("".join(parts[1:]), kinds[0], kinds[1])
    entry = TABLE.get(".".join(parts))
    if entry is None or len(kinds) != 1:
        return None
    signature, function = entry
    if "w" in signature and kinds[0] not in ("u16", "s16", "u32", "s32"):
        return None
    meaning = {"k": kinds[0], "u": "u32", "p": "pred", "w": f"{kinds[0][0]}{2 * int(kinds[0][1:] or 0)}"
               if kinds[0][1:].isdigit() else ""}  # fmt: skip
    inputs, _, output = signature.partition(">")
    return [meaning[letter] for letter in inputs], meaning[output], function
