"""The demo's base model: its tokenizer in transformers, its card."""

import hashlib
import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BASE = Path(__file__).parents[2] / "data" / "base_model"
TEXT = "In 2024, 12345 don't  \n\n  x  über\t42 % 你好123"


def test_tokenizer_of_the_export_is_the_one_of_training(tmp_path: Path) -> None:
    """The class that the files name exists in transformers 4 too, which has no TokenizersBackend."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BASE / name, tmp_path / name)
    config = json.loads((BASE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_moe"}))
    assert json.loads((BASE / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXT).input_ids
    assert ids == Tokenizer.from_file(str(BASE / "tokenizer.json")).encode(TEXT).ids
    assert tokenizer.decode(ids) == TEXT and tokenizer.eos_token_id == 0


def test_tokenizer_of_the_base_as_the_demo_loads_it() -> None:
    """AutoTokenizer of transformers 5 would encode digits differently, because the model_type is qwen2."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BASE)
    ids = tokenizer(TEXT).input_ids
    assert ids == Tokenizer.from_file(str(BASE / "tokenizer.json")).encode(TEXT).ids
    assert tokenizer.decode(ids) == TEXT and tokenizer.eos_token_id == 0
    for script in (BASE.parents[1] / "examples" / "demo").glob("*.py"):
        assert "AutoTokenizer.from_pretrained" not in script.read_text(), script


def test_card_names_the_tokenizer_files_that_are_there() -> None:
    files = json.loads((BASE / "moe_lpr" / "card.json").read_text())["tokenizer_files"]
    assert files == {name: hashlib.sha256((BASE / name).read_bytes()).hexdigest() for name in files}
