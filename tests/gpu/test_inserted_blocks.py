"""Block expansion on the device, where Transformer Engine keeps a norm inside the linear layer that it precedes."""

from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.conversion.verification.verify_models import verify_checkpoint
from megatron_moe_lpr.model.configuration.parameter_kinds import kind_of
from megatron_moe_lpr.platform import select_platform
from tests.conversion.helpers import checkpoint_tensors
from tests.conversion.helpers import run as convert
from tests.gpu import device
from tests.gpu.inputs import gpu_checkpoint
from tests.gpu.ranks import run
from tests.gpu.test_numerics import BF16, RECIPES
from tests.training.runs import make_data, metrics, train

INSERTED = [2, 5]
STEPS = 6
FIELDS = {
    "platform": "cuda",
    "fp32": False,
    **BF16,
    "lr": 1e-3,
    "seq_length": 64,
    "micro_batch_size": 4,
    "train_iters": STEPS,
}


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Four blocks and two inserted ones, the model they came from, and data."""
    root = tmp_path_factory.mktemp("blocks")
    gpu_checkpoint(root, "qwen3-tied")
    convert("import", "--hf", root / "hf", "--save", root / "grown", "--expand-blocks", 2)
    return root / "grown", root / "hf", make_data(root)


def logits_apart(load: Path, hf: Path) -> float:
    """On the device: largest difference between a checkpoint's logits and transformers' of the dense model."""
    return verify_checkpoint(load, hf, torch.float32, select_platform("cuda"), sequence_length=64).logits


def test_step_0_is_the_dense_model(grown):
    assert run(1, logits_apart, *grown[:2])[0] < 1e-3


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise"])
def test_only_they_train(recipe, grown, tmp_path):
    load, _, data = grown
    run(1, partial(train, **FIELDS, **RECIPES.get(recipe, {})), load, tmp_path, data, "blocks")
    losses = [record["lm_loss"] for _, record in sorted(metrics(tmp_path).items())]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    before, after = checkpoint_tensors(load), checkpoint_tensors(tmp_path)
    for key, tensor in before.items():
        if kind_of(key, INSERTED) != "inserted blocks":
            assert torch.equal(after[key][: len(tensor)], tensor.to(after[key].dtype)), key
        elif not tensor.any():
            assert after[key].any(), key


def test_two_tensor_parallel_ranks_train_as_one(grown, tmp_path):
    if device.count() < 2:
        pytest.skip("needs 2 GPUs")
    load, _, data = grown
    exact = FIELDS | {"fp32": True, "bf16": False, "use_distributed_optimizer": True, "train_iters": 3}
    for ranks in (1, 2):
        layout = {"tensor_model_parallel_size": ranks}
        run(ranks, partial(train, **exact, **layout), load, tmp_path / str(ranks), data, "blocks")
    whole, found = (metrics(tmp_path / str(ranks)) for ranks in (1, 2))
    assert len(found) == 3
    for step, record in found.items():
        for value in ("lm_loss", "grad_norm"):
            assert record[value] == pytest.approx(whole[step][value], rel=1e-4 if device.EMULATED else 1e-3)
