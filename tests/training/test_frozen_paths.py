"""A float16 model's own bits on every other way to a checkpoint, and where they are no longer its own."""

import dataclasses
import functools
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_moe_lpr.checkpoint.format.directory import resolve_checkpoint
from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.evaluation.checkpoint import EvaluationOptions, evaluate_checkpoint
from megatron_moe_lpr.parallel.layout import ParallelLayout
from tests.conversion.fingerprint import checkpoint_fingerprint
from tests.conversion.helpers import assert_same_tensors, checkpoint_tensors, hf_tensors, rewrite_checkpoint, run
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, rewind, train

ORIGINAL = "Expert 0 and everything outside the mixtures are the base model's own weights."
NOT_ORIGINAL = "Not all of the base model's own weights are in it unchanged."

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
EP2 = {"expert_model_parallel_size": 2, "use_distributed_optimizer": True}
DEFAULT = {"fp32": False, "train_iters": 4, "save_interval": 2}


def to_half(tensors):
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(HALF)


def to_brain(tensors):
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(BRAIN) if tensor.dtype == HALF else tensor


def widened(tensors):
    return {name: tensor.float() for name, tensor in tensors.items()}


def run_pool(*arguments, **changes):
    return rank_pool(2).run(functools.partial(train, *arguments, **DEFAULT | EP2 | changes))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A float16 model, upcycled, and data."""
    root = tmp_path_factory.mktemp("half")
    return make_checkpoint(root, "llama", change=to_half), make_data(root), root


@pytest.fixture(scope="module")
def first(inputs, tmp_path_factory):
    """Its stage 1."""
    checkpoint, data, _ = inputs
    save = tmp_path_factory.mktemp("stage") / "1"
    run_pool(checkpoint, save, data)
    return save


def has_own_bits(path) -> bool:
    return checkpoint_fingerprint(path) == resolve_checkpoint(path).card().original_fingerprint


def exported_card(path, out) -> str:
    run("export", "--load", path, "--hf", out)
    return (out / "README.md").read_text()


def test_it_trains(first):
    losses = [metrics(first)[step]["lm_loss"] for step in (1, 4)]
    assert losses[1] < losses[0]


def test_a_resume_is_exact_to_the_bit(first, inputs, tmp_path):
    checkpoint, data, _ = inputs
    save = rewind(first, tmp_path / "run", 2)
    run_pool(checkpoint, save, data)
    assert_same_tensors(checkpoint_tensors(save), checkpoint_tensors(first))


def test_gradients_and_losses_are_those_of_the_same_values_in_float32(inputs, first, tmp_path):
    """The model computes with the rounded copy that any bf16 run has of these values."""
    checkpoint, data, _ = inputs
    wide = make_checkpoint(tmp_path, "llama")
    rewrite_checkpoint(wide, lambda tensors: tensors.update(widened(checkpoint_tensors(checkpoint))))
    run_pool(wide, tmp_path / "run", data, bf16=True)
    found, expected = metrics(first), metrics(tmp_path / "run")
    for step, record in expected.items():
        assert found[step]["lm_loss"] == record["lm_loss"] and found[step]["grad_norm"] == record["grad_norm"]


def test_the_commands_read_a_checkpoint_of_several_dtypes(first, inputs, tmp_path, capsys):
    """verify compares logits with transformers' own class; inspect names both."""
    run("inspect", first)
    assert "float16; trained weights bfloat16" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    run("export", "--load", first, "--hf", tmp_path / "out")
    run("verify", "--load", first, "--hf", tmp_path / "out", "--platform", "cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", local_files_only=True)
    assert model.dtype == SINGLE
    expected = hf_tensors(tmp_path / "out")["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    found = model.model.layers[0].mlp.experts.gate_up_proj[0][: len(expected)]
    assert expected.dtype == HALF and torch.equal(found, expected.float())


@pytest.mark.parametrize("dtype", [None, SINGLE, BRAIN])
def test_it_evaluates_as_what_it_computes(dtype, first, inputs):
    """The same loss at another layout, and near the last one of training."""
    plan = EvaluationOptions(first, [inputs[1]["el"]], [], 32, 2, dtype == BRAIN, dtype == SINGLE, platform="cpu")
    alone = rank_pool(1).run(evaluated, plan)[0]
    split = rank_pool(2).run(evaluated, dataclasses.replace(plan, layout=ParallelLayout(tensor_model_parallel_size=2)))[
        0
    ]
    assert alone == pytest.approx(split, rel=1e-2 if dtype != SINGLE else 1e-5)
    assert alone == pytest.approx(
        rank_pool(1).run(evaluated, dataclasses.replace(plan, bf16=False, fp32=True))[0], rel=1e-2
    )


def evaluated(plan):
    return evaluate_checkpoint(plan).datasets[0].loss


def test_saved_alone(first, inputs, tmp_path):
    """Chains of checkpoints of trained weights alone: each tensor from the layer that has it, in that one's dtype."""
    checkpoint, data, _ = inputs
    run_pool(checkpoint, tmp_path / "1", data, save_trainable_only=True)
    run_pool(tmp_path / "1", tmp_path / "2", data, "2", save_trainable_only=True)
    run_pool(tmp_path / "1", tmp_path / "whole", data, "2")
    assert has_own_bits(tmp_path / "2") and has_own_bits(tmp_path / "whole")
    assert ORIGINAL in exported_card(tmp_path / "2", tmp_path / "out")
    exported_card(tmp_path / "whole", tmp_path / "other")
    assert_same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(tmp_path / "other"))


def test_after_a_second_expansion(first, inputs, tmp_path):
    """Experts of the first expansion keep the bfloat16 in which they were trained, the dense model float16."""
    _, data, _ = inputs
    run("expand", "--load", first, "--save", tmp_path / "more", "--add-experts", 2)
    run_pool(
        tmp_path / "more", tmp_path / "run", data, fp32=True, data_path=[data["hu"]], allow_original_languages=True
    )
    assert has_own_bits(tmp_path / "more") and has_own_bits(tmp_path / "run")
    tensors, before = checkpoint_tensors(tmp_path / "run"), checkpoint_tensors(tmp_path / "more")
    for part, dtype in ((".earlier.", BRAIN), (".newest.", SINGLE), (".original_expert.", HALF)):
        keys = [key for key in tensors if key.startswith("decoder.") and part in key]
        assert {tensors[key].dtype for key in keys} == {dtype}
        assert dtype == SINGLE or all(torch.equal(tensors[key], before[key]) for key in keys)
    assert ORIGINAL in exported_card(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize(("stage", "options"), [("full", {}), ("1", {"train_embeddings": True})])
def test_where_they_train_the_card_says_so(stage, options, inputs, tmp_path):
    checkpoint, data, _ = inputs
    run_pool(checkpoint, tmp_path / "run", data, stage, save_interval=None, **options)
    assert not has_own_bits(tmp_path / "run")
    text = exported_card(tmp_path / "run", tmp_path / "out")
    assert NOT_ORIGINAL in text and ORIGINAL not in text
    dtypes = {tensor.dtype for name, tensor in hf_tensors(tmp_path / "out").items() if not name.endswith("gate.weight")}
    assert dtypes == ({BRAIN} if stage == "full" else {BRAIN, HALF})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == (
        "bfloat16" if stage == "full" else "float32"
    )


def test_rounded_weights_are_told(inputs, tmp_path, capsys):
    """As versions before format 4 saved them."""
    checkpoint, _, _ = inputs
    shutil.copytree(checkpoint, tmp_path / "old")
    rewrite_checkpoint(tmp_path / "old", to_brain)
    assert not has_own_bits(tmp_path / "old")
    assert NOT_ORIGINAL in exported_card(tmp_path / "old", tmp_path / "out")
    assert "warning: " in (said := capsys.readouterr().out) and "not its own to the bit, though no run has" in said


def test_weights_that_cannot_be_read_end_the_run_in_one_line(inputs, tmp_path):
    """The checkpoint of --load lost a file between loading and the first step: all ranks stop, nothing is written."""
    checkpoint, data, _ = inputs
    shutil.copytree(checkpoint, tmp_path / "moved")
    with pytest.raises(Exception, match=r"moved/release/__0_0.distcp: no such file, but .* should lie there"):
        rank_pool(2).run(losing_its_file, tmp_path / "moved", tmp_path / "run", data)
    assert not list((tmp_path / "run").glob("*iter_*"))


def losing_its_file(load, save, data):
    """On every rank: the tensors' file goes with the first step."""
    from megatron_moe_lpr.training import loop

    step = loop.Trainer.step

    def step_and_lose(self, iterator):
        step(self, iterator)
        torch.distributed.barrier()
        (load / "release" / "__0_0.distcp").unlink(missing_ok=True)
        torch.distributed.barrier()

    loop.Trainer.step = step_and_lose
    try:
        train(load, save, data, **DEFAULT)
    except UserError as error:
        raise RuntimeError(str(error)) from None
    finally:
        loop.Trainer.step = step
