"""The guarantee of a vocabulary extension: text without new tokens has the dense model's hidden states and logits."""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.conversion.verification.verify import random_tokens
from megatron_moe_lpr.model.build import unwrap
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.extended_vocabulary import measure_new_token_mass
from megatron_moe_lpr.model.forward import compute_logits
from megatron_moe_lpr.model.vocabulary import VocabularyLayout
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from tests.conversion.helpers import checkpoint_tensors
from tests.distributed import rank_pool
from tests.training.new_rows import extend_checkpoint
from tests.training.runs import make_checkpoint

BASE, NEW_TOKENS = 99, (13, 21)
ALL = BASE + sum(NEW_TOKENS)
LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2, no SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": False}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
}


@pytest.fixture(scope="module", params=["qwen2-tied", "llama"])
def checkpoints(request, tmp_path_factory) -> tuple[Path, Path]:
    """A dense model, and the same with new tokens."""
    root = tmp_path_factory.mktemp(request.param)
    dense = make_checkpoint(root, request.param, experts=1)
    shutil.copytree(dense, root / "extended")
    extend_checkpoint(root / "extended", NEW_TOKENS)
    return dense, root / "extended"


def forward(path: Path, layout: dict, dtype: torch.dtype, tokens: torch.Tensor, columns: int):
    """Hidden states before the output layer, of the last pipeline rank, and logits."""
    platform, parallel = select_platform("cpu"), ParallelLayout(**layout)
    initialize_parallel(platform, parallel)
    model = load_model(path, parallel, platform, ComputeOptions().with_dtype(dtype))
    hidden = []
    decoder = unwrap(model.chunks[-1]).decoder
    decoder.register_forward_hook(lambda module, inputs, output: hidden.append(output.detach().clone()))
    with torch.no_grad():
        logits = compute_logits(model.chunks, model.config, tokens, columns)
    return hidden[0], logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_old_tokens_are_the_dense_models_to_the_bit(name, dtype, checkpoints):
    world, layout = LAYOUTS[name]
    tokens = random_tokens(BASE, 2, 32)
    before = rank_pool(world).run(forward, checkpoints[0], layout, dtype, tokens, BASE)
    after = rank_pool(world).run(forward, checkpoints[1], layout, dtype, tokens, ALL)
    for (hidden, logits), (other_hidden, other_logits) in zip(before, after, strict=True):
        assert torch.equal(hidden, other_hidden)
        assert other_logits.shape[-1] == ALL and torch.equal(logits, other_logits[..., :BASE])


def test_logits_are_in_the_order_of_token_ids(checkpoints):
    """Of every token, new ones in the text too: the product with one matrix of all rows, at TP1, TP2 and PP2."""
    tokens, tensors = random_tokens(ALL, 2, 32), checkpoint_tensors(checkpoints[1])
    head = "output_layer.weight" in tensors
    keys = (
        ("output_layer.weight", "output_layer.new_rows.{}.weight")
        if head
        else (
            "embedding.word_embeddings.weight",
            "embedding.new_word_embeddings.{}.weight",
        )
    )
    rows = torch.cat([tensors[keys[0]], *(tensors[keys[1].format(number)] for number in (0, 1))])
    hidden, expected = rank_pool(1).run(forward, checkpoints[1], {}, torch.float32, tokens, ALL)[0]
    torch.testing.assert_close(expected, (hidden @ rows.t()).transpose(0, 1), rtol=1e-5, atol=1e-5)
    for world, layout in list(LAYOUTS.values())[1:]:
        for _, logits in rank_pool(world).run(forward, checkpoints[1], layout, torch.float32, tokens, ALL):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_columns_by_hand():
    """5 base rows padded to 8 and 3 new ones padded to 4, on 2 ranks: 4 + 2 columns each."""
    layout = VocabularyLayout((5, 3), (8, 4), 2, (0,))
    assert layout.columns().tolist() == [0, 1, 2, 3, 6, 4, 5, 10]
    assert [layout.unpadded(part, rank) for part in (0, 1) for rank in (0, 1)] == [4, 1, 2, 1]
    assert (layout.width, layout.first_ids, layout.rank_columns) == (6, (0, 5), ((0, 4), (4, 6)))


def measured(logits: torch.Tensor, layout: VocabularyLayout) -> torch.Tensor:
    from megatron.core import parallel_state

    initialize_parallel(select_platform("cpu"), ParallelLayout(tensor_model_parallel_size=layout.ranks))
    rank = parallel_state.get_tensor_model_parallel_rank()
    part = logits[..., rank * layout.width : (rank + 1) * layout.width]
    return measure_new_token_mass(part, layout, parallel_state.get_tensor_model_parallel_group())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_mass_on_new_tokens(ranks, dtype):
    """Against a softmax over all tokens, in more tokens than are computed at a time."""
    layout = VocabularyLayout((5, 3, 4), (8, 4, 4), ranks, (0, 1))
    values = torch.randn(30, 20, 12, generator=torch.Generator().manual_seed(5)).mul(4).to(dtype)
    logits = torch.full((30, 20, layout.width * ranks), torch.finfo(dtype).min, dtype=dtype)
    logits[..., layout.columns()] = values
    expected = values.double().softmax(-1)[..., 5:].sum(-1)
    for mass in rank_pool(ranks).run(measured, logits, layout):
        torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-6)
