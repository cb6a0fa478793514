"""Tokenizers that the tests of the data room share."""

import pytest

from tests.data.builders import make_hf_tokenizer, make_sentencepiece


@pytest.fixture(scope="session")
def hf_tokenizer(tmp_path_factory):
    """Directory of a small byte-level BPE tokenizer."""
    return make_hf_tokenizer(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory):
    """A small SentencePiece .model."""
    return make_sentencepiece(tmp_path_factory.mktemp("sp"))


@pytest.fixture(params=["hf", "sentencepiece"])
def any_tokenizer(request, hf_tokenizer, sp_model):
    """Each kind of tokenizer in turn."""
    return hf_tokenizer if request.param == "hf" else sp_model
