"""Outputs in transformers: `from_pretrained` keeps the pruned layers packed, `save_pretrained` writes them packed.

Importing this module registers the packed format as a quantisation method. Two things go beyond transformers' hooks:
the index's name reaches it by `config.transformers_weights` while files are looked for, and `save_pretrained` is the
model's own attribute, since files need names that are not found without this plug-in (docs/format.md).

It is imported while transformers imports itself: what stands on models is imported when it is used.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from streamprune.checkpoint.layout import LAYOUT
from streamprune.checkpoint.packed import MANIFEST_FILE, QUANT_METHOD, check_entry, packed_layout, packed_shape
from streamprune.checkpoint.reader import SAFETENSORS_INDEX, Checkpoint, open_file, open_index
from streamprune.checkpoint.untrusted import read_json
from streamprune.checkpoint.writer import canonical_json
from streamprune.config import NMPattern, PathLike
from streamprune.errors import CheckpointError, OutputError, SettingsError, UnsupportedModelError
from streamprune.model.hub import parse_name
from streamprune.model.packed_linear import PackedLinear, is_permutation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDE = (torch.float32, torch.float64)  # hold every value of a narrower type: values stay as they are stored
INITIALISED = "_is_hf_initialized"  # of a module, in transformers
# Of from_pretrained's arguments those that say where a config lies, and whether code of its own may be run.
WHERE = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    "trust_remote_code",
)
CONVERSIONS = "_weight_conversions"  # of a loaded model, by which transformers saves it; without it by its class's
PLAIN_STEM = "model"  # how transformers begins the names of shards


def load(
    folder: PathLike, *, device: str | torch.device | None = None, dtype: str | torch.dtype = "auto", **more: Any
) -> "PreTrainedModel":
    """An output of `compress` as a transformers model, its pruned layers packed in memory; ready for `generate`.

    `folder` is an output's, or its name on the hub, ORG/MODEL or ORG/MODEL@REVISION. `device` is "cuda", "cpu" and so
    on, by default a GPU where there is one; `dtype` what all else is computed in ("auto": the source's). `more` goes to
    `from_pretrained`: `device_map` in place of `device`, say. Returns a transformers.PreTrainedModel. Raises
    CheckpointError for what is no output.

    >>> loaded = streamprune.load(pruned)
    >>> loaded.get_submodule("model.layers.0.mlp.down_proj")
    PackedLinear(in_features=160, out_features=64, pattern=2:4, bias=True, dtype=bfloat16)
    """
    if Path(folder).is_dir():
        packed_layout(Path(folder))
    elif (named := parse_name(os.fspath(folder))) is not None and named[1] is not None:
        folder, more["revision"] = named
    if "device_map" not in more:
        more["device_map"] = device or ("cuda" if torch.cuda.is_available() else "cpu")
    elif device is not None:
        raise SettingsError("give device or device_map, not both")
    model: PreTrainedModel = _auto_class(folder, more).from_pretrained(folder, dtype=dtype, **more)
    if not isinstance(getattr(model, "hf_quantizer", None), PackedQuantizer):
        raise CheckpointError(f"{folder}: is not an output of streamprune; load it with transformers")
    return model


def _auto_class(folder: PathLike, more: Mapping[str, Any]) -> Any:
    """The class that loads a model by its config, which lies where the weights do."""
    from transformers import AutoConfig

    from streamprune.model.library import PretrainedConfig, auto_class

    if isinstance(config := more.get("config"), PretrainedConfig):
        return auto_class(type(config))
    where = {name: more[name] for name in WHERE if name in more}
    return auto_class(type(AutoConfig.from_pretrained(folder, **where)))


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of an output's config.json (docs/format.md)."""

    def __init__(self, **entry: Any) -> None:
        self.__dict__.update({**entry, "quant_method": QUANT_METHOD})


@register_quantizer(QUANT_METHOD)
class PackedQuantizer(HfQuantizer):
    """Makes a model's pruned layers PackedLinear before their tensors are loaded.

    What is loaded is refused with CheckpointError where transformers would fill a parameter with random numbers, or
    where a layer's tensors are not what its pattern says.
    """

    requires_calibration = True  # weights come packed, or not at all
    experts: Mapping[str, Any] = MappingProxyType({})  # layers in the place of the model's own experts, by their paths

    def validate_environment(self, *arguments: Any, **more: Any) -> None:
        """Raise CheckpointError for another version of the format."""
        version = getattr(self.quantization_config, "format_version", None)
        if version != LAYOUT.version:
            raise CheckpointError(
                f"the model has packed format {version!s:.40}, and format {LAYOUT.version} is loaded here; compress it "
                "again, or make it dense by `streamprune export`"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Tell transformers, which asks this before it looks for files, where the weights are listed."""
        config.transformers_weights = LAYOUT.index
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same for transformers 5.16 to 5.18, which ask this at that place."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **more: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("a packed model is loaded from its folder or its name on the hub")
        checkpoint = open_index(Path(checkpoint_files[0]).parent / LAYOUT.index)
        layers, _ = check_entry(checkpoint, self.quantization_config.to_dict())
        self.experts = _experts_apart(model, checkpoint)
        for name, pattern in layers.items():
            layer = _empty_layer(model, checkpoint, name, pattern)
            model.set_submodule(name, layer)
            if layer.transposed:  # GPT-2 draws weights of its Conv1D layers from the modules that hold them
                setattr(model.get_submodule(name.rpartition(".")[0]), INITIALISED, True)
        _check_names(model, checkpoint)
        _check_permutations(model, checkpoint, layers)

    def _process_model_after_weight_loading(self, model: Any, **more: Any) -> None:
        del model.config.transformers_weights  # what is saved names its files itself
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.requires_grad_(False)  # loading makes parameters anew
                module.prepare()
        model.save_pretrained = MethodType(save_pretrained, model)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # of a config that was saved meanwhile
        packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        if away := next((name for name, module in packed.items() if module.weight_values.is_meta), None):
            raise SettingsError(f"{away}: is offloaded; load the model without offloading to make it dense")
        inside = tuple(f"{path}." for path in self.experts)
        for name, module in packed.items():
            if not name.startswith(inside):
                model.set_submodule(name, _dense_layer(module, dtype))
        for path, layers in self.experts.items():
            model.set_submodule(path, layers.as_own(lambda layer: _dense_layer(layer, dtype)))
        self.experts = {}
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:
        """None: in an output tensors have the names of the model's parameters, those of each expert among them."""
        return []

    def remove_quantization_config(self, model: Any) -> None:
        """Make it a model like any other, that transformers saves."""
        super().remove_quantization_config(model)
        for name in ("save_pretrained", CONVERSIONS):
            model.__dict__.pop(name, None)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return not self.experts  # how many tokens an expert takes is not known before


def _experts_apart(model: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Put a layer for each expert and matrix in the place of the model's own experts."""
    from streamprune.model.experts import replace_experts

    try:
        return {**replace_experts(model, checkpoint.tensors)}
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{checkpoint.folder}: cannot be loaded packed: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from error


def _empty_layer(model: Any, checkpoint: Checkpoint, name: str, pattern: NMPattern) -> PackedLinear:
    """A layer on the meta device, in place of the dense one of its name.

    Values are in their stored dtype where the model's holds all of it, else in the model's, as dense ones would be.
    """
    from streamprune.model.library import Conv1D, linear_shape

    where = f"{checkpoint.folder}: layer {name}"
    try:
        dense = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"{where} is not in {type(model).__name__}") from error
    wanted, shape = linear_shape(dense), packed_shape(checkpoint, name, pattern)
    if wanted is None:
        raise CheckpointError(f"{where} is {type(dense).__name__} in {type(model).__name__}, and no linear layer")
    if shape != wanted:
        raise CheckpointError(
            f"{where} has {shape[0]} x {shape[1]} weights, its module in {type(model).__name__} "
            f"{wanted[0]} x {wanted[1]}"
        )
    stored = checkpoint.tensors[f"{name}.weight_values"].dtype
    kept = stored if dense.weight.dtype in WIDE and stored != torch.float64 else dense.weight.dtype
    permuted = f"{name}.input_permutation" in checkpoint.tensors
    packed = PackedLinear(shape[1], shape[0], pattern, dense.bias is not None, permuted, device="meta", dtype=kept)
    packed.transposed = isinstance(dense, Conv1D)
    return packed


def _check_names(model: Any, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a parameter without tensor, which would get random numbers, or the reverse."""
    from streamprune.model.library import tied_parameters

    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if missing := sorted(parameters - checkpoint.tensors.keys() - tied_parameters(model).keys()):
        raise CheckpointError(f"{checkpoint.folder}: has no tensor {missing[0]}, of {len(missing)} that are missing")
    if unknown := sorted(checkpoint.tensors.keys() - model.state_dict().keys()):
        raise CheckpointError(f"{checkpoint.folder}: {type(model).__name__} has no {unknown[0]}, which is stored there")


def _check_permutations(model: Any, checkpoint: Checkpoint, layers: Mapping[str, NMPattern]) -> None:
    """Raise CheckpointError for a stored permutation that is none: a product would read what is not there."""
    for name in layers:
        stored = f"{name}.input_permutation"
        if stored not in checkpoint.tensors:
            continue
        with torch.device("cpu"):  # transformers makes everything on the meta device now
            order = checkpoint.read([stored])[stored]
        if not is_permutation(order, model.get_submodule(name).in_features):
            raise CheckpointError(f"{checkpoint.folder}: {stored} is not a permutation; the output is damaged")


def _dense_layer(packed: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The layer with its weight and bias as plain tensors; itself where it is not packed."""
    from streamprune.model.library import Conv1D

    if not isinstance(packed, PackedLinear):
        return packed
    weight = packed.dense_weight().to(dtype)
    linear: Any
    if packed.transposed:
        linear = Conv1D(0, packed.in_features)
        linear.nf, weight = packed.out_features, weight.T.contiguous()
    else:
        linear = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias.to(dtype))
    return cast(nn.Module, linear)


def save_pretrained(model: Any, save_directory: PathLike, *arguments: Any, **more: Any) -> None:
    """As transformers' `save_pretrained`, into files that are named as those of `streamprune compress`.

    There is no manifest: `streamprune verify` checks what `compress` has written. Raises OutputError for a folder that
    holds such an output, SettingsError for options that would name files otherwise.
    """
    folder = Path(save_directory)
    if (folder / MANIFEST_FILE).exists():
        raise OutputError(f"{folder}: holds an output of streamprune compress; save into another folder")
    if taken := next((name for name in ("push_to_hub", "variant", "distributed_checkpoint") if more.get(name)), None):
        raise SettingsError(f"{taken} does not go with packed weights; save to a folder, or call model.push_to_hub")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        type(model).save_pretrained(model, temporary, *arguments, **more)
        if not any(Path(temporary).glob("*.safetensors")):
            return  # another process of several saves
        _name_as_packed(Path(temporary))
        for old in folder.glob(LAYOUT.shards):
            old.unlink()
        for path in Path(temporary).iterdir():
            path.replace(folder / path.name)


def _name_as_packed(folder: Path) -> None:
    """Rename a folder's shards, and write their index, as the packed format wants them."""
    index = folder / SAFETENSORS_INDEX
    if index.exists():
        content = read_json(index)
        index.unlink()
    else:
        shard = f"{PLAIN_STEM}.safetensors"
        tensors = open_file(folder / shard).tensors
        total = sum(tensor.size_bytes for tensor in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(tensors, shard)}
    shards = sorted(set(content["weight_map"].values()))
    names = {shard: LAYOUT.shard(number, len(shards)) for number, shard in enumerate(shards, start=1)}
    for shard, name in names.items():
        (folder / shard).rename(folder / name)
    content["weight_map"] = {tensor: names[shard] for tensor, shard in content["weight_map"].items()}
    (folder / LAYOUT.index).write_text(canonical_json(content))
