"""`generate`: text from a dense checkpoint or a packed output; blocks that memory does not hold are read every time."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from streamprune.checkpoint.spans import Reader
from streamprune.checkpoint.untrusted import MAX_JSON_BYTES, read_bounded, read_json
from streamprune.config import Device, Dtype, PathLike, check_settings, parse_bytes, path_of
from streamprune.errors import CalibrationError, CheckpointError, NumericsError, SettingsError
from streamprune.model.architectures import UNPADDED
from streamprune.model.arithmetic import (
    Arithmetic,
    against_overflow,
    check_arithmetic,
    name_of,
    resolve_arithmetic,
    warn_without_kernels,
)
from streamprune.model.expert_stream import ExpertStream
from streamprune.model.hub import folder_of
from streamprune.model.residency import (
    LEAST_EXPERTS,
    BlockStream,
    StoredBlock,
    StreamedBlock,
    expert_bytes,
    load_resident,
    needed_bytes,
    place_blocks,
    stored_blocks,
)
from streamprune.model.source import Source, open_source
from streamprune.process import peak_memory_bytes, threads_left
from streamprune.runtime.room import LATER_BYTES, default_limit, held_bytes, working_bytes
from streamprune.text.tokenizers import TextFollower, load_tokenizer, prompt_ids, text_after

OnText = Callable[[str], object]
Limits = tuple[int | None, int | None]  # bytes of the host's memory and of a GPU's
MEMORY = ("memory", "--max-memory")  # and the option that limits it


@dataclass(frozen=True)
class GenerateResult:
    """What followed each prompt, and how fast.

    texts, tokens        of each prompt what came after it; an end-of-text token is the last of its tokens
    ended                whether a prompt's text ended by itself, before max_new_tokens
    first_token_seconds  from the first pass's start, which reads the prompts, to its end
    tokens_per_second    of all prompts together, after the first pass; None where that was all
    resident_blocks      of `blocks`; the others were read for every pass, as far as they are no experts
    experts, resident_experts   in all blocks, and for how many there was room; 0 in a model without
    expert_hit_rate      of the experts that tokens were routed to, the share that was there when a block asked for
                         them; None where all stay in memory
    pass_bytes           read from disk for each pass, which gives every prompt a token; where experts are read,
                         the mean of the passes after the first, unless that was all, as for the hit rate
    disk_bytes_per_second       the pace of the same reading with nothing computed; None where nothing was read
    ceiling_tokens_per_second   what that pace allows, as tokens_per_second
    """

    prompts: list[str]
    texts: list[str]
    tokens: list[list[int]]
    ended: list[bool]
    first_token_seconds: float
    tokens_per_second: float | None
    blocks: int
    resident_blocks: int
    experts: int
    resident_experts: int
    expert_hit_rate: float | None
    pass_bytes: int
    disk_bytes_per_second: float | None
    ceiling_tokens_per_second: float | None
    packed: bool
    dtype: str
    seconds: float
    peak_memory_bytes: int


def generate(
    model: PathLike,
    *,
    prompt: str | Sequence[str] = (),
    prompt_file: PathLike | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_memory: str | None = None,
    max_device_memory: str | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_text: OnText | None = None,
    progress: bool = False,
) -> GenerateResult:
    """Continue one prompt or several, by a dense model or a packed output.

    Several run together, so that one reading of the blocks serves all. A `prompt_file` holds one a line. The likeliest
    token is taken; with a `temperature` above 0 tokens are drawn, by `seed`, from the likeliest ones that have the
    share `top_p` together. As many blocks stay in memory as `max_memory` holds ("12GiB"; default: nine tenths of what
    is available), by an estimate; the others are read from disk for every token while the one before computes. Of a
    mixture of experts those are read that tokens are routed to, into what memory is left beside the rest of the blocks.
    On a GPU the blocks stay in its memory, limited by `max_device_memory`. `on_text` is called with each piece of a
    single prompt's text. The model is transformers' own, and so are masks, caches and sampling. Raises SettingsError
    for prompts that are empty or too long, and where the memory does not hold one block.

    >>> result = streamprune.generate(pruned, prompt="The hills", max_new_tokens=8)
    >>> len(result.tokens[0]), result.resident_blocks == result.blocks
    (8, True)
    """
    start = time.perf_counter()
    check_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    check_settings(device=device, dtype=dtype, progress=progress)
    if on_text is not None and not callable(on_text):
        raise SettingsError(f"on_text {on_text!r:.40} is no function")
    path_of("model", model)
    prompts = _prompts(prompt, prompt_file)
    limits = parse_bytes(max_memory), parse_bytes(max_device_memory)
    warn_without_kernels()
    check_arithmetic(device, dtype)
    folder = folder_of("model", model, progress)
    source, tokenizer = open_source(folder), load_tokenizer(folder)
    source.check_tied()
    ids = [prompt_ids(tokenizer, text) for text in prompts]
    _check_lengths(source, prompts, ids, max_new_tokens)
    arithmetic = resolve_arithmetic(device, dtype, source.dtype)
    working = working_bytes(source, arithmetic, len(ids), max(map(len, ids)), max_new_tokens)
    follower = TextFollower(tokenizer, ids[0], on_text) if on_text and len(ids) == 1 else None
    watch, settings = _Watch(follower), _sampling(source, max_new_tokens, temperature, top_p)
    with _placed(source, arithmetic, working, limits, progress) as (ready, blocks, experts), torch.random.fork_rng():
        torch.manual_seed(seed)
        read = [stream for stream in (blocks, experts) if stream is not None]
        watch.others = int(bool(read))
        tokens = _run(ready, ids, settings, watch, arithmetic)
        pass_bytes = sum(stream.pass_bytes for stream in read)
        rate = read[-1].bytes_per_second() if read else None
    first, *others = [late - early for early, late in itertools.pairwise(watch.times)]
    in_all = sum(len(block.parts) - 1 for block in source.blocks)
    return GenerateResult(
        prompts=prompts,
        texts=[text_after(tokenizer, *pair) for pair in zip(ids, tokens, strict=True)],
        tokens=tokens,
        ended=[new[-1] in (settings.eos_token_id or ()) for new in tokens],
        first_token_seconds=first,
        tokens_per_second=sum(len(new) - 1 for new in tokens) / sum(others) if others else None,
        blocks=len(source.blocks),
        resident_blocks=len(source.blocks) - (len(blocks.blocks) if blocks else 0),
        experts=in_all,
        resident_experts=experts.cache.slots if experts else in_all,
        expert_hit_rate=experts.hit_rate if experts else None,
        pass_bytes=pass_bytes,
        disk_bytes_per_second=rate,
        ceiling_tokens_per_second=len(ids) * rate / pass_bytes if rate else None,
        packed=bool(source.packed),
        dtype=name_of(arithmetic.dtype),
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _prompts(prompt: Any, prompt_file: PathLike | None) -> list[str]:
    """All that are given. Raises SettingsError for none and for one that is empty or no text."""
    given = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(given, Sequence) or not all(isinstance(text, str) for text in given):
        raise SettingsError(f"prompt {prompt!r:.40} is neither a string nor a list of strings")
    given = list(given)
    if prompt_file is not None:
        path = path_of("prompt_file", prompt_file)
        if not path.exists():
            raise CalibrationError(f"{path}: no such file; give a text with a prompt on each line")
        try:
            given += read_bounded(path, MAX_JSON_BYTES).decode().splitlines()
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path}: is no text in UTF-8 ({error.reason})") from error
    if not given:
        raise SettingsError("no prompt; give --prompt TEXT or --prompt-file FILE")
    if "" in given:
        raise SettingsError(f"prompt {given.index('') + 1} is empty; give it at least one character")
    return given


def _check_lengths(source: Source, prompts: list[str], ids: list[list[int]], max_new_tokens: int) -> None:
    vocabulary, _ = source.skeleton.embedding_shape
    positions, kind = source.skeleton.positions, source.skeleton.text_config.model_type
    if kind in UNPADDED and len({len(tokens) for tokens in ids}) > 1:
        raise SettingsError(f"prompts of unequal length change each other with model type {kind!r}; give one at a time")
    for number, (text, tokens) in enumerate(zip(prompts, ids, strict=True), 1):
        if not tokens:
            raise SettingsError(f"prompt {number} ({text!r:.40}) makes no tokens; give another")
        if max(tokens) >= vocabulary:
            raise CheckpointError(f"the tokenizer makes ids up to {max(tokens)}, the model has {vocabulary}")
        if positions is not None and len(tokens) + max_new_tokens > positions:
            raise SettingsError(
                f"prompt {number} has {len(tokens)} tokens, which with {max_new_tokens} new ones are beyond the "
                f"model's {positions} positions; shorten it or give a lower --max-new-tokens"
            )


def _sampling(source: Source, max_new_tokens: int, temperature: float, top_p: float) -> GenerationConfig:
    """Settings of transformers' generate, all others at their neutral values."""
    path = source.folder / "generation_config.json"
    asked = read_json(path).get("eos_token_id") if path.exists() else None
    ends = source.skeleton.text_config.eos_token_id if asked is None else asked
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int and 0 <= end < 2**31 for end in ends):
        raise CheckpointError(f"{source.folder}: eos_token_id is {ends!r:.40}, no numbers of tokens")
    drawn = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p), "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=0,  # any token: what follows the end of a text is cut off
        use_cache=True,
        **(drawn if temperature else {"do_sample": False}),
    )


class Placement(NamedTuple):
    """resident: which blocks stay in memory; slots: how many others it holds at once; experts: for how many experts of
    any block there is room, None where they stay with their blocks.
    """

    resident: list[bool]
    slots: int
    experts: int | None


def placement(blocks: Sequence[StoredBlock], working: int, limits: Limits, on_gpu: bool = False) -> Placement:
    """What stays in memory, and what it holds of all else at once: blocks go before experts.

    `working` are bytes that a run takes beside them. Raises SettingsError where not even one block fits.
    """
    host, of_device = limits
    others, largest = held_bytes() + LATER_BYTES, max(block.layout.size_bytes for block in blocks)
    limit = (of_device if on_gpu else host) or default_limit(on_gpu)
    taken = working + (0 if on_gpu else others)
    experts = [expert for block in blocks for expert in block.experts]
    one, reading = expert_bytes(blocks, on_gpu)
    if not experts or needed_bytes([*blocks, *experts], [True] * (len(blocks) + len(experts)), 0) <= limit - taken:
        one, reading, experts = 0, 0, []
    least = LEAST_EXPERTS * one + taken + (0 if on_gpu else reading)
    resident, slots = place_blocks(blocks, limit - least)
    if not all(resident) and not slots:
        least += max(needed_bytes([block], [False], 1) for block in blocks)
        raise _too_little(least, limit, *(("GPU memory", "--max-device-memory") if on_gpu else MEMORY))
    if on_gpu and host is not None and others + slots * largest + reading > host:
        raise _too_little(others + slots * largest + reading, host, *MEMORY)
    if not experts:
        return Placement(resident, slots, None)
    left = limit - least - needed_bytes(blocks, resident, slots)
    return Placement(resident, slots, min(LEAST_EXPERTS + left // one, len(experts)))


def _too_little(least: int, limit: int, what: str, option: str) -> SettingsError:
    return SettingsError(
        f"one block and what is beside the blocks need about {least / 2**30:.2f} GiB of {what}, the limit is "
        f"{limit / 2**30:.2f} GiB; raise {option}"
    )


@contextmanager
def _placed(
    source: Source, arithmetic: Arithmetic, working: int, limits: Limits, progress: bool
) -> Iterator[tuple[PreTrainedModel, BlockStream | None, ExpertStream | None]]:
    """The model, ready to be called, for as long as the context lasts, and what reads its blocks and its experts that
    are not there.
    """
    device, model = arithmetic.device, source.skeleton.model
    blocks = stored_blocks(source, arithmetic)
    resident, slots, room = placement(blocks, working, limits, device.type == "cuda")
    staying = [block for block, stays in zip(blocks, resident, strict=True) if stays]
    streamed = [block for block, stays in zip(blocks, resident, strict=True) if not stays]
    _load_outside(source, arithmetic)
    with Reader() as reader, ExitStack() as leaving:
        leaving.callback(nn.Module.to, model, "meta")  # the weights would stay until garbage is collected
        for block in tqdm(staying, unit="block", desc="load", disable=None if progress else True, leave=False):
            model.set_submodule(block.block.name, load_resident(source, block, reader, device, room is None))
        stream = experts = None
        if room is not None:
            experts = ExpertStream(source, blocks, room, reader, device)
            leaving.callback(experts.end)
        if streamed:
            stream = BlockStream(source, streamed, slots, reader, device)
            leaving.callback(stream.end)
        for number, block in enumerate(streamed):
            assert stream is not None
            model.set_submodule(block.block.name, StreamedBlock(stream, number))
        yield model, stream, experts


def _load_outside(source: Source, arithmetic: Arithmetic) -> None:
    """Give the model its parameters outside the blocks."""
    skeleton = source.skeleton
    state = {}
    for name in (name for name in skeleton.outer_parameters if name not in skeleton.aside):
        state[name] = source.read([name])[name].to(arithmetic.device, arithmetic.dtype)
    state |= {name: state[stored] for name, stored in skeleton.tied.items()}
    skeleton.model.load_state_dict(state, strict=False, assign=True)
    for module in skeleton.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device.type != "meta":
                setattr(module, name, buffer.to(arithmetic.device))


def _run(
    model: PreTrainedModel, ids: list[list[int]], settings: GenerationConfig, watch: "_Watch", arithmetic: Arithmetic
) -> list[list[int]]:
    """The tokens that follow each prompt, by transformers' generate; shorter prompts are padded on the left."""
    longest, model.generation_config = max(map(len, ids)), GenerationConfig()
    rows = torch.tensor([[0] * (longest - len(some)) + some for some in ids], device=arithmetic.device)
    mask = torch.tensor([[0] * (longest - len(some)) + [1] * len(some) for some in ids], device=arithmetic.device)

    def check(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(logits).all()):
            raise NumericsError(
                f"logits of new token {len(watch.times)} are NaN or infinite; {against_overflow(arithmetic.dtype)}"
            )
        return logits

    generator: Any = model
    watch.times.append(time.perf_counter())
    with torch.inference_mode(), threads_left(0), warnings.catch_warnings():
        # transformers before 5.23 takes the first parameter's device for the model's; a picture tower has no weights
        warnings.filterwarnings("ignore", "You are calling .generate.. with the `input_ids` being on a device")
        made = generator.generate(rows, attention_mask=mask, generation_config=settings, streamer=watch,
                                  logits_processor=[check])  # fmt: skip
    return [_up_to_end(new, settings.eos_token_id or []) for new in made[:, longest:].tolist()]


def _up_to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    count = next((place for place, token in enumerate(tokens, 1) if token in ends), len(tokens))
    return tokens[:count]


class _Watch:
    """Hears of each pass, as a streamer of transformers: notes the time, and lets a follower hear of the tokens.

    After the first pass, which has most to compute, `others` than those that compute have a processor left: reading.
    """

    def __init__(self, follower: TextFollower | None) -> None:
        self.follower, self.times, self._prompted = follower, list[float](), False
        self.others = 0

    def put(self, tokens: torch.Tensor) -> None:
        if self._prompted:
            if len(self.times) == 1:
                torch.set_num_threads(max(1, torch.get_num_threads() - self.others))
            self.times.append(time.perf_counter())
            if self.follower:
                self.follower.put(tokens.tolist())
        self._prompted = True

    def end(self) -> None:
        if self.follower:
            self.follower.end()
