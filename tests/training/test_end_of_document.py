"""Data whose documents end otherwise than the model's texts is named at the start of a run."""

import json
from types import SimpleNamespace

from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.training.setup import _end_of_document
from tests.data.builders import make_sentencepiece


def test_documents_that_end_otherwise(tmp_path):
    make_sentencepiece(tmp_path, "bpe")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 1500}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = load_tokenizer(tmp_path)
    (note,) = _end_of_document(SimpleNamespace(eod=2), tokenizer)
    assert "documents end with '</s>' (2), the texts of the model with '<|im_end|>' (1500)" in note
    assert _end_of_document(SimpleNamespace(eod=1500), tokenizer) == []
    assert _end_of_document(SimpleNamespace(eod=2), None) == []
