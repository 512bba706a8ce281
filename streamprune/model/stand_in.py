"""A module in a block's place."""

from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Takes a block's place; attributes that the model looks up there are the block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its parameters are not this module's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)
