"""Import with an extended tokenizer, and the export that joins the parts: old rows to the bit, new ones as computed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.card import EarlierTokenizer
from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from tests.conversion.extended import make_tokenizers, save_with_tokenizer
from tests.conversion.fingerprint import checkpoint_fingerprint
from tests.conversion.helpers import (
    assert_same_tensors,
    change_hf,
    checkpoint_tensors,
    hf_tensors,
    rewrite_checkpoint,
    run,
)
from tests.conversion.tiny_models import MODELS, load_model
from tests.data.extended_tokenizers import ROWS, TEXT, extend

EMBEDDING, NEW_EMBEDDING = "embedding.word_embeddings.weight", "embedding.new_word_embeddings.0.weight"
OUTPUT, NEW_OUTPUT = "output_layer.weight", "output_layer.new_rows.0.weight"
TOKENIZERS = ("tokenizer.json", "extension.json")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories `base`, `first` (an extension of it) and `second` (an extension of that)."""
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture
def model(tmp_path: Path, tokenizers: Path) -> Callable[..., Path]:
    """A function that saves a tiny model with the base tokenizer."""

    def get(name: str = "qwen2", dtype: torch.dtype = torch.float32) -> Path:
        return save_with_tokenizer(name, tmp_path / "dense", tokenizers, dtype)

    return get


def means(matrix: torch.Tensor, tokenizer: Path) -> torch.Tensor:
    """The mean of the old tokens' rows for each new token, by a loop in double precision."""
    pieces = json.loads((tokenizer / "extension.json").read_text())["pieces"]
    return torch.stack([sum(matrix[number].double() for number in ids) / len(ids) for ids in pieces])


@pytest.mark.parametrize("name", MODELS)
def test_import_and_export(name: str, model: Callable[..., Path], tokenizers: Path, tmp_path: Path) -> None:
    """Every family, tied and untied: what is read is what was there, and the export holds whole matrices."""
    dense, checkpoint, moe = model(name), tmp_path / "checkpoint", tmp_path / "moe"
    tokenizer = ("--tokenizer", tokenizers / "first")
    run("import", "--hf", dense, "--save", checkpoint, "--num-experts", 3, *tokenizer)
    run("import", "--hf", dense, "--save", tmp_path / "plain", "--num-experts", 3)
    found, plain = checkpoint_tensors(checkpoint), checkpoint_tensors(tmp_path / "plain")
    new = {key: found.pop(key) for key in (NEW_EMBEDDING, NEW_OUTPUT) if key in found}
    assert_same_tensors(found, plain)
    tied = MODELS[name][1].get("tie_word_embeddings", False)
    assert new.keys() == ({NEW_EMBEDDING} if tied else {NEW_EMBEDDING, NEW_OUTPUT})
    assert (new[NEW_EMBEDDING].double() - means(plain[EMBEDDING], tokenizers / "first")).abs().max() < 1e-6
    if not tied:
        rows = plain[OUTPUT].double()
        expected = 0.5 * means(plain[OUTPUT], tokenizers / "first") + 2 * rows.mean(dim=0)
        assert (new[NEW_OUTPUT].double() - expected).abs().max() < 1e-6
    card = resolve_checkpoint(checkpoint).card()
    assert card.new_tokens == [7] and resolve_checkpoint(checkpoint).architecture().vocab_size == ROWS
    assert card.original_fingerprint == resolve_checkpoint(tmp_path / "plain").card().original_fingerprint
    assert checkpoint_fingerprint(checkpoint) == card.original_fingerprint

    run("export", "--load", checkpoint, "--hf", moe)
    assert load_model(moe).config.vocab_size == ROWS + 7
    assert json.loads((moe / "moe_lpr" / "config.json").read_text())["vocab_size"] == ROWS
    whole = hf_tensors(moe)
    assert torch.equal(whole["model.embed_tokens.weight"], torch.cat([found[EMBEDDING], new[NEW_EMBEDDING]]))
    assert tied or torch.equal(whole["lm_head.weight"], torch.cat([found[OUTPUT], new[NEW_OUTPUT]]))
    extended = load_tokenizer(tokenizers / "first")
    assert load_tokenizer(moe).encode_batch([TEXT]) == extended.encode_batch([TEXT])
    for file in TOKENIZERS:
        assert (moe / file).read_bytes() == (tokenizers / "first" / file).read_bytes()

    run("import", "--hf", moe, "--save", tmp_path / "again")
    assert_same_tensors(checkpoint_tensors(tmp_path / "again"), checkpoint_tensors(checkpoint))
    again = resolve_checkpoint(tmp_path / "again").card()
    assert (again.new_tokens, again.earlier_tokenizers) == (card.new_tokens, card.earlier_tokenizers)
    assert again.original_fingerprint == card.original_fingerprint
    run("export", "--load", tmp_path / "again", "--hf", tmp_path / "same")
    assert_same_tensors(hf_tensors(tmp_path / "same"), whole)
    for part in ("config.json", "moe_lpr/config.json", "moe_lpr/card.json"):
        assert (moe / part).read_bytes() == (tmp_path / "same" / part).read_bytes(), part


def test_a_dense_model_with_new_tokens(model: Callable[..., Path], tokenizers: Path, tmp_path: Path) -> None:
    """Dense, exported, and upcycled from the export: the parts stay apart."""
    flags = ("--num-experts", 1, "--tokenizer", tokenizers / "first")
    run("import", "--hf", model(), "--save", tmp_path / "one", *flags)
    run("export", "--load", tmp_path / "one", "--hf", tmp_path / "hf")
    assert load_model(tmp_path / "hf").config.vocab_size == ROWS + 7
    for experts in (1, 3):
        save = tmp_path / f"experts-{experts}"
        run("import", "--hf", tmp_path / "hf", "--save", save, "--num-experts", experts)
        checkpoint = resolve_checkpoint(save)
        assert checkpoint.card().new_tokens == [7] and checkpoint.architecture().vocab_size == ROWS
        found, first = checkpoint_tensors(save), checkpoint_tensors(tmp_path / "one")
        for key in (EMBEDDING, NEW_EMBEDDING, OUTPUT, NEW_OUTPUT):
            assert torch.equal(found[key], first[key])


def test_means_are_rounded_once(model: Callable[..., Path], tokenizers: Path, tmp_path: Path) -> None:
    dense, tokenizer = model("qwen2", torch.bfloat16), tokenizers / "first"
    run("import", "--hf", dense, "--save", tmp_path / "one", "--tokenizer", tokenizer)
    found = checkpoint_tensors(tmp_path / "one")
    expected = means(found[EMBEDDING], tokenizers / "first").to(torch.bfloat16)
    assert found[NEW_EMBEDDING].dtype == torch.bfloat16 and torch.equal(found[NEW_EMBEDDING], expected)


@pytest.mark.parametrize(("base", "trained"), [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_new_rows_of_another_dtype(
    base: torch.dtype, trained: torch.dtype, model: Callable[..., Path], tokenizers: Path, tmp_path: Path
) -> None:
    """One matrix holds both exactly; read back, the dense model's rows have its dtype and fingerprint again."""
    first, moe = tmp_path / "first", tmp_path / "moe"
    flags = ("--num-experts", 3, "--tokenizer", tokenizers / "first")
    run("import", "--hf", model("llama", base), "--save", first, *flags)

    def train(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if ".new_" in key or ".experts." in key:
                tensors[key] = (tensor.float() * 1.01).to(trained)

    rewrite_checkpoint(first, train)
    run("export", "--load", first, "--hf", moe)
    before = checkpoint_tensors(first)
    whole = hf_tensors(moe)["lm_head.weight"]
    assert whole.dtype == torch.float32
    assert torch.equal(whole, torch.cat([before[OUTPUT].float(), before[NEW_OUTPUT].float()]))
    run("import", "--hf", moe, "--save", tmp_path / "again")
    after = checkpoint_tensors(tmp_path / "again")
    for key, tensor in before.items():
        assert torch.equal(after[key].float(), tensor.float()), key
        assert after[key].dtype == tensor.dtype or ".new_" in key, key
    cards = [resolve_checkpoint(path).card() for path in (first, tmp_path / "again")]
    assert cards[0].original_fingerprint == cards[1].original_fingerprint


def test_a_padded_part_is_trimmed(model: Callable[..., Path], tokenizers: Path, tmp_path: Path) -> None:
    run("import", "--hf", model(), "--save", tmp_path / "one", "--num-experts", 1, "--tokenizer", tokenizers / "first")
    run("export", "--load", tmp_path / "one", "--hf", tmp_path / "before")

    def pad(tensors: dict[str, torch.Tensor]) -> None:
        for key in (EMBEDDING, NEW_EMBEDDING, OUTPUT, NEW_OUTPUT):
            tensors[key] = torch.nn.functional.pad(tensors[key], (0, 0, 0, 9), value=9.0)

    rewrite_checkpoint(tmp_path / "one", pad)
    run("export", "--load", tmp_path / "one", "--hf", tmp_path / "after")
    assert_same_tensors(hf_tensors(tmp_path / "before"), hf_tensors(tmp_path / "after"))


def test_the_card_knows_which_datasets_stay_valid(model: Callable[..., Path], tokenizers: Path, tmp_path: Path) -> None:
    """An import of an export may extend the vocabulary again: es was guarded by neither, en by both."""
    flags = ("--num-experts", 1, "--tokenizer", tokenizers / "first")
    run("import", "--hf", model("qwen2-tied"), "--save", tmp_path / "one", *flags)
    base, first = (load_tokenizer(tokenizers / name).fingerprint for name in ("base", "first"))
    assert resolve_checkpoint(tmp_path / "one").card().earlier_tokenizers == [EarlierTokenizer(base, ["en"])]
    run("export", "--load", tmp_path / "one", "--hf", tmp_path / "hf")
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "two", "--tokenizer", tokenizers / "second")
    card = resolve_checkpoint(tmp_path / "two").card()
    assert card.new_tokens == [7, 3]
    assert card.earlier_tokenizers == [EarlierTokenizer(base, ["en"]), EarlierTokenizer(first, ["en"])]
    found = checkpoint_tensors(tmp_path / "two")
    whole = torch.cat([found[EMBEDDING], found[NEW_EMBEDDING]])
    expected = means(whole, tokenizers / "second")
    assert (found["embedding.new_word_embeddings.1.weight"].double() - expected).abs().max() < 1e-6


def test_files_with_the_old_vocabulary_are_left_out(
    model: Callable[..., Path], tokenizers: Path, tmp_path: Path
) -> None:
    dense = model()
    for name in ("vocab.json", "merges.txt", "chat_template.jinja", "LICENSE", "special_tokens_map.json"):
        (dense / name).write_text("{}")
    run("import", "--hf", dense, "--save", tmp_path / "one", "--num-experts", 1, "--tokenizer", tokenizers / "first")
    run("export", "--load", tmp_path / "one", "--hf", tmp_path / "hf")
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    assert {"chat_template.jinja", "LICENSE", "special_tokens_map.json", *TOKENIZERS} <= names
    assert not {"vocab.json", "merges.txt"} & names
    recorded = resolve_checkpoint(tmp_path / "one").card().tokenizer_files
    assert set(recorded) >= {*TOKENIZERS, "chat_template.jinja"} and not {"vocab.json", "LICENSE"} & set(recorded)


def change_record(directory: Path, **fields: object) -> None:
    path = directory / "extension.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: (path / "extension.json").unlink(), "extension.json: no such file"),
        (lambda path: change_record(path, base_vocab_size=98), "records another tokenizer than tokenizer.json"),
        (lambda path: change_record(path, tokenizer_fingerprint="0"), "records another tokenizer than tokenizer.json"),
        (lambda path: change_record(path, base_tokenizer_fingerprint="0" * 64), "extends another tokenizer"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "not a tokenizer.json"),
    ],
)
def test_other_extensions_are_refused(
    spoil: Callable[[Path], None],
    words: str,
    model: Callable[..., Path],
    tokenizers: Path,
    tmp_path: Path,
    refuse: Callable[..., str],
) -> None:
    dense, extended = model(), extend(tokenizers / "base", tmp_path / "extended")
    spoil(extended)
    assert words in refuse("import", "--hf", dense, "--save", tmp_path / "out", "--tokenizer", extended)


def test_an_extension_of_another_size_is_refused(
    model: Callable[..., Path], tokenizers: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    second = tokenizers / "second"
    line = refuse("import", "--hf", model(), "--save", tmp_path / "out", "--tokenizer", second)
    assert "extends a vocabulary of 106 ids" in line and "has 99" in line


def test_an_output_inside_the_tokenizer_is_refused(
    model: Callable[..., Path], tokenizers: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    extended = extend(tokenizers / "base", tmp_path / "extended")
    line = refuse("import", "--hf", model(), "--save", extended / "out", "--tokenizer", extended)
    assert "--save" in line and "--tokenizer" in line


def test_a_card_of_another_model_is_refused(
    model: Callable[..., Path], tokenizers: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    run("import", "--hf", model(), "--save", tmp_path / "one", "--num-experts", 1, "--tokenizer", tokenizers / "first")
    run("export", "--load", tmp_path / "one", "--hf", tmp_path / "hf")
    # As if transformers had cut the vocabulary afterwards.
    change_hf(
        tmp_path / "hf",
        lambda tensors: tensors.update({name: tensors[name][:50].clone() for name in tensors if "lm_head" in name}),
    )
    line = refuse("import", "--hf", tmp_path / "hf", "--save", tmp_path / "two")
    assert "lm_head.weight has shape [50, 32], config.json wants [106, 32]" in line
