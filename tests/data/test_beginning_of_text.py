"""The BOS token of families that have one: named by data preparation, and in no dataset."""

import json
import shutil
from pathlib import Path

import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from megatron_moe_lpr.data.beginning_of_text import begin_note, begin_tokens
from tests.data.builders import EOD_TOKEN, run_plan, write_jsonl


def with_bos(source: Path, target: Path) -> Path:
    """The tokenizer as Llama 3 has it: its post-processor puts a token before every text."""
    shutil.copytree(source, target)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|begin|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {"eos_token": EOD_TOKEN, "bos_token": "<|begin|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


def test_tokens_are_those_that_transformers_adds(hf_tokenizer: Path, tmp_path: Path) -> None:
    llama = with_bos(hf_tokenizer, tmp_path / "llama")
    for directory, tokens in ((llama, ["<|begin|>"]), (hf_tokenizer, [])):
        assert begin_tokens(directory) == tokens
        reference = AutoTokenizer.from_pretrained(directory)
        assert reference.convert_ids_to_tokens(reference.encode("")) == tokens
    assert "<|begin|>" in begin_note(llama) and begin_note(hf_tokenizer) is None


def test_of_a_sentencepiece_model(sp_model: Path, tmp_path: Path) -> None:
    shutil.copy(sp_model, tmp_path / "tokenizer.model")
    assert begin_tokens(tmp_path) == ["<s>"]
    for adds in (True, False):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": adds}))
        assert begin_tokens(tmp_path) == (["<s>"] if adds else [])
    assert sentencepiece.SentencePieceProcessor(model_file=str(sp_model)).id_to_piece(1) == "<s>"


def test_documents_have_no_bos_and_end_with_the_eod(hf_tokenizer: Path, tmp_path: Path) -> None:
    llama = with_bos(hf_tokenizer, tmp_path / "llama")
    texts = ["Γειά σου", "some text", "a\nb"]
    run_plan(write_jsonl(tmp_path / "texts.jsonl", texts), tmp_path / "data", llama, workers=1)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    found = IndexedDataset(str(tmp_path / "data"))
    for number, text in enumerate(texts):
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert found[number].tolist() == [*plain, tokenizer.eos_token_id]
        assert tokenizer.encode(text) == [tokenizer.bos_token_id, *plain]
