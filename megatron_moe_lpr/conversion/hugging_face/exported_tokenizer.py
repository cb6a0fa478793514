"""The tokenizer in an export: whatever class transformers 4 or 5 takes for it, a text gets the ids of training data."""

import json
from pathlib import Path
from typing import Any

from megatron_moe_lpr.conversion.hugging_face.tokenizer_reading import Reading, read_by_transformers
from megatron_moe_lpr.conversion.hugging_face.tokenizer_samples import sample_texts
from megatron_moe_lpr.data.tokenizer import (
    ORIGIN,
    SentencePieceTokenizer,
    Tokenizer,
    fingerprint_of_json,
    load_tokenizer,
)
from megatron_moe_lpr.data.tokenizer_settings import CONFIG
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json
from megatron_moe_lpr.program import command

TOKENIZER = "tokenizer.json"
GENERIC_CLASS = "PreTrainedTokenizerFast"
"""Both versions take tokenizer.json as it is for it."""
_AS_IN_THE_FILE = (GENERIC_CLASS, "Qwen2Tokenizer", "Qwen2TokenizerFast")
"""Transformers 4 does so for these; what 5 does is tried. LlamaTokenizer builds its own in both."""
_OF_OTHER_CLASSES = ("legacy", "sp_model_kwargs", "add_prefix_space", "from_slow", "use_default_system_prompt")


def settle_tokenizer(directory: Path) -> list[str]:
    """Let transformers read a directory's tokenizer as `load_tokenizer` does, changing files only where it does not.

    A SentencePiece model gets a tokenizer.json. Where the class in tokenizer_config.json splits texts otherwise than
    tokenizer.json says, the generic class stands there. What the class puts before and after a text stays.

    Args:
        directory: of an export, with its config.json.

    Returns:
        What is still not as in training data, for the user.
    """
    try:
        ours = load_tokenizer(directory)
    except UserError as error:
        return [f"{error}; the tokenizer is not compared with transformers'"] if _has_tokenizer(directory) else []
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    reading = read_by_transformers(directory, sample_texts(ours))
    trusted = not isinstance(ours, SentencePieceTokenizer) and config.get("tokenizer_class") in _AS_IN_THE_FILE
    if trusted and reading is not None and not differences(ours, reading) and _same_pipeline(ours, reading):
        return []
    after = reading
    if isinstance(ours, SentencePieceTokenizer) or config.get("tokenizer_class") != GENERIC_CLASS:
        _write(ours, config, reading, directory)
        after = read_by_transformers(directory, sample_texts(ours))
    if after is None:
        return [f"{directory / TOKENIZER}: transformers cannot read it; text may get other ids than training data"]
    if different := differences(ours, after):
        return [
            f"{ours.path}: AutoTokenizer of transformers {after.version} gives {len(different)} of "
            f"{len(after.texts)} sample texts other ids than training data gets, for example {different[0]!r}; "
            f"{_remedy(ours, directory)}"
        ]
    return []


def differences(ours: Tokenizer, reading: Reading) -> list[str]:
    """Sample texts of which the ids differ, with special tokens in them as text or as tokens."""
    found = []
    for split, theirs in ((True, reading.ids_as_text), (False, reading.ids)):
        same = load_tokenizer(ours.path, ours.eod_token, split)
        pairs = zip(reading.texts, same.encode_batch(reading.texts), theirs, strict=True)
        found += [text for text, one, other in pairs if one != other]
    return list(dict.fromkeys(found))


def _remedy(ours: Tokenizer, directory: Path) -> str:
    generic = read_by_transformers(directory, sample_texts(ours), GENERIC_CLASS)
    if generic is not None and not differences(ours, generic):
        return f"load the export's tokenizer by {GENERIC_CLASS}.from_pretrained"
    return f"encode text for the export as {command('preprocess')} does"


def _has_tokenizer(directory: Path) -> bool:
    return (directory / TOKENIZER).is_file() or any(directory.glob("*.model"))


def _same_pipeline(ours: Tokenizer, reading: Reading) -> bool:
    """Whether the whole tokenizer is the file's, and not only the ids of the sample."""
    from tokenizers import Tokenizer as RustTokenizer

    return _pipeline(RustTokenizer.from_file(str(ours.path)).to_str()) == _pipeline(reading.content)


def _pipeline(content: str) -> str:
    fields = json.loads(content)
    return fingerprint_of_json({name: fields.get(name) for name in ("normalizer", "pre_tokenizer", "model")})


def _write(ours: Tokenizer, config: dict[str, Any], reading: Reading | None, directory: Path) -> None:
    if isinstance(ours, SentencePieceTokenizer):
        content = json.loads(ours.converted().to_str())
        content["post_processor"] = _template(ours, config)
    else:
        content = read_json(ours.path)
        if reading is not None and reading.is_fast:
            content["post_processor"] = json.loads(reading.content)["post_processor"]
    text = json.dumps(content, ensure_ascii=False)
    (directory / TOKENIZER).write_text(text, encoding="utf-8")
    origin = {"tokenizer_json": fingerprint_of_json(json.loads(text)), "source": ours.fingerprint}
    kept = {name: value for name, value in config.items() if name not in _OF_OTHER_CLASSES}
    changed = {**_end_tokens(ours), **kept, "tokenizer_class": GENERIC_CLASS, ORIGIN: origin}
    (directory / CONFIG).write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _end_tokens(ours: Tokenizer) -> dict[str, str]:
    """Tokens that a SentencePiece model names itself, and that the generic class is told."""
    if not isinstance(ours, SentencePieceTokenizer):
        return {}
    return ours.role_tokens()


def _template(ours: SentencePieceTokenizer, config: dict[str, Any]) -> dict[str, Any] | None:
    """What LlamaTokenizer puts around a text: by default its BOS token before it."""
    from tokenizers import processors

    roles = _end_tokens(ours) | {name: _text(value) for name, value in config.items() if name.endswith("_token")}
    before = [roles.get("bos_token")] if config.get("add_bos_token", True) is not False else []
    after = [roles.get("eos_token")] if config.get("add_eos_token") is True else []
    ids = {token: ours.token_id(token) for token in (*before, *after) if token}
    known = [[token for token in tokens if token and ids[token] is not None] for tokens in (before, after)]
    if not any(known):
        return None
    single, pair = [" ".join([*known[0], f"${name}", *known[1]]) for name in ("A", "B")]
    special = [(token, number) for token, number in ids.items() if number is not None]
    template = processors.TemplateProcessing(single=single, pair=f"{single} {_second(pair)}", special_tokens=special)
    return json.loads(template.__getstate__())


def _second(template: str) -> str:
    """The part of a second text, whose type is 1."""
    return " ".join(f"{part}:1" for part in template.split(" "))


def _text(token: object) -> Any:
    return token.get("content") if isinstance(token, dict) else token
