"""Outputs in vLLM: `vllm serve ./pruned` keeps the pruned layers packed.

vLLM finds `register` by its entry point `vllm.general_plugins`, in each of its processes, as soon as streamprune is
installed beside it. It merges layers that read one input (q, k and v; gate and up): their rows follow each other in one
packed weight, and the permutation that each of them stores is the same. vLLM's own loaders cut tensors for tensor
parallelism, by the shapes that are given to them here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from streamprune.checkpoint.layout import LAYOUT
from streamprune.checkpoint.packed import QUANT_METHOD, parse_entry
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.integrations.merged import Layer, check_cut, check_experts, merged_layer
from streamprune.model.packed_linear import is_permutation
from streamprune.model.source import open_output
from streamprune_kernels import all_finite, packed_linear, packed_metadata

NOT_LOADED = -1  # no channel
# Classes of vLLM that do something else with the tensors of these layers than to load them as they are.
UNSERVED = {"bloom": "query_key_value", "gptj": "qkv_proj"}


class PackedConfig(QuantizationConfig):
    """The entry `quantization_config` of an output's config.json (docs/format.md)."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        super().__init__()
        self.layers = dict(layers)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedConfig":
        """Raises CheckpointError for another version of the format, or a malformed entry, SettingsError for experts."""
        if (version := config.get("format_version")) != LAYOUT.version:
            raise CheckpointError(
                f"the model has packed format {version!s:.40}, and format {LAYOUT.version} is served; compress it "
                "again, or make it dense by `streamprune export`"
            )
        patterns, _, permuted = parse_entry("config.json", config)
        check_experts(patterns)
        return cls({name: Layer(pattern, permuted[name] is True) for name, pattern in patterns.items()})

    def maybe_update_config(
        self, model_name: str, hf_config: object | None = None, revision: str | None = None
    ) -> None:
        """Raise CheckpointError unless the model's files hold every parameter, in its shape, and UnsupportedModelError
        where vLLM's class of the model does not load packed layers as they are.

        vLLM itself leaves a parameter without tensor uninitialised where weights are not plain ones.
        """
        folder = Path(model_name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            files = ["*.json", LAYOUT.shards]
            folder = Path(snapshot_download(model_name, revision=revision, allow_patterns=files))
        model_type = open_output(folder).skeleton.model.config.model_type
        if layer := UNSERVED.get(model_type):
            raise UnsupportedModelError(
                f"{model_name}: vLLM's class of model type {model_type!r} does not load a packed {layer} as it is; "
                "make the output dense by `streamprune export`"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Name layers as the model's class in vLLM does."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """What makes and runs a linear layer: packed where it is pruned; None for what is no linear layer."""
        if not isinstance(layer, LinearBase):
            return None
        packed = merged_layer(prefix, self.packed_modules_mapping, self.layers)
        return UnquantizedLinearMethod() if packed is None else PackedLinearMethod(prefix, packed)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # sparse tensor cores

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it stands in config.json


class PackedLinearMethod(LinearMethodBase):
    """The tensors of a packed layer, or of several that are merged, and its product.

    Parameters are named as in the files, and marked before loading, so that what no tensor has filled is refused.
    """

    def __init__(self, name: str, packed: Layer) -> None:
        self.name, self.packed = name, packed

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Empty parameters of this process's part. Raises SettingsError where the weight cannot be cut there."""
        rows = sum(output_partition_sizes)
        kept, mask_bytes = check_cut(self.name, self.packed, input_size_per_partition, input_size)
        weight = {"input_dim": 1, "output_dim": 0, **attributes}
        values = torch.full((rows, kept), torch.nan, dtype=params_dtype)
        mask = torch.zeros(rows, mask_bytes, dtype=torch.uint8)
        _add(layer, "weight_values", values, weight)
        _add(layer, "weight_mask", mask, weight)
        layer.register_parameter("input_permutation", None)
        if self.packed.permuted:
            order = torch.full((input_size,), NOT_LOADED, dtype=torch.int32)
            _add(layer, "input_permutation", order, {"weight_loader": self._load_permutation})

    def _load_permutation(self, parameter: nn.Parameter, loaded: torch.Tensor, *part: object) -> None:
        """Take the permutation of a layer, or see that the next one's of those that are merged is the same."""
        if not is_permutation(loaded, len(parameter)):
            raise CheckpointError(f"layer {self.name}: input_permutation is not a permutation; the output is damaged")
        if parameter[0] == NOT_LOADED:
            parameter.data.copy_(loaded)
        elif not torch.equal(parameter, loaded.to(parameter.device)):
            raise CheckpointError(
                f"layer {self.name}: the layers that vLLM merges have different input_permutations; make the output "
                "dense by `streamprune export`"
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raise CheckpointError for what was not loaded; prepare the weight for a GPU."""
        values, mask, order = layer.weight_values, layer.weight_mask, layer.input_permutation
        loaded = {
            "weight_values": all_finite(values.data),
            "weight_mask": bool(mask.any(dim=1).all()),
            "input_permutation": order is None or int(order[0]) != NOT_LOADED,
        }
        if missing := next((part for part, there in loaded.items() if not there), None):
            dtype = str(values.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"layer {self.name}: its {missing} was not loaded, is damaged, or too large for {dtype}"
            )
        pattern = self.packed.pattern
        in_features = values.shape[1] // pattern.kept * pattern.group_size
        try:
            metadata = packed_metadata(values.data, mask.data, in_features, pattern.group_size)
        except ValueError as error:
            raise CheckpointError(f"layer {self.name}: its weight_mask is damaged ({error})") from error
        layer.register_buffer("weight_metadata", metadata, persistent=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """y [..., out] of x [..., in], both of the model's dtype."""
        packed = layer.weight_values, layer.weight_mask, bias, layer.input_permutation
        return packed_linear(x, *packed, self.packed.pattern.group_size, layer.weight_metadata)


def _add(layer: nn.Module, name: str, tensor: torch.Tensor, attributes: Mapping[str, object]) -> None:
    parameter = nn.Parameter(tensor, requires_grad=False)
    for key, value in attributes.items():
        setattr(parameter, key, value)
    layer.register_parameter(name, parameter)


def register() -> None:
    """Have vLLM load outputs; its entry point `vllm.general_plugins`. Calling it again changes nothing."""
    register_quantization_config(QUANT_METHOD)(PackedConfig)
