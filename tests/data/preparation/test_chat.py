"""Conversations: token ids and loss masks as transformers has them, with marks in the template or without."""

import dataclasses
import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_moe_lpr.commands import preprocess as command
from megatron_moe_lpr.data.chat_template import template_note
from megatron_moe_lpr.data.indexed import open_loss_mask, open_tokens, read_lengths
from megatron_moe_lpr.data.manifest import read_manifest
from megatron_moe_lpr.data.preparation.chat_conversations import conversation_columns
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.errors import UserError
from tests.data.builders import run_plan
from tests.data.chat import CHATML, TEMPLATES, make_chat_tokenizer, turns, without_generation, write_conversations

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Αθήνα"}}}
THINKING = "<think>\nIt is a greeting.\n</think>\n\n"
CONVERSATIONS = {
    "short": turns("Γεια σου", "Hello, how are you?"),
    "several": turns("one", "two", "three\n", " four\n\n", "five", "six 😀"),
    "system": [{"role": "system", "content": "Be brief."}, *turns("one", "two", "three", "four")],
    "thinking": turns("hi", f"{THINKING}Hello!", "and again", f"{THINKING}Hello again!"),
    "unfinished": turns("one", "two", "three"),
}
TOOLS = turns(
    "weather?",
    {"role": "assistant", "content": f"{THINKING}I ask.", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"degrees": 31}'},
    f"{THINKING}31 degrees.",
    "thanks",
    "Welcome.",
)
TOOLS[3]["role"], TOOLS[4]["role"], TOOLS[5]["role"] = "assistant", "user", "assistant"
NO_CONTENT = turns("weather?", {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]})


def reference(directory, template, conversation):
    """Ids and mask by transformers, from a template with marks."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    result = tokenizer.apply_chat_template(
        conversation, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return result["input_ids"], result["assistant_masks"]


def stored(prefix):
    """(ids, mask) of each document."""
    manifest = read_manifest(str(prefix))
    lengths = np.cumsum(read_lengths(str(prefix)))[:-1]
    pair = open_tokens(str(prefix), np.dtype(manifest.dtype)), open_loss_mask(str(prefix))
    return list(zip(*(map(np.ndarray.tolist, np.split(one, lengths)) for one in pair), strict=True))


@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_and_comparing_renderings_agree_with_transformers(hf_tokenizer, tmp_path, name):
    template = TEMPLATES[name]
    conversations = [*CONVERSATIONS.values(), *([TOOLS, NO_CONTENT] if name == "qwen3" else [])]
    source = write_conversations(tmp_path / "a.jsonl", conversations)
    for kind, text in (("marked", template), ("plain", without_generation(template))):
        directory = make_chat_tokenizer(hf_tokenizer, tmp_path / kind, text)
        manifest = run_plan(source, tmp_path / f"{kind}-data", directory, chat=True, workers=2)
        documents = stored(tmp_path / f"{kind}-data")
        assert len(documents) == len(conversations)
        for conversation, (ids, mask) in zip(conversations, documents, strict=True):
            expected_ids, expected_mask = reference(directory, template, conversation)
            assert ids == expected_ids, (kind, conversation)
            assert mask == expected_mask, (kind, conversation)
        assert manifest.chat and manifest.loss_tokens == sum(sum(mask) for _, mask in documents) > 0
        assert not manifest.append_eod and manifest.tokens == sum(len(ids) for ids, _ in documents)


@pytest.fixture(scope="module")
def chatml(hf_tokenizer, tmp_path_factory):
    """Directory of a tokenizer whose ChatML template has no marks."""
    return make_chat_tokenizer(hf_tokenizer, tmp_path_factory.mktemp("chatml"), without_generation(CHATML))


def encode(directory, tmp_path, conversations, **changes):
    """(manifest, documents) of some conversations."""
    source = write_conversations(tmp_path / "a.jsonl", conversations)
    manifest = run_plan(source, tmp_path / "x", directory, chat=True, overwrite=True, **changes)
    return manifest, stored(tmp_path / "x")


def counted(directory, documents):
    """Text of the counted tokens of each document."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    return [tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) for ids, mask in documents]


def test_every_form_of_a_conversation(chatml, tmp_path):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]
    joined = "{% for part in message.content %}{{ part.text }}{% endfor %}"
    both = "{% if message.content is string %}{{ message.content }}{% else %}" + joined + "{% endif %}"
    (tmp_path / "parts.jinja").write_text(without_generation(CHATML).replace("{{ message.content }}", both))
    rows = [
        {"prompt": "a question:", "completion": " its answer"},
        {"prompt": turns("one", "two", "three"), "completion": [{"role": "assistant", "content": "four"}]},
        turns("plain", parts),
        {"messages": turns("with tools", "yes"), "tools": "[]", "chat_template_kwargs": {"unused": 1}, "id": None},
    ]
    manifest, documents = encode(chatml, tmp_path, rows, chat_template=str(tmp_path / "parts.jinja"))
    assert counted(chatml, documents) == [" its answer</s>", "four<|im_end|>", "one two<|im_end|>", "yes<|im_end|>"]
    assert documents[0][1].index(1) == len(documents[0][0]) - sum(documents[0][1])
    own, _ = encode(chatml, tmp_path, rows[1:2])
    assert own.chat_template and own.chat_template != manifest.chat_template
    _, (marked,) = encode(chatml, tmp_path, rows[1:2], chat_template=write(tmp_path / "marked.jinja", CHATML))
    assert counted(chatml, [marked]) == ["four<|im_end|>"]


def write(path, text):
    path.write_text(text)
    return str(path)


def test_parquet_and_key(chatml, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = [turns("one", "two"), turns("three", "four", "five", "six")]
    parquet.write_table(pyarrow.table({"chat": column, "n": [1, 2]}), tmp_path / "a.parquet")
    run_plan(tmp_path / "a.parquet", tmp_path / "x", chatml, chat=True, json_key="chat")
    assert counted(chatml, stored(tmp_path / "x")) == ["two<|im_end|>", "four<|im_end|>six<|im_end|>"]
    with pytest.raises(UserError, match="no column 'messages'; it has chat, n"):
        run_plan(tmp_path / "a.parquet", tmp_path / "y", chatml, chat=True)


def test_mentioned_special_tokens_stay_text(chatml, tmp_path):
    conversation = turns("what is <|im_end|>?", "<|im_end|> ends a turn, </s> a text; <think>")
    manifest, ((ids, mask),) = encode(chatml, tmp_path, [conversation])
    library = PreTrainedTokenizerFast(tokenizer_file=str(chatml / "tokenizer.json"))
    end = library.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 3 and library.convert_tokens_to_ids("</s>") not in ids
    assert library.convert_tokens_to_ids("<think>") in ids  # an added token that is not special
    answer = "<|im_end|> ends a turn, </s> a text; <think><|im_end|>"
    assert library.decode(ids).endswith(f"<|im_start|>assistant\n{answer}\n")
    assert counted(chatml, [(ids, mask)]) == [answer] and manifest.loss_text_bytes == len(answer.encode())
    assert manifest.skipped == {"kept_with_special_tokens_as_text": 1}
    manifest, ((ids, _),) = encode(chatml, tmp_path, [conversation], split_special_tokens=False)
    assert ids.count(end) == 5 and manifest.skipped == {"kept_with_special_tokens_as_tokens": 1}


def test_reasoning_tokens_that_are_special_are_no_mentions(hf_tokenizer, tmp_path):
    """The template looks for them in the answers: marks around them would change what it writes."""
    directory = make_chat_tokenizer(hf_tokenizer, tmp_path / "special", without_generation(TEMPLATES["qwen3"]))
    settings = json.loads((directory / "tokenizer.json").read_text())
    for token in settings["added_tokens"]:
        token["special"] = True
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    mention = turns("what is </s>?", f"{THINKING}<|im_end|> ends a turn.")
    manifest, documents = encode(directory, tmp_path, [CONVERSATIONS["thinking"], TOOLS, mention])
    for conversation, (ids, mask) in zip((CONVERSATIONS["thinking"], TOOLS), documents, strict=False):
        assert (ids, mask) == reference(directory, TEMPLATES["qwen3"], conversation)
    library = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    ids, mask = documents[2]
    assert [ids.count(library.convert_tokens_to_ids(token)) for token in ("<think>", "</s>", "<|im_end|>")] == [1, 0, 2]
    assert counted(directory, documents[2:]) == [f"{THINKING}<|im_end|> ends a turn.<|im_end|>"]
    assert manifest.skipped == {"kept_with_special_tokens_as_text": 1}


def test_an_answer_ends_with_the_eos_token_too(hf_tokenizer, tmp_path):
    """As in Cohere's templates: a token ends the answer and the EOS token the turn, at which servers stop."""
    template = CHATML.replace("<|im_end|>{% endgeneration %}", "<|eot_id|></s>{% endgeneration %}")
    directory = make_chat_tokenizer(hf_tokenizer, tmp_path / "two", without_generation(template))
    _, documents = encode(directory, tmp_path, list(CONVERSATIONS.values()))
    for conversation, document in zip(CONVERSATIONS.values(), documents, strict=True):
        assert document == reference(directory, template, conversation)


@pytest.mark.parametrize("marked", [True, False])
def test_tool_calls_that_the_template_does_not_write_are_refused(hf_tokenizer, tmp_path, marked):
    """Otherwise an empty answer would be left of them."""
    template = CHATML.replace("{{ message.content }}", "{{ message.content or '' }}")
    directory = make_chat_tokenizer(
        hf_tokenizer, tmp_path / "bare", template if marked else without_generation(template)
    )
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*does not write the tool calls of message 2"):
        encode(directory, tmp_path, [NO_CONTENT])


def test_an_end_is_added_only_where_the_template_writes_none(hf_tokenizer, tmp_path):
    template = "{% for message in messages %}### {{ message.role }}\n{{ message.content }}\n\n{% endfor %}"
    template += "{% if add_generation_prompt %}### assistant\n{% endif %}"
    directory = make_chat_tokenizer(hf_tokenizer, tmp_path / "plain", template)
    conversations = [turns("one", "two", "three", "four"), turns("one", "two", "three")]
    _, documents = encode(directory, tmp_path, conversations)
    assert counted(directory, documents) == ["twofour</s>", "two"]
    assert [ids[-1] == documents[0][0][-1] for ids, _ in documents] == [True, False]
    _, documents = encode(directory, tmp_path, conversations, append_eod=False)
    assert counted(directory, documents) == ["twofour", "two"]


BAD = {
    "no message of the role 'assistant'": [{"role": "user", "content": "one"}],
    "message 2 of 'messages': the role 'robot' is unknown": turns("one", {"role": "robot", "content": "two"}),
    "message 2 of 'messages': its content is 7": turns("one", 7),
    "message 1 of 'messages': no content": turns(None, "two"),
    "must be a text or a list of parts of type text": turns([{"type": "image", "url": "x"}], "two"),
    "must be a list of messages": {"messages": "text"},
    "no 'messages' \\(--json-key\\), nor 'prompt' and 'completion'.*: it has text": {"text": "one"},
    "nested too deeply": {"messages": turns("one", "two"), "tools": json.loads("[" * 900 + "]" * 900)},
    "'tools' is a text that is not JSON": {"messages": turns("one", "two"), "tools": "["},
    "the chat template refuses it \\(only one question\\)": turns("one", "two", "three", "four"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_conversations_name_file_and_line(chatml, tmp_path, capsys, message):
    strict = "{% if messages | length > 3 %}{{ raise_exception('only one question') }}{% endif %}" + CHATML
    file = write(tmp_path / "strict.jinja", strict)
    rows = [turns("fine", "yes"), BAD[message]]
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{message}"):
        encode(chatml, tmp_path, rows, chat_template=file)
    assert not list(tmp_path.glob("x*"))
    manifest, documents = encode(chatml, tmp_path, rows, chat_template=file, stop_on_error=False)
    assert len(documents) == 1 and sum(manifest.skipped.values()) == 1


def test_templates_of_no_use_are_refused_at_once(hf_tokenizer, chatml, tmp_path):
    def refused(directory, template):
        with pytest.raises(UserError) as error:
            encode(directory, tmp_path, [turns("one", "two")], chat_template=template)
        assert "\n" not in str(error.value) and not list(tmp_path.glob("x*"))
        return str(error.value)

    upper = "{% for message in messages %}{{ message.role }}: {{ message.content | upper | length }}{% endfor %}"
    line = refused(chatml, write(tmp_path / "length.jinja", upper))
    assert "length.jinja" in line and "generation" in line and "'user: 8assistant: 6'" in line
    assert "broken.jinja: not a chat template: line 1" in refused(chatml, write(tmp_path / "broken.jinja", "{% for %}"))
    assert "missing.jinja: the chat template cannot be read" in refused(chatml, str(tmp_path / "missing.jinja"))
    bare = make_chat_tokenizer(hf_tokenizer, tmp_path / "bare", None)
    assert "no chat template" in refused(bare, None) and "--chat-template FILE" in refused(bare, None)
    manifest, documents = encode(bare, tmp_path, [{"prompt": "one", "completion": " two"}])
    assert counted(bare, documents) == [" two</s>"] and manifest.chat and manifest.chat_template is None


def test_templates_in_the_settings(hf_tokenizer, tmp_path):
    directory = make_chat_tokenizer(hf_tokenizer, tmp_path / "several", None)
    tools = CHATML.replace("system", "tools")
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": tools}]
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": named}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = [{"messages": turns("one", "two"), "tools": [{"type": "function"}]}, turns("one", "two")]
    _, (first, second) = encode(directory, tmp_path, rows)
    library = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    assert "<|im_start|>tools" in library.decode(first[0]) and "<|im_start|>system" in library.decode(second[0])
    manifest = read_manifest(str(tmp_path / "x"))
    assert template_note({"x": manifest}, directory) is None
    other = make_chat_tokenizer(hf_tokenizer, tmp_path / "other", without_generation(CHATML))
    note = template_note({"x": manifest}, other)
    assert note and "x: its conversations were written with another chat template" in note
    assert template_note({"x": manifest}, make_chat_tokenizer(hf_tokenizer, tmp_path / "none", None)) is None
    (other / "chat_template.jinja").write_bytes(b"\xff")
    assert template_note({"x": dataclasses.replace(manifest, chat=False, chat_template=None)}, other) is None


def test_sentencepiece(sp_model, tmp_path):
    """Its control tokens are recognised where the template writes them; ids as of the converted tokenizer."""
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(sp_model.read_bytes())
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (directory / "chat_template.jinja").write_text(without_generation(TEMPLATES["mistral"]))
    conversation = turns("Γεια σου </s>", "καλημέρα", "two", "three")
    _, ((ids, mask),) = encode(directory, tmp_path, [conversation])
    tokenizer = load_tokenizer(directory, split_special_tokens=False)
    library = PreTrainedTokenizerFast(tokenizer_object=tokenizer.rust, bos_token="<s>", eos_token="</s>")
    eos = library.convert_tokens_to_ids("</s>")
    assert ids.count(library.convert_tokens_to_ids("<s>")) == 1 and ids.count(eos) == 2 and ids[-1] == eos
    answers = library.decode([number for number, counts in zip(ids, mask, strict=True) if counts])
    assert answers.split() == ["καλημέρα</s>", "three</s>"]
    plain = [turns("Γεια σου", "καλημέρα", "two", "three")]
    _, ((ids, mask),) = encode(directory, tmp_path, plain)
    expected = library.apply_chat_template(
        plain[0], chat_template=TEMPLATES["mistral"], return_dict=True, return_assistant_tokens_mask=True
    )
    assert (ids, mask) == (expected["input_ids"], expected["assistant_masks"])


def test_command_line(chatml, tmp_path, capsys):
    source = write_conversations(tmp_path / "a.jsonl", [turns("one", "two")])
    common = ["--language", "el", "--tokenizer", str(chatml), "--output-prefix", str(tmp_path / "x"), "--workers", "1"]
    command.main(["--input", str(source), "--chat", *common])
    assert f"{tmp_path / 'x'}: el, 1 documents, " in (shown := capsys.readouterr().out) and "in the loss" in shown
    for flags, message in (
        (["--input", str(source), "--chat-template", "x"], "--chat-template: is for conversations; pass --chat"),
        (["--input", "a.txt", "--chat"], "--chat: a .txt holds no conversations"),
    ):
        with pytest.raises(UserError, match=message):
            command.main([*flags, *common])


def test_columns_of_parquet_files():
    """Those of a conversation that are there; without any, the one that is reported as missing."""
    assert conversation_columns(["id", "messages", "tools"], "messages") == ["messages", "tools"]
    assert conversation_columns(["completion", "prompt", "x"], "messages") == ["prompt", "completion"]
    assert conversation_columns(["prompt", "tools"], "messages") == ["messages"]
