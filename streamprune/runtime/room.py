"""How much memory there is for a model that runs, and what it takes beside its blocks."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from streamprune.checkpoint.reader import PIECE_BYTES
from streamprune.model.arithmetic import Arithmetic
from streamprune.model.source import Source
from streamprune.process import peak_memory_bytes

SHARE = 0.9  # of what is available: others need some too
LATER_BYTES = 50_000_000  # of libraries, that they take when they first compute
OTHER_HEADS = ("qk_head_dim", "v_head_dim")  # latent attention's: what is kept of a token for each head
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # version 2, 1


def default_limit(on_gpu: bool) -> int:
    """Bytes that this process may take: what it has, and most of what is left to it, of a GPU's memory or the host's.

    On the host: by the kernel's estimate and the limits of its control groups.
    """
    if on_gpu:
        return int(SHARE * torch.cuda.mem_get_info()[0])
    return held_bytes() + int(SHARE * min([_free_on_host(), *_free_in_groups()]))


def held_bytes() -> int:
    """Of memory that this process has now; the most it ever had, where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else peak_memory_bytes()


def _free_on_host() -> int:
    path = Path("/proc/meminfo")
    if path.exists() and (kib := path.read_text().partition("MemAvailable:")[2].split()):
        return int(kib[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_in_groups(groups: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What each control group above this process leaves it; the page cache, which it could drop, is not counted."""
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, inside = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = groups / controllers
        for folder in (top / inside.strip("/"), *(top / inside.strip("/")).parents):
            for limit, used in CGROUP_FILES:
                if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
                    lines = (folder / "memory.stat").read_text().splitlines()
                    kinds = dict(line.split() for line in lines)
                    cache = sum(int(kinds.get(name, 0)) for name in ("active_file", "inactive_file"))
                    yield max(0, int(most) - int((folder / used).read_text()) + cache)
            if folder == top:
                break


def working_bytes(source: Source, arithmetic: Arithmetic, sequences: int, prompt: int, new: int) -> int:
    """What a run takes beside its blocks: parameters outside them, keys and values of all tokens, activations.

    Of `sequences` with at most `prompt` tokens at first and `new` ones after them.
    """
    skeleton, itemsize = source.skeleton, arithmetic.dtype.itemsize
    outer = [source.stored(name) for name in skeleton.outer_parameters if name not in skeleton.aside]
    parameters = sum(math.prod(stored.shape) for stored in outer) * itemsize + PIECE_BYTES
    channels = max(skeleton.heads.size, *(getattr(skeleton.model.config, name, None) or 0 for name in OTHER_HEADS))
    cache = 2 * skeleton.heads.key_values * channels * itemsize * (prompt + new) * sequences
    shapes = {layer.shape for block in source.blocks for layer in block.layers.values()}
    widest, largest = max(max(shape) for shape in shapes), max(math.prod(shape) for shape in shapes)
    activations = 4 * sequences * prompt * (16 * skeleton.hidden_size + 10 * widest + prompt)
    logits = 16 * sequences * skeleton.embedding_shape[0]
    # one block's cache is made anew while the former is there; products of many tokens reorder the largest weight
    return parameters + cache * (len(source.blocks) + 2) + activations + logits + largest * itemsize
