"""The model card of an export, its README.md: `model_card.md` filled with what the checkpoint records of itself."""

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
from megatron_moe_lpr.conversion.hugging_face.llama_cpp import TRIED
from megatron_moe_lpr.data.language_groups import original_languages, trained_languages
from megatron_moe_lpr.data.language_names import covered
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.configuration.families import FAMILIES
from megatron_moe_lpr.program import command
from megatron_moe_lpr.templates import render

ISO_639 = re.compile(r"[a-z]{2,3}")
LICENCE_FIELDS = ("license", "license_name", "license_link")


@dataclasses.dataclass(frozen=True)
class ModelCardOptions:
    """What the user says about the model; None: taken from the record of the import and the base model's own files."""

    base_model: str | None = None
    """The dense model's name on the hub."""
    licence: str | None = None
    """Its licence, in the hub's spelling."""
    evaluation: Path | None = None
    """The JSON file of `moe-lpr evaluate --output`."""


def model_card(
    directory: Path,
    recorded: BaseModel | None,
    card: CheckpointCard,
    engine: str,
    options: ModelCardOptions,
    is_original: bool,
) -> str:
    """Return the text of an export's README.md.

    Args:
        directory: holds the base model's files; its README.md names the licence.
        recorded: the base model, as the import recorded it; None: a checkpoint of an earlier version.
        engine: the exported form, `transformers` or `llama.cpp`.
        is_original: the base model's weights are in the export unchanged, to the bit.

    Raises:
        UserError: the evaluation file is not one.
    """
    licence, source = _licence(directory, options), recorded or BaseModel("", named_by_card(directory))
    base_model = options.base_model or source.name
    trained = {language for entry in card.history for language in trained_languages(entry)}
    original = sorted(original_languages(card.history))
    expanded = sorted(trained - covered(trained, original))
    text = render(
        Path(__file__).with_name("model_card.md"),
        metadata=_metadata(card, licence, base_model, [*original, *expanded], engine).to_yaml(),
        name=base_model.split("/")[-1] if base_model else source.directory or card.family,
        base=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a base model",
        origin=_origin(base_model, source),
        card=card,
        unchanged=card.earlier_tokenizers[0].unchanged if card.earlier_tokenizers else [],
        upcycled_layers=sum(experts > 1 for experts in card.experts_per_layer),
        original=original,
        expanded=expanded,
        licence=licence["license"],
        evaluation=_read_evaluation(options.evaluation) if options.evaluation else None,
        engine=engine,
        has_llama_cpp_form=not card.has_mixture_base and FAMILIES[card.family].moe_model_type in TRIED,
        is_original=is_original,
    )
    return text.rstrip() + "\n"


def _metadata(
    card: CheckpointCard, licence: Mapping[str, str], base_model: str | None, languages: list[str], engine: str
) -> ModelCardData:
    return ModelCardData(
        language=sorted(filter(ISO_639.fullmatch, languages)) or None,
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        library_name="transformers" if engine == "transformers" else None,
        pipeline_tag="text-generation",
        tags=[OUR_TAG, *(["moe"] if card.is_moe else [])],
        license=licence["license"],
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )


def _licence(directory: Path, options: ModelCardOptions) -> dict[str, str]:
    """Return the licence in the fields of the hub's metadata."""
    if options.licence:
        return {"license": options.licence}
    base = card_metadata(directory)
    if base.get("license"):
        return {name: base[name] for name in LICENCE_FIELDS if base.get(name)}
    files = sorted(directory.glob("LICEN[CS]E*"))
    if files:
        return {"license": "other", "license_name": "of-the-base-model", "license_link": files[0].name}
    return {"license": "unknown"}


def _origin(base_model: str | None, source: BaseModel) -> str:
    if base_model:
        is_recorded = source.revision and base_model == source.name
        return f"{base_model}" + (f", commit {source.revision}" if is_recorded else "")
    where = f"imported from `{source.directory}`; " if source.directory else ""
    if source.quantised:
        where = f"imported from `{source.directory}`, whose weights were quantised ({source.quantised}); "
    return f"{where}its name on the hub is not known (`export --base-model` writes it here)"


def _read_evaluation(path: Path) -> Mapping[str, Any]:
    """Read an evaluation; perplexity and bits per byte become text, empty where they were not measured."""
    record = read_json(path)
    try:
        datasets = [
            {"language": one["language"], "group": one["group"]}
            | {name: "" if one[name] is None else f"{one[name]:.3f}" for name in ("perplexity", "bits_per_byte")}
            for one in record["datasets"]
        ]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a result of {command('evaluate')} --output") from None
    return {**record, "datasets": datasets}
