"""Greedy texts of checkpoints equal those of transformers' `generate` on the export, at every layout."""

import pytest
import torch

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.generation.checkpoint import open_checkpoint_model
from megatron_moe_lpr.generation.options import ModelOptions, SamplingOptions
from megatron_moe_lpr.model.forward import compute_logits
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from tests.distributed import rank_pool
from tests.generation.builders import PROMPTS, by_transformers, continue_prompts, make_models, tokens
from tests.training.new_rows import extend_checkpoint
from tests.training.runs import make_checkpoint

COUNT = 10
LAYOUTS = {
    "one rank": (1, {}),
    "TP2+EP2": (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2 interleaved": (2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
    "DP2, expert TP2": (2, {"expert_tensor_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory, cpu_platform):
    """A checkpoint with a sliding window of 8, and the greedy texts of its export by transformers."""
    checkpoint, exported = make_models(tmp_path_factory.mktemp("mistral"), "mistral")
    return checkpoint, exported, by_transformers(exported, PROMPTS, COUNT)


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_transformers(name, mistral):
    """Prompts of different lengths in batches of three: those in a batch do not change each other."""
    world, layout = LAYOUTS[name]
    checkpoint, _, expected = mistral
    sampling = {"num_tokens_to_generate": COUNT, "inference_max_requests": 3}
    results = rank_pool(world).run(_continued, checkpoint, layout, PROMPTS, sampling)
    for rank, (found, streamed) in enumerate(results):
        assert tokens(found) == expected and not any(one.ended for one in found)
        # Rank 0 alone passes tokens on, in the order of each text.
        per_text = [[token for number, token in streamed if number == text] for text in range(len(PROMPTS))]
        assert per_text == (expected if rank == 0 else [[] for _ in PROMPTS])


def _continued(load, layout, prompts, sampling, ends=frozenset()):
    return continue_prompts(load, layout, prompts, ends, **sampling)


def test_an_end_and_the_positions_stop_a_text_and_no_other(mistral):
    """When the short texts have ended, a long prompt is read on in one piece, over the cache and the window."""
    checkpoint, exported, expected = mistral
    end, long_prompt = expected[1][3], [number * 7 % 700 for number in range(254)]
    (found, streamed), *_ = rank_pool(1).run(
        _continued, checkpoint, {}, [*PROMPTS, long_prompt], {"num_tokens_to_generate": COUNT}, frozenset({end})
    )
    stops = by_transformers(exported, PROMPTS, COUNT, [end]) + by_transformers(exported, [long_prompt], 2, [end])
    assert [[*one.tokens, *[end] * one.ended] for one in found] == stops
    assert found[1].ended and len(found[1].tokens) == expected[1].index(end) < COUNT
    assert not found[-1].ended and len(found[-1].tokens) == 2  # of 256 positions the prompt has 254
    assert end not in [token for _, token in streamed]


def test_the_seed_gives_the_same_text_in_every_batch_and_layout(mistral):
    checkpoint, _, greedy = mistral
    draws = {"num_tokens_to_generate": COUNT, "temperature": 1.5, "top_k": 50, "top_p": 0.95, "seed": 3}
    first = rank_pool(1).run(_continued, checkpoint, {}, PROMPTS, draws)[0][0]
    layout = LAYOUTS["TP2+EP2"][1]
    for found, _ in rank_pool(2).run(_continued, checkpoint, layout, PROMPTS, draws | {"inference_max_requests": 2}):
        assert tokens(found) == tokens(first)
    other = rank_pool(1).run(_continued, checkpoint, {}, PROMPTS, draws | {"seed": 4})[0][0]
    assert tokens(first) != greedy and tokens(first) != tokens(other)


def _until_the_reader_leaves(load, layout) -> str:
    """On every rank: the name of the error that ends a text whose second token cannot be written."""
    shown = []

    def write(number: int, token: int) -> None:
        shown.append(token)
        if len(shown) == 2:
            raise BrokenPipeError

    options = ModelOptions(load=load, fp32=True, layout=ParallelLayout(**layout), platform="cpu")
    with open_checkpoint_model(options) as model:
        model.load()
        try:
            model.generate(PROMPTS, SamplingOptions(num_tokens_to_generate=COUNT), frozenset(), write)
        except (BrokenPipeError, SystemExit) as error:
            return f"{type(error).__name__} {getattr(error, 'code', '')}"
    return "none"


def test_no_rank_waits_when_rank_0_cannot_write(mistral):
    ended = rank_pool(2).run(_until_the_reader_leaves, mistral[0], LAYOUTS["TP2+EP2"][1])
    assert ended == ["BrokenPipeError ", "SystemExit 0"]


def test_a_dense_checkpoint(tmp_path, cpu_platform):
    """Tied embeddings, of which a pipeline's last rank has a copy."""
    checkpoint, exported = make_models(tmp_path, "qwen2-tied", experts=1)
    expected = by_transformers(exported, PROMPTS, COUNT)
    world, layout = LAYOUTS["PP2"]
    for found, _ in rank_pool(world).run(_continued, checkpoint, layout, PROMPTS, {"num_tokens_to_generate": COUNT}):
        assert tokens(found) == expected


def whole_forward(load, prompts: list[list[int]], vocab_size: int) -> list[list[int]]:
    """Greedy continuations by a forward pass over the whole text for each token."""
    platform, layout = select_platform("cpu"), ParallelLayout()
    initialize_parallel(platform, layout)
    model, found = load_model(load, layout, platform), []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(COUNT):
            with torch.no_grad():
                logits = compute_logits(model.chunks, model.config, torch.tensor([text]), vocab_size)
            text.append(int(logits[0, -1].argmax()))
        found.append(text[len(prompt) :])
    return found


def test_an_extended_vocabulary(tmp_path, cpu_platform):
    """New tokens are read and chosen, at the ids that they have."""
    checkpoint = make_checkpoint(tmp_path, "qwen2-tied")
    extend_checkpoint(checkpoint, (13, 21))
    prompts, total = [[5, 100, 30, 130], [98, 99]], 99 + 13 + 21
    expected = rank_pool(1).run(whole_forward, checkpoint, prompts, total)[0]
    for name in ("TP2+EP2", "PP2"):
        world, layout = LAYOUTS[name]
        results = rank_pool(world).run(_continued_without_tokenizer, checkpoint, layout, prompts)
        assert all(found == expected for found in results)
    assert any(token >= 99 for text in expected for token in text)


def _continued_without_tokenizer(load, layout, prompts):
    from megatron_moe_lpr.generation.checkpoint import CheckpointModel

    loader, CheckpointModel._load_tokenizer = CheckpointModel._load_tokenizer, lambda self: None
    try:
        return tokens(continue_prompts(load, layout, prompts, num_tokens_to_generate=COUNT)[0])
    finally:
        CheckpointModel._load_tokenizer = loader
