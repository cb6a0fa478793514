"""Prompts from flags, files and standard input; what a tokenizer makes of them."""

import io
import json
import sys

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.generation.options import PromptOptions
from megatron_moe_lpr.generation.prompts import Request, read_requests
from megatron_moe_lpr.generation.tokens import PromptTokenizer
from tests.generation.builders import TEMPLATE, VOCABULARY, save_with_tokenizer

USER = [{"role": "user", "content": "Γειά"}]


def test_each_source(tmp_path, monkeypatch):
    lines, records, messages = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.json"
    lines.write_text("\ufeffone\u2028still one\r\n\n two \n", encoding="utf-8")
    records.write_text(f'{{"prompt": "Γειά"}}\n{json.dumps({"messages": USER, "tools": [{}]})}\n{json.dumps(USER)}\n')
    messages.write_text(json.dumps({"messages": USER}))
    assert [one.text for one in read_requests(PromptOptions(prompts=lines))] == ["one\u2028still one", " two "]
    found = read_requests(PromptOptions(prompts=records, chat=True))
    assert [one.messages for one in found] == [USER] * 3 and found[1].tools == [{}]
    assert found[0].place == f"{records}:1"
    assert read_requests(PromptOptions(messages=messages))[0].messages == USER
    assert read_requests(PromptOptions(prompt="a\n"))[0].text == "a\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Γειά\n".encode()), encoding="ascii"))
    assert read_requests(PromptOptions(chat=True))[0].messages == [{"role": "user", "content": "Γειά\n"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.txt", b"\n \n", "holds no prompt"),
        ("prompts.txt", b"ab\xff", r"not a text in UTF-8 \(byte 2\)"),
        ("prompts.jsonl", b'{"prompt": "a"}\n{"text": "a"}', r"prompts.jsonl:2: expected \{\"prompt\""),
        ("prompts.jsonl", b"{", "prompts.jsonl:1: not JSON"),
        ("prompts.jsonl", b'{"prompt": "\\ud800"}', "prompts.jsonl:1: not a text in UTF-8"),
        ("messages.json", b"[]", "expected a list of messages"),
        ("messages.json", b'["a"]', "message 1 is not"),
        ("messages.json", b'[{"role": "user", "content": 1}]', "content of message 1"),
        ("messages.json", b'[{"role": "user", "content": null}]', "message 1 has no content"),
        ("messages.json", b'{"messages": [{"role": "user", "content": "a"}], "tools": 1}', "`tools` is not a list"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    flag = name.split(".")[0]
    with pytest.raises(UserError, match=message) as caught:
        read_requests(PromptOptions(**{flag: tmp_path / name}))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_with_tokenizer("qwen2-tied", tmp_path_factory.mktemp("model"))


def test_conversations_go_through_the_template(directory, tmp_path):
    tokenizer = PromptTokenizer(directory)
    ids = tokenizer.encode(Request("x", messages=USER))
    assert tokenizer.decode(ids) == "<|user|>Γειά\n<|assistant|>"
    # A conversation that ends with the model's own words is continued.
    begun = [*USER, {"role": "assistant", "content": "Χαί"}]
    assert tokenizer.decode(tokenizer.encode(Request("x", messages=begun))) == "<|user|>Γειά\n<|assistant|>Χαί"
    for empty in ("", " \n", None, [{"type": "text", "text": ""}]):
        assert tokenizer.encode(Request("x", messages=[*USER, {"role": "assistant", "content": empty}])) == ids
    call = {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    for last, message in (
        ([*USER, call], "x: ends with a tool call"),
        ([{"role": "assistant"}], "an empty answer alone"),
    ):
        with pytest.raises(UserError, match=message):
            tokenizer.encode(Request("x", messages=last))
    assert tokenizer.decode(tokenizer.encode(Request("x", "Γειά"))) == "Γειά"
    (tmp_path / "other.jinja").write_text(
        "{{ messages[0].content }}{% if messages[0].role == 'tool' %}{{ raise_exception('no tool') }}{% endif %}"
    )
    other = PromptTokenizer(directory, tmp_path / "other.jinja")
    assert other.decode(other.encode(Request("x", messages=USER))) == "Γειά"
    with pytest.raises(UserError, match=r"mail.json: --chat-template .*/other.jinja refuses it: no tool"):
        other.encode(Request("mail.json", messages=[{"role": "tool", "content": "a"}]))
    with pytest.raises(UserError, match=r"--chat-template .*/none.jinja: cannot be read: No such file"):
        PromptTokenizer(directory, tmp_path / "none.jinja")
    with pytest.raises(UserError, match="--prompt: the prompt has no token"):
        tokenizer.encode(Request("--prompt", ""))


def test_texts_end_at_every_declared_token_and_answers_at_the_templates(directory, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    tokenizer = PromptTokenizer(copy)
    own = tokenizer._tokenizer.eos_token_id
    assert tokenizer.ends(chat=False) == {7, 9, own}
    assert tokenizer.ends(chat=True) == {7, 9, own, VOCABULARY - 1}
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    assert settings.pop("chat_template") == TEMPLATE
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    bare = PromptTokenizer(copy)
    assert bare.ends(chat=True) == {7, 9, own}
    with pytest.raises(UserError, match="has no chat template; give --chat-template FILE"):
        bare.encode(Request("x", messages=USER))
    with pytest.raises(UserError, match="holds no tokenizer; give --tokenizer"):
        PromptTokenizer(tmp_path)
