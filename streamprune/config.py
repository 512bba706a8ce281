"""Settings, as frozen dataclasses that are checked when they are made.

`PruneConfig` holds every setting that changes the output's bytes, and nothing else: it is part of a job's identity.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from streamprune.errors import SettingsError

Metric = Literal["esparse", "wanda", "ria", "magnitude"]
Shuffle = Literal["none", "global", "global+local"]
Amplitude = Literal["l2", "wanda", "rms"]
OnExcess = Literal["stop", "keep-dense", "warn"]


@dataclass(frozen=True)
class NMPattern:
    """`kept` weights stay in every group of `group_size` consecutive input channels ("2:4" keeps 2 of 4)."""

    kept: int
    group_size: int

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.group_size <= 64:
            raise SettingsError(f"pattern {self}: N:M needs 0 < N < M <= 64, where N of every M weights are kept")

    def __str__(self) -> str:
        return f"{self.kept}:{self.group_size}"

    @classmethod
    def parse(cls, text: str) -> "NMPattern":
        """Read "N:M". Raises SettingsError for anything else."""
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text.strip())
        if match is None:
            raise SettingsError(f"pattern {text!r} is not N:M; write for example 2:4 (2 of every 4 weights are kept)")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class PruneConfig:
    """The method and its open choices (docs/method.md says how each default was chosen).

    metric          which score ranks the weights of a group
    shuffle         which search orders the input channels before selection
    alpha           weight of the amplitude beside the entropy (E-Sparse, eq. of the metric)
    entropy_bins    K, bins of the histogram between a channel's least and greatest activation
    amplitude       l2: ||X_j|| over all tokens; wanda: divided by sqrt(sequences); rms: divided by sqrt(tokens)
    shuffle_block   channels in one block of the local shuffle; two groups where that is more
    max_block_error budget on what a block adds, relative (Frobenius); None: no budget
    on_excess       what to do with a block above the budget
    """

    pattern: NMPattern = NMPattern(2, 4)
    metric: Metric = "esparse"
    shuffle: Shuffle = "global+local"
    alpha: float = 1.0
    entropy_bins: int = 100
    amplitude: Amplitude = "l2"
    shuffle_block: int = 64
    max_block_error: float | None = None
    on_excess: OnExcess = "stop"

    def __post_init__(self) -> None:
        for name, kind in (("metric", Metric), ("shuffle", Shuffle), ("amplitude", Amplitude), ("on_excess", OnExcess)):
            if getattr(self, name) not in get_args(kind):
                raise SettingsError(f"{name} {getattr(self, name)!r} is none of {', '.join(get_args(kind))}")
        if not 2 <= self.entropy_bins <= 512:
            raise SettingsError(f"entropy_bins {self.entropy_bins} is outside 2..512")
        if not 0 <= self.alpha < float("inf"):
            raise SettingsError(f"alpha {self.alpha} is not a finite number >= 0")
        if self.shuffle_block < 2:
            raise SettingsError(f"shuffle_block {self.shuffle_block} is fewer than 2 channels")
        if self.max_block_error is not None and not 0 <= self.max_block_error < float("inf"):
            raise SettingsError(f"max_block_error {self.max_block_error} is not a finite number >= 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the pattern as "N:M"."""
        return {**dataclasses.asdict(self), "pattern": str(self.pattern)}
