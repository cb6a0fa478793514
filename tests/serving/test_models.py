"""The models to serve: those with new tokens are what transformers and Megatron agree on, and choose new tokens."""

from pathlib import Path

import pytest

from megatron_moe_lpr.data.tokenizer import load_tokenizer
from tests.data.builders import corpus_texts
from tests.serving import models, reference


@pytest.mark.parametrize("served", [served for served in models.MODELS if served.new_tokens], ids=lambda one: one.name)
def test_new_tokens(
    served: models.Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_platform: object
) -> None:
    monkeypatch.setattr(reference, "NEW_TOKENS", 24)
    models.make(served, tmp_path)
    expected = reference.by_transformers(tmp_path / "stock")
    found = reference.by_megatron(tmp_path / "checkpoint", expected, served.vocab_size)
    for one, other in zip(expected, found, strict=True):
        assert one.tokens == other.tokens and one.difference(other) < 1e-4
    assert any(token >= models.SIZES["vocab_size"] for one in expected for token in one.tokens)
    tokenizer = load_tokenizer(tmp_path / "stock")
    text = corpus_texts("valid", "el")[30]
    ids = tokenizer.encode_batch([text])[0]
    assert max(ids) >= models.SIZES["vocab_size"] and tokenizer.decode(ids) == text
    if "llama.cpp" not in served.without:
        assert models.make_for_llama_cpp(tmp_path).is_dir()
