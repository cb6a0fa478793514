"""The probability that new tokens take, in evaluations: equal to a softmax over all logits, at every layout."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from megatron_moe_lpr.checkpoint.loading.model import load_model
from megatron_moe_lpr.evaluation.results import print_evaluation
from megatron_moe_lpr.model.configuration.compute import ComputeOptions
from megatron_moe_lpr.model.forward import compute_logits
from megatron_moe_lpr.parallel.groups import initialize_parallel
from megatron_moe_lpr.parallel.layout import ParallelLayout
from megatron_moe_lpr.platform import select_platform
from tests.data.builders import write_dataset
from tests.distributed import rank_pool
from tests.evaluation.test_evaluate import SEQUENCE, evaluate
from tests.training.new_rows import extend_checkpoint
from tests.training.runs import make_checkpoint

BASE, NEW_TOKENS = 99, (13, 21)
ALL = BASE + sum(NEW_TOKENS)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A checkpoint with new tokens, text of one language with and of one without them, and their token ids."""
    root = tmp_path_factory.mktemp("mass")
    checkpoint = make_checkpoint(root)
    extend_checkpoint(checkpoint, NEW_TOKENS)
    generator = np.random.default_rng(5)
    tokens = {"el": generator.integers(1, ALL, 101).tolist(), "en": generator.integers(1, BASE, 75).tolist()}
    data = {
        language: write_dataset(root / language, language, [ids[:40], ids[40:]]) for language, ids in tokens.items()
    }
    return checkpoint, data, tokens


def by_softmax(path: Path, tokens: list[int], apart: bool) -> tuple[float, float]:
    """Loss and mass on new tokens, from all logits; with `apart` the second document sees nothing of the first."""
    platform, layout = select_platform("cpu"), ParallelLayout()
    initialize_parallel(platform, layout)
    model = load_model(path, layout, platform, ComputeOptions(fp32=True))
    loss = mass = 0.0
    starts = sorted({*range(0, len(tokens) - 1, SEQUENCE), *([40] if apart else []), len(tokens) - 1})
    for start, end in itertools.pairwise(starts):
        window = torch.tensor(tokens[start : end + 1])
        padded = torch.zeros(1, SEQUENCE, dtype=torch.int64)
        padded[0, : len(window) - 1] = window[:-1]
        with torch.no_grad():
            logits = compute_logits(model.chunks, model.config, padded, ALL)[0, : len(window) - 1].double()
        probabilities = logits.softmax(-1)
        mass += float(probabilities[:, BASE:].sum())
        loss -= float(probabilities.gather(1, window[1:, None]).log().sum())
    return loss / (len(tokens) - 1), mass / (len(tokens) - 1)


@pytest.mark.parametrize(
    ("world", "layout", "apart"),
    [
        (1, {}, False),
        (1, {}, True),
        (2, {"tensor_model_parallel_size": 2}, False),
        (2, {"pipeline_model_parallel_size": 2}, False),
        (2, {}, False),
    ],
)
def test_equals_a_softmax_over_all_tokens(world, layout, apart, setting):
    checkpoint, data, tokens = setting
    record = rank_pool(world).run(evaluate, checkpoint, data, layout, ("en",), apart)[0]
    for one in record["datasets"]:
        loss, mass = rank_pool(1).run(by_softmax, checkpoint, tokens[one["language"]], apart)[0]
        assert one["loss"] == pytest.approx(loss, rel=1e-5)
        assert 0.01 < mass < 0.9 and one["new_token_mass"] == pytest.approx(mass, rel=1e-4)


def test_it_is_printed_by_language(setting):
    checkpoint, data, _ = setting
    record = rank_pool(1).run(evaluate, checkpoint, data, {})[0]
    console = Console(file=io.StringIO(), width=150)
    print_evaluation(record, console)
    text = console.file.getvalue()
    assert "mass on new tokens" in text
    for one in record["datasets"]:
        assert f"{one['new_token_mass']:.4f}" in text


def test_a_model_without_new_tokens_has_none(setting, tmp_path):
    plain = make_checkpoint(tmp_path)
    record = rank_pool(1).run(evaluate, plain, {"en": setting[1]["en"]}, {})[0]
    assert [one["new_token_mass"] for one in record["datasets"]] == [None]
