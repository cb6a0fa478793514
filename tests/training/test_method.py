"""Stage 1, then stage 2, on a tiny model and three languages with tokens of their own: what the method is for."""

import functools
from pathlib import Path

import pytest

from tests.conversion.helpers import run
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, train

EXPANDED = ("el", "hu")
STEPS, REVIEW_STEPS = 60, 150


def upcycled(root: Path, data: dict[str, str]) -> Path:
    """A dense model that learned the original language, with experts."""
    dense = make_checkpoint(root, experts=1)
    job = functools.partial(train, dense, root / "full", data, "full", data_path=[data["en"]], **OPTIONS, lr=1e-2)
    rank_pool(1).run(job)
    run("export", "--load", root / "full", "--hf", root / "base")
    run("import", "--hf", root / "base", "--save", root / "moe", "--num-experts", 5)
    return root / "moe"


OPTIONS = {"train_iters": STEPS, "micro_batch_size": 8, "global_batch_size": 16, "log_interval": STEPS // 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of stage 1 and stage 2, two ranks sharing the new experts."""
    root = tmp_path_factory.mktemp("method")
    data = make_data(root)
    options = OPTIONS | {"valid_data_path": list(data.values()), "expert_model_parallel_size": 2}
    checkpoint = upcycled(root, data)
    rank_pool(2).run(functools.partial(train, checkpoint, root / "1", data, "1", lr=1e-2, **options))
    options |= {"train_iters": REVIEW_STEPS}
    rank_pool(2).run(functools.partial(train, root / "1", root / "2", data, "2", lr=3e-2, **options))
    return root / "1", root / "2"


def final(save: Path, language: str) -> dict:
    """Validation record of a language at the end."""
    records = metrics(save, f"valid/{language}")
    return records[max(records)]


def test_stage_1_learns_the_expanded_languages(runs):
    losses = [record["lm_loss"] for record in metrics(runs[0]).values()]
    assert losses[-1] < 0.7 * losses[0]


def test_review_sends_original_languages_to_the_original_expert(runs):
    before, after = final(runs[0], "en"), final(runs[1], "en")
    assert after["expert0_probability/original"] > 0.9
    assert after["expert0_top_k_share/original"] > 0.98
    assert after["lpr_loss"] < 0.2 * before["lpr_loss"]
    for language in EXPANDED:
        assert final(runs[1], language)["expert0_probability/expanded"] < 0.1


def test_review_brings_back_the_original_language_and_keeps_the_others(runs):
    assert final(runs[1], "en")["lm_loss"] < 0.2 * final(runs[0], "en")["lm_loss"]
    for language in EXPANDED:
        assert final(runs[1], language)["lm_loss"] < 1.1 * final(runs[0], language)["lm_loss"]
