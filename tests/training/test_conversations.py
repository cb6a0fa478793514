"""Whole runs on conversations packed best-fit, blended with text: resumed at another layout, and evaluated."""

import json
from functools import partial

import numpy as np
import pytest

from megatron_moe_lpr.data.indexed import open_tokens, read_lengths
from tests.data.builders import write_dataset
from tests.distributed import rank_pool
from tests.training.runs import make_checkpoint, metrics, rewind, train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations in el and en, text in hu; the even tokens of the conversations count."""
    root, random, prefixes = tmp_path_factory.mktemp("data"), np.random.default_rng(5), {}
    for index, language in enumerate(("el", "en", "hu")):
        sizes = random.integers(4, 30, 40).tolist()
        documents = [random.integers(30 * index + 1, 30 * index + 31, size).tolist() for size in sizes]
        chat = language != "hu"
        prefixes[language] = write_dataset(root / language, language, documents, chat=chat)
    return prefixes


def labels_that_count(prefix, capacity=33):
    """How many labels of each conversation are even."""
    lengths = read_lengths(prefix)
    documents = np.split(open_tokens(prefix, np.int32), np.cumsum(lengths)[:-1])
    return [int((document[1:capacity] % 2 == 0).sum()) for document in documents]


def valid(save):
    record = metrics(save, "valid/en")[6]
    return record["tokens"], record["lm_loss"]


def test_a_run_is_resumed_at_another_layout(data, tmp_path):
    load = make_checkpoint(tmp_path)
    changes = {"save_interval": 3, "eval_interval": 6, "valid_data_path": [data["en"]], "stage": "2"}
    first, again = tmp_path / "first", tmp_path / "again"
    assert rank_pool(1).run(partial(train, **changes), load, first, data) == [True]
    rewind(first, again, 3)
    changes["tensor_model_parallel_size"] = 2
    assert rank_pool(2).run(partial(train, **changes), load, again, data) == [True, True]
    losses = [[metrics(save)[step]["lm_loss"] for step in (4, 5, 6)] for save in (first, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    (tokens, loss), (again_tokens, again_loss) = (valid(save) for save in (first, again))
    # Every counted token of the conversations once, but for the first of each and what is cut.
    assert tokens == again_tokens == sum(labels_that_count(data["en"])) and loss == pytest.approx(again_loss, rel=1e-5)
    history = json.loads((first / "iter_0000006" / "moe_lpr" / "card.json").read_text())["history"][-1]
    assert history["reset_attention_mask"] is True and history["reset_position_ids"] is True
    packed = ["packed best-fit" in line for line in history["data"]]
    assert packed == [True, True, False]
