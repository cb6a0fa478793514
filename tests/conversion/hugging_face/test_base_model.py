"""The base model that a model card names, and references to code and paths that an export leaves out."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from tests.conversion.helpers import UPCYCLED_ELSEWHERE, run
from tests.conversion.tiny_models import load_model, logits
from tests.data.builders import make_hf_tokenizer

Dense = Callable[[str], Path]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PARENT = "some/parent"
CODE = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | fields))


def convert(
    dense: Path, place: Path, *flags: object, experts: int = 3, languages: Sequence[str] = ()
) -> tuple[dict, str]:
    """Import and export; return the metadata and the text of the model card."""
    run("import", "--hf", dense, "--save", place / "save", "--num-experts", experts, "--overwrite", *languages)
    run("export", "--load", place / "save", "--hf", place / "out", "--overwrite", *flags)
    _, front, text = (place / "out" / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture
def fine_tuned(dense_directory: Dense, tmp_path: Path) -> Path:
    """A fine-tuned model whose configuration and model card name its parent, as transformers and the hub write them."""
    dense = Path(shutil.copytree(dense_directory("qwen2"), tmp_path / "my-fine-tune"))
    change_json(dense / "config.json", _name_or_path=PARENT)
    (dense / "README.md").write_text(f"---\nbase_model: {PARENT}\nlicense: mit\n---\n")
    return dense


@pytest.mark.parametrize("experts", [1, 3])
def test_the_parent_of_a_fine_tuned_model_is_not_the_base(experts: int, fine_tuned: Path, tmp_path: Path) -> None:
    metadata, text = convert(fine_tuned, tmp_path, experts=experts)
    assert "base_model" not in metadata and "base_model_relation" not in metadata
    assert PARENT not in text and "my-fine-tune" in text and "--base-model" in text
    assert "_name_or_path" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert convert(fine_tuned, tmp_path, "--base-model", "me/fine")[0]["base_model"] == "me/fine"


@pytest.mark.parametrize(
    ("folder", "name"),
    [("models--some--model-7B", "some/model-7B"), ("models--gpt", "gpt"), ("other--some--model", None)],
)
def test_a_hub_cache_names_model_and_commit(folder: str, name: str | None, fine_tuned: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / folder / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    fine_tuned.rename(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    metadata, text = convert(tmp_path / "link", tmp_path)
    assert metadata.get("base_model") == name
    assert (f"Base model: {name}, commit {COMMIT}" in text) == (name is not None)


def test_a_base_model_stays_known_when_its_export_is_imported_again(fine_tuned: Path, tmp_path: Path) -> None:
    convert(fine_tuned, tmp_path, "--base-model", "me/fine")
    snapshot = tmp_path / "hub" / "models--me--extended" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "out").rename(snapshot)
    metadata, _ = convert(snapshot, tmp_path)
    assert metadata["base_model"] == "me/fine"
    # Fine-tuned by other tools, the export's expert 0 is no longer the base's.
    shutil.rmtree(snapshot / "moe_lpr")
    assert convert(snapshot, tmp_path, languages=UPCYCLED_ELSEWHERE)[0]["base_model"] == "me/extended"


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_code_that_is_not_there_is_not_referred_to(
    name: str, experts: int, dense_directory: Dense, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = Path(shutil.copytree(dense_directory(name), tmp_path / "dense"))
    (dense / "modeling_odd.py").write_text("raise SystemExit('code of the model ran')")
    make_hf_tokenizer(dense)
    leftovers = {"custom_pipelines": {}, "trust_remote_code": True, "quantization_config": None}
    change_json(dense / "config.json", auto_map=CODE, _commit_hash=COMMIT, **leftovers)
    tokenizer_code = {"AutoTokenizer": ["tokenization_odd.OddTokenizer", None]}
    change_json(dense / "tokenizer_config.json", auto_map=tokenizer_code, tokenizer_class="PreTrainedTokenizerFast")
    change_json(dense / "generation_config.json", custom_generate="odd", eos_token_id=5)
    convert(dense, tmp_path, experts=experts)
    assert "note: config.json's auto_map and trust_remote_code names code" in capsys.readouterr().out
    files = ("config.json", "tokenizer_config.json", "generation_config.json")
    exported = {file: json.loads((tmp_path / "out" / file).read_text()) for file in files}
    for fields in exported.values():
        assert not {"auto_map", "custom_generate", "_commit_hash", *leftovers} & fields.keys()
    assert exported["generation_config.json"]["eos_token_id"] == 5
    assert not list((tmp_path / "out").rglob("*.py"))
    assert (logits(load_model(tmp_path / "out")) - logits(load_model(dense_directory(name)))).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("a") == AutoTokenizer.from_pretrained(
        dense, trust_remote_code=False
    ).encode("a")
