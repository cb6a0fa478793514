"""Stage 1, then stage 2, on a tiny model and three languages with tokens of their own: what the method is for."""

import functools

import pytest

from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, train

EXPANDED = ("el", "hu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Metrics of stage 1 and of stage 2, two ranks sharing the new experts."""
    root = tmp_path_factory.mktemp("method")
    checkpoint, data = make_checkpoint(root, perturbed=False), make_data(root)
    options = {"valid_data_path": list(data.values()), "expert_model_parallel_size": 2, "global_batch_size": 16}
    first = functools.partial(train, checkpoint, root / "1", data, "1", train_iters=60, lr=1e-2, **options)
    second = functools.partial(train, root / "1", root / "2", data, "2", train_iters=60, lr=3e-2, **options)
    rank_pool(2).run(first)
    rank_pool(2).run(second)
    return root / "1", root / "2"


def final(save, language: str) -> dict:
    """Validation record of a language at the end."""
    return metrics(save, f"valid/{language}")[60]


def test_stage_1_learns_the_expanded_languages(runs):
    losses = [record["lm_loss"] for record in metrics(runs[0]).values()]
    assert losses[-1] < 0.7 * losses[0]


def test_review_sends_original_languages_to_the_original_expert(runs):
    before, after = metrics(runs[1])[1], metrics(runs[1])[60]
    assert before["expert0_probability/original"] < 0.5
    assert after["expert0_probability/original"] > 0.9
    assert after["expert0_top_k_share/original"] > 0.99
    assert after["expert0_probability/expanded"] < 0.5
    assert after["lpr_loss"] < 0.2 * before["lpr_loss"]


def test_review_brings_back_the_original_language_and_keeps_the_others(runs):
    assert final(runs[1], "en")["lm_loss"] < final(runs[0], "en")["lm_loss"]
    for language in EXPANDED:
        assert final(runs[1], language)["lm_loss"] < 1.05 * final(runs[0], language)["lm_loss"]
