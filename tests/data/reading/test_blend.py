import pytest

from megatron_moe_lpr.checkpoint.format.card import EarlierTokenizer
from megatron_moe_lpr.data.reading.blend import parse_blend, parse_split, read_blend
from megatron_moe_lpr.data.reading.config import DataConfig, read_data_sources
from megatron_moe_lpr.errors import UserError
from tests.data.builders import numbered_dataset, write_dataset


@pytest.fixture
def datasets(tmp_path):
    write_dataset(tmp_path / "en", "en", [[1] * 50] * 10)
    write_dataset(tmp_path / "el", "el", [[2] * 10] * 30)
    write_dataset(tmp_path / "el2", "el", [[2] * 10] * 20)
    write_dataset(tmp_path / "other", "el", [[2] * 10] * 20, tokenizer="another-tokenizer")
    write_dataset(tmp_path / "empty", "el", [[]])
    return tmp_path


def sources(datasets, *path, fingerprint=None, **flags):
    path = [str(datasets / part) if part[0].isalpha() else part for part in path]
    return read_data_sources(DataConfig(data_path=path, **flags), fingerprint)


def test_datasets_from_before_a_vocabulary_extension(tmp_path):
    """Accepted where the extension changed none of their documents, also in a blend with new ones."""
    for name, language, tokenizer in (
        ("new", "el", "extended"),
        ("en", "en-US", "base"),
        ("es", "es", "base"),
        ("zh", "zh", "first"),
        ("x", "en", "x"),
    ):
        write_dataset(tmp_path / name, language, [[1] * 9], tokenizer=tokenizer)
    write_dataset(tmp_path / "ends", "en", [[1] * 9], tokenizer="base", eod=5)
    earlier = [EarlierTokenizer("base", ["en"]), EarlierTokenizer("first", ["en", "zh"])]

    def read(names, valid=(), fingerprint="extended"):
        train, other = ([str(tmp_path / name) for name in some] for some in (names, valid))
        return read_data_sources(DataConfig(train, other), fingerprint, (), earlier)

    assert [entry.language for entry in read(["new", "en", "zh"]).train] == ["el", "en-US", "zh"]
    assert len(read(["en"], ["new", "zh"]).valid) == 2
    for names, valid, words in (
        (["new", "es"], [], "es: was made with the tokenizer from before the vocabulary extension, which splits es"),
        (["new"], ["es"], "es: was made with the tokenizer from before the vocabulary extension"),
        (["new", "x"], [], "x: was made with another tokenizer than the checkpoint's"),
        (["new", "ends"], [], "eod is 5"),
    ):
        with pytest.raises(UserError, match=words):
            read(names, valid)
    with pytest.raises(UserError, match="tokenizer is base, but extended"):
        read(["new", "en"], fingerprint=None)


def test_both_forms():
    assert parse_blend(["a", "b.bin", "c"]) == [(None, "a"), (None, "b"), (None, "c")]
    assert parse_blend(["30", "a", "0.5", "b"]) == [(30.0, "a"), (0.5, "b")]
    assert parse_blend([]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["30", "a", "b"], "3 arguments; give either prefixes only or `weight prefix` pairs"),
        (["30", "a", "x", "b"], r"weight 'x' \(of b\) is not a number"),
        (["a", "30"], r"weight 'a' \(of 30\) is not a number"),
        (["0", "a", "1", "b"], r"weight 0 \(of a\) must be above 0"),
        (["-1", "a"], "must be above 0"),
        (["nan", "a"], "must be above 0"),
        (["inf", "a"], "must be above 0"),
    ],
)
def test_weights_that_do_not_parse(arguments, message):
    with pytest.raises(UserError, match="^--data-path: .*" + message):
        parse_blend(arguments)


def test_split():
    assert parse_split("99,1") == ((0.0, 0.99), (0.99, 1.0))
    assert parse_split("8,1,1") == ((0.0, 0.8), (0.8, 0.9))
    for bad in ("", "a,b", "0,1", "1,-1", "1,1,1,1", "nan,1"):
        with pytest.raises(UserError, match="--split"):
            parse_split(bad)


def test_shares(datasets):
    weighted = sources(datasets, "1", "en", "2", "el", "1", "el2", original_languages=["en"])
    el, en = weighted.tokens_by_language(1000)
    assert (el.language, el.is_original, el.fraction, el.tokens, el.tokens_drawn) == ("el", False, 0.75, 500, 750)
    assert (en.language, en.is_original, en.fraction, en.tokens, en.epochs) == ("en", True, 0.25, 500, 0.5)
    # Without weights every token is as likely as any other.
    assert [entry.weight for entry in sources(datasets, "en", "el", "el2").train] == [0.5, 0.3, 0.2]


def test_manifests_with_old_spellings(datasets):
    write_dataset(datasets / "old", "EN", [[1] * 50])
    write_dataset(datasets / "greek", "Greek", [[1] * 50])
    found = sources(datasets, "en", "old", "greek", original_languages=["English"])
    assert found.languages.names == ("el", "en") and found.trained_original == {"en"}


def test_split_gives_documents_and_tokens(datasets):
    split = sources(datasets, "en", "el", split="80,20")
    assert [(entry.first_document, entry.end_document, entry.tokens) for entry in split.train] == [
        (0, 8, 400),
        (0, 24, 240),
    ]
    assert [(entry.first_document, entry.end_document, entry.tokens) for entry in split.valid] == [
        (8, 10, 100),
        (24, 30, 60),
    ]


def test_refusals(datasets):
    def refused(message, *path, **arguments):
        with pytest.raises(UserError, match=message) as error:
            sources(datasets, *path, **arguments)
        assert "\n" not in str(error.value)

    refused("--data-path: give the datasets")
    refused(r"nothing\.json: no such file", "nothing")
    refused("is given twice", "en", "en")
    refused("other: tokenizer is another-tokenizer, but t in .*en", "en", "other")
    refused("en: was made with another tokenizer than the checkpoint's", "en", fingerprint="checkpoint-fingerprint")
    refused("--original-languages enn: no language of this name", "en", "el", original_languages=["enn"])
    refused("empty: no text", "empty")
    refused("no text in documents 10 to 10 of 10, which --split gives it", "en", split="999,1")
    refused("give one of them", "en", split="9,1", valid_data_path=["x"])
    refused("tokenizer", "en", valid_data_path=[str(datasets / "other")])
    sources(datasets, "en", fingerprint="t")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_dataset(datasets, suffix):
    path = datasets / f"en{suffix}"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=rf"en\{suffix}: truncated"):
        sources(datasets, "en")


def test_index_of_another_dataset(datasets):
    numbered_dataset(datasets / "n", "en", 1000, 10)
    content = bytearray((datasets / "n.idx").read_bytes())
    content[18] = 9  # the document count in the header
    (datasets / "n.idx").write_bytes(content)
    with pytest.raises(UserError, match=r"n\.idx"):
        sources(datasets, "n")


def test_weights_that_add_up_to_more_than_a_number_holds_are_refused(tmp_path):
    for name in ("x", "y"):
        write_dataset(tmp_path / name, "el", [[1, 2, 3]])
    with pytest.raises(UserError, match="--data-path: the weights add up to more"):
        read_blend(["1e308", str(tmp_path / "x"), "1e308", str(tmp_path / "y")])
