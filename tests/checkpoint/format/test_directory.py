"""Looking up checkpoints, and reading cards."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_moe_lpr.checkpoint.format.card import (
    CheckpointCard,
    EarlierTokenizer,
    ParentCheckpoint,
    read_card,
    tool_versions,
)
from megatron_moe_lpr.checkpoint.format.directory import finish_iteration, resolve_checkpoint, write_latest
from megatron_moe_lpr.errors import UserError

CARD = CheckpointCard("qwen2", [6, 1, 6], 2, "bfloat16", "sha256:0", history=[{"stage": 1, "languages": ["el", "hu"]}])


def make_iteration(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / ".metadata").touch()
    (path / "metadata.json").touch()
    return path


def test_root_means_its_latest_iteration(tmp_path: Path) -> None:
    make_iteration(tmp_path / "release")
    write_latest(tmp_path, None)
    assert resolve_checkpoint(tmp_path).path == tmp_path / "release"
    assert resolve_checkpoint(tmp_path).iteration is None
    finish_iteration(make_iteration(tmp_path / "partial"), tmp_path, 100)
    assert resolve_checkpoint(tmp_path).path == tmp_path / "iter_0000100"
    assert resolve_checkpoint(tmp_path).iteration == 100
    assert resolve_checkpoint(tmp_path / "release").iteration is None
    assert not (tmp_path / "partial").exists()


def test_an_iteration_saved_again_is_replaced(tmp_path: Path) -> None:
    finish_iteration(make_iteration(tmp_path / "a"), tmp_path, 5)
    (tmp_path / "iter_0000005" / "old").touch()
    finish_iteration(make_iteration(tmp_path / "b"), tmp_path, 5)
    assert not (tmp_path / "iter_0000005" / "old").exists()


def test_directories_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        resolve_checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match="no checkpoint here"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(UserError, match="an iteration number or `release`"):
        resolve_checkpoint(tmp_path)
    write_latest(tmp_path, 3)
    with pytest.raises(UserError, match="iter_0000003: no complete checkpoint"):
        resolve_checkpoint(tmp_path)


def test_card_round_trip(tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, tool_versions=tool_versions(), tokenizer_files={"tokenizer.json": "0"})
    card.write(tmp_path / "card.json")
    assert read_card(tmp_path / "card.json") == card
    assert card.is_moe and card.num_experts == 6 and "torch" in card.tool_versions


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "a JSON object"),
        ("{", "not valid JSON"),
        ('{"format_version": 6}', "install a newer"),
        ('{"format_version": 1}', "not a valid card"),
        ('{"format_version": 1, "colour": 3}', "not a valid card"),
    ],
)
def test_bad_cards(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_card(tmp_path / "card.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expansions": [[5, 0]]}, "expansions do not add up"),
        ({"expansions": [[3, 0, 3], [1, 0, 1]]}, "expansions do not add up"),
        ({"expansions": [[3, 0, 3], [2]]}, "expansions cannot be"),
        ({"expansions": [[3, 0, 3], [2, 0, -2]]}, "expansions cannot be"),
        ({"expansions": [[5, 0, 5.0]]}, "expansions cannot be"),
        ({"expansions": [5, 0, 5]}, "expansions cannot be"),
        ({"expansions": None}, "expansions cannot be"),
        ({"openness": 1.5}, "openness cannot be"),
        ({"openness": "1"}, "openness cannot be"),
        ({"openness": True}, "openness cannot be"),
        ({"openness": 0.5}, "openness 0.5 without a second expansion"),
    ],
)
def test_cards_with_invalid_expansions(changes: dict, words: str, tmp_path: Path) -> None:
    dataclasses.replace(CARD, **changes).write(tmp_path / "card.json")
    with pytest.raises(UserError, match=words):
        read_card(tmp_path / "card.json")


def test_card_of_a_second_expansion(tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, expansions=[[3, 0, 1], [2, 0, 4]], openness=0.25)
    card.write(tmp_path / "card.json")
    assert read_card(tmp_path / "card.json") == card


def test_card_of_an_extended_vocabulary(tmp_path: Path) -> None:
    tokenizers = [EarlierTokenizer("aa", ["en", "zh"]), EarlierTokenizer("bb", [])]
    card = dataclasses.replace(CARD, new_tokens=[4000, 0, 200], earlier_tokenizers=tokenizers)
    card.write(tmp_path / "card.json")
    assert read_card(tmp_path / "card.json") == card and card.added_rows == 4200
    assert CARD.new_tokens == [] and CARD.added_rows == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"new_tokens": 5}, "new_tokens cannot be 5"),
        ({"new_tokens": [1, -1]}, "new_tokens cannot be"),
        ({"new_tokens": [1.0]}, "new_tokens cannot be"),
        ({"new_tokens": [2**40]}, "new_tokens cannot be"),
        ({"new_tokens": None}, "new_tokens cannot be"),
        ({"earlier_tokenizers": 5}, "not a valid card"),
        ({"earlier_tokenizers": ["x"]}, "not a valid card"),
        ({"earlier_tokenizers": [{"fingerprint": "aa"}]}, "not a valid card"),
        ({"earlier_tokenizers": [{"fingerprint": "aa", "unchanged": "en"}]}, "not a valid card"),
        ({"earlier_tokenizers": [{"fingerprint": 1, "unchanged": []}]}, "not a valid card"),
    ],
)
def test_cards_with_another_vocabulary(fields: dict, words: str, tmp_path: Path) -> None:
    CARD.write(tmp_path / "card.json")
    changed = json.loads((tmp_path / "card.json").read_text()) | fields
    (tmp_path / "card.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=words):
        read_card(tmp_path / "card.json")


def test_card_of_trained_weights_names_its_parent(tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, parent=ParentCheckpoint("/runs/stage1/iter_0000100", "0a"))
    card.write(tmp_path / "card.json")
    assert read_card(tmp_path / "card.json") == card


@pytest.mark.parametrize("base", ['"here"', "[1]", '{"path": "/a"}', '{"path": 1, "checksum": "0"}'])
def test_a_parent_of_another_form(base: str, tmp_path: Path) -> None:
    CARD.write(tmp_path / "card.json")
    text = (tmp_path / "card.json").read_text().replace('"base": null', f'"base": {base}')
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(UserError, match="not a valid card"):
        read_card(tmp_path / "card.json")
