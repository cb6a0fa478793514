"""Checkpoints of the authors' Hugging Face implementation: a PEFT-like adapter with experts and routers."""

import dataclasses
from pathlib import Path

from megatron_moe_lpr.checkpoint.format.card import MAX_EXPERTS
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import is_integer, read_json, shown
from megatron_moe_lpr.files.links import file_inside
from megatron_moe_lpr.model.configuration.architecture import MAX_LAYERS

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What adapter_config.json says."""

    path: Path
    num_experts: int
    """The original expert included."""
    top_k: int
    layers: frozenset[int] | None
    """The layers that have experts; None: all."""

    @property
    def weights(self) -> Path:
        """The file with the experts and routers."""
        return self.path / WEIGHTS_FILE

    def experts_per_layer(self, num_layers: int) -> list[int]:
        """Number of experts of each layer; 1: the adapter does not touch it.

        Raises:
            UserError: the adapter names a layer that the base model does not have.
        """
        layers = range(num_layers) if self.layers is None else self.layers
        if any(not 0 <= layer < num_layers for layer in layers):
            raise UserError(
                f"{self.path / CONFIG_FILE}: layers_to_transform names layer {max(layers)}, "
                f"but the model given by --hf has {num_layers} layers"
            )
        return [self.num_experts if layer in layers else 1 for layer in range(num_layers)]


def open_adapter(path: Path) -> Adapter:
    """Read an adapter's configuration.

    Raises:
        UserError: not an adapter of this kind, or only pickled weights.
    """
    path = Path(path)
    file = path / CONFIG_FILE
    if not file.exists():
        raise UserError(
            f"{file}: no such file; --adapter takes a directory of the authors' implementation ({CONFIG_FILE} with "
            f"peft_type MOE, {WEIGHTS_FILE}), and a whole model is given by --hf alone"
        )
    config = read_json(file_inside(file, path))
    if config.get("peft_type") != "MOE":
        raise UserError(
            f"{file}: peft_type {shown(config.get('peft_type'))}; only the authors' 'MOE' can be imported as "
            "experts; merge another adapter into its base with peft's merge_and_unload() and give the result by --hf"
        )
    if not file_inside(path / WEIGHTS_FILE, path).is_file():
        pickled = any(path.glob("*.bin"))
        hint = "; rewrite the pickled .bin as safetensors" if pickled else "; copy it from where the adapter comes from"
        raise UserError(f"{path / WEIGHTS_FILE}: no such file{hint}")
    num_experts, top_k = config.get("num_experts"), config.get("topk")
    if not is_integer(num_experts, 1, MAX_EXPERTS) or not is_integer(top_k, 1, num_experts):
        raise UserError(
            f"{file}: num_experts={shown(num_experts)} and topk={shown(top_k)} are not a number of experts and a choice"
        )
    return Adapter(path, num_experts, top_k, _layers(config.get("layers_to_transform"), file))


def _layers(value: object, file: Path) -> frozenset[int] | None:
    if value is None:
        return None
    layers = value if isinstance(value, list) else [value]
    if not layers or not all(is_integer(layer, 0, MAX_LAYERS - 1) for layer in layers):
        raise UserError(f"{file}: layers_to_transform must be a layer number or a list of them, not {shown(value)}")
    return frozenset(layers)
