"""A causal LM that is in no table: odd names, a fused projection, tuples, positional arguments; and ways to be none.

`odd` of its config says what is wrong with it, `step` what lies between join and the layers that make its input, and
`n_experts` how many layers like these there are beside; "" is nothing.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class OddConfig(PretrainedConfig):
    model_type = "odd"
    attribute_map = {"hidden_size": "breadth", "num_hidden_layers": "depth"}  # noqa: RUF012
    vocab_size: int = 128
    breadth: int = 32
    depth: int = 2
    odd: str = ""
    step: str = ""
    n_experts: int = 0


class Scaled(nn.Linear):
    """Another forward, and more than a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class Respelled(nn.Linear):
    """Another forward, and a linear layer all the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


STEPS: dict[str, Any] = {
    "softmax": lambda x: x.softmax(-1),
    "softmax of parts": lambda x: x.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2),
    "sums": lambda x: x.cumsum(-1),
    "nearly nothing": lambda x: x + 1e-4 * x.cumsum(-1),
    "nothing comes through": lambda x: 0 * x,
}
HALVES = {"halves": lambda x: x.chunk(2, dim=-1), "interleaved": lambda x: (x[..., ::2], x[..., 1::2])}


class Expert(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.spread, self.side, self.join = nn.Linear(size, 48), nn.Linear(size, 48), nn.Linear(48, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.join(self.spread(x) * self.side(x))
        return y


class Cell(nn.Module):
    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        size = config.breadth
        self.odd, self.step = config.odd, config.step
        self.before, self.after = nn.LayerNorm(size), nn.LayerNorm(size)
        self.mix = nn.Linear(size, 3 * size)
        self.gather = Respelled(size, size)
        self.spread, self.side, self.join = nn.Linear(size, 48), nn.Linear(size, 48, bias=False), nn.Linear(48, size)
        self.scaled, self.twice, self.read = Scaled(size, size), nn.Linear(size, size), nn.Linear(size, size)
        self.idle = nn.Linear(size, size)
        if self.step in HALVES:
            self.spread = nn.Linear(size, 96)
        self.norm = {"norm": nn.LayerNorm(48), "bare norm": nn.LayerNorm(48, elementwise_affine=False)}.get(self.step)
        self.team = nn.ModuleList(Expert(size) for _ in range(config.n_experts))

    def forward(
        self, states: torch.Tensor, mask: torch.Tensor, notes: Any = None, *, strength: float = 1.0, left: Any = None
    ) -> Any:
        q, k, v = self.mix(self.before(states)).chunk(3, dim=-1)
        weights = (strength * q @ k.transpose(1, 2) * states.shape[-1] ** -0.5 + mask).softmax(dim=-1)
        states = states + self.gather(weights @ v)
        x = self.after(states)
        states = states + self.join(self.inner(x))
        for place, expert in enumerate(self.team):
            states = states + (0 if place < 2 else 1) * expert(x * (place + 1))  # two see no token that matters
        x = self.twice(self.twice(self.scaled(x)))
        states = states + 0.1 * functional.linear(x, self.read.weight, self.read.bias)
        if self.odd == "data" and bool(states.sum() > 0):
            states = -states
        if self.odd == "changes its arguments":
            notes.append(states)
        if self.odd == "spoken":
            states = states + 0.5 * notes
        if self.odd == "leaves":
            left["states"] = states
        return states, weights

    def inner(self, x: torch.Tensor) -> Any:
        if self.step in HALVES:
            gate, up = HALVES[self.step](self.spread(x))
            return functional.relu(gate) * up
        y = functional.relu(self.spread(x)) * self.side(x)
        return self.norm(y) if self.norm is not None else STEPS.get(self.step, lambda x: x)(y)


class OddPreTrained(PreTrainedModel):
    config_class = OddConfig
    base_model_prefix = "trunk"

    def get_input_embeddings(self) -> Any:
        return (self.trunk if hasattr(self, "trunk") else self).signs

    def _init_weights(self, module: nn.Module) -> None:
        pass


class OddTrunk(OddPreTrained):
    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.signs = nn.Embedding(config.vocab_size, config.breadth)
        self.cells = nn.ModuleList(Cell(config) for _ in range(config.depth))
        self.last = nn.LayerNorm(config.breadth)
        if config.odd == "shared":
            self.cells[1].join.weight = self.cells[0].join.weight

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, use_cache: Any = None, **more: Any) -> Any:
        states = self.signs(input_ids) if inputs_embeds is None else inputs_embeds
        length, odd = states.shape[1], self.config.odd
        mask = torch.full((length, length), float("-inf"), device=states.device).triu(1)
        notes: Any = [] if odd == "changes its arguments" else None
        notes = self.signs(input_ids) * 2 if odd == "spoken" else notes
        mask = mask + states[0, 0, 0] if odd == "masked by words" else mask
        left: Any = {} if odd == "leaves" else None
        for cell in reversed(self.cells) if odd == "order" else self.cells:
            states, weights = cell(states, mask, notes, strength=0.5, left=left)
            if odd == "between":
                states = states * 2
            if odd == "hands on":
                notes = weights
        return BaseModelOutputWithPast(last_hidden_state=self.last(states))


class OddForCausalLM(OddPreTrained):
    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.trunk = OddTrunk(config)
        self.speak = nn.Linear(config.breadth, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **more: Any) -> Any:
        output = self.trunk(input_ids=input_ids, inputs_embeds=inputs_embeds)
        return CausalLMOutputWithPast(logits=self.speak(output.last_hidden_state))


AutoConfig.register("odd", OddConfig, exist_ok=True)
AutoModelForCausalLM.register(OddConfig, OddForCausalLM, exist_ok=True)
