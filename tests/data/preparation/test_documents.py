from collections import Counter

import pytest

from megatron_moe_lpr.data.preparation.documents import DocumentOptions, read_documents
from megatron_moe_lpr.data.preparation.sources import Block
from megatron_moe_lpr.errors import UserError


def read(lines, plain_text=False, **options):
    counts, first = Counter(), {}
    options = DocumentOptions(**{"language": "en", "stop_on_error": False, **options})
    block = Block("file", lines, 11, 0, plain_text, 0)
    return list(read_documents(block, options, counts, first)), +counts, first


BAD_LINES = [
    (b'{"text": "a"', "malformed", r"malformed JSON"),
    (b'{"text": "a\0"}', "malformed", r"malformed JSON"),
    (b'{"text": "\xff"}', "malformed", r"not UTF-8 \(byte 11 of the line\)"),
    (b"[" * 100_000, "malformed", r"malformed JSON"),
    (b"[1]", "malformed", r"not a JSON object"),
    (b'{"body": "a", "id": 1}', "no_text", r"no text under the key 'text' \(--json-key\): it has body, id"),
    (b'{"text": 1}', "no_text", r"not text"),
    (b'{"text": null}', "no_text", r"not text"),
]


@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES)
def test_bad_line_stops_naming_file_and_line_or_is_counted(line, reason, message):
    lines = b'{"text": "good"}\n' + line + b"\n" + b'{"text": "also"}\n'
    with pytest.raises(UserError, match="^file:12: .*" + message):
        read(lines, stop_on_error=True)
    documents, counts, first = read(lines)
    assert documents == [("en", "good"), ("en", "also")]
    assert counts == {reason: 1} and first[reason].startswith("file:12: ")


def test_line_number_counts_from_the_start_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{}\n{}\n{"text": "x"}\nbad\n')
    block = Block(str(path), b'{"text": "x"}\nbad\n', 1, 6, False, 0)
    with pytest.raises(UserError, match=r"a\.jsonl:4: malformed"):
        list(read_documents(block, DocumentOptions(language="en"), Counter(), {}))


def test_empty_documents_are_counted():
    documents, counts, _ = read(b'\n  \n{"text": ""}\n{"text": " \\n\\u3000"}\n{"text": "x"}\n')
    assert documents == [("en", "x")] and counts == {"empty": 4}


def test_surrogates_emoji_nul_and_byte_order_mark():
    lines = b'\xef\xbb\xbf{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00 \xf0\x9f\x98\x80"}\n{"text": "\\u0000"}\r\n'
    documents, counts, _ = read(lines)
    assert documents == [("en", "a\ufffdb"), ("en", "😀 😀"), ("en", "\0")]
    assert counts == {"kept_with_replaced_surrogates": 1}


def test_plain_text_lines():
    documents, counts, _ = read(b'{"no": json}\r\n\nsecond', plain_text=True)
    assert documents == [("en", '{"no": json}'), ("en", "second")] and counts == {"empty": 1}
    with pytest.raises(UserError, match=r"^file:11: not UTF-8"):
        read(b"\xff\n", plain_text=True, stop_on_error=True)


def test_language_key():
    lines = (
        b'{"text": "a", "lang": "el"}\n{"text": "b", "lang": "zh-Hans"}\n{"text": "c"}\n{"text": "d", "lang": "../x"}\n'
    )
    documents, counts, first = read(lines, language=None, language_key="lang")
    assert documents == [("el", "a"), ("zh-Hans", "b")] and counts == {"no_language": 2}
    assert "--language-key" in first["no_language"]
    lines = b"".join(b'{"text": "a", "lang": "%s"}\n' % name for name in (b"EN", b" eng ", b"English", b"en", b"code"))
    documents, counts, first = read(lines, language=None, language_key="lang")
    assert [language for language, _ in documents] == ["en"] * 4 + ["code"] and not first
    assert counts == {f"kept_with_language_{name}_read_as_en": 1 for name in ("EN", "eng", "English")}
