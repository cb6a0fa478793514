"""Token ids of training data equal those of transformers 5 on the export, and of 4 if .venv-transformers4 exists."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, Qwen2Tokenizer

from megatron_moe_lpr.conversion.hugging_face.exported_tokenizer import settle_tokenizer
from megatron_moe_lpr.conversion.hugging_face.tokenizer_check import check_tokenizer
from megatron_moe_lpr.conversion.hugging_face.tokenizer_samples import TEXTS, sample_texts
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from tests.conversion.helpers import run
from tests.conversion.tiny_models import save_model
from tests.data.builders import EOD_TOKEN, make_hf_tokenizer, make_sentencepiece

TRANSFORMERS_4 = Path(__file__).parents[3] / ".venv-transformers4" / "bin" / "python"
LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
BYTE_LEVEL = {"bos_token": EOD_TOKEN, "eos_token": EOD_TOKEN}
ORCA = {"eos_token": "<|im_end|>", "bos_token": "<s>", "unk_token": "<unk>"}
CASES = {
    "tokenizer.model alone": ("mixtral", {}, {}),
    "tokenizer.model, as Vicuna": ("mixtral", {"tokenizer_config.json": {**LLAMA, "legacy": True}}, {}),
    "tokenizer.model, not legacy": ("mixtral", {"tokenizer_config.json": {**LLAMA, "legacy": False}}, {}),
    "tokenizer.model, as OpenOrca": (
        "mixtral",
        {
            "tokenizer_config.json": {**LLAMA, "eos_token": "<|im_end|>"},
            "added_tokens.json": {"<|im_end|>": 1500, "<|im_start|>": 1501},
            "special_tokens_map.json": ORCA,
            "generation_config.json": {"eos_token_id": 1500},
        },
        {},
    ),
    "no class": ("mixtral", {"tokenizer_config.json": {"eos_token": EOD_TOKEN}}, {"special": True}),
    "Llama's class": (
        "mixtral",
        {"tokenizer_config.json": {**LLAMA, **BYTE_LEVEL, "add_prefix_space": True, "legacy": True}},
        {"special": True},
    ),
    "Qwen2's class": ("qwen2_moe", {"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}}, {"special": True}),
    "transformers 5's class": ("qwen3_moe", {"tokenizer_config.json": {"tokenizer_class": "TokenizersBackend"}}, {}),
    "EOD not marked special": (
        "qwen2_moe",
        {"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": EOD_TOKEN}},
        {"special": False},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def settled(request, tmp_path_factory):
    """A directory before and after `settle_tokenizer`, and its warnings."""
    root = tmp_path_factory.mktemp("tokenizer")
    model_type, files, token = CASES[request.param]
    source = root / "source"
    if "tokenizer.model" in request.param:
        make_sentencepiece(source, "bpe")
    else:
        make_hf_tokenizer(source)
        content = json.loads((source / "tokenizer.json").read_text())
        content["added_tokens"][0].update(token)
        (source / "tokenizer.json").write_text(json.dumps(content))
    for name, content in {"config.json": {"model_type": model_type}, **files}.items():
        (source / name).write_text(json.dumps(content))
    shutil.copytree(source, root / "export")
    return source, root / "export", settle_tokenizer(root / "export")


def reference_ids(directory: Path, texts: list[str]) -> list[list[int]]:
    """Encode by the sentencepiece library; other tokenizers by `load_tokenizer`, which has tests of its own."""
    if (directory / "tokenizer.model").is_file():
        return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).encode(texts)
    return load_tokenizer(directory).encode_batch(texts)


def test_ids_of_the_export_are_those_of_training_data(settled):
    source, export, warnings = settled
    assert warnings == []
    texts = sample_texts(load_tokenizer(source))
    theirs = AutoTokenizer.from_pretrained(export)
    expected = reference_ids(source, texts)
    assert load_tokenizer(source).encode_batch(texts) == expected
    assert [theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts] == expected
    tokens = load_tokenizer(source, None, False).encode_batch(texts)
    assert [theirs(text, add_special_tokens=False).input_ids for text in texts] == tokens


def test_data_of_the_source_fits_the_imported_export(settled):
    source, export, _ = settled
    before, after = load_tokenizer(source, EOD_TOKEN), load_tokenizer(export, EOD_TOKEN)
    assert before.fingerprint == after.fingerprint and before.vocab_size == after.vocab_size
    first = {path.name: path.read_bytes() for path in export.iterdir()}
    assert settle_tokenizer(export) == [] and {path.name: path.read_bytes() for path in export.iterdir()} == first


@pytest.mark.skipif(not TRANSFORMERS_4.exists(), reason="no .venv-transformers4, which make test-serving makes")
def test_transformers_4_reads_the_same(settled):
    source, export, _ = settled
    texts = sample_texts(load_tokenizer(source))
    program = (
        "import json, sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "options = {'add_special_tokens': False, 'split_special_tokens': True}; "
        "print(json.dumps([t(text, **options).input_ids for text in json.load(sys.stdin)]))"
    )
    command, environment = [TRANSFORMERS_4, "-c", program, export], os.environ | {"PYTHONPATH": ""}
    given = json.dumps(texts)
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == reference_ids(source, texts)


def test_begin_of_text_stays(tmp_path):
    make_sentencepiece(tmp_path, "bpe")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**LLAMA, "add_eos_token": True}))
    plain = load_tokenizer(tmp_path).encode_batch(["a text"])[0]
    assert settle_tokenizer(tmp_path) == []
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a text").input_ids == [1, *plain, 2]
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")


def test_a_tokenizer_that_its_class_splits_as_its_file_says_stays(tmp_path):
    content = json.loads((make_hf_tokenizer(tmp_path / "base") / "tokenizer.json").read_text())
    merges = [tuple(pair) for pair in content["model"]["merges"]]
    tokens = dict.fromkeys(("eos_token", "pad_token", "unk_token"), EOD_TOKEN)
    Qwen2Tokenizer(vocab=content["model"]["vocab"], merges=merges, **tokens).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "qwen2_moe"}')
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert settle_tokenizer(tmp_path / "hf") == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before


def test_what_import_says(tmp_path):
    assert check_tokenizer(make_hf_tokenizer(tmp_path / "one"), "mixtral") == []
    # Transformers 5 takes Qwen2's own splitting for a dense export, whatever class the file names.
    (line,) = check_tokenizer(tmp_path / "one", "qwen2")
    assert "sample texts other ids" in line and "PreTrainedTokenizerFast.from_pretrained" in line
    make_sentencepiece(tmp_path / "one")
    (tmp_path / "one" / "config.json").write_text('{"eos_token_id": 5}')
    eod, two = check_tokenizer(tmp_path / "one", "mixtral")
    assert "documents end with" in eod and "eos_token_id 5" in eod
    assert f"of {len(TEXTS)} sample texts otherwise than tokenizer.model" in two


def test_import_names_a_tokenizer_that_cannot_be_read(tmp_path):
    assert check_tokenizer(tmp_path, "mixtral") == []
    (tmp_path / "tekken.json").write_text("{}")
    (line,) = check_tokenizer(tmp_path, "mixtral")
    assert "tekken.json is Mistral's own form" in line
    (tmp_path / "tokenizer.model").write_text("none")
    (line,) = check_tokenizer(tmp_path, "mixtral")
    assert "not a SentencePiece model" in line


def test_import_says_that_the_space_before_a_text_is_not_as_in_transformers(tmp_path):
    make_sentencepiece(tmp_path, "bpe")
    for value, expected in ((True, 0), (False, 1)):
        settings = {**LLAMA, "legacy": False, "add_prefix_space": value}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        notes = check_tokenizer(tmp_path, "mixtral")
        assert len(notes) == expected and all("add_prefix_space is false" in note for note in notes)
    ours = load_tokenizer(tmp_path).encode_batch(["a text"])[0]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a text", add_special_tokens=False).input_ids != ours
    # The remedy that the note names.
    theirs.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode_batch(["a text"])[0] == (
        theirs("a text", add_special_tokens=False).input_ids
    )


def test_import_and_export_of_a_sentencepiece_model(tmp_path, capsys):
    save_model("llama", tmp_path / "hf")
    for file in (tmp_path / "hf").glob("tokenizer*"):
        file.unlink()
    make_sentencepiece(tmp_path / "hf", "bpe")
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(LLAMA))
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "moe", "--num-experts", 2)
    run("export", "--load", tmp_path / "moe", "--hf", tmp_path / "out")
    run("import", "--hf", tmp_path / "out", "--save", tmp_path / "again")
    assert "tokenizer" not in capsys.readouterr().err
    source = load_tokenizer(tmp_path / "hf")
    for place in ("moe/release/moe_lpr", "out", "again/release/moe_lpr"):
        assert load_tokenizer(tmp_path / place).fingerprint == source.fingerprint
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = TEXTS[:20]
    assert [theirs(text, add_special_tokens=False).input_ids for text in texts] == source.encode_batch(texts)
