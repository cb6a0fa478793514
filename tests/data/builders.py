"""Small tokenizers and datasets for the tests of the data room."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import sentencepiece
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_moe_lpr.data.indexed import IndexedWriter
from megatron_moe_lpr.data.manifest import Manifest
from megatron_moe_lpr.data.preparation.documents import DocumentOptions
from megatron_moe_lpr.data.preparation.encoding import EncoderOptions
from megatron_moe_lpr.data.preparation.preprocessing import PreprocessingOptions, preprocess
from megatron_moe_lpr.data.preparation.publishing import publish

CORPUS = Path(__file__).parents[2] / "data" / "help_corpus"
LANGUAGES = ("el", "en", "es", "hu", "tr", "zh")
EOD_TOKEN = "<|endoftext|>"


NO_CUDA_LINE = "No CUDA runtime is found"
"""In a line that torch, built for CUDA, writes to stderr where CUDA's toolkit is installed and no GPU is."""


def corpus_texts(split: str, language: str) -> list[str]:
    """Texts of the demo corpus, read without the package's own reader."""
    with open(CORPUS / split / f"{language}.jsonl.zst", "rb") as file:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8").readlines()
    return [json.loads(line)["text"] for line in lines]


def make_hf_tokenizer(directory: Path) -> Path:
    """A byte-level BPE tokenizer of 800 tokens: every text decodes back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for name in LANGUAGES for text in corpus_texts("valid", name)[:20]), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOD_TOKEN}))
    return directory


def make_sentencepiece(directory: Path, model_type: str = "unigram") -> Path:
    """A SentencePiece model with byte fallback and no normalisation: every text decodes back exactly."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = (line for name in LANGUAGES for text in corpus_texts("valid", name)[:10] for line in text.split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(directory / "tokenizer"),
        vocab_size=1500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        model_type=model_type,
        split_digits=model_type == "bpe",
        minloglevel=2,
    )
    return directory / "tokenizer.model"


def write_jsonl(path: Path, documents: list) -> Path:
    """One JSON line a document; strings become {"text": ...}."""
    rows = [document if isinstance(document, dict) else {"text": document} for document in documents]
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))
    return path


def make_plan(inputs, prefix: Path, tokenizer: Path, language: str | None = "en", **changes) -> PreprocessingOptions:
    """A plan with defaults; `changes` go to the plan, its encoder or its document options by name."""
    names = [str(path) for path in (inputs if isinstance(inputs, list) else [inputs])]
    documents = DocumentOptions(language=language)
    documents = dataclasses.replace(documents, **_taken(changes, DocumentOptions))
    encoder = EncoderOptions(str(tokenizer), None, append_eod=True, documents=documents)
    encoder = dataclasses.replace(encoder, **_taken(changes, EncoderOptions))
    return PreprocessingOptions(names, str(prefix), encoder, **changes)


def _taken(changes: dict, kind: type) -> dict:
    names = {field.name for field in dataclasses.fields(kind)} & changes.keys()
    return {name: changes.pop(name) for name in names}


def run_plan(*args, **kwargs) -> Manifest:
    """Preprocess to one prefix; its manifest."""
    (manifest,) = preprocess(make_plan(*args, **kwargs)).values()
    return manifest


def write_dataset(
    prefix: Path,
    language: str,
    documents: list[list[int]],
    tokenizer: str = "t",
    eod: int = 0,
    chat: bool = False,
    chat_template: str | None = None,
) -> str:
    """A dataset of given token ids (EOD included, where wanted), with its manifest.

    `chat`: of conversations; the even tokens count in the loss.
    """
    partial = str(prefix.parent / f"partial-{prefix.name}")
    lengths = np.array([len(document) for document in documents], np.int32)
    tokens = np.concatenate([np.array(document, np.int32) for document in documents])
    with IndexedWriter(partial, np.dtype(np.int32), chat) as writer:
        writer.append(tokens, lengths, tokens % 2 == 0)
        writer.finish()
    manifest = Manifest(
        language=language,
        tokenizer=tokenizer,
        vocab_size=100000,
        eod=eod,
        append_eod=True,
        dtype="int32",
        documents=len(lengths),
        tokens=len(tokens),
        text_bytes=len(tokens) * 3,
        bin_bytes=0,
        idx_bytes=0,
        index_sha256="",
        skipped={},
        sources=[],
        bin_xxh3_128=writer.checksum,
        chat=chat,
        chat_template=chat_template,
        loss_tokens=writer.loss_tokens if chat else None,
        loss_mask_xxh3_128=writer.loss_mask_checksum,
        loss_text_bytes=writer.loss_tokens * 3 if chat else None,
    )
    publish(partial, str(prefix), manifest)
    return str(prefix)


def numbered_dataset(prefix: Path, language: str, base: int, documents: int, seed: int = 0, **options) -> str:
    """Documents of 5 to 60 tokens out of base..base+999, each ending with EOD (0): a token tells its dataset."""
    random = np.random.default_rng(seed + base)
    return write_dataset(
        prefix,
        language,
        [[*random.integers(base, base + 1000, random.integers(4, 60)).tolist(), 0] for _ in range(documents)],
        **options,
    )
