"""Settings, as frozen dataclasses that are checked when they are made, and the bounds of every number.

`PruneConfig` holds every setting that changes the output's bytes, and nothing else: it is part of a job's identity.
"""

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, get_args

from streamprune.errors import SettingsError

Metric = Literal["esparse", "wanda", "ria", "magnitude"]
Amplitude = Literal["l2", "wanda", "rms"]
EntropyRange = Literal["channel", "layer"]
Objective = Literal["score", "energy"]
Fold = Literal["heads", "across-heads"]
OnExcess = Literal["stop", "keep-dense", "warn"]
Starved = Literal["pool", "magnitude", "dense"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ExportFormat = Literal["dense"]
CHOICES = {
    "metric": Metric,
    "amplitude": Amplitude,
    "entropy_range": EntropyRange,
    "objective": Objective,
    "fold": Fold,
    "on_excess": OnExcess,
    "starved": Starved,
    "device": Device,
    "dtype": Dtype,
    "to": ExportFormat,
}
PathLike = str | os.PathLike[str]
Texts = PathLike | Iterable[str]  # a file's path or a data set's name; or the texts themselves
Function = TypeVar("Function", bound=Callable[..., Any])
MAX_GROUP_SIZE = 64  # M of an N:M pattern
MAX_COUNT = 2**31 - 1
MAX_BYTES = 2**63 - 1
SEARCHES = ("stride", "global", "local", "assignment")
RESIDUAL = "residual"
DEFAULT_CORRECTION = 0.2
OF_ENTROPY = ("alpha", "entropy_bins", "entropy_range", "amplitude", "relative")
OF_MOMENTS = ("shrinkage", "correction", "correction_stride")
OF_EXPERTS = ("starved", "min_expert_tokens")
MIN_COVERAGE = 0.9  # of the blocks' matrices


@dataclass(frozen=True)
class Bounds:
    """A number may be `least` to `most`, whole or not, and if `optional` also None."""

    least: int
    most: int
    whole: bool = True
    optional: bool = False


# Every number that the library and the command line take, except numbers of bytes.
NUMBERS = {
    "samples": Bounds(1, MAX_COUNT),
    "sequence_length": Bounds(2, MAX_COUNT, optional=True),  # the first token of a sequence has no prediction
    "max_tokens": Bounds(2, MAX_COUNT, optional=True),
    "max_new_tokens": Bounds(1, MAX_COUNT),
    "temperature": Bounds(0, 100, whole=False),
    "top_p": Bounds(0, 1, whole=False),
    "seed": Bounds(0, 2**63 - 1),
    "micro_batch": Bounds(1, MAX_COUNT, optional=True),
    "prefetch": Bounds(0, 1000),
    "shuffle_block": Bounds(2, MAX_COUNT),
    "alpha": Bounds(0, 10**6, whole=False),  # beyond it rounding leaves nothing of the entropy
    "entropy_bins": Bounds(2, 512),
    "shrinkage": Bounds(0, 1, whole=False, optional=True),
    "correction": Bounds(0, 1, whole=False, optional=True),
    "correction_stride": Bounds(1, MAX_COUNT),
    "moments_width": Bounds(64, MAX_COUNT),
    "max_block_error": Bounds(0, 10**6, whole=False, optional=True),
    "min_expert_tokens": Bounds(0, MAX_COUNT),
    "min_coverage": Bounds(0, 1, whole=False),
    "notice": Bounds(1, 65535),  # Slurm's own limit
    "max_restarts": Bounds(0, MAX_COUNT),
}
FLAGS = frozenset({"print_only", "progress", "quick", "reconstruct", "refine", "relative", "restart", "validate"})


def check_settings(**given: Any) -> None:
    """Raise SettingsError for the first value, by the name that it has everywhere, that is not what it may be."""
    for name, value in given.items():
        if fault := _fault(name, value):
            raise SettingsError(f"{name} {value!r:.40} is {fault}")


def _fault(name: str, value: Any) -> str | None:
    """What a setting is not, in a few words; true and false are no numbers."""
    if name in NUMBERS:
        return _number_fault(value, NUMBERS[name])
    if name in CHOICES:
        choices = get_args(CHOICES[name])
        return None if value in choices else f"none of {', '.join(choices)}"
    if name in FLAGS:
        return None if isinstance(value, bool) else "neither true nor false"
    return None if isinstance(value, str) else "no string"


def _number_fault(value: Any, bounds: Bounds) -> str | None:
    if value is None and bounds.optional:
        return None
    is_number = isinstance(value, int if bounds.whole else int | float) and not isinstance(value, bool)
    if is_number and bounds.least <= value <= bounds.most:
        return None
    return f"not {'a whole number' if bounds.whole else 'a number'} from {bounds.least} to {bounds.most}"


def path_of(name: str, value: Any) -> Path:
    """The path that a setting is. Raises SettingsError for what is none."""
    if not isinstance(value, str | os.PathLike) or "\0" in str(value):
        raise SettingsError(f"{name} {value!r:.80} is no path")
    return Path(value)


@dataclass(frozen=True)
class NMPattern:
    """`kept` weights stay in every group of `group_size` consecutive input channels ("2:4" keeps 2 of 4)."""

    kept: int
    group_size: int

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.group_size <= MAX_GROUP_SIZE:
            raise SettingsError(
                f"pattern {self}: N:M needs 0 < N < M <= {MAX_GROUP_SIZE}, where N of every M weights are kept"
            )

    def __str__(self) -> str:
        return f"{self.kept}:{self.group_size}"

    @classmethod
    def parse(cls, text: str) -> "NMPattern":
        """Read "N:M". Raises SettingsError for anything else."""
        match = re.fullmatch(r"\s*(\d{1,3}):(\d{1,3})\s*", text) if isinstance(text, str) else None
        if match is None:
            raise SettingsError(
                f"pattern {text!r:.80} is not N:M; write for example 2:4 (2 of every 4 weights are kept)"
            )
        return cls(int(match[1]), int(match[2]))


def parse_bytes(text: str | None) -> int | None:
    """Read a number of bytes: "12GiB", "900 MB", "1.5e9"; None stays None.

    Raises SettingsError for anything else, and for less than one byte or more than 2^63.
    """
    if text is None:
        return None
    form = r"\s*((?:\d+\.?\d*|\.\d+)(?:e\d+)?)\s*([kmgt]?)(i?)b?\s*"
    if match := re.fullmatch(form, text, re.IGNORECASE) if isinstance(text, str) else None:
        count = float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " ")
        if 1 <= count <= MAX_BYTES:
            return int(count)
    raise SettingsError(f"{text!r:.80} is not a number of bytes (1 to 2^63); write for example 12GiB or 900MB")


@dataclass(frozen=True)
class PruneConfig:
    """The method and its open choices (docs/method.md says how each default was chosen).

    metric          which score ranks the weights of a group
    shuffle         "none", or searches joined by "+", one after the other: stride, global, local, assignment. With
                    "residual" in front one permutation of the residual stream serves the whole model, and the other
                    searches order only the inputs of o and down
    fold            the input of o_proj: "heads" permutes inside heads and folds into v_proj; "across-heads" takes a
                    gather at run time
    objective       what a search raises: the sum of retained scores, or of their squares ("energy")
    shuffle_block   channels in one block of the local search, but at least two groups
    alpha           weight of the amplitude relative to the entropy (E-Sparse, eq. of the metric)
    entropy_bins    K, bins of the histogram
    entropy_range   bins lie between the least and greatest activation of each channel, or of the layer
    amplitude       l2: ||X_j|| over all tokens; wanda: divided by sqrt(sequences); rms: divided by sqrt(tokens)
    relative        divide entropy and amplitude by their means over the layer's channels first
    refine          improve masks by the inputs' second moments (X^T X, often called the Hessian); None: if `validate`
    shrinkage       how far refinement shrinks the moments towards their diagonal, 0 to 1; None: by held-out samples
    correction      share of the error of earlier blocks that masks compensate for, 0 to 1. It needs the second moments
                    of refinement or reconstruction; None: 0.2 with them, 0 without
    correction_stride  every k-th sequence also runs through the dense blocks, to measure that error
    moments_width   channels in one block of second moments; wider inputs are cut into equal blocks, and neither
                    permutation nor refinement crosses them
    reconstruct     fit the kept weights to the dense layer's outputs: they are then no longer the source's
    max_block_error budget on what a block adds, relative (Frobenius); None: no budget
    on_excess       what to do with a block above the budget
    starved         what ranks the weights of an expert that sees fewer than min_expert_tokens of the text's tokens:
                    "pool", what it makes of its own inputs and of the block's other experts', as many as an expert sees
                    on average and at least min_expert_tokens; "magnitude", its weights alone; or it stays "dense"
    min_expert_tokens  tokens with which an expert is not starved
    validate        run the calibration text through the model: the method and all error figures need it. Without it no
                    forward pass is made, which works only for a method that needs nothing but weights

    >>> config = streamprune.PruneConfig(pattern="4:8", metric="wanda", refine=False)
    >>> config.pattern, config.correction
    (NMPattern(kept=4, group_size=8), 0.0)
    """

    pattern: NMPattern = NMPattern(2, 4)
    metric: Metric = "esparse"
    shuffle: str = "assignment"
    fold: Fold = "heads"
    objective: Objective = "score"
    shuffle_block: int = 64
    alpha: float = 1.0
    entropy_bins: int = 100
    entropy_range: EntropyRange = "channel"
    amplitude: Amplitude = "l2"
    relative: bool = False
    refine: bool | None = None
    shrinkage: float | None = None
    correction: float | None = None
    correction_stride: int = 2
    moments_width: int = 16384
    reconstruct: bool = False
    max_block_error: float | None = None
    on_excess: OnExcess = "stop"
    starved: Starved = "pool"
    min_expert_tokens: int = 128
    validate: bool = True

    def __post_init__(self) -> None:
        pattern: Any = self.pattern
        if not isinstance(pattern, NMPattern):  # as "N:M"
            self._set("pattern", NMPattern.parse(pattern))
        check_settings(**{name: getattr(self, name) for name in FIELDS if name not in ("pattern", "shuffle", "refine")})
        self._check_shuffle()
        self._set("refine", self.validate if self.refine is None else self.refine)
        check_settings(refine=self.refine)
        for name in FIELDS:  # 1 and 1.0 are one setting, and the same bytes in the manifest
            if name in NUMBERS and not NUMBERS[name].whole and getattr(self, name) is not None:
                self._set(name, float(getattr(self, name)))
        if not self.validate:
            self._check_needs_no_text()
        if self.correction and not self.needs_moments:
            raise SettingsError(
                f"correction {self.correction:g} needs second moments, and neither refine nor reconstruct takes them; "
                "leave it out, or refine"
            )
        if self.correction is None:
            self._set("correction", DEFAULT_CORRECTION if self.needs_moments else 0.0)
        self._check_effects()

    def _check_effects(self) -> None:
        """Raise SettingsError for a setting that is not the default and that the others leave without effect."""
        idle = {
            **dict.fromkeys(OF_ENTROPY, f"with metric {self.metric}" if self.metric != "esparse" else None),
            "objective": None if self.search_stages or self.residual else "without a shuffle",
            "fold": None if self.search_stages else "without a shuffle",
            "shuffle_block": None if "local" in self.search_stages else "without the local shuffle",
            "shrinkage": None if self.needs_moments else "without refinement or reconstruction",
            "correction_stride": None if self.correction else "without correction",
            "starved": None if self.validate else "without validation",
            "min_expert_tokens": None if self.validate else "without validation",
            "on_excess": None if self.max_block_error is not None else "without a budget (max_block_error)",
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and (reason := idle.get(field.name)):
                raise SettingsError(f"{field.name} {value} has no effect {reason}; leave it out")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_shuffle(self) -> None:
        stages = self.shuffle.split("+") if isinstance(self.shuffle, str) else [""]
        unknown = [stage for stage in stages[stages[0] in ("none", RESIDUAL) :] if stage not in SEARCHES]
        if unknown or (stages[0] == "none" and len(stages) > 1):
            raise SettingsError(
                f"shuffle {self.shuffle!r:.80} is not none, nor {', '.join(SEARCHES)} joined by +, nor residual before "
                "them"
            )

    def _check_needs_no_text(self) -> None:
        needs = {
            f"metric {self.metric}": self.metric != "magnitude",
            "refinement": self.refine,
            "reconstruction": self.reconstruct,
            "a residual shuffle": self.residual,
            "a budget on block errors": self.max_block_error is not None,
        }
        needed = [name for name, needs_text in needs.items() if needs_text]
        if needed:
            raise SettingsError(
                f"without validation no text passes the model, and {', '.join(needed)} need"
                f"{'s' if len(needed) == 1 else ''} one; use --metric magnitude --no-refine, or validate"
            )

    def of_weights_alone(self) -> "PruneConfig":
        """The same for a layer whose inputs are not known: by magnitude, without what needs second moments."""
        unused: dict[str, Any] = {name: getattr(PruneConfig, name) for name in (*OF_ENTROPY, *OF_MOMENTS)}
        return dataclasses.replace(self, metric="magnitude", refine=False, reconstruct=False, **unused)

    @property
    def search_stages(self) -> tuple[str, ...]:
        """The searches of `shuffle`, in order."""
        return tuple(stage for stage in self.shuffle.split("+") if stage in SEARCHES)

    @property
    def residual(self) -> bool:
        """Whether one permutation of the residual stream serves the whole model."""
        return self.shuffle.split("+")[0] == RESIDUAL

    @property
    def needs_moments(self) -> bool:
        return bool(self.refine) or self.reconstruct

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the pattern as "N:M"."""
        return {**dataclasses.asdict(self), "pattern": str(self.pattern)}


FIELDS = tuple(field.name for field in dataclasses.fields(PruneConfig))


class Settings(TypedDict, total=False):
    """PruneConfig's fields as keywords of `compress` and `plan`; a test holds the two equal."""

    pattern: str | NMPattern
    metric: Metric
    shuffle: str
    fold: Fold
    objective: Objective
    shuffle_block: int
    alpha: float
    entropy_bins: int
    entropy_range: EntropyRange
    amplitude: Amplitude
    relative: bool
    refine: bool | None
    shrinkage: float | None
    correction: float | None
    correction_stride: int
    moments_width: int
    reconstruct: bool
    max_block_error: float | None
    on_excess: OnExcess
    starved: Starved
    min_expert_tokens: int
    validate: bool


def settings_spelled(function: Function) -> Function:
    """A function of `**settings: Unpack[Settings]`, with each of them in the signature that `help` shows."""
    signature = inspect.signature(function)
    parameters = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    spelled = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=str(field.default) if field.name == "pattern" else field.default,
            annotation=Settings.__annotations__[field.name],
        )
        for field in dataclasses.fields(PruneConfig)
    ]
    function.__signature__ = signature.replace(parameters=[*parameters, *spelled])  # type: ignore[attr-defined]
    return function


def config_of(config: PruneConfig | None, given: Mapping[str, Any]) -> PruneConfig:
    """The settings that a config, or keywords, or both say.

    Raises SettingsError for a keyword that says otherwise than the config, TypeError for one that is no setting.
    """
    if unknown := sorted(given.keys() - set(FIELDS)):
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
    if config is None:
        return PruneConfig(**given)
    if not isinstance(config, PruneConfig):
        raise SettingsError(f"config {config!r:.40} is no PruneConfig")
    for name, value in given.items():
        asked = NMPattern.parse(value) if name == "pattern" and isinstance(value, str) else value
        left_open = value is None and name in ("refine", "correction")
        if asked != getattr(config, name) and not left_open:
            raise SettingsError(f"{name} is {asked!s:.40} by keyword and {getattr(config, name)} in config; give one")
    return config
