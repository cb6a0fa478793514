"""Quantised checkpoints, which cannot be upcycled: how a `config.json` says so, and what to do instead."""

from collections.abc import Mapping
from typing import Any

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import shown

# MLX writes both of the first two, the third is llm-compressor's older name.
FIELDS = ("quantization_config", "quantization", "compression_config")
QUANTISED = "quantised weights are not supported, since training and expert 0 need the weights themselves"
WAY_OUT = (
    "give the model that was quantised, in bfloat16, float16 or float32 (on the hub it has the name without the "
    "method's suffix)"
)


def refuse_quantisation(config: Mapping[str, Any], source: str) -> None:
    """Refuse a configuration that describes quantised weights; `source` names the file in the message.

    Raises:
        UserError: naming the field, the method and the way out.
    """
    for name in FIELDS:
        if config.get(name):
            raise UserError(
                f"{source}: {name} ({_method(config[name])}): {QUANTISED}; {WAY_OUT}. If the weights were dequantised, "
                f"remove {name}"
            )


def _method(value: object) -> str:
    fields = value if isinstance(value, Mapping) else {}
    said = [fields.get("quant_method") or ("MLX" if "group_size" in fields else None), fields.get("fmt")]
    said += [f"{shown(fields['bits'])} bits" if "bits" in fields else None]
    return ", ".join(one if isinstance(one, str) else shown(one) for one in said if one) or "an unnamed method"
