"""Shares of experts from an evaluation's JSON, weighted as the checkpoint's data were."""

import json

import pytest

from megatron_moe_lpr.errors import UserError
from megatron_moe_lpr.model.moe.language_groups import LANGUAGE_GROUPS
from megatron_moe_lpr.planning.routing import Routing, read_routing
from tests.planning.counted_step import Case

SHARES = {
    "en": [[None] * 4, [0.9, 0.5, 0.3, 0.3], [0.8, 0.6, 0.6, 0.0]],
    "es": [[None] * 4, [0.7, 0.5, 0.5, 0.3], [0.6, 0.6, 0.8, 0.0]],
    "el": [[None] * 4, [0.2, 0.9, 0.5, 0.4], [0.4, 0.6, 1.0, 0.0]],
}
DATA = ["en 0.2 documents 0-10 index x", "es 0.1 documents 0-10 index y", "el 0.9 documents 0-10 index z"]


def evaluation(**changes) -> dict:
    """With a dense layer, one of four experts and one of three."""
    datasets = [
        {"language": name, "group": LANGUAGE_GROUPS[name == "el"], "routing": {"expert_share": shares}}
        for name, shares in SHARES.items()
    ]
    record = {"experts_per_layer": [1, 4, 3], "original_languages": ["en", "es"], "datasets": datasets}
    return record | {"history": [{"data": ["el 1.0"]}, {"data": DATA}]} | changes


@pytest.fixture
def written(tmp_path):
    def write(**changes):
        path = tmp_path / "evaluation.json"
        path.write_text(json.dumps(evaluation(**changes)))
        return path

    return write


def test_languages_of_a_group_count_alike_and_groups_as_in_the_last_stage(written):
    routing = read_routing(written())
    assert routing.original_share == pytest.approx(0.25)
    first, second = routing.layers
    assert first == pytest.approx([0.25 * 0.8 + 0.75 * 0.2, 0.8, 0.25 * 0.4 + 0.75 * 0.5, 0.375])
    assert second == pytest.approx([0.25 * 0.7 + 0.75 * 0.4, 0.6, 0.25 * 0.7 + 0.75 * 1.0])


def test_a_given_share_decides(written):
    path = written(history=[])
    assert read_routing(path, 1.0).layers[0] == pytest.approx([0.8, 0.5, 0.4, 0.3])
    assert read_routing(path, 0.0).layers[0] == pytest.approx([0.2, 0.9, 0.5, 0.4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": []}, "pass --original-share"),
        ({"history": [{"data": ["en"]}]}, "pass --original-share"),
        ({"history": [{"data": []}]}, "pass --original-share"),
        ({"datasets": []}, "no evaluation of a model with experts"),
        ({"experts_per_layer": [1, 1, 1]}, "no evaluation of a model with experts"),
        ({"datasets": [{"group": "original", "routing": None}]}, "no evaluation of a model with experts"),
        ({"datasets": 3}, "no evaluation of a model with experts"),
        ({"datasets": evaluation()["datasets"][:2]}, "25% of the tokens are of original languages; it lacks"),
    ],
)
def test_what_is_no_evaluation_is_named(written, changes, message):
    path = written(**changes)
    with pytest.raises(UserError, match=message) as caught:
        read_routing(path)
    assert str(path) in str(caught.value)


def test_other_models_keep_the_share_of_the_original_expert():
    routing = Routing(((0.5, 0.7, 0.8), (0.4, 1.0, 0.6)))
    shape = Case(experts=(1, 3, 5, 3)).shape
    assert routing.shares(shape, 1) == (0.5, 0.7, 0.8)
    assert routing.shares(shape, 2) == pytest.approx((0.4, 0.4, 0.4, 0.4, 0.4))
    assert routing.shares(shape, 3) == (0.5, 0.7, 0.8)
    assert Routing().shares(shape, 2) == (0.4,) * 5
