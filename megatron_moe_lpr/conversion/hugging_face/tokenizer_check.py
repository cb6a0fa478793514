"""Checks of a model's tokenizer at import: same token ids in training data and in the export, end of document."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megatron_moe_lpr.checkpoint.format.directory import CONFIG_FILE
from megatron_moe_lpr.conversion.hugging_face.exported_tokenizer import settle_tokenizer
from megatron_moe_lpr.conversion.hugging_face.hf_directory import carried_files, carry_files, tokenizer_digests
from megatron_moe_lpr.conversion.hugging_face.tokenizer_samples import TEXTS
from megatron_moe_lpr.data.sentencepiece_conversion import SPACE
from megatron_moe_lpr.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megatron_moe_lpr.data.tokenizer_settings import CONFIG
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json


def check_tokenizer(
    model: Path, exported_type: str, files: Mapping[str, Path] | None = None, extended: Path | None = None
) -> list[str]:
    """Export a model's tokenizer to a temporary directory, and return warnings for the user.

    Args:
        model: a Hugging Face directory.
        exported_type: `model_type` of the export, by which transformers chooses the tokenizer's class.
        files: the files that are copied into the checkpoint, by relative path; by default the model's own.
        extended: directory of the extended tokenizer among them; None: they have the model's own.

    Raises:
        UserError: the files that are copied into the checkpoint make another tokenizer.
    """
    files = carried_files(model) if files is None else files
    with tempfile.TemporaryDirectory() as name:
        trial = Path(name)
        carry_files(files, trial)
        (trial / CONFIG_FILE).write_text(json.dumps({"model_type": exported_type}), encoding="utf-8")
        found = settle_tokenizer(trial)
        found = [line.replace(f"{trial}/", f"{extended or model}/") for line in found]
        try:
            source = load_tokenizer(extended or model)
        except UserError as error:
            # No warning for a model without tokenizer files: its token ids are made by another program.
            return found or [str(error)] if tokenizer_digests(files) else found
        if load_tokenizer(trial).fingerprint != source.fingerprint:
            raise UserError(f"{source.path}: the checkpoint would hold another tokenizer; move other tokenizers away")
    return [*found, *_end_of_document(source), *_space_before_text(source), *_two_tokenizers(source)]


def _end_of_document(tokenizer: Tokenizer) -> list[str]:
    try:
        note = tokenizer.eod_note()
    except UserError as error:
        return [str(error)]
    return [note] if note else []


def _space_before_text(tokenizer: Tokenizer) -> list[str]:
    """Warn of add_prefix_space=false in tokenizer_config.json, which transformers alone lets override the model."""
    config = tokenizer.path.with_name(CONFIG)
    if not isinstance(tokenizer, SentencePieceTokenizer) or not config.is_file():
        return []
    if read_json(config).get("add_prefix_space") is not False:
        return []
    first = tokenizer.token(tokenizer.encode_batch(["a"])[0][0]) or ""
    if not first.startswith(SPACE):
        return []
    return [
        f"{config}: add_prefix_space is false, and {tokenizer.path.name} itself puts a space before a text, as "
        "training data and the export do; transformers reads this model without the space: to train so, import it with "
        "the tokenizer.json that AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes"
    ]


def _two_tokenizers(tokenizer: Tokenizer) -> list[str]:
    """Warn of a tokenizer.json and a SentencePiece model that encode texts differently."""
    model = tokenizer.path.with_name("tokenizer.model")
    if not isinstance(tokenizer, HuggingFaceTokenizer) or not model.is_file():
        return []
    try:
        other = load_tokenizer(model)
    except UserError:
        return []  # Not SentencePiece's: Llama 3 has a file of this name in a form of its own.
    pairs = zip(TEXTS, tokenizer.encode_batch(TEXTS), other.encode_batch(TEXTS), strict=True)
    different = [text for text, one, two in pairs if one != two]
    if not different:
        return []
    return [
        f"{tokenizer.path}: splits {len(different)} of {len(TEXTS)} sample texts otherwise than {model.name} beside "
        f"it, for example {different[0]!r}; training data and the export use {tokenizer.path.name}"
    ]
