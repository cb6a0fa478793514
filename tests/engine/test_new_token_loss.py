"""The new-token loss of a step: which tokens it covers and how it is normalised, against its definition in float64."""

from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.engine.micro_batches import run_micro_batches
from megatron_moe_lpr.engine.optimizer import wrap_data_parallel
from megatron_moe_lpr.engine.options import OptimizerOptions
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from megatron_moe_lpr.training.configuration.stages import StageOptions, freeze
from tests.distributed import rank_pool
from tests.training.new_rows import extend_checkpoint
from tests.training.one_step import LANGUAGE_GROUP, micro_batches
from tests.training.runs import make_checkpoint

BASE, NEW_TOKENS, COEFFICIENT = 99, (13, 21), 3.0
KNOWN = BASE + NEW_TOKENS[0]
"""The rows of the first extension are known tokens to the second."""


def step(path: Path, stage: str) -> tuple[float, list[tuple[torch.Tensor, torch.Tensor]]]:
    """On one rank: the reported loss, and logits and their gradients [batch, sequence, token ids] by micro-batch."""
    platform, layout = select_platform("cpu"), ParallelLayout()
    initialize_parallel(platform, layout)
    coefficients = {"new_token_loss_coeff": COEFFICIENT, "calculate_per_token_loss": True}
    model = load_model(path, layout, platform, ComputeOptions(), **coefficients)
    freeze(model.chunks, StageOptions(stage).resolve(), extensions=len(NEW_TOKENS))
    chunks = wrap_data_parallel(model.chunks, model.config, OptimizerOptions())
    found = []

    def keep(module: torch.nn.Module, arguments: tuple, output: tuple) -> None:
        values = output[0].detach().index_select(-1, module.columns).transpose(0, 1)
        found.append([values])
        output[0].register_hook(
            lambda gradient: found[-1].append(gradient.index_select(-1, module.columns).transpose(0, 1))
        )

    unwrap(chunks[0]).output_layer.register_forward_hook(keep)
    chunks[0].train()
    batches = micro_batches(2, BASE + sum(NEW_TOKENS))
    loss = run_micro_batches(chunks, model.config, batches, LANGUAGE_GROUP).mean
    return loss, [(logits.clone(), gradient.clone()) for logits, gradient in found]


def definition(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed LM loss and summed new-token loss of a micro-batch."""
    probability = logits.log_softmax(-1)
    losses = -probability.gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
    counted = (batch["language"] == 0) & (batch["labels"] < KNOWN)
    new_token_losses = -(1 - probability[..., KNOWN:].exp().sum(-1)).log()
    return (losses * batch["loss_mask"]).sum(), (new_token_losses * counted * batch["loss_mask"]).sum()


@pytest.mark.parametrize(("model", "stage", "experts"), [("qwen2-tied", "2", 5), ("llama", "full", 1)])
def test_gradient_of_a_step_is_that_of_the_definition(model, stage, experts, tmp_path):
    """A model without experts has token tags for this loss alone."""
    path = make_checkpoint(tmp_path, model, experts)
    extend_checkpoint(path, NEW_TOKENS)
    reported, found = rank_pool(1).run(step, path, stage)[0]
    batches = rank_pool(1).run(micro_batches, 2, BASE + sum(NEW_TOKENS))[0]
    tokens = sum(batch["loss_mask"].sum() for batch in batches).double()
    originals = sum((batch["language"] == 0).sum() for batch in batches)
    assert len(found) == len(batches) == 4 and originals > 0
    total = 0.0
    for (logits, gradient), batch in zip(found, batches, strict=True):
        logits = logits.double().requires_grad_()
        loss, new_token_loss = definition(logits, batch)
        (loss + COEFFICIENT * tokens / originals * new_token_loss).backward()
        # The schedule divides by the number of tokens at the end of the step.
        assert torch.allclose(gradient.double(), logits.grad, rtol=1e-4, atol=1e-6)
        total += loss.item()
    assert reported == pytest.approx(total / tokens.item(), rel=1e-6)
