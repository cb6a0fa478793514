"""The tokenizer of a GGUF file as Hugging Face's files."""

from pathlib import Path
from typing import Any

from megatron_moe_lpr.conversion.hugging_face.gguf_metadata import REMEDY, Metadata
from megatron_moe_lpr.conversion.hugging_face.quiet import quiet_transformers
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.files.json_files import read_json, write_json

SETTINGS, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> dict[str, Any]:
    """How GPT-4 and its successors cut a text into words before bytes are merged."""
    words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [words, to_bytes]}


PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "llama-bpe": _split(rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"),
    "qwen2": _split(rf"{WORDS}|\p{{N}}|{REST}"),
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
}
"""By `tokenizer.ggml.pre`: how text is cut before bytes are merged, as in those models' own tokenizer.json."""


def write_tokenizer(metadata: Metadata, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template.

    transformers builds the tokenizer. It cuts text as GPT-2 does where it does not know the file's way, so that the way
    is taken from `PRE_TOKENIZERS`.

    Raises:
        UserError: the tokenizer is of a kind that is not read.
    """
    _check(metadata)
    from transformers import AutoTokenizer

    path = metadata.path.absolute()
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        except Exception as error:  # the many errors of transformers about a file of another version
            raise UserError(f"{path}: transformers cannot read its tokenizer: {str(error).splitlines()[0]}") from None
        tokenizer.save_pretrained(directory)
    settings = read_json(directory / SETTINGS)
    # transformers 5 writes a class that version 4 does not know.
    write_json({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}, directory / SETTINGS)
    if metadata.fields.get("tokenizer.ggml.model") == "gpt2":
        content = read_json(directory / TOKENIZER)
        content["pre_tokenizer"] = PRE_TOKENIZERS[metadata.fields["tokenizer.ggml.pre"]]
        write_json(content, directory / TOKENIZER)


def _check(metadata: Metadata) -> None:
    kind, way = (metadata.fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind == "gpt2" and way not in PRE_TOKENIZERS:
        raise UserError(
            f"{metadata.path}: how its tokenizer cuts text (tokenizer.ggml.pre {way}) is not known here, only "
            f"{', '.join(PRE_TOKENIZERS)}; {REMEDY}"
        )
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{metadata.path}: its tokenizer (tokenizer.ggml.model {kind}) is not read, only byte-level BPE (gpt2) and "
            f"SentencePiece (llama); {REMEDY}"
        )
