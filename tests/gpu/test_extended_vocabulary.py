"""An extended vocabulary on the device: the fused loss over both parts, frozen rows and old logits to the bit."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.conversion.verification.verify import random_tokens
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.configuration.parameter_kinds import kind_of
from megatron_moe_lpr.model.forward import compute_logits
from megatron_moe_lpr.model.tensors import is_vocabulary_key
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.stages import STAGES
from tests.conversion.helpers import checkpoint_tensors
from tests.gpu import device
from tests.gpu.inputs import gpu_checkpoint
from tests.gpu.ranks import run
from tests.gpu.test_numerics import BF16, RECIPES
from tests.training.new_rows import extend_checkpoint
from tests.training.runs import metrics, train
from tests.training.test_extended_training import ALL, BASE, NEW_TOKENS, make_data

STEPS = 6
FIELDS = {
    "platform": "cuda",
    "fp32": False,
    **BF16,
    "lr": 1e-3,
    "weight_decay": 0.1,
    "seq_length": 64,
    "micro_batch_size": 4,
    "train_iters": STEPS,
}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CASES = {
    "bf16": (1, {}),
    "fp32, recompute full": (1, {"fp32": True, "bf16": False, "recompute_granularity": "full"}),
    "fp8 tensorwise": (1, RECIPES["tensorwise"]),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "review with the new-token loss, PP2": (2, PP2 | {"stage": "2", "new_token_loss_coeff": 3.0}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path, dict[str, str]]:
    """A tied model, the same with new tokens of two extensions, and data."""
    root = tmp_path_factory.mktemp("vocabulary")
    plain = gpu_checkpoint(root)
    shutil.copytree(plain, root / "extended")
    extend_checkpoint(root / "extended", NEW_TOKENS)
    return plain, root / "extended", make_data(root)


def old_logits(path: Path, bf16: bool, columns: int) -> torch.Tensor:
    platform, layout = select_platform("cuda"), ParallelLayout()
    initialize_parallel(platform, layout)
    model = load_model(path, layout, platform, ComputeOptions(bf16=bf16, fp32=not bf16))
    with torch.no_grad():
        logits = compute_logits(model.chunks, model.config, random_tokens(BASE, 2, 64).to(platform.device), columns)
    return logits[..., :BASE].cpu()


@pytest.mark.parametrize("bf16", [True, False])
def test_old_tokens_keep_their_logits_to_the_bit(bf16, inputs):
    before, after = (run(1, old_logits, path, bf16, size)[0] for path, size in zip(inputs, (BASE, ALL), strict=False))
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", CASES)
def test_only_rows_of_the_latest_extension_train(name, inputs, tmp_path):
    (world, changes), (_, load, data) = CASES[name], inputs
    if device.count() < world:
        pytest.skip(f"needs {world} GPUs")
    run(world, partial(train, **FIELDS | changes), load, tmp_path, data)
    losses = [record["lm_loss"] for _, record in sorted(metrics(tmp_path).items())]
    stage = changes.get("stage", "1")
    assert len(losses) == STEPS and (stage == "2" or losses[-1] < losses[0])
    before, after = checkpoint_tensors(load), checkpoint_tensors(tmp_path)
    for key, tensor in before.items():
        found = after[key][: len(tensor)] if is_vocabulary_key(key) else after[key]
        assert torch.equal(found.to(tensor.dtype), tensor) == (
            kind_of(key, extensions=2) not in STAGES[stage].trains
        ), key
