"""Blocks whose experts come one at a time: memory holds one, however many there are.

All sequences run through the block up to its experts, and what these are given is kept in scratch files, with the rows
that each of them takes. Then each expert works on its rows of all sequences. Then all sequences run through the block
once more, and get the experts' outputs where the experts would compute.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from streamprune.checkpoint.scratch import HiddenStates, RowFile
from streamprune.errors import NumericsError
from streamprune.model.arithmetic import Arithmetic
from streamprune.model.blocks import RunnableBlock
from streamprune.model.experts import ExpertLayers, Routing
from streamprune.model.forward import Arguments
from streamprune.model.skeleton import Block
from streamprune.model.streaming import Runnable, advance
from streamprune.stopping import safe_point

Load = Callable[[Block], nn.Module]  # the module of a block's part, with its weights


class _Reached(Exception):
    """Raised by the experts' stand-in: what comes behind them is not run yet."""


class ExpertStage:
    """One stream of sequences at a block's experts.

    State that must live somewhere: files of the rows that the experts are given and of the sums of their outputs, and
    which expert takes which. To be closed, which removes the files.
    """

    def __init__(self, block: RunnableBlock, sequences: int, arithmetic: Arithmetic, folder: Path, name: str) -> None:
        self.block, self.arithmetic, self.sequences = block, arithmetic, sequences
        self.layers = next(module for module in block.module.modules() if isinstance(module, ExpertLayers))
        self.routings: list[Routing] = []
        self.places: list[torch.Tensor] = []  # of the kept rows among those that the experts were given
        self.tokens = 0  # of a sequence
        self._done = 0
        self._paths = folder / f"{name}-inputs.bin", folder / f"{name}-outputs.bin"
        self._files: tuple[RowFile, RowFile] | None = None

    @property
    def files(self) -> tuple[RowFile, RowFile]:
        """Of inputs, in the arithmetic's dtype, and of outputs in float32."""
        if self._files is None:
            raise ValueError("no sequence has reached the experts")
        return self._files

    def reach(self, x: torch.Tensor) -> None:
        """Run the next sequence's hidden states [1, tokens, hidden] up to the experts."""
        self.layers.function, self.tokens = self._keep, x.shape[1]
        try:
            self.block.run(x)
        except _Reached:
            return
        raise NumericsError(f"{self.block.name}: did not call its experts")

    def run(self, states: torch.Tensor) -> torch.Tensor:
        """The block's output [1, tokens, hidden] for the next sequence, once every expert has had its rows.

        Raises NumericsError where it is not finite.
        """
        sequence, self._done = self._done, self._done + 1

        def outputs(rows: torch.Tensor, routing: Routing) -> torch.Tensor:
            kept, taken = self.routings[sequence], _taken(routing, self.layers.count)
            if not torch.equal(routing.index[taken].to("cpu", kept.index.dtype), kept.index):
                raise NumericsError(f"{self.block.name}: routes the same tokens otherwise when it is run again")
            total = torch.zeros_like(rows)
            total[taken] = self.files[1].read(sequence, 0, len(kept.index)).to(rows.device, rows.dtype)
            return total

        self.layers.function = outputs
        return self.block.run(states)

    def tokens_of(self, expert: int) -> int:
        """How many rows an expert takes of all sequences."""
        return sum(int((routing.index == expert).sum()) for routing in self.routings)

    def rows_of(self, sequence: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that an expert takes of a sequence, int64 [n] ascending, and their weights [n]."""
        return self.routings[sequence].of(expert)

    def tokens_at(self, sequence: int, rows: torch.Tensor) -> torch.Tensor:
        """The tokens that rows belong to, int64 [n]."""
        return self.places[sequence][rows].long() % self.tokens

    def inputs(self, sequence: int, rows: torch.Tensor) -> torch.Tensor:
        """Rows of what the experts are given, [n, hidden], where blocks compute."""
        return self.files[0].take(sequence, rows).to(self.arithmetic.device)

    def add(self, sequence: int, rows: torch.Tensor, weights: torch.Tensor, made: torch.Tensor) -> None:
        """Add an expert's outputs [n, hidden] for some rows, times their weights."""
        weighted = made.to(torch.float32) * weights.to(made.device, torch.float32)[:, None]
        self.files[1].put(sequence, rows, self.files[1].take(sequence, rows) + weighted.cpu())

    def work(self, expert: int, module: nn.Module) -> None:
        """Have an expert, which has its weights in `module`, work on its rows of all sequences."""
        for sequence in range(len(self.routings)):
            safe_point()
            rows, weights = self.rows_of(sequence, expert)
            if len(rows):
                self.add(sequence, rows, weights, self.compute(module, self.inputs(sequence, rows)))

    def compute(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What an expert, which has its weights in `module`, makes of rows [n, hidden]."""
        with torch.inference_mode():
            return self.layers.compute(module, x)

    def close(self) -> None:
        for file in self._files or ():
            file.close()

    def _keep(self, rows: torch.Tensor, routing: Routing) -> torch.Tensor:
        taken = _taken(routing, self.layers.count)
        given = rows[taken]
        if self._files is None:  # rows that no expert takes are not kept: there may be many for each token
            room = len(rows) if len(rows) == self.tokens else -(-len(given) // self.tokens) * self.tokens
            inputs, outputs = self._paths
            self._files = (
                RowFile(inputs, self.sequences, room, rows.shape[1], self.arithmetic.dtype),
                RowFile(outputs, self.sequences, room, rows.shape[1], torch.float32),
            )
        sequence = len(self.routings)
        if len(given) > self.files[0].rows:
            raise NumericsError(f"{self.block.name}: more rows reach its experts than of the sequences before")
        self.files[0].write(sequence, 0, given)
        self.files[1].write(sequence, 0, torch.zeros(len(given), rows.shape[1]))
        index = routing.index[taken].to("cpu", torch.int16 if self.layers.count < 1 << 15 else torch.int32)
        self.routings.append(Routing(index, routing.weights[taken].cpu()))
        self.places.append(taken.cpu().nonzero().flatten().to(torch.int32))
        raise _Reached


def _taken(routing: Routing, count: int) -> torch.Tensor:
    """Whether any expert takes a row, bool [rows]."""
    return (routing.index < count).any(dim=1)


@contextmanager
def passage(
    block: RunnableBlock,
    states: HiddenStates,
    arithmetic: Arithmetic,
    scratch: Path,
    experts_work: Callable[["ExpertStage"], None],
    check: Callable[[], object] = lambda: None,
) -> Iterator[Runnable]:
    """What runs a block on the sequences of `states`, one by one and in order.

    The block itself where it has no experts. Otherwise these are done by then: `experts_work` has had each of them work
    on the rows of all sequences. What they are given lies in the folder `scratch` meanwhile; `check` is a safe point.
    """
    if not any(isinstance(module, ExpertLayers) for module in block.module.modules()):
        yield block
        return
    stage = ExpertStage(block, len(states), arithmetic, scratch, states.path.stem)
    try:
        for sequence in range(len(states)):
            stage.reach(states.read(sequence).to(arithmetic.device))
            check()
        experts_work(stage)
        yield stage
    finally:
        stage.close()


def advance_by_parts(
    block: Block,
    load: Load,
    arguments: Arguments,
    streams: tuple[HiddenStates, HiddenStates],
    arithmetic: Arithmetic,
    scratch: Path,
    tick: Callable[[], object],
    micro_batch: int = 1,
) -> None:
    """Run a block, whose parts `load` makes one at a time, on every sequence of the first stream; the second gets its
    outputs.
    """

    def experts_work(stage: ExpertStage) -> None:
        for number, part in enumerate(block.parts[1:]):
            stage.work(number, load(part))

    resident = RunnableBlock(block.name, load(block.parts[0]), arguments)
    with passage(resident, streams[0], arithmetic, scratch, experts_work) as runnable:
        advance(runnable, *streams, arithmetic, tick, micro_batch=micro_batch)
