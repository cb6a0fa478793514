"""`verify`, `inspect`, the model card and `expand` where the vocabulary is extended; other sources of an import."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.card import EarlierTokenizer
from megatron_moe_lpr.checkpoint.format.directory import CARD_FILE, resolve_checkpoint
from megatron_moe_lpr.conversion.hugging_face.tokenizer_samples import TEXTS
from megatron_moe_lpr.conversion.verification.verify_models import megatron_forward
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from megatron_moe_lpr.files.checksum_file import write_checksums
from tests.conversion.extended import make_tokenizers, save_with_tokenizer
from tests.conversion.fingerprint import checkpoint_fingerprint
from tests.conversion.helpers import (
    assert_same_tensors,
    checkpoint_tensors,
    hf_tensors,
    perturb,
    rewrite_checkpoint,
    run,
)
from tests.conversion.test_experts import write_adapter
from tests.conversion.tiny_models import load_model, logits, make_model
from tests.data.extended_tokenizers import ROWS

EMBEDDING = "embedding.word_embeddings.weight"
FIRST, SECOND = "embedding.new_word_embeddings.0.weight", "embedding.new_word_embeddings.1.weight"
LEARNED = {"stage": "1", "languages": ["el"], "original_languages": ["en"]}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture
def extended(tmp_path: Path, tokenizers: Path) -> Callable[..., Path]:
    """A function that imports a tiny model with seven new tokens; beside the checkpoint lies the `dense` model."""

    def make(name: str = "qwen2", *flags: object) -> Path:
        dense = save_with_tokenizer(name, tmp_path / "dense", tokenizers)
        flags = flags or ("--num-experts", 3)
        run("import", "--hf", dense, "--save", tmp_path / "first", *flags, "--tokenizer", tokenizers / "first")
        return tmp_path / "first"

    return make


def train(checkpoint: Path) -> None:
    """Change what stage 1 trains, and record it in the card."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        perturb(tensors)
        for key, tensor in tensors.items():
            if ".new_" in key:
                tensors[key] = tensor + 0.1

    rewrite_checkpoint(checkpoint, change)
    change_card(checkpoint, history=[LEARNED], openness=1.0)


def change_card(checkpoint: Path, **changes: object) -> None:
    directory = resolve_checkpoint(checkpoint)
    dataclasses.replace(directory.card(), **changes).write(directory.side_directory / CARD_FILE)
    write_checksums(directory.path, {})


@pytest.mark.parametrize("name", ["qwen2", "qwen3-tied", "llama", "mistral"])
def test_verify(
    name: str, extended: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], cpu_platform: object
) -> None:
    """Against the dense model in its own tokens, and against the export in all of them."""
    checkpoint = extended(name)
    capsys.readouterr()
    run("verify", "--load", checkpoint, "--hf", tmp_path / "dense", "--tolerance", 1e-4)
    printed = capsys.readouterr().out
    assert "logits agree" in printed
    mass = float(re.search(r"mass on new tokens: (\S+) of the probability", printed)[1])
    # Computed from transformers' hidden states and the whole matrix of the export.
    run("export", "--load", checkpoint, "--hf", tmp_path / "hf")
    model, tokenizer = load_model(tmp_path / "hf"), load_tokenizer(tmp_path / "dense")
    ids = [number for text in tokenizer.encode_batch(TEXTS) for number in text]
    tokens = torch.tensor((ids * 9)[:128]).view(2, 64)
    with torch.no_grad():
        expected = model(tokens).logits.softmax(-1)[..., ROWS:].sum(-1).mean()
    assert mass == pytest.approx(expected.item(), rel=0.01) and 0 < mass < 0.5
    train(checkpoint)
    run("export", "--load", checkpoint, "--hf", tmp_path / "hf", "--overwrite")
    capsys.readouterr()
    run("verify", "--load", checkpoint, "--hf", tmp_path / "hf", "--tolerance", 1e-4)
    assert "mass" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["qwen2", "llama3-tied"])
def test_text_without_new_tokens_is_computed_as_before_to_the_bit(
    name: str, extended: Callable[..., Path], tmp_path: Path, cpu_platform
) -> None:
    checkpoint = extended(name)
    run("import", "--hf", tmp_path / "dense", "--save", tmp_path / "plain", "--num-experts", 3)
    tokens = torch.randint(0, ROWS, (2, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before, after = (
            megatron_forward(resolve_checkpoint(path), torch.float32, cpu_platform)(tokens)
            for path in (tmp_path / "plain", checkpoint)
        )
    assert after.logits.shape[-1] == ROWS + 7 and torch.equal(after.logits[..., :ROWS], before.logits)
    assert all(torch.equal(*pair) for pair in zip(before.layers, after.layers, strict=True))


def test_verify_refuses_another_vocabulary(
    extended: Callable[..., Path], tmp_path: Path, tokenizers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = extended()
    run("export", "--load", checkpoint, "--hf", tmp_path / "hf")
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "second", "--tokenizer", tokenizers / "second")
    with pytest.raises(SystemExit):
        run("verify", "--load", tmp_path / "second", "--hf", tmp_path / "hf")
    assert "vocabulary of 106 tokens, the checkpoint has 109" in capsys.readouterr().err


def test_inspect_and_model_card(
    extended: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = extended("qwen2-tied")
    run("export", "--load", checkpoint, "--hf", tmp_path / "hf")
    for directory in (checkpoint, tmp_path / "hf"):
        capsys.readouterr()
        run("inspect", directory)
        printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "vocabulary 99 + 7 new, tied" in printed and "new rows 224" in printed
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "7 new tokens follow the base model's" in text and "It splits en as the base model's does" in text
    run("inspect", checkpoint, "--verify")


def test_expand_with_further_tokens(
    extended: Callable[..., Path], tokenizers: Path, tmp_path: Path, cpu_platform: object
) -> None:
    first, second = extended(), tmp_path / "second"
    train(first)
    flags = ("--add-experts", 2, "--tokenizer", tokenizers / "second")
    run("expand", "--load", first, "--save", second, *flags)
    before, after = checkpoint_tensors(first), checkpoint_tensors(second)
    for key, tensor in before.items():
        if "embedding" in key or "output_layer" in key:
            assert torch.equal(after[key], tensor), key
    pieces = json.loads((tokenizers / "second" / "extension.json").read_text())["pieces"]
    for new, parts, weights in (
        (SECOND, (EMBEDDING, FIRST), (1, 0)),
        ("output_layer.new_rows.1.weight", ("output_layer.weight", "output_layer.new_rows.0.weight"), (0.5, 2)),
    ):
        whole = torch.cat([before[key] for key in parts]).double()
        expected = torch.stack([weights[0] * whole[ids].mean(0) + weights[1] * whole.mean(0) for ids in pieces])
        assert (after[new].double() - expected).abs().max() < 1e-6
    card = resolve_checkpoint(second).card()
    assert card.new_tokens == [7, 3] and checkpoint_fingerprint(second) == card.original_fingerprint
    base, one = (load_tokenizer(tokenizers / name).fingerprint for name in ("base", "first"))
    assert card.earlier_tokenizers == [EarlierTokenizer(base, ["en"]), EarlierTokenizer(one, ["en"])]
    side = resolve_checkpoint(second).side_directory
    assert load_tokenizer(side).fingerprint == load_tokenizer(tokenizers / "second").fingerprint

    train(second)
    run("export", "--load", second, "--hf", tmp_path / "hf")
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "again")
    assert_same_tensors(checkpoint_tensors(tmp_path / "again"), checkpoint_tensors(second))
    assert hf_tensors(tmp_path / "hf")["lm_head.weight"].shape[0] == ROWS + 10
    run("verify", "--load", second, "--hf", tmp_path / "hf", "--tolerance", 1e-4)


def test_expand_without_further_tokens_freezes_those_that_are_there(
    extended: Callable[..., Path], tmp_path: Path, cpu_platform: object
) -> None:
    first, second = extended("qwen2-tied"), tmp_path / "second"
    train(first)
    run("expand", "--load", first, "--save", second, "--add-experts", 2)
    assert resolve_checkpoint(second).card().new_tokens == [7, 0]
    assert torch.equal(checkpoint_tensors(second)[FIRST], checkpoint_tensors(first)[FIRST])
    train(second)
    run("expand", "--load", second, "--save", tmp_path / "third", "--add-experts", 2)
    assert resolve_checkpoint(tmp_path / "third").card().new_tokens == [7, 0]
    run("export", "--load", second, "--hf", tmp_path / "hf")
    run("verify", "--load", second, "--hf", tmp_path / "hf", "--tolerance", 1e-4)
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "again")
    assert resolve_checkpoint(tmp_path / "again").card().new_tokens == [7, 0]
    assert_same_tensors(checkpoint_tensors(tmp_path / "again"), checkpoint_tensors(second))


def test_expand_may_extend_the_vocabulary_for_the_first_time(tokenizers: Path, tmp_path: Path) -> None:
    dense = save_with_tokenizer("llama", tmp_path / "dense", tokenizers)
    run("import", "--hf", dense, "--save", tmp_path / "first", "--num-experts", 3)
    train(tmp_path / "first")
    flags = ("--add-experts", 2, "--tokenizer", tokenizers / "first")
    run("expand", "--load", tmp_path / "first", "--save", tmp_path / "second", *flags)
    assert resolve_checkpoint(tmp_path / "second").card().new_tokens == [7]
    assert checkpoint_tensors(tmp_path / "second")[FIRST].shape == (7, 32)


def test_expand_refuses_a_tokenizer_of_another_model(
    extended: Callable[..., Path], tokenizers: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    first = extended()
    train(first)
    flags = ("expand", "--load", first, "--save", tmp_path / "second", "--add-experts", 2, "--tokenizer")
    assert "extends a vocabulary of 99 ids" in refuse(*flags, tokenizers / "first")
    assert "extension.json: no such file" in refuse(*flags, tokenizers / "base")


def test_an_adapter_and_a_stock_mixture_get_new_tokens_too(tokenizers: Path, tmp_path: Path) -> None:
    """The experts are the source's own; text of old tokens is computed as without the new ones."""
    model = make_model("llama")
    write_adapter(tmp_path / "adapter", model, [0, 2])
    dense = save_with_tokenizer("llama", tmp_path / "dense", tokenizers)
    flags = ("--hf", dense, "--adapter", tmp_path / "adapter")
    run("import", *flags, "--save", tmp_path / "adapted", "--tokenizer", tokenizers / "first")
    run("export", "--load", tmp_path / "adapted", "--hf", tmp_path / "one")
    assert (logits(load_model(tmp_path / "one"))[..., :ROWS] - logits(model)).abs().max() < 1e-4
    run("import", *flags, "--save", tmp_path / "plain")
    run("export", "--load", tmp_path / "plain", "--hf", tmp_path / "stock")
    run("import", "--hf", tmp_path / "stock", "--save", tmp_path / "two", "--tokenizer", tokenizers / "first")
    assert_same_tensors(checkpoint_tensors(tmp_path / "two"), checkpoint_tensors(tmp_path / "adapted"))


def test_inserted_blocks_beside_new_tokens(extended: Callable[..., Path], tmp_path: Path, cpu_platform: object) -> None:
    checkpoint = extended("qwen2", "--expand-blocks", 1)
    run("verify", "--load", checkpoint, "--hf", tmp_path / "dense", "--tolerance", 1e-4)
    run("export", "--load", checkpoint, "--hf", tmp_path / "hf")
    run("import", "--hf", tmp_path / "hf", "--save", tmp_path / "again", "--num-experts", 1)
    assert_same_tensors(checkpoint_tensors(tmp_path / "again"), checkpoint_tensors(checkpoint))


def test_the_form_for_llama_cpp_has_all_rows(extended: Callable[..., Path], tmp_path: Path) -> None:
    run("export", "--load", extended(), "--hf", tmp_path / "hf", "--for", "llama.cpp")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == ROWS + 7
    assert hf_tensors(tmp_path / "hf")["lm_head.weight"].shape == (ROWS + 7, 32)
