"""A causal LM that is in no table: odd names, a fused projection, tuples, positional arguments; and ways to be none.

`odd` of its config says what is wrong with it; "" is nothing.
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


class Scaled(nn.Linear):
    """Another forward, and more than a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class Respelled(nn.Linear):
    """Another forward, and a linear layer all the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Cell(nn.Module):
    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        size = config.breadth
        self.odd = config.odd
        self.before, self.after = nn.LayerNorm(size), nn.LayerNorm(size)
        self.mix = nn.Linear(size, 3 * size)
        self.gather = Respelled(size, size)
        self.spread, self.side, self.join = nn.Linear(size, 48), nn.Linear(size, 48, bias=False), nn.Linear(48, size)
        self.scaled, self.twice, self.read = Scaled(size, size), nn.Linear(size, size), nn.Linear(size, size)
        self.idle = nn.Linear(size, size)

    def forward(
        self, states: torch.Tensor, mask: torch.Tensor, notes: Any = None, *, strength: float = 1.0, left: Any = None
    ) -> Any:
        q, k, v = self.mix(self.before(states)).chunk(3, dim=-1)
        weights = (strength * q @ k.transpose(1, 2) * states.shape[-1] ** -0.5 + mask).softmax(dim=-1)
        states = states + self.gather(weights @ v)
        x = self.after(states)
        states = states + self.join(functional.relu(self.spread(x)) * self.side(x))
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
