"""Streamed pieces make up the text, and no piece has a broken character."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_moe_lpr.generation.streaming import TextStream
from tests.data.builders import make_hf_tokenizer, make_sentencepiece

TEXT = " Γειά σου, 世界 👩‍👩‍👧 e\u0301!\n  two  spaces\tund Umlaute äöü "


@pytest.fixture(scope="module", params=["bytes", "letters", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        from megatron_moe_lpr.data.tokenizer import load_tokenizer

        make_sentencepiece(directory)
        return PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(directory).converted())
    if request.param == "letters":
        make_hf_tokenizer(directory)
        return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    byte_level = Tokenizer(
        models.BPE({letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    byte_level.pre_tokenizer, byte_level.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=byte_level)


@pytest.mark.parametrize("split", [0, 1, 7])
def test_pieces(tokenizer, split):
    """Behind any part of the text as the prompt."""
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    prompt, rest = ids[:split], ids[split:]
    stream = TextStream(tokenizer.decode, prompt)
    pieces = [stream.push(token) for token in rest]
    assert "\ufffd" not in "".join(pieces)
    whole, start = tokenizer.decode(ids), tokenizer.decode(prompt)
    expected = whole[len(start) :] if "\ufffd" not in start else None
    if expected is not None:
        assert "".join([*pieces, stream.finish()]) == expected


def test_bytes_that_are_no_character_come_last(tokenizer):
    ids = tokenizer("ab", add_special_tokens=False).input_ids
    broken = tokenizer("世", add_special_tokens=False).input_ids[:-1]
    stream = TextStream(tokenizer.decode)
    text = "".join([*map(stream.push, [*ids, *broken])])
    assert "\ufffd" not in text and (text + stream.finish()) == tokenizer.decode([*ids, *broken])
