import json
import shutil

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.errors import UserError
from tests.data.builders import EOD_TOKEN, make_sentencepiece

TEXTS = ["Γειά σου, κόσμε", "a\nb", "😀 zh 中文", "nul\0nul", " two  spaces "]


def test_ids_are_those_of_the_library(hf_tokenizer, sp_model):
    reference = tokenizers.Tokenizer.from_file(str(hf_tokenizer / "tokenizer.json"))
    ours = load_tokenizer(hf_tokenizer)
    assert ours.encode_batch(TEXTS) == [reference.encode(text, add_special_tokens=False).ids for text in TEXTS]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    assert load_tokenizer(sp_model).encode_batch(TEXTS) == [reference.encode(text) for text in TEXTS]


def test_of_several_models_the_one_that_transformers_knows_is_read(sp_model, tmp_path):
    shutil.copy(sp_model, tmp_path / "tokenizer.model")
    make_sentencepiece(tmp_path / "other", "bpe").rename(tmp_path / "another.model")
    assert load_tokenizer(tmp_path).path.name == "tokenizer.model"
    (tmp_path / "tokenizer.model").unlink()
    assert load_tokenizer(tmp_path).path.name == "another.model"


def test_decodes_back(any_tokenizer):
    tokenizer = load_tokenizer(any_tokenizer)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(TEXTS)] == TEXTS


def test_no_special_tokens_no_truncation_no_padding(hf_tokenizer, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(hf_tokenizer / "tokenizer.json"))
    plain = library.encode("some text").ids
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{EOD_TOKEN} $A", special_tokens=[(EOD_TOKEN, library.token_to_id(EOD_TOKEN))]
    )
    library.enable_truncation(2)
    library.enable_padding(length=30)
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, EOD_TOKEN).encode_batch(["some text"]) == [plain]


def test_fingerprint_survives_copies_and_other_spelling(any_tokenizer, hf_tokenizer, tmp_path):
    tokenizer = load_tokenizer(any_tokenizer)
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.fingerprint, copy.eod) == (tokenizer.fingerprint, tokenizer.eod)

    content = json.loads((hf_tokenizer / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 512, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=7, ensure_ascii=True))
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(hf_tokenizer).fingerprint
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).fingerprint != load_tokenizer(hf_tokenizer).fingerprint


def test_eod_is_found(hf_tokenizer, sp_model, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(hf_tokenizer / "tokenizer.json"))
    eod = library.token_to_id(EOD_TOKEN)
    assert load_tokenizer(hf_tokenizer).eod == eod
    assert load_tokenizer(sp_model).eod == sentencepiece.SentencePieceProcessor(model_file=str(sp_model)).eos_id()
    assert load_tokenizer(sp_model, "<s>").eod == 1

    bare = tmp_path / "tokenizer.json"
    library.save(str(bare))
    assert load_tokenizer(bare, "!").eod == library.token_to_id("!")
    with pytest.raises(UserError, match="pass --eod-token"):
        _ = load_tokenizer(bare).eod
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert load_tokenizer(bare).eod == 7
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": EOD_TOKEN}}))
    assert load_tokenizer(bare).eod == eod
    with pytest.raises(UserError, match="not in the vocabulary"):
        _ = load_tokenizer(bare, "<nope>").eod


def test_files_that_disagree_about_the_end_of_a_document(hf_tokenizer, sp_model, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(hf_tokenizer / "tokenizer.json"))
    library.save(str(tmp_path / "tokenizer.json"))
    eod = library.token_to_id(EOD_TOKEN)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "!"}))
    assert load_tokenizer(tmp_path).eod == library.token_to_id("!") and load_tokenizer(tmp_path).eod_note() is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOD_TOKEN}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    note = load_tokenizer(tmp_path).eod_note()
    assert f"documents end with '{EOD_TOKEN}' ({eod})" in note and "config.json has the eos_token_id 7" in note
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, eod]}))
    assert load_tokenizer(tmp_path).eod_note() is None


@pytest.mark.parametrize("special", [True, False])
def test_a_mention_of_a_special_token_is_text(hf_tokenizer, tmp_path, special):
    content = json.loads((hf_tokenizer / "tokenizer.json").read_text())
    content["added_tokens"][0]["special"] = special
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOD_TOKEN}))
    text = f"the token {EOD_TOKEN} ends a text"
    tokenizer = load_tokenizer(tmp_path)
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.eod not in ids and tokenizer.decode(ids) == text and tokenizer.special_tokens == {EOD_TOKEN}
    assert load_tokenizer(tmp_path, None, False).encode_batch([text])[0].count(tokenizer.eod) == 1


def test_sizes(hf_tokenizer, sp_model):
    assert (load_tokenizer(hf_tokenizer).vocab_size, load_tokenizer(sp_model).vocab_size) == (800, 1500)
    assert load_tokenizer(hf_tokenizer).dtype == np.uint16


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not valid JSON"),
        ("tokenizer.json", "[]", "a JSON object is expected"),
        ("tokenizer.json", "{}", "not a tokenizer.json"),
        ("a.model", "text", "not a SentencePiece model"),
        ("other.txt", "", "neither a tokenizer.json nor"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "missing")
