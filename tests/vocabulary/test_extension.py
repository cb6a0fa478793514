"""`moe-lpr extend-tokenizer`: old ids and guarded text as before, new tokens for the learned languages."""

import json
import shutil

import pytest
import sentencepiece
from tokenizers import Tokenizer

from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.data.tokenizer_extension import read_extension
from tests.data.builders import EOD_TOKEN, LANGUAGES, corpus_texts, write_jsonl
from tests.vocabulary.builders import (
    ROWS,
    extend,
    ids_of_texts,
    load,
    make_byte_level,
    make_sentencepiece_model,
    make_texts,
)

HARD = [
    "",
    "  two  spaces ",
    "\ttab\n\nline\r\n",
    "12345 6.78",
    "😀é\u0301ﬁ",
    "NUL\0",
    f"see {EOD_TOKEN} <think>",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory, texts):
    """Directories of a byte-level tokenizer and of its extension."""
    root = tmp_path_factory.mktemp("byte-level")
    return make_byte_level(root / "base"), extend(root / "base", root / "extended", texts)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory, texts):
    """Directories of a SentencePiece model and of its extension. It does not know the Georgian letters."""
    root = tmp_path_factory.mktemp("sentencepiece")
    words = ["გამარჯობა მსოფლიო", "ქართული ენა", "მსოფლიო ენა"]
    documents = [
        f"{word} {number} {corpus_texts('valid', 'el')[number % 40][:200]}" for number in range(40) for word in words
    ]
    with_georgian = {**texts, "el": write_jsonl(root / "el.jsonl", documents)}
    return make_sentencepiece_model(root / "base"), extend(root / "base", root / "extended", with_georgian)


@pytest.fixture(params=["byte_level", "byte_fallback"])
def extended(request):
    return request.getfixturevalue(request.param)


def base_ids(base, texts):
    """Ids by the libraries that models' authors use."""
    if (base / "tokenizer.json").is_file():
        return ids_of_texts(load(base), texts)
    return sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model")).encode(texts)


def all_texts():
    return [text for language in LANGUAGES for text in corpus_texts("valid", language)[:30]]


def test_new_tokens_stand_for_the_ids_of_the_base(extended):
    """On text of all languages, learned or not: expanded, the new ids are exactly those of the base tokenizer."""
    base, directory = extended
    record, texts = read_extension(directory), [*HARD, *all_texts()]
    found = ids_of_texts(load(directory), texts)
    for text, old, new in zip(texts, base_ids(base, texts), found, strict=True):
        parts = (record.pieces[one - record.base_vocab_size] if one >= record.base_vocab_size else [one] for one in new)
        assert [number for part in parts for number in part] == old, text
    for language in ("el", "hu"):
        learned = corpus_texts("valid", language)[:30]
        assert sum(map(len, ids_of_texts(load(directory), learned))) < 0.98 * sum(map(len, base_ids(base, learned)))


def test_guarded_documents_are_split_as_before(extended, texts):
    base, directory = extended
    for language in ("en", "es"):
        documents = [json.loads(line)["text"] for line in texts[language].read_text().splitlines()]
        assert ids_of_texts(load(directory), documents) == base_ids(base, documents)
        assert vars(read_extension(directory).guarded[language]) == {"documents": len(documents), "changed": 0}


def test_ids_follow_the_rows_of_the_model(extended):
    base, directory = extended
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    record, tokenizer = read_extension(directory), load(directory)
    assert (record.base_vocab_size, record.new_tokens, len(record.pieces)) == (rows, 120, 120)
    old = load_tokenizer(base)
    kept = {old.token(number): number for number in range(old.vocab_size)}
    ids = tokenizer.get_vocab(with_added_tokens=True)
    assert {token: ids[token] for token in kept} == kept
    assert sorted(ids.values()) == list(range(rows + 120))
    # Without holes the next token that somebody adds gets an id of its own.
    assert tokenizer.add_tokens(["<mine>"]) == 1 and tokenizer.token_to_id("<mine>") == rows + 120


def test_pieces_are_the_bases_own_split_of_a_token(byte_level):
    base, directory = byte_level
    record, old, new = read_extension(directory), load(base), load(directory)
    for place, pieces in enumerate(record.pieces):
        token = new.id_to_token(ROWS + place)
        assert [one.id for one in old.model.tokenize(token)] == pieces and len(pieces) > 1


def test_text_decodes_back(extended):
    base, directory = extended
    tokenizer, texts = load(directory), [*HARD, *all_texts()]
    new, old = ids_of_texts(tokenizer, texts), base_ids(base, texts)
    for text, one, other in zip(texts, new, old, strict=True):
        assert tokenizer.decode(one, skip_special_tokens=False) == load_tokenizer(base).decode(other) == text


def test_reserved_ids_are_never_found_in_text(extended):
    base, directory = extended
    record, tokenizer = read_extension(directory), load(directory)
    first = load_tokenizer(base).vocab_size
    names = [tokenizer.id_to_token(number) for number in range(first, record.base_vocab_size)]
    assert len(names) >= 20 and not any(
        any(first <= one < record.base_vocab_size for one in ids)
        for ids in ids_of_texts(tokenizer, [*names, " ".join(names)])
    )


def test_everything_else_stays(byte_level):
    base, directory = byte_level
    before, after = (json.loads((each / "tokenizer.json").read_text()) for each in (base, directory))
    for name in ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "post_processor"):
        assert before[name] == after[name]
    merges = before["model"].pop("merges"), after["model"].pop("merges")
    assert merges[1][: len(merges[0])] == [list(pair) for pair in merges[0]]
    before["model"].pop("vocab"), after["model"].pop("vocab")
    assert before["model"] == after["model"]
    assert (base / "tokenizer_config.json").read_text() == (directory / "tokenizer_config.json").read_text()


def test_transformers_loads_it(extended):
    import transformers

    base, directory = extended
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    record = read_extension(directory)
    assert len(theirs) == record.vocab_size
    for text in all_texts()[::10]:
        assert theirs(text, add_special_tokens=False).input_ids == ids_of_texts(load(directory), [text])[0]
    if (base / "tokenizer.json").is_file():
        assert theirs.apply_chat_template([{"role": "user", "content": "γεια"}], tokenize=False) == "γεια"
    else:
        assert (theirs("a").input_ids[0], theirs.eos_token) == (1, "</s>")  # the class of such a model adds BOS


def test_datasets_record_the_same_fingerprints(extended):
    base, directory = extended
    record = read_extension(directory)
    assert record.base_tokenizer_fingerprint == load_tokenizer(base).fingerprint
    assert record.tokenizer_fingerprint == load_tokenizer(directory).fingerprint != record.base_tokenizer_fingerprint
    assert load_tokenizer(directory).eod == load_tokenizer(base).eod


def test_unknown_characters_become_tokens(byte_fallback):
    base, directory = byte_fallback
    (before,), (after,) = (ids_of_texts(load(directory), ["ქართული"]), base_ids(base, ["ქართული"]))
    assert len(after) >= 3 * 7 and len(before) <= 3
    new = load(directory).get_vocab().keys() - base_pieces(base)
    assert len(new) == 140 and not any("<0x" in token for token in new)  # 120, and 20 reserved ones


def base_pieces(base):
    model = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    return {model.id_to_piece(number) for number in range(model.vocab_size())}


def test_the_result_does_not_depend_on_workers_nor_on_the_run(byte_level, texts, tmp_path):
    base, directory = byte_level
    again = extend(base, tmp_path / "again", texts, "--workers", "2")
    for file in directory.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_second_extension(byte_level, texts, tmp_path):
    first = byte_level[1]
    second = extend(first, tmp_path / "second", {**texts, "hu": texts["en"], "en": texts["hu"]}, tokens=50)
    record = read_extension(second)
    assert (record.base_vocab_size, record.new_tokens) == (ROWS + 120, 50)
    (earlier,) = record.earlier
    assert earlier == read_extension(first) and record.base_tokenizer_fingerprint == earlier.tokenizer_fingerprint
    documents = [json.loads(line)["text"] for line in texts["hu"].read_text().splitlines()]
    assert ids_of_texts(load(second), documents) == ids_of_texts(load(first), documents)
    assert all(number < ROWS + 120 for pieces in record.pieces for number in pieces)
    third = extend(second, tmp_path / "third", texts, tokens=10)
    assert [one.base_vocab_size for one in read_extension(third).earlier] == [ROWS, ROWS + 120]


def test_whole_words_of_the_vocabulary(texts, tmp_path):
    """Llama 3's form: a pre-token that is a token is taken whole, whatever the merges say."""
    base = make_byte_level(tmp_path / "base", ignore_merges=True)
    directory = extend(base, tmp_path / "extended", texts)
    documents = [json.loads(line)["text"] for line in texts["en"].read_text().splitlines()]
    assert ids_of_texts(load(directory), documents) == ids_of_texts(load(base), documents)
    greek = corpus_texts("valid", "el")[:5]
    assert sum(map(len, ids_of_texts(load(directory), greek))) < 0.9 * sum(map(len, ids_of_texts(load(base), greek)))


def test_documents_that_change_are_counted(byte_level, texts, tmp_path):
    """Guarding only what is frequent lets some documents change, and the record says how many."""
    base = byte_level[0]
    directory = extend(base, tmp_path / "extended", texts, "--guard-min-count", "1000")
    for language, recorded in read_extension(directory).guarded.items():
        documents = [json.loads(line)["text"] for line in texts[language].read_text().splitlines()]
        pairs = zip(ids_of_texts(load(directory), documents), base_ids(base, documents), strict=True)
        assert recorded.changed == sum(new != old for new, old in pairs) > 0


def test_report(byte_level):
    directory = byte_level[1]
    report = json.loads((directory / "extension_report.json").read_text())
    assert set(report["held_out"]) == {"el", "hu", "en", "es"}
    for language, one in report["held_out"].items():
        gain = one["after"]["bytes_per_token"] / one["before"]["bytes_per_token"]
        assert gain == 1 if one["guarded"] and not one["changed"] else gain > 1, language
    steps = {one["new_tokens"]: one["share_of_gain"] for one in report["steps"]}
    assert list(steps) == [30, 60, 90, 120] and steps[120] == pytest.approx(1)
    assert sorted(steps.values()) == list(steps.values()) and steps[30] > 0.25
    assert (directory / "extension_report.svg").read_text().startswith("<svg")


def test_weights_move_tokens_between_languages(byte_level, texts, tmp_path):
    base, equal = byte_level
    greek = extend(base, tmp_path / "greek", texts, "--language-weights", "el=20")
    lengths = [
        {name: sum(map(len, ids_of_texts(load(each), corpus_texts("valid", name)[:20]))) for name in ("el", "hu")}
        for each in (equal, greek)
    ]
    assert lengths[1]["el"] < lengths[0]["el"] and lengths[1]["hu"] > lengths[0]["hu"]


def test_tokenizer_json_beside_a_sentencepiece_model(byte_level, texts, tmp_path):
    """No second tokenizer is carried that would give other ids."""
    base = tmp_path / "base"
    shutil.copytree(byte_level[0], base)
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "README.md"):
        (base / name).write_text("{}")
    directory = extend(base, tmp_path / "extended", texts, tokens=10)
    assert not {"vocab.json", "merges.txt", "tokenizer.model", "README.md"} & {
        file.name for file in directory.iterdir()
    }
    assert isinstance(load(directory), Tokenizer)
