"""Loss masks of conversations: in batches, merged, damaged, shown. The even tokens of these datasets count."""

import re

import numpy as np
import pytest
import torch

from megatron_moe_lpr.commands import inspect_data
from megatron_moe_lpr.data.indexed import open_loss_mask, open_tokens
from megatron_moe_lpr.data.manifest import loss_mask_path, read_manifest
from megatron_moe_lpr.data.preparation.inspection import conversation_text
from megatron_moe_lpr.data.preparation.merging import merge
from megatron_moe_lpr.data.reading.config import DataConfig, read_data_sources
from megatron_moe_lpr.data.reading.datasets import build_validation_datasets
from megatron_moe_lpr.data.reading.document_options import DocumentOptions
from megatron_moe_lpr.data.reading.packed_samples import packing_notes
from megatron_moe_lpr.data.reading.training_dataset import build_training_dataset
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.errors import UserError
from tests.data.builders import numbered_dataset, run_plan, write_dataset
from tests.data.chat import CHATML, make_chat_tokenizer, turns, write_conversations

SEQUENCE = 32


def test_the_mask_of_the_next_token_belongs_to_each_position(tmp_path):
    chat = numbered_dataset(tmp_path / "chat", "el", 1000, 40, chat=True)
    plain = numbered_dataset(tmp_path / "plain", "en", 2000, 40)
    config = DataConfig(data_path=[chat, plain], valid_data_path=[chat], data_cache_path=str(tmp_path / "cache"))
    config.documents = DocumentOptions(pack="concatenate")
    sources = read_data_sources(config)
    dataset = build_training_dataset(sources, config, SEQUENCE, 120)
    languages = set()
    for index in range(120):
        sample = dataset[index]
        is_chat = sample["language"][0] == sources.languages.id("el")
        expected = (sample["labels"] % 2 == 0) | ~is_chat
        assert torch.equal(sample["loss_mask"], expected.float())
        languages.add(bool(is_chat))
    assert languages == {True, False}
    (valid,) = build_validation_datasets(sources, config, SEQUENCE)
    samples = [valid[index] for index in range(len(valid) + 1)]
    masks = torch.cat([sample["loss_mask"] for sample in samples])
    labels = open_tokens(chat, np.int32)[1:]
    assert masks[: len(labels)].tolist() == (labels % 2 == 0).tolist() and not masks[len(labels) :].any()


def test_merging_and_shuffling_keep_masks_and_tokens_together(tmp_path):
    parts = [numbered_dataset(tmp_path / name, "el", 1000, 20, seed, chat=True) for seed, name in enumerate("ab")]
    for name, seed in (("merged", None), ("shuffled", 7)):
        manifest = merge(parts, str(tmp_path / name), shuffle_seed=seed)
        tokens, mask = open_tokens(str(tmp_path / name), np.int32), open_loss_mask(str(tmp_path / name))
        assert mask.tolist() == (tokens % 2 == 0).tolist() and manifest.loss_tokens == mask.sum()
        assert manifest.loss_text_bytes == 3 * mask.sum()
        assert manifest == read_manifest(str(tmp_path / name))
        inspect_data.verify({str(tmp_path / name): manifest})
    plain = numbered_dataset(tmp_path / "plain", "el", 1000, 20)
    with pytest.raises(UserError, match="chat is False, but True in"):
        merge([parts[0], plain], str(tmp_path / "mixed"))
    merge([plain], str(tmp_path / "merged"), overwrite=True)
    assert not loss_mask_path(str(tmp_path / "merged")).exists()


def test_damaged_masks_and_other_templates_are_refused(tmp_path):
    chat = numbered_dataset(tmp_path / "chat", "el", 1000, 20, chat=True, chat_template="one")
    other = numbered_dataset(tmp_path / "other", "en", 2000, 20, chat=True, chat_template="two")
    pairs = numbered_dataset(tmp_path / "pairs", "en", 2000, 20, chat=True)
    plain = numbered_dataset(tmp_path / "plain", "en", 2000, 20)
    for paths in ({"data_path": [chat, other]}, {"data_path": [chat], "valid_data_path": [other]}):
        with pytest.raises(UserError, match="other: chat_template is two, but one in"):
            read_data_sources(DataConfig(**paths))
    read_data_sources(DataConfig(data_path=[chat, pairs, plain]))
    silent = write_dataset(tmp_path / "silent", "el", [[1, 3, 5]], chat=True)
    with pytest.raises(UserError, match="silent: no token of these conversations counts in the loss"):
        read_data_sources(DataConfig(data_path=[silent]))
    mask = loss_mask_path(chat)
    content = mask.read_bytes()
    mask.write_bytes(bytes(1 - byte for byte in content))
    with pytest.raises(UserError, match=r"chat\.loss_mask: damaged"):
        inspect_data.verify({chat: read_manifest(chat)})
    mask.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"chat\.loss_mask: truncated, [\d,]+ bytes instead of"):
        read_manifest(chat)
    mask.unlink()
    with pytest.raises(UserError, match=r"chat\.loss_mask: missing"):
        read_manifest(chat)


def test_inspect_data_marks_what_counts(hf_tokenizer, tmp_path, capsys):
    directory = make_chat_tokenizer(hf_tokenizer, tmp_path / "tokenizer", CHATML)
    source = write_conversations(tmp_path / "a.jsonl", [turns("one", "two", "three", "four [5]")])
    run_plan(source, tmp_path / "x", directory, chat=True)
    inspect_data.main(["--input", str(tmp_path / "x"), "--tokenizer", str(directory), "--verify"])
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert "assistant [[two<|im_end|>]] <|im_start|>user three<|im_end|>" in shown and "[[four [5]<|im_end|>]]" in shown
    tokenizer, manifest = load_tokenizer(directory), read_manifest(str(tmp_path / "x"))
    pair = open_tokens(str(tmp_path / "x"), np.dtype(manifest.dtype)), open_loss_mask(str(tmp_path / "x"))
    text = conversation_text(tokenizer, *pair, has_styles=True)
    assert [text.plain[span.start : span.end] for span in text.spans] == ["two<|im_end|>", "four [5]<|im_end|>"]


def test_an_eod_inside_a_conversation_does_not_end_it(tmp_path):
    """It ends each turn where a template uses it, as Llama's and Mistral's do."""
    prefix = write_dataset(tmp_path / "x", "el", [[5, 0, 6, 7, 0], [8, 0, 9]] * 9, chat=True)
    config = DataConfig(data_path=[prefix], valid_data_path=[prefix], data_cache_path=str(tmp_path / "cache"))
    config.documents = DocumentOptions(True, True, pack="concatenate")
    sources = read_data_sources(config)
    (valid,) = build_validation_datasets(sources, config, SEQUENCE)
    assert valid[0]["document"][:10].tolist() == [0] * 5 + [1] * 3 + [2] * 2
    sample = build_training_dataset(sources, config, SEQUENCE, 2)[0]
    begins = (sample["tokens"] == 5) | (sample["tokens"] == 8)
    begins[0] = False
    assert torch.equal(sample["document"], begins.cumsum(0).int())


def test_conversations_of_which_no_answer_is_left(tmp_path):
    """By --split, and by packing, which cuts at the end; a part of them is in the note."""
    long = [[*range(1, 90, 2), 2], [*range(1, 80, 2), 4]]
    prefix = write_dataset(tmp_path / "long", "el", long, chat=True)
    cache = str(tmp_path / "cache")

    def build(prefix, split=None, pack=None):
        config = DataConfig(data_path=[prefix], split=split, data_cache_path=cache)
        config.documents = DocumentOptions(pack=pack)
        sources = read_data_sources(config)
        build_training_dataset(sources, config, SEQUENCE, 2)
        return build_validation_datasets(sources, config, SEQUENCE)

    with pytest.raises(UserError, match=r"long: none of the conversations has a token .* in its first 33 tokens"):
        build(prefix)
    build(prefix, pack="concatenate")
    # Of the first conversation the only even token is not predicted.
    silent = write_dataset(tmp_path / "silent", "el", [[2, 1, 3], [1, 2, 4], [1, 3, 5]], chat=True)
    with pytest.raises(UserError, match=r"silent: none of the conversations 2 to 3 of 3 has a token that counts"):
        build(silent, "67,33")
    with pytest.raises(UserError, match=r"silent: none of the conversations 2 to 3 of 3 has a token that counts"):
        build(silent, "67,33", "concatenate")
    with pytest.raises(UserError, match=r"silent: none of the conversations 0 to 1 of 3 has a token that counts"):
        build(silent, "34,66")
    sources = read_data_sources(DataConfig(data_path=[write_dataset(tmp_path / "x", "el", [*long, [1, 2]], chat=True)]))
    (note,) = packing_notes(sources.train, SEQUENCE)
    assert "2 of 3 documents are longer than 33 tokens" in note and note.endswith("; of 2 no answer is left")
