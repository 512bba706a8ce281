"""Experts as linear layers: transformers holds those of a block in 3-D parameters; here each has layers of its own.

What of a model is pruned, packed, named and read is a linear layer. So an experts module is replaced by one that holds
a linear layer for each expert and matrix, called as in the checkpoint ("mlp.experts.3.gate_proj"), and computes the
same. Tokens keep their places: each expert's rows are known by the tokens that they belong to.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from streamprune.errors import UnsupportedModelError
from streamprune.model.library import (
    Conv1D,
    expert_parts,
    experts_without_router,
    is_experts,
    modules_uninitialised,
)

EXPERTS = "experts"  # what transformers calls a module that holds them
MAX_EXPERTS = 1 << 14  # of a block; the largest models have fewer than 1000
Function = Callable[[torch.Tensor, "Routing"], torch.Tensor]


@dataclass(frozen=True)
class ExpertNames:
    """The layers of one expert, by their names below it.

    up     those that take its input; what they put out, one after the other, goes through the gate
    down   the one that takes the gate's output
    fused  the checkpoint has each matrix of all experts in one 3-D tensor
    """

    up: tuple[str, ...]
    down: str
    fused: bool


@dataclass(frozen=True)
class Routing:
    """Which experts take which rows: index int64 [rows, k] and weights [rows, k] of each row; an index that is no
    expert's takes it nowhere.
    """

    index: torch.Tensor
    weights: torch.Tensor

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that an expert takes, int64 [n] ascending, and their weights [n]."""
        rows, place = (self.index == expert).nonzero(as_tuple=True)
        return rows, self.weights[rows, place]


class TransposedLinear(Conv1D):
    """A linear layer whose weight is [in, out], with or without bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool, device: str = "meta") -> None:
        nn.Module.__init__(self)
        self.nf, self.nx = out_features, in_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features, device=device))
        offset = nn.Parameter(torch.empty(out_features, device=device)) if bias else None
        self.register_parameter("bias", offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] of x [..., in]."""
        return nn.functional.linear(x, self.weight.T, self.bias)


class ExpertLayers(nn.Module):
    """Takes an experts module's place; its layers have no weights yet.

    function  computes in place of the layers, where a job or a stream has them come one expert at a time
    """

    def __init__(self, own: nn.Module, names: ExpertNames) -> None:
        super().__init__()
        self.names = names
        self.function: Function | None = None
        fused, down = _parameters_of(own)
        transposed = bool(getattr(own, "is_transposed", experts_without_router(own)))
        shapes = [tuple(own.get_parameter(name).shape) for name in (fused, down)]
        sides = [(shape[1], shape[2]) if transposed else (shape[2], shape[1]) for shape in shapes]
        biased = f"{fused}_bias" in own._parameters
        self.count, self.gated = shapes[0][0], fused != "up_proj"
        self.interleaved = not getattr(own, "is_concatenated", True)
        if len(names.up) > 1 and (transposed or biased or self.interleaved):
            raise UnsupportedModelError(f"{type(own).__name__} with gate and up apart are not known")
        kind = TransposedLinear if transposed else nn.Linear
        for expert in range(self.count):
            layers = nn.Module()
            for name in names.up:
                layers.add_module(name, kind(sides[0][0], sides[0][1] // len(names.up), biased, device="meta"))
            layers.add_module(names.down, kind(*sides[1], biased, device="meta"))
            self.add_module(str(expert), layers)
        self.__dict__["own"] = own  # for its gate and its settings, no submodule

    def leave_out(self) -> None:
        """Hold no experts any more: they come one at a time."""
        self._modules.clear()

    def expert(self, number: int) -> nn.Module:
        """The layers of one expert."""
        return self.get_submodule(str(number))

    def layer_names(self, number: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Of an expert, below this module: the layers that take its input, and the one that takes the gate's output."""
        return tuple(f"{number}.{name}" for name in self.names.up), (f"{number}.{self.names.down}",)

    def as_own(self, dense: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The module that these layers stand for, with their weights. `dense` makes of a layer one that is not packed.

        An expert's layers are let go once its weights are copied.
        """
        own: nn.Module = self.__dict__["own"]
        fused, down = _parameters_of(own)
        for number in range(self.count):
            layers = [[dense(self.expert(number).get_submodule(name)) for name in names]
                      for names in (self.names.up, (self.names.down,))]  # fmt: skip
            for parameter, parts in zip((fused, down), layers, strict=True):
                _put(own, parameter, number, torch.cat([part.get_parameter("weight").detach() for part in parts]))
                if f"{parameter}_bias" in own._parameters:
                    _put(own, f"{parameter}_bias", number, parts[0].get_parameter("bias").detach())
            delattr(self, str(number))
        return own

    def compute(self, expert: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What an expert with weights makes of rows [n, in]."""
        ups = [expert.get_submodule(name)(x) for name in self.names.up]
        inner = self.gate(torch.cat(ups, dim=-1) if len(ups) > 1 else ups[0])
        made: torch.Tensor = expert.get_submodule(self.names.down)(inner)
        return made

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """What lies between an expert's layers."""
        own: Any = self.__dict__["own"]
        if not self.gated:
            made: torch.Tensor = own.act_fn(x)
        elif hasattr(own, "_apply_gate"):
            made = own._apply_gate(x)
        else:
            gate, up = x.chunk(2, dim=-1)
            made = up * own.act_fn(gate)
        return made

    def forward(self, hidden_states: torch.Tensor, *routing: Any, **named: Any) -> torch.Tensor:
        """The experts' outputs for hidden states [tokens, hidden], or [..., hidden]."""
        rows = hidden_states.flatten(0, -2)
        found = self._routing(rows, *routing, **named)
        return (self.function or self.of_all)(rows, found).reshape(hidden_states.shape)

    def of_all(self, rows: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Outputs [tokens, hidden] in the dtype of `rows`, summed in float32 or wider in the order of the experts."""
        total = torch.zeros(rows.shape, dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
        for number in range(self.count):
            taken, weights = routing.of(number)
            if len(taken):
                add_weighted(total, taken, self.compute(self.expert(number), rows[taken]), weights)
        return total.to(rows.dtype)

    def _routing(self, rows: torch.Tensor, index: Any = None, weights: Any = None, **named: Any) -> Routing:
        if index is None and not named:  # every expert has as many rows, those of zeros for what it does not take
            numbers = torch.arange(self.count, device=rows.device).repeat_interleave(len(rows) // self.count)
            numbers = torch.where((rows != 0).any(dim=-1), numbers, self.count)
            return Routing(numbers[:, None], rows.new_ones(len(rows), 1))
        values = [value for value in (index, weights, *named.values()) if isinstance(value, torch.Tensor)]
        if len(values) != 2 or {value.is_floating_point() for value in values} != {True, False}:
            raise UnsupportedModelError(f"{type(self.__dict__['own']).__name__} are called in a way that is not known")
        numbers, shares = sorted(values, key=torch.is_floating_point)
        return Routing(numbers.flatten(0, -2), shares.flatten(0, -2))


def _put(own: nn.Module, name: str, number: int, tensor: torch.Tensor) -> None:
    """Put an expert's tensor into the parameter of all of them, which is made by the first."""
    if number == 0:
        empty = tensor.new_empty(own.get_parameter(name).shape)
        own.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    own.get_parameter(name).data[number] = tensor


def add_weighted(total: torch.Tensor, rows: torch.Tensor, made: torch.Tensor, weights: torch.Tensor) -> None:
    """Add an expert's outputs [n, hidden] times their weights [n] to rows of a total [tokens, hidden], in its dtype."""
    total.index_add_(0, rows, made.to(total.dtype) * weights.to(total.dtype)[:, None])


def replace_experts(model: nn.Module, stored: Mapping[str, Any]) -> dict[str, ExpertLayers]:
    """Put linear layers in the place of a model's experts, named as in a checkpoint that has the tensors `stored`.

    `stored` are of anything with a shape, by their names in the model. Returns what was put in by its path. Raises
    UnsupportedModelError for experts that are not known, ValueError for far more than there are tensors of.
    """
    found = [(path, module) for path, module in model.named_modules() if is_experts(module)]
    there = Counter(f"{path}.{EXPERTS}" for path, _, _ in (name.partition(f".{EXPERTS}.") for name in stored))
    replaced = {}
    with modules_uninitialised():
        for path, own in found:
            _check_count(path, own, there[path], stored)
            replaced[path] = ExpertLayers(own, _names_of(model, path, own, stored))
            model.set_submodule(path, replaced[path])
    if left := next((name for name, tensor in model.named_parameters() if _in_experts(name, tensor)), None):
        raise UnsupportedModelError(f"{left}: experts of this kind are not known")
    return replaced


def _check_count(path: str, own: nn.Module, tensors: int, stored: Mapping[str, Any]) -> None:
    """Raise ValueError before layers are made for experts of which a checkpoint has far too few tensors."""
    first, down = _parameters_of(own)
    count = len(own.get_parameter(down))
    whole = [len(stored[name].shape) and stored[name].shape[0] for name in (f"{path}.{first}",) if name in stored]
    if count > min(MAX_EXPERTS, max([tensors, *whole])):
        raise ValueError(f"{path}: {count} experts, and the checkpoint has {tensors} tensors of them")


def _in_experts(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim > 2 and EXPERTS in name.split(".")


def _parameters_of(own: nn.Module) -> tuple[str, str]:
    """Names of an experts module's matrices. Raises UnsupportedModelError where it holds anything else."""
    first = "up_proj" if "gate_up_proj" not in own._parameters else "gate_up_proj"
    known = {first, "down_proj", f"{first}_bias", "down_proj_bias"}
    others = {name for name, _ in own.named_parameters()} - known
    if others or getattr(own, "has_post_expert_norm", False) or first not in own._parameters:
        raise UnsupportedModelError(f"{type(own).__name__} hold more than two matrices an expert")
    return first, "down_proj"


def _names_of(model: nn.Module, path: str, own: nn.Module, stored: Collection[str]) -> ExpertNames:
    """By which of their names a checkpoint has the layers of experts."""
    fused, down = _parameters_of(own)
    parts = [expert_parts(model, f"{path}.{name}") for name in (fused, down)]
    if all(parts) and len(parts[1]) == 1:
        some = (f"{path}.{number}.{parts[0][0]}" for number in range(len(own.get_parameter(down))))
        if any(f"{layer}.{part}" in stored for layer in some for part in ("weight", "weight_values")):
            return ExpertNames(parts[0], parts[1][0], fused=False)
    return ExpertNames((fused,), down, fused=True)


@dataclass(frozen=True)
class FusedTensor:
    """A tensor that holds one matrix or bias of all experts of a block, `count` slices: the parameters `slices`."""

    slices: str  # "PATH.{}.LAYER.weight"
    count: int


def fused_tensors(experts: Mapping[str, ExpertLayers]) -> dict[str, FusedTensor]:
    """Tensors by name that a checkpoint has in the place of those of each expert."""
    found = {}
    for path, layers in experts.items():
        for name in (*layers.names.up, layers.names.down) if layers.names.fused else ():
            for kind, _ in layers.expert(0).get_submodule(name).named_parameters():
                tensor = f"{path}.{name}{'_bias' * (kind == 'bias')}"
                found[tensor] = FusedTensor(f"{path}.{{}}.{name}.{kind}", layers.count)
    return found
