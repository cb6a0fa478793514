"""The converted tokenizer against the sentencepiece library, on the corpus and on texts that are hard to split."""

import json

import pytest
import sentencepiece

from megatron_moe_lpr.data.sentencepiece_conversion import convert_sentencepiece
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.data.tokenizer_settings import AddedToken
from megatron_moe_lpr.errors import UserError
from tests.data.builders import LANGUAGES, corpus_texts, make_sentencepiece

HARD = ["", " ", "  two  spaces ", "\ttab\n\nline", "12345 6.78", "\u2581 x", "😀e\u0301ﬁ", "中文字", "NUL\0", "a" * 50]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_are_those_of_sentencepiece(kind, tmp_path):
    file = make_sentencepiece(tmp_path, kind)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    converted = convert_sentencepiece(file.read_bytes(), [], str(file))
    texts = HARD + [text for language in LANGUAGES for text in corpus_texts("valid", language)[:5]]
    for text in texts:
        ids = converted.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text), text
        assert converted.decode(ids, skip_special_tokens=False) == reference.decode(ids)
    assert converted.get_vocab_size() == reference.vocab_size()


def test_control_and_byte_pieces_are_not_found_in_text(tmp_path):
    file = make_sentencepiece(tmp_path, "bpe")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    converted = convert_sentencepiece(file.read_bytes(), [], str(file))
    converted.encode_special_tokens = True
    for text in ("</s>", "x<s>y", "<unk>", "<0x0A>"):
        assert converted.encode(text, add_special_tokens=False).ids == reference.encode(text)


def test_added_tokens_have_their_ids(tmp_path):
    """OpenOrca's form: the model ends its texts with a token that only the files beside the .model name."""
    file = make_sentencepiece(tmp_path, "bpe")
    plain = load_tokenizer(tmp_path)
    assert plain.eod == 2
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 1500, "<|im_start|>": 1501, "word": 1502}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eod, tokenizer.vocab_size) == (1500, 1503)
    assert tokenizer.special_tokens >= {"<|im_end|>", "<|im_start|>", "</s>"}
    text = "a<|im_end|>b word"
    (ids,) = tokenizer.encode_batch([text])
    assert 1502 in ids and 1500 not in ids  # an ordinary added token is cut out, a special one is text
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    assert 1500 in load_tokenizer(tmp_path, None, False).encode_batch([text])[0]
    assert tokenizer.fingerprint != plain.fingerprint, "the ordinary token changes the ids of texts"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 1500, "<|im_start|>": 1501}))
    assert load_tokenizer(tmp_path).fingerprint == plain.fingerprint, "special tokens do not"
    with pytest.raises(UserError, match=r"tokenizer.model: the added token '<gap>' has the id 1600"):
        convert_sentencepiece(file.read_bytes(), [AddedToken(1600, "<gap>")], str(file))


def test_damaged_companions_are_named(tmp_path):
    make_sentencepiece(tmp_path)
    for name, content, words in (
        ("added_tokens.json", {"a": "b"}, "the id of 'a' cannot be 'b'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder holds 'x', no token"),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"{name}: {words}"):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()
