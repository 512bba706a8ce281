"""What a model's blocks are, found by running its own forward once, its blocks on tensors that have no numbers.

Where the blocks' list lies, which linear layers of a block share an input, how a block is called and what it returns.
The run takes no memory for weights, whatever the size of the model. What the streamed passes rely on is checked in it:
blocks run once each and in order, and nothing but hidden states goes from one to the next.
"""

import copy
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel

from streamprune.errors import UnsupportedModelError
from streamprune.model.carried import Beside, Place
from streamprune.model.experts import ExpertLayers
from streamprune.model.library import (
    Conv1D,
    Memory,
    linear_shape,
    memory_of,
    tensors_without_numbers,
    tree_flatten,
    tree_map,
)
from streamprune.model.stand_in import StandIn

TOKENS = 8  # of the run: more than one, so that no dimension of 1 stands for them
CALLED_ONCE = "is not called once, and alone, when its block runs"
ROUTERS = ("gate", "router", "_gate")  # how names of what chooses experts end
ROUTES = "it routes tokens to experts"


@dataclass(frozen=True)
class FoundBlock:
    """Of one block, by names inside it.

    groups   layers that share an input, in the order of their calls
    dense    linear layers that cannot be replaced by packed ones, with reasons
    experts  the module that holds its experts, whose layers are in no group here
    returns  how many values the block returns in a tuple, hidden states first; None: hidden states alone
    """

    groups: tuple[tuple[str, ...], ...]
    dense: dict[str, str]
    returns: int | None
    experts: str | None = None
    beside: Beside = field(default_factory=Beside)


@dataclass(frozen=True)
class Found:
    """What the run has shown.

    path     of the blocks' list, a module inside the base model
    tables   further embeddings of tokens than the model's first, modules inside the base model
    width    of hidden states
    batched  whether what blocks are called with for one sequence serves several sequences at once
    """

    path: str
    tables: tuple[str, ...]
    width: int
    batched: bool
    blocks: tuple[FoundBlock, ...]


@dataclass
class _Run:
    """What is seen while the forward runs; tensors in `alive` keep their memory, so that it is not used again."""

    order: list[int] = field(default_factory=list)
    returns: list[int | None] = field(default_factory=list)
    beside: list[Beside] = field(default_factory=list)
    left: Memory | None = None  # of what the last block returned
    passed_on: list[torch.Tensor] = field(default_factory=list)  # what blocks returned beside hidden states
    calls: dict[tuple[int, str], list[Memory]] = field(default_factory=dict)
    touched: dict[tuple[int, str], str] = field(default_factory=dict)
    experts: dict[int, list[str]] = field(default_factory=dict)
    width: int = 0
    batched: bool = True
    alive: list[torch.Tensor] = field(default_factory=list)


class _Probe(nn.Module):
    """A linear layer's place: notes its inputs, and whether anything else than a call is done with it."""

    def __init__(self, linear: nn.Module, place: tuple[int, str], run: _Run) -> None:
        super().__init__()
        self.__dict__.update(linear=linear, place=place, run=run)  # no submodule
        self.out_features, self.in_features = linear_shape(linear) or (0, 0)
        self._parameters["bias"] = linear._parameters["bias"]

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
        self.run.alive.append(x)
        self.run.calls.setdefault(self.place, []).append(memory_of(x))
        return x.new_empty((*x.shape[:-1], self.out_features))


class _ExpertsProbe(nn.Module):
    """The place of a block's experts, which are known: notes that it is called."""

    def __init__(self, place: tuple[int, str], run: _Run) -> None:
        super().__init__()
        self.__dict__.update(place=place, run=run)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        place, run = self.__dict__["place"], self.__dict__["run"]
        run.experts.setdefault(place[0], []).append(place[1])
        return torch.empty_like(hidden_states)


class _Stage(StandIn):
    """A block's place: the block is run on tensors without numbers, and zeros go on in place of what it returns.

    So what lies around the blocks has numbers, on which some of it depends: the longest position, say.
    """

    def __init__(self, block: nn.Module, index: int, run: _Run) -> None:
        super().__init__(block)
        self.__dict__.update(index=index, run=run)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        states = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(states, torch.Tensor) or states.ndim != 3:
            raise UnsupportedModelError("a block of this model is not called with hidden states first")
        if any(leaf is other for leaf in tree_flatten((args, kwargs))[0] for other in run.passed_on):
            raise UnsupportedModelError("a block of this model is given more of the one before it than hidden states")
        if run.left is not None and run.left != memory_of(states):
            raise UnsupportedModelError("this model changes hidden states between its blocks")
        run.order.append(self.index)
        run.width = states.shape[-1]
        given, mapping = _given(args, kwargs), _mapping(kwargs)
        with tensors_without_numbers(), torch.no_grad():
            output, left = _run_block(self.block, args, kwargs, run, mapping)
        run.beside.append(_beside(given, mapping, left, kwargs))
        first, *more = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, torch.Tensor) or first.shape != states.shape:
            raise UnsupportedModelError(f"a block of this model returns {type(output).__name__}, not hidden states")
        run.returns.append(1 + len(more) if isinstance(output, tuple) else None)
        zeros = tree_map(_zeros, output)
        states, *beside = zeros if isinstance(zeros, tuple) else (zeros,)
        run.alive.append(states)
        run.left = memory_of(states)
        run.passed_on += [leaf for leaf in tree_flatten(beside)[0] if isinstance(leaf, torch.Tensor)]
        return zeros


def _zeros(leaf: Any) -> Any:
    return torch.zeros(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Place, int]:
    """Channels of the arguments beside hidden states that are made of the text: by gradients, which embeddings want."""
    places: dict[Place, Any] = dict(enumerate(args[1:]))
    places |= {name: value for name, value in kwargs.items() if args or name != "hidden_states"}
    given = {}
    for place, value in places.items():
        leaves = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
        if any(leaf.requires_grad for leaf in leaves):
            if not isinstance(value, torch.Tensor) or value.shape[:-1] != (1, TOKENS):
                name = f"argument {place + 1}" if isinstance(place, int) else place
                raise UnsupportedModelError(
                    f"a block is called with something that depends on the text and is no row for each token: {name}"
                )
            given[place] = value.shape[-1]
    return given


def _mapping(kwargs: dict[str, Any]) -> str | None:
    """The argument in which blocks may leave something to later ones: a mapping that the first one finds empty."""
    shared = (name for name, value in kwargs.items() if isinstance(value, MutableMapping))
    return next((name for name in shared if all(map(_are_keys_and_values, kwargs[name].values()))), None)


def _are_keys_and_values(value: Any) -> bool:
    """Whether something has [1, heads, tokens, size] each."""
    return isinstance(value, tuple) and all(
        isinstance(one, torch.Tensor) and one.ndim == 4 and (one.shape[0], one.shape[2]) == (1, TOKENS) for one in value
    )


def _beside(given: dict[Place, int], name: str | None, left: dict[Any, Any], kwargs: dict[str, Any]) -> Beside:
    """What a block is given and has left; zeros go on in the mapping of that `name`."""
    if name is None:
        return Beside(given)
    mapping = kwargs[name]
    if not all(map(_are_keys_and_values, left.values())):
        raise UnsupportedModelError(f"a block of this model leaves something else than keys and values in {name}")
    mapping.update({key: tuple(_zeros(one) for one in value) for key, value in left.items()})
    heads = {key: tuple((one.shape[1], one.shape[3]) for one in value) for key, value in left.items()}
    return Beside(given, (name, type(mapping)) if mapping else None, heads)


def _run_block(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], run: _Run, mapping: str | None
) -> tuple[Any, dict[Any, Any]]:
    """What a block returns for arguments without numbers, and leaves in that argument; the first one is tried with two
    sequences, too.
    """
    empty: dict[int, torch.Tensor] = {}

    def without_numbers(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return empty.setdefault(id(leaf), torch.empty(leaf.shape, dtype=leaf.dtype))

    shared = kwargs[mapping] if mapping is not None else {}
    own = {key: tree_map(without_numbers, value) for key, value in shared.items()}
    args, kwargs = tree_map(without_numbers, (args, {name: kwargs[name] for name in kwargs if name != mapping}))
    of_block = {} if mapping is None else {mapping: type(shared)(own)}
    state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in _tensors(block)}
    before = _seen(args, kwargs)
    output = functional_call(block, state, args, {**kwargs, **of_block})
    if _seen(args, kwargs) != before:
        raise UnsupportedModelError("a block of this model changes what it is called with")
    left = {key: value for key, value in of_block.get(mapping or "", {}).items() if value is not own.get(key)}
    if len(run.order) == 1:
        run.batched = _serves_two(block, state, args, {**kwargs, **of_block}, run)
    return output, left


def _serves_two(
    block: nn.Module, state: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], run: _Run
) -> bool:
    """Whether a block takes two sequences with what it is called with for one: some masks have no place for more
    (bloom's).
    """
    two = (torch.cat([args[0]] * 2), *args[1:]) if args else ()
    named = kwargs if args else {**kwargs, "hidden_states": torch.cat([kwargs["hidden_states"]] * 2)}
    calls, run.calls, experts, run.experts = run.calls, {}, run.experts, {}
    try:
        functional_call(block, state, two, named)
    except RuntimeError:
        return False
    finally:
        run.calls, run.experts = calls, experts
    return True


def _seen(*arguments: Any) -> tuple[list[Any], Any]:
    """What a block is called with, to compare: tensors by their memory, which counts what is written into it."""
    leaves, structure = tree_flatten(arguments)
    return [memory_of(leaf) if isinstance(leaf, torch.Tensor) else id(leaf) for leaf in leaves], structure


def discover(model: PreTrainedModel) -> Found:
    """Find a model's blocks and run it. Raises UnsupportedModelError, naming what the streamed passes cannot do, and
    whatever the forward raises for sizes that do not fit each other.
    """
    path = _path_of_blocks(model)
    base: nn.Module = copy.deepcopy(model.base_model)  # its modules are replaced, and it may change its buffers
    blocks = [*base.get_submodule(path).children()]
    run = _Run()
    linears = [_probed(block, index, run) for index, block in enumerate(blocks)]
    for index, block in enumerate(blocks):
        base.set_submodule(f"{path}.{index}", _Stage(block, index, run))
    first = model.get_input_embeddings()
    name_of_first = next(name for name, module in model.base_model.named_modules() if module is first)
    with torch.inference_mode(False), torch.enable_grad():
        ids = torch.arange(TOKENS, 0, -1)[None] % first.get_parameter("weight").shape[0]  # that are no positions
        tables = _tables(base, ids)
        zero = torch.zeros(())  # expanded, it takes no memory
        outer = {name: zero.expand(parameter.shape) for name, parameter in base.named_parameters()}
        functional_call(base, outer, (), {"input_ids": ids, "use_cache": False})
    if run.order != [*range(len(blocks))]:
        raise UnsupportedModelError(f"this model runs its blocks in another order than their list's: {run.order[:9]}")
    each = zip(range(len(blocks)), linears, run.returns, strict=True)
    further = tuple(name for name in tables if name != name_of_first)
    return Found(path, further, run.width, run.batched, tuple(_found(run, *one) for one in each))


def _tables(base: nn.Module, ids: torch.Tensor) -> dict[str, None]:
    """Names of embeddings that turn out to be called with these ids; what they return wants gradients, so that what is
    made of it does.
    """
    tables: dict[str, None] = {}
    seed = torch.zeros((), requires_grad=True)

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            if not args or not isinstance(args[0], torch.Tensor) or not torch.equal(args[0], ids):
                return output
            tables[name] = None
            return output + seed

        return hook

    for name, module in base.named_modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(hook_of(name))
    return tables


def _path_of_blocks(model: PreTrainedModel) -> str:
    """The list that holds most of the base model's parameters, of as many modules as its config says blocks.

    Of a model that wraps a language model: of that one's.
    """
    kind = type(model).__name__
    if model.base_model is model:
        raise UnsupportedModelError(f"{kind} has no base model under its head")
    text = model.config.get_text_config()
    count, whole = getattr(text, "num_hidden_layers", None), text is model.config
    inside = {*(model.base_model if whole else model.get_decoder()).modules()}
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and module in inside
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
    experts = {name: module for name, module in block.named_modules() if isinstance(module, ExpertLayers)}
    for name in experts:
        block.set_submodule(name, _ExpertsProbe((index, name), run))
    linears = {name: module for name, module in block.named_modules() if linear_shape(module)}
    counts = {module.count for module in experts.values()}
    reasons = {name: _routes(name, module, counts) or _more_than_linear(module) for name, module in linears.items()}
    for name, reason in reasons.items():
        if reason is None:
            block.set_submodule(name, _Probe(linears[name], (index, name), run))
    return reasons


def _routes(name: str, module: nn.Module, experts: set[int]) -> str | None:
    """Why a linear layer of a block with so many experts is left dense: it weighs them, or what is beside them."""
    outputs, _ = linear_shape(module) or (0, 0)
    return ROUTES if experts and outputs in {1, *experts} and is_router(name) else None


def is_router(name: str) -> bool:
    """Whether a layer of a block with experts is called as what chooses among them."""
    return any(part.endswith(ROUTERS) for part in name.split("."))


def _more_than_linear(module: nn.Module) -> str | None:
    """Why a layer of a class of its own is no linear layer: of few numbers it makes something else than W x + b."""
    kind = type(module)
    if kind.forward in (nn.Linear.forward, Conv1D.forward):
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


def _found(run: _Run, index: int, linears: dict[str, str | None], returns: int | None) -> FoundBlock:
    dense = {name: reason for name, reason in linears.items() if reason is not None}
    calls = {name: memories for (place, name), memories in run.calls.items() if place == index}
    experts = run.experts.get(index, [])
    if len(experts) > 1:
        raise UnsupportedModelError("a block of this model calls experts more than once")
    for name in linears.keys() - dense.keys():
        if reason := run.touched.get((index, name)):
            dense[name] = reason
        elif len(calls.get(name, ())) != 1:
            dense[name] = CALLED_ONCE
    groups: dict[Memory, list[str]] = {}
    for name, memories in calls.items():  # in the order of first calls
        if name not in dense:
            groups.setdefault(memories[0], []).append(name)
    found = tuple(map(tuple, groups.values()))
    of_experts = experts[0] if experts else None
    return FoundBlock(found, dict(sorted(dense.items())), returns, of_experts, run.beside[index])
