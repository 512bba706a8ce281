"""A `.bin` file of tensors, as torch.save writes it: checked, then opened by torch with mmap and weights_only.

Torch's restricted reader runs the pickle in it, in time that grows with its length. The pickle says which tensors lie
where in the storages; that is checked against the file's bytes.
"""

import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from streamprune.checkpoint.safetensors_header import DTYPES, QUANTISED
from streamprune.checkpoint.untrusted import MAX_KEY_CHARACTERS, open_regular
from streamprune.errors import CheckpointError

MAX_PICKLE_BYTES = 2 << 20  # a state dict takes 250 bytes a tensor
MAX_RECORDS = 20_000  # one a storage
LISTED_TWICE = 2  # tied weights may be two tensors of one storage
FEW_BYTES = 1 << 20  # of which small tensors may take more


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin`, mapped where the file is a zip archive.

    Raises CheckpointError for what is no state dict of plain tensors, would run code, or claims more than its bytes.
    """
    file, file_bytes = open_regular(path)
    file.close()
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            _check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # that a kind of tensor is new, or old, or that it is none
            state = torch.load(path, map_location="cpu", mmap=is_archive, weights_only=True)
    except Exception as error:  # torch raises many kinds here; each of them means the same to a user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # whose message says how to run the code all the same
            reason = "its pickle is damaged, or holds more than tensors, which is not run"
        raise CheckpointError(f"{path}: is not a .bin of plain tensors ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: is not a state dict of tensors")
    for name, tensor in state.items():
        if fault := _fault(name, tensor):
            raise CheckpointError(f"{path}: tensor {name!r:.80} {fault}")
    claimed = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    if claimed > max(LISTED_TWICE * file_bytes, FEW_BYTES):
        raise CheckpointError(f"{path}: its tensors claim {claimed} bytes, the file has {file_bytes}")
    return state


def _check_archive(path: Path) -> None:
    """Raise ValueError for a record that is compressed, or a pickle that is too long for a state dict."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if len(records) > MAX_RECORDS:
        raise ValueError(f"{len(records)} records where at most {MAX_RECORDS} are read")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise ValueError(f"record {record.filename!r} is compressed; torch.save compresses none")
        if record.filename.endswith(".pkl") and record.file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"a pickle of {record.file_size} bytes where at most {MAX_PICKLE_BYTES} are read")


def _fault(name: object, tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot belong to a checkpoint; None if it can."""
    if not isinstance(name, str) or len(name) > MAX_KEY_CHARACTERS or not name.isascii():
        return "has no name of plain text"
    if str(tensor.dtype).startswith(("torch.float8", "torch.float4", "torch.q")):
        return f"is {tensor.dtype}: {QUANTISED}"
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPES.values():
        return f"is {tensor.dtype} on {tensor.device}, {tensor.layout}; only plain numbers are read"
    if tensor.is_conj() or tensor.is_neg():
        return "is a view that has no bytes of its own"
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return f"claims {list(tensor.shape)} of a storage of {tensor.untyped_storage().nbytes()} bytes"
    return None
