"""Inputs of the FFN in each layer of a dense model, for tokens of several languages.

All windows pass one layer before the next layer is read, so that memory holds one layer and the residual stream of all
tokens, never the whole model. The layers are transformers' own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from megatron_moe_lpr.allocation.dense_source import DenseSource
from megatron_moe_lpr.conversion.hugging_face.hf_config import with_both_rope_spellings
from megatron_moe_lpr.conversion.hugging_face.installed_transformers import check_model_type
from megatron_moe_lpr.conversion.hugging_face.quiet import quiet_transformers

WINDOWS_PER_BATCH = 8


@torch.no_grad()
def ffn_inputs(
    source: DenseSource, windows: Mapping[str, torch.Tensor], device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the inputs of layer 0, 1, ...: fp32 [windows, length, hidden] by language, on the CPU.

    Args:
        windows: token ids [windows, length] of each language, the same length for all.

    Raises:
        UserError: the installed transformers has no class for the model.
    """
    model = _skeleton(source)
    embedding = source.embedding()
    factor = source.architecture.multipliers.embedding
    stream = {name: torch.nn.functional.embedding(ids, embedding).float() * factor for name, ids in windows.items()}
    del embedding
    length = next(iter(windows.values())).shape[1]
    for index in range(source.architecture.num_layers):
        layer = model.get_submodule(f"layers.{index}").to_empty(device=device)
        layer.load_state_dict(source.layer(index), strict=True)
        ffn = layer.get_submodule(source.ffn_module)
        runner = _LayerRunner(layer, ffn, _arguments(model, source.architecture.window(index), length, device))
        inputs = {name: runner(stream, name, device) for name in stream}
        layer.to("meta")
        yield inputs


class _LayerRunner:
    """Runs windows through a layer and records the inputs of its FFN."""

    def __init__(self, layer: torch.nn.Module, ffn: torch.nn.Module, arguments: dict[str, Any]) -> None:
        self.layer, self.arguments = layer, arguments
        self.kept: list[torch.Tensor] = []
        ffn.register_forward_pre_hook(lambda _, inputs: self.kept.append(inputs[0].cpu()))

    def __call__(self, stream: dict[str, torch.Tensor], name: str, device: torch.device) -> torch.Tensor:
        """Return the FFN's inputs for one language, and replace its `stream` by the layer's output."""
        self.kept = []
        outputs = []
        for part in stream[name].split(WINDOWS_PER_BATCH):
            output = self.layer(part.to(device), **self.arguments)
            outputs.append((output[0] if isinstance(output, tuple) else output).cpu())
        stream[name] = torch.cat(outputs)
        return torch.cat(self.kept)


def _skeleton(source: DenseSource) -> torch.nn.Module:
    """transformers' model without its weights, in fp32. Raises UserError: the installed version does not have it."""
    config = with_both_rope_spellings(source.config, source.architecture)
    check_model_type(config, "config.json")
    fields = {name: value for name, value in config.items() if name not in ("model_type", "torch_dtype", "dtype")}
    with quiet_transformers(), torch.device("meta"):
        configuration = AutoConfig.for_model(config["model_type"], **fields)
        model = AutoModel.from_config(configuration, dtype=torch.float32, attn_implementation="sdpa").eval()
    # Rotary frequencies are computed, not loaded, and there is nothing to compute on the meta device: build them again.
    model.rotary_emb = type(model.get_submodule("rotary_emb"))(configuration)
    return model


def _arguments(model: torch.nn.Module, sliding_window: int | None, length: int, device: torch.device) -> dict[str, Any]:
    """Arguments of a layer: positions, and the mask [1, 1, length, length], True where a token attends to another."""
    positions = torch.arange(length)
    distance = positions[:, None] - positions[None, :]
    seen = distance >= 0
    if sliding_window:
        seen &= distance < sliding_window
    cosine, sine = model.get_submodule("rotary_emb")(torch.zeros(1, length, 1), positions[None])
    return {
        "attention_mask": seen[None, None].to(device),
        "position_ids": positions[None].to(device),
        "position_embeddings": (cosine.to(device), sine.to(device)),
    }
