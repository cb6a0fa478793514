"""Small base models' tokenizers and texts for the tests of the vocabulary."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_moe_lpr.commands import extend_tokenizer
from tests.data.builders import EOD_TOKEN, corpus_texts, make_sentencepiece, write_jsonl

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROWS = 700
"""vocab_size in config.json: more than the tokenizers here have ids."""


def make_texts(directory: Path) -> dict[str, Path]:
    """Files of text: Greek and Hungarian to learn, English and Spanish to guard."""
    directory.mkdir(parents=True, exist_ok=True)
    return {
        language: write_jsonl(
            directory / f"{language}.jsonl", [text[:900] for text in corpus_texts("valid", language)[:60]]
        )
        for language in ("el", "hu", "en", "es")
    }


def make_byte_level(directory: Path, ignore_merges: bool = False) -> Path:
    """A model's tokenizer in the form of Qwen's: added tokens outside the vocabulary, and more rows than ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus_texts("valid", "en")[:30], trainer)
    tokenizer.add_special_tokens([EOD_TOKEN, "<|im_start|>"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = ignore_merges
    settings = {
        "eos_token": EOD_TOKEN,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{{ messages[0]['content'] }}",
    }
    return write_model(directory, {"tokenizer.json": content, "tokenizer_config.json": settings})


def make_sentencepiece_model(directory: Path) -> Path:
    """A model's tokenizer in the form of Llama 2's: only a SentencePiece BPE model with byte fallback."""
    make_sentencepiece(directory, "bpe")
    return write_model(directory, {"config.json": {"vocab_size": 1520, "model_type": "llama"}})


def write_model(directory: Path, files: dict[str, dict]) -> Path:
    """Write JSON files, and a config.json if it is not one of them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": {"vocab_size": ROWS}, **files}.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return directory


def extend(base: Path, output: Path, texts: dict[str, Path], *flags: str, tokens: int = 120) -> Path:
    """Run the command: Greek and Hungarian are learned, English and Spanish guarded."""
    learn = [f"{language}={texts[language]}" for language in ("el", "hu")]
    guard = [f"{language}={texts[language]}" for language in ("en", "es")]
    extend_tokenizer.main(
        [
            *("--hf", str(base), "--learn", *learn, "--guard", *guard, "--output", str(output)),
            *("--new-tokens", str(tokens), "--workers", "1", *flags),
        ]
    )
    return output


def load(directory: Path) -> Tokenizer:
    """The tokenizer by Hugging Face's library alone; special tokens in a text are text."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def ids_of_texts(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text, without tokens around it."""
    return [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
