"""What a model's blocks are, found by running its own forward once on tensors that have shapes and no numbers.

Where the blocks' list lies, which linear layers of a block share an input, how a block is called and what it returns.
The run takes no memory for weights, whatever the size of the model. What the streamed passes rely on is checked in it:
blocks run once each and in order, and nothing but hidden states goes from one to the next.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from streamprune.errors import UnsupportedModelError
from streamprune.model.library import Memory, memory_of, tensors_without_numbers, tree_flatten

TOKENS = 8  # of the run: more than one, so that no dimension of 1 stands for them
CALLED_ONCE = "is not called once, and alone, when its block runs"
EXPERTS = "experts"  # what transformers calls a module that holds them


@dataclass(frozen=True)
class FoundBlock:
    """Of one block, by names inside it.

    groups   layers that share an input, in the order of their calls
    dense    linear layers that cannot be replaced by packed ones, with reasons
    returns  how many values the block returns in a tuple, hidden states first; None: hidden states alone
    """

    groups: tuple[tuple[str, ...], ...]
    dense: dict[str, str]
    returns: int | None


@dataclass(frozen=True)
class Found:
    """What the run has shown.

    path     of the blocks' list, a module inside the base model
    width    of hidden states
    batched  whether what blocks are called with for one sequence serves several sequences at once
    """

    path: str
    width: int
    batched: bool
    blocks: tuple[FoundBlock, ...]


@dataclass
class _Run:
    """What is seen while the forward runs; tensors in `alive` keep their memory, so that it is not used again."""

    entered: list[tuple[int, Memory]] = field(default_factory=list)
    left: list[tuple[int | None, Memory]] = field(default_factory=list)
    calls: dict[tuple[int, str], list[Memory]] = field(default_factory=dict)
    touched: dict[tuple[int, str], str] = field(default_factory=dict)
    passed_on: set[Memory] = field(default_factory=set)  # what blocks returned beside hidden states
    first: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # what the first block was called with
    width: int = 0
    alive: list[torch.Tensor] = field(default_factory=list)

    def keep(self, tensor: torch.Tensor) -> Memory:
        self.alive.append(tensor)
        return memory_of(tensor)


class _Probe(nn.Module):
    """A linear layer's place: notes its inputs, and whether anything else than a call is done with it."""

    def __init__(self, linear: nn.Linear, place: tuple[int, str], run: _Run) -> None:
        super().__init__()
        self.__dict__.update(linear=linear, place=place, run=run)  # no submodule
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._parameters["bias"] = linear.bias

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            self.run.touched[self.place] = f"its {name} is used beside its being called"
            value = getattr(self.linear, name)
            return torch.empty(value.shape) if isinstance(value, nn.Parameter) else value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f"{self.place[1]} is given {x.shape[-1]} channels and takes {self.in_features}")
        self.run.calls.setdefault(self.place, []).append(self.run.keep(x))
        return x.new_empty((*x.shape[:-1], self.out_features))


def discover(model: PreTrainedModel) -> Found:
    """Find a model's blocks and run it. Raises UnsupportedModelError, naming what the streamed passes cannot do, and
    whatever the forward raises for sizes that do not fit each other.
    """
    path = _path_of_blocks(model)
    if named := next((n for n, _ in model.named_parameters() if f".{EXPERTS}." in f".{n}."), None):
        raise UnsupportedModelError(f"{named}: mixtures of experts are not supported yet")
    base = copy.deepcopy(model.base_model)  # the run puts modules in places, and may leave buffers without numbers
    blocks = [*base.get_submodule(path).children()]
    run = _Run()
    linears = [_probed(block, index, run) for index, block in enumerate(blocks)]
    hooks = [hook for index, block in enumerate(blocks) for hook in _watch(block, index, run)]
    embedding = model.get_input_embeddings().get_parameter("weight")
    with torch.inference_mode(False), torch.no_grad(), tensors_without_numbers():
        state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in _tensors(base)}
        inputs = torch.empty(1, TOKENS, embedding.shape[1])
        functional_call(base, state, (), {"inputs_embeds": inputs, "use_cache": False})
        for hook in hooks:
            hook.remove()
        first = {name.removeprefix(f"{path}.0."): tensor for name, tensor in state.items()}
        batched = _serves_two(blocks[0], {name: first[name] for name, _ in _tensors(blocks[0])}, run)
    _check_order(run, len(blocks))
    returns = [returned for returned, _ in run.left]
    each = zip(range(len(blocks)), linears, returns, strict=True)
    return Found(path, run.width, batched, tuple(_found(run, *one) for one in each))


def _path_of_blocks(model: PreTrainedModel) -> str:
    """The list that holds most of the base model's parameters, of as many modules as its config says blocks."""
    kind = type(model).__name__
    if model.base_model is model:
        raise UnsupportedModelError(f"{kind} has no base model under its head")
    count = getattr(model.config, "num_hidden_layers", None)
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if not sizes or not count:
        raise UnsupportedModelError(f"{kind} has no list of {count} blocks (num_hidden_layers of its config)")
    return max(sizes, key=lambda name: sizes[name])


def shared_weight(model: PreTrainedModel) -> str | None:
    """A parameter inside the blocks that is a parameter elsewhere, too."""
    path = _path_of_blocks(model)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    inside = f"{model.base_model_prefix}.{path}."
    return next((same[0] for same in names.values() if len(same) > 1 and any(inside in name for name in same)), None)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _probed(block: nn.Module, index: int, run: _Run) -> dict[str, str | None]:
    """Put probes in the places of a block's linear layers; their names, with the reason of those that stay."""
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    reasons = {name: _more_than_linear(module) for name, module in linears.items()}
    for name, reason in reasons.items():
        if reason is None:
            block.set_submodule(name, _Probe(linears[name], (index, name), run))
    return reasons


def _more_than_linear(module: nn.Linear) -> str | None:
    """Why a layer of a class of its own is no linear layer: of few numbers it makes something else than W x + b."""
    kind = type(module)
    if kind.forward is nn.Linear.forward and not (module._forward_hooks or module._forward_pre_hooks):
        return None
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 5), (3, 5), (3,)))
    tensors = {"weight": weight} if module.bias is None else {"weight": weight, "bias": bias}
    try:
        with torch.no_grad():
            same = torch.allclose(functional_call(module, tensors, (x,)), functional.linear(x, **tensors), atol=1e-5)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        same = False
    return None if same else f"its class, {kind.__name__}, computes something else than a linear layer"


def _watch(block: nn.Module, index: int, run: _Run) -> tuple[RemovableHandle, RemovableHandle]:
    """Note what a block is called with and returns. Raises UnsupportedModelError where more than hidden states goes on
    to later blocks.
    """
    before: list[Any] = []

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(states, torch.Tensor) or states.ndim != 3:
            raise UnsupportedModelError("a block of this model is not called with hidden states first")
        run.entered.append((index, run.keep(states)))
        run.first = run.first or (args, kwargs)
        run.width = states.shape[-1]
        before[:] = [_seen(args, kwargs)]
        if run.passed_on & {memory for memory in before[0][0] if isinstance(memory, tuple)}:
            raise UnsupportedModelError("a block of this model is given more of the one before it than hidden states")

    def leaving(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first, *more = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, torch.Tensor):
            raise UnsupportedModelError(f"a block of this model returns {type(output).__name__}, not hidden states")
        if _seen(args, kwargs) != before[0]:
            raise UnsupportedModelError("a block of this model changes what it is called with")
        run.left.append((1 + len(more) if isinstance(output, tuple) else None, run.keep(first)))
        run.passed_on |= {run.keep(leaf) for leaf in tree_flatten(more)[0] if isinstance(leaf, torch.Tensor)}

    return (
        block.register_forward_pre_hook(entering, with_kwargs=True),
        block.register_forward_hook(leaving, with_kwargs=True),
    )


def _seen(*arguments: Any) -> tuple[list[Any], Any]:
    """What a block is called with, to compare: tensors by their memory, which counts what is written into it."""
    leaves, structure = tree_flatten(arguments)
    return [memory_of(leaf) if isinstance(leaf, torch.Tensor) else id(leaf) for leaf in leaves], structure


def _serves_two(block: nn.Module, state: dict[str, torch.Tensor], run: _Run) -> bool:
    """Whether the first block takes two sequences with what it was called with for one: some masks have no place for
    more (bloom's).
    """
    if run.first is None:
        return False
    args, kwargs = run.first
    two = (torch.cat([args[0]] * 2), *args[1:]) if args else ()
    named = kwargs if args else {**kwargs, "hidden_states": torch.cat([kwargs["hidden_states"]] * 2)}
    calls, run.calls = run.calls, {}
    try:
        functional_call(block, state, two, named)
    except RuntimeError:
        return False
    finally:
        run.calls = calls
    return True


def _check_order(run: _Run, count: int) -> None:
    order = [index for index, _ in run.entered]
    if order != [*range(count)]:
        raise UnsupportedModelError(f"this model runs its blocks in another order than their list's: {order[:9]}")
    follow = zip(run.left, run.entered[1:], strict=False)
    if not all(left == entered for (_, left), (_, entered) in follow):
        raise UnsupportedModelError("this model changes hidden states between its blocks")


def _found(run: _Run, index: int, linears: dict[str, str | None], returns: int | None) -> FoundBlock:
    dense = {name: reason for name, reason in linears.items() if reason is not None}
    calls = {name: memories for (place, name), memories in run.calls.items() if place == index}
    for name in linears.keys() - dense.keys():
        if reason := run.touched.get((index, name)):
            dense[name] = reason
        elif len(calls.get(name, ())) != 1:
            dense[name] = CALLED_ONCE
    groups: dict[Memory, list[str]] = {}
    for name, memories in calls.items():  # in the order of first calls
        if name not in dense:
            groups.setdefault(memories[0], []).append(name)
    return FoundBlock(tuple(map(tuple, groups.values())), dict(sorted(dense.items())), returns)
