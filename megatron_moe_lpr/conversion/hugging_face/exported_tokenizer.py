"""The tokenizer of an export, written so that transformers 4 and 5 give a text the token ids of the training data."""

import json
from pathlib import Path
from typing import Any

from megatron_moe_lpr.conversion.hugging_face.tokenizer_samples import sample_texts
from megatron_moe_lpr.conversion.hugging_face.transformers_tokenizer import (
    TransformersTokenizer,
    load_with_transformers,
)
from megatron_moe_lpr.data.tokenizer import (
    ORIGIN,
    SentencePieceTokenizer,
    Tokenizer,
    fingerprint_of_json,
    load_tokenizer,
)
from megatron_moe_lpr.data.tokenizer_settings import CONFIG
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json, write_json
from megatron_moe_lpr.program import command

TOKENIZER = "tokenizer.json"
GENERIC_CLASS = "PreTrainedTokenizerFast"
"""Transformers 4 and 5 load tokenizer.json unchanged for this class."""
UNCHANGED_BY_TRANSFORMERS_4 = (GENERIC_CLASS, "Qwen2Tokenizer", "Qwen2TokenizerFast")
"""Classes for which transformers 4 loads tokenizer.json unchanged. LlamaTokenizer builds a tokenizer of its own."""
SLOW_CLASS_FIELDS = ("legacy", "sp_model_kwargs", "add_prefix_space", "from_slow", "use_default_system_prompt")
"""Fields of tokenizer_config.json that the generic class does not have."""


def settle_tokenizer(directory: Path) -> list[str]:
    """Change an export's tokenizer files, where needed, so that transformers encodes texts as `load_tokenizer` does.

    A SentencePiece model gets a tokenizer.json. Where the class named in tokenizer_config.json splits texts in another
    way than tokenizer.json says, the generic class replaces it. Tokens added before and after a text stay the same.

    Args:
        directory: an export with its config.json.

    Returns:
        Warnings for the user about what still differs from the training data.
    """
    try:
        ours = load_tokenizer(directory)
    except UserError as error:
        has_tokenizer = (directory / TOKENIZER).is_file() or any(directory.glob("*.model"))
        return [f"{error}; the tokenizer is not compared with transformers'"] if has_tokenizer else []
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    texts, is_sentencepiece = sample_texts(ours), isinstance(ours, SentencePieceTokenizer)
    theirs = load_with_transformers(directory, texts)
    # Transformers 5 is installed and was compared; of transformers 4 only the class tells what it does.
    is_safe = not is_sentencepiece and config.get("tokenizer_class") in UNCHANGED_BY_TRANSFORMERS_4
    if is_safe and theirs is not None and not differences(ours, theirs) and _same_pipeline(ours, theirs):
        return []
    if is_sentencepiece or config.get("tokenizer_class") != GENERIC_CLASS:
        _write(ours, config, theirs, directory)
        theirs = load_with_transformers(directory, texts)
    if theirs is None:
        return [f"{directory / TOKENIZER}: transformers cannot read it; text may get other ids than training data"]
    if different := differences(ours, theirs):
        return [
            f"{ours.path}: AutoTokenizer of transformers {theirs.version} gives {len(different)} of "
            f"{len(texts)} sample texts other ids than training data gets, for example {different[0]!r}; "
            f"{_remedy(ours, directory)}"
        ]
    return []


def differences(ours: Tokenizer, theirs: TransformersTokenizer) -> list[str]:
    """Return the sample texts with different ids, special tokens in a text encoded as text or as tokens."""
    different = []
    for split, their_ids in ((True, theirs.ids_as_text), (False, theirs.ids)):
        our_ids = load_tokenizer(ours.path, ours.eod_token, split).encode_batch(theirs.texts)
        pairs = zip(theirs.texts, our_ids, their_ids, strict=True)
        different += [text for text, one, other in pairs if one != other]
    return list(dict.fromkeys(different))


def _remedy(ours: Tokenizer, directory: Path) -> str:
    generic = load_with_transformers(directory, sample_texts(ours), GENERIC_CLASS)
    if generic is not None and not differences(ours, generic):
        return f"load the export's tokenizer by {GENERIC_CLASS}.from_pretrained"
    return f"encode text for the export as {command('preprocess')} does"


def _same_pipeline(ours: Tokenizer, theirs: TransformersTokenizer) -> bool:
    """Whether transformers loaded tokenizer.json unchanged: then texts outside the sample get the same ids too."""
    from tokenizers import Tokenizer as RustTokenizer

    return _pipeline(RustTokenizer.from_file(str(ours.path)).to_str()) == _pipeline(theirs.content)


def _pipeline(content: str) -> str:
    fields = json.loads(content)
    return fingerprint_of_json({name: fields.get(name) for name in ("normalizer", "pre_tokenizer", "model")})


def _write(ours: Tokenizer, config: dict[str, Any], theirs: TransformersTokenizer | None, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for the generic class."""
    roles = {}
    if isinstance(ours, SentencePieceTokenizer):
        # The generic class does not read the names of special tokens from the SentencePiece model.
        roles = ours.role_tokens()
        content = json.loads(ours.converted().to_str())
        content["post_processor"] = _template(ours, roles, config)
    else:
        content = read_json(ours.path)
        if theirs is not None and theirs.content:
            content["post_processor"] = json.loads(theirs.content)["post_processor"]
    text = json.dumps(content, ensure_ascii=False)
    (directory / TOKENIZER).write_text(text, encoding="utf-8")
    origin = {"tokenizer_json": fingerprint_of_json(json.loads(text)), "source": ours.fingerprint}
    kept = {name: value for name, value in config.items() if name not in SLOW_CLASS_FIELDS}
    changed = {**roles, **kept, "tokenizer_class": GENERIC_CLASS, ORIGIN: origin}
    write_json(changed, directory / CONFIG)


def _template(ours: SentencePieceTokenizer, roles: dict[str, str], config: dict[str, Any]) -> dict[str, Any] | None:
    """Build the post-processor that adds the tokens of LlamaTokenizer around a text: by default BOS before it."""
    from tokenizers import processors

    named = roles | {name: _token_text(value) for name, value in config.items() if name.endswith("_token")}
    before = [named.get("bos_token")] if config.get("add_bos_token", True) is not False else []
    after = [named.get("eos_token")] if config.get("add_eos_token") is True else []
    ids = {token: ours.token_id(token) for token in (*before, *after) if token}
    special = {token: number for token, number in ids.items() if number is not None}
    if not special:
        return None
    first, last = ([token for token in tokens if token and token in special] for tokens in (before, after))
    # In a pair of texts, `:1` marks the tokens of the second one.
    second = " ".join(f"{part}:1" for part in [*first, "$B", *last])
    single = " ".join([*first, "$A", *last])
    template = processors.TemplateProcessing(
        single=single, pair=f"{single} {second}", special_tokens=list(special.items())
    )
    return json.loads(template.__getstate__())


def _token_text(token: object) -> Any:
    return token.get("content") if isinstance(token, dict) else token
