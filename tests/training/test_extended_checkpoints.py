"""Runs on a checkpoint with an extended vocabulary: its datasets, saved and resumed at any layout, only what trains."""

import functools
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.data.tokenizer import load_tokenizer
from tests.conversion.extended import make_tokenizers, save_with_tokenizer
from tests.conversion.fingerprint import checkpoint_fingerprint
from tests.conversion.helpers import checkpoint_tensors, hf_tensors, run
from tests.conversion.tiny_models import COMMON
from tests.data.builders import write_dataset
from tests.data.extended_tokenizers import ROWS
from tests.distributed import rank_pool
from tests.training.outcomes import evaluation_outcome, train_outcome
from tests.training.runs import metrics, rewind, train

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
NEW = ("embedding.new_word_embeddings.0.weight", "output_layer.new_rows.0.weight")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A checkpoint with seven new tokens, and datasets: `el` has them; `en` and `es` are the base tokenizer's, `hu` another's."""
    root = tmp_path_factory.mktemp("extended")
    tokenizers = make_tokenizers(root / "tokenizers")
    layers, COMMON["num_hidden_layers"] = COMMON["num_hidden_layers"], 4
    dense = save_with_tokenizer("llama", root / "hf", tokenizers)
    COMMON["num_hidden_layers"] = layers
    flags = ("--num-experts", 3, "--tokenizer", tokenizers / "first")
    run("import", "--hf", dense, "--save", root / "checkpoint", *flags)
    base, extended = (load_tokenizer(tokenizers / name).fingerprint for name in ("base", "first"))
    data = {
        name: write_dataset(root / name, language, [pattern(start) for start in range(60)], fingerprint)
        for name, language, fingerprint, pattern in (
            ("el", "el", extended, lambda start: [20 + (start + 5 * step) % 86 for step in range(80)]),
            ("en", "en", base, lambda start: [1 + (start + 7 * step) % 40 for step in range(80)]),
            ("es", "es", base, lambda start: [1 + (start + 3 * step) % 40 for step in range(80)]),
            ("hu", "hu", "another", lambda start: [start + 1] * 80),
        )
    }
    return root, data


def stage1(data: dict[str, str], **changes: object) -> dict:
    return {"data_path": [data["el"]], "train_iters": 6, "save_interval": 3, **changes}


@pytest.fixture(scope="module")
def trained(inputs: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of stage 1 at TP2, saved after three and six."""
    root, data = inputs
    save = tmp_path_factory.mktemp("trained") / "run"
    rank_pool(2).run(functools.partial(train, root / "checkpoint", save, data, **stage1(data), **TP2))
    return save


def check_parts(before: Path, after: Path) -> None:
    """New rows have moved; those of the dense model are its own to the bit, whatever the padding."""
    old, new = checkpoint_tensors(before), checkpoint_tensors(after)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert torch.equal(new[key][:ROWS], old[key])
    for key in NEW:
        assert len(new[key]) >= 7 and not torch.equal(new[key][:7], old[key])
    states = {key for key in new if key.startswith("optimizer") and ("embedding" in key or "output_layer" in key)}
    assert states and all(any(part in key for part in NEW) for key in states)


def test_a_run_saves_and_resumes_at_another_layout(
    inputs: tuple[Path, dict[str, str]], trained: Path, tmp_path: Path
) -> None:
    root, data = inputs
    check_parts(root / "checkpoint", trained)
    assert checkpoint_fingerprint(trained) == resolve_checkpoint(root / "checkpoint").card().original_fingerprint
    save = rewind(trained, tmp_path / "run", 3)
    rank_pool(2).run(functools.partial(train, root / "checkpoint", save, data, **stage1(data), **PP2))
    expected, found = metrics(trained), metrics(save)
    for step in (4, 5, 6):
        assert found[step]["lm_loss"] == pytest.approx(expected[step]["lm_loss"], rel=2e-5), step
    for key in NEW:
        one, other = (checkpoint_tensors(path)[key][:7] for path in (trained, save))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    run("inspect", save, "--verify")


def test_only_what_trains(inputs: tuple[Path, dict[str, str]], trained: Path, tmp_path: Path) -> None:
    """New rows are in it, the dense model's are not; read with the parent it is what a whole checkpoint is."""
    root, data = inputs
    save, changes = tmp_path / "run", stage1(data, save_trainable_only=True)
    rank_pool(2).run(functools.partial(train, root / "checkpoint", save, data, **changes, **TP2))
    own = {key for key in checkpoint_tensors(save) if not key.startswith("optimizer")}
    assert set(NEW) <= own and not own & {"embedding.word_embeddings.weight", "output_layer.weight"}
    run("export", "--load", save, "--hf", tmp_path / "hf")
    run("export", "--load", trained, "--hf", tmp_path / "whole")
    one, other = hf_tensors(tmp_path / "hf"), hf_tensors(tmp_path / "whole")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)
    # The import written again does as a parent only if its new rows are not needed from it.
    flags = ("--num-experts", 3, "--seed", 7, "--tokenizer", root / "tokenizers" / "first")
    run("import", "--hf", root / "hf", "--save", tmp_path / "again", *flags)
    run("export", "--load", save, "--hf", tmp_path / "moved", "--base-checkpoint", tmp_path / "again")
    assert all(torch.equal(tensor, one[name]) for name, tensor in hf_tensors(tmp_path / "moved").items())


def test_a_parent_with_another_vocabulary_is_refused(
    inputs: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, data = inputs
    changes = stage1(data, save_trainable_only=True, train_iters=1)
    rank_pool(2).run(functools.partial(train, root / "checkpoint", tmp_path / "run", data, **changes, **TP2))
    run("import", "--hf", root / "hf", "--save", tmp_path / "plain", "--num-experts", 3)
    with pytest.raises(SystemExit):
        run("export", "--load", tmp_path / "run", "--hf", tmp_path / "hf", "--base-checkpoint", tmp_path / "plain")
    assert "its vocabulary has other new tokens" in capsys.readouterr().err


def test_the_review_takes_the_replay_of_a_guarded_language(
    inputs: tuple[Path, dict[str, str]], trained: Path, tmp_path: Path
) -> None:
    """Made with the base tokenizer; of a language that the extension changes, or another tokenizer's, none."""
    _, data = inputs
    review = {"stage": "2", "train_iters": 2, "data_path": [data["en"], data["el"]]}
    rank_pool(2).run(functools.partial(train, trained, tmp_path / "review", data, **review, **TP2))
    for names, words in (
        (("es", "el"), "made with the tokenizer from before the vocabulary extension, which splits es"),
        (("en", "hu"), "hu: was made with another tokenizer than the checkpoint's"),
    ):
        changes = review | {"data_path": [data[name] for name in names]}
        outcome = rank_pool(1).run(functools.partial(train_outcome, trained, tmp_path / "none", data, **changes))[0]
        assert words in outcome


@pytest.mark.parametrize(("name", "words"), [("en", None), ("es", "which splits es otherwise"), ("hu", "another tok")])
def test_evaluation_takes_the_same_datasets(
    name: str, words: str | None, inputs: tuple[Path, dict[str, str]], trained: Path
) -> None:
    data = {"el": inputs[1]["el"], name: inputs[1][name]}
    (outcome,) = rank_pool(1).run(evaluation_outcome, trained, data)
    assert (outcome is None) if words is None else words in outcome
