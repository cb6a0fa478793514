"""What a run evaluates: how much of each validation dataset, and bits per byte of its text."""

import functools
import json
import math

import pytest

from tests.data.builders import write_dataset
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, make_data, metrics, train

TOKENS = 5 * 97


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A checkpoint, training data, and validation data of 97 documents of four tokens and their end."""
    root = tmp_path_factory.mktemp("evaluating")
    documents = [[1 + (7 * number + step) % 29 for step in range(4)] + [0] for number in range(97)]
    return make_checkpoint(root), make_data(root), write_dataset(root / "valid", "el", documents)


def evaluation(setting, save, ranks=1, **changes) -> dict[int, dict]:
    """Validation records of a run that changes no weight."""
    load, data, valid = setting
    run = functools.partial(train, load, save, data, valid_data_path=[valid], lr=0.0, train_iters=2, **changes)
    assert all(rank_pool(ranks).run(run))
    return metrics(save, "valid/el")


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"eval_iters": 1, "global_batch_size": 4}, 4 * 32),
        ({"eval_iters": 2, "global_batch_size": 4, "micro_batch_size": 1}, 8 * 32),
        ({"eval_iters": 100}, TOKENS - 1),
        ({"eval_iters": -1}, TOKENS - 1),
        ({}, TOKENS - 1),
        ({"eval_iters": 0}, None),
        ({"eval_iters": 0, "eval_interval": 1}, None),
        ({"eval_iters": 1, "global_batch_size": 4, "eval_interval": 0}, 4 * 32),
    ],
)
def test_as_many_global_batches_as_asked_for(changes, tokens, setting, tmp_path):
    records = evaluation(setting, tmp_path / "run", **changes)
    assert {step: record["tokens"] for step, record in records.items()} == ({} if tokens is None else {2: tokens})


def test_the_same_part_at_every_layout_and_micro_batch(setting, tmp_path):
    one = evaluation(setting, tmp_path / "one", eval_iters=1, global_batch_size=4)[2]
    layouts = ({"micro_batch_size": 1}, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2})
    for number, layout in enumerate(layouts):
        other = evaluation(setting, tmp_path / str(number), 2, eval_iters=1, global_batch_size=4, **layout)[2]
        assert other["tokens"] == one["tokens"] and other["lm_loss"] == pytest.approx(one["lm_loss"], rel=1e-5)


def test_a_part_has_no_bits_per_byte(setting, tmp_path):
    assert "bits_per_byte" not in evaluation(setting, tmp_path / "run", eval_iters=1, global_batch_size=4)[2]


def test_documents_of_a_run_are_kept_apart(setting, tmp_path):
    """In training and validation: less context, so another loss, of the same tokens."""
    changes = {"eod_mask_loss": True, "reset_attention_mask": True, "reset_position_ids": True}
    data = [setting[2]]
    apart = evaluation(setting, tmp_path / "apart", data_path=data, **changes)[2]
    across = evaluation(setting, tmp_path / "across", data_path=data, eod_mask_loss=True)[2]
    assert apart["tokens"] == across["tokens"] == TOKENS - 1 - 96
    assert abs(apart["lm_loss"] - across["lm_loss"]) > 1e-3
    trained = [metrics(tmp_path / name)[1]["lm_loss"] for name in ("apart", "across")]
    assert abs(trained[0] - trained[1]) > 1e-3
    recorded = json.loads((tmp_path / "apart" / "config.json").read_text())["config"]
    assert recorded.items() >= changes.items()


def test_bits_per_byte_are_of_the_whole_text_whatever_the_loss_mask(setting, tmp_path):
    plain = evaluation(setting, tmp_path / "plain")[2]
    masked = evaluation(setting, tmp_path / "masked", eod_mask_loss=True)[2]
    # After the last end of document no token follows.
    assert masked["tokens"] == plain["tokens"] - 96 and masked["lm_loss"] != plain["lm_loss"]
    with open(f"{setting[2]}.json", encoding="utf-8") as file:
        text_bytes = json.load(file)["text_bytes"]
    bits = plain["lm_loss"] * plain["tokens"] / math.log(2)
    assert plain["bits_per_byte"] == pytest.approx(bits / text_bytes, rel=1e-9)
    assert masked["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-9)
