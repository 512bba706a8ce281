"""The text of PTX as data: kernels, their instructions and operands (NVIDIA's "PTX ISA", version 9).

Understands what NVRTC emits for this project's kernels; anything else raises PtxError with the statement.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4,
          "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}  # fmt: skip
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{")
PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s.*)?([\w$]+)$")
SHARED = re.compile(r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?")
LABEL = re.compile(r"\s*([\w$]+):(?!:)")
PREDICATE = re.compile(r"@(!?)(%?\w+)\s+")
OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\d+))?\s*\]")


class PtxError(Exception):
    """PTX that is not understood, or that does what no kernel may do."""


@dataclass(frozen=True)
class Register:
    name: str
    width: int  # bytes; 1 for predicates, which are bool


@dataclass(frozen=True)
class Special:
    """%tid.x and the like."""

    name: str


@dataclass(frozen=True)
class Immediate:
    bits: int
    width: int | None  # bytes of a floating-point literal; None for integers, which fit any type


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or a variable."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    parts: "tuple[Operand | None, ...]"  # None: `_`, a part that nobody wants


Operand = Register | Special | Immediate | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """`@!%p1 ld.global.v2.b32 {...}, [...]`: opcode "ld.global.v2.b32", guard (%p1, True)."""

    opcode: str
    operands: tuple[Operand | None, ...]
    guard: tuple[Register, bool] | None
    text: str


@dataclass
class Kernel:
    """One entry point. Static shared variables by name with (offset, bytes); `dynamic` names the extern array."""

    name: str
    parameters: dict[str, str]  # name: type, in order
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    shared_bytes: int = 0
    dynamic: set[str] = field(default_factory=set)


def parse(ptx: str) -> dict[str, Kernel]:
    """Kernels of a module by name."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    if re.search(r"\.func\b", ptx):
        raise PtxError("a function was not inlined: only kernels are understood")
    entries = list(ENTRY.finditer(ptx))
    outside, bodies, at = [], [], 0
    for entry in entries:
        end = _closing_brace(ptx, entry.end())
        outside.append(ptx[at : entry.start()])
        bodies.append(ptx[entry.end() : end])
        at = end + 1
    module_variables = SHARED.findall("".join(outside))
    kernels = {}
    for entry, body in zip(entries, bodies, strict=True):
        kernel = Kernel(entry[1], _parameters(entry[2]))
        for variable in module_variables:
            if re.search(rf"(?<![\w$]){re.escape(variable[3])}(?![\w$])", body):
                _add_shared(kernel, variable)
        _parse_body(kernel, body)
        kernels[kernel.name] = kernel
    return kernels


def _parameters(text: str) -> dict[str, str]:
    parameters = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = PARAMETER.match(part)
        if match is None:
            raise PtxError(f"a parameter is not understood: {part}")
        parameters[match[2]] = match[1]
    return parameters


def _parse_body(kernel: Kernel, body: str) -> None:
    registers: dict[str, int] = {}  # name, or prefix ending in <: width
    for statement in _statements(body):
        while label := LABEL.match(statement):
            kernel.labels[label[1]] = len(kernel.instructions)
            statement = statement[label.end() :]
        statement = " ".join(statement.split())
        if statement.startswith(".reg"):
            _declare(statement, registers)
        elif variable := SHARED.match(statement):
            _add_shared(kernel, variable.groups(default=""))
        elif statement and not statement.startswith(".pragma"):
            if statement.startswith("."):
                raise PtxError(f"a directive is not understood: {statement}")
            kernel.instructions.append(_instruction(statement, registers))
    kernel.instructions.append(Instruction("ret", (), None, "end of the kernel"))


def _statements(body: str) -> Iterator[str]:
    """Split at semicolons; braces that open or close a scope go, those of vectors stay."""
    start = 0
    for match in re.finditer(r"[;{}]", body):
        inside = body[start : match.start()]
        scope_begins = match[0] == "{" and not LABEL.sub("", inside).strip()
        scope_ends = match[0] == "}" and "{" not in inside
        if match[0] == ";" or scope_begins or scope_ends:
            yield inside
            start = match.end()


def _closing_brace(text: str, at: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("a kernel's body does not end")


def _declare(statement: str, registers: dict[str, int]) -> None:
    """`.reg .b32 %r<12>` or `.reg .pred p, q`. Scopes are flat: a name may come again with the same width only."""
    _, kind, names = statement.split(None, 2)
    for name in names.replace(" ", "").split(","):
        name = name.partition("<")[0] + ("<" if "<" in name else "")
        if registers.setdefault(name, WIDTHS[kind[1:]]) != WIDTHS[kind[1:]]:
            raise PtxError(f"{name} is declared twice with different types")


def _add_shared(kernel: Kernel, variable: tuple[str, ...]) -> None:
    external, alignment, kind, name, count = variable
    if external:
        kernel.dynamic.add(name)
        return
    offset = -(-kernel.shared_bytes // int(alignment)) * int(alignment)
    size = WIDTHS[kind] * int(count or 1)
    kernel.shared[name] = offset, size
    kernel.shared_bytes = offset + size


def _instruction(statement: str, registers: dict[str, int]) -> Instruction:
    guard, rest = None, statement
    if match := PREDICATE.match(statement):
        register = _operand(match[2], registers)
        if not isinstance(register, Register):
            raise PtxError(f"a guard is not understood: {statement}")
        guard, rest = (register, match[1] == "!"), statement[match.end() :]
    opcode, _, operands = rest.partition(" ")
    parsed = tuple(_operand(text, registers) for text in OPERANDS.findall(operands.replace("|", ",")))
    return Instruction(opcode, parsed, guard, statement)


def _operand(text: str, registers: dict[str, int]) -> Operand | None:
    if text == "_":
        return None
    if text.startswith("{"):
        return Vector(tuple(_operand(part.strip(), registers) for part in text[1:-1].split(",")))
    if match := ADDRESS.fullmatch(text):
        base = _operand(match[1], registers)
        assert isinstance(base, Register | Symbol | Immediate)
        return Address(base, int(match[2] or 0))
    if text in registers:
        return Register(text, registers[text])
    if text.startswith("%"):
        width = registers.get(text.rstrip("0123456789") + "<")
        return Special(text) if width is None else Register(text, width)
    if re.match(r"0[fFdD][0-9a-fA-F]+$", text):
        return Immediate(int(text[2:], 16), 4 if text[1] in "fF" else 8)
    if re.match(r"-?\d", text):
        return Immediate(int(text.rstrip("U"), 0), None)
    return Symbol(text)
